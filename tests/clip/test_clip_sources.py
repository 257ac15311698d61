"""Photos from tables, class folders, archives and hubs: what is read, what is broken, what is held out."""

from __future__ import annotations

import errno
import json
import logging
import os
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from clip.data.config import DataConfig, Source
from clip.data.corpus import open_splits
from core.errors import UserError

COUNT = 40


@pytest.fixture
def folder(tmp_path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(random.integers(0, 256, (8, 9, 3), np.uint8)).save(images / f"{i}.png")
    rows = "".join(f'{i}.png,"a, {i}"\n./{i}.png,b {i}\n' for i in range(COUNT))
    (tmp_path / "t.csv").write_text("image,caption\n" + rows)
    lines = [json.dumps({"image": f"{i}.png", "caption": [f"a, {i}", f"b {i}"]}) for i in range(COUNT)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    return tmp_path


def opened(folder: Path, *sources: Source, **options):
    return open_splits(DataConfig(batch_size=1, sources=sources, **options), 0, folder / "cache")


def everything(splits) -> dict[str, tuple[str, ...]]:
    return {split[i].image.tobytes(): split.captions(i) for split in splits for i in range(len(split))}


def table(folder: Path, kind: str = "csv") -> Source:
    return Source(**{kind: str(folder / f"t.{kind}"), "images": str(folder / "images")})


def test_tables_and_archives_give_the_same_examples(folder):
    splits = opened(folder, table(folder))
    found = everything(splits)
    assert len(found) == len(splits.train) + len(splits.heldout) == COUNT
    assert set(found.values()) == {(f"a, {i}", f"b {i}") for i in range(COUNT)}
    assert everything(opened(folder, table(folder, "jsonl"))) == found
    with zipfile.ZipFile(folder / "p.zip", "w") as archive:
        archive.write(folder / "t.csv", "in/t.csv")
        for path in (folder / "images").iterdir():
            archive.write(path, f"in/images/{path.name}")
    packed = Source(csv=f"{folder}/p.zip/in/t.csv", images=f"{folder}/p.zip/in/images")
    zipped = opened(folder, packed)
    assert everything(zipped) == found and zipped.heldout.fingerprint == splits.heldout.fingerprint


def test_copies_of_an_image_are_one_example(folder, caplog):
    caplog.set_level(logging.INFO)
    for i in range(COUNT):
        (folder / "images" / f"copy{i}.png").write_bytes((folder / "images" / f"{i}.png").read_bytes())
    with open(folder / "t.csv", "a") as file:
        file.writelines(f"copy{i}.png,c {i}\n" for i in range(COUNT))
    splits = opened(folder, table(folder), heldout_fraction=0.4)
    assert len(everything(splits)) == len(splits.train) + len(splits.heldout) == COUNT
    assert {len(captions) for captions in everything(splits).values()} == {3}
    assert f"data.sources: {COUNT} of {2 * COUNT} images are copies of others: merged" in caplog.text


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_may_be_larger_than_a_picture(folder, monkeypatch, caplog, kind, packed):
    source, largest = table(folder, kind), (folder / f"t.{kind}").stat().st_size - 1
    if packed:
        with zipfile.ZipFile(folder / "p.zip", "w") as archive:
            archive.write(folder / f"t.{kind}", f"t.{kind}")
        source = Source(**{kind: f"{folder}/p.zip/t.{kind}", "images": str(folder / "images")})
    with open(folder / "images" / "5.png", "ab") as file:
        file.write(bytes(largest))
    monkeypatch.setattr("clip.data.sources.folder.LARGEST_BYTES", largest)
    assert len(everything(opened(folder, source, broken_fraction=0.1))) == COUNT - 1
    assert "1 of 40 images or rows are broken (5.png: " in caplog.text and "bytes are too many" in caplog.text


def failing(monkeypatch, name: str, code: int) -> list[str]:
    """Let files of that name fail to open with this error; the names of all that are opened."""
    names = []

    def fail(path, *arguments):
        names.append(path.name)
        if path.name == name:
            raise OSError(code, os.strerror(code))
        return open(path, *arguments)

    monkeypatch.setattr("clip.data.sources.folder.open", fail, raising=False)
    return names


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO])
def test_an_error_that_may_pass_is_not_kept(folder, monkeypatch, code):
    with monkeypatch.context() as patch:
        failing(patch, "3.png", code)
        with pytest.raises(
            UserError,
            match=rf"1 of 40 images can't be read now \(3\.png: {os.strerror(code)}\): run",
        ):
            opened(folder, table(folder), broken_fraction=0.5)
    opened_files = failing(monkeypatch, "no file", code)
    splits = opened(folder, table(folder))
    assert opened_files == ["t.csv", "3.png"]  # of the others it is known that they are intact
    assert len(splits.train) + len(splits.heldout) == COUNT


def test_an_error_of_the_file_itself_is_a_broken_image(folder, monkeypatch):
    failing(monkeypatch, "3.png", errno.EACCES)
    for _ in range(2):
        assert len(everything(opened(folder, table(folder), broken_fraction=0.05))) == COUNT - 1
    monkeypatch.undo()
    file = folder / "images" / "3.png"
    file.chmod(file.stat().st_mode ^ 0o020)  # mended: looked at again
    assert len(everything(opened(folder, table(folder)))) == COUNT


def test_another_pillow_looks_again(folder, monkeypatch):
    (folder / "images" / "4.png").write_bytes(b"of a format to come")
    for version, intact in (("1.0", COUNT - 1), ("1.0", COUNT - 1), ("2.0", COUNT)):
        monkeypatch.setattr("PIL.__version__", version)
        if version == "2.0":
            monkeypatch.setattr("clip.data.corpus.decode", lambda data: Image.new("RGB", (5, 5)))
        splits = opened(folder, table(folder), broken_fraction=0.05)
        assert len(splits.train) + len(splits.heldout) == intact


def test_broken_images_are_named_and_limited(folder, caplog):
    (folder / "images" / "3.png").unlink()
    (folder / "images" / "4.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        splits = opened(folder, table(folder), broken_fraction=0.05)
    assert len(everything(splits)) == COUNT - 2
    assert (
        "2 of 40 images or rows are broken (3.png: there is no such file; 4.png: it has no bytes)"
        in caplog.text
    )
    with pytest.raises(UserError, match=r"2 of 40 .* more than data\.broken_fraction \(0\.01\)"):
        opened(folder, table(folder))
    Image.new("RGB", (5, 5)).save(folder / "images" / "3.png")  # mended: looked at again
    assert len(everything(opened(folder, table(folder), broken_fraction=0.05))) == COUNT - 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("../t.csv,x", "lies outside"),
        ("/etc/passwd,x", "lies outside"),
        ("0.png", "has 1 fields"),
        ("0.png,", "no caption"),
        (",x", "names no image"),
        ("0.png,\udcff", "not UTF-8"),
        ('0.png,"x"y', "expected after"),
    ],
)
def test_a_hostile_row_is_broken(folder, caplog, row, reason):
    with open(folder / "t.csv", "a", errors="surrogateescape") as file:
        file.write(row + "\n")
    with caplog.at_level(logging.WARNING):
        assert len(everything(opened(folder, table(folder), broken_fraction=0.1))) == COUNT
    assert reason in caplog.text and "t.csv, line 82" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file,text\n0.png,x\n", "no column 'image'; there are: file, text; name one with 'image:'"),
        ("image,caption\n".encode("utf-16"), "is UTF-16"),
        (b'image,caption\n0.png,"x\n1.png,y\n', "opened in line 2 and never closed"),
        (b"", "names no image"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(folder, content, message):
    (folder / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.sources\.0: .*t\.csv.*{message}"):
        opened(folder, table(folder))


def test_a_folder_of_hugging_face(folder):
    paths = [str(folder / "images" / f"{i}.png") for i in range(COUNT)]
    data = datasets.Dataset.from_dict({"image": paths, "text": [[f"a, {i}", f"b {i}"] for i in range(COUNT)]})
    (folder / "hub").mkdir()
    data.cast_column("image", datasets.Image()).to_parquet(folder / "hub" / "train.parquet")
    hub = opened(folder, Source(huggingface=str(folder / "hub"), caption="text"))
    assert everything(hub) == everything(opened(folder, table(folder)))
    with pytest.raises(UserError, match="no column 'caption'; there are: image, text"):
        opened(folder, Source(huggingface=str(folder / "hub")))
