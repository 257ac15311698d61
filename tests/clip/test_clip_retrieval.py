"""Recall against its definition, counted pair by pair."""

from __future__ import annotations

import numpy as np
import pytest

from clip.eval.retrieval import RECALLS, TIE, chance, pool, ranks, recalls


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def by_definition(images, texts, captions, names):
    """Recalls, from all similarities in float64, one query at a time."""
    similarity = images.astype(np.float64) @ texts.astype(np.float64).T
    figures = {}
    for way, matrix in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        hits = dict.fromkeys(RECALLS, 0)
        for query, row in enumerate(matrix):
            if way == "image_to_text":
                own = [j for j, text in enumerate(names) if text in captions[query]]
            else:
                own = [i for i, texts_of in enumerate(captions) if names[query] in texts_of]
            best = max(row[j] for j in own)
            rank = sum(value >= best - TIE for j, value in enumerate(row) if j not in own)
            for k in RECALLS:
                hits[k] += rank < k
        figures |= {f"{way}_recall_at_{k}": hits[k] / len(matrix) for k in RECALLS}
    return figures


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_recall_is_that_of_the_definition(chunk):
    rng = np.random.default_rng(0)
    # Ragged: one to five captions an image, every fourth text at several images.
    captions = [
        [f"text {rng.integers(20)}" if rng.random() < 0.25 else f"{i} {j}" for j in range(rng.integers(1, 6))]
        for i in range(61)
    ]
    found = pool(captions)
    images = unit(rng, len(captions), 8)
    texts = unit(rng, len(found.captions), 8)
    texts[found.texts] += 0.8 * images[found.images]  # so that recall is neither 0 nor 1
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    figures = recalls(ranks(images, texts, found, chunk))
    assert figures == by_definition(images, texts, captions, found.captions)
    assert 0.1 < figures["image_to_text_recall_at_1"] < figures["text_to_image_recall_at_10"] < 1


def test_a_text_of_several_images_is_one_caption():
    found = pool([["a", "b", "a"], ["b"], ["c"]])
    assert found.captions == ["a", "b", "c"]
    assert [*zip(found.images.tolist(), found.texts.tolist(), strict=True)] == [
        (0, 0),
        (0, 1),
        (1, 1),
        (2, 2),
    ]
    perfect = np.eye(3, dtype=np.float32)
    texts = np.array([[1, 0, 0], [0.7, 0.7, 0], [0, 0, 1]], np.float32)
    assert set(recalls(ranks(perfect, texts, found)).values()) == {1.0}


@pytest.mark.parametrize("chunk", [3, 64])
def test_one_embedding_for_everything_finds_nothing(chunk):
    rng = np.random.default_rng(1)
    same = np.repeat(unit(rng, 1, 512), 40, axis=0)
    found = pool([[f"{i}"] for i in range(40)])
    assert set(recalls(ranks(same, same, found, chunk)).values()) == {0.0}


def test_chance_is_what_random_embeddings_reach():
    rng = np.random.default_rng(2)
    captions = [[f"{i} {j}" for j in range(1 + i % 5)] for i in range(30)]
    found = pool(captions)
    drawn = [recalls(ranks(unit(rng, 30, 64), unit(rng, len(found.captions), 64), found)) for _ in range(400)]
    for name, expected in chance(found, 30).items():
        assert np.mean([figures[name] for figures in drawn]) == pytest.approx(expected, abs=0.015), name


def test_chance_is_certain_where_there_are_no_more_than_k():
    assert chance(pool([["a"], ["b"]]), 2)["text_to_image_recall_at_5"] == 1.0
