"""CLIP (Radford et al. 2021, arXiv:2103.00020) and SigLIP (Zhai et al. 2023, arXiv:2303.15343): two towers,
and the scale (and bias) by which the products of their embeddings become logits.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int, Key

from clip.model.config import CLIPConfig
from clip.model.text import TextTower
from clip.model.towers import unit
from clip.model.vision import ImageTower, pixels
from core.errors import UserError
from core.mesh import check_divides
from core.module import Blueprint, param
from llm.model.transformer import Compute

__all__ = ["CLIP", "blueprint", "check_mesh", "pixels"]


class CLIP(nnx.Module):
    """Attributes:
    logit_scale: the logarithm of the factor, a scalar.
    logit_bias: a scalar parameter, or None.
    """

    def __init__(self, config: CLIPConfig, compute: Compute, rngs: nnx.Rngs):
        self.config = config
        self.image = ImageTower(config.image, config.embed_dim, compute, rngs)
        self.text = TextTower(config.text, config.embed_dim, compute, rngs)
        scale = jax.nn.initializers.constant(math.log(10 if config.logit_bias else 1 / 0.07))
        bias = jax.nn.initializers.constant(-10.0)
        self.logit_scale = param(rngs, scale, (), (), decay=False)
        self.logit_bias = param(rngs, bias, (), (), decay=False) if config.logit_bias else None

    def encode_image(
        self, pixels: Float[Array, "B H W 3"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "B E"]:
        """Embeddings of unit length in float32. In training, `key` draws the patches that are left out."""
        return unit(self.image(pixels, key))

    def encode_text(self, tokens: Int[Array, "B T"], ends: Int[Array, " B"]) -> Float[Array, "B E"]:
        """Embeddings of unit length in float32; `ends` are the indices of the end-of-text tokens."""
        return unit(self.text(tokens, ends))

    def logits(self, image: Float[Array, "B E"], text: Float[Array, "C E"]) -> Float[Array, "B C"]:
        """How well each image goes with each text, of their embeddings: factor x product (+ bias)."""
        scores = jnp.exp(self.logit_scale[...]) * jnp.einsum("be,ce->bc", image, text)
        return scores if self.logit_bias is None else scores + self.logit_bias[...]


def blueprint(config: CLIPConfig, compute: Compute | None = None) -> Blueprint:
    """The abstract model: parameter metadata, initial values, and `bind` to a callable `CLIP`."""
    return Blueprint.of(lambda rngs: CLIP(config, compute or Compute(), rngs))


def check_mesh(config: CLIPConfig, mesh: Mesh | AbstractMesh) -> None:
    """Check that the model divides over the mesh.

    Raises:
        UserError: naming the key that doesn't, and the mesh axes.
    """
    for axis in ("context", "expert"):
        if mesh.shape[axis] > 1:
            raise UserError(
                f"mesh.{axis} is {mesh.shape[axis]}, and an image and a caption are not divided over "
                "devices: use mesh.data"
            )
    for name, tower in (("image", config.image), ("text", config.text)):
        sizes = {"num_heads": "heads", "embed_dim": "embed", "mlp_dim": "mlp"}
        check_divides(mesh, {f"model.{name}.{k}": (axis, getattr(tower, k)) for k, axis in sizes.items()})
    check_divides(mesh, {"model.text.vocab_size": ("vocab", config.text.vocab_size)})
