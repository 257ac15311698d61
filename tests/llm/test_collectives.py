"""What crosses the mesh in a training step: counted in the program that XLA has just divided over devices.

Nothing is merged there yet: what the forward pass, its recomputation and the backward pass gather alike, and
the three gradients of one stream that are summed, are counted one by one. An all-reduce of which a device
keeps its part is what accelerators do as reduce-scatter; left to itself XLA never does so on the CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter

import jax
import pytest
from programs import collectives, partitioned
from test_step import LENGTH, ROWS, SGD, TRAIN, packed_batch

from core.mesh import make_mesh
from core.optim import make_optimizer
from core.options import MeshConfig
from core.state import first_step
from llm.model.config import ModelConfig
from llm.model.transformer import Compute, blueprint
from llm.step import jit_train_step

# Sizes of which no array of one kind looks like one of another, on any of the meshes.
MODEL = ModelConfig(
    vocab_size=176,
    num_layers=2,
    embed_dim=40,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    mlp_dim=56,
    max_length=32,
)
MATRICES = 7  # of a layer: query, key, value, out, gate, up, down
INTO, OUT = 2, 2  # places of a layer where the stream is gathered over tensor, and where it is summed again


@functools.cache
def counted(sizes: tuple, remat: str) -> Counter:
    """(what kind of array, collective, in a loop) -> how often it stands in a step's program."""
    mesh = make_mesh(MeshConfig(**{"data": 1} | dict(sizes)))
    compute = Compute("bfloat16", "ring" if mesh.shape["context"] > 1 else "reference", remat)
    model, train = blueprint(MODEL, compute), dataclasses.replace(TRAIN, remat=remat)
    optimizer = make_optimizer(SGD, train.steps, model.decay, model.axes)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: first_step(train, optimizer, model.init(jax.random.key(0))))
        lowered = jit_train_step(model, train, optimizer, mesh).lower(state, packed_batch(0))
    found = collectives(partitioned(lowered))
    return Counter((_array(shape, mesh), kind, inside) for kind, shape, inside in found if shape)


def _array(shape: tuple[int, ...], mesh) -> str:
    """Which of a step's arrays has this shape on a device."""
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    batch, length = ROWS // mesh.shape["data"] // fsdp, LENGTH // mesh.shape["context"]
    kernels = jax.tree.map(lambda x: x.shape[1:], blueprint(MODEL).shapes["blocks"])
    for path, kernel in jax.tree_util.tree_leaves_with_path(kernels, is_leaf=lambda x: isinstance(x, tuple)):
        parts = [{size, size // fsdp, size // tensor} for size in kernel]
        # A gradient may come with its axes in another order.
        if any(shape in itertools.product(*order) for order in itertools.permutations(parts)):
            return "matrix" if path[-1].key == "kernel" else "norm"
    if shape == (batch, length, MODEL.embed_dim):
        return "stream"
    if shape in itertools.product([batch], [length // tensor, length // 2], [MODEL.embed_dim]):
        return "part of stream"  # along tensor, or one of the ring's pieces
    if len(shape) == 4:
        return "keys"
    if len(shape) == 2 and {MODEL.vocab_size, MODEL.vocab_size // tensor} & {*shape}:
        return "table"
    return "tokens" if len(shape) == 2 and shape[0] == batch else str(shape)


MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"data": 4, "tensor": 2},
    {"context": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 2, "context": 2},
]
SOON = [
    ({"fsdp": 8}, "full"),
    ({"data": 2, "fsdp": 2, "tensor": 2}, "full"),
    ({"data": 2, "fsdp": 2, "tensor": 2}, "none"),
    ({"fsdp": 2, "tensor": 2, "context": 2}, "none"),
]


def slow_but(soon: list, cases: list) -> list:
    return [pytest.param(*case, marks=[] if case in soon else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("sizes", "remat"),
    slow_but(SOON, [*((mesh, "full") for mesh in MESHES), *((mesh, "none") for mesh in MESHES[-2:])]),
    ids=str,
)
def test_a_layer_gathers_and_sums_what_it_must_and_nothing_else(sizes, remat):
    found = {key[:2]: n for key, n in counted(tuple(sizes.items()), remat).items() if key[2]}
    again = remat == "full"  # all of a layer but its last product is computed once more
    fsdp, tensor = ("fsdp" in sizes, "tensor" in sizes)
    replicas = sum(1 for axis in ("data", "context") if axis in sizes)
    places = min(
        sizes.get("context", 1) - 1, 2
    )  # of a program that pass keys on: before the ring's loop, in it
    expected = {
        ("matrix", "all-gather"): fsdp * (2 * MATRICES + again * (MATRICES - 1)),
        ("matrix", "all-reduce"): (fsdp + replicas) * MATRICES,
        ("stream", "all-gather"): tensor * (INTO + OUT + again * INTO),
        # Backward: of gate and up, and of query, key and value.
        ("stream", "all-reduce"): tensor * (OUT + 5 + again * (OUT - 1)),
        ("norm", "all-reduce"): 2 * (tensor + 1),
        ("tokens", "all-reduce"): 3 * tensor,  # the softmax over a divided vocabulary
        # Keys and values, forward and backward; their gradients, which go one place further: home.
        ("keys", "collective-permute"): 2 * places * (2 + again) + 2 * (places + 1) * (places > 0),
    }
    assert found == {key: n for key, n in expected.items() if n}


@pytest.mark.parametrize("sizes", slow_but([(m,) for m in MESHES[-2:]], [(m,) for m in MESHES]), ids=str)
def test_outside_the_layers_only_the_tables_and_the_ends_of_the_stream_move(sizes):
    found = {key[:2]: n for key, n in counted(tuple(sizes.items()), "none").items() if not key[2]}
    fsdp, tensor, context = (axis in sizes for axis in ("fsdp", "tensor", "context"))
    replicated = "data" in sizes or context
    expected = {
        ("table", "all-gather"): 2 * fsdp,  # embedding and head
        ("table", "reduce-scatter"): fsdp,  # the head's gradient, by hand
        # It again, over the axes that don't divide it; the embedding's, over those of the batch and of a row.
        ("table", "all-reduce"): replicated + ("data" in sizes or fsdp) + context,
        ("stream", "all-reduce"): tensor,  # rows looked up in a divided table
        ("stream", "all-gather"): 3 * tensor,  # hidden states; gradients at both ends
        ("part of stream", "reduce-scatter"): tensor,  # the loss's gradient
        ("part of stream", "collective-permute"): 2
        * 2
        * context,  # hidden states out of zigzag order, and back
        ("tokens", "collective-permute"): 2
        * 4
        * context,  # ids, positions, starts and a mask of these into it
        ("tokens", "all-gather"): context,  # where documents start
        ("norm", "all-reduce"): 1 + tensor,
    }
    assert found == {key: n for key, n in expected.items() if n}
