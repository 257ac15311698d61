"""Text as an environment: an action is a token, an episode a sentence, and the reward comes at its end.

This is how a language model meets reinforcement learning: the policy sees the tokens so far and chooses the
next one, and what is judged is the whole sentence. A sentence is right when it reads

    the|a ADJECTIVE NOUN VERB the|a NOUN .

with two different nouns. Its reward is the share of its words before the first mistake, so that 1 is a right
sentence and nothing else.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

VOCABULARY = (
    "the", "a", "small", "old", "quick", "cat", "dog", "bird", "fox", "sees", "hears", "likes", "."
)  # fmt: skip
_KINDS = {"article": (0, 1), "adjective": (2, 3, 4), "noun": (5, 6, 7, 8), "verb": (9, 10, 11), "stop": (12,)}
_GRAMMAR = ("article", "adjective", "noun", "verb", "article", "noun", "stop")
_FIRST_NOUN, _SECOND_NOUN = 2, 5  # places
LENGTH = len(_GRAMMAR)
STOP = VOCABULARY.index(".")

# [place, token] whether the token may stand there.
_ALLOWED = np.array([[token in _KINDS[kind] for token in range(len(VOCABULARY))] for kind in _GRAMMAR])


@struct.dataclass
class SentenceState(environment.EnvState):
    time: Any
    tokens: Any  # [LENGTH] ids, and -1 where none is yet


@struct.dataclass
class SentenceParams(environment.EnvParams):
    max_steps_in_episode: Any = LENGTH + 1  # never reached: a full sentence is over


class Sentences(environment.Environment[SentenceState, SentenceParams]):
    """A sentence is over at its first full stop, or when it is full.

    An observation is the tokens so far, one-hot, [LENGTH * len(VOCABULARY)].
    """

    @property
    def name(self) -> str:
        return "Sentences"

    @property
    def default_params(self) -> SentenceParams:
        return SentenceParams()

    @property
    def num_actions(self) -> int:
        return len(VOCABULARY)

    def action_space(self, params: Any = None) -> spaces.Discrete:
        return spaces.Discrete(self.num_actions)

    def observation_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(0, 1, (LENGTH * self.num_actions,))

    def reset_env(self, key: jax.Array, params: SentenceParams) -> tuple[jax.Array, SentenceState]:
        state = SentenceState(time=0, tokens=jnp.full(LENGTH, -1))
        return self.get_obs(state), state

    def step_env(self, key: jax.Array, state: SentenceState, action: Any, params: SentenceParams):
        state = SentenceState(time=state.time + 1, tokens=state.tokens.at[state.time].set(action))
        over = self.is_terminated(state, params)
        return self.get_obs(state), state, jnp.where(over, score(state.tokens), 0.0), over, {}

    def get_obs(self, state: SentenceState, params: Any = None, key: Any = None) -> jax.Array:
        return jax.nn.one_hot(state.tokens, self.num_actions).reshape(-1)

    def is_terminated(self, state: SentenceState, params: SentenceParams) -> jax.Array:
        last = state.tokens[jnp.maximum(state.time - 1, 0)]
        return (last == STOP) | (state.time == LENGTH)


def score(tokens: jax.Array) -> jax.Array:
    """The share of a sentence's places [LENGTH] that are right before the first that isn't."""
    right = jnp.asarray(_ALLOWED)[jnp.arange(LENGTH), tokens] & (tokens >= 0)
    right = right.at[_SECOND_NOUN].set(right[_SECOND_NOUN] & (tokens[_FIRST_NOUN] != tokens[_SECOND_NOUN]))
    return jnp.cumprod(right.astype(jnp.float32)).sum() / LENGTH


def text(tokens: Any) -> str:
    """A sentence as one reads it."""
    return " ".join(VOCABULARY[token] for token in np.asarray(tokens) if token >= 0).replace(" .", ".")
