"""Tokenizer and shards before training: from every source, by several processes, with every split filled."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data_hubs import prepare_tfds
from tiny import copy_corpus, experiment

import llm.prepare
from core.config import to_yaml
from core.errors import UserError
from core.metrics import read_metrics
from core.options import TokenizerConfig
from llm.config import Experiment
from llm.data.corpus import open_corpus
from llm.data.shards import build_shards
from llm.loop import train
from llm.prepare import _sample, _share, prepare, token_bytes
from llm.tokenizer import Tokenizer, save, train_bpe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def paragraphs(corpus) -> list[str]:
    return [part for path in sorted(corpus.glob("*.py")) for part in path.read_text().split("\n\n") if part]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, corpus, paragraphs) -> dict[str, str | dict[str, str]]:
    """The same text as each kind of source."""
    folder = tmp_path_factory.mktemp("kinds")
    lines = "".join(json.dumps({"body": text}) + "\n" for text in paragraphs)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.jsonl.zst").write_bytes(pa.compress(lines.encode(), codec="zstd", asbytes=True))
    (folder / "hub").mkdir()
    for i in range(5):
        table = pa.table({"body": paragraphs[i::5]})
        pq.write_table(table, folder / f"hub/train-{i:05d}-of-00005.parquet")
    prepare_tfds(folder / "tfds", "array_record", paragraphs)
    return {
        "text": f"{corpus}/*.py",
        "jsonl": {"path": f"{folder}/a.jsonl", "field": "body"},
        "zst": {"path": f"{folder}/*.zst", "field": "body"},
        "parquet": {"path": f"{folder}/hub/*.parquet", "field": "body"},
        "huggingface": {"huggingface": f"{folder}/hub", "field": "body"},
        "tfds": {"tfds": "toy", "dir": f"{folder}/tfds", "field": "body"},
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def of(corpus: Path, folder: Path, sources: list, **changes) -> Experiment:
    data = {"sources": sources, "cache": str(folder / "cache"), **changes}
    return experiment(
        corpus, folder, data=data, train={"steps": 2}, eval={"every": 0}, checkpoint={"every": 2}
    )


SLOWLY = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("zst", "parquet", "huggingface")]


@pytest.mark.parametrize("kind", ["jsonl", *SLOWLY, "tfds"])
def test_every_source_trains_a_model(corpus, kinds, paragraphs, tmp_path, kind):
    setup = of(corpus, tmp_path, [kinds[kind]])
    train(setup)
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2]
    text = prepare(setup)
    both = [d.text for split in ("train", "heldout") for d in text.corpus.documents(split)]
    assert sorted(both) == sorted(paragraphs)
    assert text.train.num_bytes + text.heldout.num_bytes == sum(len(t.encode()) for t in paragraphs)
    ids = sum(len(text.tokenizer.encode(t)) + 2 for t in paragraphs)
    assert text.train.num_tokens + text.heldout.num_tokens == ids


def test_a_source_has_shards_of_its_own_whatever_else_is_read(corpus, kinds, tmp_path):
    two = prepare(of(corpus, tmp_path, [kinds["text"], kinds["huggingface"]]))
    folders = set((tmp_path / "cache/shards").iterdir())
    assert len(folders) == 2
    weights = [{"path": kinds["text"], "weight": 0.3}, {**kinds["huggingface"], "weight": 0.7}]
    for first, second in (weights, [{**entry, "weight": 0.5} for entry in weights]):
        weighted = open_corpus(of(corpus, tmp_path, [first, second]).data.sources)
        assert set(build_shards(weighted, two.tokenizer, tmp_path / "cache/shards")) == folders
        assert weighted.fingerprint == two.corpus.fingerprint


def test_a_weighted_mixture_trains_a_model(corpus, kinds, tmp_path):
    sources = [{"path": kinds["text"], "weight": 0.25}, {**kinds["huggingface"], "weight": 0.75}]
    setup = of(corpus, tmp_path, sources)
    train(setup)
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2]
    text = prepare(setup)
    windows = text.train.windows(np.arange(400), seed=0)
    of_first = sum(window.dataset is text.train.datasets[0] for window in windows)
    assert of_first == 100
    assert text.heldout.num_bytes == sum(len(d.text.encode()) for d in text.corpus.documents("heldout"))


def test_a_selection_applies_to_training_without_new_shards(corpus, kinds, tmp_path):
    whole = prepare(of(corpus, tmp_path, [kinds["jsonl"]]))
    made = contents(tmp_path / "cache")
    dropped, *others = whole.corpus.documents("train")
    selection = tmp_path / "selection.jsonl"
    lines = [{"document": dropped.name, "weight": 0}, {"document": others[0].name, "weight": 2.5}]
    selection.write_text("".join(json.dumps(line) + "\n" for line in lines))
    setup = of(corpus, tmp_path, [kinds["jsonl"]], selection=str(selection))
    train(setup)
    kept = prepare(setup)
    assert contents(tmp_path / "cache") == made
    assert kept.train.num_tokens == whole.train.num_tokens - len(whole.tokenizer.encode(dropped.text)) - 2
    assert kept.heldout.num_tokens == whole.heldout.num_tokens
    selection.write_text(json.dumps({"document": dropped.name, "weight": 3}) + "\n")
    with pytest.raises(UserError, match=r"data\.selection has changed since checkpoint 2"):
        train(setup, resume=True)


def command(config: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "llm.prepare", "--config", str(config), *arguments],
        env={**os.environ, **environment}, cwd=ROOT, text=True, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_tasks_of_an_array_make_what_one_makes(corpus, kinds, tmp_path):
    sources = [kinds[kind] for kind in ("huggingface", "text", "zst", "parquet", "tfds")]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.yaml").write_text(to_yaml(of(corpus, tmp_path / name, sources)))
    prepare(of(corpus, tmp_path / "one", sources))

    slurm = {"SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "3"}
    alone = command(tmp_path / "two.yaml", SLURM_ARRAY_TASK_ID="6", **slurm)
    assert "3 of 9 shards are finished; the others are other tasks'" in alone.communicate()[1]
    built = {p.relative_to(tmp_path / "two") for p in (tmp_path / "two/cache/shards").glob("*/0*")}
    assert len(built) == 3 and len(list((tmp_path / "two").rglob("index.json"))) < 5
    both = [command(tmp_path / "two.yaml", SLURM_ARRAY_TASK_ID=task, **slurm) for task in ("4", "5")]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert any("9 of 9 shards are finished, in" in " ".join(text.split()) for text in said)
    assert contents(tmp_path / "two/cache") == contents(tmp_path / "one/cache")


def test_the_task_is_that_of_the_command_line_or_of_slurm():
    slurm = {
        f"SLURM_ARRAY_TASK_{k}": v for k, v in (("ID", "14"), ("MIN", "10"), ("STEP", "2"), ("COUNT", "4"))
    }
    assert _share(None, None, slurm) == (2, 4)
    assert _share(3, 8, slurm) == (3, 8) and _share(None, None, {}) == (0, 1)
    for wrong in (
        (8, 8, {}),
        (-1, 2, {}),
        (1, None, {}),
        (None, None, slurm | {"SLURM_ARRAY_TASK_COUNT": "2"}),
    ):
        with pytest.raises(UserError, match="tasks are numbered from 0"):
            _share(*wrong)


def test_help_and_mistakes_import_no_jax(corpus, tmp_path):
    code = "import sys, llm.prepare; assert 'jax' not in sys.modules and 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    (tmp_path / "a.yaml").write_text(to_yaml(of(corpus, tmp_path, [f"{corpus}/*.text"])))
    process = command(tmp_path / "a.yaml")
    said = process.communicate()[1]
    assert process.returncode == 2 and "data.sources.0: no file matches" in said and "Traceback" not in said


def test_a_split_without_documents_is_named(corpus, kinds, tmp_path):
    with pytest.raises(UserError, match=r"no document is held out: raise data\.heldout_fraction \(1e-09\)"):
        prepare(of(corpus, tmp_path, [kinds["jsonl"]], heldout_fraction=1e-9))
    own = {"path": str(next(tmp_path.glob("cache/tokenizers/*")))}  # for one can't be trained on nothing
    most = of(corpus, tmp_path, [kinds["jsonl"]], heldout_fraction=1 - 1e-9)
    most = dataclasses.replace(most, tokenizer=TokenizerConfig(**own))
    with pytest.raises(UserError, match=r"no document of 'data\.sources' is left to train on: lower"):
        prepare(most)


def test_broken_records_are_summed_up_once(corpus, paragraphs, tmp_path, caplog):
    lines = [json.dumps({"text": text}) for text in paragraphs]
    lines[7] = lines[9] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(of(corpus, tmp_path, [f"{tmp_path}/a.jsonl"], broken_fraction=0.02))
    (warning,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert warning == (
        f"{tmp_path}/a.jsonl: 2 of {len(lines):,} records are broken, the first in {tmp_path}/a.jsonl, "
        "line 8: not JSON: Expecting value: line 2 column 1 (char 10); they are left out"
    )


def test_a_tokenizer_reads_no_more_than_it_must(corpus, kinds, monkeypatch):
    small = open_corpus([kinds["text"]])
    assert list(_sample(small)) == [d.text for d in small.documents("train")]
    large = open_corpus([kinds["text"]], shard_bytes=10_000)
    monkeypatch.setattr(llm.prepare, "TOKENIZER_BYTES", 20_000)
    monkeypatch.setattr(llm.prepare, "_TOKENIZER_SHARDS", 4)
    names = {d.text: d.name for d in large.documents("train")}
    sample = list(_sample(large))
    assert len({names[text] for text in sample}) == len(sample) > 2
    longest = max(len(text.encode()) for text in sample)
    assert 5000 < sum(len(text.encode()) for text in sample) < 20_000 + 4 * longest


def test_a_tokenizer_is_trained_on_as_much_of_compressed_files(tmp_path, monkeypatch):
    """All of a compressed file is in the first of the shards that it spans; the others are empty."""
    rng = np.random.default_rng(0)
    for name in "ab":
        texts = [rng.bytes(200).hex() for _ in range(100)]
        (tmp_path / f"{name}.jsonl.gz").write_bytes(
            gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
        )
    corpus = open_corpus([f"{tmp_path}/*.jsonl.gz"], shard_bytes=2000)
    assert len(corpus.shards) > 20
    monkeypatch.setattr(llm.prepare, "TOKENIZER_BYTES", 20_000)
    monkeypatch.setattr(llm.prepare, "_TOKENIZER_SHARDS", 3)
    sizes = [len(text) for text in _sample(corpus)]
    assert 20_000 <= sum(sizes) <= 20_000 + 3 * 400


def test_an_end_of_text_costs_no_bytes_whatever_it_is_called(corpus, tmp_path):
    save(train_bpe(["some words, some merges"], 270), tmp_path / "tokenizer")
    file = tmp_path / "tokenizer/tokenizer.json"
    described = json.loads(file.read_text())
    for token in described["added_tokens"]:
        token["special"] = False
    file.write_text(json.dumps(described))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    assert not tokenizer.special_ids
    lengths = token_bytes(tokenizer, 300)
    assert not lengths[:, [tokenizer.bos_id, tokenizer.eos_id]].any()
    assert lengths[0, tokenizer.encode("w")] == 1
