"""What of a measured split is shown: some hits and misses, a batch of pairs, both towers in the plane."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from clip.data.images import center_crop
from clip.data.split import Split
from clip.eval.heldout import Measured
from clip.eval.pictures import Case
from clip.eval.towers import tsne
from clip.eval.zero_shot import probabilities
from core.module import Params

MOST = 1000  # images in the plane
GROUPS = 20  # colors that can be told apart


def cases(
    split: Split, measured: Measured, params: Params, size: int, each: int = 6, choices: int = 3
) -> list[Case]:
    """Some hits and misses, the same ones each time: of zero-shot classification where there are
    classes, else of captions for an image.
    """
    places, truths, options, candidates = _questions(split, measured)
    bias = params.get("logit_bias")
    scale = float(np.exp(np.asarray(params["logit_scale"])))
    likely = probabilities(measured.images[places], candidates, scale, None if bias is None else float(bias))
    made = []
    hit = np.array([likely[row].argmax() in truth for row, truth in enumerate(truths)], bool)
    for wanted in (True, False):
        for row in np.flatnonzero(hit == wanted)[:each].tolist():
            order = np.argsort(-likely[row], kind="stable")
            truth = next(int(i) for i in order if i in truths[row])
            top = [(options[i], float(likely[row, i])) for i in order[:choices]]
            made.append(Case(_image(split, measured, int(places[row]), size), options[truth], top))
    return made


def _questions(split: Split, measured: Measured):
    """Places of images; the right answers of each, as numbers; all answers and their embeddings."""
    if split.classes is not None and measured.classes is not None and len(measured.labelled):
        truths = [{int(label)} for label in measured.labels[measured.labelled]]
        return measured.labelled, truths, list(split.classes.names), measured.classes
    truths = [set() for _ in measured.images]
    for image, text in zip(measured.pool.images.tolist(), measured.pool.texts.tolist(), strict=True):
        truths[image].add(text)
    return np.arange(len(truths)), truths, measured.pool.captions, measured.texts


def similar(
    split: Split, measured: Measured, size: int, count: int = 10
) -> tuple[list[UInt8[np.ndarray, "H W 3"]], list[str], Float[np.ndarray, "N N"]]:
    """Images and captions of some pairs, and the similarity of each caption (a row) to each image."""
    chosen: dict[int, int] = {}  # image by caption
    for image, text in zip(measured.pool.images.tolist(), measured.pool.texts.tolist(), strict=True):
        if len(chosen) < count and text not in chosen and image not in chosen.values():
            chosen[text] = image
    images, texts = [*chosen.values()], [*chosen]
    pictures = [_image(split, measured, image, size) for image in images]
    captions = [measured.pool.captions[text] for text in texts]
    return pictures, captions, measured.texts[texts] @ measured.images[images].T


def towers(
    split: Split, measured: Measured
) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, "M 2"], list[str], list[str]]:
    """Both towers in the plane, and the group of each image and text: its class, or the last word of many
    classes' names, which in scenes is the digit.
    """
    if split.classes is None or measured.classes is None or not len(measured.labelled):
        images, texts = measured.images[:MOST], measured.texts[:MOST]
        groups = ["a pair"] * len(images), ["a pair"] * len(texts)
    else:
        places = measured.labelled[:MOST]
        images, texts = measured.images[places], measured.classes
        names = _grouped(split.classes.names)
        groups = [names[label] for label in measured.labels[places]], names
    return *tsne(images, texts), *groups


def _grouped(names: tuple[str, ...]) -> list[str]:
    for grouped in (list(names), [name.split()[-1] for name in names]):
        if len(set(grouped)) <= GROUPS:
            return grouped
    return ["a class"] * len(names)


def _image(split: Split, measured: Measured, place: int, size: int) -> UInt8[np.ndarray, "H W 3"]:
    return center_crop(split[int(measured.indices[place])].image, size)
