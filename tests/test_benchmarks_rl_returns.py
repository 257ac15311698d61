"""The table of `benchmarks/rl_returns.py`: what it trains, what it reads again, what it refuses."""

from __future__ import annotations

import functools

import pytest

from benchmarks import rl_returns
from benchmarks.rl_returns import Target
from core.config import parse
from core.errors import UserError
from rl.config import Experiment


def tiny(target, runs, steps=64) -> Experiment:
    options = {
        "run": {"name": target.config, "dir": str(runs)},
        "env": {"name": "CartPole-v1"},
        "train": {"steps": steps, "seeds": 2},
        "ppo": {"environments": 8, "rollout": 4, "hidden": [8]},
        "eval": {"every": 32, "episodes": 4},
    }
    return parse(Experiment, options)


@pytest.mark.slow
def test_a_table(tmp_path, monkeypatch, capsys):
    """Every return of CartPole is at least 8."""
    monkeypatch.setattr(rl_returns, "experiment_of", tiny)
    monkeypatch.setattr(rl_returns, "TARGETS", [Target("one", 8, "-"), Target("other", 501, "500 (50k)")])
    with pytest.raises(SystemExit, match="1"):
        rl_returns.main(["--runs", str(tmp_path)])
    told = capsys.readouterr().out
    *_, one, other = told.splitlines()
    assert len(told.splitlines()) == 4
    cells = one.strip("| ").split(" | ")
    assert cells[:4] == ["CartPole-v1", "ppo", "one", "64"] and cells[7] == "yes" and cells[-1].isdecimal()
    assert other.endswith(" | - |") and "**no** | 500 (50k)" in other
    written = (tmp_path / "one" / "summary.json").stat().st_mtime_ns

    rl_returns.main(["--runs", str(tmp_path), "--only", "one"])  # no SystemExit
    assert capsys.readouterr().out.splitlines()[2:] == [one]
    assert (tmp_path / "one" / "summary.json").stat().st_mtime_ns == written

    monkeypatch.setattr(rl_returns, "experiment_of", functools.partial(tiny, steps=96))
    with pytest.raises(UserError, match="another configuration"):
        rl_returns.main(["--runs", str(tmp_path), "--only", "one"])


def test_seconds_are_those_of_all_seeds_up_to_the_evaluation():
    lines = [
        {"step": 10, "steps_per_second": 5.0},
        {"step": 30, "steps_per_second": 10.0, "eval_return_mean": 1.0},
        {"step": 40, "steps_per_second": 2.0, "eval_return_mean": 3.0},
        {"step": 50, "steps_per_second": 2.0, "eval_return_mean": 9.0},
    ]
    assert rl_returns.seconds_to(2, lines, seeds=3) == pytest.approx(3 * (10 / 5 + 20 / 10 + 10 / 2))
    assert rl_returns.seconds_to(10, lines, seeds=3) is None


@pytest.mark.parametrize("target", rl_returns.TARGETS, ids=lambda target: target.config)
def test_every_configuration_is_trained_as_the_table_says(target, tmp_path):
    experiment = rl_returns.experiment_of(target, tmp_path)
    assert (experiment.train.seeds, experiment.eval.episodes) == (5, 100)
    assert 10 <= experiment.train.steps // experiment.eval.every <= 40
