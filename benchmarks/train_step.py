"""One training step of ours against Hugging Face's Llama on PyTorch, eager and compiled.

    python -m benchmarks.train_step [--dtype float32 bfloat16] [--device cuda] [--json FILE]

A step is forward, loss, backward, clipping by global norm and AdamW, on float32 master weights. All
variants start from the same weights and see the same batch; the losses of the first steps must agree, so
all do the same work. Each runs in a process of its own and they take turns, one at a time, so that neither
thread pools nor another load on the machine favor one: what counts is the ratio within a round.

Beside the steps stands the time of their matrix products alone, each shape at its fastest in either
framework: no step can be faster, and the share says how near it comes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

VARIANTS = {"ours": "jax", "eager": "torch", "compiled": "torch"}
LEARNING_RATE, BETAS, EPSILON, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


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


SHAPES = {
    "14m": Shape(16, 256, vocab=8192, layers=6, embed=384, heads=6, kv_heads=6, head=64, mlp=1024),
    "quickstart": Shape(8, 256, vocab=4096, layers=4, embed=256, heads=4, kv_heads=2, head=64, mlp=768),
    "1b": Shape(2, 4096, vocab=32768, layers=16, embed=2048, heads=32, kv_heads=8, head=64, mlp=8192),
}


# ---- workers: one framework each, commands as lines of JSON on stdin, answers on stdout


def run_worker(spec: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a framework prints goes to stderr
    start = jax_worker if VARIANTS[spec["variant"]] == "jax" else torch_worker
    step, time_product = start(spec, Shape(**spec["shape"]))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        answer = (
            time_product(*command["product"]) if "product" in command else time_steps(step, command["steps"])
        )
        print(json.dumps(answer), file=answers)


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


def make_tokens(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    stream = np.random.default_rng(0).integers(0, shape.vocab, (shape.batch, shape.sequence + 1))
    return stream[:, :-1].astype(np.int32), stream[:, 1:].astype(np.int32)


def jax_worker(spec: dict[str, Any], shape: Shape):
    from core import devices

    devices.prepare()
    import jax
    import jax.numpy as jnp

    from core.mesh import make_mesh
    from core.optim import make_optimizer
    from core.options import MeshConfig, OptimizerConfig
    from llm.config import TrainConfig
    from llm.data.loader import Batch
    from llm.model.attention import choose_backend
    from llm.model.config import ModelConfig
    from llm.model.transformer import Compute, blueprint
    from llm.step import init_state, jit_train_step, put_batch

    config = ModelConfig(
        vocab_size=shape.vocab, num_layers=shape.layers, embed_dim=shape.embed, num_heads=shape.heads,
        num_kv_heads=shape.kv_heads, head_dim=shape.head, mlp_dim=shape.mlp, max_length=shape.sequence,
        tied_head=True,
    )  # fmt: skip
    train = TrainConfig(steps=1000, dtype=spec["dtype"], **spec["train"])
    backend = choose_backend(train.attention, jax.default_backend())
    model = blueprint(config, Compute(train.dtype, backend, train.remat, train.scan_layers))
    assert model.count == shape.parameters
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=LEARNING_RATE, schedule="constant", beta1=BETAS[0], beta2=BETAS[1],
            epsilon=EPSILON, weight_decay=DECAY, clip_norm=CLIP,
        ),
        train.steps, model.decay,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig())
    jax.set_mesh(mesh)
    state = init_state(model, optimizer, mesh, seed=0)
    if not Path(spec["weights"]).exists():
        flat = jax.tree_util.tree_flatten_with_path(jax.device_get(state.params))[0]
        np.savez(spec["weights"], **{jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in flat})
    tokens, targets = make_tokens(shape)
    positions = np.broadcast_to(np.arange(shape.sequence, dtype=np.int32), tokens.shape)
    ones = np.ones(tokens.shape, np.int32)
    batch = put_batch(Batch(tokens, targets, ones, positions, ones.astype(np.float32)), mesh)
    train_step = jit_train_step(model, train, optimizer, mesh)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    def time_product(count: int, m: int, k: int, n: int) -> float:
        key, dtype = jax.random.key(0), jnp.dtype(spec["dtype"])
        a = jax.random.normal(key, (count, m, k) if count > 1 else (m, k), dtype)
        b = jax.random.normal(key, (count, k, n) if count > 1 else (k, n), dtype)
        multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype))
        return fastest(lambda: multiply(a, b).block_until_ready())

    return step, time_product


def torch_worker(spec: dict[str, Any], shape: Shape):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from core.devices import keep_freed_memory

    if spec["device"] == "cpu":
        keep_freed_memory()  # as ours does: it is no merit of the framework
    torch.backends.cuda.matmul.allow_tf32 = True  # as XLA does by default
    device, dtype = spec["device"], getattr(torch, spec["dtype"])
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.embed, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, head_dim=shape.head,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=shape.sequence, rms_norm_eps=1e-5,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device).train()
    names = set(dict(model.named_parameters()))
    weights = hugging_face_names(np.load(spec["weights"]), shape.layers)
    assert names == set(weights), names ^ set(weights)
    model.load_state_dict({n: torch.tensor(w) for n, w in weights.items()}, strict=False)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)
    tokens, targets = (torch.tensor(x, dtype=torch.long, device=device) for x in make_tokens(shape))
    forward = torch.compile(model) if spec["variant"] == "compiled" else model

    def step() -> float:
        # autocast keeps the weights in float32, as ours does
        with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32):
            loss = forward(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
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

    return step, time_product


def fastest(call: Callable[[], Any], budget: float = 0.3, most: int = 50) -> float:
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


# ---- the driver


class Worker:
    """A variant in its own process; idle unless it is asked."""

    def __init__(self, spec: dict[str, Any]):
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # they share the device's memory
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_step", "--worker", json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        assert process.stdin and process.stdout
        self.process, self.stdin, self.stdout = process, process.stdin, process.stdout
        self._answer()

    def ask(self, **command: Any) -> Any:
        print(json.dumps(command), file=self.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        line = self.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with exit code {self.process.wait()}; its message stands above")
        return json.loads(line)

    def close(self) -> None:
        self.stdin.close()
        self.process.wait()


def measure(
    shape: Shape, dtype: str, args: argparse.Namespace, report: Callable[[str], None]
) -> dict[str, Any]:
    """All variants in one dtype: rounds of steps in turn, then the roofline."""
    with tempfile.TemporaryDirectory() as folder:
        spec = {
            "shape": dataclasses.asdict(shape), "dtype": dtype, "device": args.device,
            "weights": str(Path(folder) / "weights.npz"), "train": json.loads(args.train),
        }  # fmt: skip
        workers = {}
        try:
            for variant in ["ours", *(v for v in args.variants if v != "ours")]:
                report(f"{dtype}: starting {variant}")
                workers[variant] = Worker(spec | {"variant": variant})
            roofline, slow = products_alone(shape, workers, report) if args.roofline else (None, set())
            for variant in [v for v in workers if VARIANTS[v] in slow]:
                workers.pop(variant).close()
            losses = {name: worker.ask(steps=3)["losses"] for name, worker in workers.items()}
            rounds: dict[str, list[dict]] = {name: [] for name in workers}
            for index in range(args.rounds):
                for name, worker in workers.items():
                    report(f"{dtype}: round {index + 1} of {args.rounds}, {name}")
                    rounds[name].append(worker.ask(steps=args.steps))
        finally:
            for worker in workers.values():
                worker.close()
    return summarize(shape, losses, rounds, roofline) | {"dtype": dtype}


def products_alone(shape: Shape, workers: dict[str, Worker], report) -> tuple[dict[str, float], set[str]]:
    """Seconds of the step's products in each framework and at best; frameworks too slow to run steps."""
    judges = {framework: name for name, framework in VARIANTS.items() if name in workers}
    sums, slow = dict.fromkeys([*judges, "best"], 0.0), set()
    counts: Counter[tuple[int, int, int, int]] = Counter()
    for batch, m, k, n, count in shape.products():
        counts[batch, m, k, n] += count  # type: ignore[assignment]  # halves too
    for size, count in counts.items():
        report(f"products alone: {size}")
        times = {f: workers[name].ask(product=size) for f, name in judges.items() if f not in slow}
        for framework, seconds in times.items():
            sums[framework] += seconds * count
            if seconds > 5:  # no kernel for this dtype here: a plain loop, a step would take minutes
                slow.add(framework)
        sums["best"] += min(times.values()) * count
    return {f: seconds for f, seconds in sums.items() if f not in slow}, slow


def summarize(shape: Shape, losses, rounds, roofline) -> dict[str, Any]:
    for name, values in losses.items():
        if not np.allclose(values, losses["ours"], rtol=3e-3):
            raise SystemExit(f"{name} computes something else: losses {values}, ours {losses['ours']}")
    result: dict[str, Any] = {"roofline_seconds": roofline, "variants": {}}
    for name, parts in rounds.items():
        seconds = [s for part in parts for s in part["seconds"]]
        median = statistics.median(seconds)
        # Rounds are paired: a ratio within each, so that a change of the machine's load cancels.
        pairs = zip(parts, rounds["ours"], strict=True)
        ratios = [statistics.median(a["seconds"]) / statistics.median(b["seconds"]) for a, b in pairs]
        result["variants"][name] = {
            "first_losses": losses[name],
            "median_seconds": median,
            "fastest_seconds": min(seconds),
            "tokens_per_second": shape.batch * shape.sequence / median,
            "gflops": shape.flops / median / 1e9,
            "roofline_share": roofline and roofline["best"] / median,
            "cpu_seconds": statistics.median(part["cpu_seconds"] for part in parts),
            "page_faults": statistics.median(part["page_faults"] for part in parts),
            "ours_is_faster_by": statistics.median(ratios),
            "ours_is_faster_by_range": [min(ratios), max(ratios)],
        }
    return result


def print_table(console, shape: Shape, results: list[dict[str, Any]]) -> None:
    from rich.table import Table

    size = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(shape).items())
    table = Table(title=f"one training step, {shape.parameters / 1e6:.1f}M parameters ({size})")
    for column in ("dtype", "step", "median s", "fastest s", "CPU s", "tokens/s", "of the roofline"):
        table.add_column(column, justify="left" if column in ("dtype", "step") else "right")
    table.add_column("ours / this, by round", justify="right")
    for result in results:
        for name, v in result["variants"].items():
            low, high = v["ours_is_faster_by_range"]
            share = "" if v["roofline_share"] is None else f"{v['roofline_share']:.0%}"
            table.add_row(
                result["dtype"], name, f"{v['median_seconds']:.3f}", f"{v['fastest_seconds']:.3f}",
                f"{v['cpu_seconds']:.2f}", f"{v['tokens_per_second']:,.0f}", share,
                "" if name == "ours" else f"{v['ours_is_faster_by']:.2f}x ({low:.2f}-{high:.2f})",
            )  # fmt: skip
        if result["roofline_seconds"]:
            for framework, seconds in result["roofline_seconds"].items():
                table.add_row(result["dtype"], f"products alone, {framework}", f"{seconds:.3f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, help="default: 14m on a CPU, 1b on a GPU")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--sequence", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each variant in a round")
    parser.add_argument("--train", default="{}", help="JSON of `train` settings for ours, as of scan_layers")
    parser.add_argument("--no-roofline", dest="roofline", action="store_false")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return run_worker(json.loads(args.worker))
    from rich.console import Console

    console = Console(stderr=True)
    shape = SHAPES[args.shape or ("14m" if args.device == "cpu" else "1b")]
    shape = dataclasses.replace(
        shape, batch=args.batch or shape.batch, sequence=args.sequence or shape.sequence
    )
    dtypes = args.dtype or (["float32", "bfloat16"] if args.device == "cpu" else ["bfloat16"])
    with console.status("starting") as status:
        results = [measure(shape, dtype, args, status.update) for dtype in dtypes]
    print_table(Console(), shape, results)
    if args.json:
        figures = {"shape": dataclasses.asdict(shape), "device": args.device, "results": results}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
