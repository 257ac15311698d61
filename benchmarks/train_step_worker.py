"""The training step of each framework, in a process of its own: for `train_step.py`, which starts it.

Both frameworks start from the same weights, see the same batch, and keep freed memory the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training import OPTIMIZER, Training, random_tokens
from benchmarks.worker import serve
from core import devices
from core.options import MeshConfig
from llm.config import TrainConfig
from llm.model.config import ModelConfig

VARIANTS = {"ours": "jax", "eager": "torch", "compiled": "torch"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings, and the batch of a step."""

    batch: int
    sequence: int
    vocab: int
    layers: int
    embed: int
    heads: int
    kv_heads: int
    head: int
    mlp: int

    @property
    def parameters(self) -> int:
        attention = 2 * self.embed * self.head * (self.heads + self.kv_heads)
        return (
            self.vocab * self.embed
            + self.layers * (attention + 3 * self.embed * self.mlp + 2 * self.embed)
            + self.embed
        )

    def products(self) -> Iterator[tuple[int, int, int, int, float]]:
        """(batch, m, k, n, count): the matrix products of a step, forward and backward."""
        tokens, queries, pairs = self.batch * self.sequence, self.heads * self.head, self.kv_heads * self.head
        layer = [(self.embed, queries), (self.embed, pairs), (self.embed, pairs), (queries, self.embed)]
        layer += [(self.embed, self.mlp)] * 2 + [(self.mlp, self.embed)]
        for k, n in layer * self.layers + [(self.embed, self.vocab)]:
            yield from ((1, tokens, k, n, 1), (1, tokens, n, k, 1), (1, k, tokens, n, 1))
        # Scores, values and their four gradients, over the half that the causal mask leaves.
        maps, length = self.batch * self.heads, self.sequence
        yield maps, length, self.head, length, 3 * self.layers / 2
        yield maps, length, length, self.head, 3 * self.layers / 2

    @property
    def flops(self) -> float:
        return sum(2 * batch * m * k * n * count for batch, m, k, n, count in self.products())


def start(spec: dict[str, Any]):
    """Facts about the devices, and what answers `steps` or `product`."""
    framework = jax_worker if VARIANTS[spec["variant"]] == "jax" else torch_worker
    facts, step, time_product = framework(spec, Shape(**spec["shape"]))

    def answer(steps: int = 0, product: tuple[int, int, int, int] | None = None):
        return time_steps(step, steps) if product is None else time_product(*product)

    return facts, answer


def time_steps(step: Callable[[], float], count: int) -> dict[str, Any]:
    """Seconds of each step, and per step the processor's seconds and the pages mapped."""
    before, seconds, losses = resource.getrusage(resource.RUSAGE_SELF), [], []
    for _ in range(count):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": seconds,
        "losses": losses,
        "cpu_seconds": cpu / count,
        "page_faults": (after.ru_minflt - before.ru_minflt) / count,
    }


def jax_worker(spec: dict[str, Any], shape: Shape):
    devices.prepare()
    import jax
    import jax.numpy as jnp

    from core.mesh import make_mesh

    config = ModelConfig(
        vocab_size=shape.vocab, num_layers=shape.layers, embed_dim=shape.embed, num_heads=shape.heads,
        num_kv_heads=shape.kv_heads, head_dim=shape.head, mlp_dim=shape.mlp, max_length=shape.sequence,
        tied_head=True,
    )  # fmt: skip
    train = TrainConfig(steps=1000, dtype=spec["dtype"], **spec["train"])
    mesh = make_mesh(MeshConfig(**spec["mesh"]))
    training = Training(config, train, shape.batch, shape.sequence, mesh)
    assert training.model.count == shape.parameters
    if not Path(spec["weights"]).exists():
        flat = jax.tree_util.tree_flatten_with_path(jax.device_get(training.state.params))[0]
        np.savez(spec["weights"], **{jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in flat})

    def time_product(count: int, m: int, k: int, n: int) -> float:
        key, dtype = jax.random.key(0), jnp.dtype(spec["dtype"])
        a = jax.random.normal(key, (count, m, k) if count > 1 else (m, k), dtype)
        b = jax.random.normal(key, (count, k, n) if count > 1 else (k, n), dtype)
        multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype))
        return fastest(lambda: multiply(a, b).block_until_ready())

    facts = {"device_kind": jax.devices()[0].device_kind, "devices": jax.device_count()}
    return facts, training.step, time_product


def torch_worker(spec: dict[str, Any], shape: Shape):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if spec["device"] == "cpu":
        devices.keep_freed_memory()  # as ours does: it is no merit of the framework
    torch.backends.cuda.matmul.allow_tf32 = True  # as XLA does by default
    device, dtype = spec["device"], getattr(torch, spec["dtype"])
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.embed, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, head_dim=shape.head,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=shape.sequence, rms_norm_eps=1e-5,
        tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device).train()
    names = set(dict(model.named_parameters()))
    weights = hugging_face_names(np.load(spec["weights"]), shape.layers)
    assert names == set(weights), names ^ set(weights)
    model.load_state_dict({n: torch.tensor(w) for n, w in weights.items()}, strict=False)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = OPTIMIZER.beta1, OPTIMIZER.beta2
    optimizer = torch.optim.AdamW(
        groups, lr=OPTIMIZER.learning_rate, betas=betas, eps=OPTIMIZER.epsilon, fused=True
    )
    batch = random_tokens(shape.vocab, shape.batch, shape.sequence)
    tokens, targets = (torch.tensor(x, dtype=torch.long, device=device) for x in batch)
    forward = torch.compile(model) if spec["variant"] == "compiled" else model

    def step() -> float:
        # autocast keeps the weights in float32, as ours does
        with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32):
            loss = forward(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    def time_product(count: int, m: int, k: int, n: int) -> float:
        a = torch.randn((count, m, k) if count > 1 else (m, k), device=device).to(dtype)
        b = torch.randn((count, k, n) if count > 1 else (k, n), device=device).to(dtype)

        def multiply() -> None:
            torch.matmul(a, b)
            if device == "cuda":
                torch.cuda.synchronize()

        return fastest(multiply)

    return {}, step, time_product


def fastest(call: Callable[[], Any], budget: float = 0.15, most: int = 50) -> float:
    """Seconds of the fastest of several calls, the first not counted; one call if that alone is slow."""
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    if first > 10:
        return first
    best, start = float("inf"), time.perf_counter()
    for _ in range(most):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() - start > budget:
            break
    return best


def hugging_face_names(weights, layers: int) -> dict[str, np.ndarray]:
    """Our parameters under the names and in the layouts of `LlamaForCausalLM`."""
    named = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["norm.scale"]}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        of = lambda name, i=i: weights[f"blocks.{name}"][i]  # noqa: E731
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            kernel = of(f"attention.{ours}.kernel")
            named[f"{prefix}self_attn.{theirs}_proj.weight"] = kernel.reshape(kernel.shape[0], -1).T
        kernel = of("attention.out.kernel")
        named[f"{prefix}self_attn.o_proj.weight"] = kernel.reshape(-1, kernel.shape[-1]).T
        for name in ("gate", "up", "down"):
            named[f"{prefix}mlp.{name}_proj.weight"] = of(f"mlp.{name}.kernel").T
        named[f"{prefix}input_layernorm.weight"] = of("attention_norm.scale")
        named[f"{prefix}post_attention_layernorm.weight"] = of("mlp_norm.scale")
    return named


if __name__ == "__main__":
    serve(functools.partial(start, json.loads(sys.argv[1])))
