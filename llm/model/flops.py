"""Parameters and floating-point operations of a Transformer by formula. Reading it needs no JAX.

The convention for operations is that of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) and
nanoGPT: two operations for each multiply-add; each parameter of a matrix product, the head's included and the
embedding lookup's not, costs 2 forward and 4 backward per token; so does, per head dimension, each key that a
query attends to, twice: for its score and for its value. Unlike them, keys that the mask hides are not
counted. Norms, activations and the softmax are left out, and so is whatever is computed again (remat) or for
nothing (empty slots of experts): these are the operations a model needs, not those a program runs. Shorter
documents in a packed sequence are not taken into account.
"""

from __future__ import annotations

from llm.model.config import ModelConfig
from llm.model.masks import Mask


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that enter a matrix product for a token: all but embedding rows, norms and biases, and of
    experts those that it takes.
    """
    query_and_out = 2 * config.num_heads * config.head_dim
    key_and_value = 2 * config.num_kv_heads * config.head_dim
    width, router = config.mlp_dim, 0
    if config.moe is not None:
        width, router = config.moe.top_k * width + config.moe.shared_mlp_dim, config.moe.num_experts
    mlp = (3 if config.activation == "swiglu" else 2) * width
    block = config.embed_dim * (query_and_out + key_and_value + mlp + router)
    return config.num_layers * block + config.vocab_size * config.embed_dim


def num_parameters(config: ModelConfig) -> int:
    """All that is trained: kernels, biases, scales and biases of norms, the embedding, the head if untied."""
    idle = 0 if config.moe is None else config.moe.num_experts - config.moe.top_k
    return active_parameters(config) + config.num_layers * idle * 3 * config.embed_dim * config.mlp_dim


def active_parameters(config: ModelConfig) -> int:
    """The same without the experts that a token does not take."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norm = 1 if config.norm == "rms" else 2  # a scale; and a bias
    vectors = 2 * norm * config.embed_dim
    if config.qk_norm:
        vectors += 2 * norm * config.head_dim
    if config.bias != "none":
        vectors += query + 2 * key
    if config.bias == "all":
        vectors += 2 * config.embed_dim + (2 if config.activation == "swiglu" else 1) * config.mlp_dim
    embedding = 0 if config.tied_head else config.vocab_size * config.embed_dim  # tied: the head counts it
    return matmul_parameters(config) + embedding + config.num_layers * vectors + norm * config.embed_dim


def visible_keys(config: ModelConfig, sequence_length: int) -> float:
    """Mean number of keys that a query sees, as the area that the mask leaves: S/2 for the triangle."""
    return Mask.of(config).mean_visible(sequence_length)


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations of the forward pass, logits included, per token of sequences of `sequence_length`."""
    attention = 4 * config.num_layers * config.num_heads * config.head_dim
    return 2 * matmul_parameters(config) + attention * visible_keys(config, sequence_length)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations of a forward and a backward pass per token of sequences of `sequence_length`."""
    return 3 * forward_flops_per_token(config, sequence_length)
