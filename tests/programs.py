"""Reading traced and compiled programs: what they compute, how often, and the arrays they hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
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
