"""The curve in the terminal."""

from __future__ import annotations

import math

from rl.curve import draw, smoothed


def dots(line):
    """Columns of a line in which a dot stands."""
    return [i for i, char in enumerate(line.split("┤")[1]) if char != "\u2800"]


def test_a_rising_line_goes_from_the_lower_left_to_the_upper_right():
    points = [(x, float(x)) for x in range(0, 1001, 10)]
    title, *body, axis, end = draw(points, 1000, "title", width=20).splitlines()
    assert title.strip() == "title" and end.endswith("1,000 steps") and len(body) == 10
    firsts = [min(dots(line)) for line in body]
    assert firsts == sorted(firsts, reverse=True) and firsts[0] >= 17 and firsts[-1] == 0
    assert body[0].split("┤")[0].strip() == "980" and body[-1].split("┤")[0].strip() == "0"
    assert len(axis) == len(body[0])


def test_half_a_run_fills_half_the_width():
    body = draw([(x, math.sin(x)) for x in range(51)], 100, "", width=20).splitlines()[1:-2]
    assert max(max(dots(line), default=0) for line in body) in (9, 10)


def test_what_cannot_be_drawn():
    assert draw([], 100, "") == draw([(1, 2.0)], 100, "") == ""
    assert draw([(1, math.nan), (2, math.nan)], 100, "") == ""
    flat = draw([(0, 5.0), (100, 5.0)], 100, "", width=20)
    assert flat.count("5 ┤") == 2


def test_smoothed_passes_over_gaps():
    assert smoothed([math.nan, 1, math.nan, 3])[1:].tolist() == [1, 1, 2]
    assert math.isnan(smoothed([math.nan, 1])[0])
    assert smoothed([1, 2, 3, 4, 5, 6]).tolist() == [1, 1.5, 2, 2.5, 3, 4]
