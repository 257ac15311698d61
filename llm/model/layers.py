"""Linear maps and norms, and the one function through which every product with a weight goes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from core.module import param


def product(equation: str, x: jax.Array, w: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """`einsum` of an activation with a weight: operands in x's dtype, sums in float32.

    The result is in `out_dtype`, x's own by default. The weight keeps its own precision: its gradient is
    the float32 sum, never rounded to x's dtype, and both products of the backward pass read operands in
    x's dtype. (JAX's own rule would multiply a float32 cotangent.)
    """
    return _product(equation, jnp.dtype(out_dtype or x.dtype), x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation, out_dtype, x, w):
    return _einsum(equation, x, w.astype(x.dtype)).astype(out_dtype)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _product_forward(equation, out_dtype, x, w):
    return _product(equation, out_dtype, x, w), (x, w)


def _product_backward(equation, out_dtype, residuals, g):
    x, w = residuals
    inputs, out = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    g = g.astype(x.dtype)
    dx = _einsum(f"{out},{w_axes}->{x_axes}", g, w.astype(x.dtype)).astype(x.dtype)
    dw = _einsum(f"{x_axes},{out}->{w_axes}", x, g).astype(w.dtype)
    return dx, dw


_product.defvjp(_product_forward, _product_backward)


class Linear(nnx.Module):
    """y = x @ kernel (+ bias), as an einsum such as `"bsd,dhk->bshk"` over named axes."""

    def __init__(
        self,
        equation: str,
        shape: Sequence[int],
        axes: Sequence[str],
        *,
        fan_in: int,
        bias: bool,
        rngs: nnx.Rngs,
        scale: float = 1.0,
    ):
        self.equation = equation
        init = jax.nn.initializers.truncated_normal(scale / math.sqrt(fan_in))
        self.kernel = param(rngs, init, shape, axes, decay=True)
        kernel_axes, out_axes = equation.split(",")[1].split("->")
        kept = [i for i, axis in enumerate(kernel_axes) if axis in out_axes]
        zeros = jax.nn.initializers.zeros
        self.bias = (
            param(rngs, zeros, [shape[i] for i in kept], [axes[i] for i in kept], decay=False)
            if bias
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(self.equation, x, self.kernel[...])
        # Added in float32, so that the bias's gradient is a float32 sum over tokens.
        return y if self.bias is None else (y.astype(jnp.float32) + self.bias[...]).astype(y.dtype)


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last axis, in float32."""

    def __init__(self, kind: Literal["rms", "layer"], size: int, epsilon: float, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = param(rngs, jax.nn.initializers.ones, (size,), ("norm",), decay=False)
        self.bias = (
            param(rngs, jax.nn.initializers.zeros, (size,), ("norm",), decay=False)
            if kind == "layer"
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.epsilon) * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)
