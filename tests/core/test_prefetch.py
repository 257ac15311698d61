"""The prefetcher: the same items, ahead of time; errors arrive; nothing is left running."""

from __future__ import annotations

import threading
import time

import pytest

from core.prefetch import prefetch


def test_the_items_are_the_same():
    assert list(prefetch(range(100), 3)) == list(range(100))
    assert list(prefetch([], 3)) == []
    assert list(prefetch([None, None])) == [None, None]


def test_items_are_made_ahead_but_not_without_bound():
    made = []

    def items():
        for i in range(10):
            made.append(i)
            yield i

    ahead = prefetch(items(), 3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    ahead.close()


def test_an_error_comes_where_its_item_would_have():
    def items():
        yield 1
        raise ValueError("no more")

    ahead = prefetch(items(), 4)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="no more"):
        next(ahead)


@pytest.mark.parametrize("stop", ["close", "break"])
def test_no_thread_outlives_its_use(stop):
    before = threading.active_count()
    ahead = prefetch(iter(int, 1), 2)  # endless
    if stop == "close":
        next(ahead)
        ahead.close()
    else:
        for _ in ahead:
            break
        del ahead
    assert threading.active_count() == before
