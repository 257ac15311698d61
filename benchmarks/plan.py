"""How long a plan takes, and whether sharding keeps its laws as a mesh grows: no accelerator is needed.

    python -m benchmarks.plan [--only weak] [--json FILE]

`time`: seconds from the command to its answer, and of them compiling, against layers and devices.
`weak`: a small model over fsdp = 8 to 1,024 virtual devices at constant tokens on each. In the compiled
programs operations per device stay what they are, bytes gathered follow (n - 1) / n, and divided state 1 / n.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from core.config import parse
from core.errors import UserError, run_command
from llm.config import Experiment

CONFIGS = Path(__file__).parents[1] / "configs" / "llm"
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)
TOLERANCE = 0.02
PLOT = Path("docs/images/weak-scaling.png")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("time", "weak"), help="default: both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures")
    args = parser.parse_args(argv)
    results: dict[str, Any] = {}
    if args.only != "weak":
        results["time"] = plan_times()
    if args.only != "time":
        results["weak"] = weak_scaling()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def plan_times() -> list[dict[str, Any]]:
    rows = []
    print(f"{'layers':>7}{'devices':>9}{'plan, s':>9}{'compiling, s':>14}")
    for layers, mesh in [(20, "fsdp=64,tensor=8"), (80, "fsdp=64,tensor=8"), (320, "fsdp=64,tensor=8"),
                         (80, "fsdp=8,tensor=8"), (80, "fsdp=128,tensor=8")]:  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "launch.plan", "--config", str(CONFIGS / "llama3-70b.yaml"), "--mesh",
            mesh,
             "--set", f"model.num_layers={layers}", "--json"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise UserError(done.stderr)
        answer = json.loads(done.stdout)
        row = {
            "layers": layers, "devices": answer["devices"], "seconds": time.perf_counter() - started,
            "compile_seconds": answer["compiled"]["seconds"],
        }  # fmt: skip
        print(f"{layers:7}{row['devices']:9,}{row['seconds']:9.1f}{row['compile_seconds']:14.1f}", flush=True)
        rows.append(row)
    return rows


def weak_scaling() -> list[dict[str, Any]]:
    """Counted in programs compiled for each number of devices.

    Raises:
        UserError: if a law is missed by more than 2%.
    """
    from launch.plan.compiled import compile_all
    from launch.plan.layout import Layout

    rows = []
    print(f"{'devices':>8}{'FLOPs':>11}{'gathered, MB':>14}{'law':>9}{'state, MB':>11}{'law':>9}")
    for n in DEVICES:
        (program,) = compile_all([small(n)], n)
        whole = _divided_bytes(Layout.of(small(1)))
        first = rows[0] if rows else None
        tokens = 5 * 4 * 256  # the batch that a device has, among the arguments; other state is replicated
        row = {
            "devices": n,
            "flops": program.flops,
            "gathered": program.gathered_bytes,
            "state": program.argument_bytes - tokens - _replicated_bytes(Layout.of(small(1))),
            "state_law": whole / n,
        }
        row["flops_law"] = first["flops"] if first else program.flops
        row["gathered_law"] = (
            (first["gathered"] * 8 / 7 if first else program.gathered_bytes * 8 / 7) * (n - 1) / n
        )
        rows.append(row)
        print(
            f"{n:8,}{row['flops']:11.4g}{row['gathered'] / 1e6:14.3f}{row['gathered_law'] / 1e6:9.3f}"
            f"{row['state'] / 1e6:11.4f}{row['state_law'] / 1e6:9.4f}",
            flush=True,
        )
    for row in rows:
        for name in ("flops", "gathered", "state"):
            if abs(row[name] / row[f"{name}_law"] - 1) > TOLERANCE:
                raise UserError(
                    f"{name} on {row['devices']} devices: {row[name]:g}, by law {row[f'{name}_law']:g}"
                )
    plot(rows)
    return rows


def small(devices: int) -> Experiment:
    """One row of 256 tokens on each device; 1,024 divides the width."""
    return parse(
        Experiment,
        {
            "run": {"name": "weak"},
            "data": {"sequence_length": 256, "batch_size": devices},
            "model": {
                "vocab_size": 1024, "num_layers": 4, "embed_dim": 1024, "num_heads": 8, "num_kv_heads": 8,
                "head_dim": 64, "mlp_dim": 2048, "max_length": 256,
            },
            "train": {"steps": 1, "dtype": "bfloat16", "remat": "full", "loss_chunk": 64},
            "mesh": {"data": 1, "fsdp": devices},
        },
    )  # fmt: skip


def _divided_bytes(layout) -> int:
    """Of weights and both moments, where `fsdp` divides them."""
    return sum(
        12 * (p.shape[0] if p.stacked else 1) * p.size for p in layout.parameters if "fsdp" in p.divided
    )


def _replicated_bytes(layout) -> int:
    return layout.parameter_bytes + layout.optimizer_bytes - _divided_bytes(layout)


def plot(rows: list[dict[str, Any]]) -> None:
    from core.plots import BLUE, RED, new_figure, save, style

    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    at = [row["devices"] for row in rows]
    for name, color, label in (
        ("flops", "#3b9c6b", "operations: constant"),
        ("gathered", BLUE, "bytes gathered: (n - 1) / n"),
        ("state", RED, "state: 1 / n"),
    ):
        base = rows[0][name]
        axes.plot(at, [row[name] / base for row in rows], color=color, marker="o", linestyle="", label=label)
        axes.plot(at, [row[f"{name}_law"] / base for row in rows], color=color, linewidth=1.2, linestyle="--")
    style(axes, "of one device, times those on 8 (dashed: the law)", "devices")
    axes.set_xticks(at, [f"{n:,}" for n in at])
    axes.yaxis.set_major_formatter("{x:g}")
    save(figure, PLOT)
    print(f"plot: {PLOT}")


if __name__ == "__main__":
    run_command(main)
