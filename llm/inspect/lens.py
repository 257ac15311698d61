"""What a model makes of a text, layer by layer, as arrays.

Letters in shapes: S tokens, L layers, H heads, V vocabulary, D embed, N likeliest tokens. A query is the
token that attends, a key one that is attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from core.module import Params
from llm.model.config import ModelConfig
from llm.model.transformer import Compute, Transformer, blueprint


class Inspection(NamedTuple):
    """What a model makes of S tokens.

    Attributes:
        tokens: their ids.
        attention: weight of each key for each query; rows sum to one. Head h uses key-value head
            h * num_kv_heads // num_heads.
        lens_tokens, lens_probabilities: the token that each layer's logit lens gives most, at each position.
        next_tokens, next_probabilities: the likeliest tokens after each position, the likeliest first.
        surprisal: -ln p(token | those before it) in nats, of every token but the first.
    """

    tokens: Int[np.ndarray, " S"]
    attention: Float[np.ndarray, "L H S S"]
    lens_tokens: Int[np.ndarray, "L S"]
    lens_probabilities: Float[np.ndarray, "L S"]
    next_tokens: Int[np.ndarray, "S N"]
    next_probabilities: Float[np.ndarray, "S N"]
    surprisal: Float[np.ndarray, " S-1"]


class HeadFigures(NamedTuple):
    """Where each head looks, as means over the queries that have a choice: all but the first.

    Attributes:
        first, previous, itself: weight on the text's first token, on the one before the query, on the query.
        entropy: of the weights over the keys, in nats; 0 where all the weight is on one key.
    """

    first: Float[np.ndarray, "L H"]
    previous: Float[np.ndarray, "L H"]
    itself: Float[np.ndarray, "L H"]
    entropy: Float[np.ndarray, "L H"]


def inspect(
    config: ModelConfig, params: Params, tokens: Sequence[int], likeliest: int = 10, dtype: str = "float32"
) -> Inspection:
    """Run a model over `tokens` and keep what it shows on the way.

    Args:
        config: the model's shape.
        params: its parameters, as training has them.
        tokens: ids, at least one.
        likeliest: how many next tokens to keep at each position; at most `config.vocab_size`.
        dtype: of the products.
    """
    model = blueprint(config, Compute(dtype))  # type: ignore[arg-type]

    def run(params: Params, ids: Int[Array, " S"]):
        bound, batch = model.bind(params), ids[None]
        output = bound(batch, jnp.arange(len(ids))[None], jnp.ones_like(batch), capture=True)
        # A layer at a time: the logits of all of them would be the largest array by far.
        lens = jax.lax.map(lambda x: _top(log_probabilities(bound, x)[0], 1), output.aux["hidden"])
        final = jax.nn.log_softmax(bound.logits(output.hidden))[0]
        nats = -jnp.take_along_axis(final[:-1], ids[1:, None], axis=1)[:, 0]
        maps = output.aux["attention"][:, 0]
        maps = maps.reshape(len(maps), -1, *maps.shape[3:])
        return maps, *(x[..., 0] for x in lens), *_top(final, likeliest), nats

    ids = np.asarray(tokens, np.int32)
    return Inspection(ids, *map(np.asarray, jax.jit(run)(params, ids)))


def log_probabilities(model: Transformer, block_output: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
    """The logit lens (nostalgebraist 2020): what the model would predict were this block its last.

    The final norm and the head applied to a block's output; for the last block, the model's own prediction.
    """
    return jax.nn.log_softmax(model.logits(model.norm(block_output)))


def _top(log_probabilities: Float[Array, "S V"], count: int) -> tuple[Int[Array, "S N"], Float[Array, "S N"]]:
    values, tokens = jax.lax.top_k(log_probabilities, count)
    return tokens, jnp.exp(values)


def head_figures(attention: Float[np.ndarray, "L H S S"]) -> HeadFigures:
    """Where the heads look, of maps of at least two tokens."""
    choosing = attention[:, :, 1:]
    logs = np.log(np.where(choosing > 0, choosing, 1))
    return HeadFigures(
        first=choosing[..., 0].mean(-1),
        previous=np.diagonal(attention, -1, axis1=2, axis2=3).mean(-1),
        itself=np.diagonal(attention, 0, axis1=2, axis2=3)[..., 1:].mean(-1),
        entropy=-(choosing * logs).sum(-1).mean(-1),
    )


def right_guesses(inspection: Inspection) -> Bool[np.ndarray, "L S"]:
    """Where a layer's likeliest token is the one that follows; after the last position none is known to."""
    following = np.append(inspection.tokens[1:], -1)
    return inspection.lens_tokens == following
