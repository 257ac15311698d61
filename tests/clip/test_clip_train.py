"""Whole runs through `clip.loop.train` and the command: what a run leaves, and what survives what."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import ROOT, TIMES, assert_same_bits, assert_same_parameters, command, numbers, saved, stop_at

import clip.data.scenes
import clip.loop
import clip.setup
from clip import zeroshot
from clip.config import Experiment
from clip.loop import train
from clip.model.model import blueprint
from clip.setup import choose_attention, set_up
from core.checkpoint import Checkpointer
from core.config import load, parse
from core.errors import UserError
from core.mesh import make_mesh
from core.metrics import read_metrics
from core.options import MeshConfig
from core.rewind import read_rewinds
from core.run import RunFolder
from core.state import targets
from export.read import import_run
from export.write import export_run
from llm.tokenizer import save, train_bpe

CONFIGS = sorted((ROOT / "configs/clip").glob("*.yaml"))
SHAPE = {"num_layers": 1, "num_heads": 2, "embed_dim": 16, "mlp_dim": 32}
HELDOUT = 96  # scenes, of each kind of pair three alone
FROZEN = {"learning_rate": 1e-30, "warmup_steps": 0, "weight_decay": 0.0}
SIGLIP = {
    "model": {"embed_dim": 16, "logit_bias": True},
    "image": {"pool": "attention"},
    "text": {"pool": "last", "causal": False},
    "train": {"steps": 3, "loss": "sigmoid", "negatives": "chunked", "chunk": 2},
}


def experiment(
    cache: Path,
    runs: Path,
    name: str = "run",
    image: dict | None = None,
    text: dict | None = None,
    **changes: dict | int,
) -> Experiment:
    """Twelve steps of a tiny model on the embedded scenes, with sections of the configuration updated."""
    data = {
        "run": {"name": name, "dir": str(runs)},
        "data": {"batch_size": 16, "crop_area": 1, "cache": str(cache)},
        "model": {
            "embed_dim": 8,
            "image": {**SHAPE, "size": 16, "patch_size": 8} | (image or {}),
            "text": {**SHAPE, "vocab_size": 300, "length": 16} | (text or {}),
        },
        "train": {"steps": 12},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "eval": {"every": 6, "images": 64},
        "checkpoint": {"every": 4},
    }
    for section, values in changes.items():
        if isinstance(values, dict):
            data.setdefault(section, {}).update(values)
        else:
            data[section] = values
    return parse(Experiment, data)


@pytest.fixture(scope="module", autouse=True)
def _few_scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip.data.scenes, "HELDOUT_SCENES", HELDOUT)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    train(experiment(cache, runs))
    return runs / "run"


def test_what_a_run_leaves(undisturbed):
    metrics = read_metrics(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 13))
    wanted = {"loss", "grad_norm", "learning_rate", "images_per_second", *TIMES[1:4]}
    assert all(wanted <= line.keys() for line in metrics)
    assert [line["step"] for line in metrics if "heldout_loss" in line] == [6, 12]
    assert metrics[-1]["images"] == 12 * 16
    summary = json.loads((undisturbed / "summary.json").read_text())
    recalls = {f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    evaluated = {"zero_shot_accuracy", "zero_shot_top5", "heldout_loss", *recalls}
    assert {name: summary[name] for name in evaluated} == {name: metrics[-1][name] for name in evaluated}
    assert summary["images_per_second"] > 0 and summary["images"] == 12 * 16 and summary["rewinds"] == 0
    shapes = [value.size for name, value in saved(undisturbed).items() if name.startswith("params")]
    assert summary["parameters"] == sum(shapes)
    for name in ("config.yaml", "tokenizer/tokenizer.json", "plots/loss.png", "checkpoints/12/manifest.json"):
        assert (undisturbed / name).stat().st_size > 0
    meta = Checkpointer(undisturbed / "checkpoints").read_meta(12)
    assert meta["format"] == 1 and meta["data"] == {"next_step": 12, "skipped": []}
    assert {"pairs_fingerprint", "tokenizer_fingerprint", "config"} <= meta.keys()


@pytest.mark.slow
def test_it_learns_to_tell_pairs_apart(cache, tmp_path):
    """Embeddings that are all alike have a loss of ln 32, to which it falls from its start in any case."""
    shape = {"embed_dim": 32, "mlp_dim": 64}
    train(
        experiment(
            cache, tmp_path, image=shape, text=shape | {"vocab_size": 352}, model={"embed_dim": 16},
            data={"batch_size": 32}, train={"steps": 200}, optimizer={"warmup_steps": 20},
            eval={"every": 0}, checkpoint={"every": 200},
        )
    )  # fmt: skip
    assert np.mean(losses(tmp_path / "run")[-20:]) < np.log(32) - 1


def test_a_signal_saves_and_resume_goes_on_bitwise(undisturbed, cache, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM), clip.loop, "put_rows")
        train(experiment(cache, tmp_path))
    run = tmp_path / "run"
    assert numbers(run)[-1]["step"] == 7 and not (run / "summary.json").exists()
    train(experiment(cache, tmp_path), resume=True)
    assert numbers(run) == numbers(undisturbed)
    assert_same_bits(saved(run), saved(undisturbed))


def test_resume_of_a_finished_run_leaves_its_figures(undisturbed, cache, tmp_path):
    """With those that `clip.zeroshot` has put there; a damaged file is made anew."""
    run = RunFolder(shutil.copytree(undisturbed, tmp_path / "run"))
    own = run.read_summary()
    run.write_summary(own | {"zero_shot_accuracy": 0.625, "zero_shot_among_heldout_accuracy": 0.75})
    before = run.summary.read_bytes()
    train(experiment(cache, tmp_path), resume=True)
    assert run.summary.read_bytes() == before
    run.summary.write_bytes(before[:40])
    train(experiment(cache, tmp_path), resume=True)
    assert run.read_summary() == own


def test_without_resume_a_run_is_not_touched(undisturbed, cache):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        train(experiment(cache, undisturbed.parent))
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_resume_with_another_seed_is_refused(undisturbed, cache):
    with pytest.raises(UserError, match=r"seed.*0.*1"):
        train(experiment(cache, undisturbed.parent, seed=1), resume=True)


def test_resume_with_a_changed_tokenizer_is_refused(undisturbed, cache, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    config = (run / "config.yaml").read_text().replace(str(undisturbed.parent), str(tmp_path))
    (run / "config.yaml").write_text(config)
    shutil.rmtree(run / "tokenizer")
    save(train_bpe(["other words, other merges"], 270), run / "tokenizer")
    with pytest.raises(
        UserError, match=rf"the tokenizer in {run}/tokenizer is not the one that checkpoint 12"
    ):
        train(experiment(cache, tmp_path), resume=True)


def write_pairs(folder: Path, captions: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(len(captions)):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{i}.png")
    rows = "".join(f"{i}.png,{caption}\n" for i, caption in enumerate(captions))
    (folder / "pairs.csv").write_text("image,caption\n" + rows)
    return folder


def test_resume_on_changed_captions_is_refused(undisturbed, cache, tmp_path):
    captions = [f"a noise that is called number {i}" for i in range(40)]
    photos = write_pairs(tmp_path / "photos", captions)
    source = {"csv": str(photos / "pairs.csv"), "images": str(photos)}
    options = {"data": {"sources": [source], "heldout_fraction": 0.4}, "train": {"steps": 1}}
    own = experiment(cache, tmp_path, tokenizer={"path": str(undisturbed / "tokenizer")}, **options)
    train(own)
    figures = json.loads((tmp_path / "run/summary.json").read_text())
    assert "heldout_loss" in figures and "zero_shot_accuracy" not in figures, "captions have no classes"
    write_pairs(photos, [caption.replace("noise", "picture") for caption in captions])
    with pytest.raises(UserError, match="the images or captions have changed since checkpoint 1 "):
        train(own, resume=True)


@pytest.mark.slow
def test_init_from_starts_with_the_other_runs_weights(undisturbed, cache, tmp_path, monkeypatch, caplog):
    """And tokenizer; what is the same in shape may differ; once it has begun, the first is needed no more."""
    first = shutil.copytree(undisturbed, tmp_path / "first")
    second = experiment(
        cache, tmp_path, init={"from": str(first)}, optimizer=FROZEN, image={"norm_epsilon": 1e-6},
        train={"steps": 2},
    )  # fmt: skip
    caplog.set_level("INFO", "core.start")
    with monkeypatch.context() as patch:
        stop_at(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM), clip.loop, "put_rows")
        train(second)
    run = tmp_path / "run"
    assert "in another model: model.image.norm_epsilon is 1e-05 there and 1e-06 here" in caplog.text
    assert_same_parameters(run, undisturbed)
    tokenizers = [folder / "tokenizer/tokenizer.json" for folder in (run, undisturbed)]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()
    shutil.rmtree(first)
    train(second, resume=True)
    assert [line["step"] for line in numbers(run)] == [1, 2]


@pytest.mark.slow
def test_init_from_what_cannot_be_is_refused(undisturbed, cache, tmp_path):
    source = {"from": str(undisturbed)}
    with pytest.raises(UserError, match=r"init\.from.*\(model\.image\.mlp_dim is 32 there and 64 here\)"):
        train(experiment(cache, tmp_path, init=source, image={"mlp_dim": 64}))
    with pytest.raises(UserError, match=r"init\.from: .*/rum holds no run .*did you mean .*/run\?"):
        train(experiment(cache, tmp_path, "other", init={"from": f"{undisturbed.parent}/rum"}))
    assert not (tmp_path / "other").exists()
    save(train_bpe(["other words, other merges"], 270), tmp_path / "tokenizer")
    own = {"path": str(tmp_path / "tokenizer")}
    with pytest.raises(UserError, match=r"tokenizer\.path: .* is not the tokenizer of the weights"):
        train(experiment(cache, tmp_path, init=source, tokenizer=own))


@pytest.mark.slow
def test_an_imported_run_trains(undisturbed, tmp_path, monkeypatch, caplog):
    export_run(RunFolder.open(undisturbed), tmp_path / "hf", "float32")
    import_run(tmp_path / "hf", tmp_path / "imported")
    assert_same_bits(
        saved_at_0(tmp_path / "imported"),
        {name: value for name, value in saved(undisturbed).items() if name.startswith("params")},
    )
    path, begin = tmp_path / "imported/config.yaml", f"init.from={tmp_path}/imported"
    imported = load(Experiment, path)
    with pytest.raises(UserError, match="--resume"):
        train(imported)
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:  # another run that begins from it
        stop_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM), clip.loop, "put_rows")
        train(load(Experiment, path, ["run.name=begun", begin]))
    assert "starting from the imported weights" not in caplog.text
    photos = write_pairs(tmp_path / "photos", [f"a noise that is called number {i}" for i in range(40)])
    own = [f"data.sources=[{{csv: {photos}/pairs.csv, images: {photos}}}]", "data.batch_size=16"]
    still = ["train.steps=1", *(f"optimizer.{key}={value}" for key, value in FROZEN.items())]
    train(load(Experiment, path, ["run.name=own", begin, *own, *still]))
    assert_same_parameters(tmp_path / "own", undisturbed)
    with monkeypatch.context() as patch:  # and itself
        stop_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM), clip.loop, "put_rows")
        train(imported, resume=True)
    assert f"starting from the imported weights in {tmp_path}/imported/checkpoints/0" in caplog.text
    assert len(numbers(tmp_path / "begun")) == 2
    assert numbers(tmp_path / "begun") == numbers(tmp_path / "imported")


def saved_at_0(run: Path) -> dict[str, np.ndarray]:
    experiment = load(Experiment, run / "config.yaml")
    shapes = blueprint(experiment.model).shapes
    with Checkpointer(run / "checkpoints") as checkpointer:
        params = checkpointer.restore_params(0, targets(shapes, jax.tree.map(one_device, shapes)))
    leaves = jax.tree.leaves_with_path(params)
    return {".".join(["params", *(str(key.key) for key in path)]): np.asarray(x) for path, x in leaves}


def one_device(_) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


GPU = ("gpu", "bfloat16")


@pytest.mark.parametrize(
    ("where", "image", "expected"),
    [
        (("cpu", "float32"), {}, "reference"),
        (("cpu", "bfloat16"), {}, "reference"),
        (("gpu", "float32"), {}, "reference"),
        (GPU, {}, "cudnn"),
        (GPU, {"pool": "attention"}, "cudnn"),
        (GPU, {"embed_dim": 24}, "reference"),  # cuDNN has no heads of 12
    ],
)
def test_automatic_choice_of_both_towers_attention(where, image, expected, tmp_path):
    config = experiment(tmp_path, tmp_path, image=image, model={"embed_dim": 16}).model
    platform, dtype = where
    assert choose_attention("auto", platform, config, dtype) == expected
    assert choose_attention("blockwise", platform, config, dtype) == "blockwise"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("pallas", r"^model\.image, .*: train\.attention is pallas, which is causal only: set it to cudnn"),
        ("ring", "is for sequences divided over devices"),
    ],
)
def test_attention_that_a_tower_cannot_have_is_refused(asked, message, tmp_path):
    with pytest.raises(UserError, match=message):
        choose_attention(asked, "gpu", experiment(tmp_path, tmp_path).model, "bfloat16")


def test_both_towers_have_the_attention_chosen(cache, tmp_path, caplog):
    caplog.set_level("INFO", "clip.setup")
    for asked, chosen in (("auto", "reference"), ("blockwise", "blockwise")):
        model = set_up(experiment(cache, tmp_path, asked, train={"attention": asked}), resume=False).model
        bound = model.bind(model.shapes)
        assert [tower.blocks.attention.backend for tower in (bound.image, bound.text)] == [chosen] * 2
        assert f"{chosen} attention" in caplog.text


@pytest.mark.slow
def test_losses_are_the_same_on_any_mesh(undisturbed, cache, tmp_path, monkeypatch):
    """On one device with all similarities at once; on eight, divided every way, in pieces and two parts."""
    options = {"negatives": "chunked", "chunk": 2, "accumulation": 2}
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    train(experiment(cache, tmp_path, "eight", train=options, mesh=mesh))
    monkeypatch.setattr(clip.setup, "make_mesh", lambda options: make_mesh(MeshConfig(), jax.devices()[:1]))
    train(experiment(cache, tmp_path, "one", train={"negatives": "dense"}))
    one, eight, data = (losses(run) for run in (tmp_path / "one", tmp_path / "eight", undisturbed))
    np.testing.assert_allclose(eight[:6], one[:6], rtol=0, atol=1e-4)
    np.testing.assert_allclose(data[:6], one[:6], rtol=0, atol=1e-4)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


@pytest.mark.slow
def test_siglip_trains_and_is_measured(cache, tmp_path, capsys):
    train(experiment(cache, tmp_path, **SIGLIP))
    run = tmp_path / "run"
    assert "zero-shot, top-1" in capsys.readouterr().out
    bias = saved(run)["params.logit_bias"]
    assert bias != -10 and abs(bias + 10) < 1, "it starts there, and is trained"
    zeroshot.main(["--run", str(run), "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["zero_shot_accuracy"] == read_metrics(run / "metrics.jsonl")[-1]["zero_shot_accuracy"]
    assert all(Path(file).stat().st_size > 0 for file in figures["files"])


@pytest.mark.slow
def test_it_goes_back_and_skips_a_batch_that_diverges(cache, tmp_path, monkeypatch):
    """Batch 5 has no words, whose loss is no number here."""
    make, gradients = clip.loop.batches, clip.loop.gradients

    def spoiled(*arguments, numbers, **options):
        numbers = tuple(numbers)
        for number, batch in zip(numbers, make(*arguments, numbers=numbers, **options), strict=True):
            yield batch._replace(tokens=np.zeros_like(batch.tokens)) if number == 5 else batch

    def burnt(model, options, params, batch, key, scale):
        grads, metrics = gradients(model, options, params, batch, key, scale)
        factor = jnp.where(jnp.all(batch.tokens == 0), jnp.nan, 1.0)
        return jax.tree.map(lambda g: g * factor, grads), metrics | {"loss": metrics["loss"] * factor}

    monkeypatch.setattr(clip.loop, "batches", spoiled)
    monkeypatch.setattr(clip.loop, "gradients", burnt)
    train(experiment(cache, tmp_path))
    run = tmp_path / "run"
    (rewind,) = read_rewinds(run / "rewinds.jsonl")
    assert rewind.restored == 4 and rewind.skipped[0] <= 5 < rewind.skipped[1]
    assert [line["step"] for line in numbers(run)] == list(range(1, 13)) and np.isfinite(losses(run)).all()
    assert json.loads((run / "summary.json").read_text())["rewinds"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"data": 3}}, r"mesh\.data=3 does not match the 8 cpu device"),
        ({"mesh": {"data": 2, "tensor": 4}}, r"model\.image\.num_heads \(2\) .* mesh\.tensor=4"),
        ({"mesh": {"data": 4, "context": 2}}, r"mesh\.context is 2"),
        ({"train": {"attention": "cudnn"}}, r"model\.image.*cudnn, which runs on NVIDIA GPUs, not on cpu"),
        ({"train": {"accumulation": 4}}, r"data\.batch_size / train\.accumulation \(4\) does not divide"),
        ({"text": {"vocab_size": 200_000}}, r"model\.text\.vocab_size \(200000\) is larger"),
    ],
)
def test_impossible_combinations_are_named(changes, message, cache, tmp_path):
    with pytest.raises(UserError, match=message):
        train(experiment(cache, tmp_path, **changes))
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"loss": "sigmoid"}}, r"train\.loss sigmoid needs model\.logit_bias"),
        ({"model": {"logit_bias": True}}, r"model\.logit_bias has no effect on train\.loss softmax"),
        ({"train": {"accumulation": 3}}, r"data\.batch_size \(16\) is not a multiple of train\.accumulation"),
        ({"image": {"patch_size": 7}}, r"size \(16\) is not a multiple of patch_size \(7\)"),
        ({"eval": {"every": -1}}, r"'eval\.every' is -1"),
        ({"seed": 2**32}, "'seed' is"),
    ],
)
def test_values_out_of_bounds_are_named(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        experiment(tmp_path, tmp_path, **changes)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_load(path):
    assert load(Experiment, path).run.name.endswith(path.stem)


def test_help_is_quick_and_imports_no_jax():
    code = "import sys, clip.train; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    help_of = [*command(Path("x"), module="clip.train")[:3], "--help"]
    done = subprocess.run(help_of, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--resume" in done.stdout


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.stpes=3", "unknown key 'train.stpes'; did you mean 'train.steps'?"),
        ("train.loss=sigmoid", "train.loss sigmoid needs model.logit_bias: true"),
        ("train.accumulation=3", "data.batch_size (256) is not a multiple of train.accumulation (3)"),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(setting, message):
    line = command(ROOT / "configs/clip/quickstart.yaml", "--set", setting, module="clip.train")
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
