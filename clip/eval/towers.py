"""How the embeddings of both towers lie to each other."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def modality_gap(images: Float[np.ndarray, "N E"], texts: Float[np.ndarray, "M E"]) -> float:
    """The distance between the means of the towers' embeddings, of unit length (Liang et al. 2022,
    arXiv:2203.02053): 0 where both fill the same space, at most 2.
    """
    return float(np.linalg.norm(images.mean(axis=0) - texts.mean(axis=0)))


def tsne(
    images: Float[np.ndarray, "N E"], texts: Float[np.ndarray, "M E"], seed: int = 0
) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, "M 2"]]:
    """t-SNE (van der Maaten & Hinton 2008) of both towers' embeddings together, into the plane.

    Neighbours stay neighbours; distances between far groups, and the sizes of groups, mean nothing.
    """
    from sklearn.manifold import TSNE

    both = np.concatenate([images, texts])
    plane = TSNE(perplexity=min(30, (len(both) - 1) / 3), init="pca", random_state=seed).fit_transform(both)
    return plane[: len(images)], plane[len(images) :]
