"""Linear maps and norms, and the one function through which every product with a weight goes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from core.mesh import num_shards, shard
from core.module import param


def product(
    equation: str,
    x: jax.Array,
    w: jax.Array,
    out_dtype: DTypeLike | None = None,
    *,
    weight_first: bool = False,
) -> jax.Array:
    """`einsum` of an activation with a weight, by the rules of `contract`.

    The weight keeps its own precision: its gradient is the float32 sum, never rounded to x's dtype.
    `weight_first` is for activations of few rows: the CPU's libraries pack the right operand of each product
    anew, which takes longer than the product itself if that is the weight. Not to be differentiated.
    """
    if weight_first:
        return _weight_first(equation, x, w, out_dtype or x.dtype)
    return checkpoint_name(contract(equation, x, w, out_dtype), "product")


def _weight_first(equation: str, x: jax.Array, w: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    x_axes, w_axes, out = equation.replace("->", ",").split(",")
    w_out = "".join(axis for axis in w_axes if axis in out)
    x_out = "".join(axis for axis in x_axes if axis in out and axis not in w_out)
    y = _einsum(f"{w_axes},{x_axes}->{w_out}{x_out}", w.astype(x.dtype), x, out_dtype)
    # Without the barrier XLA would fold the transposition into the product and swap the operands back.
    return jnp.einsum(f"{w_out}{x_out}->{out}", jax.lax.optimization_barrier(y))


def contract(equation: str, x: jax.Array, y: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """`einsum` with operands in x's dtype and sums in float32; the result is in `out_dtype`, x's by default.

    Where the summed axis is divided over the mesh, devices exchange their partial sums in `out_dtype`; the
    CPU, whose products into bfloat16 take twice as long, in float32.

    Both products of the backward pass read operands in x's dtype too. (JAX's own rule would multiply a
    float32 cotangent.) Each gradient has its argument's dtype.
    """
    return _contract(equation, jnp.dtype(out_dtype or x.dtype), x, y)


def _einsum(equation: str, x: jax.Array, y: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    y, sums = y.astype(x.dtype), jnp.float32 if jax.default_backend() == "cpu" else out_dtype
    return jnp.einsum(equation, x, y, preferred_element_type=sums).astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(equation, out_dtype, x, y):
    return _einsum(equation, x, y, out_dtype)


def _contract_forward(equation, out_dtype, x, y):
    return _einsum(equation, x, y, out_dtype), (x, y)


def _contract_backward(equation, out_dtype, residuals, g):
    x, y = residuals
    inputs, out = equation.split("->")
    x_axes, y_axes = inputs.split(",")
    g = g.astype(x.dtype)
    dx = _einsum(f"{out},{y_axes}->{x_axes}", g, y, x.dtype)
    if x.size <= g.size or jax.default_backend() != "cpu":
        return dx, _einsum(f"{x_axes},{out}->{y_axes}", x, g, y.dtype)
    # The CPU copies a product's first operand into another layout: let that be the smaller one. Without the
    # barrier XLA folds the transposition of the result into the product and swaps the operands back.
    y_out = "".join(dict.fromkeys(axis for axis in out + x_axes if axis in y_axes))
    dy = jax.lax.optimization_barrier(_einsum(f"{out},{x_axes}->{y_out}", g, x, y.dtype))
    return dx, jnp.einsum(f"{y_out}->{y_axes}", dy)


_contract.defvjp(_contract_forward, _contract_backward)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202); keeps only its arguments for the backward pass."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(residuals, g):
    gate, up = residuals
    sigmoid = jax.nn.sigmoid(gate)
    return g * up * sigmoid * (1 + gate * (1 - sigmoid)), g * gate * sigmoid


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


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
        self.equation, self.weight_first = equation, False
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
        y = product(self.equation, x, self.kernel[...], weight_first=self.weight_first)
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


def stream(x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """The residual stream, its sequence divided over `tensor` too: norms and what is kept for the backward
    pass are not repeated there (Korthikanti et al. 2022, arXiv:2205.05198).

    A sequence that doesn't divide, as the patches of an image and one token more, stays whole.
    """
    divides = x.shape[1] % num_shards("act_stream") == 0
    return shard(x, "act_batch", "act_stream" if divides else None, "act_embed")


def whole(x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """The stream as products over divided heads, mlp and vocabulary read it: gathered over `tensor`."""
    # Constrained as it was first: XLA would else gather what x is cast from, in float32.
    return shard(stream(x), "act_batch", "act_seq", "act_embed")


def spread(x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """What such products give, summed over `tensor` and divided again."""
    # In two steps where `context` divides the sequence as well: XLA would else gather it whole in between.
    # Not elsewhere: remat that keeps products would keep this one whole over `tensor`.
    return stream(shard(x, "act_batch", "act_seq", "act_embed") if num_shards("act_seq") > 1 else x)
