"""The embedded scenes: what they show is what is said of them, and held-out pairs stay held out."""

from __future__ import annotations

import colorsys
import re
from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from clip.data.config import DataConfig, Source
from clip.data.scenes import COLOURS, DIGITS, HELDOUT, NAMES, PAIRS, Scenes, digits
from core.config import to_dict

TRAIN, HELD = Scenes(0, heldout=False), Scenes(0, heldout=True)
HELD_NAMES = {name for name, held in zip(NAMES, HELDOUT, strict=True) if held}


def pairs_in(caption: str) -> list[str]:
    return re.findall(rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(DIGITS)})", caption)


def test_no_training_caption_has_a_held_out_pair_and_every_word_is_seen():
    seen = Counter(pair for i in range(20_000) for pair in pairs_in(TRAIN.captions(i)[0]))
    assert not HELD_NAMES & seen.keys()
    assert seen.keys() == set(NAMES) - HELD_NAMES
    assert {pair.split()[0] for pair in seen} == set(COLOURS)
    assert {pair.split()[1] for pair in seen} == set(DIGITS)
    assert max(seen.values()) < 1.3 * min(seen.values())


def test_a_fifth_is_held_out_two_digits_a_colour_and_one_or_two_colours_a_digit():
    held = [pair for pair, out in zip(PAIRS, HELDOUT, strict=True) if out]
    assert len(held) * 5 == len(PAIRS)
    assert set(Counter(colour for colour, _ in held).values()) == {2}
    assert set(Counter(digit for _, digit in held).values()) == {1, 2}


def test_each_held_out_scene_has_a_held_out_pair_and_single_ones_are_balanced():
    for i in range(len(HELD)):
        named = pairs_in(HELD.captions(i)[0])
        assert HELD_NAMES & set(named) and len(set(named)) == len(named) == 1 + i % 2
    labels = Counter(HELD.label(i) for i in range(len(HELD)))
    alone = [labels[k] for k, out in enumerate(HELDOUT) if out]
    assert labels[None] == 1000 and sum(alone) == 1000 and max(alone) - min(alone) <= 1


def test_digits_of_both_sides_are_the_set_cut_in_two():
    images = [np.concatenate(digits(side)) for side in (False, True)]
    assert [len(side) for side in images] == [1437, 360]
    whole = np.minimum(load_digits().images * 16, 255).astype(np.uint8)
    as_bytes = [Counter(image.tobytes() for image in part) for part in (*images, whole)]
    assert as_bytes[0] + as_bytes[1] == as_bytes[2]
    assert not as_bytes[0].keys() & as_bytes[1].keys()


@pytest.mark.parametrize("split", [TRAIN, HELD])
def test_an_example_is_a_function_of_seed_side_and_number(split):
    again = Scenes(split.seed, split.heldout)
    forwards = [split[i] for i in range(20)]
    for i in reversed(range(20)):
        example = again[i]
        assert example == forwards[i] and example.captions == split.captions(i)
        assert example.label == split.label(i)
        assert example.image.size == (32, 32) and example.image.mode == "RGB"
    assert Scenes(1, split.heldout)[0] != forwards[0]
    assert len({example.image.tobytes() for example in forwards}) == 20
    with pytest.raises(IndexError):
        split[len(split)]


def test_pictures_show_the_colour_of_their_caption():
    """The brightest, most coloured pixels against the colour wheel: a reader that knows no caption."""
    hits = total = 0
    wheel = {name: colorsys.rgb_to_hsv(*(v / 255 for v in rgb)) for name, rgb in COLOURS.items()}
    for i in range(0, 400, 2):
        example = TRAIN[i]
        pixels = np.asarray(example.image).reshape(-1, 3).astype(float)
        ink = pixels[np.argsort(pixels.max(1))[-25:]].mean(0) / 255
        hue, saturation, _ = colorsys.rgb_to_hsv(*ink)
        near = min(wheel, key=lambda n: abs((hue - wheel[n][0] + 0.5) % 1 - 0.5) if n != "white" else 9)
        hits += ("white" if saturation < 0.2 else near) in example.captions[0]
        total += 1
    assert hits > 0.95 * total


def test_the_first_of_two_is_where_the_caption_says():
    """A white digit beside one of another colour: where the white pixels are."""
    sides = {
        "above": (0, -1),
        "over": (0, -1),
        "below": (0, 1),
        "under": (0, 1),
        "left": (1, -1),
        "right": (1, 1),
    }
    checked = 0
    for i in range(1, 3000, 2):
        caption = TRAIN.captions(i)[0]
        colours = [pair.split()[0] for pair in pairs_in(caption)]
        if colours.count("white") != 1 or {"yellow", "cyan"} & set(colours):
            continue
        axis, sign = next(where for word, where in sides.items() if word in caption)
        sign *= 1 if colours[0] == "white" else -1
        whiteness = np.asarray(TRAIN[i].image).min(2).astype(float)
        place = np.argwhere(whiteness > 120)
        if len(place) < 8:
            continue
        assert np.sign(place[:, axis].mean() - 15.5) == sign, caption
        checked += 1
    assert checked > 150


def test_embedded_stands_alone():
    assert to_dict(DataConfig(batch_size=1))["sources"] == ["embedded"]
    with pytest.raises(ValueError, match="brings its own held-out split"):
        DataConfig(batch_size=1, heldout=(Source(classes="a"),))
    with pytest.raises(ValueError, match="goes with itself alone"):
        DataConfig(batch_size=1, sources=(Source(classes="a"),), heldout=(Source(embedded=True),))
