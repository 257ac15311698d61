"""Token shards: what is in them, kills and full disks, what changes the key."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.errors import UserError
from llm.data.corpus import open_corpus
from llm.data.loader import open_dataset
from llm.data.shards import build_shard, build_shards, shards_key
from llm.tokenizer import Tokenizer, save, train_bpe

SHARD_BYTES = 30_000


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    words = ["alpha", "beta", "<|end_of_text|>", "naïve", "日本語", "🦊", "\n", "  ", "x = y + 1\n"]
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(" ".join(generator.choice(words, generator.integers(20, 400))))
    (folder / "large.txt").write_text("A line of a file that is large.\n" * 10_000)
    return f"{folder}/*.txt"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("tokenizer")
    save(train_bpe((d.text for d in open_corpus([text]).documents("train")), 300), folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory, text, tokenizer):
    return build(text, tokenizer, tmp_path_factory.mktemp("shards"))


def build(text: str, tokenizer: Tokenizer, folder: Path, **tasks: int) -> Path:
    """The shards of one source, in small."""
    (shards,) = build_shards(open_corpus([text], shard_bytes=SHARD_BYTES), tokenizer, folder, **tasks)
    return shards


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_documents_come_back(text, tokenizer, built):
    """Read with NumPy and JSON alone."""
    index = json.loads((built / "index.json").read_text())
    for split in ("train", "heldout"):
        expected = iter(open_corpus([text]).documents(split))
        for number, counts in enumerate(shard[split] for shard in index["shards"]):
            folder = built / f"{number:05d}" / split
            table = {p.stem: np.load(p, mmap_mode="r") for p in folder.glob("*.npy")}
            names = [json.loads(line) for line in (folder / "names.jsonl").read_text().splitlines()]
            assert (
                table["tokens"].dtype == np.uint16
                and len(table["tokens"]) == table["starts"][-1] == counts["tokens"]
            )
            assert (
                len(names) == len(table["bytes"]) == counts["documents"]
                and table["bytes"].sum() == counts["bytes"]
            )
            assert np.all(table["weights"] == 1) and table["weights"].dtype == np.float32
            for i, name in enumerate(names):
                document = next(expected)
                ids = table["tokens"][table["starts"][i] : table["starts"][i + 1]]
                assert [ids[0], ids[-1]] == index["boundaries"] == [tokenizer.bos_id, tokenizer.eos_id]
                assert not set(index["boundaries"]) & set(ids[1:-1].tolist())
                assert tokenizer.decode(ids[1:-1].tolist()) == document.text
                assert (name, table["bytes"][i]) == (document.name, len(document.text.encode()))
                assert index["sources"][table["sources"][i]] == text
        assert next(expected, None) is None


def test_a_large_vocabulary_takes_four_bytes(tmp_path, text, tokenizer):
    wide = Tokenizer.load(tokenizer.path)
    wide.vocab_size = 2**16 + 1
    folder = build(text, wide, tmp_path)
    assert np.load(folder / "00000/train/tokens.npy").dtype == np.uint32
    assert open_dataset([folder], "train", 8).num_tokens > 0


def test_a_tokenizer_of_others_may_lack_a_beginning_but_not_an_end(tmp_path, text, tokenizer):
    bare = Tokenizer.load(tokenizer.path)
    bare.bos_id = None
    folder = build(text, bare, tmp_path)
    tokens, starts = (np.load(folder / f"00000/train/{name}.npy") for name in ("tokens", "starts"))
    assert np.all(tokens[starts[:-1]] == bare.eos_id) and np.all(tokens[starts[1:] - 1] == bare.eos_id)
    bare.eos_id = None
    with pytest.raises(UserError, match=r"names no token that ends a text: set 'eos_token'"):
        build(text, bare, tmp_path)


def test_shards_are_the_same_in_any_order_and_with_any_number_of_threads(tmp_path, text, tokenizer, built):
    (member,) = open_corpus([text], shard_bytes=SHARD_BYTES).members
    folder = tmp_path / shards_key(member, tokenizer)
    folder.mkdir()
    for number in reversed(range(member.source.num_shards)):
        build_shard(member, tokenizer, folder, number)
    assert build(text, tokenizer, tmp_path) == folder
    assert contents(folder) == contents(built)
    for threads in ("1", "2"):
        builder(text, tokenizer, tmp_path / threads, RAYON_NUM_THREADS=threads).wait()
        assert contents(tmp_path / threads / built.name) == contents(built)


BUILD = """
import os, signal, sys
from pathlib import Path
from llm.data import shards
from llm.data.corpus import open_corpus
from llm.tokenizer import Tokenizer

text, tokenizer, folder, shard_bytes, writes = sys.argv[1:]
left = iter(range(int(writes)))
write = shards._write

def write_or_die(*arguments, **options):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments, **options)

shards._write = write_or_die
corpus = open_corpus([text], shard_bytes=int(shard_bytes))
shards.build_shards(corpus, Tokenizer.load(Path(tokenizer)), Path(folder))
"""


def builder(
    text: str, tokenizer: Tokenizer, folder: Path, writes: int = 10**9, **environment: str
) -> subprocess.Popen:
    """A process that builds the shards and is killed after that many files."""
    arguments = (text, str(tokenizer.path), str(folder), str(SHARD_BYTES), str(writes))
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, *arguments],
        env={**os.environ, **environment},
        stderr=subprocess.DEVNULL,
    )


# A shard is some forty writes: killed before the first, within the first shard, in the next, much later.
@pytest.mark.parametrize("writes", [0, 5, 20, 50, 200])
def test_a_killed_build_goes_on_where_it_was(tmp_path, text, tokenizer, built, writes):
    assert builder(text, tokenizer, tmp_path, writes).wait() == -signal.SIGKILL
    folder = tmp_path / built.name
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("[0-9]*/*/*")}
    assert (writes >= 50) == bool(finished) and not (folder / "index.json").exists()
    assert all(path.read_bytes() == (built / path.relative_to(folder)).read_bytes() for path in finished)
    build(text, tokenizer, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(folder) == contents(built)


def test_nothing_is_done_twice(text, tokenizer, built):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    assert build(text, tokenizer, built.parent) == built
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def test_two_at_a_time_do_not_disturb_each_other(tmp_path, text, tokenizer, built):
    processes = [builder(text, tokenizer, tmp_path) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert contents(tmp_path / built.name) == contents(built)


def test_a_full_disk_loses_nothing(tmp_path, text, tokenizer, built, monkeypatch):
    from llm.data import shards

    written = shards._write

    def full(path: Path, content: bytes, mode: str, sync: bool = False) -> None:
        if "00003" in str(path) and mode == "ab":
            with open("/dev/full", "wb") as file:
                file.write(content)
        written(path, content, mode, sync)

    monkeypatch.setattr(shards, "_write", full)
    with pytest.raises(OSError, match="No space left") as error:
        build(text, tokenizer, tmp_path)
    folder = tmp_path / built.name
    assert error.value.filename == str(folder / "00003")
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001", "00002"]
    monkeypatch.setattr(shards, "_write", written)
    build(text, tokenizer, tmp_path)
    assert contents(folder) == contents(built)


def key(source: str, tokenizer: Tokenizer, **options: float) -> str:
    (member,) = open_corpus([source], **options).members
    return shards_key(member, tokenizer)


def test_another_corpus_split_or_tokenizer_is_another_key(tmp_path, text, tokenizer):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"This is the document {name}.\n")
    source = f"{tmp_path}/*.txt"
    keys = {key(source, tokenizer), key(text, tokenizer)}
    keys.add(key(source, tokenizer, heldout_fraction=0.9))
    (tmp_path / "b.txt").write_text("This was the document b.\n")
    keys.add(key(source, tokenizer))
    save(train_bpe(["other words, other merges"], 270), tmp_path / "other")
    keys.add(key(source, Tokenizer.load(tmp_path / "other")))
    assert len(keys) == 5


@pytest.mark.parametrize("file", ["tokens.npy", "starts.npy", "weights.npy", "bytes.npy"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_shard_is_named_and_made_anew(tmp_path, text, tokenizer, built, file, damage):
    folder = tmp_path / built.name
    shutil.copytree(built, folder)
    path = folder / "00004" / "train" / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError, match=rf"{path} is damaged.*remove the folder {folder / '00004'} and run"):
        open_dataset([folder], "train", 8)
    shutil.rmtree(folder / "00004")
    build(text, tokenizer, tmp_path)
    assert contents(folder) == contents(built)


def test_unfinished_shards_are_not_opened(tmp_path, built):
    shutil.copytree(built, tmp_path / "copy")
    (tmp_path / "copy" / "index.json").write_text("{")
    for folder in (tmp_path / "copy", tmp_path / "none"):
        with pytest.raises(UserError, match=r"index\.json is missing or damaged: remove it and run"):
            open_dataset([folder], "train", 8)
