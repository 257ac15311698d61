"""Which dataset of a mixture each training window comes from: computed, not stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def deal(
    slot: NDArray[np.int64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The dataset of each slot 0, 1, 2, ... of a run, and how many slots before it went to the same one.

    The datasets are halved until one is left. Of the first n slots that reach a group of them, the nearest
    integer to n times its share goes to the first half. So before any slot, every dataset has had its weight
    of the slots to within half a window for each halving: one window where there are up to four datasets.
    Neighboring slots alternate as evenly, which makes batches more alike than independent draws would.

    Args:
        slot: [N].
        weights: [M], positive; their ratios count.
    """
    place = slot.copy()
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    low, high = np.zeros_like(slot), np.full_like(slot, len(weights))
    while np.any(high - low > 1):
        middle = (low + high) // 2  # `low` where one dataset is left: nothing more moves
        share = (sums[middle] - sums[low]) / (sums[high] - sums[low])
        before = np.floor(place * share + 0.5).astype(slot.dtype)
        first = np.floor((place + 1) * share + 0.5) > before
        place = np.where(first, before, place - before)
        low, high = np.where(first, low, middle), np.where(first, middle, high)
    return low, place
