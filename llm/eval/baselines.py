"""What text costs without a neural network: the figures that a language model has to beat."""

from __future__ import annotations

import gzip
import lzma
import math

import numpy as np


def baselines(heldout: bytes, train_counts: np.ndarray, heldout_counts: np.ndarray) -> dict[str, float]:
    """Bits per byte of the held-out text under gzip, xz and a unigram model over tokens.

    Args:
        heldout: the held-out documents, concatenated; the compressors see them as one file.
        train_counts: [V] how often each token is predicted in the training split.
        heldout_counts: [V] the same of `heldout`.

    The unigram model is fitted on the training split, one added to each count (Laplace's rule).
    """
    probabilities = (train_counts + 1) / (train_counts + 1).sum()
    nats = -(heldout_counts * np.log(probabilities)).sum()
    size = len(heldout)
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(heldout, 9)) / size,
        "xz_bits_per_byte": 8 * len(lzma.compress(heldout, preset=9 | lzma.PRESET_EXTREME)) / size,
        "unigram_bits_per_byte": nats / math.log(2) / size,
    }
