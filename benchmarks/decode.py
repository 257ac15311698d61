"""Greedy decoding of ours against `transformers.generate` on PyTorch: same weights, prompts and machine.

    python -m benchmarks.decode [--batch 1 16] [--rounds 10] [--json FILE]

Both start from the same weights and prompts and must draw the same tokens. Each runs in a process of its own
and they take turns, one at a time, so that neither thread pools nor another load on the machine favor one:
what counts is the ratio within a round. A turn is one whole call, prompt and all new tokens, after a first
one that compiles.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.worker import Worker, serve, timed
from core.devices import keep_freed_memory

# The 14M-parameter Llama of benchmarks/train_step.py, embeddings tied.
VOCAB, LAYERS, EMBED, HEADS, HEAD, MLP = 8192, 6, 384, 6, 64, 1024
VARIANTS = ("ours", "transformers")
Generate = Callable[[list[list[int]], int], list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve(functools.partial(start, args.worker))
    workers = {name: Worker("benchmarks.decode", "--worker", name) for name in VARIANTS}
    results = {batch: measure(workers, batch, args) for batch in args.batch}
    report(results, args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(workers: dict[str, Worker], batch: int, args) -> dict[str, list[float]]:
    """Seconds of each call, by variant, a call of each in every round."""
    prompts = np.random.default_rng(batch).integers(0, VOCAB, (batch, args.prompt_tokens)).tolist()
    request = {"prompts": prompts, "new_tokens": args.new_tokens}
    first = {name: worker.ask(**request) for name, worker in workers.items()}
    if first["ours"]["tokens"] != first["transformers"]["tokens"]:
        sys.exit(f"batch {batch}: the two drew different tokens, so their times say nothing")
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            seconds[name].append(worker.ask(**request)["seconds"])
    return seconds


def report(results: dict[int, dict[str, list[float]]], args) -> None:
    print(
        "| batch | ours tok/s (best) | transformers tok/s (best) | ratio, median of rounds | of the bests |"
    )
    print("| --- | --- | --- | --- |")
    for batch, seconds in results.items():
        tokens = batch * args.new_tokens
        ours, theirs = seconds["ours"], seconds["transformers"]
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        rates = " | ".join(
            f"{tokens / statistics.median(t):,.0f} ({tokens / min(t):,.0f})" for t in (ours, theirs)
        )
        print(f"| {batch} | {rates} | {ratio:.1f}, {min(theirs) / min(ours):.1f} |")


def start(name: str):
    keep_freed_memory()  # for both, as commands of ours do
    generate = {"ours": load_ours, "transformers": load_transformers}[name](weights())

    def answer(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        seconds, tokens = timed(lambda: generate(prompts, new_tokens))
        return {"seconds": seconds, "tokens": tokens}

    return {}, answer


def weights() -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names, large enough that the tokens drawn vary."""
    random, wide = np.random.default_rng(0), HEADS * HEAD
    shapes = {"self_attn.q_proj": (wide, EMBED), "self_attn.k_proj": (wide, EMBED)}
    shapes |= {"self_attn.v_proj": (wide, EMBED), "self_attn.o_proj": (EMBED, wide)}
    shapes |= {"mlp.gate_proj": (MLP, EMBED), "mlp.up_proj": (MLP, EMBED), "mlp.down_proj": (EMBED, MLP)}
    made = {"embed_tokens": random.standard_normal((VOCAB, EMBED)) * 0.02}
    for layer in range(LAYERS):
        made |= {f"layers.{layer}.{k}": random.standard_normal(v) * 0.08 for k, v in shapes.items()}
    return {name: array.astype(np.float32) for name, array in made.items()}


def load_transformers(values: dict[str, np.ndarray]) -> Generate:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, num_hidden_layers=LAYERS, hidden_size=EMBED, num_attention_heads=HEADS,
        intermediate_size=MLP, max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    state = {f"model.{name}.weight": torch.from_numpy(array) for name, array in values.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("norm" in name or "lm_head" in name for name in missing), missing

    def generate(prompts, new_tokens):
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
            )
        return out[:, ids.shape[1] :].tolist()

    return generate


def load_ours(values: dict[str, np.ndarray]) -> Generate:
    from core import devices

    devices.prepare()
    import jax

    from llm import decode
    from llm.model.config import ModelConfig
    from llm.sampling import Sampling, prompt_keys

    config = ModelConfig(
        vocab_size=VOCAB, num_layers=LAYERS, embed_dim=EMBED, num_heads=HEADS, num_kv_heads=HEADS,
        head_dim=HEAD, mlp_dim=MLP, max_length=1024, tied_head=True,
    )  # fmt: skip

    def stacked(name: str, *shape: int) -> dict[str, np.ndarray]:
        return {"kernel": np.stack([values[f"layers.{i}.{name}"].T.reshape(shape) for i in range(LAYERS)])}

    one, per_layer = np.ones(EMBED, np.float32), np.ones((LAYERS, EMBED), np.float32)
    heads = (EMBED, HEADS, HEAD)
    attention = {short: stacked(f"self_attn.{short[0]}_proj", *heads) for short in ("query", "key", "value")}
    attention["out"] = stacked("self_attn.o_proj", HEADS, HEAD, EMBED)
    mlp: dict[str, Any] = {name: stacked(f"mlp.{name}_proj", EMBED, MLP) for name in ("gate", "up")}
    mlp["down"] = stacked("mlp.down_proj", MLP, EMBED)
    norm = {"scale": per_layer}
    blocks = {"attention": attention, "mlp": mlp, "attention_norm": norm, "mlp_norm": norm}
    tree = {"embedding": values["embed_tokens"], "blocks": blocks, "norm": {"scale": one}}
    params = jax.device_put(tree)

    def generate(prompts, new_tokens):
        keys = prompt_keys(jax.random.key(0), prompts)
        rows = decode.generate(config, params, prompts, keys, Sampling(), new_tokens)
        return [row.token_ids for row in rows]

    return generate


if __name__ == "__main__":
    main()
