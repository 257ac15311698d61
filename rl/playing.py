"""Episodes of a trained agent, step by step, and what one sees of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from rl.envs import tokens
from rl.envs.wrapper import EnvState
from rl.pictures import draw, refuse_unseen, save_gif
from rl.start import Trained, agent_of, load_trained

_log = logging.getLogger(__name__)


def play(
    run: Path, seed: int | None, episodes: int, key: int, out: Path | None, *, greedy: bool = True
) -> None:
    """Play and write a GIF; sentences are printed instead.

    Raises:
        UserError: if there is no such run or seed in it, or its environment has no picture.
    """
    trained = load_trained(run)
    text = trained.env.name == "Sentences"
    agent = agent_of(trained, seed)
    if not text:
        refuse_unseen(trained.env)
    played = [roll(trained, agent, jax.random.key(key + i), greedy) for i in range(episodes)]
    console = Console(highlight=False)
    if text:
        for states, score in played:
            console.print(f"{score:.2f}  {tokens.text(states.inner.tokens[-1])}")
        return
    frames = [draw(trained.env, at(states, t)) for states, _ in played for t in range(steps_of(states))]
    path = run / "plots" / "play.gif" if out is None else out
    save_gif(frames, path)
    returns = ", ".join(f"{score:,.2f}" for _, score in played)
    console.print(f"return {returns} in {len(frames)} frames: {path}", soft_wrap=True)


def roll(trained: Trained, agent: Any, key: jax.Array, greedy: bool) -> tuple[EnvState, float]:
    """The states of one episode in order, each leaf [steps + 1, ...] of NumPy, and its return.

    The last state is the one that the episode ended in.
    """
    env, algorithm = trained.env, trained.algorithm
    key, key_reset = jax.random.split(key)
    observation, state = env.reset(key_reset)

    def step(carry, key):
        observation, state = carry
        key_act, key_step = jax.random.split(key)
        action = algorithm.act(agent, observation[None], key_act, greedy)[0]
        # The environment's own step, without the reset, shows what the last action led to.
        reached = env.unreset_step(key_step, state, action)
        observation, state, _, terminated, truncated, info = env.step(key_step, state, action)
        return (observation, state), (reached, terminated | truncated, info["episode_return"])

    _, (states, over, returns) = jax.jit(
        lambda: jax.lax.scan(step, (observation, state), jax.random.split(key, env.max_steps))
    )()
    last = int(np.argmax(over))
    whole = jax.tree.map(lambda a, b: np.concatenate([np.asarray(a)[None], b[: last + 1]]), state, states)
    return whole, float(returns[last])


def steps_of(states: EnvState) -> int:
    return len(states.episode_length)


def at(states: EnvState, t: int) -> Any:
    """The environment's own state at a step."""
    return jax.tree.map(lambda x: x[t], states.inner)
