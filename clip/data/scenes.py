"""Small colour scenes of real handwritten digits, made on the fly: the data that needs no files.

A scene shows one or two digits of scikit-learn's bundled set (1,797 images of 8 x 8, from the UCI "Optical
Recognition of Handwritten Digits"), each in a colour, on a dark ground that no caption speaks of. Its
caption says what and where: "a red seven above a green two". A fifth of all pairs of a colour and a digit is
held out: training shows each colour and each digit, but never those together. In the held-out split each
scene shows at least one of them, alone or beside any other pair, in digits that training never draws with.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image

from clip.data.split import Classes, Example
from core.errors import UserError

SIZE = 32  # pixels, both ways
TRAIN_SCENES = 1_000_000  # an epoch, which runs of minutes never end
HELDOUT_SCENES = 2_000

COLOURS = {
    "red": (225, 30, 35),
    "orange": (245, 130, 20),
    "yellow": (240, 225, 45),
    "green": (40, 175, 60),
    "cyan": (60, 220, 230),
    "blue": (45, 80, 235),
    "purple": (165, 50, 215),
    "white": (240, 240, 240),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAIRS = tuple((colour, digit) for colour in range(len(COLOURS)) for digit in range(len(DIGITS)))
# Each colour lacks two digits, five apart; each digit lacks one colour or two.
HELDOUT = tuple(digit % 5 == colour % 5 for colour, digit in PAIRS)
NAMES = tuple(f"{list(COLOURS)[colour]} {DIGITS[digit]}" for colour, digit in PAIRS)

TEMPLATES = ("one {}", "a handwritten {}", "a picture of one {}")  # what zero-shot classification says
_SINGLE = (*TEMPLATES, "{a}", "a picture of {a}", "there is {a}")  # `{a}` is the name after its article
_ABOVE = (
    ("{first} above {second}", False), ("{first} over {second}", False),
    ("{first} below {second}", True), ("{first} under {second}", True),
)  # fmt: skip
_BESIDE = (
    ("{first} left of {second}", False), ("{first} to the left of {second}", False),
    ("{first} right of {second}", True), ("{first} to the right of {second}", True),
)  # fmt: skip
_TWO = ("", "", "a picture of ", "there is ")
_HELDOUT_IMAGES = 360  # the last fifth of the set, nearly all by other writers


class Plan(NamedTuple):
    """What a scene shows, before it is drawn."""

    pairs: tuple[int, ...]  # one or two of `PAIRS`; the first is above or left
    stacked: bool  # above each other, not beside
    caption: str
    random: np.random.Generator  # of which the drawing draws on


@dataclass(frozen=True)
class Scenes:
    """A split of scenes; example i depends on the seed, the side and i alone."""

    seed: int
    heldout: bool
    classes = Classes(NAMES, TEMPLATES, HELDOUT)

    @property
    def fingerprint(self) -> str:
        parts = ("scenes 1", self.seed, self.heldout)
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return HELDOUT_SCENES if self.heldout else TRAIN_SCENES

    def __getitem__(self, index: int) -> Example:
        plan = self._plan(index)
        image = Image.fromarray(_draw(plan, digits(self.heldout)))
        label = plan.pairs[0] if len(plan.pairs) == 1 else None
        return Example(image, (plan.caption,), f"scene {index}", label)

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._plan(index).caption,)

    def label(self, index: int) -> int | None:
        pairs = self._plan(index).pairs
        return pairs[0] if len(pairs) == 1 else None

    def _plan(self, index: int) -> Plan:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        random = np.random.Generator(np.random.Philox(key=(self.seed, 2 * index + self.heldout)))
        single = index % 2 == 0
        if self.heldout:  # in turn, so that each held-out pair stands alone equally often
            first = _HELD[index // 2 % len(_HELD)]
            others = tuple(range(len(PAIRS)))
        else:
            first = _SEEN[random.integers(len(_SEEN))]
            others = _SEEN
        pairs: tuple[int, ...] = (first,)
        if not single:  # another pair than the first
            second = random.integers(len(others) - 1)
            pairs = (first, others[second + (others[second] >= first)])
        if self.heldout and random.integers(2):
            pairs = pairs[::-1]
        stacked = bool(random.integers(2))
        return Plan(pairs, stacked, _caption(pairs, stacked, random), random)


_SEEN = tuple(pair for pair, held in enumerate(HELDOUT) if not held)
_HELD = tuple(pair for pair, held in enumerate(HELDOUT) if held)


def _caption(pairs: tuple[int, ...], stacked: bool, random: np.random.Generator) -> str:
    if len(pairs) == 1:
        return _fill(_SINGLE[random.integers(len(_SINGLE))], NAMES[pairs[0]])
    templates = _ABOVE if stacked else _BESIDE
    template, swapped = templates[random.integers(len(templates))]
    first, second = (_fill("{a}", NAMES[pair]) for pair in (pairs[::-1] if swapped else pairs))
    return _TWO[random.integers(len(_TWO))] + template.format(first=first, second=second)


def _fill(template: str, name: str) -> str:
    article = "an" if name[0] in "aeiou" else "a"
    return template.replace("{a}", f"{article} {name}").replace("{}", name)


@functools.cache
def digits(heldout: bool) -> tuple[UInt8[np.ndarray, "N 8 8"], ...]:
    """The handwritten images of one side, 0 to 255, by digit.

    Raises:
        UserError: where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the embedded scenes are made of scikit-learn's digits: pip install scikit-learn"
        ) from None
    bunch = load_digits()
    side = slice(-_HELDOUT_IMAGES, None) if heldout else slice(0, -_HELDOUT_IMAGES)
    images = np.minimum(bunch.images[side] * 16, 255).astype(np.uint8)
    return tuple(images[bunch.target[side] == digit] for digit in range(len(DIGITS)))


def _draw(plan: Plan, images: tuple[NDArray[np.uint8], ...]) -> UInt8[np.ndarray, "32 32 3"]:
    random = plan.random
    canvas = _ground(random)
    room = SIZE if len(plan.pairs) == 1 else SIZE // 2
    for place, pair in enumerate(plan.pairs):
        colour, digit = PAIRS[pair]
        size = int(random.integers(13, 25) if len(plan.pairs) == 1 else random.integers(12, 17))
        # Along the axis on which the two lie apart each keeps to its half; across it, anywhere.
        along, across = random.integers(room - size + 1) + place * room, random.integers(SIZE - size + 1)
        top, left = (along, across) if plan.stacked or len(plan.pairs) == 1 else (across, along)
        ink = Image.fromarray(images[digit][random.integers(len(images[digit]))])
        alpha = np.asarray(ink.resize((size, size), Image.Resampling.BICUBIC), np.float32)[..., None] / 255
        paint = np.array(list(COLOURS.values())[colour], np.float32) * random.uniform(0.75, 1.0)
        paint += random.uniform(-12, 12, 3).astype(np.float32)
        area = canvas[top : top + size, left : left + size]
        area += alpha * (paint - area)
    canvas += 4 * random.standard_normal(canvas.shape, np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _ground(random: np.random.Generator) -> Float[np.ndarray, "32 32 3"]:
    """A dark tint that changes over the picture."""
    corners = random.uniform(0, 75, (2, 1, 1, 3)).astype(np.float32)
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)
    ramp = ramp[:, None, None] if random.integers(2) else ramp[None, :, None]
    return np.ascontiguousarray(
        np.broadcast_to(corners[0] + ramp * (corners[1] - corners[0]), (SIZE, SIZE, 3))
    )
