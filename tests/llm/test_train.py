"""Whole runs through `llm.loop.train` and the command: what a run leaves, and what survives what."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from runs import (
    ROOT,
    TIMES,
    assert_same_parameters,
    clean_environment,
    command,
    numbers,
    stop_at,
)
from tiny import copy_corpus, experiment

import core.loss_scale
import llm.eval.heldout
import llm.generate
import llm.loop
import llm.prepare
import llm.report
from core.checkpoint import Checkpointer
from core.config import parse, to_dict, to_yaml
from core.errors import UserError
from core.metrics import read_metrics
from core.run import RunFolder
from llm.config import Experiment
from llm.data.corpus import open_corpus
from llm.loop import train
from llm.prepare import Text, prepare
from llm.tokenizer import Tokenizer, save, train_bpe

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    train(experiment(corpus, runs))
    return runs / "run"


def test_what_a_run_leaves(undisturbed):
    metrics = read_metrics(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 13))
    assert all({"loss", "grad_norm", "learning_rate", *TIMES[:4]} <= line.keys() for line in metrics)
    assert "mfu" not in metrics[0]  # no peak is known for this CPU
    assert [line["step"] for line in metrics if "heldout_loss" in line] == [6, 12]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["tokens"] == 12 * 8 * 16
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["heldout_bits_per_byte"] == metrics[-1]["heldout_bits_per_byte"]
    assert len(summary["corpus_fingerprint"]) == 16
    stalls = [line["checkpoint_seconds"] for line in metrics if line["step"] in (5, 9)]
    assert all(stalls) and sum(line["checkpoint_seconds"] for line in metrics) == pytest.approx(sum(stalls))
    assert summary["checkpoint_stall_seconds"] == pytest.approx(sum(stalls) / 2)
    for name in ("config.yaml", "tokenizer/tokenizer.json", "plots/loss.png", "checkpoints/12/manifest.json"):
        assert (undisturbed / name).exists()
    meta = Checkpointer(undisturbed / "checkpoints").read_meta(12)
    assert meta["format"] == 1 and meta["data"] == {"next_step": 12, "skipped": []}


@pytest.mark.parametrize("most", [None, 600])
def test_model_and_baselines_are_measured_on_the_same_tokens(most, corpus, tmp_path, monkeypatch):
    """All held-out documents, or of a large split a part; the model's figures are written before."""
    seen = {}
    baselines = llm.report.baselines

    def watch(heldout, train_counts, counts):
        seen.update(json.loads((tmp_path / "run/summary.json").read_text()), bytes=heldout, counts=counts)
        return baselines(heldout, train_counts, counts)

    monkeypatch.setattr(llm.report, "baselines", watch)
    if most:
        monkeypatch.setattr(llm.eval.heldout, "FINAL_TOKENS", most)
    train(experiment(corpus, tmp_path, train={"steps": 1}))
    assert "unigram_bits_per_byte" in json.loads((tmp_path / "run/summary.json").read_text())
    nats = seen["heldout_loss"] * seen["counts"].sum()
    assert seen["heldout_bits_per_byte"] == pytest.approx(nats / np.log(2) / len(seen["bytes"]), rel=1e-6)

    documents = [d.text for d in open_corpus([f"{corpus}/*.py"]).documents("heldout")]
    tokenizer = Tokenizer.load(tmp_path / "run/tokenizer")
    if most:
        assert 600 - 8 * 16 < seen["counts"].sum() <= 600
    else:
        assert seen["bytes"] == "".join(documents).encode()
        assert seen["counts"].sum() == sum(len(tokenizer.encode(text)) + 1 for text in documents)  # + EOS
    assert seen["counts"][tokenizer.bos_id] == 0, "it is given, not predicted"


def test_evaluation_takes_no_more_at_a_time_than_a_microbatch(corpus, tmp_path, monkeypatch):
    rows = []
    put = llm.eval.heldout.put_batch
    monkeypatch.setattr(
        llm.eval.heldout, "put_batch", lambda batch, mesh: rows.append(len(batch.tokens)) or put(batch, mesh)
    )
    data, options = {"batch_size": 32}, {"steps": 2, "accumulation": 4}
    train(experiment(corpus, tmp_path, data=data, train=options, eval={"every": 1, "batches": 2}))
    assert set(rows) == {8} and len(rows) > 4


def close_under_fire(checkpointer: Checkpointer, close=Checkpointer.close) -> None:
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGTERM)
    close(checkpointer)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_resume_goes_on_bitwise(number, undisturbed, corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 7, lambda: os.kill(os.getpid(), number))
        patch.setattr(Checkpointer, "close", close_under_fire)
        train(experiment(corpus, tmp_path))
    run = tmp_path / "run"
    assert numbers(run)[-1]["step"] == 7 and not (run / "summary.json").exists()
    train(experiment(corpus, tmp_path), resume=True)
    assert numbers(run) == numbers(undisturbed)
    assert_same_parameters(run, undisturbed)


def test_a_crash_loses_only_what_came_after_the_last_checkpoint(undisturbed, corpus, tmp_path, monkeypatch):
    def crash():
        raise RuntimeError("power failure")

    with monkeypatch.context() as patch:
        stop_at(patch, 7, crash)
        with pytest.raises(RuntimeError, match="power failure"):
            train(experiment(corpus, tmp_path))
    train(experiment(corpus, tmp_path), resume=True)
    assert numbers(tmp_path / "run") == numbers(undisturbed)
    assert_same_parameters(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_float16_with_an_average_is_resumed_bitwise(corpus, tmp_path, monkeypatch):
    """The first steps overflow; the checkpoint's model is the average, and training goes on from the rest."""
    monkeypatch.setattr(core.loss_scale, "INITIAL", 2.0**28)
    options = {"steps": 12, "dtype": "float16", "average": 0.5}
    train(experiment(corpus, tmp_path, "whole", train=options))
    with monkeypatch.context() as patch:
        stop_at(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(experiment(corpus, tmp_path, train=options))
    train(experiment(corpus, tmp_path, train=options), resume=True)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert str(numbers(run)) == str(numbers(whole))  # as text, where NaN equals NaN
    assert_same_parameters(run, whole)
    scales = [line["loss_scale"] for line in read_metrics(whole / "metrics.jsonl")]
    assert scales[0] == 2.0**28 > scales[-1], "each overflow halved it"
    assert not (whole / "rewinds.jsonl").exists() and numbers(whole)[-1]["loss"] < numbers(whole)[0]["loss"]

    frozen = {"learning_rate": 1e-30, "warmup_steps": 0, "weight_decay": 0.0}
    train(
        experiment(corpus, tmp_path, "next", init={"from": str(whole)}, optimizer=frozen, train={"steps": 1})
    )
    assert_same_parameters(tmp_path / "next", whole)


def test_without_resume_a_run_is_not_touched(undisturbed, corpus):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        train(experiment(corpus, undisturbed.parent))
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_resume_with_another_configuration_is_refused(undisturbed, corpus):
    with pytest.raises(UserError, match=r"optimizer\.learning_rate.*0\.01.*0\.02"):
        train(experiment(corpus, undisturbed.parent, optimizer={"learning_rate": 0.02}), resume=True)


def test_resume_on_a_changed_corpus_is_refused(undisturbed, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")  # new times of modification
    shutil.copytree(undisturbed, tmp_path / "run")
    config = (tmp_path / "run/config.yaml").read_text().replace(str(corpus), str(tmp_path / "corpus"))
    (tmp_path / "run/config.yaml").write_text(config)
    changed = experiment(corpus, tmp_path, data={"sources": [f"{tmp_path}/corpus/*.py"]})
    (tmp_path / "corpus/headers.py").write_text("nothing = 'as it was before'\n" * 100)
    before = [(tmp_path / "run/tokenizer" / name).read_bytes() for name in TOKENIZER_FILES]
    with pytest.raises(UserError, match="corpus has changed since checkpoint 12"):
        train(changed, resume=True)
    assert [(tmp_path / "run/tokenizer" / name).read_bytes() for name in TOKENIZER_FILES] == before


def test_resume_with_a_changed_tokenizer_is_refused(undisturbed, corpus, tmp_path):
    shutil.copytree(undisturbed / "tokenizer", tmp_path / "tokenizer")
    own = experiment(corpus, tmp_path, tokenizer={"path": f"{tmp_path}/tokenizer"}, train={"steps": 1})
    train(own)
    before = [(tmp_path / "run/tokenizer" / name).read_bytes() for name in TOKENIZER_FILES]
    assert before == [(undisturbed / "tokenizer" / name).read_bytes() for name in TOKENIZER_FILES]
    shutil.rmtree(tmp_path / "tokenizer")
    save(train_bpe(["other words, other merges"], 270), tmp_path / "tokenizer")
    with pytest.raises(UserError, match=rf"the tokenizer in {tmp_path}/tokenizer is not the one that .*1"):
        train(own, resume=True)
    assert [(tmp_path / "run/tokenizer" / name).read_bytes() for name in TOKENIZER_FILES] == before


def test_a_disk_that_is_full_from_the_start(undisturbed, corpus, small_disk, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(experiment(corpus, small_disk)))
    (small_disk / "ballast").write_bytes(bytes((6 << 20) - 5 * 4096))  # no room for `tokenizer.json`
    done = subprocess.run(
        command(config), capture_output=True, text=True, cwd=ROOT, env=clean_environment(tmp_path)
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.endswith(
        f"error: the disk is full while writing {small_disk}/run/tokenizer/tokenizer.json: "
        "free some space and run the same command with --resume\n"
    )
    assert [path.name for path in (small_disk / "run/tokenizer").iterdir()] == ["tokenizer_config.json"]


def test_a_disk_that_fills_up_loses_no_checkpoint(undisturbed, corpus, small_disk, monkeypatch):
    ballast = small_disk / "ballast"

    def fill():
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    with monkeypatch.context() as patch:
        stop_at(patch, 7, fill)
        with pytest.raises(UserError, match=r"checkpoint 8 .*disk is full; checkpoint 4 .* with --resume"):
            train(experiment(corpus, small_disk))
    ballast.unlink()
    train(experiment(corpus, small_disk), resume=True)
    assert numbers(small_disk / "run") == numbers(undisturbed)


def test_a_damaged_checkpoint_is_passed_over(undisturbed, corpus, tmp_path, caplog):
    shutil.copytree(undisturbed, tmp_path / "run")
    victim = max((tmp_path / "run/checkpoints/12/params").rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    train(experiment(corpus, tmp_path), resume=True)
    assert "checkpoint 12 is damaged" in caplog.text and victim.name in caplog.text
    assert numbers(tmp_path / "run") == numbers(undisturbed)


def test_two_that_begin_together_share_a_fresh_cache(corpus, tmp_path, monkeypatch):
    both = experiment(corpus, tmp_path, data={"cache": str(tmp_path / "cache")})

    def overtaken(*arguments, **options):
        monkeypatch.setattr(llm.prepare, "train_bpe", train_bpe)
        texts.append(prepare(both))
        return train_bpe(*arguments, **options)

    texts: list[Text] = []
    monkeypatch.setattr(llm.prepare, "train_bpe", overtaken)
    texts.append(prepare(both))
    assert texts[0].identity == texts[1].identity
    assert [path.name for path in (tmp_path / "cache/tokenizers").iterdir()] == [texts[0].tokenizer.path.name]


def test_init_from_starts_with_the_other_runs_weights(undisturbed, corpus, tmp_path):
    frozen = {"learning_rate": 1e-30, "warmup_steps": 0, "weight_decay": 0.0}
    train(experiment(corpus, tmp_path, init={"from": str(undisturbed)}, optimizer=frozen, train={"steps": 1}))
    assert_same_parameters(tmp_path / "run", undisturbed)
    assert numbers(tmp_path / "run")[-1]["heldout_loss"] == numbers(undisturbed)[-1]["heldout_loss"]


def test_a_second_stage_goes_on_without_the_first(undisturbed, corpus, tmp_path, monkeypatch, caplog):
    first = shutil.copytree(undisturbed, tmp_path / "first")
    caplog.set_level(logging.INFO, "core.start")
    second = experiment(
        corpus, tmp_path, init={"from": str(first)}, model={"rope_theta": 5e5}, train={"steps": 3}
    )
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(second)
    assert "in another model: model.rope_theta is 10000.0 there and 500000.0 here" in caplog.text
    shutil.rmtree(first)
    train(second, resume=True)
    assert [line["step"] for line in numbers(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_a_finished_run_resumed_shows_its_samples(corpus, tmp_path, capsys):
    done = experiment(
        corpus, tmp_path, eval={"prompts": ["def f(x):"], "sample_tokens": 4}, train={"steps": 1}
    )
    train(done)
    samples, printed = (tmp_path / "run/samples.md").read_text(), capsys.readouterr().out
    train(done, resume=True)
    assert (tmp_path / "run/samples.md").read_text() == samples
    again = capsys.readouterr().out
    assert again == printed and "def f(x):" in again


def test_init_from_another_shape_is_refused(undisturbed, corpus, tmp_path):
    with pytest.raises(UserError, match=r"init\.from.*\(model\.mlp_dim is 32 there and 64 here\)"):
        train(experiment(corpus, tmp_path, init={"from": str(undisturbed)}, model={"mlp_dim": 64}))


def test_init_from_a_misspelt_run_names_the_nearest(undisturbed, corpus, tmp_path):
    misspelt = f"{undisturbed.parent}/rum"
    with pytest.raises(UserError, match=r"/rum holds no run .*did you mean .*/run\?"):
        train(experiment(corpus, tmp_path, init={"from": misspelt}))


def test_a_mistake_in_the_data_leaves_no_run_behind(corpus, tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        train(experiment(corpus, tmp_path, data={"sources": [f"{corpus}/*.text"]}))
    train(experiment(corpus, tmp_path, train={"steps": 1}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"data": 3}}, r"mesh\.data=3 does not match the 8 cpu device"),
        (
            {"mesh": {"data": 4, "tensor": 2}},
            r"model\.num_kv_heads \(1\) does not divide over mesh\.tensor=2",
        ),
        ({"data": {"batch_size": 4}}, r"data\.batch_size / train\.accumulation \(4\) does not divide"),
        ({"tokenizer": {"vocab_size": 280}, "model": {"vocab_size": 288}}, None),
        (
            {
                "data": {"isolate": False},
                "model": {"sparsity": {"block_size": 2, "local_blocks": 2, "global_blocks": 1}},
            },
            None,
        ),
        (
            {"model": {"vocab_size": 200_000}},
            r"model\.vocab_size \(200000\) is larger than this corpus",
        ),
        (
            {"train": {"attention": "cudnn"}},
            r"train\.attention is cudnn, which runs on NVIDIA GPUs, not on cpu",
        ),
        ({"eval": {"prompts": ["x", "x" * 99]}}, r"eval\.prompts: 'xxx.* tokens, .* leaves room for 31"),
    ],
)
def test_impossible_combinations_are_named(changes, message, corpus, tmp_path):
    if message is None:  # this can be: fewer tokens than the model has rows; sparse, documents not apart
        train(experiment(corpus, tmp_path, train={"steps": 1}, **changes))
        return
    with pytest.raises(UserError, match=message):
        train(experiment(corpus, tmp_path, **changes))
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": {"every": -5}}, r"'eval\.every' is -5: .* greater than or equal to 0"),
        ({"eval": {"batches": 0}}, r"'eval\.batches' is 0"),
        ({"eval": {"sample_tokens": 0}}, r"'eval\.sample_tokens' is 0"),
        ({"train": {"z_loss": math.inf}}, r"'train\.z_loss' is inf"),
        ({"data": {"sources": []}}, r"'data\.sources' is \[\]: .* at least 1 item"),
        ({"data": {"heldout": []}}, r"'data\.heldout' is \[\]"),
        (
            {"model": {"window": 4, "sparsity": {"block_size": 2, "local_blocks": 1, "global_blocks": 1}}},
            r"model\.window and model\.sparsity are both set",
        ),
    ],
)
def test_values_out_of_bounds_are_named(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        experiment(tmp_path, tmp_path, **changes)


def test_seeds_that_jax_would_cut_are_refused(tmp_path):
    data = to_dict(experiment(tmp_path, tmp_path))
    for seed in (10**22, 2**32, -1):
        with pytest.raises(UserError, match="'seed' is"):
            parse(Experiment, data | {"seed": seed})


def test_samples_and_a_profile(corpus, tmp_path, monkeypatch, capsys):
    dtypes = []

    def sample_texts(*arguments, **options):
        dtypes.append(options["dtype"])
        return llm.generate.sample_texts(*arguments, **options)

    monkeypatch.setattr(llm.loop, "sample_texts", sample_texts)
    prompts = ["def f(x):\n## step 1", "````\nclass"]
    train(
        experiment(
            corpus,
            tmp_path,
            train={"steps": 2, "dtype": "bfloat16"},
            eval={"every": 1, "prompts": prompts, "sample_tokens": 4},
        ),
        profile=2,
    )
    assert dtypes == ["bfloat16", "bfloat16"]
    samples, printed = (tmp_path / "run/samples.md").read_text(), capsys.readouterr().out
    assert re.findall(r"^## .*", samples, re.MULTILINE) == ["## step 1", "## step 2"]
    for prompt in prompts:
        assert samples.count(textwrap.indent(prompt, "    ")) == 2 and printed.count(prompt) == 1
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))  # though only one step was left to trace


def test_samples_of_the_same_step_or_later_are_replaced(tmp_path):
    run = RunFolder(tmp_path)
    for step, text in [(1, "one"), (2, "two\n## step 9\r## step 9"), (3, "three"), (3, "````"), (4, "")]:
        llm.report.append_samples(run, step, [text, "more"])
    llm.report.append_samples(run, 4, ["four"])
    assert run.samples.read_bytes().decode() == (
        "## step 1\n\n    one\n\n---\n\n    more\n\n"
        "## step 2\n\n    two\n    ## step 9\r    ## step 9\n\n---\n\n    more\n\n"
        "## step 3\n\n    ````\n\n---\n\n    more\n\n"
        "## step 4\n\n    four\n\n"
    )


def test_a_profile_of_no_step_to_do_is_refused(undisturbed, corpus, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    with pytest.raises(UserError, match="--profile 12: the steps to do are those after 12 up to 12"):
        train(experiment(corpus, tmp_path), resume=True, profile=12)


def test_help_is_quick_and_imports_no_jax():
    code = "import sys, llm.train; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    done = subprocess.run([*command(Path("x"))[:3], "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--resume" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.stpes=3"], "unknown key 'train.stpes'; did you mean 'train.steps'?"),
        (["--set", "train.steps=many"], "'train.steps' is 'many'"),
        (["--set", "model.num_heads=3", "--set", "model.num_kv_heads=2"], "not a multiple of"),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(arguments, message):
    config = ROOT / "configs/llm/quickstart.yaml"
    done = subprocess.run(command(config, *arguments), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
