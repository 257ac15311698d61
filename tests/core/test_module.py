"""The boundary between Flax modules and plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from core.module import Blueprint, param, stack


class Layer(nnx.Module):
    def __init__(self, size: int, rngs: nnx.Rngs):
        normal, zeros = jax.nn.initializers.normal(1.0), jax.nn.initializers.zeros
        self.kernel = param(rngs, normal, (size, 2), ("embed", "mlp"), decay=True)
        self.bias = param(rngs, zeros, (2,), ("mlp",), decay=False)
        self.absent = None

    def __call__(self, x):
        return x @ self.kernel[...] + self.bias[...]


class Stacked(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = Layer(4, rngs)
        self.rest = stack(lambda rngs: Layer(3, rngs), 5, rngs)


@pytest.fixture(scope="module")
def model() -> Blueprint:
    return Blueprint.of(Stacked)


def test_what_follows_from_the_declarations(model):
    layer = {"kernel": ("embed", "mlp"), "bias": ("mlp",)}
    stacked = {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}
    assert model.axes == {"first": layer, "rest": stacked}
    assert model.decay == {name: {"kernel": True, "bias": False} for name in ("first", "rest")}
    assert jax.tree.map(lambda x: x.shape, model.shapes) == {
        "first": {"kernel": (4, 2), "bias": (2,)},
        "rest": {"kernel": (5, 3, 2), "bias": (5, 2)},
    }
    assert model.count == 4 * 2 + 2 + 5 * (3 * 2 + 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.shapes)} == {jnp.dtype("float32")}


def test_initial_values_follow_the_key(model):
    first, again, other = (jax.jit(model.init)(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(assert_array_equal, first, again)
    assert np.all(first["first"]["kernel"] != other["first"]["kernel"])
    layers = np.asarray(first["rest"]["kernel"]).reshape(5, -1)
    assert len(np.unique(layers)) == layers.size, "each layer has values of its own"
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(lambda x: x.shape, model.shapes)


def test_bind_gives_the_module_with_these_values(model):
    params = jax.tree.map(lambda s: jnp.arange(float(np.prod(s.shape))).reshape(s.shape), model.shapes)
    x = jnp.ones((1, 4))
    expected = x @ params["first"]["kernel"] + params["first"]["bias"]
    assert_array_equal(model.bind(params).first(x), expected)
    assert_array_equal(jax.jit(lambda p: model.bind(p).first(x))(params), expected)
    # A binding leaves nothing behind, tracers least of all.
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model.shapes))
    gradient = jax.grad(lambda p: model.bind(p).first(x).sum())(params)
    assert_array_equal(gradient["first"]["bias"], [1, 1])


def test_values_of_another_shape_are_an_error(model):
    params = jax.tree.map(lambda s: jnp.zeros(s.shape), model.shapes)
    del params["first"]["bias"]
    params["first"]["scale"] = jnp.zeros(2)
    with pytest.raises((KeyError, ValueError)):
        model.bind(params)


def test_shape_and_axes_must_agree():
    with pytest.raises(ValueError, match="differ in rank"):
        param(nnx.Rngs(0), jax.nn.initializers.zeros, (2, 3), ("embed",), decay=True)
