"""Dynamic loss scaling, which float16 needs: its smallest number is 6e-8, and gradients are smaller.

The loss is multiplied by a scale before it is differentiated, the gradient divided by it after. A gradient
that isn't finite says that the scale was too large: it is halved, and that step's update skipped; after
`INTERVAL` steps without one it is doubled (Micikevicius et al. 2018, arXiv:1710.03740). Constants are those
of `torch.amp.GradScaler`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

INITIAL = 2.0**16
INTERVAL = 2000

T = TypeVar("T")


class LossScale(NamedTuple):
    """The scale, a power of two, and how many steps in a row it has stood."""

    value: Float[Array, ""]
    steps: Int[Array, ""]

    @classmethod
    def initial(cls) -> LossScale:
        return cls(jnp.float32(INITIAL), jnp.int32(0))

    def adjusted(self, finite: Bool[Array, ""]) -> LossScale:
        """The scale for the next step, after one whose gradient was `finite` or not."""
        steps = jnp.where(finite, self.steps + 1, 0)
        grows = steps == INTERVAL
        factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        return LossScale(self.value * factor, jnp.where(grows, 0, steps))


def where_finite(finite: Bool[Array, ""], new: T, old: T) -> T:
    """`new` after a step whose gradient was finite, else `old`: any pytree of arrays."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
