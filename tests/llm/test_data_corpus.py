"""Documents: names, order, cuts, split, fingerprint, and what is said about bad files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from llm.data.corpus import Corpus, name_hash, open_corpus
from llm.data.sources.text import LINE_BYTES, PART_BYTES

SENTENCE = "The quick brown fox jumps over the lazy dog.\n"


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def names(corpus: Corpus, split=None) -> list[str]:
    return [document.name for document in corpus.documents(split)]


def test_files_are_documents_in_sorted_order(tmp_path):
    files = {"b.txt": SENTENCE * 2, "a/z.txt": SENTENCE, "a/b/c.txt": SENTENCE * 3, "skip.md": SENTENCE}
    write(tmp_path, files)
    corpus = open_corpus([f"{tmp_path}/**/*.txt"])
    assert names(corpus) == ["a/b/c.txt", "a/z.txt", "b.txt"]
    assert [document.text for document in corpus.documents()] == [files[name] for name in names(corpus)]
    assert names(open_corpus([f"{tmp_path}/b.txt", f"{tmp_path}/a/*.txt"])) == ["b.txt", "z.txt"]


def test_a_name_does_not_change_when_the_corpus_moves(tmp_path):
    files = {f"{i}/{i}.txt": SENTENCE + str(i) for i in range(50)}
    here = open_corpus([f"{write(tmp_path / 'here', files)}/*/*.txt"])
    there = open_corpus([f"{write(tmp_path / 'far' / 'there', files)}/**/*.txt"])
    assert names(here, "heldout") == names(there, "heldout") != []


def test_a_large_file_is_cut_at_line_ends(tmp_path):
    text = "".join(f"{i} {SENTENCE}" for i in range(20_000))
    write(tmp_path, {"large.txt": text, "small.txt": SENTENCE})
    documents = [d for d in open_corpus([f"{tmp_path}/*.txt"]).documents() if d.name != "small.txt"]
    assert [d.name for d in documents] == [f"large.txt#{k}" for k in range(len(documents))]
    assert "".join(d.text for d in documents) == text
    assert all(d.text.endswith("\n") for d in documents)
    assert all(PART_BYTES - LINE_BYTES <= len(d.text) <= 2 * PART_BYTES + LINE_BYTES for d in documents)


@pytest.mark.parametrize("size", [2 * PART_BYTES, 2 * PART_BYTES + 1, 3 * PART_BYTES, 3 * PART_BYTES + 1])
def test_a_file_is_cut_once_it_is_over_the_limit(tmp_path, size):
    write(tmp_path, {"a.txt": b"x" * (size - 1) + b"\n", "b.txt": SENTENCE})
    parts = [d for d in open_corpus([f"{tmp_path}/*.txt"]).documents() if d.name.startswith("a.txt")]
    assert len(parts) == max(1, (size - 1) // PART_BYTES)
    assert sum(len(d.text) for d in parts) == size


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(["é" * 9000, "🦊" * 11_000, "\n", "a\n", "x" * 30_000, "日本\r\n"]), min_size=40
    )
)
def test_parts_add_up_and_break_no_character(tmp_path_factory, pieces):
    text = "".join(pieces)
    folder = write(tmp_path_factory.mktemp("cut"), {"a.txt": text, "b.txt": SENTENCE})
    documents = [d.text for d in open_corpus([f"{folder}/*.txt"]).documents() if d.name != "b.txt"]
    assert "".join(documents) == text
    assert all(len(d.encode()) <= 2 * PART_BYTES + LINE_BYTES for d in documents)


def test_appending_to_a_file_changes_its_last_part_only(tmp_path):
    text = SENTENCE * 12_000
    write(tmp_path, {"log.txt": text, "other.txt": SENTENCE})
    before = list(open_corpus([f"{tmp_path}/log.txt"]).documents())
    write(tmp_path, {"log.txt": text * 2})
    after = list(open_corpus([f"{tmp_path}/log.txt"]).documents())
    assert before[:-1] == after[: len(before) - 1]


@given(shard_bytes=st.integers(5000, 10**6))
@settings(max_examples=20, deadline=None)
def test_shards_partition_the_documents(many_files, shard_bytes):
    source = f"{many_files}/*.txt"
    corpus = open_corpus([source], shard_bytes=shard_bytes)
    assert len(corpus.shards) == -(-corpus.num_bytes // shard_bytes)
    pieces = [list(member.documents(shard)) for member, shard in corpus.shards]
    assert list(itertools.chain(*pieces)) == list(open_corpus([source]).documents())


@pytest.fixture(scope="module")
def many_files(tmp_path_factory):
    files = {f"{i:03}.txt": SENTENCE * (i % 7 + 1) for i in range(200)} | {"large.txt": SENTENCE * 15_000}
    return write(tmp_path_factory.mktemp("many"), files)


def test_the_split_is_by_name_and_leaves_nothing_out(many_files):
    corpus = open_corpus([f"{many_files}/*.txt"], heldout_fraction=0.2)
    train, held = names(corpus, "train"), names(corpus, "heldout")
    assert sorted(train + held) == sorted(names(corpus)) and not set(train) & set(held)
    assert held == [name for name in names(corpus) if name_hash(name) < 0.2 * 2**64]
    assert 0.1 < len(held) / (len(train) + len(held)) < 0.3
    smaller = open_corpus([f"{many_files}/*.txt"], heldout_fraction=0.1)
    assert set(names(smaller, "heldout")) < set(held)


def test_the_hash_of_a_name_never_changes():
    # As `printf NAME | b2sum -l 64` prints it.
    assert name_hash("stdlib/json/decoder.py").to_bytes(8, "little").hex() == "d3a2baafa1fcba5f"
    assert name_hash("日本/\udcff.txt").to_bytes(8, "little").hex() == "c7bfb17db3b08f19"


@pytest.mark.parametrize(("fraction", "held"), [(1e-9, 1), (0.999999, 2)])
def test_no_split_is_ever_empty(tmp_path, fraction, held):
    write(tmp_path, {"a.txt": SENTENCE, "b.txt": SENTENCE, "c.txt": SENTENCE})
    corpus = open_corpus([f"{tmp_path}/*.txt"], heldout_fraction=fraction)
    assert set(names(corpus, "heldout")) == set(sorted(names(corpus), key=name_hash)[:held])


def test_one_large_file_has_both_splits(tmp_path):
    write(tmp_path, {"a.txt": SENTENCE * 7000})
    corpus = open_corpus([f"{tmp_path}/a.txt"])
    assert len(names(corpus, "train")) >= 1 and len(names(corpus, "heldout")) >= 1


def test_heldout_sources_of_their_own_are_never_trained_on(tmp_path):
    write(tmp_path, {"a.txt": SENTENCE, "b.txt": SENTENCE * 2, "valid.txt": SENTENCE * 3})
    corpus = open_corpus([f"{tmp_path}/*.txt"], [f"{tmp_path}/valid.txt"])
    assert names(corpus, "train") == ["a.txt", "b.txt"] and names(corpus, "heldout") == ["valid.txt"]
    assert [member.split for member in corpus.members] == ["train", "heldout"]
    with pytest.raises(UserError, match=r"data\.heldout names every file of data\.sources"):
        open_corpus([f"{tmp_path}/a.txt"], [f"{tmp_path}/*.txt"])


def test_a_file_named_twice_is_read_once(tmp_path):
    write(tmp_path, {"a/a.txt": SENTENCE, "a/b.txt": SENTENCE * 2})
    (tmp_path / "a" / "link.txt").symlink_to("a.txt")
    assert names(open_corpus([f"{tmp_path}/**/*.txt", f"{tmp_path}/a/*.txt"])) == ["a/a.txt", "a/b.txt"]


def test_the_fingerprint_changes_with_files_and_split(tmp_path):
    write(tmp_path, {"a.txt": SENTENCE, "b.txt": SENTENCE * 2, "c.txt": SENTENCE * 3})
    source = f"{tmp_path}/*.txt"
    first = open_corpus([source]).fingerprint
    assert open_corpus([source]).fingerprint == first
    seen = {first, open_corpus([source], heldout_fraction=0.9).fingerprint}
    seen.add(open_corpus([source], [f"{tmp_path}/a.txt"]).fingerprint)
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    seen.add(open_corpus([source]).fingerprint)
    write(tmp_path, {"d.txt": SENTENCE})
    seen.add(open_corpus([source]).fingerprint)
    (tmp_path / "d.txt").rename(tmp_path / "e.txt")
    seen.add(open_corpus([source]).fingerprint)
    assert len(seen) == 6


def test_near_empty_files_are_left_out_and_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    write(tmp_path, {"a.txt": SENTENCE, "b.txt": SENTENCE, "empty.txt": "", "short.txt": "hi\n"})
    corpus = open_corpus([f"{tmp_path}/*.txt"])
    assert names(corpus) == ["a.txt", "b.txt"]
    assert "2 of 4 files have less than 16 bytes: left out" in caplog.text


def test_a_byte_order_mark_is_not_text(tmp_path):
    write(tmp_path, {"a.txt": b"\xef\xbb\xbf" + SENTENCE.encode(), "b.txt": SENTENCE})
    assert [d.text for d in open_corpus([f"{tmp_path}/*.txt"]).documents()] == [SENTENCE, SENTENCE]


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path):
    head = SENTENCE.encode() * 8000
    write(tmp_path, {"bad.txt": head + b"caf\xe9 au lait\n" + SENTENCE.encode(), "good.txt": SENTENCE})
    message = rf"bad\.txt is not UTF-8 at byte {len(head) + 3} \(0xe9\): convert it"
    with pytest.raises(UserError, match=message):
        list(open_corpus([f"{tmp_path}/*.txt"]).documents())


def test_a_file_that_changes_while_in_use_is_noticed(tmp_path):
    write(tmp_path, {"a.txt": SENTENCE, "b.txt": SENTENCE})
    corpus = open_corpus([f"{tmp_path}/*.txt"])
    write(tmp_path, {"b.txt": SENTENCE * 2})
    with pytest.raises(UserError, match=r"b\.txt changed while it was in use"):
        list(corpus.documents())
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b\.txt can't be read: No such file"):
        list(corpus.documents())


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["missing.txt"], r"data\.sources\.0: no file matches 'missing\.txt' \(from the folder /"),
        (["none/**/*.txt"], r"data\.sources\.0: no file matches 'none/\*\*/\*\.txt'"),
        (["folder"], r"'folder' is a folder; name its files, such as 'folder/\*\*/\*\.txt'"),
        (["empty.txt"], r"'empty\.txt' names nothing but empty files"),
        (["one.txt"], r"only one document \(one\.txt\).*data\.heldout"),
    ],
)
def test_sources_that_hold_no_text_are_named(tmp_path, monkeypatch, sources, message):
    monkeypatch.chdir(write(tmp_path, {"folder/a.txt": SENTENCE, "empty.txt": "", "one.txt": SENTENCE}))
    with pytest.raises(UserError, match=message):
        open_corpus(sources)


def test_a_heldout_source_is_named_by_its_key(tmp_path):
    write(tmp_path, {"a.txt": SENTENCE})
    with pytest.raises(UserError, match=r"data\.heldout\.0: no file matches"):
        open_corpus([f"{tmp_path}/a.txt"], [f"{tmp_path}/valid.txt"])
