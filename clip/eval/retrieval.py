"""Retrieval: which caption belongs to an image, and which image to a caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

RECALLS = (1, 5, 10)
TIE = 1e-6  # similarities closer than this are equal: in float32 the order of a sum would decide between them


class Pool(NamedTuple):
    """The captions that are searched, each text once, and the pairs that belong together.

    Attributes:
        captions: the M texts.
        images, texts: [P] the image and the caption of each pair that belongs together, each pair once.
    """

    captions: list[str]
    images: Int[np.ndarray, " P"]
    texts: Int[np.ndarray, " P"]


class Ranks(NamedTuple):
    """How many that don't belong come before the best one that does, 0 being a hit at the first place.

    Attributes:
        image_to_text: [N] captions of others before the best of an image's own.
        text_to_image: [M] images of others before the best of a caption's own.
    """

    image_to_text: Int[np.ndarray, " N"]
    text_to_image: Int[np.ndarray, " M"]


def pool(captions: Sequence[Sequence[str]]) -> Pool:
    """The pool of the captions of N images, at least one each.

    A text that stands at several images, or twice at one, is one caption that belongs to each of them: who
    finds it for the one has found it for the other, and nobody could tell them apart.
    """
    numbers: dict[str, int] = {}
    pairs = {
        (i, numbers.setdefault(text, len(numbers))): None for i, own in enumerate(captions) for text in own
    }
    images, texts = np.array([*pairs], np.int64).reshape(-1, 2).T
    return Pool([*numbers], images, texts)


def ranks(
    images: Float[np.ndarray, "N E"], texts: Float[np.ndarray, "M E"], pool: Pool, chunk: int = 1024
) -> Ranks:
    """The ranks of N images and M captions among each other, `chunk` rows of the similarity matrix at a time.

    Ties count against the model: what is as similar as the one that belongs comes before it, so a model that
    gives everything one embedding finds nothing.

    Args:
        images, texts: embeddings of unit length.
    """
    return Ranks(
        _ranks(images, texts, pool.images, pool.texts, chunk),
        _ranks(texts, images, pool.texts, pool.images, chunk),
    )


def recalls(ranks: Ranks) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways: the share of queries with one of their own among the first k."""
    ways = {"image_to_text": ranks.image_to_text, "text_to_image": ranks.text_to_image}
    return {f"{way}_recall_at_{k}": float((rank < k).mean()) for way, rank in ways.items() for k in RECALLS}


def chance(pool: Pool, count: int) -> dict[str, float]:
    """What `recalls` of an order drawn at random would be, on average; `count` is the number of images.

    A query with r of n that belong misses at k with probability C(n - r, k) / C(n, k).
    """
    sizes = {"image_to_text": (pool.images, count, len(pool.captions))}
    sizes["text_to_image"] = (pool.texts, len(pool.captions), count)
    figures = {}
    for way, (queries, number, candidates) in sizes.items():
        own = np.bincount(queries, minlength=number)
        for k in RECALLS:
            drawn = np.arange(min(k, candidates))[:, None]
            misses = np.maximum(candidates - own - drawn, 0) / (candidates - drawn)
            figures[f"{way}_recall_at_{k}"] = float((1 - misses.prod(axis=0)).mean())
    return figures


def _ranks(
    queries: Float[np.ndarray, "N E"],
    candidates: Float[np.ndarray, "M E"],
    rows: Int[np.ndarray, " P"],
    columns: Int[np.ndarray, " P"],
    chunk: int,
) -> Int[np.ndarray, " N"]:
    found = [
        _ranks_of(queries[start : start + chunk] @ candidates.T, _own(start, chunk, rows, columns))
        for start in range(0, len(queries), chunk)
    ]
    return np.concatenate(found)


def _own(start: int, chunk: int, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of rows from `start` on, counted from there."""
    here = (rows >= start) & (rows < start + chunk)
    return rows[here] - start, columns[here]


def _ranks_of(
    similarity: Float[np.ndarray, "n M"], own: tuple[np.ndarray, np.ndarray]
) -> Int[np.ndarray, " n"]:
    best = np.full(len(similarity), -np.inf, similarity.dtype)
    np.maximum.at(best, own[0], similarity[own])
    before: Bool[np.ndarray, "n M"] = similarity >= best[:, None] - TIE
    before[own] = False
    return before.sum(axis=1)
