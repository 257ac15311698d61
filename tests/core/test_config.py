"""Configurations: what is read is what was written, and every mistake is named with its place and remedy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from core.config import add_arguments, config, load, parse, to_dict, to_yaml
from core.errors import UserError
from core.options import CheckpointConfig, MeshConfig, OptimizerConfig, RunConfig


@config
class Scaling:
    kind: Literal["linear", "YaRN"]
    factor: float = 1.0


@config
class Model:
    num_heads: int
    head_dim: int = 64
    bias: bool = False
    scaling: Scaling | None = None

    @model_validator(mode="after")
    def _check(self):
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim ({self.head_dim}) is odd: rotary embeddings need pairs")
        return self


@config
class Source:
    source: str | None = Field(None, alias="from")


@config
class Example:
    run: RunConfig
    model: Model
    seed: int = 0
    sources: tuple[str, ...] = ()
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    init: Source = Field(default_factory=Source)


BASE = "run: {name: a}\nmodel: {num_heads: 4}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def fails(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(Example, path, overrides)
    return str(caught.value)


def test_defaults_values_and_overrides(write):
    path = write(
        BASE + "sources: [a, b]\noptimizer: {learning_rate: 3e-4, clip_norm: null}\ninit: {from: runs/x}\n"
    )
    example = load(Example, path, ["model.num_heads=8", "model.scaling.kind=YaRN", "seed = 1e3"])
    assert example.model == Model(num_heads=8, scaling=Scaling("YaRN"))
    assert example.sources == ("a", "b") and example.seed == 1000
    assert example.optimizer.learning_rate == 3e-4 and example.optimizer.clip_norm is None
    assert example.init.source == "runs/x"
    assert example.run.folder == Path("runs/a")


@settings(max_examples=40, deadline=None)
@given(
    rate=st.floats(1e-12, 1e6), epsilon=st.floats(1e-30, 1e3), seed=st.integers(-(2**63), 2**63),
    sources=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=3),
    name=st.sampled_from(["2024", "2024-01-01", "0123", "1e5", "null", "yes", "a b"]),
)  # fmt: skip
def test_what_is_saved_reads_back_the_same(tmp_path_factory, rate, epsilon, seed, sources, name):
    example = Example(
        run=RunConfig(name), model=Model(2, scaling=Scaling("linear", 8.0)),
        seed=seed, sources=tuple(sources), init=Source(**{"from": name}),
        optimizer=OptimizerConfig(learning_rate=rate, epsilon=epsilon),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    path.write_text(to_yaml(example), encoding="utf-8")
    assert load(Example, path) == example
    assert parse(Example, to_dict(example)) == example


def test_extends_merges_by_key_and_errors_name_the_right_file(write):
    write(BASE + "optimizer: {beta1: 0.5, beta2: 0.9}\n", "base.yaml")
    child = write("extends: base.yaml\noptimizer: {beta1: 0.8}\n", "child.yaml")
    example = load(Example, child)
    assert (example.optimizer.beta1, example.optimizer.beta2, example.model.num_heads) == (0.8, 0.9, 4)
    write(BASE + "optimizer: {beta1: 2}\n", "base.yaml")
    assert fails(write("extends: base.yaml\nseed: 1\n", "child.yaml")).startswith(
        f"{child.parent}/base.yaml: "
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("modle: {}", "unknown key 'modle'; did you mean 'model'?"),
        ("optimizer: {learning_rat: 1}", "'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'?"),
        ("head_dim: 4", "unknown key 'head_dim'; did you mean 'model.head_dim'?"),
        ("mesh: {seed: 4}", "unknown key 'mesh.seed'; did you mean 'seed'?"),
        ("init: {zzz: 4}", "unknown key 'init.zzz'; valid here: from"),
        ("init: {source: a}", "unknown key 'init.source'; valid here: from"),
        ("seed: x", "'seed' is 'x': input should be a valid integer"),
        ("seed: '8'", "'seed' is '8': input should be a valid integer"),
        ("seed: true", "'seed' is True: input should be a valid integer"),
        ("seed: 1.5", "'seed' is 1.5: input should be a valid integer"),
        ("seed: null", "'seed' is None: input should be a valid integer"),
        ("optimizer: {beta1: yes}", "'optimizer.beta1' is True: input should be a valid number"),
        ("optimizer: {beta1: -1}", "'optimizer.beta1' is -1: input should be greater than or equal to 0"),
        ("optimizer: {name: Adam}", "'optimizer.name' is 'Adam': input should be 'adamw', 'muon' or 'sgd'"),
        ("optimizer: 3", "'optimizer' is 3: input should be an object"),
        ("sources: abc", "'sources' is 'abc': input should be a valid array"),
        ("sources: [a, 3]", "'sources.1' is 3: input should be a valid string"),
        ("checkpoint: {every: 0}", "'checkpoint.every' is 0: input should be greater than or equal to 1"),
        ("mesh: {data: -1, fsdp: -1}", "mesh: more than one mesh axis is -1"),
        ("mesh: {tensor: 0}", "mesh: mesh.tensor is 0: at least 1, or -1 for all remaining devices"),
        ("seed: 1\nseed: 2", "line 4: not valid YAML: 'seed' stands twice"),
        ("seed: [1", "not valid YAML"),
        ("\tseed: 1", "not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_file(write, more, message):
    path = write(BASE + more + "\n")
    said = fails(path)
    assert said.startswith(f"{path}") and message in said, said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {num_heads: 4}", "the required key 'run' is missing"),
        ("run: {}\nmodel: {num_heads: 4}", "the required key 'run.name' is missing"),
        ("run: {name: a/b}\nmodel: {num_heads: 4}", "run.name is 'a/b': it names one folder"),
        ("run: {name: .a}\nmodel: {num_heads: 4}", "run.name is '.a'"),
        ("run: {name: a}\nmodel: {num_heads: 4, head_dim: 3}", "model.head_dim (3) is odd"),
        ("run: {name: a}\nmodel: {num_heads: 4, scaling: {kind: yarn}}", "should be 'linear' or 'YaRN'"),
        ("run: {name: a}\nmodel: {num_heads: 4, scaling: {king: x}}", "did you mean 'model.scaling.kind'?"),
        ("", "expected 'key: value' lines, found an empty file"),
        ("- a\n- b\n", "expected 'key: value' lines, found list"),
        ("extends: [a, b]", "'extends' is ['a', 'b']: it names one file"),
        (b"run: \xff", "is not UTF-8 text (byte 5)"),
    ],
)  # fmt: skip
def test_files_that_are_no_configuration(write, text, message):
    assert message in fails(write(text))


def test_missing_files_are_named_with_the_nearest(write, tmp_path):
    write(BASE, "quickstart.yaml")
    assert f"did you mean {tmp_path}/quickstart.yaml?" in fails(tmp_path / "quikstart.yaml")
    assert f"nor does the folder {tmp_path}/no" in fails(tmp_path / "no" / "c.yaml")
    child = write("extends: gone.yaml")
    assert f"gone.yaml ('extends' of {child}) does not exist" in fails(child)
    assert "can't be read: Is a directory" in fails(tmp_path)
    assert "can't be read: Not a directory" in fails(tmp_path / "quickstart.yaml" / "c.yaml")


def test_files_that_extend_each_other(write):
    write("extends: b.yaml", "a.yaml")
    assert "b.yaml: 'extends' comes back to this file" in fails(write("extends: a.yaml", "b.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set 'seed' is not KEY=VALUE, for example --set train.steps=100"),
        ("seed=x", "--set: 'seed' is 'x': input should be a valid integer"),
        ("model.num_head=3", "--set: unknown key 'model.num_head'; did you mean 'model.num_heads'?"),
        ("seed.x=3", "--set: 'seed' is {'x': 3}: input should be a valid integer"),
        ("seed=[", "--set seed, line 1: not valid YAML"),
        ("=3", "--set: unknown key ''"),
    ],
)
def test_mistakes_in_overrides_are_named(write, override, message):
    assert message in fails(write(BASE), override)


def test_the_arguments_of_a_command():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parsed = parser.parse_args(["--config", "c.yaml", "--set", "a=1", "--set", "b.c=2"])
    assert (parsed.config, parsed.overrides) == ("c.yaml", ["a=1", "b.c=2"])
