"""One training step of ours against Hugging Face's Llama on PyTorch, eager and compiled.

    python -m benchmarks.train_step [--dtype float32 bfloat16] [--device cuda] [--json FILE]

A step is forward, loss, backward, clipping by global norm and AdamW, on float32 master weights. All
variants start from the same weights and see the same batch; the losses of the first steps must agree, so
all do the same work. Each runs in a process of its own and they take turns, one at a time, so that neither
thread pools nor another load on the machine favor one: what counts is the ratio within a round.

`--xla-flag NAME=VALUE` adds a variant: ours with that flag, which wins over what `core/devices.py` would
set. So a flag's effect is measured like everything else (docs/gpu.md).

Beside the steps stands the time of their matrix products alone, each shape at its fastest in either
framework: no step can be faster, and the share says how near it comes. MFU is the share of the devices' peak
(`core/devices.py`), by the operations that the model needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train_step_worker import VARIANTS, Shape
from benchmarks.worker import Worker
from core.devices import peak_flops

SHAPES = {
    "14m": Shape(16, 256, vocab=8192, layers=6, embed=384, heads=6, kv_heads=6, head=64, mlp=1024),
    "quickstart": Shape(4, 256, vocab=2048, layers=4, embed=128, heads=2, kv_heads=2, head=64, mlp=384),
    "1b": Shape(2, 4096, vocab=32768, layers=16, embed=2048, heads=32, kv_heads=8, head=64, mlp=8192),
}


def start_worker(spec: dict[str, Any], name: str) -> Worker:
    """A variant; flags of XLA's may follow its name."""
    variant, *flags = name.split()
    env = {"XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()}
    return Worker("benchmarks.train_step_worker", json.dumps(spec | {"variant": variant}), env=env)


def measure(
    shape: Shape, dtype: str, args: argparse.Namespace, report: Callable[[str], None]
) -> dict[str, Any]:
    """All variants in one dtype: rounds of steps in turn, then the roofline."""
    with tempfile.TemporaryDirectory() as folder:
        spec = {
            "shape": dataclasses.asdict(shape), "dtype": dtype, "device": args.device,
            "weights": str(Path(folder) / "weights.npz"), "train": json.loads(args.train),
            "mesh": json.loads(args.mesh),
        }  # fmt: skip
        workers = {}
        try:
            others = [variant for variant in args.variants if variant != "ours"]
            for name in ["ours", *(f"ours --{flag}" for flag in args.xla_flags), *others]:
                report(f"{dtype}: starting {name}")
                workers[name] = start_worker(spec, name)
            alone = [products_alone(shape, workers, report)] if args.roofline else []
            for name in [n for n in workers if alone and VARIANTS[n.split()[0]] in too_slow(alone[0])]:
                workers.pop(name).close()
            losses = {name: worker.ask(steps=3)["losses"] for name, worker in workers.items()}
            rounds: dict[str, list[dict]] = {name: [] for name in workers}
            for index in range(args.rounds):
                for name, worker in workers.items():
                    report(f"{dtype}: round {index + 1} of {args.rounds}, {name}")
                    rounds[name].append(worker.ask(steps=args.steps))
                if args.roofline:
                    alone.append(products_alone(shape, workers, report))
        finally:
            for worker in workers.values():
                worker.close()
    roofline = least(shape, alone) if alone else None
    facts = workers["ours"].facts
    peak = peak_flops(facts["device_kind"], dtype)
    peak = peak and peak * facts["devices"]
    return summarize(shape, losses, rounds, roofline, peak) | {"dtype": dtype}


Size = tuple[int, int, int, int]


def products_alone(shape: Shape, workers: dict[str, Worker], report) -> dict[str, dict[Size, float]]:
    """Seconds of each of the step's matrix products, by framework."""
    judges = {framework: name for name, framework in VARIANTS.items() if name in workers}
    times: dict[str, dict[Size, float]] = {framework: {} for framework in judges}
    for size in dict.fromkeys((batch, m, k, n) for batch, m, k, n, _ in shape.products()):
        report(f"products alone: {size}")
        for framework in set(judges) - too_slow(times):
            times[framework][size] = workers[judges[framework]].ask(product=size)
    return times


def too_slow(times: dict[str, dict[Size, float]]) -> set[str]:
    """Frameworks without a kernel for the dtype on this machine: a plain loop, a step would take minutes."""
    return {framework for framework, seconds in times.items() if max(seconds.values(), default=0) > 5}


def least(shape: Shape, alone: list[dict[str, dict[Size, float]]]) -> dict[str, float]:
    """Seconds of all products of a step at their fastest, by framework and taking the better one of each."""
    frameworks = set(alone[0]) - too_slow(alone[0])

    def total(among: set[str]) -> float:
        fastest = lambda size: min(times[f][size] for times in alone for f in among if f in times)  # noqa: E731
        return sum(count * fastest((batch, m, k, n)) for batch, m, k, n, count in shape.products())

    return {f: total({f}) for f in sorted(frameworks)} | {"best": total(frameworks)}


def summarize(shape: Shape, losses, rounds, roofline, peak: float | None) -> dict[str, Any]:
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
            "mfu": peak and shape.flops / median / peak,
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
    for column in ("dtype", "step", "median s", "fastest s", "CPU s", "tokens/s", "MFU", "of the roofline"):
        table.add_column(column, justify="left" if column in ("dtype", "step") else "right", overflow="fold")
    table.add_column("ours / this, by round", justify="right")
    for result in results:
        for name, v in result["variants"].items():
            low, high = v["ours_is_faster_by_range"]
            mfu, share = ("" if v[k] is None else f"{v[k]:.1%}" for k in ("mfu", "roofline_share"))
            table.add_row(
                result["dtype"], name, f"{v['median_seconds']:.3f}", f"{v['fastest_seconds']:.3f}",
                f"{v['cpu_seconds']:.2f}", f"{v['tokens_per_second']:,.0f}", mfu, share,
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
    parser.add_argument(
        "--mesh", default="{}", help="JSON of `mesh` settings for ours; default: data parallel"
    )
    parser.add_argument(
        "--xla-flag", action="append", default=[], dest="xla_flags", metavar="NAME=VALUE",
        help="also measure ours with this flag, as of xla_gpu_enable_triton_gemm=false; any number of times",
    )  # fmt: skip
    parser.add_argument("--no-roofline", dest="roofline", action="store_false")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args()
    from rich.console import Console

    console = Console(stderr=True)
    shape = SHAPES[args.shape or ("14m" if args.device == "cpu" else "1b")]
    shape = dataclasses.replace(
        shape, batch=args.batch or shape.batch, sequence=args.sequence or shape.sequence
    )
    dtypes = args.dtype or (["float32", "bfloat16"] if args.device == "cpu" else ["bfloat16"])
    with console.status("starting") as status:
        results = [measure(shape, dtype, args, status.update) for dtype in dtypes]
    print_table(Console(width=None if sys.stdout.isatty() else 120), shape, results)
    if args.json:
        figures = {"shape": dataclasses.asdict(shape), "device": args.device, "results": results}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
