"""Data sets of Hugging Face and TFDS, through the real libraries, and what is said of missing ones."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from core.errors import UserError
from llm.data.config import Source
from llm.data.corpus import Corpus, open_corpus

TEXTS = [f"Document {i}: naïve, 日本語, 🦊.\n" * (i % 9 + 1) for i in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Laid out as data sets on the hub are: a file name says the split."""
    folder = tmp_path_factory.mktemp("hub") / "toy"
    folder.mkdir()
    for i in range(4):
        texts = TEXTS[i * 50 : (i + 1) * 50]
        table = pa.table({"id": list(range(len(texts))), "body": texts})
        pq.write_table(table, folder / f"train-{i:05d}-of-00004.parquet", row_group_size=20)
    pq.write_table(pa.table({"id": [1], "body": ["Held out."]}), folder / "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare_tfds(tmp_path_factory.mktemp("tfds"), "array_record")


def prepare_tfds(folder: Path, file_format: str, texts: list[str] = TEXTS) -> Path:
    with tfds.core.registered.skip_registration():

        class Toy(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = tfds.features.FeaturesDict({"body": tfds.features.Text(), "id": np.int32})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, manager):
                return {
                    "train": self._generate_examples(texts),
                    "test": self._generate_examples(["Held out."]),
                }

            def _generate_examples(self, texts):
                yield from ((i, {"body": text, "id": i}) for i, text in enumerate(texts))

    Toy(data_dir=folder, file_format=file_format).download_and_prepare()
    return folder


def opened(shard_bytes: int = 64 << 20, **entry: str) -> Corpus:
    return open_corpus([Source(**entry)], broken_fraction=0.4, shard_bytes=shard_bytes)


def test_a_folder_streams_as_the_hub_would(folder, tmp_path):
    corpus = opened(huggingface=str(folder), field="body")
    documents = list(corpus.documents())
    assert [d.text for d in documents] == TEXTS
    assert [d.name for d in documents] == [f"toy#{k}-{i}" for k in range(4) for i in range(50)]
    backwards = [list(member.documents(k)) for member, k in reversed(corpus.shards)]
    assert list(itertools.chain(*reversed(backwards))) == documents
    shutil.copytree(folder, tmp_path / "toy")
    moved = opened(huggingface=str(tmp_path / "toy"), field="body")
    assert list(moved.documents("heldout")) == list(corpus.documents("heldout")) != []
    held = open_corpus([Source(huggingface=str(folder), field="body")],
                       [Source(huggingface=str(folder), field="body", split="validation")])  # fmt: skip
    assert [d.text for d in held.documents("heldout")] == ["Held out."]
    with pytest.raises(UserError, match="none is left to train on"):
        open_corpus(*[[Source(huggingface=str(folder), field="body")]] * 2)


def test_the_fingerprint_is_that_of_the_files(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "toy")
    seen = {opened(huggingface=str(folder), field="body").fingerprint}
    for name in ("train-00001-of-00004.parquet", "train-00002-of-00004.parquet"):
        again = [opened(huggingface=str(tmp_path / "toy"), field="body").fingerprint for _ in range(2)]
        assert again[0] == again[1]
        seen.add(again[0])
        (tmp_path / "toy" / name).touch()
    seen.add(opened(huggingface=str(tmp_path / "toy"), field="body", split="validation").fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"huggingface": "nobody/nothing"}, "can't be opened: Couldn't reach 'nobody/nothing'"),
        ({"huggingface": "./nothing"}, r"the folder \./nothing does not exist"),
        ({"huggingface": "FOLDER"}, "has no field 'text'; there are: id, body"),
        ({"huggingface": "FOLDER", "split": "test"}, "opened: Bad split: test. Available splits: .*train"),
        ({"huggingface": "FOLDER", "name": "en"}, "can't be opened: BuilderConfig 'en' not found. Available"),
        ({"huggingface": "FOLDER", "revision": "v2"}, "is a folder, and has no 'revision'"),
        ({"tfds": "no_such_thing", "dir": "DIR"}, "no data set 'no_such_thing' is prepared in DIR"),
        ({"tfds": "imdb_reviews", "dir": "DIR"}, r"is not prepared in DIR: tfds\.builder\('imdb"),
        ({"tfds": "toy", "dir": "DIR"}, "'toy' has no field 'text'; there are: "),
        ({"tfds": "toy", "dir": "DIR", "field": "body", "split": "valid"}, "'toy': Unknown split 'valid'"),
        ({"tfds": "toy", "dir": "DIR", "field": "body", "split": "train[:9]"}, "a part or a sum of others"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(folder, prepared, entry, message):
    places = {"FOLDER": str(folder), "DIR": str(prepared)}
    with pytest.raises(UserError, match=rf"^data\.sources\.0: .*{message.replace('DIR', str(prepared))}"):
        opened(**{key: places.get(value, value) for key, value in entry.items()})


def test_records_without_text_are_broken_and_a_broken_file_is_named(tmp_path):
    lines = [json.dumps({"text": text if i % 4 else None}) for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [d.text for d in opened(huggingface=str(tmp_path)).documents()] == [
        text for i, text in enumerate(TEXTS) if i % 4
    ]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": "cut']))
    with pytest.raises(UserError, match=r"can't be read after record \d+ of its shard 0 .* damaged$"):
        list(opened(huggingface=str(tmp_path)).documents())
    packed = gzip.compress("\n".join(lines).encode())
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match="can't be opened: Compressed file ended"):
        list(opened(huggingface=str(tmp_path)).documents())


def test_one_configuration_by_its_name_and_without_is_one_data_set(folder):
    both = [Source(huggingface=str(folder), field="body", **name) for name in ({}, {"name": "default"})]
    with pytest.raises(UserError, match="names every file of"):
        open_corpus([both[0]], [both[1]])


def test_tfds_is_read_without_tensorflow(prepared, tmp_path):
    corpus = opened(shard_bytes=4000, tfds="toy", dir=str(prepared), field="body")
    documents = list(corpus.documents())
    assert sorted(d.text for d in documents) == sorted(TEXTS)  # which TFDS shuffles as it prepares them
    assert [d.name for d in documents] == [f"toy#{i}" for i in range(200)]
    shards = [list(member.documents(k)) for member, k in corpus.shards]
    assert list(itertools.chain(*shards)) == documents
    assert len(shards) > 5 and all(shards)
    shutil.copytree(prepared, tmp_path / "moved")
    moved = opened(tfds="toy", dir=str(tmp_path / "moved"), field="body")
    assert list(moved.documents("heldout")) == list(corpus.documents("heldout")) != []
    assert moved.fingerprint != corpus.fingerprint
    (held,) = opened(tfds="toy:1.0.0", dir=str(prepared), field="body", split="test").documents()
    assert held.text == "Held out."
    assert "tensorflow" not in sys.modules


def test_tfds_of_another_format_or_damaged(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "cut")
    (file,) = (tmp_path / "cut").rglob("toy-train.array_record*")
    data = file.read_bytes()
    file.write_bytes(data[:200] + bytes(200) + data[400:])
    with pytest.raises(UserError, match=r"tfds:toy can't be read near record \d+ \(.*prepare it again"):
        list(opened(tfds="toy", dir=str(tmp_path / "cut"), field="body").documents())
    file.write_bytes(data[: len(data) // 2])  # of which the library says nothing
    with pytest.raises(
        UserError, match=r"200 of 200 records are broken, .* record 0: 'body' is not a string"
    ):
        list(opened(tfds="toy", dir=str(tmp_path / "cut"), field="body").documents())
    (info,) = (tmp_path / "cut").rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        UserError, match=r"in a format that has no random access: prepare it in another folder"
    ):
        opened(tfds="toy", dir=str(tmp_path / "cut"), field="body")
