"""The shape of a Transformer. Reading it needs no JAX."""

from __future__ import annotations

import math
from typing import Literal, Protocol, runtime_checkable

from pydantic import Field, model_validator

from core.config import config

# Of an MLP. `gelu_tanh` is GELU by its approximation with tanh, `quick_gelu` by one with a sigmoid, which
# OpenAI's CLIP has.
Activation = Literal["swiglu", "gelu", "gelu_tanh", "quick_gelu"]


@config
class RopeScaling:
    """How rotary frequencies are rescaled for a context longer than `original_length`.

    `llama3` blends per wavelength (Llama 3.1); `yarn` blends per dimension and scales the attention
    temperature (Peng et al. 2023, arXiv:2309.00071).
    """

    kind: Literal["llama3", "yarn"]
    factor: float = Field(ge=1)
    original_length: int = Field(ge=1)
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @model_validator(mode="after")
    def _check(self):
        for low, high in (("low_frequency_factor", "high_frequency_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"model.rope_scaling.{low} ({getattr(self, low):g}) must be positive and less than "
                    f"{high} ({getattr(self, high):g})"
                )
        return self


@config
class Sparsity:
    """Blocks of keys that a query sees: the last `local_blocks`, its own included, and a document's first.

    `llm.model.masks` has the definition.
    """

    block_size: int = Field(ge=1)  # tokens
    local_blocks: int = Field(ge=1)
    global_blocks: int = Field(ge=0)


@config
class MoEConfig:
    """Experts of `model.mlp_dim` in the place of each MLP, and what their router is trained with.

    The losses' factors are those of Mixtral and Qwen: balanced experts have a balance loss of `top_k`.
    """

    num_experts: int = Field(ge=1)
    top_k: int = Field(ge=1)  # experts of a token
    normalize_top_k: bool = True  # whether the weights of a token's experts add up to 1
    shared_mlp_dim: int = Field(0, ge=0)  # of an MLP that every token takes besides; 0: none
    balance_loss: float = Field(0.0, ge=0, allow_inf_nan=False)
    router_z_loss: float = Field(0.0, ge=0, allow_inf_nan=False)
    # Places for the tokens of a device at each expert, as a multiple of what they need if spread evenly;
    # those beyond are dropped, in training and evaluation. None: as many as there are tokens.
    capacity: float | None = Field(None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self):
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.moe.top_k ({self.top_k}) is more than model.moe.num_experts ({self.num_experts}): "
                "a token takes different experts"
            )
        return self

    def slots(self, tokens: int, dropless: bool = False) -> int:
        """How many of a device's `tokens` an expert has a place for."""
        if self.capacity is None or dropless:
            return tokens
        return min(tokens, math.ceil(self.capacity * tokens * self.top_k / self.num_experts))


@config
class ModelConfig:
    """A decoder-only Transformer in the Llama, Mistral, Mixtral, Qwen or GPT-NeoX shape."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int  # of each expert, where there are experts
    max_length: int = Field(ge=1)
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = Field(1e-5, gt=0)
    activation: Literal["swiglu", "gelu"] = "swiglu"
    bias: Literal["none", "qkv", "all"] = "none"
    qk_norm: bool = False
    parallel_residual: bool = False
    tied_head: bool = False
    window: int | None = None
    sparsity: Sparsity | None = None
    rope_theta: float = Field(10000.0, gt=1)
    rope_fraction: float = Field(1.0, gt=0, le=1)
    rope_scaling: RopeScaling | None = None
    moe: MoEConfig | None = None

    @model_validator(mode="after")
    def _check(self):
        for name in (
            "vocab_size",
            "num_layers",
            "embed_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) is not a multiple of "
                f"model.num_kv_heads ({self.num_kv_heads}): each key-value head serves as many query heads"
            )
        if self.rotary_dim % 2 or self.rotary_dim < 2:
            raise ValueError(
                f"model.head_dim ({self.head_dim}) x model.rope_fraction ({self.rope_fraction}) "
                f"is {self.rotary_dim}: rotary embeddings need an even number of dimensions"
            )
        if self.rope_scaling is not None and self.rope_scaling.original_length > self.max_length:
            raise ValueError(
                f"model.rope_scaling.original_length ({self.rope_scaling.original_length}) is longer than "
                f"model.max_length ({self.max_length}): it is the length trained at before, and max_length "
                "the one to reach"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"model.window is {self.window}: it must be at least 1, or null for none")
        if self.window is not None and self.sparsity is not None:
            raise ValueError(
                "model.window and model.sparsity are both set: a query sees the last keys or the last "
                "blocks; set one to null"
            )
        if self.moe is not None and (self.activation != "swiglu" or self.bias == "all"):
            raise ValueError(
                f"model.moe with model.activation {self.activation} and model.bias {self.bias}: experts have "
                "swiglu, and no biases"
            )
        return self

    @property
    def rotary_dim(self) -> int:
        """How many of `head_dim` dimensions are rotated."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def causal(self) -> bool:
        """A token sees none that come later: each is predicted from those before it."""
        return True


@runtime_checkable
class BlockShape(Protocol):
    """What a block of any Transformer here reads of its model's configuration: the language model's, and the
    towers of CLIP. `ModelConfig` says what each is.
    """

    @property
    def num_layers(self) -> int: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def norm(self) -> Literal["rms", "layer"]: ...
    @property
    def norm_epsilon(self) -> float: ...
    @property
    def activation(self) -> Activation: ...
    @property
    def bias(self) -> Literal["none", "qkv", "all"]: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def parallel_residual(self) -> bool: ...
    @property
    def causal(self) -> bool: ...
    @property
    def window(self) -> int | None: ...
    @property
    def sparsity(self) -> Sparsity | None: ...
    @property
    def moe(self) -> MoEConfig | None: ...
