"""A run as the plan sees it: the arrays of its state with what divides them, and one device's share of a
batch.

Letters as in `llm.model.transformer`: B batch, S sequence, D embed, H heads, G key-value heads, K head
dimension, F mlp, V vocabulary, L layers; E experts, k of them a token's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from core.mesh import AXES, shardings, spec
from core.optim import make_optimizer, state_shardings
from core.options import MeshConfig, OptimizerConfig
from llm.config import Experiment
from llm.model.config import ModelConfig
from llm.model.transformer import blueprint

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes


class Parameter(NamedTuple):
    """A float32 master weight; the layers' are stacked along a first axis."""

    path: str  # as `blocks.mlp.up.kernel`
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical
    divided: tuple[str, ...]  # the mesh axes that divide it

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"

    @property
    def of_router(self) -> bool:
        return self.axes[-1] == "experts"

    @property
    def of_expert(self) -> bool:
        return "experts" in self.axes and not self.of_router

    @property
    def size(self) -> int:
        """Elements of one layer's, or of all where it isn't stacked."""
        return math.prod(self.shape[1:] if self.stacked else self.shape)

    def share(self, mesh: Mapping[str, int], gathered: tuple[str, ...] = ()) -> int:
        """Elements of `size` on one device, once it is gathered over some axes."""
        return self.size // math.prod(mesh[axis] for axis in self.divided if axis not in gathered)


@functools.cache
def parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    """All parameters, from the metadata that they are declared with."""
    plan = blueprint(model)
    shapes, _ = jax.tree_util.tree_flatten_with_path(plan.shapes)
    axes = jax.tree.leaves(plan.axes, is_leaf=lambda x: isinstance(x, tuple))
    return tuple(
        Parameter(
            jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape, names, _mesh_axes(spec(names))
        )
        for (path, leaf), names in zip(shapes, axes, strict=True)
    )


@functools.cache
def _optimizer_state(model: ModelConfig, optimizer: str) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Bytes of each array of an optimizer's state, and the mesh axes that divide it: from production code."""
    plan = blueprint(model)
    options = OptimizerConfig(name=optimizer)  # type: ignore[arg-type]
    made = make_optimizer(options, 1, plan.decay, plan.axes)
    mesh = AbstractMesh((1,) * len(AXES), AXES)
    state = jax.eval_shape(made.transform.init, plan.shapes)
    placed = state_shardings(made, plan.shapes, shardings(mesh, plan.axes), mesh)
    return tuple(
        (leaf.dtype.itemsize * math.prod(leaf.shape), _mesh_axes(sharding.spec))
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
    )


def _mesh_axes(partition: Any) -> tuple[str, ...]:
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in partition]
    return tuple(axis for entry in entries for axis in entry)


def sizes(mesh: MeshConfig) -> dict[str, int]:
    """Devices along each axis; an axis of -1, which takes what is left, has one."""
    return {axis: max(1, getattr(mesh, axis)) for axis in AXES}


@dataclasses.dataclass(frozen=True)
class Layout:
    """An experiment on a mesh, and what one device has of it."""

    experiment: Experiment
    mesh: dict[str, int]

    @classmethod
    def of(cls, experiment: Experiment) -> Layout:
        return cls(experiment, sizes(experiment.mesh))

    @property
    def model(self) -> ModelConfig:
        return self.experiment.model

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def width(self) -> int:
        """Bytes of an element of the products' dtype."""
        return WIDTH[self.experiment.train.dtype]

    @property
    def microbatches(self) -> int:
        return self.experiment.train.accumulation

    @property
    def rows(self) -> int:
        """Sequences of a microbatch on one device."""
        batch = self.experiment.data.batch_size // self.microbatches
        return batch // (self.mesh["data"] * self.mesh["fsdp"] * self.mesh["expert"])

    @property
    def length(self) -> int:
        """Positions of a sequence on one device, where heads, mlp and vocabulary are divided."""
        return self.experiment.data.sequence_length // self.mesh["context"]

    @property
    def tokens(self) -> int:
        """Of a microbatch on one device."""
        return self.rows * self.length

    @property
    def stream(self) -> int:
        """Positions of the residual stream on one device: the sequence is divided over `tensor` too."""
        return self.tokens // self.mesh["tensor"]

    @property
    def slots(self) -> int:
        """Rows that a device lays out for all experts together, from its part of the stream; 0 without."""
        moe = self.model.moe
        return 0 if moe is None else moe.num_experts * moe.slots(self.stream)

    @property
    def step_tokens(self) -> int:
        """Of a step, on all devices."""
        return self.experiment.data.batch_size * self.experiment.data.sequence_length

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return parameters(self.model)

    @property
    def parameter_bytes(self) -> int:
        """Of the float32 weights on one device."""
        return 4 * sum((p.shape[0] if p.stacked else 1) * p.share(self.mesh) for p in self.parameters)

    @property
    def optimizer_bytes(self) -> int:
        """Of the optimizer's state on one device."""
        state = _optimizer_state(self.model, self.experiment.optimizer.name)
        return sum(size // math.prod(self.mesh[axis] for axis in divided) for size, divided in state)

    @property
    def largest_optimizer_bytes(self) -> int:
        """Of the state of the parameter that has most of it, on one device."""
        largest = max((p.shape[0] if p.stacked else 1) * p.share(self.mesh) for p in self.parameters)
        weights = self.parameter_bytes // 4
        return self.optimizer_bytes * largest // weights
