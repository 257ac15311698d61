"""Zero-shot classification against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from clip.eval.zero_shot import (
    Classification,
    class_embeddings,
    classify,
    probabilities,
    wilson,
)


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_templates_are_averaged_at_unit_length_before_and_after():
    lengths = {"near cat": 5.0, "far cat": 1.0, "near dog": 1.0, "far dog": 1.0}
    directions = {"near cat": [1, 0], "far cat": [0, 1], "near dog": [1, 0], "far dog": [1, 0]}

    def embed(texts):
        return np.array([np.multiply(directions[text], lengths[text]) for text in texts], np.float32)

    classes = class_embeddings(embed, [["near cat", "far cat"], ["near dog", "far dog"]])
    np.testing.assert_allclose(classes, [[0.5**0.5, 0.5**0.5], [1, 0]], atol=1e-6)


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    classes, labels = unit(rng, 7, 6), rng.integers(0, 6, 200)  # none of the seventh
    images = classes[labels] + 1.2 * unit(rng, 200, 6)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    return images, classes, labels, classify(images, classes, labels)


def test_accuracy_is_that_of_sorting(drawn):
    images, classes, labels, result = drawn
    order = np.argsort(-(images.astype(np.float64) @ classes.T.astype(np.float64)), axis=1)
    for k in (1, 3, 5):
        assert result.top(k) == np.mean([label in row[:k] for label, row in zip(labels, order, strict=True)])
    assert 0.3 < result.accuracy < result.top(5) < 1
    np.testing.assert_array_equal(result.predicted, order[:, 0])
    for name in range(6):
        assert result.per_class[name] == np.mean(order[labels == name, 0] == name)
    assert np.isnan(result.per_class[6])


def test_the_confusion_matrix_has_the_accuracy_on_its_diagonal(drawn):
    *_, labels, result = drawn
    np.testing.assert_array_equal(result.confusion.sum(axis=1), np.bincount(labels, minlength=7))
    assert np.trace(result.confusion) == result.hits
    assert result.confusion[labels[0], result.predicted[0]] > 0


def test_baselines():
    result = Classification(np.array([0, 0, 0, 1, 2]), np.zeros(5, int), np.zeros(5, int), 4)
    assert (result.chance(), result.chance(5)) == (0.25, 1.0)
    assert (result.majority(), result.majority(2)) == (0.6, 0.8)


def test_ties_count_against_the_model():
    same = np.full((4, 512), 512**-0.5, np.float32)
    result = classify(same, same, np.array([0, 1, 2, 3]))
    assert result.top(1) == result.top(3) == 0
    assert result.top(4) == 1
    assert np.trace(result.confusion) == 0


def test_wilson_is_that_of_the_published_example():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_probabilities_are_those_that_the_loss_is_trained_on():
    rng = np.random.default_rng(3)
    images, texts = unit(rng, 5, 8), unit(rng, 4, 8)
    shares = probabilities(images, texts, 100.0)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    np.testing.assert_array_equal(shares.argmax(axis=1), (images @ texts.T).argmax(axis=1))
    fits = probabilities(images, texts, 10.0, -10.0)
    np.testing.assert_allclose(fits, 1 / (1 + np.exp(-(10.0 * (images @ texts.T) - 10.0))), rtol=1e-5)
