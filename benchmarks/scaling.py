"""How a training step's time and memory grow, beside what the arithmetic says.

    python -m benchmarks.scaling [--sweep layers,width] [--rounds N] [--json FILE] [--plot FILE]

Each sweep changes one thing of a small model. Its variants run in processes of their own and take turns, some
steps each in every round: what counts is the ratio to the sweep's first variant within a round. It stands
beside the ratio of the operations that the model needs (`llm/model/flops.py`) and of those that the program's
products have, hidden keys and what is computed again included.

Memory is what the compiled program asks for, arguments and temporaries, beside `arithmetic_bytes`. (A
process's peak of resident memory also holds what compiling took and what glibc keeps.) On a GPU, start from a
larger step: `--shape gpu`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.training import Training
from benchmarks.worker import Worker, serve, timed
from core import devices
from core.errors import run_command
from core.options import MeshConfig
from llm.config import TrainConfig
from llm.model.config import ModelConfig
from llm.model.flops import num_parameters, training_flops_per_token

if TYPE_CHECKING:
    from jax.sharding import Mesh

MIB = 2**20
HEAD = 64
TURN = 0.5  # seconds that a variant's steps take in a round, at least


@dataclasses.dataclass(frozen=True)
class Variant:
    """A Llama with tied embeddings, its mlp three times as wide as its stream, and a step of it."""

    layers: int
    width: int
    vocab: int
    batch: int
    sequence: int
    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # more of `model`
    train: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `train`

    @property
    def model_config(self) -> ModelConfig:
        heads = max(1, self.width // HEAD)
        return ModelConfig(
            vocab_size=self.vocab, num_layers=self.layers, embed_dim=self.width, num_heads=heads,
            num_kv_heads=heads, head_dim=HEAD, mlp_dim=3 * self.width, max_length=self.sequence,
            tied_head=True, **self.model,
        )  # fmt: skip

    @property
    def train_config(self) -> TrainConfig:
        return TrainConfig(steps=1000, **self.train)

    @property
    def flops(self) -> float:
        return self.batch * self.sequence * training_flops_per_token(self.model_config, self.sequence)


BASES = {
    "tiny": Variant(layers=1, width=64, vocab=512, batch=2, sequence=64),
    "laptop": Variant(layers=4, width=128, vocab=2048, batch=4, sequence=256),
    "gpu": Variant(layers=4, width=512, vocab=16384, batch=8, sequence=512),
}


def layers(base: Variant) -> dict[str, Variant]:
    return {f"{n}": dataclasses.replace(base, layers=n) for n in doubled(base.layers)}


def width(base: Variant) -> dict[str, Variant]:
    return {f"{n}": dataclasses.replace(base, width=n) for n in doubled(base.width)}


def sequence(base: Variant) -> dict[str, Variant]:
    return {f"{n}": dataclasses.replace(base, sequence=n) for n in doubled(base.sequence)}


def vocabulary(base: Variant) -> dict[str, Variant]:
    return {f"{n}": dataclasses.replace(base, vocab=n) for n in doubled(base.vocab)}


def loss(base: Variant) -> dict[str, Variant]:
    """All logits at once, then ever fewer, over a vocabulary that outweighs the layers."""
    base = dataclasses.replace(base, vocab=16 * base.vocab, sequence=4 * base.sequence, batch=1)
    chunks = [base.sequence // 2**i for i in range(5)]
    return {f"{n}": dataclasses.replace(base, train={"loss_chunk": n}) for n in chunks}


def attention(base: Variant) -> dict[str, Variant]:
    """Masks and the reference, at lengths where attention outweighs the layers' other products."""
    found = {}
    for length in [4 * n for n in doubled(base.sequence)[:3]]:
        long = dataclasses.replace(base, layers=max(1, base.layers // 2), sequence=length, batch=1)
        block = base.sequence // 4
        sparsity = {"block_size": block, "local_blocks": 4, "global_blocks": 1}
        found |= {
            f"{length}, full": long,
            f"{length}, window {4 * block}": dataclasses.replace(long, model={"window": 4 * block}),
            f"{length}, sparse": dataclasses.replace(long, model={"sparsity": sparsity}),
            f"{length}, reference": dataclasses.replace(long, train={"attention": "reference"}),
        }
    return found


def dtype(base: Variant) -> dict[str, Variant]:
    names = ("float32", "bfloat16", "float16")
    return {name: dataclasses.replace(base, train={"dtype": name}) for name in names}


def doubled(start: int) -> list[int]:
    return [start, 2 * start, 4 * start, 8 * start]


SWEEPS = {f.__name__: f for f in (layers, width, sequence, vocabulary, loss, attention, dtype)}
AXES = ("layers", "width", "sequence", "vocabulary")  # whose values are numbers; the plot shows these


def kept_bytes(variant: Variant, backend: str) -> int:
    """What all layers keep for the backward pass (no remat), by reading `llm/model/transformer.py`.

    A token has eleven vectors as wide as the stream: what enters each norm, that without and with its scale
    (6), the query, key and value (3), attention's output, once for its own derivative and once for the
    product after it (2). Four of them, the norms', are float32 always. Three are as wide as the mlp. Each
    norm has two numbers more; attention has each query's log-sum-exp, or in the reference two numbers and
    two maps, of which one is float32, instead of its output.
    """
    config, itemsize = variant.model_config, 4 if variant.train_config.dtype == "float32" else 2
    wide, heads = config.embed_dim, config.num_heads
    token = 4 * 4 * wide + 7 * itemsize * wide + 3 * itemsize * config.mlp_dim + 4 * (4 + heads)
    if backend == "reference":
        token += 4 * heads - itemsize * wide + (4 + itemsize) * heads * variant.sequence
    return variant.layers * variant.batch * variant.sequence * token


def logits_bytes(variant: Variant) -> int:
    """A chunk's logits and their gradient, in float32."""
    chunk = min(variant.train_config.loss_chunk, variant.sequence)
    return 2 * 4 * variant.batch * chunk * variant.vocab


def arithmetic_bytes(variant: Variant, backend: str) -> int:
    """Weights, AdamW's two moments and gradients in float32, what layers keep, and a chunk's logits."""
    return 16 * num_parameters(variant.model_config) + kept_bytes(variant, backend) + logits_bytes(variant)


def compile_step(variant: Variant, mesh: Mesh) -> tuple[dict[str, Any], Training]:
    """Facts about a variant's program (bytes on a device, and operations), and the step itself."""
    from tests.programs import products

    training = Training(variant.model_config, variant.train_config, variant.batch, variant.sequence, mesh)
    memory = training.program.memory_analysis()
    facts = {
        "parameters": training.model.count,
        "backend": training.backend,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "arithmetic": arithmetic_bytes(variant, training.backend),
        "flops_needed": variant.flops,
        "flops_of_products": sum(flops for _, flops in products(training.traced.jaxpr.jaxpr)),
    }
    return facts, training


def start(spec: dict[str, Any]):
    """In a worker: a variant's facts, and what times its steps."""
    devices.prepare()
    import jax

    from core.mesh import make_mesh

    facts, training = compile_step(Variant(**spec), make_mesh(MeshConfig(), jax.devices()[:1]))

    def answer(turn: float) -> float:
        seconds: list[float] = []
        while sum(seconds) < turn:
            seconds.append(timed(training.step)[0])
        return statistics.median(seconds)

    return facts, answer


def measure(variants: dict[str, Variant], rounds: int, report) -> dict[str, dict[str, Any]]:
    """Each variant's facts, and the median of its steps' seconds in each round."""
    workers: dict[str, Worker] = {}
    try:
        for name, variant in variants.items():
            report(f"compiling {name}")
            spec = json.dumps(dataclasses.asdict(variant))
            workers[name] = Worker("benchmarks.scaling", "--worker", spec)
        results = {name: worker.facts | {"seconds": []} for name, worker in workers.items()}
        for worker in workers.values():
            worker.ask(turn=TURN)  # touches its memory for the first time
        for i in range(rounds):
            for name, worker in workers.items():
                report(f"round {i + 1} of {rounds}: {name}")
                results[name]["seconds"].append(worker.ask(turn=TURN))
    finally:
        for worker in workers.values():
            worker.close()
    return results


def growth(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each variant's time and memory, and their arithmetic, over those of the first."""
    base, found = next(iter(results.values())), {}
    total = lambda v: v["arguments"] + v["temporaries"]  # noqa: E731
    for name, v in results.items():
        # Paired by round, so that a change of the machine's load cancels.
        ratios = [mine / first for mine, first in zip(v["seconds"], base["seconds"], strict=True)]
        low, _, high = statistics.quantiles(ratios, method="inclusive")
        found[name] = {
            "time": statistics.median(ratios),
            "time_low": low,
            "time_high": high,
            "time_by_arithmetic": v["flops_needed"] / base["flops_needed"],
            "memory": total(v) / total(base),
            "memory_by_arithmetic": v["arithmetic"] / base["arithmetic"],
        }
    return found


def print_table(sweep: str, results: dict[str, dict[str, Any]]) -> None:
    """Markdown."""
    columns = (
        sweep, "seconds", "time / first (middle half)", "FLOPs / first", "time / FLOPs", "FLOPs run / needed",
        "arguments, MiB", "temporaries, MiB", "both / arithmetic",
    )  # fmt: skip
    print(f"\n| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    ratios = growth(results)
    for name, v in results.items():
        r, total = ratios[name], v["arguments"] + v["temporaries"]
        print(
            f"| {name} | {statistics.median(v['seconds']):.3f} "
            f"| {r['time']:.2f} ({r['time_low']:.2f} to {r['time_high']:.2f}) "
            f"| {r['time_by_arithmetic']:.2f} | {r['time'] / r['time_by_arithmetic']:.2f} "
            f"| {v['flops_of_products'] / v['flops_needed']:.2f} "
            f"| {v['arguments'] / MIB:,.0f} | {v['temporaries'] / MIB:,.0f} "
            f"| {total / v['arithmetic']:.2f} |",
            flush=True,
        )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--sweep", type=sweeps, default=list(SWEEPS), help=",".join(SWEEPS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", choices=BASES, default="laptop", help="what every sweep starts from")
    parser.add_argument("--json", type=Path, help="keep the figures there, beside those of other sweeps")
    parser.add_argument("--plot", type=Path, help="draw what is measured and what --json holds")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return serve(functools.partial(start, args.worker))
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    if args.rounds < 2:
        parser.error("--rounds: at least 2, for the quartiles")
    if args.plot and not set(AXES) & {*kept, *args.sweep}:
        parser.error(f"--plot: it shows {', '.join(AXES)}; sweep one of them")
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        for name in args.sweep:
            kept[name] = measure(SWEEPS[name](BASES[args.shape]), args.rounds, status.update)
            print_table(name, kept[name])
            if args.json:
                args.json.write_text(json.dumps(kept, indent=1) + "\n")
    if args.plot:
        from core.plots import plot_growth

        plot_growth({name: growth(kept[name]) for name in AXES if name in kept}, args.plot)


def sweeps(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(SWEEPS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: known are {', '.join(SWEEPS)}")
    return names


if __name__ == "__main__":
    run_command(main)
