"""A run of another kind than the one asked for is named, with what reads it, by whatever opens it."""

from __future__ import annotations

import pytest
from runs import ROOT

import clip.config
import clip.setup
import clip.zeroshot
import export.hf
import llm.config
import llm.generate
import llm.setup
import rl.config
import rl.play
from core.config import load, parse, to_dict, to_yaml
from core.errors import UserError
from core.kinds import AGENT, DUAL_ENCODER, LANGUAGE_MODEL, kind_of

SCHEMAS = {
    "llm": (llm.config.Experiment, "llm/quickstart.yaml"),
    "clip": (clip.config.Experiment, "clip/quickstart.yaml"),
    "rl": (rl.config.Experiment, "rl/dqn-cartpole.yaml"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a configuration of each kind, as a run's."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (schema, config) in SCHEMAS.items():
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(to_yaml(load(schema, ROOT / "configs" / config)))
    return folder


def test_what_a_run_is_shows_in_its_configuration(runs):
    kinds = {name: kind_of(runs / name / "config.yaml") for name in SCHEMAS}
    assert kinds == {"llm": LANGUAGE_MODEL, "clip": DUAL_ENCODER, "rl": AGENT}


@pytest.mark.parametrize("content", ["", "model: {image", "model: 3", "data: [1]", "[]"])
def test_what_is_no_configuration_is_of_no_kind(content, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    assert kind_of(tmp_path / "config.yaml") is None
    assert kind_of(tmp_path / "missing.yaml") is None


@pytest.mark.parametrize(
    ("main", "other", "reader"),
    [
        (clip.zeroshot.main, "llm", "python -m llm.generate --run {} --prompt TEXT"),
        (clip.zeroshot.main, "rl", "python -m rl.play --run {}"),
        (llm.generate.main, "clip", "python -m clip.zeroshot --run {}"),
        (export.hf.main, "rl", "python -m rl.play --run {}"),
        (rl.play.main, "llm", "python -m llm.generate --run {} --prompt TEXT"),
    ],
)
def test_a_run_of_another_kind_is_named(main, other, reader, runs, tmp_path):
    more = {llm.generate.main: ["--prompt", "x"], export.hf.main: ["--out", str(tmp_path / "out")]}
    with pytest.raises(UserError) as told:
        main(["--run", str(runs / other), *more.get(main, [])])
    message = str(told.value)
    assert message.startswith(f"{runs / other} is a run of ") and message.endswith(
        reader.format(runs / other)
    )


@pytest.mark.parametrize(("name", "other"), [("clip", "llm"), ("llm", "clip")])
def test_weights_of_another_kind_are_named(name, other, runs, tmp_path):
    schema, config = SCHEMAS[name]
    data = to_dict(load(schema, ROOT / "configs" / config))
    data["run"]["dir"], data["init"]["from"] = str(tmp_path), str(runs / other)
    data["mesh"] = {"data": -1} | {"tensor": 2}
    with pytest.raises(UserError, match=rf"^init\.from: {runs / other} is a run of"):
        {"clip": clip.setup.set_up, "llm": llm.setup.set_up}[name](parse(schema, data), False)
    assert not list(tmp_path.iterdir())
