"""Figures as people read them."""

from __future__ import annotations


def short(number: int | float) -> str:
    """8030261248 -> 8.03B."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            value = number / unit
            return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}{name}"
    return f"{number:,.0f}"


def exponent(number: int | float) -> str:
    """7.5e18 rather than 7.5e+18."""
    return f"{number:.3g}".replace("e+", "e")


def duration(hours: float | int) -> str:
    """30 hours -> 30.0 hours, 10,000 -> 1.1 years."""
    for unit, name in ((8766, "years"), (24, "days"), (1, "hours"), (1 / 60, "minutes")):
        if hours >= 2 * unit:
            return f"{hours / unit:.1f} {name}"
    return f"{hours * 3600:.3g} seconds"
