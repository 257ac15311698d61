"""`python -m clip.zeroshot` as its user meets it, on a run of untrained weights."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import clip.data.scenes
from clip import zeroshot
from clip.config import Experiment
from clip.data.captions import encode_captions
from clip.data.images import center_crop
from clip.data.scenes import Scenes
from clip.data.tokenizer import CaptionTokenizer
from clip.eval.report import merge_summary
from clip.model.model import blueprint, pixels
from core.checkpoint import Checkpointer
from core.config import load, parse, to_yaml
from core.errors import UserError
from core.run import RunFolder
from llm.tokenizer import save, train_bpe

ROOT = Path(__file__).parents[2]
SCENES = 320
SHAPE = {"num_layers": 1, "num_heads": 2, "embed_dim": 8, "mlp_dim": 16}


@pytest.fixture(scope="module", autouse=True)
def _few_scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip.data.scenes, "HELDOUT_SCENES", SCENES)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder before its first step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    experiment = parse(
        Experiment,
        {
            "run": {"name": "run", "dir": str(folder.parent)},
            "data": {"batch_size": 64},
            "model": {
                "embed_dim": 8,
                "image": {**SHAPE, "size": 32, "patch_size": 16},
                "text": {**SHAPE, "vocab_size": 300, "length": 12},
            },
            "train": {"steps": 1},
        },
    )
    made = RunFolder.create(folder, to_yaml(experiment))
    split = Scenes(0, heldout=True)
    save(train_bpe([split.captions(i)[0] for i in range(100)], 280, "llama3"), made.tokenizer)
    made.write_summary({"train_seconds": 1.5})
    with Checkpointer(made.checkpoints) as checkpointer:
        params = blueprint(experiment.model).init(jax.random.key(0))
        checkpointer.save(0, params, {}, {"config": {}, "data": {"next_step": 0, "skipped": []}})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data") / "pets", np.random.default_rng(0)
    for name, count in (("house_cat", 5), ("dog", 3)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_held_out_pairs(run, capsys):
    zeroshot.main(["--run", str(run), "--json"])
    figures = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["train_seconds"] == 1.5  # what training wrote is still there
    assert summary["zero_shot_accuracy"] == figures["zero_shot_accuracy"]
    assert (summary["zero_shot_classes"], summary["zero_shot_among_heldout_classes"]) == (80, 16)
    assert summary["zero_shot_images"] == SCENES // 2
    assert summary["zero_shot_chance"] == pytest.approx(1 / 80)
    assert summary["zero_shot_accuracy"] <= summary["zero_shot_among_heldout_accuracy"]
    assert all(Path(file).stat().st_size > 0 for file in figures["files"])
    assert str(run / "summary.json") in figures["files"]
    with open(run / "plots" / "confusion.csv", newline="") as file:
        header, *rows = csv.reader(file)
    matrix = np.array([row[1:] for row in rows], int)
    assert header[1:] == [row[0] for row in rows]
    assert matrix.sum() == SCENES // 2
    assert np.trace(matrix) == round(SCENES // 2 * summary["zero_shot_accuracy"])


def by_hand(run: Path, folders: Path) -> list[list[str | int]]:
    """Rows of the confusion matrix: images by the name that two templates of are nearest to them."""
    model = blueprint(load(Experiment, run / "config.yaml").model)
    bound = model.bind(model.init(jax.random.key(0)))  # as the run's checkpoint was made
    tokenizer = CaptionTokenizer.load(run / "tokenizer")
    classes = []
    for name in ("hound", "cat"):
        prompts = encode_captions(tokenizer, [f"a {name}", f"one {name}"], 12)
        texts = np.asarray(bound.encode_text(*map(jax.numpy.asarray, prompts)))
        classes.append(texts.sum(axis=0) / np.linalg.norm(texts.sum(axis=0)))
    rows: list[list[str | int]] = []
    for folder, name in (("dog", "hound"), ("house_cat", "cat")):
        images = np.stack(
            [center_crop(Image.open(path), 32) for path in sorted((folders / folder).iterdir())]
        )
        vectors = np.asarray(bound.encode_image(pixels(jax.numpy.asarray(images), bound.config.image)))
        chosen = (vectors @ np.stack(classes).T).argmax(axis=1)
        rows.append([name, *np.bincount(chosen, minlength=2).tolist()])
    return rows


def test_folders_of_classes(run, folders, tmp_path, capsys):
    names = tmp_path / "names.yaml"
    names.write_text("house_cat: cat\ndog: hound\n")
    given = ["--run", str(run), "--images", str(folders), "--out", str(tmp_path / "out")]
    zeroshot.main([*given, "--names", str(names), "--templates", "a {}", "--templates", "one {}"])
    printed = capsys.readouterr().out
    assert "zero-shot classification of 8 images" in printed
    assert "hound" in printed
    assert "62.5%" in printed  # the most frequent
    table = list(csv.reader((tmp_path / "out/confusion.csv").open()))
    assert table == [["class", "hound", "cat"], *([str(x) for x in row] for row in by_hand(run, folders))]
    assert (tmp_path / "out" / "confusion.png").exists()
    assert "zero_shot_images_on_pets" not in (run / "summary.json").read_text()
    zeroshot.main(["--run", str(run), "--images", str(folders)])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["zero_shot_images_on_pets"] == 8
    assert "heldout_loss_on_pets" not in summary


@pytest.mark.parametrize("arguments", [["--templates", "{}"], ["--out", "OUT"]])
def test_trials_leave_the_runs_figures_alone(arguments, run, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zeroshot, "_write", lambda *_: [])  # pictures, which take most of the time
    before = (run / "summary.json").read_bytes()
    given = [str(tmp_path) if a == "OUT" else a for a in arguments]
    zeroshot.main(["--run", str(run), "--images", str(folders), "--json", *given])
    assert json.loads(capsys.readouterr().out)["zero_shot_images_on_pets"] == 8
    assert (run / "summary.json").read_bytes() == before


def test_a_summary_cut_off_is_begun_anew(tmp_path):
    cut = RunFolder(tmp_path)
    cut.summary.write_text('{"train_seconds": 1.5, "zero_sh')
    merge_summary(cut, {"zero_shot_accuracy": 0.5})
    assert cut.read_summary() == {"zero_shot_accuracy": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--names", "x"], "--names gives names to the folders of --images"),
        (["--templates", "a photo"], "neither a template"),
        (["--images", "nowhere"], "nowhere"),
        (["--images", "DATA", "--names", "nowhere"], "can't be read"),
    ],
)
def test_mistakes_are_told(run, folders, arguments, message):
    with pytest.raises(UserError, match=message):
        zeroshot.main(["--run", str(run), *(str(folders) if a == "DATA" else a for a in arguments)])


def test_names_are_of_folders_that_look_like_numbers(run, folders, tmp_path):
    for folder, name in (("house_cat", "01"), ("dog", "no"), ("dog", "3")):
        (tmp_path / name).symlink_to(folders / folder)
    names = tmp_path / "names.yaml"
    names.write_text("01: cat\nno: dog\n")
    with pytest.raises(UserError, match=r"has no name for 3$"):
        zeroshot.main(["--run", str(run), "--images", str(tmp_path), "--names", str(names)])


def test_help_needs_no_jax():
    code = (
        "import sys, clip.zeroshot as z\ntry: z.main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
