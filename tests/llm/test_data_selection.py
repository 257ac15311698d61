"""Selection files: the batches of a corpus without the dropped documents, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import same_batch

from core.errors import UserError
from llm.data.corpus import open_corpus
from llm.data.loader import Mixture, heldout_batches, open_dataset, train_batch
from llm.data.selection import read_selection, selection_fingerprint
from llm.data.shards import build_shards
from llm.tokenizer import Tokenizer, save, train_bpe

SHARD_BYTES = 3000


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    words = ["alpha", "beta", "naïve", "日本語", "🦊", "\n", "x = y + 1\n"]
    for i in range(80):
        (folder / f"{i:02}é.txt").write_text(" ".join(generator.choice(words, generator.integers(5, 90))))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, text) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save(train_bpe((path.read_text() for path in sorted(text.iterdir())), 300), folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def build(tmp_path_factory, tokenizer):
    def build(text: Path, heldout_fraction: float = 0.2) -> Path:
        source, folder = f"{text}/*.txt", tmp_path_factory.mktemp("shards")
        corpus = open_corpus([source], heldout_fraction=heldout_fraction, shard_bytes=SHARD_BYTES)
        (shards,) = build_shards(corpus, tokenizer, folder)
        return shards

    return build


@pytest.fixture(scope="module")
def shards(build, text) -> Path:
    return build(text)


def names(shards: Path, split: str = "train") -> list[str]:
    paths = sorted(shards.glob(f"*/{split}/names.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def write(path: Path, weights: dict[str, float]) -> Path:
    lines = [json.dumps({"document": name, "weight": weight}) + "\n" for name, weight in weights.items()]
    path.write_text("".join(lines))
    return path


def test_dropped_documents_might_as_well_not_be_in_the_corpus(tmp_path, text, shards, build):
    train = names(shards)
    dropped = {*train[:3], *train[5::4], *train[20:45], train[-1]}
    rest = tmp_path / "rest"
    rest.mkdir()
    for path in text.iterdir():
        if path.name not in dropped:
            shutil.copy(path, rest)
    file = write(tmp_path / "selection.jsonl", dict.fromkeys(dropped, 0))
    selected = open_dataset([shards], "train", 16, read_selection(file, [shards]))
    without = open_dataset([build(rest)], "train", 16)
    assert len(list(shards.glob("[0-9]*"))) > 5 and names(shards, "heldout")
    assert (selected.num_tokens, selected.num_bytes) == (without.num_tokens, without.num_bytes)
    assert selected.first_document[-1] == without.first_document[-1] == len(train) - len(dropped)
    for step in (0, 1, 2, 3, 50, 1000):
        assert same_batch(train_batch(selected, step, 8, 3), train_batch(without, step, 8, 3))


def test_weights_multiply_those_of_the_shards(tmp_path, shards):
    train = names(shards)
    plain = open_dataset([shards], "train", 16)
    file = write(tmp_path / "selection.jsonl", {train[0]: 2.5, train[7]: 0.25, train[8]: 1})
    weighted = open_dataset([shards], "train", 16, read_selection(file, [shards]))
    factors = np.ones(len(train), np.float32)
    factors[[0, 7]] = 2.5, 0.25
    lengths = np.concatenate([np.diff(np.load(p)) for p in sorted(shards.glob("*/train/starts.npy"))])
    by_token = np.repeat(factors, lengths)
    for number, (batch, other) in enumerate(
        zip(heldout_batches(weighted, 1), heldout_batches(plain, 1), strict=True)
    ):
        targets = by_token[number * 16 + 1 : number * 16 + 17]
        targets = np.pad(targets, (0, 16 - len(targets)))
        assert np.array_equal(batch.weights[0], other.weights[0] * targets)
        assert same_batch(batch._replace(weights=other.weights), other)


def test_held_out_text_stays_whole(tmp_path, shards, caplog):
    heldout = names(shards, "heldout")
    file = write(tmp_path / "selection.jsonl", {names(shards)[0]: 0, heldout[0]: 0, heldout[1]: 3})
    with caplog.at_level(logging.INFO):
        selection = read_selection(file, [shards])
    assert f"{file}: 2 of its documents are held out and stay so" in caplog.text
    whole = heldout_batches(open_dataset([shards], "heldout", 16), 4)
    for a, b in zip(heldout_batches(open_dataset([shards], "heldout", 16, selection), 4), whole, strict=True):
        assert same_batch(a, b)


@pytest.fixture(scope="module")
def two(tmp_path_factory, text, build) -> tuple[list[Path], list[str], str]:
    """Shards of two sources that share the names of all documents, these names, and the second source."""
    other = tmp_path_factory.mktemp("other")
    for path in text.iterdir():
        (other / path.name).write_text(f"Another text of this name, {path.name}.")
    (other / "alone.txt").write_text("A document that has its name for itself.")
    folders = [build(text), build(other, 0.001)]
    both = sorted(set(names(folders[0])) & set(names(folders[1])))
    assert "alone.txt" in names(folders[1])
    return folders, both, f"{other}/*.txt"


def test_a_source_tells_documents_of_one_name_apart(tmp_path, two):
    folders, both, source = two
    file = tmp_path / "selection.jsonl"
    with pytest.raises(UserError, match=r"which is in two sources, .*: add the one that is meant"):
        read_selection(write(file, {both[0]: 0}), folders)
    file.write_text(json.dumps({"document": both[0], "weight": 0, "source": source}))
    datasets = tuple(open_dataset([f], "train", 16, read_selection(file, folders)) for f in folders)
    plain = [open_dataset([f], "train", 16) for f in folders]
    lost = [a.first_document[-1] - b.first_document[-1] for a, b in zip(plain, datasets, strict=True)]
    assert lost == [0, 1]
    assert Mixture(datasets, (0.5, 0.5)).num_tokens < sum(dataset.num_tokens for dataset in plain)


def test_a_mixture_may_select_in_one_of_its_sources(tmp_path, two):
    folders, _, _ = two
    selection = read_selection(write(tmp_path / "selection.jsonl", {"alone.txt": 4}), folders)
    assert all(np.all(factors == 1) for factors in selection[folders[0]])
    assert max(factors.max() for factors in selection[folders[1]]) == 4


def test_parquet_is_the_same(tmp_path, shards, two):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    train = names(shards)[:3]
    table = pyarrow.table({"document": train, "weight": np.float32([0, 0.5, 2]), "more": [7, 8, 9]})
    parquet.write_table(table, tmp_path / "selection.parquet")
    lines = write(tmp_path / "selection.jsonl", dict(zip(train, [0, 0.5, 2], strict=True)))
    fingerprints = {
        selection_fingerprint(read_selection(path, [shards]))
        for path in (lines, tmp_path / "selection.parquet")
    }
    assert len(fingerprints) == 1
    folders, both, source = two
    table = pyarrow.table({"document": both[:1], "weight": [0], "source": [source]})
    parquet.write_table(table, tmp_path / "selection.parquet")
    selection = read_selection(tmp_path / "selection.parquet", folders)
    assert sum((factors == 0).sum() for factors in selection[folders[1]]) == 1
    table = pyarrow.table({"document": ["a", "b"], "weight": [1.0, None]})
    parquet.write_table(table, tmp_path / "selection.parquet")
    with pytest.raises(UserError, match=r"selection.parquet:2 has no name"):
        read_selection(tmp_path / "selection.parquet", [shards])
    (tmp_path / "selection.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"selection.parquet is damaged, or no Parquet file"):
        read_selection(tmp_path / "selection.parquet", [shards])


def test_the_fingerprint_changes_with_what_documents_weigh(tmp_path, shards):
    train, file = names(shards), tmp_path / "selection.jsonl"

    def fingerprint(weights: dict[str, float]) -> str:
        return selection_fingerprint(read_selection(write(file, weights), [shards]))

    base = fingerprint({train[0]: 0, train[1]: 2})
    assert base == fingerprint({train[1]: 2.0, train[0]: 0, train[2]: 1})
    others = [{train[0]: 0}, {train[0]: 0, train[1]: 2.5}, {train[0]: 2, train[1]: 0}, {}]
    assert len({base, *map(fingerprint, others)}) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"document": "a"', ":3 has no name"),
        ('["a", 1]', ":3 has no name"),
        ('{"weight": 1}', ":3 has no name"),
        ('{"document": 7, "weight": 1}', ":3 has no name"),
        ('{"document": "a"}', ':3 has no name as "document" and number from 0 on as "weight", as in {"doc'),
        ('{"document": "a", "weight": "1"}', ":3 has no name"),
        ('{"document": "a", "weight": true}', ":3 has no name"),
        ('{"document": "a", "weight": -0.5}', ":3 has no name"),
        ('{"document": "a", "weight": NaN}', ":3 has no name"),
        ('{"document": "a", "weight": 1e39}', ":3 has no name"),
        ('{"document": "a", "weight": 1, "source": 0}', ":3 has no name"),
        ('{"document": "FIRST", "weight": 3}', ":3: 'FIRST' is named with two weights"),
        ('{"document": "FIRST", "weight": 3, "source": "SOURCE"}', ": 'FIRST' is named with two weights"),
        (
            '{"document": "b", "weight": 1, "source": "x"}',
            "names 1 documents .* first of them 'b' of 'x'",
        ),
        (
            '{"document": "b", "weight": 1}\n{"document": "a", "weight": 1}',
            "2 documents .* first of them 'b'",
        ),
    ],
)
def test_a_line_that_cannot_be_meant_is_named(tmp_path, text, shards, line, message):
    first = names(shards)[0]
    line = line.replace("FIRST", first).replace("SOURCE", f"{text}/*.txt")
    file = tmp_path / "selection.jsonl"
    file.write_text(f'{{"document": "{first}", "weight": 2}}\n\n{line}\n')
    with pytest.raises(UserError, match=rf"{file}.*{message.replace('FIRST', first)}"):
        read_selection(file, [shards])


def test_saying_the_same_twice_is_no_mistake(tmp_path, text, shards):
    first = names(shards)[0]
    line = json.dumps({"document": first, "weight": 2})
    with_source = json.dumps({"document": first, "weight": 2, "source": f"{text}/*.txt"})
    file = tmp_path / "selection.jsonl"
    file.write_text(f"{line}\n{line}\n{with_source}\n")
    assert read_selection(file, [shards])[shards][0][0] == 2


def test_a_file_that_is_not_there_is_named(tmp_path, shards):
    for path in (tmp_path / "none.jsonl", tmp_path / "none.parquet", tmp_path):
        with pytest.raises(UserError, match=rf"data.selection: {path} can't be read"):
            read_selection(path, [shards])


def test_dropping_everything_is_refused(tmp_path, text, shards):
    file = write(tmp_path / "selection.jsonl", dict.fromkeys(names(shards), 0))
    selection = read_selection(file, [shards])
    with pytest.raises(UserError, match=rf"data.selection drops every document of '{text}/\*.txt': remove"):
        open_dataset([shards], "train", 16, selection)


def test_damaged_names_are_noticed(tmp_path, shards):
    shutil.copytree(shards, tmp_path / "copy")
    path = tmp_path / "copy" / "00001" / "train" / "names.jsonl"
    path.write_text(path.read_text()[:-5])
    file = write(tmp_path / "selection.jsonl", {names(shards)[0]: 0})
    with pytest.raises(UserError, match=r"names of the documents in .*00001 are damaged: remove that folder"):
        read_selection(file, [tmp_path / "copy"])
