"""Files of records: each document once and under its name, and what is said of bad ones."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import load, to_yaml
from core.errors import UserError
from llm.config import Experiment
from llm.data.config import Source
from llm.data.corpus import Corpus, open_corpus
from llm.data.sources.document import Document
from llm.data.sources.jsonl import _count_lines

TEXTS = [f"Document {i}: naïve, 日本語, 🦊.\n" * (i % 9 + 1) for i in range(200)]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def records(path: Path | str, field: str | None = None, **options) -> Corpus:
    return open_corpus([Source(path=str(path), field=field)], **options)


def by_shard(corpus: Corpus) -> list[list[Document]]:
    return [list(member.documents(shard)) for member, shard in corpus.shards]


def named(name: str, first: int) -> list[Document]:
    return [Document(f"{name}#{i}", text) for i, text in enumerate(TEXTS, first)]


@pytest.mark.parametrize("suffix", PACK)
def test_json_lines_plain_and_compressed(tmp_path, suffix):
    for name in ("a", "b/c"):
        path = tmp_path / f"{name}.jsonl{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PACK[suffix](lines(TEXTS, "body")))
    corpus = records(f"{tmp_path}/**/*.jsonl{suffix}", "body", shard_bytes=2000)
    expected = named(f"a.jsonl{suffix}", 1) + named(f"b/c.jsonl{suffix}", 1)
    assert list(corpus.documents()) == expected
    assert list(itertools.chain(*by_shard(corpus))) == expected
    assert len([shard for shard in by_shard(corpus) if shard]) >= (1 if suffix else 20)


def test_a_stream_of_several_frames_is_one_file(tmp_path):
    halves = lines(TEXTS[:100]), lines(TEXTS[100:])
    for suffix in (".gz", ".zst", ".xz"):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(map(PACK[suffix], halves)))
        assert [d.text for d in records(tmp_path / f"a.jsonl{suffix}").documents()] == TEXTS


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.sampled_from(["a", "naïve\n", "\r\n", "x" * 300, "🦊" * 50]), min_size=1, max_size=60),
    shard_bytes=st.integers(1, 500),
    end=st.sampled_from(["", "\n", "\n\n\r\n"]),
)  # fmt: skip
def test_any_cut_gives_each_line_once(tmp_path_factory, texts, shard_bytes, end):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(texts).removesuffix(b"\n") + end.encode())
    corpus = records(path, shard_bytes=shard_bytes)
    assert list(itertools.chain(*by_shard(corpus))) == [
        Document(f"a.jsonl#{i}", text) for i, text in enumerate(texts, 1)
    ]


def test_a_line_has_its_number_whichever_shard_is_read_first(tmp_path, monkeypatch):
    monkeypatch.setattr("llm.data.sources.jsonl._BLOCK", 700)
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    corpus = records(tmp_path / "a.jsonl", shard_bytes=1500)
    backwards = [list(member.documents(shard)) for member, shard in reversed(corpus.shards)]
    assert list(itertools.chain(*reversed(backwards))) == named("a.jsonl", 1)
    _count_lines.cache_clear()


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_by_groups_of_rows(tmp_path, codec, kind):
    table = pa.table({"id": list(range(200)), "body": pa.array(TEXTS).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=30, compression=codec)
    corpus = records(tmp_path / "a.parquet", "body", shard_bytes=1000)
    assert list(itertools.chain(*by_shard(corpus))) == named("a.parquet", 0)
    assert len([shard for shard in by_shard(corpus) if shard]) > 1


def test_what_is_read_is_not_held(tmp_path):
    """50 MB of text, of which a few hundred documents are in memory at a time."""
    texts = [str(i) * 2000 for i in range(10_000)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(texts), 1))
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet", row_group_size=10_000)
    for name in ("a.jsonl.gz", "b.parquet"):
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        for i, document in enumerate(records(tmp_path / name).documents()):
            assert document.text == texts[i]
            if i % 1000 == 0:
                assert pa.total_allocated_bytes() - before < 25e6
        assert tracemalloc.get_traced_memory()[1] < 15e6
        tracemalloc.stop()


def test_kinds_by_suffix(tmp_path):
    (tmp_path / "a.json").write_bytes(lines(TEXTS[:1]))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(lines(TEXTS[:1])))
    (tmp_path / "c.ndjson").write_bytes(lines(TEXTS[:1]))
    (tmp_path / "d.txt").write_text(TEXTS[0])
    raw = lines(TEXTS[:1]).decode()
    assert [d.text for d in records(f"{tmp_path}/*").documents()] == [raw, TEXTS[0], TEXTS[0], TEXTS[0]]
    assert [d.text for d in records(f"{tmp_path}/[abc]*", "text").documents()] == TEXTS[:1] * 3
    with pytest.raises(UserError, match=r"sources\.0: 'field' is given, but .*d\.txt is read as plain text"):
        records(f"{tmp_path}/*", "text")
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode()))
    with pytest.raises(UserError, match=r"e\.txt\.gz is compressed: of compressed files only JSON lines"):
        records(f"{tmp_path}/*")


def test_records_are_held_out_by_name_and_nothing_else(tmp_path):
    for place in ("here", "far/there"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.jsonl").write_bytes(lines(TEXTS))
    here, there = (
        list(records(tmp_path / p / "a.jsonl").documents("heldout")) for p in ("here", "far/there")
    )
    assert here == there and 2 < len(here) < 30
    train = list(records(tmp_path / "here/a.jsonl").documents("train"))
    assert sorted(here + train) == sorted(named("a.jsonl", 1))
    (tmp_path / "here/a.jsonl").write_bytes(lines(TEXTS * 2))
    more = list(records(tmp_path / "here/a.jsonl").documents("heldout"))
    assert more[: len(here)] == here


def test_the_fingerprint_changes_with_the_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    seen = {records(tmp_path / "a.jsonl", field).fingerprint for field in (None, "body", "title")}
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:-1]))
    assert len(seen | {records(tmp_path / "a.jsonl").fingerprint}) == 4


BROKEN = [
    (b'{"text": "cut', "not JSON: Invalid control character at: line 1 column 14"),
    (b'{"txt": "a", "id": 3}', "no field 'text'; there are: txt, id"),
    (b"{}", "no field 'text'; there are: none"),
    (b'{"text": 3}', "'text' is not a string but int"),
    (b'{"text": null}', "'text' is not a string but null"),
    (b'["text"]', "not a JSON object but list"),
    (b'{"text": "caf\xe9"}', r"not UTF-8 at byte 13 \(0xe9\)"),
    (rb'{"text": "\ud83e"}', "'text' has half a surrogate pair at character 0"),
    (b"[" * 100_000, "not JSON: maximum recursion depth"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN)
def test_a_broken_line_is_left_out_or_refused(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:100]) + line + b"\n" + lines(TEXTS[100:]))
    kept = records(tmp_path / "a.jsonl", broken_fraction=0.005)
    assert [d.text for d in kept.documents()] == TEXTS
    assert [d.name for d in kept.documents()][99:101] == ["a.jsonl#100", "a.jsonl#102"]
    message = (
        rf"{tmp_path}/a\.jsonl: 1 of 201 records are broken, "
        rf"the first in {tmp_path}/a\.jsonl, line 101: {reason}"
        r".*more than data\.broken_fraction \(0\.004\) of them: mend the source, or raise that"
    )
    with pytest.raises(UserError, match=message):
        list(records(tmp_path / "a.jsonl", broken_fraction=0.004).documents())


def test_a_field_that_no_record_has_is_told_soon(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(lines(TEXTS * 10, "body") + lines(TEXTS))
    with pytest.raises(UserError, match=r"1,000 of 1,000 .*line 1: no field 'text'; there are: id, body\."):
        list(records(tmp_path / "a.jsonl.gz", broken_fraction=0.99).documents())


def test_what_is_not_lines_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("llm.data.sources.jsonl.LONGEST_LINE", 1 << 20)
    (tmp_path / "a.jsonl").write_text(json.dumps([{"text": text} for text in TEXTS * 200]))
    with pytest.raises(
        UserError, match=r"a\.jsonl has a line of more than 1 MiB: JSON lines hold one record"
    ):
        list(records(tmp_path / "a.jsonl").documents())


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [(suffix, damage) for suffix in PACK if suffix for damage in ("cut", "other")]
    + [(".gz", "flipped"), (".xz", "flipped")],  # which check what they unpack
)
def test_a_damaged_compressed_file_is_named(tmp_path, suffix, damage):
    data = bytearray(PACK[suffix](lines([random.Random(i).randbytes(99).hex() for i in range(3000)])))
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    else:
        data = bytearray(b"this was never compressed\n")
    (tmp_path / f"a.jsonl{suffix}").write_bytes(data)
    with pytest.raises(
        UserError, match=rf"a\.jsonl{suffix} is damaged or cut short \(.*copy it again"
    ) as error:
        list(records(tmp_path / f"a.jsonl{suffix}", broken_fraction=0.9).documents())
    assert "broken_fraction" not in str(error.value)


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, write_page_checksum=True)
    whole = path.read_bytes()
    for data in (
        whole[:-30],
        whole[:3000] + b"\xff" + whole[3001:],
        b"PAR1 no more than a word PAR1",
        whole[4:],
    ):
        assert data != whole
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.parquet is damaged or no Parquet file \(.*copy it again"):
            list(records(path).documents())


def test_columns_of_parquet_are_checked(tmp_path):
    table = pa.table({"id": [1, 2, 3], "text": ["one", None, ""], "raw": [b"caf\xe9", b"a", b"b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    with pytest.raises(UserError, match=r"a\.parquet has no column 'body'; there are: id, text, raw$"):
        list(records(path, "body").documents())
    with pytest.raises(UserError, match=r"a\.parquet: the column 'id' holds int64, not strings$"):
        list(records(path, "id").documents())
    for field, reason in (
        ("text", "row 1: 'text' is not a string but null"),
        ("raw", "row 0: 'raw' is not UTF-8"),
    ):
        with pytest.raises(UserError, match=rf"1 of 3 records are broken, .*, {reason}"):
            list(records(path, field).documents())
    kept = records(path, "text", broken_fraction=0.5).documents()
    assert list(kept) == [Document("a.parquet#0", "one")]  # no document without text


def test_a_file_that_changes_while_in_use_is_noticed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    corpus = records(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS * 2))
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was in use"):
        list(corpus.documents())


BASE = (
    "run: {name: a}\ntrain: {steps: 1}\n"
    "model: {vocab_size: 512, num_layers: 1, embed_dim: 8, num_heads: 1, num_kv_heads: 1, head_dim: 8, "
    "mlp_dim: 8, max_length: 8}\n"
    "data:\n  sequence_length: 8\n  batch_size: 1\n"
)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("sources: [embedded, {pth: a}]", "key 'data.sources.1.pth'; did you mean 'data.sources.1.path'?"),
        ("heldout: [{path: a, feild: b}]", "'data.heldout.0.feild'; did you mean 'data.heldout.0.field'?"),
        ("sources: [{path: 3}]", "'data.sources.0.path' is 3: input should be a valid string"),
        ("sources: [embedded, 3]", "'data.sources.1' is 3: input should be an object"),
        ("sources: embedded", "'data.sources' is 'embedded': input should be a valid array"),
        ("sources: [{field: a}]", "data.sources.0: it says not where documents are: name one of path"),
        ("sources: [{path: a, tfds: b}]", "data.sources.0: it has path and tfds: name one of"),
        ("sources: [a, {path: b, split: c}]", "data.sources.1: 'split' means nothing with 'path', which"),
        ("sources: [{tfds: a, name: b}]", "'name' means nothing with 'tfds', which takes dir, split, field"),
        ("sources: [{path: a, weight: 0}]", "'data.sources.0.weight' is 0: input should be greater than 0"),
        ("sources: [{path: a, weight: 1}, b]", "have a weight or none has; here: 'a' 1.0, 'b' none"),
        (
            "sources: [{path: a, weight: 0.5}, {tfds: b, weight: 0.4}]",
            "the weights of data.sources add up to 0.9, not 1: 'a' 0.5, 'tfds:b' 0.4",
        ),
        ("heldout: [a, {path: b, weight: 1}]", "data.heldout.1 has a weight: held-out text is read once"),
        ("broken_fraction: 1", "'data.broken_fraction' is 1: input should be less than 1"),
    ],
)  # fmt: skip
def test_mistakes_in_a_source_are_named_with_key_and_file(tmp_path, more, message):
    (tmp_path / "base.yaml").write_text(f"{BASE}  {more}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nseed: 3\n")
    with pytest.raises(UserError) as error:
        load(Experiment, tmp_path / "child.yaml")
    assert str(error.value).startswith(f"{tmp_path}/base.yaml: ") and message in str(error.value)


def test_sources_are_written_as_they_were_read(tmp_path):
    sources = "[embedded, {path: a.jsonl, field: body}, {huggingface: x/y, name: en, split: test}]"
    (tmp_path / "a.yaml").write_text(f"{BASE}  sources: {sources}\n  heldout: [b.txt]\n")
    experiment = load(Experiment, tmp_path / "a.yaml")
    assert experiment.data.sources[0] == Source(path="embedded")
    (tmp_path / "b.yaml").write_text(to_yaml(experiment))
    assert load(Experiment, tmp_path / "b.yaml") == experiment
    assert "- embedded\n" in to_yaml(experiment) and "null" not in to_yaml(experiment).split("heldout:")[0]
    thirds = [f"data.sources=[{', '.join(f'{{path: {i}, weight: 0.3333333}}' for i in 'abc')}]"]
    assert len(load(Experiment, tmp_path / "a.yaml", thirds).data.sources) == 3
