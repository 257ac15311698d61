"""A training run: updates in jitted chunks, all seeds at once, with evaluations, checkpoints and a curve."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core.checkpoint import Checkpointer
from core.config import to_dict, to_yaml
from core.errors import UserError
from core.mesh import make_mesh
from core.metrics import MetricsWriter, read_metrics
from core.run import RunFolder
from core.signals import Stop
from rl import start
from rl.algorithm import Algorithm, State
from rl.config import Experiment
from rl.curve import live
from rl.envs.wrapper import Env
from rl.evaluate import evaluate
from rl.report import finish

_LINES = 100  # of metrics in a run, about
_EVALUATION = 0x5EED  # folded into a seed's key, so that evaluations draw nothing that training draws
_log = logging.getLogger(__name__)


class Programs(NamedTuple):
    """What is compiled once for a run. Every leaf of a state has the leading axis [seeds]."""

    init: Callable[[jax.Array], State]  # seeds -> state
    # Jitted: state, number of updates -> state, means over the updates that have a figure [seeds], and
    # whether all that acting needs is finite [seeds].
    advance: Any
    # Agents, seeds, step -> returns and lengths [seeds, episodes].
    evaluate: Callable[[Any, jax.Array, int], tuple[jax.Array, jax.Array]]
    place: NamedSharding  # of every leaf
    mesh: Mesh | None  # that `update` divides environments over


def train(experiment: Experiment, *, resume: bool = False) -> None:
    """Train until `train.steps`, or until SIGTERM or Ctrl-C, which save and return.

    Raises:
        UserError: for anything in the configuration or the run folder that the user can mend.
    """
    env, algorithm = start.build(experiment)
    programs = make_programs(experiment, env, algorithm, make_mesh(experiment.mesh))
    run = RunFolder.create(experiment.run.folder, to_yaml(experiment), resume)
    with Stop() as stop, Checkpointer(run.checkpoints, experiment.checkpoint.keep) as checkpointer:
        done, state = _first_state(experiment, programs, checkpointer)
        state, done = _run_updates(experiment, programs, run, checkpointer, stop, state, done)
        checkpointer.wait()
    if done < experiment.train.steps:
        _log.info("%s: saved step %d in %s; go on with --resume", stop.signal, done, run.path)
        return
    figures = jax.tree.map(np.asarray, programs.evaluate(state.agent, start.seeds(experiment), done))
    finish(run, experiment, *figures)


def make_programs(experiment: Experiment, env: Env, algorithm: Algorithm, mesh: Mesh) -> Programs:
    """Compile nothing yet, and decide what is divided over the mesh: seeds if they can be, or environments
    and what is learned from at once.

    Raises:
        UserError: if neither divides over the devices.
    """
    seeds, devices = experiment.train.seeds, mesh.shape["data"]
    if seeds % devices == 0:
        place, inner = NamedSharding(mesh, PartitionSpec("data")), None
    else:
        for name, size in getattr(experiment, experiment.algorithm).divided.items():
            if size % devices:
                raise UserError(
                    f"neither train.seeds ({seeds}) nor {experiment.algorithm}.{name} ({size}) divides over "
                    f"mesh.data={devices}: choose one that does"
                )
        place, inner = NamedSharding(mesh, PartitionSpec()), mesh

    def advance(state: State, count: jax.Array) -> tuple[State, dict[str, jax.Array], jax.Array]:
        names = jax.eval_shape(algorithm.update, state)[1]

        def update(_, carry):
            state, total, there = carry
            state, metrics = algorithm.update(state)
            known = jax.tree.map(lambda x: ~jnp.isnan(x), metrics)
            total = jax.tree.map(lambda t, x, k: t + jnp.where(k, x, 0.0), total, metrics, known)
            return state, total, jax.tree.map(jnp.add, there, known)

        nothing = {name: jnp.float32(0) for name in names}
        state, total, there = jax.lax.fori_loop(0, count, update, (state, nothing, nothing))
        finite = jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(state.agent)]).all()
        return state, jax.tree.map(jnp.divide, total, there), finite

    def assess(agent: Any, seed: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _EVALUATION), step)
        return evaluate(algorithm, env, agent, key, experiment.eval.episodes)

    return Programs(
        jax.jit(lambda seeds: start.init(algorithm, seeds), out_shardings=place),
        jax.jit(
            jax.vmap(advance, (0, None)), in_shardings=(place, None), out_shardings=place, donate_argnums=0
        ),
        jax.jit(jax.vmap(assess, (0, 0, None)), in_shardings=(place, place, None)),
        place,
        inner,
    )


def _first_state(experiment: Experiment, programs: Programs, checkpointer: Checkpointer) -> tuple[int, State]:
    step, seeds = checkpointer.newest_intact(), start.seeds(experiment)
    if step is None:
        return 0, programs.init(seeds)
    targets = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=programs.place),
        jax.eval_shape(programs.init, seeds),
    )
    _log.info("resuming from step %d", step)
    return step, State(*checkpointer.restore(step, targets.agent, targets.training))


def _run_updates(
    experiment: Experiment,
    programs: Programs,
    run: RunFolder,
    checkpointer: Checkpointer,
    stop: Stop,
    state: State,
    done: int,
) -> tuple[State, int]:
    """The state when all is done or a signal came, and its step."""
    total, each = experiment.train.steps, experiment.steps_per_update
    advance = advance_under(programs, state)
    lines = max(1, experiment.updates // _LINES) * each
    intervals = [step for step in (lines, experiment.eval.every, experiment.checkpoint.every) if step]
    points = [(int(line["step"]), line.get("episode_return", math.nan)) for line in read_metrics(run.metrics)]
    points = [point for point in points if point[0] <= done]
    with (
        MetricsWriter(run, done) as writer,
        live("training", total, done, f"return of training episodes, {experiment.env.name}") as show,
    ):
        while done < total:
            until = min(total, *(done + step - done % step for step in intervals))
            started = time.perf_counter()
            state, metrics, finite = advance(state, (until - done) // each)
            values = _values(experiment, metrics)  # waits for the device
            _refuse_diverged(experiment, until, np.asarray(finite))
            seconds = time.perf_counter() - started
            values["steps_per_second"] = (until - done) * experiment.train.seeds / seconds
            done = until
            if experiment.eval.every and done % experiment.eval.every == 0:
                returns, _ = programs.evaluate(state.agent, start.seeds(experiment), done)
                values["eval_return_mean"] = float(returns.mean())
            writer.write(done, values)  # before the checkpoint that stands for having done this
            points.append((done, values.get("episode_return", math.nan)))
            show(done, points, _status(values))
            every, stopping = experiment.checkpoint.every, stop.signal
            if done == total or stopping or (every and done % every == 0):
                checkpointer.save(done, *state, {"config": to_dict(experiment)})
            if stopping:
                break
    return state, done


def advance_under(programs: Programs, state: State) -> Any:
    """`programs.advance`, compiled."""
    started = time.perf_counter()
    with jax.set_mesh(programs.mesh) if programs.mesh else contextlib.nullcontext():
        compiled = programs.advance.lower(state, 1).compile()
    _log.info("compiled in %.1f s", time.perf_counter() - started)
    return compiled


def _refuse_diverged(experiment: Experiment, step: int, finite: np.ndarray) -> None:
    if not finite.all():
        seeds = ", ".join(str(experiment.seed + i) for i in np.flatnonzero(~finite))
        raise UserError(
            f"the agent of seed {seeds} is no longer made of finite numbers at step {step}: lower the "
            f"learning rate of {experiment.algorithm} and train in a new folder"
        )


def _values(experiment: Experiment, metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Means over seeds of the figures there are, and each seed's mean return of the episodes that ended."""
    means = {name: np.asarray(value, float) for name, value in metrics.items()}
    episodes, returns, lengths = (means.pop(name) for name in ("episodes", "returns", "lengths"))
    values = {name: float(value.mean()) for name, value in means.items() if not np.isnan(value).any()}
    ended = np.flatnonzero(episodes)
    if len(ended):
        values["episode_return"] = float((returns[ended] / episodes[ended]).mean())
        values["episode_length"] = float((lengths[ended] / episodes[ended]).mean())
    for i in ended:
        values[f"episode_return_seed_{experiment.seed + i}"] = float(returns[i] / episodes[i])
    return values


def _status(values: dict[str, float]) -> str:
    score = f"return {values['episode_return']:,.1f}  " if "episode_return" in values else ""
    return f"{score}{values['steps_per_second']:,.0f} steps/s"
