"""Embeddings of any number of images and captions, in batches of one size, so that nothing compiles twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from clip.data.captions import encode_captions
from clip.data.config import DataConfig
from clip.data.images import center_crop
from clip.data.split import Split
from clip.model.config import CLIPConfig
from clip.model.model import pixels
from core.mesh import local_rows, mesh_parts, put_rows, shardings
from core.module import Blueprint, Params
from core.prefetch import prefetch
from llm.tokenizer import Tokenizer

_ROWS = 256  # of a batch, at most, on each device


class Embed(NamedTuple):
    """What `make_embed` gives. With several processes each calls both, and each gets all embeddings.

    Attributes:
        images: (params, split, indices) -> [N, E], of some images of a split; a process reads those that its
            devices hold.
        texts: (params, texts) -> [N, E].
    """

    images: Callable[[Params, Split, Sequence[int]], Float[np.ndarray, "N E"]]
    texts: Callable[[Params, Sequence[str]], Float[np.ndarray, "N E"]]


def make_embed(
    blueprint: Blueprint, config: CLIPConfig, data: DataConfig, tokenizer: Tokenizer, mesh: Mesh
) -> Embed:
    """Both towers, each compiled once, for batches of `data.batch_size` rows but at most `_ROWS` a device,
    or the few more that divide over the mesh. The last batch is filled up with zeros. To be called under
    `jax.set_mesh(mesh)`, as training is.
    """
    parts = mesh_parts(mesh, "act_batch")
    size = min(-(-data.batch_size // parts), _ROWS) * parts
    mine = local_rows(mesh, size)
    where, rows, everywhere = (shardings(mesh, axes) for axes in (blueprint.axes, ("act_batch",), ()))

    def image_tower(params, images):
        return blueprint.bind(params).encode_image(pixels(images, config.image))

    def text_tower(params, tokens, ends):
        return blueprint.bind(params).encode_text(tokens, ends)

    image_program = jax.jit(image_tower, in_shardings=(where, rows), out_shardings=everywhere)
    text_program = jax.jit(text_tower, in_shardings=(where, rows, rows), out_shardings=everywhere)

    def images(params: Params, split: Split, indices: Sequence[int]) -> Float[np.ndarray, "N E"]:
        def read(index: int) -> UInt8[np.ndarray, "H W 3"]:
            return center_crop(split[index].image, config.image.size)

        def batches() -> Iterator[UInt8[np.ndarray, "b H W 3"]]:
            with ThreadPoolExecutor(data.workers) as readers:
                for part in _parts(np.asarray(indices), size):
                    # Of a last batch, a process may have no rows.
                    yield np.array([*readers.map(read, part[mine].tolist())], np.uint8).reshape(shape)

        shape = (-1, config.image.size, config.image.size, 3)
        done = [image_program(params, put(batch)) for batch in prefetch(batches())]
        return _joined(done, len(indices))

    def texts(params: Params, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
        encoded = encode_captions(tokenizer, texts, config.text.length)
        batches = zip(*(_parts(rows, size) for rows in encoded), strict=True)
        done = [text_program(params, *(put(part[mine]) for part in batch)) for batch in batches]
        return _joined(done, len(texts))

    def put(own: np.ndarray) -> jax.Array:
        filling = len(range(size)[mine]) - len(own)
        return put_rows(np.pad(own, ((0, filling), *[(0, 0)] * (own.ndim - 1))), mesh)

    return Embed(images, texts)


def _parts(rows: Int[np.ndarray, "N ..."], size: int) -> Iterator[Int[np.ndarray, "size ..."]]:
    """`size` rows at a time, of the last as many as there are."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _joined(batches: Sequence[jax.Array], count: int) -> Float[np.ndarray, "N E"]:
    return np.concatenate([np.asarray(batch) for batch in batches])[:count]
