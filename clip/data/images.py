"""Encoded bytes to pixels: decoding, what training does to an image, and what evaluation does."""

from __future__ import annotations

import errno
import io
import math
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

LARGEST_PIXELS = 100_000_000  # a larger image is taken for an attack or a mistake
_WIDEST = 4 / 3  # width to height of a random crop, as in torchvision; its inverse is the narrowest
_TRIES = 10
_LONGEST_SIDE = 100  # times the other, which is scaled to the size of the model's images
# Errors of the machine, its disk or its network, not of the file that was to be read.
_PASSING = {
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT,
    errno.ENOTCONN, errno.EHOSTDOWN,
}  # fmt: skip


class BrokenImage(Exception):
    """Bytes that are no image that can be used. The message is the reason."""


class Unread(BrokenImage):
    """Bytes that may be read the next time."""


def unread(error: Exception, reason: str) -> BrokenImage:
    """What is to be raised where an error kept a file from being read."""
    return (Unread if getattr(error, "errno", None) in _PASSING else BrokenImage)(reason)


def decode(data: bytes) -> Image.Image:
    """The image in some encoded bytes, as a person sees it: upright, opaque (on white), RGB.

    Of an animation, the first frame; of 16 bits a channel, the upper 8.

    Raises:
        BrokenImage: for anything that can't be decoded whole.
    """
    if not data:
        raise BrokenImage("it has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are checked here
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > LARGEST_PIXELS:
                raise BrokenImage(f"{width} x {height} pixels are too many")
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    except BrokenImage:
        raise
    except Image.DecompressionBombError:
        raise BrokenImage("its pixels are too many") from None
    except Image.UnidentifiedImageError:
        raise BrokenImage("it is in no image format that Pillow knows") from None
    except Exception as error:  # as many kinds as there are decoders
        raise BrokenImage(str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def _as_rgb(image: Image.Image) -> Image.Image:
    if max(image.size) > _LONGEST_SIDE * min(image.size):
        raise BrokenImage(f"{image.width} x {image.height} pixels are a line, no picture")
    if image.mode.startswith("I"):  # which `convert` would clip at 255, not scale
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BrokenImage("its values are not of 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BrokenImage("its values are floating-point numbers, of no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def from_array(pixels: np.ndarray) -> Image.Image:
    """The RGB image of an array [H W], [H W 1], [H W 3] or [H W 4], of 8 or 16 bits.

    Raises:
        BrokenImage: for an array of another kind.
    """
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    shape = pixels.shape
    if (
        pixels.dtype != np.uint8
        or len(shape) not in (2, 3)
        or shape[2:] not in ((), (3,), (4,))
        or not pixels.size
    ):
        raise BrokenImage(f"an array of {pixels.dtype} {list(shape)} is no image")
    return _as_rgb(Image.fromarray(pixels))


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The square in the middle of the image after its shorter side became `size`: CLIP's processor.

    Bicubic, and rounded as `transformers.CLIPImageProcessor` rounds.
    """
    width, height = image.size
    if (width, height) != (size, size):
        short = min(width, height)
        width, height = (size if side == short else int(size * side / short) for side in (width, height))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def augment(
    image: Image.Image, size: int, crop_area: float | int, flip: bool, random: np.random.Generator
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A random rectangle of the image, stretched to a square: torchvision's `RandomResizedCrop`, bicubic.

    Args:
        crop_area: the least share of the area; 1 for `center_crop`.
        flip: whether half of all images are mirrored.
    """
    if crop_area < 1:
        box = _random_box(*image.size, crop_area, random)
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    else:
        pixels = center_crop(image, size)
    return pixels[:, ::-1] if flip and random.integers(2) else pixels


def _random_box(
    width: int, height: int, least: float | int, random: np.random.Generator
) -> tuple[int, int, int, int]:
    for _ in range(_TRIES):
        area = width * height * random.uniform(float(least), 1.0)
        ratio = _WIDEST ** random.uniform(-1.0, 1.0)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    # A long image: the middle, as near its own shape as the ratios allow.
    w, h = min(width, round(height * _WIDEST)), min(height, round(width * _WIDEST))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
