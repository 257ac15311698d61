"""Embeddings of any number of images and captions, in batches of one size, so that nothing compiles twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int, UInt8

from clip.model.config import CLIPConfig
from clip.model.model import pixels
from core.mesh import mesh_parts, shardings, spec
from core.module import Blueprint, Params
from core.prefetch import prefetch

_READERS = 4  # threads; decoding an image lets the others go on

# One image of a data set by its number, as the model takes it.
ReadImage = Callable[[int], UInt8[np.ndarray, "H W 3"]]


class Embed(NamedTuple):
    """What `make_embed` gives. With several processes each calls both, and gets all embeddings.

    Attributes:
        images: (params, read, count) -> [count, E], of the images `read(0)` to `read(count - 1)`. A process
            reads those that its devices hold.
        texts: (params, tokens [N, T], ends [N]) -> [N, E].
    """

    images: Callable[[Params, ReadImage, int], Float[np.ndarray, "N E"]]
    texts: Callable[[Params, Int[np.ndarray, "N T"], Int[np.ndarray, " N"]], Float[np.ndarray, "N E"]]


def make_embed(blueprint: Blueprint, config: CLIPConfig, mesh: Mesh, batch_size: int) -> Embed:
    """Both towers, compiled once each for batches of about `batch_size` rows, which divide over the mesh.

    The last batch is filled up with its first row. Under `jax.set_mesh(mesh)`, as training is.
    """
    parts = mesh_parts(mesh, "act_batch")
    size = -(-batch_size // parts) * parts
    where, everywhere = shardings(mesh, blueprint.axes), shardings(mesh, ())
    rows = NamedSharding(mesh, spec(["act_batch"]))

    def image_tower(params, images):
        return blueprint.bind(params).encode_image(pixels(images, config.image))

    def text_tower(params, tokens, ends):
        return blueprint.bind(params).encode_text(tokens, ends)

    image_program = jax.jit(image_tower, in_shardings=(where, rows), out_shardings=everywhere)
    text_program = jax.jit(text_tower, in_shardings=(where, rows, rows), out_shardings=everywhere)

    def images(params: Params, read: ReadImage, count: int) -> Float[np.ndarray, "N E"]:
        batches = prefetch(_image_batches(read, count, size, rows))
        return _all([image_program(params, batch) for batch in batches], count)

    def texts(
        params: Params, tokens: Int[np.ndarray, "N T"], ends: Int[np.ndarray, " N"]
    ) -> Float[np.ndarray, "N E"]:
        batches = (
            [_put(whole[numbers], rows) for whole in (tokens, ends)] for numbers in _numbers(len(ends), size)
        )
        return _all([text_program(params, *batch) for batch in batches], len(ends))

    return Embed(images, texts)


def _numbers(count: int, size: int) -> Iterator[Int[np.ndarray, " size"]]:
    """The rows of each batch."""
    for start in range(0, count, size):
        numbers = np.arange(start, start + size)
        yield np.where(numbers < count, numbers, start)


def _image_batches(read: ReadImage, count: int, size: int, rows: NamedSharding) -> Iterator[jax.Array]:
    with ThreadPoolExecutor(_READERS) as readers:
        for numbers in _numbers(count, size):
            mine = sorted({row for span in _spans(size, rows) for row in range(*span)})
            read_once = dict.fromkeys(numbers[mine].tolist())  # filling rows are one image
            images = dict(zip(read_once, readers.map(read, read_once), strict=True))
            own = np.stack([images[number] for number in numbers[mine].tolist()])
            yield _put(own, rows, size, mine[0])


def _spans(size: int, rows: NamedSharding) -> list[tuple[int, int]]:
    """First row and the one after the last that each device of this process holds."""
    places = rows.addressable_devices_indices_map((size,)).values()
    return [span.indices(size)[:2] for (span,) in places]  # type: ignore[union-attr]


def _put(own: np.ndarray, rows: NamedSharding, size: int | None = None, before: int = 0) -> jax.Array:
    """Rows from `before` on, of which this process has those of its devices, as a global array."""

    def piece(index):
        start, stop, _ = index[0].indices(shape[0])
        return own[start - before : stop - before]

    shape = (size or len(own), *own.shape[1:])
    return jax.make_array_from_callback(shape, rows, piece)


def _all(batches: Sequence[jax.Array], count: int) -> Float[np.ndarray, "N E"]:
    return np.concatenate([np.asarray(batch) for batch in batches])[:count]
