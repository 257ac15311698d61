"""`python -m launch.plan --config FILE --mesh fsdp=64,tensor=8 --device NAME`: what a run costs on a mesh.

Formulas fed by the parameters' own metadata, and the production step compiled for as many virtual devices
beside them. No accelerator is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
from pathlib import Path

from core.config import add_arguments, load
from core.devices import DEVICES
from core.errors import UserError, run_command
from core.options import MeshConfig
from launch.plan.device import find
from llm.config import Experiment

AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))
SHOWN, COMPILED = 15, 3


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.plan", description=__doc__.partition(": ")[2].partition("\n")[0]
    )
    add_arguments(parser)
    parser.add_argument(
        "--device", default="a100-80gb", metavar="NAME",
        help=f"one of {', '.join(DEVICES)}, or a YAML file of your own; default: a100-80gb",
    )  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--mesh", metavar="AXIS=N,...", help=f"devices along {', '.join(AXES)}; default: the config's mesh"
    )
    where.add_argument(
        "--sweep", type=int, metavar="DEVICES", help="search meshes, microbatches and remat policies"
    )
    parser.add_argument("--tokens", type=float, metavar="N", help="to train on; default: the config's steps")
    parser.add_argument("--price", type=float, metavar="USD", help="of one device for an hour")
    parser.add_argument("--no-compile", action="store_true", help="leave the cross-check out")
    parser.add_argument("--json", action="store_true", help="one JSON object; a list with --sweep")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="of the sweep; default: plots/sweep-NAME.png"
    )
    args = parser.parse_args(argv)
    for name in ("tokens", "price", "sweep"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: give a number above 0")
    device = find(args.device)
    overrides = list(args.overrides)
    if args.mesh:
        overrides += [f"mesh.{axis}={size}" for axis, size in parse_mesh(args.mesh).items()]
    experiment = load(Experiment, args.config, overrides)
    tokens = args.tokens or (
        experiment.train.steps * experiment.data.batch_size * experiment.data.sequence_length
    )
    if args.sweep:
        _sweep(args, experiment, device, tokens)
    else:
        _plan(args, experiment, device, tokens)


def parse_mesh(text: str) -> dict[str, int]:
    """`fsdp=64,tensor=8` as sizes of all axes; those that aren't named have one device.

    Raises:
        UserError: for an axis that doesn't exist, or a size that is none.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not size.isdigit() or int(size) < 1:
            raise UserError(f"--mesh: {part!r} is not AXIS=N, for example --mesh fsdp=64,tensor=8")
        if axis not in sizes:
            near = difflib.get_close_matches(axis, AXES, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"they are {', '.join(AXES)}"
            raise UserError(f"--mesh: there is no axis '{axis}'; {hint}")
        sizes[axis] = int(size)
    return sizes


def _plan(args: argparse.Namespace, experiment: Experiment, device, tokens: float | int) -> None:
    from launch.plan.compiled import compile_all
    from launch.plan.plan import changed, make_plan, remedies
    from launch.plan.table import console, print_plan

    plan = make_plan(experiment, args.device, device)
    compiled = None
    if not args.no_compile:
        fixed = changed(experiment, mesh=plan.layout.mesh)
        (compiled,) = compile_all([fixed], plan.layout.devices)
    if args.json:
        answer = plan.as_json(tokens, args.price)
        print(json.dumps(answer | {"compiled": compiled and compiled._asdict()}))
        return
    remedy = None if plan.fits else next(remedies(plan, device), None)
    print_plan(console(), plan, tokens, args.price, compiled, remedy)


def _sweep(args: argparse.Namespace, experiment: Experiment, device, tokens: float | int) -> None:
    from launch.plan.compiled import compile_all
    from launch.plan.plan import remedies
    from launch.plan.sweep import plot_sweep, sweep
    from launch.plan.table import console, print_sweep

    plans, tried = sweep(experiment, args.sweep, args.device, device)
    if not tried:
        raise UserError(
            f"--sweep {args.sweep}: no mesh of so many devices divides batch, heads and sequence; "
            "try a power of two"
        )
    fitting = [plan for plan in plans if plan.fits]
    best = fitting[:COMPILED]
    compiled = []
    if not args.no_compile and best:
        compiled = compile_all([plan.layout.experiment for plan in best], args.sweep)
    if args.json:
        print(json.dumps([plan.as_json(tokens, args.price) for plan in fitting]))
        return
    out = console()
    name = f"{experiment.run.name} on {args.sweep:,} x {args.device}"
    out.print(f"[bold]{name}[/bold], {experiment.data.batch_size:,} x "
              f"{experiment.data.sequence_length:,} tokens a step\n")  # fmt: skip
    if not fitting:
        least = min(plans, key=lambda plan: plan.peak)
        out.print(
            f"[bold red]nothing fits[/]: the least is {least.peak / 1e9:,.1f} of {device.memory / 1e9:.0f} GB"
        )
        for note, _ in remedies(least, device):
            out.print(f"the smallest change that would: [bold]{note}[/]")
            return
        return
    print_sweep(out, fitting, tried, SHOWN, compiled)
    path = args.plot or Path("plots") / f"sweep-{experiment.run.name}.png"
    plot_sweep(plans, name, path)
    out.print(f"plot: {path}")
    hours = fitting[0].hours(tokens)
    out.print(f"the first trains {tokens:,.0f} tokens in {hours / 24:,.1f} days")


if __name__ == "__main__":
    run_command(main)
