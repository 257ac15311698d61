"""Count the distinct pieces of a corpus on all cores, in memory that grows with them, not with the text."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from core.errors import UserError
from llm.tokenizer.patterns import cut_before, splitter

BATCH = 4_000_000  # characters counted at a time


def count_words(
    texts: Iterable[str],
    pattern: str,
    processes: int | None = None,
    update: Callable[[int], None] = lambda size: None,
) -> Counter[str]:
    """How often each piece of the split pattern occurs in all `texts`, which are read once.

    Texts longer than a batch are cut where no piece is changed, so only a few batches are held at a time.
    Worker processes are started only where there is enough text to repay them. They are spawned, never
    forked, so any thread or accelerator of the caller is left alone; a script that calls this needs the usual
    `if __name__ == "__main__":`.

    Args:
        processes: workers; None for one per core.
        update: called now and then with the number of bytes counted so far.
    """
    count = functools.partial(_count, pattern)
    processes = processes or os.cpu_count() or 1
    batches = _batches(texts)
    head = list(itertools.islice(batches, 3 if processes > 1 else 0))
    total: Counter[str] = Counter()
    done = 0
    batches = itertools.chain(head, batches)
    many = len(head) == 3
    for words, size in _in_processes(count, batches, processes) if many else map(count, batches):
        # Counter.update would do this loop twice as slowly.
        for word, n in words.items():
            total[word] += n
        done += size
        update(done)
    return total


def _count(pattern: str, batch: list[str]) -> tuple[Counter[str], int]:
    split, words = splitter(pattern), Counter[str]()
    for text in batch:
        words.update(split(text))
    return words, sum(len(text if text.isascii() else _bytes(text)) for text in batch)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        for part in _parts(text):
            batch.append(part)
            size += len(part)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > BATCH:
        end = cut_before(text, start + BATCH, start)
        if end == start:
            break
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _in_processes(count: Callable, batches: Iterator[list[str]], processes: int) -> Iterator:
    context = multiprocessing.get_context("spawn")
    # Ctrl-C reaches the whole group: only the parent answers it.
    pool = ProcessPoolExecutor(processes, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    pending: deque[Future] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(count, batch))
            if len(pending) > processes + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a process that counts words died: most likely memory ran out, or the script that asked for it "
            "lacks `if __name__ == '__main__':` around its own commands"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
