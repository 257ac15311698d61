"""Byte-pair merges, learned from counted words with NumPy alone.

The distinct words lie end to end in flat arrays. Each step merges the most frequent pair of adjacent tokens,
all its occurrences at once. What makes that fast without a compiled extension:

- A pair is born in one step, when the newer of its two tokens is, and from then on only loses occurrences. So
  its positions are written down once, for all pairs of a step in one vectorized pass over that step's
  positions.
- A count therefore only falls. The queue holds the last count seen; when a pair reaches its head, the pair's
  own positions are filtered and counted, and it goes back down unless the count still holds. The counts of
  pairs that never reach the head aren't kept up to date, and the corpus is never scanned again.
- Most pairs are rare and will never be merged. They wait in arrays, outside the queue, until nothing in it is
  more frequent.

Equal counts are decided by the smaller pair of ids, left id first. A run such as `aaaa` counts `aa` three
times and is merged from the left, into `aa` `aa`. The trainer of the `tokenizers` package does the same with
the same order of ids, so its merges are the same, ties included. They would differ where a pair occurs more
than 2^31 times: its counts are 32-bit integers, these 64-bit.

No token is made twice. Wherever the bytes of a token come to stand as two whole tokens, every merge so far
happened inside them, and so has happened in the same way wherever else they stand like that; the step that
first makes the token makes it in all those places. Hence each merge is a new token, and its id says its rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

import numpy as np

from core.errors import UserError
from llm.tokenizer.bpe import BYTE_ORDER

_NONE = -1  # between words, and where a token was merged into the one before it
_REFILL = 4096  # waiting pairs that enter the queue at a time, about
_REPORT = 100  # merges between two calls of `update`
_LOW = 0xFFFF_FFFF


def learn_merges(
    counts: Mapping[str, int], limit: int, update: Callable[[int], None] = lambda merges: None
) -> list[tuple[int, int]]:
    """Up to `limit` merges, as pairs of ids, in the order learned; fewer if no pair is left.

    The ids are those of `BPE`: the 256 bytes in `BYTE_ORDER`, then each merge's.

    Args:
        counts: words and how often each occurs.
        update: called now and then with the number of merges so far.
    """
    words = _Words(counts)
    queue = _Queue(words)
    merges: list[tuple[int, int]] = []
    while len(merges) < limit and (found := queue.pop()):
        left, right, positions = found
        token = len(BYTE_ORDER) + len(merges)
        merges.append((left, right))
        queue.add_neighbors(token, words.merge(left, right, positions, token))
        if len(merges) % _REPORT == 0:
            update(len(merges))
    update(len(merges))
    return merges


class _Words:
    """All words end to end: the token at each position, its neighbors, and its word's count.

    A token stands at its first byte. `following` and `preceding` lead to the neighbors; between two words is
    one empty position.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        encoded = [word.encode("utf-8", "surrogateescape") for word in counts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) + 1
        size = int(lengths.sum()) + 1
        if size >= 2**31:
            raise UserError(
                f"the corpus has {len(counts):,} distinct words of {size:,} bytes, more than 2^31 bytes: "
                "train on a sample of it"
            )
        byte_id = np.empty(256, np.int32)
        byte_id[np.frombuffer(BYTE_ORDER, np.uint8)] = np.arange(256)
        joined = b"".join((b"\0", *(part for word in encoded for part in (word, b"\0"))))
        self.tokens = byte_id[np.frombuffer(joined, np.uint8)]
        self.tokens[0] = self.tokens[np.cumsum(lengths)] = _NONE
        self.following = np.arange(
            1, size + 1, dtype=np.int64
        )  # int32 would save memory, and cost a cast a use
        self.preceding = np.arange(-1, size - 1, dtype=np.int64)
        self.weights = np.zeros(size, np.int64)
        self.weights[1:] = np.repeat(np.fromiter(counts.values(), np.int64, len(counts)), lengths)

    def where(self, left: int, right: int, positions: np.ndarray) -> np.ndarray:
        """Those of `positions` at which the pair still stands."""
        positions = positions[self.tokens[positions] == left]
        return positions[self.tokens[self.following[positions]] == right]

    def merge(self, left: int, right: int, positions: np.ndarray, merged: int) -> np.ndarray:
        """Put `merged` in place of the pair at the sorted `positions`; returns where it now stands."""
        if left == right:
            positions = self._from_the_left(positions)
        absorbed = self.following[positions]
        after = self.following[absorbed]
        self.tokens[positions] = merged
        self.tokens[absorbed] = _NONE
        self.following[positions] = after
        self.preceding[after] = positions
        return positions

    def _from_the_left(self, positions: np.ndarray) -> np.ndarray:
        """Of the overlapping pairs in each run of one token the first, the third, and so on."""
        index = np.arange(len(positions))
        begins = np.ones(len(positions), bool)
        begins[1:] = positions[1:] != self.following[positions[:-1]]
        return positions[(index - np.maximum.accumulate(np.where(begins, index, 0))) % 2 == 0]


class _Queue:
    """Pairs by falling count, then rising ids, with their sorted positions, stretches of one long array."""

    def __init__(self, words: _Words) -> None:
        self._words = words
        # One for each initial pair and two for each merged occurrence, and both are fewer than the positions.
        # The operating system gives only the part that is written to.
        self._positions = np.empty(3 * len(words.tokens), np.int64)
        self._end = 0
        self._heap: list[tuple[int, int, int, int]] = []  # -count, pair, start, end
        self._waiting: list[np.ndarray] = []  # rows of the same, all less frequent than the threshold
        self._threshold = np.iinfo(np.int64).max
        at = ((words.tokens[:-1] != _NONE) & (words.tokens[1:] != _NONE)).nonzero()[0]
        left, right = words.tokens[at].astype(np.int64), words.tokens[at + 1]
        keys, at = _sort((left << 8) | right, at)
        self._add((keys >> 8 << 32) | (keys & 0xFF), at)

    def pop(self) -> tuple[int, int, np.ndarray] | None:
        """The most frequent pair of all and its positions; None if there is none left."""
        while True:
            if not self._heap or -self._heap[0][0] < self._threshold:
                self._refill()
                if not self._heap:
                    return None
            count, pair, start, end = self._heap[0]
            left, right = pair >> 32, pair & _LOW
            positions = self._words.where(left, right, self._positions[start:end])
            now = -int(self._words.weights[positions].sum())
            if now == count:
                heapq.heappop(self._heap)
                return left, right, positions
            if now:
                end = start + len(positions)
                self._positions[start:end] = positions
                heapq.heapreplace(self._heap, (now, pair, start, end))
            else:
                heapq.heappop(self._heap)

    def add_neighbors(self, token: int, positions: np.ndarray) -> None:
        """Add the pairs that the new `token` forms at its `positions`."""
        words = self._words
        before, after = words.preceding[positions], words.following[positions]
        left, right = words.tokens[before], words.tokens[after]
        # Where the token stands beside itself, the pair has been seen from its left side.
        lefts = ((left != _NONE) & (left != token)).nonzero()[0]
        rights = (right != _NONE).nonzero()[0]
        others = np.concatenate((left[lefts], right[rights])).astype(np.int64) << 1
        others[len(lefts) :] |= 1
        keys, at = _sort(others, np.concatenate((before[lefts], positions[rights])))
        others = keys >> 1
        self._add(np.where(keys & 1, (token << 32) | others, (others << 32) | token), at)

    def _add(self, pairs: np.ndarray, positions: np.ndarray) -> None:
        """Add pairs, each as often as it occurs, equals adjacent; `positions` say where."""
        if not len(pairs):
            return
        begin = self._end
        self._end += len(pairs)
        self._positions[begin : self._end] = positions
        first = np.concatenate(([True], pairs[1:] != pairs[:-1])).nonzero()[0]
        rows = np.empty((len(first), 4), np.int64)
        np.negative(np.add.reduceat(self._words.weights[positions], first), out=rows[:, 0])
        rows[:, 1] = pairs[first]
        rows[:, 2] = begin + first
        rows[:-1, 3] = rows[1:, 2]
        rows[-1, 3] = self._end
        frequent = rows[:, 0] <= -self._threshold
        for row in rows[frequent].tolist():
            heapq.heappush(self._heap, tuple(row))
        if not frequent.all():
            self._waiting.append(rows[~frequent])

    def _refill(self) -> None:
        """Lower the threshold so that some thousands of the waiting pairs enter the queue."""
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting)
        counts = -rows[:, 0]
        nth = max(0, len(counts) - _REFILL)
        self._threshold = int(np.partition(counts, nth)[nth])
        frequent = counts >= self._threshold
        self._heap += map(tuple, rows[frequent].tolist())
        heapq.heapify(self._heap)
        rest = rows[~frequent]
        self._waiting = [rest] if len(rest) else []


def _sort(keys: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays, sorted by key, then by position. Keys and positions are below 2^31."""
    packed = (keys << 32) | positions
    packed.sort()
    return packed >> 32, packed & _LOW
