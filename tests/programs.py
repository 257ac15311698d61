"""Reading traced and compiled programs: what they compute, how often, and the arrays they hold."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.extend.core import Jaxpr, jaxprs_in_params


def equations(jaxpr: Jaxpr, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation of a jaxpr and of those inside it, with how many times loops run it."""
    for equation in jaxpr.eqns:
        yield equation, times
        runs = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, runs)


def products(jaxpr: Jaxpr) -> list[tuple[Any, int]]:
    """Every `dot_general`, with the floating-point operations of all its runs."""
    found = []
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            inner = math.prod(left[i] for i in contracted)
            found.append((equation, 2 * times * inner * math.prod(out)))
    return found


def largest_array(hlo: str) -> int:
    """Elements of the largest array that a compiled program's text speaks of."""
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred|u32|s8)\[([\d,]+)\]", hlo)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def partitioned(lowered) -> str:
    """The program just after XLA has divided it over devices, when no collective is merged with another."""
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd.*"})
        (dump,) = Path(folder).glob("*after_spmd-partitioning*")
        return dump.read_text()


def collectives(hlo: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """Each collective, the shape of its result on one device, and whether a loop runs it."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    calls: dict[str, set[str]] = {}  # what each computation runs
    found, bodies, here = [], set(), ""
    for line in hlo.splitlines():
        if begins := re.match(r"(?:ENTRY )?%?([\w.-]+)[ .(].*\{$", line):
            here = begins[1]
            continue
        calls.setdefault(here, set()).update(re.findall(r"(?:body|to_apply|calls)=%?([\w.-]+)", line))
        bodies.update(re.findall(r"body=%?([\w.-]+)", line))
        if match := re.search(rf" = \w+\[([\d,]*)\]\S* ({kinds})\(", line):
            found.append((match[2], tuple(map(int, filter(None, match[1].split(",")))), here))
    looped, new = set(), bodies
    while new:
        looped |= new
        new = {name for caller in new for name in calls.get(caller, ())} - looped
    return [(kind, shape, here in looped) for kind, shape, here in found]
