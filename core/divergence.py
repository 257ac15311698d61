"""Divergence: when a run has gone wrong, told from noise by its own recent past.

NaN or an infinity counts at once. The loss or the norm of the gradient is a spike where it stands more than
`threshold` robust standard deviations above the median of the last `WINDOW` steps that were none; `patience`
spikes in a row count: a single bad batch passes. So do `patience` values in a row of a watched metric that
are worse than its best by more than `MARGIN`.

In float16 a gradient that isn't finite is the loss scale's affair (`core.loss_scale`), until the scale is
below 1: then no scale helps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from core.options import DivergenceConfig

WINDOW = 64
FEWEST = 16  # values that a spike is judged by; before that, only what isn't finite counts
MARGIN = 0.01  # of a watched metric's best value

# The least standard deviation assumed, in the units of `_scaled`: a run that hardly moves has no noise, and
# with large batches the norm grows by factors during warm-up without any.
_FLOORS = {"loss": 0.01, "grad_norm": 0.2}


class Alarm(NamedTuple):
    """What went wrong with `metric` at `step`; `good` is the last step of which nothing bad is known."""

    step: int
    good: int
    metric: str
    value: float
    reason: str


class Monitor:
    """Sees a run's figures step by step. Its memory is what it has seen: replaying them restores it."""

    def __init__(self, options: DivergenceConfig):
        self._options = options
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in _FLOORS}
        self._bad: dict[str, int] = dict.fromkeys((*_FLOORS, *options.watch), 0)  # values in a row
        self._best: dict[str, float] = {}
        self._good: dict[str, int] = {}  # the last step at which a value was not bad

    def observe(self, step: int, values: Mapping[str, float | int]) -> Alarm | None:
        """The alarm that the figures of a training step, `loss` and `grad_norm`, raise if any."""
        scale = values.get("loss_scale")
        if scale is not None and scale < 1:
            reason = f"the loss scale fell to {scale:g}: gradients overflow float16 whatever the scale"
            return Alarm(step, self._good.get("grad_norm", 0), "loss_scale", scale, reason)
        for name in _FLOORS:
            if not math.isfinite(values[name]):
                if scale is not None:
                    return None  # that step's update was skipped
                return Alarm(step, self._before(step), name, values[name], f"{name} is {values[name]}")
        for name in _FLOORS:
            if alarm := self._spike(step, name, values[name]):
                return alarm
        return None

    def observe_evaluation(self, step: int, values: Mapping[str, float | int]) -> Alarm | None:
        """The alarm that an evaluation's figures raise if any; `values` holds every watched metric."""
        for name, better in self._options.watch.items():
            if alarm := self._turn(step, name, values[name], better):
                return alarm
        return None

    @property
    def good(self) -> int:
        """The last step of which nothing bad is known; 0 before the first."""
        return min(self._good.values(), default=0)

    @property
    def limits(self) -> dict[str, float]:
        """What `loss` and `grad_norm` are a spike above at the next step; NaN while there is no telling."""
        limits = {name: self._limit(name) for name in _FLOORS}
        return {name: math.nan if x is None else _unscaled(name, x) for name, x in limits.items()}

    def _spike(self, step: int, name: str, value: float) -> Alarm | None:
        recent, scaled = self._recent[name], _scaled(name, value)
        limit = self._limit(name)
        if limit is None or scaled <= limit:
            self._bad[name], self._good[name] = 0, step
            recent.append(scaled)
            return None
        self._bad[name] += 1
        if self._bad[name] < self._options.patience:
            return None
        usual, most = (_unscaled(name, x) for x in (median(recent), limit))
        count = self._bad[name]
        reason = (
            f"{name} is {value:.4g}, for {count} step{'s' * (count > 1)} above {most:.4g} "
            f"(its median is {usual:.4g})"
        )
        return Alarm(step, self._before(step), name, value, reason)

    def _before(self, step: int) -> int:
        """The last step before `step` at which nothing had begun to look bad."""
        return min([step - 1, *(self._good.get(name, 0) for name, bad in self._bad.items() if bad)])

    def _limit(self, name: str) -> float | None:
        recent = self._recent[name]
        if len(recent) < FEWEST:
            return None
        middle = median(recent)
        # Of differences between neighbours, which no trend widens. 1.4826 is a normal distribution's standard
        # deviation over its median absolute one; a difference of two has the square root of 2 times theirs.
        deviation = 1.4826 / math.sqrt(2) * median(abs(b - a) for a, b in pairwise(recent))
        floor = _FLOORS[name] * (abs(middle) if name == "loss" else 1)
        return middle + self._options.threshold * max(deviation, floor)

    def _turn(self, step: int, name: str, value: float, better: str) -> Alarm | None:
        best = self._best.get(name, value)
        if not math.isfinite(value):
            good = min(self._before(step), self._good.get(name, step))
            return Alarm(step, good, name, value, f"{name} is {value}")
        self._best[name] = min(best, value) if better == "min" else max(best, value)
        if abs(value - self._best[name]) <= MARGIN * abs(best):
            self._bad[name], self._good[name] = 0, step
            return None
        self._bad[name] += 1
        if self._bad[name] < self._options.patience:
            return None
        times = f"{self._bad[name]} evaluation{'s' * (self._bad[name] > 1)}"
        reason = f"{name} is {value:.4g}, for {times} worse than its best, {best:.4g}"
        return Alarm(step, self._before(step), name, value, reason)


def _scaled(name: str, value: float) -> float:
    """Gradient norms vary by factors: their logarithm is what has a median and a spread."""
    return value if name == "loss" else math.log(max(value, 1e-30))


def _unscaled(name: str, value: float) -> float:
    return value if name == "loss" else math.exp(value)
