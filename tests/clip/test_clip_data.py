"""Decoding, augmentation, and batches by their number."""

from __future__ import annotations

import io
import logging
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from clip.data.batches import batches
from clip.data.captions import count_cut, encode_captions
from clip.data.config import DataConfig
from clip.data.corpus import open_splits
from clip.data.images import BrokenImage, augment, center_crop, decode, from_array
from clip.data.scenes import Scenes
from clip.data.tokenizer import caption_tokenizer
from core.errors import UserError

SCENES = Scenes(0, heldout=False)
RED = (200, 30, 40)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    options = {"path": None, "vocab_size": 352, "pattern": "llama3", "name": "tokenizer.vocab_size"}
    made = caption_tokenizer(SCENES, cache, **options)
    (folder,) = (cache / "tokenizers").iterdir()
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    assert caption_tokenizer(SCENES, cache, **options).fingerprint == made.fingerprint
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written
    return made


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )


JPEG, PNG = encoded(photo(), "JPEG"), encoded(photo())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"\0" * 100, "no image format"),
        (b"<html>404</html>", "no image format"),
        (JPEG[: len(JPEG) // 2], "."),
        (JPEG[:-40], "truncated"),
        (JPEG[:10], "."),
        (PNG[: len(PNG) // 2], "."),
        (PNG[:50] + bytes(20) + PNG[70:], "."),
        (encoded(photo(), "WEBP")[:60], "."),
        (encoded(photo(), "GIF")[:200], "."),
        (bomb(), "too many"),
        (encoded(Image.new("1", (11_000, 10_000))), "11000 x 10000 pixels are too many"),
        (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), -3, np.int32)), "TIFF"), "16 bits"),
    ],
)  # fmt: skip
def test_what_is_no_image_says_why(data, reason):
    with pytest.raises(BrokenImage, match=reason):
        decode(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "I;16", "animation"])
def test_images_of_every_kind_become_rgb(mode):
    if mode == "I;16":
        data = encoded(Image.fromarray(np.full((8, 8), 0x8080, np.uint16)))
        expected = (0x80,) * 3
    elif mode == "animation":
        second = Image.new("RGB", (8, 8), "green")
        data, expected = (
            encoded(Image.new("RGB", (8, 8), RED), "GIF", save_all=True, append_images=[second]),
            RED,
        )
    elif mode == "CMYK":
        data, expected = encoded(Image.new("RGB", (8, 8), RED).convert("CMYK"), "JPEG", quality=100), RED
    else:
        source = Image.new("RGB", (8, 8), RED).convert(mode, dither=Image.Dither.NONE)
        data, expected = encoded(source), source.convert("RGB").getpixel((0, 0))
    image = decode(data)
    assert image.mode == "RGB"
    assert np.abs(np.subtract(image.getpixel((4, 4)), expected)).max() <= 4


def test_transparent_is_white_and_a_turned_photo_upright():
    assert decode(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4))
    assert decode(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    turned = decode(encoded(photo(), exif=exif))
    assert turned.tobytes() == photo().rotate(-90, expand=True).tobytes()


def test_arrays_are_images_too():
    gray = from_array(np.full((3, 4, 1), 7, np.uint8))
    assert gray.size == (4, 3) and gray.getpixel((0, 0)) == (7, 7, 7)
    assert from_array(np.full((3, 4), 0x8180, np.uint16)).getpixel((0, 0)) == (0x81,) * 3
    for wrong in (np.zeros((3, 4), np.float32), np.zeros((0, 4, 3), np.uint8), np.zeros((3, 4, 2), np.uint8)):
        with pytest.raises(BrokenImage, match="is no image"):
            from_array(wrong)


@pytest.mark.parametrize("shape", [(40, 30), (31, 77), (32, 32), (7, 200), (500, 375), (1, 1)])
def test_evaluation_crops_as_clips_processor(shape):
    image = photo(*shape)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size=32, do_normalize=False, do_rescale=False
    )
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    difference = np.abs(center_crop(image, 32).astype(int) - theirs.astype(int))
    assert difference.max() <= 1


def test_a_random_crop_is_a_rectangle_of_the_asked_area():
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))  # a pixel says where it was
    areas, mirrored = [], 0
    for i in range(300):
        crop = augment(image, 50, 0.4, True, np.random.default_rng(i)).astype(int)
        width, height = (np.ptp(crop[..., axis]) * 50 / 49 for axis in (0, 1))
        areas.append(width * height / 200**2)
        mirrored += crop[25, 0, 0] > crop[25, -1, 0]
        assert 0.7 < width / height < 1.4
    assert 0.36 < min(areas) < 0.5 and 0.9 < max(areas) < 1.06
    assert 110 < mirrored < 190
    long = augment(photo(500, 5), 16, 0.9, False, np.random.default_rng(0))
    assert long.shape == (16, 16, 3)
    np.testing.assert_array_equal(
        augment(image, 50, 1, False, np.random.default_rng(0)), center_crop(image, 50)
    )


def make(tokenizer, numbers, seed=3, workers=2, rows=slice(None), train=True, split=SCENES, **options):
    config = DataConfig(batch_size=6, workers=workers, crop_area=0.7, **options)
    return list(
        batches(split, tokenizer, config, size=24, length=12, numbers=numbers, seed=seed, rows=rows,
                train=train)
    )  # fmt: skip


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_batch_is_a_function_of_seed_and_number(tokenizer, workers, train):
    whole = make(tokenizer, range(8), workers=1, train=train)
    assert all(map(same, make(tokenizer, range(8), workers=workers, train=train), whole))
    tail = make(tokenizer, range(5, 8), workers=workers, train=train)
    assert len(tail) == 3 and all(map(same, tail, whole[5:]))
    picked = make(tokenizer, iter([6, 2]), workers=workers, train=train)
    assert same(picked[0], whole[6]) and same(picked[1], whole[2])
    first = make(tokenizer, range(8), workers=workers, rows=slice(0, 2), train=train)
    second = make(tokenizer, range(8), workers=workers, rows=slice(2, 6), train=train)
    for a, b, batch in zip(first, second, whole, strict=True):
        assert same((np.concatenate(parts) for parts in zip(a, b, strict=True)), batch)
    assert whole[0].images.dtype == np.uint8 and whole[0].images.shape == (6, 24, 24, 3)
    assert train == (not same(make(tokenizer, range(1), seed=4, train=train)[0], whole[0]))


class Few:
    """Seven one-colour examples with two captions each."""

    classes, fingerprint = None, "few"

    def __len__(self):
        return 7

    def __getitem__(self, index):
        from clip.data.split import Example

        return Example(Image.new("RGB", (9, 9), (index, 0, 0)), self.captions(index), str(index))

    def captions(self, index):
        return (f"one {index}", f"two {index}")

    def label(self, index):
        return None


def test_an_epoch_has_each_image_once_and_draws_captions_anew(tokenizer):
    made = make(tokenizer, range(70), split=Few())
    order = np.concatenate([batch.images[:, 0, 0, 0] for batch in made]).reshape(-1, 7)
    assert (np.sort(order) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in order}) > 50
    texts = [
        tokenizer.decode(row[:end].tolist())
        for batch in made
        for row, end in zip(batch.tokens, batch.ends, strict=True)
    ]
    assert [text.split()[1] for text in texts] == [str(i) for i in order.ravel()]
    drawn = sum(text.startswith("one") for text in texts)
    assert 170 < drawn < 250
    plain = make(tokenizer, range(2), split=Few(), train=False)
    assert np.concatenate([batch.images[:, 0, 0, 0] for batch in plain]).tolist() == [*range(7), *range(5)]


def test_a_batch_of_more_than_all_images_is_pointed_out(tokenizer, caplog):
    config = DataConfig(batch_size=1)
    for size, train in ((7, True), (8, False), (8, True)):
        assert not caplog.messages
        options = {"size": 9, "length": 12, "numbers": range(1), "seed": 0, "batch_size": size}
        (batch,) = batches(Few(), tokenizer, config, **options, train=train)
        assert len(batch.images) == size
    assert caplog.record_tuples[0][1:] == (
        logging.WARNING,
        "data.batch_size (8) is more than the 7 images to train on, so that a batch has an image twice and "
        "tells it from itself: lower it",
    )


def test_closing_ends_the_threads(tokenizer):
    config = DataConfig(batch_size=6, workers=3)
    made = batches(SCENES, tokenizer, config, size=32, length=12, numbers=range(10**12), seed=0)
    next(made)
    assert any("grain" in thread.name for thread in threading.enumerate())
    made.close()
    for thread in threading.enumerate():
        if "grain" in thread.name:
            thread.join(5)
            assert not thread.is_alive()
    assert make(tokenizer, ()) == []


def test_captions_are_cut_and_their_end_kept(tokenizer, monkeypatch):
    captions = ["a red six", "", "a red six over a blue two " * 9]
    tokens, ends = encode_captions(tokenizer, captions, 12)
    assert tokens.shape == (3, 12) and tokens.dtype == ends.dtype == np.int32
    for row, end, caption in zip(tokens, ends, captions, strict=True):
        assert (row[end:] == tokenizer.eos_id).all() and (row[:end] != tokenizer.eos_id).all()
        assert caption.startswith(tokenizer.decode(row[:end].tolist()))
    assert ends.tolist()[1:] == [0, 11] and tokenizer.decode(tokens[0][: ends[0]].tolist()) == captions[0]
    assert encode_captions(tokenizer, ["<|end_of_text|> x"], 12)[1][0] > 3  # text, not control
    cut, total, longest = count_cut(Few(), tokenizer, 3)
    assert (cut, total) == (14, 14) and longest > 3
    assert count_cut(Few(), tokenizer, longest)[0] == 0
    monkeypatch.setattr("clip.data.captions.COUNTED", 3)
    assert 0 < count_cut(Few(), tokenizer, 3)[1] < 14


def test_a_vocabulary_too_large_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"tokenizer\.vocab_size \(4000\) is larger than this corpus supports"
    ):
        caption_tokenizer(
            SCENES, tmp_path, path=None, vocab_size=4000, pattern="llama3", name="tokenizer.vocab_size"
        )


def test_the_embedded_split_of_a_run(tmp_path):
    runs = [open_splits(DataConfig(batch_size=2), seed, tmp_path) for seed in (0, 1)]
    assert runs[0].train[0] != runs[1].train[0]
    assert runs[0].heldout[0] == runs[1].heldout[0]
    assert not list(tmp_path.iterdir())
