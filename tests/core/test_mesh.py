"""The table of logical axes, the mesh, and initial values that don't depend on it."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_array_equal

from core.errors import UserError
from core.mesh import AXES, RULES, check_divides, make_mesh, shard, shardings, spec
from core.module import Blueprint, param, stack
from core.options import MeshConfig
from llm.model.config import ModelConfig
from llm.model.layers import Linear
from llm.model.transformer import Compute, blueprint

MODEL = ModelConfig(
    vocab_size=120,
    num_layers=2,
    embed_dim=56,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    mlp_dim=72,
    max_length=32,
)
MESHES = [
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


def test_the_table_maps_to_mesh_axes():
    used = {
        axis for entry in RULES.values() for axis in ((entry,) if isinstance(entry, str) else entry or ())
    }
    assert used <= set(AXES)


@pytest.mark.parametrize("config", [MODEL, ModelConfig(8, 1, 8, 2, 2, 4, 8, 8, qk_norm=True, norm="layer")])
def test_no_parameter_collides(config):
    for axes in jax.tree.leaves(blueprint(config).axes, is_leaf=lambda x: isinstance(x, tuple)):
        spec(axes)


def test_collisions_are_errors():
    assert spec(("layers", "embed", "heads", "head_dim")) == P(None, "fsdp", "tensor", None)
    assert spec(("act_batch", "act_seq", None)) == P(("data", "fsdp", "expert"), "context", None)
    for axes in [("heads", "mlp"), ("embed", "embed"), ("act_batch", "embed"), ("vocab", "act_heads")]:
        with pytest.raises(ValueError, match="collide on one mesh axis"):
            spec(axes)
    with pytest.raises(KeyError):
        spec(("width",))


def test_mesh_sizes():
    assert dict(make_mesh(MeshConfig()).shape) == dict.fromkeys(AXES, 1) | {"data": 8}
    assert dict(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape)["data"] == 2
    assert dict(make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2)).shape)["fsdp"] == 4
    assert make_mesh(MeshConfig(data=1), jax.devices()[:1]).size == 1
    assert make_mesh(MeshConfig()).axis_names == AXES


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"mesh\.data=3 does not match the 8 cpu device"),
        ({"data": 2, "fsdp": 2}, r"mesh\.data=2, mesh\.fsdp=2 does not match"),
        ({"tensor": 3}, r"mesh\.tensor=3 does not match"),
        ({"data": 1}, r"the mesh of one device does not match"),
    ],
)
def test_a_mesh_that_can_not_be_is_named(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(**sizes))


def test_sizes_that_do_not_divide_are_named():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    check_divides(mesh, {"model.num_heads": ("heads", 4), "data.batch_size": ("act_batch", 8)})
    with pytest.raises(UserError, match=r"model\.num_kv_heads \(3\) .* mesh\.tensor=2"):
        check_divides(mesh, {"model.num_heads": ("heads", 4), "model.num_kv_heads": ("kv_heads", 3)})
    with pytest.raises(UserError, match=r"data\.batch_size \(6\) .* mesh\.data=2 x mesh\.fsdp=2"):
        check_divides(mesh, {"data.batch_size": ("act_batch", 6)})
    check_divides(mesh, {"model.head_dim": ("head_dim", 7)})  # not sharded: anything divides


def test_shard_constrains_an_activation():
    x = jnp.zeros((8, 4, 6))
    axes = ("act_batch", "act_seq", "act_mlp")
    assert shard(x, *axes) is x, "without a mesh nothing happens"
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        assert jax.jit(lambda x: shard(x, *axes))(x).sharding.shard_shape(x.shape) == (2, 4, 3)


class Drawn(nnx.Module):
    """The two initializers that draw, stacked and not; shards of lengths that no vector register divides."""

    def __init__(self, rngs: nnx.Rngs):
        self.rows = param(rngs, jax.nn.initializers.normal(0.02), (88, 24), ("vocab", "embed"), decay=True)
        self.layers = stack(
            lambda rngs: Linear("sd,df->sf", (24, 36), ("embed", "mlp"), fan_in=24, bias=True, rngs=rngs),
            3,
            rngs,
        )


DRAWN = Blueprint.of(Drawn)


@functools.cache
def initial(sizes: tuple, model=None, level: int = 0):
    """Initial values on a mesh, made as a training run makes them."""
    options = MeshConfig(**dict(sizes))
    devices = jax.devices()[: 1 if options == MeshConfig(data=1) else 8]
    mesh = make_mesh(options, devices)
    model = model or blueprint(MODEL)
    layout = shardings(mesh, model.axes)
    init = jax.jit(
        model.init, out_shardings=layout, compiler_options={"xla_backend_optimization_level": level}
    )
    with jax.set_mesh(mesh):
        params = init(jax.random.key(3))
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)), params, layout)
    return params


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_same_seed_gives_the_same_bits_on_every_mesh(sizes):
    expected = initial((("data", 1),))
    jax.tree.map(assert_array_equal, initial(tuple(sizes.items())), expected)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_same_bits_from_vectorized_code(sizes):
    """As runs compile it, where each shard leaves another remainder to the vectors."""
    drawn = functools.partial(initial, model=DRAWN, level=3)
    jax.tree.map(assert_array_equal, drawn(tuple(sizes.items())), drawn((("data", 1),)))


def test_parameters_are_spread():
    held = []
    for sizes in MESHES:
        kernel = initial(tuple(sizes.items()))["blocks"]["mlp"]["up"]["kernel"]
        held.append(kernel.addressable_shards[0].data.size / kernel.size)
    assert held == [1, 1 / 8, 1 / 4], "fsdp and tensor divide what a device holds, data does not"


def test_sharded_equals_unsharded():
    """Forward and gradient of the whole model on each mesh; training steps are tested with the step."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 120, (8, 16)), jnp.int32)
    positions, segments = jnp.tile(jnp.arange(16), (8, 1)), jnp.ones_like(tokens)
    model = blueprint(MODEL, Compute(attention="blockwise"))

    def objective(params):
        bound = model.bind(params)
        logits = bound.logits(bound(tokens, positions, segments).hidden)
        return jnp.sum(jax.nn.log_softmax(logits)[..., 0]), logits

    run = jax.grad(objective, has_aux=True)
    gradients, logits = jax.jit(run)(initial((("data", 1),)))
    sizes = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
    with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
        got, ours = jax.jit(run)(initial(tuple(sizes.items())))
    for mine, theirs in itertools.chain(
        [(ours, logits)], zip(jax.tree.leaves(got), jax.tree.leaves(gradients), strict=True)
    ):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
