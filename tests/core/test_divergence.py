"""Divergence told from noise: each kind raises an alarm, a run's usual course and a single bad step none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from core.divergence import FEWEST, Monitor
from core.options import DivergenceConfig


def course(steps: int, seed: int = 0) -> list[dict[str, float]]:
    """A falling loss with noise, and gradient norms that vary by factors."""
    rng = np.random.default_rng(seed)
    losses = 2 + 4 * np.exp(-np.arange(steps) / 100) + 0.2 * rng.standard_normal(steps)
    norms = np.exp(0.4 * rng.standard_normal(steps))
    return [{"loss": a, "grad_norm": b} for a, b in zip(losses.tolist(), norms.tolist(), strict=True)]


def alarms(lines: list[dict[str, float]], options: DivergenceConfig | None = None) -> list:
    monitor = Monitor(options or DivergenceConfig())
    return [alarm for step, line in enumerate(lines, 1) if (alarm := monitor.observe(step, line))]


@pytest.mark.parametrize("seed", range(10))
def test_noise_is_no_divergence(seed):
    assert alarms(course(2000, seed)) == []


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_counts_at_once(name, value):
    lines = course(3)
    lines[2][name] = value
    (alarm,) = alarms(lines)
    assert (alarm.step, alarm.good, alarm.metric) == (3, 2, name)
    assert alarm.reason == f"{name} is {value}"


@pytest.mark.parametrize(("name", "factor"), [("loss", 2.5), ("grad_norm", 40)])
def test_a_spike_counts_once_it_lasts(name, factor):
    lines = course(300)
    for step in (100, 150, 151, 200, 201, 202):  # alone, two in a row, and three
        lines[step - 1][name] *= factor
    (alarm,) = alarms(lines)
    assert (alarm.step, alarm.good, alarm.metric) == (202, 199, name)
    assert alarm.value == lines[201][name] and f"{name} is {alarm.value:.4g}, for 3 steps" in alarm.reason


def test_spikes_do_not_move_what_they_are_judged_by():
    lines = course(300)
    for line in lines[150:170]:
        line["loss"] += 5
    patient = DivergenceConfig(patience=20)
    assert [alarm.step for alarm in alarms(lines, patient)] == [170]


def test_the_limit_is_that_of_the_median_and_its_deviation():
    """By hand: 16 losses of 1 to 16 have median 8.5 and differences of 1."""
    lines = [{"loss": float(i), "grad_norm": 1.0} for i in range(1, FEWEST + 1)]
    limit = 8.5 + 6 * 1.4826 / math.sqrt(2)
    once = DivergenceConfig(patience=1)
    assert alarms([*lines, {"loss": limit - 0.01, "grad_norm": 1.0}], once) == []
    assert len(alarms([*lines, {"loss": limit + 0.01, "grad_norm": 1.0}], once)) == 1
    assert alarms([*lines[1:], {"loss": 1e9, "grad_norm": 1.0}], once) == [], "too few to judge by"


def test_in_float16_an_overflow_is_no_divergence_until_no_scale_helps():
    overflow = [line | {"grad_norm": math.nan, "loss_scale": 2.0**-i} for i, line in enumerate(course(3), -1)]
    (alarm,) = alarms(overflow)
    assert (alarm.step, alarm.metric) == (3, "loss_scale")


@pytest.mark.parametrize(("better", "sign"), [("min", 1), ("max", -1)])
def test_a_watched_metric_that_turns_the_wrong_way(better, sign):
    monitor = Monitor(DivergenceConfig(patience=2, watch={"score": better}))
    values = [5.0, 4.0, 4.03, 4.3, 4.01, 4.3, 4.4]  # within the margin, once past it, twice in a row
    found = [monitor.observe_evaluation(10 * i, {"score": 9 + sign * v}) for i, v in enumerate(values)]
    assert found[:-1] == [None] * 6
    assert (found[-1].step, found[-1].good, monitor.good) == (60, 40, 40)
    assert "2 evaluations worse than its best" in found[-1].reason


def test_replaying_restores_the_monitor():
    lines = course(200)
    lines[100]["loss"] += 9
    for line in lines[180:]:
        line["loss"] += 9
    through = Monitor(DivergenceConfig())
    expected = [through.observe(step, line) for step, line in enumerate(lines, 1)]
    again = Monitor(DivergenceConfig())
    for step, line in enumerate(lines[:181], 1):
        again.observe(step, line)
    assert [again.observe(step, line) for step, line in enumerate(lines[181:], 182)] == expected[181:]
    assert any(expected)


@pytest.mark.parametrize("growth", [2, 5])
def test_norms_that_grow_during_warm_up_without_noise_are_no_divergence(growth):
    """As with large batches, where nothing but the trend moves them."""
    rng = np.random.default_rng(0)
    norms = np.exp(np.log(growth) * np.minimum(np.arange(300) / 100, 1) + 0.02 * rng.standard_normal(300))
    assert alarms([{"loss": 3.0, "grad_norm": norm} for norm in norms.tolist()]) == []


def test_good_is_before_all_that_looked_bad():
    lines = course(300)
    lines[199]["loss"] = lines[200]["loss"] = 60.0
    lines[201]["grad_norm"] = math.nan
    (alarm,) = alarms(lines[:202])
    assert (alarm.step, alarm.good, alarm.metric) == (202, 199, "grad_norm")
    monitor = Monitor(DivergenceConfig(watch={"score": "min"}))
    for step, line in enumerate(course(3), 1):
        monitor.observe(step, line)
    first = monitor.observe_evaluation(3, {"score": math.nan})
    assert first is not None and first.good == 2, "never evaluated before: no reason to begin anew"
