"""The shape of a dual encoder. Reading it needs no JAX."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from core.config import config
from llm.model.config import MoEConfig, Sparsity

Rgb = tuple[float, float, float]


@config
class Tower:
    """What both towers have: blocks as the language model's (`llm.model.config.BlockShape`), with LayerNorm,
    biases, as many key-value heads as heads, and no rotary positions.
    """

    embed_dim: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    mlp_dim: int = Field(ge=1)
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    norm_epsilon: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _check_heads(self):
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim ({self.embed_dim}) is not a multiple of num_heads ({self.num_heads}): "
                "the heads share it evenly"
            )
        return self

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def norm(self) -> Literal["rms", "layer"]:
        return "layer"

    @property
    def bias(self) -> Literal["none", "qkv", "all"]:
        return "all"

    @property
    def qk_norm(self) -> bool:
        return False

    @property
    def parallel_residual(self) -> bool:
        return False

    @property
    def window(self) -> int | None:
        return None

    @property
    def sparsity(self) -> Sparsity | None:
        return None

    @property
    def moe(self) -> MoEConfig | None:
        return None


@config
class ImageConfig(Tower):
    """A Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929) over squares of `patch_size` pixels.

    `pool` says what of its output is the image's embedding. `class`: a token of its own, normed and
    projected, as in CLIP (Radford et al. 2021, arXiv:2103.00020). `attention`: a learned query over all
    patches, as in SigLIP (Zhai et al. 2023, arXiv:2303.15343), whose projection is the identity.
    """

    size: int = Field(kw_only=True, ge=1)  # pixels, of a side
    patch_size: int = Field(kw_only=True, ge=1)
    pool: Literal["class", "attention"] = "class"
    # Share of the patches left out in training (FLIP, Li et al. 2023, arXiv:2212.00794).
    patch_dropout: float = Field(0.0, ge=0, lt=1)
    # Of red, green and blue from 0 to 1: what a pixel is normalized with. Those of OpenAI's CLIP.
    mean: Rgb = (0.48145466, 0.4578275, 0.40821073)
    std: Rgb = (0.26862954, 0.26130258, 0.27577711)

    @model_validator(mode="after")
    def _check_size(self):
        if self.size % self.patch_size:
            raise ValueError(
                f"size ({self.size}) is not a multiple of patch_size ({self.patch_size}): whole patches "
                "cover the image"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std {list(self.std)} must be positive: pixels are divided by it")
        return self

    @property
    def num_patches(self) -> int:
        return (self.size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        return self.num_patches + (self.pool == "class")

    @property
    def causal(self) -> bool:
        return False


@config
class TextConfig(Tower):
    """A Transformer over captions of up to `length` tokens.

    `pool`: the embedding is that of the `end` token, as in CLIP, or of the `last` one of the row, padding or
    not, as in SigLIP, whose projection has a bias.
    """

    vocab_size: int = Field(kw_only=True, ge=1)
    length: int = Field(kw_only=True, ge=2)  # tokens, the end of the text included
    pool: Literal["end", "last"] = "end"
    causal: bool = True


@config
class CLIPConfig:
    """Two towers and the space of `embed_dim` dimensions where their embeddings are compared."""

    image: ImageConfig
    text: TextConfig
    embed_dim: int = Field(ge=1)
    logit_bias: bool = False  # SigLIP's; the scale starts at 10 then, the bias at -10

    @model_validator(mode="after")
    def _check(self):
        if self.image.pool == "attention" and self.image.embed_dim != self.embed_dim:
            raise ValueError(
                f"model.embed_dim ({self.embed_dim}) must be model.image.embed_dim ({self.image.embed_dim}) "
                "where model.image.pool is attention: that has no projection"
            )
        return self
