"""Batches as a function of (seed, number), decoded and augmented ahead of their use in Grain's threads.

Each epoch takes the examples of a split in an order of its own (`llm.data.permute`), and batch n takes the
next `batch_size` of them: no state, the same batches whatever number comes first and however many processes
or threads share the work. Random numbers of an example come from the seed and its place in that endless run.

Grain has a shuffle and a `random_map` too. The first correlates neighbours and is slow on small data (see
`llm.data.permute`); the second counts places within one process, so that a batch would change with their
number.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from clip.data.captions import encode_captions
from clip.data.config import DataConfig
from clip.data.images import augment, center_crop
from clip.data.split import Split
from llm.data.permute import permute
from llm.tokenizer import Tokenizer

if TYPE_CHECKING:
    Array = Any  # NumPy's from here, JAX's inside a step

_log = logging.getLogger(__name__)

AHEAD = 4  # batches made before they are asked for


class Batch(NamedTuple):
    """B images with a caption each: NumPy from `batches`, JAX arrays inside a step."""

    images: UInt8[Array, "B H W 3"]
    tokens: Int32[Array, "B T"]  # a caption, its end of text, and ends of text as padding
    ends: Int32[Array, " B"]  # where the first end of text stands


@dataclass(frozen=True)
class _Numbered:
    """Source of Grain's pipeline: the places of one batch after the other, of the rows asked for."""

    numbers: Sequence[int]
    batch_size: int
    rows: slice

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.numbers[index] * self.batch_size + np.arange(self.batch_size)[self.rows]


def batches(
    split: Split,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    size: int,
    length: int,
    numbers: Iterable[int],
    seed: int,
    batch_size: int | None = None,
    rows: slice = slice(None),
    train: bool = True,
) -> Generator[Batch, None, None]:
    """The batches of some numbers, in their order. Closing the generator ends its threads.

    For training, examples are shuffled in each epoch, images are augmented, and of several captions one is
    drawn. Otherwise examples come in their own order, round and round, with the first caption of each and
    the image as evaluation sees it; the split has `len(split) // batch_size` such batches without a repeat.

    Args:
        size: of the images, in pixels both ways.
        length: of the captions, in tokens, the end of text among them.
        numbers: finitely many; a range is not copied.
        batch_size: rows of a batch over all processes; None: `config.batch_size`.
        rows: those that this process needs.

    Raises:
        UserError: for an image that can't be read any more.
    """

    def make(places: np.ndarray) -> Batch:
        epochs, order = np.divmod(places, len(split))
        if train:
            order = permute(order, len(split), seed, epochs)
        images = np.empty((len(places), size, size, 3), np.uint8)
        captions = []
        for row, (place, index) in enumerate(zip(places.tolist(), order.tolist(), strict=True)):
            example = split[index]
            if train:
                random = np.random.Generator(np.random.Philox(key=(seed, place)))
                captions.append(example.captions[random.integers(len(example.captions))])
                images[row] = augment(example.image, size, config.crop_area, config.flip, random)
            else:
                captions.append(example.captions[0])
                images[row] = center_crop(example.image, size)
        return Batch(images, *encode_captions(tokenizer, captions, length))

    numbers = numbers if isinstance(numbers, Sequence) else tuple(numbers)
    batch_size = batch_size or config.batch_size
    if train and batch_size > len(split):
        _log.warning(
            "data.batch_size (%d) is more than the %d images to train on, so that a batch has an image twice "
            "and tells it from itself: lower it", batch_size, len(split),
        )  # fmt: skip
    source = _Numbered(numbers, batch_size, rows)
    yield from _ahead(source, make, config.workers)


def _ahead(source: Any, make: Any, workers: int) -> Iterator[Any]:
    """`make` of each item of the source, in Grain's threads."""
    import grain  # takes a second, which `--help` should not

    if not len(source):
        return
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(AHEAD, workers))
    iterator = iter(grain.MapDataset.source(source).map(make).to_iter_dataset(options))
    with contextlib.ExitStack() as stack:
        if hasattr(iterator, "close"):
            stack.callback(iterator.close)
        yield from iterator
