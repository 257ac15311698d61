"""Data sets of Hugging Face and TFDS through the real libraries, without a network."""

from __future__ import annotations

import io
import logging
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from clip.data.config import DataConfig, Source
from clip.data.corpus import open_splits
from core.errors import UserError

COUNT = 40
BROKEN = 7
CLASSES = ["cat", "polar_bear"]


def encoded(i: int) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (8, 9, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "huggingface")


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder of parquet with two configurations, of which `small` has one image less."""
    folder = tmp_path_factory.mktemp("hub")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "sentences": [{"raw": datasets.Value("string"), "id": datasets.Value("int32")}],
            "label": datasets.ClassLabel(names=CLASSES),
        }
    )
    rows = [
        {
            "image": {"bytes": encoded(i), "path": None},
            "sentences": [{"raw": f"a, {i}", "id": 0}, {"raw": f"b {i}", "id": 1}],
            "label": i % 2,
        }
        for i in range(COUNT)
    ]
    for name, count in (("whole", COUNT), ("small", COUNT - 1)):
        (folder / name).mkdir()
        data = datasets.Dataset.from_list(rows[:count], features)
        data.to_parquet(folder / name / "train.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("whole", "small"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A data set of TFDS, whose image number BROKEN is cut off."""
    folder = tmp_path_factory.mktemp("tfds")
    with tfds.core.registered.skip_registration():

        class Toy(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                kinds = tfds.features
                features = {
                    "image": kinds.Image(),
                    "array": kinds.Tensor(shape=(2, 2, 3), dtype=np.uint8),
                    "captions": kinds.Sequence(kinds.Text()),
                    "sentences": kinds.Sequence({"raw": kinds.Text()}),
                    "label": kinds.ClassLabel(names=CLASSES),
                }
                return tfds.core.DatasetInfo(builder=self, features=kinds.FeaturesDict(features))

            def _split_generators(self, manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i in range(COUNT):
                    data, captions = encoded(i), [f"a, {i}", f"b {i}"]
                    yield (
                        i,
                        {
                            "image": io.BytesIO(data[:80] if i == BROKEN else data),
                            "array": np.full((2, 2, 3), i, np.uint8),
                            "captions": captions,
                            "sentences": [{"raw": caption} for caption in captions],
                            "label": i % 2,
                        },
                    )

    Toy(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def opened(cache: Path, *, broken_fraction: float = 0.03, **source):
    return open_splits(
        DataConfig(batch_size=1, sources=(Source(**source),), broken_fraction=broken_fraction), 0, cache
    )


def everything(splits) -> dict[bytes, tuple[str, ...]]:
    return {split[i].image.tobytes(): split.captions(i) for split in splits for i in range(len(split))}


def expected(without: int | None = None) -> dict[bytes, tuple[str, ...]]:
    numbers = [i for i in range(COUNT) if i != without]
    return {Image.open(io.BytesIO(encoded(i))).tobytes(): (f"a, {i}", f"b {i}") for i in numbers}


def test_a_folder_of_hugging_face_with_nested_captions(hub, tmp_path):
    for name, without in (("whole", None), ("small", COUNT - 1)):
        splits = opened(tmp_path, huggingface=str(hub), name=name, caption="sentences/raw")
        assert everything(splits) == expected(without)
    assert splits.train.classes is None and splits.train.label(0) is None


@pytest.mark.parametrize("kind", ["huggingface", "tfds"])
def test_class_labels_become_captions(hub, prepared, tmp_path, kind):
    place = {"huggingface": str(hub), "name": "whole"}
    if kind == "tfds":
        place = {"tfds": "toy", "dir": str(prepared)}
    splits = opened(tmp_path, **place, caption="label", templates=["a {}", "one {}"])
    assert splits.train.classes == splits.heldout.classes
    assert splits.train.classes.names == ("cat", "polar bear")
    assert splits.train.classes.templates == ("a {}", "one {}")
    numbers = {image: int(captions[0].split()[1]) for image, captions in expected().items()}
    for split in splits:
        for i in range(len(split)):
            label = numbers[split[i].image.tobytes()] % 2
            name = splits.train.classes.names[label]
            assert split.captions(i) == (f"a {name}", f"one {name}")
            assert split.label(i) == split[i].label == label


@pytest.mark.parametrize("caption", ["captions", "sentences/raw"])
def test_tfds_is_read_without_tensorflow(prepared, tmp_path, caplog, caption):
    with caplog.at_level(logging.WARNING):
        splits = opened(tmp_path, tfds="toy", dir=str(prepared), caption=caption)
    assert everything(splits) == expected(BROKEN)
    assert "tfds:toy: 1 of 40 images or rows are broken (tfds:toy#" in caplog.text
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match=r"1 of 40 .* more than data\.broken_fraction \(0\.01\)"):
        opened(tmp_path, broken_fraction=0.01, tfds="toy", dir=str(prepared), caption=caption)
    part = opened(tmp_path, broken_fraction=0.1, tfds="toy:1.0.0", dir=str(prepared), split="train[:50%]",
                  caption=caption)  # fmt: skip
    assert 18 < len(everything(part)) <= 20


def test_an_array_of_tfds_is_an_image(prepared, tmp_path):
    splits = opened(tmp_path, tfds="toy", dir=str(prepared), image="array", caption="captions")
    # TFDS decodes what else is in a record, too.
    numbers = [i for i in range(COUNT) if i != BROKEN]
    assert everything(splits) == {bytes([i] * 12): (f"a, {i}", f"b {i}") for i in numbers}


@pytest.mark.parametrize("damage", ["zeros", "cut"])
def test_damaged_files_of_tfds_are_broken_records(prepared, tmp_path, damage):
    shutil.copytree(prepared, tmp_path / "tfds")
    (file,) = (tmp_path / "tfds").rglob("toy-train.array_record*")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:300] + bytes(300) + data[600:])
    with pytest.raises(UserError, match=r"tfds:toy: \d+ of 40 images or rows are broken \(tfds:toy#0: "):
        opened(tmp_path, tfds="toy", dir=str(tmp_path / "tfds"), caption="captions")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"huggingface": "./nothing"}, r"the folder \./nothing does not exist"),
        ({"huggingface": "HUB", "name": "large"}, "can't be opened: BuilderConfig 'large' not found"),
        ({"huggingface": "HUB", "revision": "v2"}, "is a folder, and has no 'revision'"),
        ({"huggingface": "HUB", "name": "whole"}, "'HUB' has no column 'caption'; there are: image, "
         "sentences, label; name one with 'caption:'"),
        ({"huggingface": "HUB", "name": "whole", "caption": "sentences/text"},
         "no column 'sentences/text'; in 'sentences' there is raw, id; name one with 'caption:'"),
        ({"huggingface": "HUB", "name": "whole", "caption": "label/x"}, "in 'label' there is nothing"),
        ({"huggingface": "HUB", "name": "whole", "caption": "sentences/raw", "templates": ["{}"]},
         "templates are for classes, and 'sentences/raw' holds none"),
        ({"tfds": "no_such_thing", "dir": "DIR"}, "no data set 'no_such_thing' is prepared in DIR"),
        ({"tfds": "mnist", "dir": "DIR"}, r"is not prepared in DIR: tfds\.builder\('mnist'"),
        ({"tfds": "toy", "dir": "DIR"}, "'toy' has no column 'caption'; there are: .*captions.*; name one"),
        ({"tfds": "toy", "dir": "DIR", "image": "photo"}, "'toy' has no column 'photo'; .* with 'image:'"),
        ({"tfds": "toy", "dir": "DIR", "caption": "sentences/x"}, "in 'sentences' there is raw"),
        ({"tfds": "toy", "dir": "DIR", "caption": "captions", "split": "valid"}, "'toy': Unknown split"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(hub, prepared, tmp_path, entry, message):
    places = {"HUB": str(hub), "DIR": str(prepared)}
    for word, place in places.items():
        message = message.replace(word, place)
    with pytest.raises(UserError, match=rf"^data\.sources\.0: .*{message}"):
        opened(tmp_path, **{key: places.get(str(value), value) for key, value in entry.items()})


def test_a_revision_is_asked_of_the_hub(tmp_path):
    with pytest.raises(
        UserError, match=r"'nobody/nothing' can't be opened: .*; check its name, .*'revision'"
    ):
        opened(tmp_path, huggingface="nobody/nothing", revision="v2")
