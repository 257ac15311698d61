"""All meshes of so many devices, microbatches and remat policies, ranked by the step they give."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from core.devices import Device
from core.errors import UserError
from core.mesh import AXES
from core.options import MeshConfig
from launch.plan.plan import Plan, make_plan, spelled
from llm.config import Experiment

REMAT = ("none", "dots", "full")


def sweep(experiment: Experiment, devices: int, name: str, device: Device) -> tuple[list[Plan], int]:
    """Plans on all meshes that the model and its batch divide over, the fastest first, those that fit before
    those that don't; and how many were tried.
    """
    train = experiment.train
    plans = []
    for mesh in meshes(devices):
        if mesh["expert"] > 1 and experiment.model.moe is None:
            continue
        for accumulation in _accumulations(experiment, mesh):
            for remat in REMAT:
                tried = dataclasses.replace(train, accumulation=accumulation, remat=remat)  # type: ignore[arg-type]
                candidate = dataclasses.replace(experiment, mesh=MeshConfig(**mesh), train=tried)
                try:
                    plans.append(make_plan(candidate, name, device))
                except UserError:
                    break
    plans.sort(key=lambda plan: (not plan.fits, plan.times.step))
    return plans, len(plans)


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to lay so many devices out along the axes."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for first in itertools.product(divisors, repeat=len(AXES) - 1):
        if devices % math.prod(first) == 0:
            yield dict(zip(AXES, (devices // math.prod(first), *first), strict=True))


def _accumulations(experiment: Experiment, mesh: dict[str, int]) -> list[int]:
    """Numbers of microbatches that leave each place whole sequences; powers of two of them."""
    places = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    rows, left = divmod(experiment.data.batch_size, places)
    return [] if left else [2**i for i in range(rows.bit_length()) if rows % 2**i == 0]


def plot_sweep(plans: Sequence[Plan], title: str, path: Path) -> None:
    """Plot tokens a second and device against memory, a point for each plan, the best of each memory joined
    by a line, as a PNG at `path`. Points differ by what is divided over `tensor`.
    """
    from core.plots import INK, RED, new_figure, save, style

    figure = new_figure(8, 5)
    axes = figure.subplots()
    limit = plans[0].capacity
    plans = [plan for plan in plans if plan.peak < 3 * limit] or plans
    widths = sorted({plan.layout.mesh["tensor"] for plan in plans})
    for tensor, color in zip(widths, _shades(len(widths)), strict=True):
        chosen = [plan for plan in plans if plan.layout.mesh["tensor"] == tensor]
        axes.scatter(
            [plan.peak / 1e9 for plan in chosen], [_each(plan) for plan in chosen],
            s=9, color=color, alpha=0.7, linewidths=0, label=f"tensor={tensor}",
        )  # fmt: skip
    front: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: plan.peak):
        if not front or _each(plan) > _each(front[-1]):
            front.append(plan)
    axes.step([p.peak / 1e9 for p in front], [_each(p) for p in front], where="post", color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.axvline(limit / 1e9, color=RED, linewidth=1.2, linestyle="--", label="a device's memory")
    best = plans[0]
    axes.annotate(
        f"{spelled(best.layout.mesh)}, {best.layout.microbatches} x {best.layout.experiment.train.remat}",
        (best.peak / 1e9, _each(best)), xytext=(-8, 10), textcoords="offset points", ha="right", color=INK,
    )  # fmt: skip
    axes.set_ylim(0, 1.2 * max(map(_each, plans)))
    style(axes, "tokens a second and device", "peak memory of a device (GB)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5)
    axes.set_title(title, color=INK, loc="left")
    save(figure, path)


def _each(plan: Plan) -> float:
    return plan.tokens_per_second / plan.layout.devices


def _shades(count: int) -> list[str]:
    from core.plots import COLORS

    return [COLORS[i % len(COLORS)] for i in range(count)]
