"""The plan as tables for someone who must choose a mesh."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from core.words import duration, exponent, short
from launch.plan import memory
from launch.plan.calibration import Outcome, fitted_on
from launch.plan.communication import HIDDEN
from launch.plan.compiled import Compiled
from launch.plan.plan import Plan, spelled

KINDS = {
    "weights": "float32 masters",
    "optimizer": "its state",
    "gradients": "float32; a second copy while microbatches are summed",
    "activations": "kept for the backward pass",
    "layer": "a layer at work",
    "logits": "a chunk of them, and the head",
    "buffers": "gathered weights, gradients on their way",
}


def console() -> Any:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def print_plan(
    out: Any, plan: Plan, tokens: float | int, price: float | None, compiled: Compiled | None, remedy: Any
) -> None:
    layout, train = plan.layout, plan.layout.experiment.train
    out.print(
        f"[bold]{layout.experiment.run.name}[/bold] on {layout.devices:,} x {plan.device}: "
        f"{spelled(layout.mesh)}; {layout.microbatches} microbatches of {layout.rows} x "
        f"{layout.experiment.data.sequence_length:,} tokens on each of {layout.devices // _sharers(plan):,} "
        f"places; remat {train.remat}, {train.dtype}"
    )
    out.print()
    out.print(_memory(plan))
    if not plan.fits:
        note, other = remedy if remedy else (None, None)
        if other is None:
            out.print("[bold red]does not fit[/], and neither does any single change that was tried\n")
        else:
            out.print(
                f"[bold red]does not fit[/]; the smallest change that would: [bold]{note}[/] "
                f"({_gb(other.peak)} GB, {other.times.step:.3g} s a step)\n",
                soft_wrap=True,
            )
    out.print(_time(plan))
    out.print(_traffic(plan))
    out.print(_budget(plan, tokens, price))
    if compiled is not None:
        out.print(_check(plan, compiled))


def _sharers(plan: Plan) -> int:
    mesh = plan.layout.mesh
    return mesh["tensor"] * mesh["context"]


def grid(title: str) -> Any:
    """An empty table in the style of the others."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        title=title, title_justify="left", title_style="bold", caption_justify="left",
        box=SIMPLE_HEAD, padding=(0, 1), show_header=True,
    )  # fmt: skip


def _gb(size: float | int) -> str:
    return f"{size / 1e9:,.2f}" if size < 100e9 else f"{size / 1e9:,.0f}"


def _memory(plan: Plan) -> Any:
    table = grid("memory of a device, GB")
    table.add_column("kind")
    for moment in memory.MOMENTS:
        table.add_column(moment, justify="right")
    table.add_column("", style="dim")
    moments = {moment: memory.at(moment, plan.layout) for moment in memory.MOMENTS}
    for kind in memory.KINDS:
        if any(kind in held for held in moments.values()):
            cells = [_gb(held[kind]) if held.get(kind) else "-" for held in moments.values()]
            table.add_row(kind, *cells, KINDS[kind])
    table.add_section()
    sums = {moment: sum(held.values()) for moment, held in moments.items()}
    cells = [f"[bold]{_gb(s)}[/]" if moment == plan.moment else _gb(s) for moment, s in sums.items()]
    verdict = "fits in" if plan.fits else "[red]does not fit in[/]"
    table.add_row("sum", *cells, f"the peak {verdict} {_gb(plan.capacity)}, {plan.peak / plan.capacity:.0%}")
    moe, slots = plan.layout.model.moe, memory.slots_at_peak(plan.layout)
    if moe and plan.moment == "backward" and slots > plan.peak / 4:
        table.caption = (
            f"{_gb(slots)} GB of it in experts' slots, {plan.layout.slots / plan.layout.stream:.3g} for each "
            f"token, which takes {moe.top_k} (model.moe.capacity)"
        )
    return table


def _time(plan: Plan) -> Any:
    found = plan.times
    table = grid("seconds of a step")
    table.add_column("")
    table.add_column("s", justify="right")
    table.add_column("", style="dim")
    row = fitted_on(plan.device)
    source = f"fitted on {row.system}'s {row.config} on {row.devices} {row.device}" if row else "assumed"
    empty = " (empty slots, and again)" if plan.layout.model.moe else " (again)"
    again = found.executed_flops / found.flops - 1
    each = plan.tokens_per_second / plan.layout.devices
    table.add_row(
        "compute", f"{found.compute:.2f}",
        f"{exponent(found.executed_flops)} FLOPs, {again:.0%} beyond the model's{empty}; "
        f"at {plan.efficiency:.0%} of the peak, {source}",
    )  # fmt: skip
    table.add_row("memory", f"{found.memory:.2f}", "between products, about")
    table.add_row("exchanges", f"{found.exposed:.2f}", "waited for; see below")
    table.add_row("update", f"{found.update:.2f}", "optimizer, sums of gradients")
    table.add_section()
    table.add_row(
        "[bold]step[/]", f"[bold]{found.step:.2f}[/]",
        f"[not dim][bold]{short(plan.tokens_per_second)} tokens/s[/], {each:,.0f} a device, "
        f"[bold]MFU {found.mfu:.1%}[/]; bound by [bold]{found.bound_by}[/][/]",
    )  # fmt: skip
    return table


def _traffic(plan: Plan) -> Any:
    table = grid("exchanges of a step: GB that a device sends")
    table.add_column("axis")
    table.add_column("what")
    table.add_column("kind")
    for name in ("GB", "s"):
        table.add_column(name, justify="right")
    table.add_column("", style="dim")
    sums: dict[tuple[str, str, str], float] = {}
    for one in plan.exchanges:
        key = (one.axis, one.what, one.kind)
        sums[key] = sums.get(key, 0.0) + one.sent
    for (axis, what, kind), sent in sorted(sums.items(), key=lambda item: -item[1]):
        if sent < 1e-3 * max(sums.values()):
            continue
        total = sum(s for (a, _, _), s in sums.items() if a == axis)
        seconds = plan.times.exchanges[axis] * sent / total
        hidden = "behind compute" if what in HIDDEN else "waited for"
        table.add_row(axis, what, kind, f"{sent / 1e9:,.1f}", f"{seconds:.2f}", hidden)
    if not sums:
        table.add_row("-", "none", "", "", "", "one device")
    return table


def _budget(plan: Plan, tokens: float | int, price: float | None) -> str:
    hours = plan.hours(tokens)
    cost = "" if price is None else f", [bold]{hours * plan.layout.devices * price:,.0f} USD[/]"
    return (
        f"{short(tokens)} tokens: [bold]{duration(hours)}[/], "
        f"{short(hours * plan.layout.devices)} device-hours{cost}\n"
    )


def _check(plan: Plan, compiled: Compiled) -> Any:
    """What the compiled program shows beside what was computed, and why they differ."""
    layout = plan.layout
    table = grid(
        f"cross-check: the same step compiled for {layout.devices:,} CPU devices in {compiled.seconds:.0f} s"
    )
    table.add_column("")
    table.add_column("plan", justify="right")
    table.add_column("program", justify="right")
    table.add_column("", style="dim")
    held = plan.kinds["weights"] + plan.kinds["optimizer"]
    table.add_row(
        "state, GB", _gb(held), _gb(compiled.argument_bytes), "the program's has the batch and counters too"
    )
    rest = plan.peak - held
    wide = rest + plan.kinds.get("activations", 0) * (4 // layout.width - 1)
    note = f"the CPU keeps activations in float32, which makes {_gb(wide)}, and sums products in it"
    if layout.mesh["context"] == 1:
        note += "; its attention unrolls its blocks"
    table.add_row("the rest, GB", _gb(rest), _gb(compiled.temporary_bytes), note)
    expected: dict[str, float] = {}
    for one in plan.exchanges:
        expected[one.axis] = expected.get(one.axis, 0.0) + one.sent
    for axis in sorted(set(expected) | set(compiled.collective_bytes)):
        ours, theirs = expected.get(axis, 0.0), compiled.collective_bytes.get(axis, 0.0)
        same = "equal but for scalars" if abs(ours - theirs) <= 1e-3 * max(ours, theirs) else "DIFFERENT"
        table.add_row(f"sent over {axis}, GB", f"{ours / 1e9:,.2f}", f"{theirs / 1e9:,.2f}", same)
    table.caption = (
        "counted just after partitioning: sums whose slices are read as reduce-scatters, which the CPU never "
        "emits, in the dtype that they are cast to"
    )
    return table


def print_sweep(
    out: Any, plans: Sequence[Plan], tried: int, shown: int, compiled: Sequence[Compiled]
) -> None:
    table = grid(f"the fastest {min(shown, len(plans))} of {len(plans):,} that fit, {tried:,} tried")
    columns = (
        "",
        "mesh",
        "micro-\nbatches",
        "of\nrows",
        "remat",
        "GB",
        "s/step",
        "tok/s/\ndevice",
        "MFU",
        "bound\nby",
    )
    for name in columns:
        left = name in ("mesh", "remat", "bound\nby")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for place, plan in enumerate(plans[:shown], 1):
        each = plan.tokens_per_second / plan.layout.devices
        table.add_row(
            str(place), spelled(plan.layout.mesh), str(plan.layout.microbatches), str(plan.layout.rows),
            plan.layout.experiment.train.remat, f"{plan.peak / 1e9:.1f}", f"{plan.times.step:.2f}",
            f"{each:,.0f}", f"{plan.times.mfu:.1%}", plan.times.bound_by,
        )  # fmt: skip
    out.print(table)
    for place, (plan, program) in enumerate(zip(plans, compiled, strict=False), 1):
        out.print(f"[bold]{place}[/]: {spelled(plan.layout.mesh)}")
        out.print(_check(plan, program))


def print_calibration(out: Any, outcomes: Sequence[Outcome]) -> None:
    table = grid("published throughputs, tokens a second and device")
    for name in ("system", "model", "devices", "length", "assumed", "published", "predicted", "error"):
        table.add_column(
            name, justify="left" if name in ("system", "model", "devices", "assumed") else "right"
        )
    for row, predicted, error in outcomes:
        table.add_row(
            row.system, row.config, f"{row.devices} {row.device}", f"{row.length:,}",
            f"{row.rows} rows, remat {row.remat}", f"{row.published:,.0f}", f"{predicted:,.0f}",
            "fitted" if row.fitted else f"{error:+.1%}",
        )  # fmt: skip
    out.print(table)
