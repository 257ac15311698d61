"""How long a plan takes, whether sharding keeps its laws as a mesh grows, how near a plan comes to a device.

    python -m benchmarks.plan [--only time|weak|measured] [--json FILE] [--device NAME]

`time`: seconds from the command to its answer, and of them compiling, against layers and devices.
`weak`: a small model over fsdp = 8 to 1,024 virtual devices at constant tokens on each. In the compiled
programs operations per device stay what they are, bytes gathered follow (n - 1) / n, and divided state 1 / n.
`measured`, which needs a GPU: peak memory and seconds of a step of three models, each in a process of its
own, beside the plan. The device is known by what JAX calls it; `--device` names one, or a YAML file of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.config import parse
from core.errors import UserError, run_command
from llm.config import Experiment

CONFIGS = Path(__file__).parents[1] / "configs" / "llm"
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)
TOLERANCE = 0.02
WIDTHS = (1024, 2048, 3072)  # 0.17, 0.95 and 2.9 billion parameters
ROWS = 4  # of 2,048 tokens
STEPS = 10
PLOT = Path("docs/images/weak-scaling.png")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("time", "weak", "measured"), help="default: the first two")
    parser.add_argument("--device", metavar="NAME", help="that `measured` runs on; default: as JAX calls it")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=WIDTHS, metavar="W", help="of the models that are measured"
    )
    parser.add_argument("--step-of", type=int, metavar="W", help=argparse.SUPPRESS)  # in a child
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures")
    args = parser.parse_args(argv)
    if args.step_of:
        print(json.dumps(measured_step(args.step_of)))
        return
    results: dict[str, Any] = {}
    if args.only in ("time", None):
        results["time"] = plan_times()
    if args.only in ("weak", None):
        results["weak"] = weak_scaling()
    if args.only == "measured":
        results["measured"] = compare(args.widths, args.device)
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


def compare(widths: Sequence[int], name: str | None) -> list[dict[str, Any]]:
    """Predicted beside measured; the aim is within 10% of the memory and 20% of the time."""
    from core.devices import DEVICES as KNOWN
    from launch.plan.device import find
    from launch.plan.plan import make_plan

    rows = []
    print(f"{'parameters':>11}{'GB':>8}{'plan':>8}{'error':>8}{'s/step':>9}{'plan':>9}{'error':>8}")
    for width in widths:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.plan", "--step-of", str(width)], capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"a step of width {width} failed:\n{done.stderr[-2000:]}")
        row = json.loads(done.stdout.splitlines()[-1])
        device = name or next((n for n, d in KNOWN.items() if row["kind"] in d.kinds), None)
        if device is None:
            raise UserError(
                f"JAX runs on '{row['kind']}' here, of which no peak is known: run this on a GPU, or give "
                "the device as a YAML file with --device, see docs/scaling.md"
            )
        plan = make_plan(measured_experiment(width), device, find(device))
        row |= {"device": device, "planned_bytes": plan.peak, "planned_seconds": plan.times.step}
        rows.append(row)
        peak, memory_error = "-", "-"  # where JAX doesn't tell, as on a CPU
        if row["peak_bytes"]:
            peak, memory_error = f"{row['peak_bytes'] / 1e9:.2f}", f"{plan.peak / row['peak_bytes'] - 1:+.1%}"
        print(
            f"{row['parameters']:11,}{peak:>8}{plan.peak / 1e9:8.2f}{memory_error:>8}"
            f"{row['seconds']:9.4f}{plan.times.step:9.4f}{plan.times.step / row['seconds'] - 1:+8.1%}",
            flush=True,
        )
    return rows


def measured_experiment(width: int) -> Experiment:
    from launch.plan.largest import experiment
    from launch.plan.plan import changed

    return changed(experiment(width, "adamw", "dots", False), data={"batch_size": ROWS})


def measured_step(width: int) -> dict[str, Any]:
    """Seconds of a step, the median of some after two, and the device's peak memory in this process."""
    from core import devices

    devices.prepare()
    import jax

    from benchmarks.training import Training
    from core.mesh import make_mesh
    from core.options import MeshConfig

    experiment = measured_experiment(width)
    data, device = experiment.data, jax.devices()[0]
    mesh = make_mesh(MeshConfig(data=1), [device])
    training = Training(experiment.model, experiment.train, data.batch_size, data.sequence_length, mesh)
    seconds = []
    for _ in range(STEPS + 2):
        started = time.perf_counter()
        training.step()
        seconds.append(time.perf_counter() - started)
    return {
        "kind": device.device_kind, "parameters": training.model.count, "attention": training.backend,
        "seconds": statistics.median(seconds[2:]),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }  # fmt: skip


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
