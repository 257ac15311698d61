"""Zero-shot classification: an image's class is the one whose description is most similar to it.

Radford et al. 2021 (arXiv:2103.00020), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from clip.eval.retrieval import TIE


@dataclass(frozen=True)
class Classification:
    """What N images of C classes were taken for.

    Attributes:
        labels: the class of each image.
        ranks: how many other classes are at least as similar to it as its own; 0 is a hit.
        predicted: the most similar class; where another ties with the own one, the other.
        num_classes: C.
    """

    labels: Int[np.ndarray, " N"]
    ranks: Int[np.ndarray, " N"]
    predicted: Int[np.ndarray, " N"]
    num_classes: int

    @property
    def hits(self) -> int:
        return int((self.ranks == 0).sum())

    @property
    def accuracy(self) -> float:
        return self.top(1)

    def top(self, k: int) -> float:
        """The share of images whose own class is among the k most similar."""
        return float((self.ranks < k).mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson(self.hits, len(self.labels))

    @property
    def counts(self) -> Int[np.ndarray, " C"]:
        """Images of each class."""
        return np.bincount(self.labels, minlength=self.num_classes)

    @property
    def per_class(self) -> Float[np.ndarray, " C"]:
        """The accuracy in each class; NaN in one without images."""
        hits = np.bincount(self.labels[self.ranks == 0], minlength=self.num_classes)
        return np.divide(hits, self.counts, out=np.full(self.num_classes, np.nan), where=self.counts > 0)

    @property
    def confusion(self) -> Int[np.ndarray, "C C"]:
        """Images by their class (rows) and what they were taken for (columns)."""
        pairs = self.labels * self.num_classes + self.predicted
        shape = (self.num_classes, self.num_classes)
        return np.bincount(pairs, minlength=math.prod(shape)).reshape(shape)

    def chance(self, k: int = 1) -> float:
        """`top(k)` of guessing."""
        return min(k, self.num_classes) / self.num_classes

    def majority(self, k: int = 1) -> float:
        """`top(k)` of always naming the k most frequent classes, which takes knowing which these are."""
        return float(np.sort(self.counts)[::-1][:k].sum() / len(self.labels))


def class_embeddings(
    embed: Callable[[Sequence[str]], Float[np.ndarray, "T E"]], prompts: Sequence[Sequence[str]]
) -> Float[np.ndarray, "C E"]:
    """An embedding a class: those of its prompts averaged, at unit length before and after.

    Args:
        embed: gives texts embeddings.
        prompts: of each class, as many as of any other.
    """
    each = embed([prompt for own in prompts for prompt in own])
    return _unit(_unit(each.reshape(len(prompts), len(prompts[0]), -1)).mean(axis=1))


def classify(
    images: Float[np.ndarray, "N E"], classes: Float[np.ndarray, "C E"], labels: Int[np.ndarray, " N"]
) -> Classification:
    """Take each image for the class most similar to it. Ties count against the model."""
    similarity, rows = images @ classes.T, np.arange(len(images))
    own = similarity[rows, labels]
    similarity[rows, labels] = -np.inf
    ranks = (similarity >= own[:, None] - TIE).sum(axis=1)
    predicted = np.where(ranks == 0, labels, similarity.argmax(axis=1))
    return Classification(labels, ranks, predicted, len(classes))


def probabilities(
    images: Float[np.ndarray, "N E"],
    texts: Float[np.ndarray, "C E"],
    scale: float,
    bias: float | None = None,
) -> Float[np.ndarray, "N C"]:
    """How probable each text is for each image, as the model was trained to say it.

    Without a bias the softmax over the texts, which sums to one: the share of each among them. With one, the
    sigmoid of SigLIP (Zhai et al. 2023, arXiv:2303.15343): whether the text fits, each by itself.

    Args:
        scale: what similarities are multiplied by; `exp` of the parameter.
    """
    logits = scale * (images @ texts.T).astype(np.float64)
    if bias is not None:
        return 1 / (1 + np.exp(-np.clip(logits + bias, -500, 500)))
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share: right also near 0 and 1, and for few."""
    share = hits / count
    center = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, (center - spread) / (1 + z**2 / count)), min(1.0, (center + spread) / (1 + z**2 / count))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
