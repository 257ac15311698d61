"""The boundary between Flax modules and plain JAX.

A module declares each parameter once, with its logical axes and whether it is decayed. `Blueprint`
splits it, abstractly, into a static graph and metadata; what flows through training is a nested dict
of arrays, and `bind` gives the module back inside a traced function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
Params = dict[str, Any]


def param(
    rngs: nnx.Rngs, init: Initializer, shape: Sequence[int], axes: Sequence[str], *, decay: bool
) -> nnx.Param:
    """Declare a float32 master weight: its initial values, logical axes and weight decay."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} and axes {tuple(axes)} differ in rank")
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes), decay=decay)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` copies of a module as one, each parameter with a leading axis `layers`."""
    keys = jax.random.split(rngs.params(), count)
    stacked = nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)
    for _, variable in nnx.iter_graph(stacked):
        if isinstance(variable, nnx.Param):
            variable.set_metadata(axes=("layers", *variable.get_metadata()["axes"]))
    return stacked


@dataclasses.dataclass(frozen=True, eq=False)
class Blueprint:
    """A module without its values: everything that follows from the declarations of its parameters."""

    make: Callable[[nnx.Rngs], nnx.Module]
    graph: nnx.GraphDef
    state: nnx.State

    @classmethod
    def of(cls, make: Callable[[nnx.Rngs], nnx.Module]) -> Blueprint:
        return cls(make, *nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=0)))))

    def init(self, key: jax.Array) -> Params:
        """Initial values, the same bits on every mesh when jitted with `out_shardings`."""
        return nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(params=key))))

    def bind(self, params: Params) -> Any:
        """The module with these values."""
        state = jax.tree.map(lambda x: x, self.state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graph, state)

    @property
    def shapes(self) -> Params:
        """`jax.ShapeDtypeStruct` of each parameter."""
        return nnx.to_pure_dict(self.state)

    @property
    def axes(self) -> Params:
        """Logical axes of each parameter, a tuple of names."""
        return self._metadata("axes")

    @property
    def decay(self) -> Params:
        """Whether weight decay applies to each parameter."""
        return self._metadata("decay")

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes))

    def _metadata(self, key: str) -> Params:
        is_param = lambda x: isinstance(x, nnx.Param)  # noqa: E731
        return nnx.to_pure_dict(
            jax.tree.map(lambda p: nnx.Param(p.get_metadata()[key]), self.state, is_leaf=is_param)
        )
