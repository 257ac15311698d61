"""Class folders, damaged archives and tables, held-out sources, and images that break in a run."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip.data.batches import batches
from clip.data.captions import encode_captions
from clip.data.config import DataConfig, Source
from clip.data.corpus import open_labelled, open_splits
from clip.data.scenes import Scenes
from clip.data.tokenizer import caption_tokenizer
from core.errors import UserError

CLASSES = ("cat", "polar bear", "great_white shark")  # of folders, an underscore is a space
COUNT = 8  # of each class


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    for label, name in enumerate(CLASSES):
        place = tmp_path / "classes" / name.replace(" ", "_") / ("deep" if label else "")
        place.mkdir(parents=True)
        for i in range(COUNT):
            (place / f"{i}.png").write_bytes(encoded(label * COUNT + i))
    (tmp_path / "classes" / "README.txt").write_text("no image")
    (tmp_path / "classes" / "loose.png").write_bytes(encoded(1000))
    return tmp_path


def packed(folder: Path) -> Path:
    archive = folder / "classes.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((folder / "classes").rglob("*")):
            file.write(path, f"in/{path.relative_to(folder / 'classes')}")
    return archive


def opened(folder: Path, *sources: Source, **options):
    return open_splits(DataConfig(batch_size=1, sources=sources, **options), 0, folder / "cache")


def examples(split) -> dict[bytes, tuple[int | None, tuple[str, ...]]]:
    return {split[i].image.tobytes(): (split.label(i), split.captions(i)) for i in range(len(split))}


def table(folder: Path, text: str | bytes, kind: str = "jsonl") -> Source:
    file = folder / f"t.{kind}"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Source(**{kind: str(file), "images": str(folder / "classes" / "cat")})


def test_classes_are_folders_on_disk_and_in_archives(folder):
    source = Source(classes=str(folder / "classes"), templates=["a {}", "the {} of {}"])
    splits = opened(folder, source)
    names = ("cat", "great white shark", "polar bear")
    assert splits.train.classes == splits.heldout.classes
    assert splits.train.classes.names == names and splits.train.classes.templates == source.templates
    found = examples(splits.train) | examples(splits.heldout)
    assert len(found) == len(splits.train) + len(splits.heldout) == len(CLASSES) * COUNT
    for number in range(len(CLASSES) * COUNT):
        name = CLASSES[number // COUNT].replace("_", " ")
        pixels = Image.open(io.BytesIO(encoded(number))).tobytes()
        assert found[pixels] == (names.index(name), (f"a {name}", f"the {name} of {name}"))
    zipped = opened(folder, Source(classes=f"{packed(folder)}/in", templates=["a {}", "the {} of {}"]))
    assert [examples(side) for side in zipped] == [examples(side) for side in splits]
    assert zipped.train.fingerprint == splits.train.fingerprint
    plain = open_labelled(f"{packed(folder)}/in", "--images", folder / "cache", 0.01)
    assert plain.classes.templates == ("a photo of a {}",)
    assert plain.captions(0) == ("a photo of a cat",) and len(plain) == len(found)


def test_a_folder_without_classes_is_named(folder):
    with pytest.raises(UserError, match=r"^--images: .*cat has no folder with images .*: each class is a"):
        open_labelled(str(folder / "classes" / "cat"), "--images", folder / "cache", 0.01)


def test_linked_folders_are_classes_and_loops_end(folder):
    subset = folder / "subset"
    (subset / "tiger").mkdir(parents=True)
    (subset / "tiger" / "0.png").write_bytes(encoded(200))
    (subset / "tiger" / "back").symlink_to(subset)
    (subset / "house_cat").symlink_to(folder / "classes" / "cat")
    (subset / "old_cat").symlink_to(folder / "classes" / "cat")
    (subset / "polar_bear").symlink_to("../classes/polar_bear", target_is_directory=True)
    found = open_labelled(str(subset), "--images", folder / "cache", 0.01)
    assert found.classes.names == ("house cat", "old cat", "polar bear", "tiger")
    names = [found[i].id for i in range(len(found))]
    expected = [f"{name}/{i}.png" for name in ("house_cat", "old_cat") for i in range(COUNT)]
    assert names == [*expected, *(f"polar_bear/deep/{i}.png" for i in range(COUNT)), "tiger/0.png"]


def test_all_copies_are_measured_each_as_its_own_class(folder):
    (folder / "classes" / "polar_bear" / "cat.png").write_bytes(encoded(0))
    (folder / "classes" / "cat" / "copy.png").write_bytes(encoded(0))
    found = open_labelled(str(folder / "classes"), "--images", folder / "cache", 0.01)
    labels = {found[i].id: found.label(i) for i in range(len(found))}
    assert len(labels) == len(found) == COUNT * len(CLASSES) + 2
    assert [labels[name] for name in ("cat/0.png", "cat/copy.png", "polar_bear/cat.png")] == [0, 0, 2]
    splits = opened(folder, Source(classes=str(folder / "classes")), heldout_fraction=0.4)
    assert len(splits.train) + len(splits.heldout) == COUNT * len(CLASSES)
    assert not examples(splits.train).keys() & examples(splits.heldout).keys()


def test_one_class_leaves_nothing_to_choose(folder):
    for name in ("great_white_shark", "polar_bear"):
        shutil.rmtree(folder / "classes" / name)
    with pytest.raises(UserError, match=r"^--images: .*classes has images of one class only \('cat'\)"):
        open_labelled(str(folder / "classes"), "--images", folder / "cache", 0.01)
    assert len(opened(folder, Source(classes=str(folder / "classes"))).train)


@pytest.mark.parametrize("archive", [False, True])
def test_classes_that_lie_deeper_are_pointed_out(folder, caplog, archive):
    opened(folder, Source(classes=str(folder / "classes")))  # polar_bear/deep is no choice
    assert "folders of images" not in caplog.text
    path = str(folder)
    if archive:
        path = str(packed(folder))
        shutil.rmtree(folder / "classes")
    with contextlib.suppress(UserError):  # one class
        open_labelled(path, "--images", folder / "cache", 0.01)
    top = "in" if archive else "classes"
    assert (
        f"--images: the classes are the folders in {path}, such as {top}, which has folders of images in it "
        f"(cat, great_white_shark, polar_bear): if those are the classes, name {path}/{top}"
    ) in caplog.text


def test_what_is_in_both_sides_is_held_out(folder, caplog):
    train = Source(classes=str(folder / "classes"))
    other = folder / "other" / "cat"
    other.mkdir(parents=True)
    for i in (0, 3):
        (other / f"copy{i}.png").write_bytes(encoded(i))
    (other / "new.png").write_bytes(encoded(500))
    with caplog.at_level(logging.INFO):
        splits = opened(folder, train, heldout=(Source(classes=str(folder / "other")),))
    assert (len(splits.train), len(splits.heldout)) == (len(CLASSES) * COUNT - 2, 3)
    assert not examples(splits.train).keys() & examples(splits.heldout).keys()
    assert "2 images of data.sources are in data.heldout too: held out" in caplog.text
    assert splits.heldout.classes == splits.train.classes and set(map(splits.heldout.label, range(3))) == {0}
    with pytest.raises(UserError, match=r"data\.heldout names every image of data\.sources"):
        opened(folder, train, heldout=(train,))
    with pytest.raises(UserError, match=r"^data\.heldout\.0: the folder .*nowhere does not exist"):
        opened(folder, train, heldout=(Source(classes=str(folder / "nowhere")),))


def test_two_folders_of_one_archive_are_two(folder):
    """Though names and the archive's size and time are the same: what is known of images is of a source."""
    archive = folder / "two.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for side in range(2):
            for number in range(2):
                file.writestr(f"{'ab'[side]}/cat/{number}.png", encoded(10 * side + number))
    train, heldout = (Source(classes=f"{archive}/{side}") for side in "ab")
    splits = open_splits(DataConfig(batch_size=1, sources=(train,), heldout=(heldout,)), 0, folder / "cache")
    assert [len(split) for split in splits] == [2, 2]
    assert not examples(splits.train).keys() & examples(splits.heldout).keys()


def test_a_line_is_no_picture(folder, caplog):
    """Its shorter side would be scaled to the model's size, and the other with it."""
    Image.new("RGB", (3000, 1)).save(folder / "classes/cat/line.png")
    found = opened(folder, Source(classes=str(folder / "classes")), broken_fraction=0.1)
    assert len(found.train) + len(found.heldout) == COUNT * len(CLASSES)
    assert "3000 x 1 pixels are a line, no picture" in caplog.text


def test_a_damaged_archive_is_named(folder):
    archive = packed(folder)
    data = archive.read_bytes()
    source = Source(classes=f"{archive}/in")
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"^data\.sources\.0: .*classes\.zip is a file and no zip archive"):
        opened(folder, source)
    directory = data.index(b"PK\1\2")
    archive.write_bytes(data[:directory] + b"XX" + data[directory + 2 :])
    with pytest.raises(
        UserError, match=r"^data\.sources\.0: .*zip can't be opened as a zip .* fetch it again"
    ):
        opened(folder, source)
    with pytest.raises(UserError, match=r"classes\.zip holds nothing under 'out'"):
        archive.write_bytes(data)
        opened(folder, Source(classes=f"{archive}/out"))


def test_a_damaged_member_is_a_broken_image(folder, caplog):
    archive = packed(folder)
    data = bytearray(archive.read_bytes())
    place = data.index(encoded(2)) + 60
    data[place] ^= 0xFF
    archive.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        splits = opened(folder, Source(classes=f"{archive}/in"), broken_fraction=0.1)
    assert len(splits.train) + len(splits.heldout) == len(CLASSES) * COUNT - 1
    assert "1 of 24 images or rows are broken (cat/2.png: Bad CRC-32" in caplog.text


GOOD = [json.dumps({"image": f"{i}.png", "caption": f"cat {i}"}) for i in range(COUNT)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"image": "0.png", "caption": "cut', "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b'["0.png", "x"]', "it is not a JSON object"),
        (b'{"image": "0.png", "caption": "\xff"}', "its caption is not UTF-8"),
        (b'{"image": "0.png", "caption": "\\ud83e"}', "its caption is not UTF-8"),
        (b'{"image": "\xff.png", "caption": "x"}', "the name of its image is not UTF-8"),
        (b'{"image": "0.png", "caption": null}', "its caption is not a string but null"),
        (b'{"image": "0.png", "caption": ["x", 3]}', "its caption is not a string but int"),
        (b'{"image": "0.png", "caption": []}', "it has no caption"),
        (b'{"image": "0.png"}', "it has no 'caption'"),
        (b'{"image": 7, "caption": "x"}', "it names no image"),
        (b'{"image": "../polar_bear/0.png", "caption": "x"}', "lies outside"),
    ],
)
def test_a_malformed_line_is_broken(folder, caplog, line, reason):
    source = table(folder, "\n".join(GOOD).encode() + b"\n\n" + line)
    with caplog.at_level(logging.WARNING):
        splits = opened(folder, source, broken_fraction=0.2)
    assert len(splits.train) + len(splits.heldout) == COUNT
    assert f"t.jsonl, line {COUNT + 2}: " in caplog.text and reason in caplog.text
    with pytest.raises(UserError, match=rf"1 of {COUNT + 1} images or rows are broken"):
        opened(folder, source)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("jsonl", b'{"file": "0.png", "text": "x"}', r"line 1 has no field 'image'; there are: file, text"),
        ("jsonl", b'{"image": "0.png", "text": "x"}', r"no field 'caption'; .*; name one with 'caption:'"),
        ("jsonl", '{"image": "0.png"}'.encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("jsonl", b"\0" * 50, r"names no image with a caption: .*t\.jsonl, line 1: it is not JSON"),
        ("tsv", b"image,caption\n0.png,x\n", r"no column 'image'; there are: image,caption; name one with"),
        ("csv", b"image,caption\n0.png,\xff\n", r"names no image with a caption: .*, line 2: .* not UTF-8"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used_is_named(folder, kind, content, message):
    source = table(folder, content, "csv" if kind == "tsv" else kind)
    if kind == "tsv":
        source = Source(csv=str(Path(source.csv).rename(folder / "t.tsv")), images=source.images)
    with pytest.raises(UserError, match=rf"^data\.sources\.0: .*t\.{kind}.*{message}"):
        opened(folder, source)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_an_image_that_breaks_in_a_run_ends_it_with_its_name(folder, damage):
    splits = opened(folder, table(folder, "\n".join(GOOD)), heldout_fraction=0.01)
    broken = splits.train[3].id
    file = folder / "classes" / "cat" / broken
    tokenizer = caption_tokenizer(
        Scenes(0, heldout=False), folder, path=None, vocab_size=352, pattern="llama3", name="vocab_size"
    )
    assert encode_captions(tokenizer, ["a cat"], 8)[0].shape == (1, 8)
    config = DataConfig(batch_size=4)
    made = batches(splits.train, tokenizer, config, size=8, length=8, numbers=range(4), seed=0)
    next(made)
    made.close()
    file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:50])
    made = batches(splits.train, tokenizer, config, size=8, length=8, numbers=range(4), seed=0)
    with pytest.raises(
        UserError, match=rf"t\.jsonl: {broken} was intact when the run started and can't be read"
    ):
        list(made)
