"""The parameters of a checkpoint one piece at a time, for models larger than this machine's memory."""

from __future__ import annotations

import dataclasses
import errno
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from core.checkpoint import FORMAT, Checkpointer, complete, layout, os_error_number
from core.errors import UserError
from core.module import Params
from core.run import RunFolder

Keys = tuple[str, ...]  # of a parameter in nested dicts
Index = tuple[int | slice, ...]
Box = tuple[tuple[int, int], ...]  # [start, stop) of each axis


@dataclasses.dataclass(frozen=True)
class SavedParams:
    """The parameters of a run's newest intact checkpoint, read piece by piece.

    `shapes` is the nested dict of `jax.ShapeDtypeStruct` that `read` takes paths into.
    """

    step: int
    shapes: Params
    folder: Path

    @classmethod
    def open(cls, run: RunFolder) -> SavedParams:
        """Find it, and check its checksums.

        Raises:
            UserError: when there is no such checkpoint.
        """
        with Checkpointer(run.checkpoints) as checkpointer:
            step = checkpointer.newest_intact(optimizer=False)
        if step is None:
            raise UserError(f"{run.path} has no checkpoint yet: train it first, or until `checkpoint.every`")
        folder = run.checkpoints.absolute() / str(step) / "params"
        saved = ocp.PyTreeCheckpointHandler().metadata(folder).tree
        return cls(step, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved), folder)

    def read(self, path: Keys, index: Index = ()) -> np.ndarray:
        """The values at `index` (integers and slices of leading axes, as in NumPy) of the parameter `path`.

        The chunks that hold some of them are read, and nothing else; see `core.checkpoint.layout`.

        Raises:
            UserError: if the checkpoint is gone, as happens when its run is still training.
        """
        leaf: Any = self.shapes
        for key in path:
            leaf = leaf[key]
        box, shape = _select(index, leaf.shape)
        info = ocp.type_handlers.ParamInfo(
            name=".".join(path), parent_dir=self.folder, ts_context=self._context
        )
        spec = ts.Spec(ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True))
        try:
            array = ts.open(spec, open=True, read=True, context=self._context).result()
            return np.asarray(array[_slices(box)].read().result()).reshape(shape)
        except ValueError as error:
            if self.folder.exists():
                raise
            raise UserError(
                f"checkpoint {self.step} was deleted while it was read ({self.folder}), as a run that trains "
                "does with old ones: try again, or keep more of them (checkpoint.keep)"
            ) from error

    @functools.cached_property
    def _context(self) -> ts.Context:
        """It keeps the index of the chunks between reads, and no chunk."""
        return _frugal(ocp.type_handlers.get_ts_context(use_ocdbt=True))


def write_params(
    run: RunFolder,
    shapes: Params,
    pieces: Iterator[tuple[Keys, Index, np.ndarray]],
    meta: Mapping[str, Any],
) -> None:
    """Make the checkpoint of step 0 of a run out of pieces as they come; one is held at a time.

    It has no optimizer state: training starts from its weights. A kill or an exception leaves none.

    Args:
        run: where; its folder is made.
        shapes: nested dict of `jax.ShapeDtypeStruct`.
        pieces: path of a parameter, index of its leading axes, and the values there. What lies apart on the
            disk is decided by the first piece of a parameter: the others are best of the same shape.
        meta: whatever JSON can hold; `format` and `step` are added.

    Raises:
        UserError: when the run has a checkpoint, or the disk is full.
        ValueError: when a part of a parameter was not written, or twice, or with another shape or type.
        KeyError: for a piece of no parameter.
    """
    folder = run.checkpoints.absolute()
    with Checkpointer(folder) as checkpointer:
        if checkpointer.steps():
            raise UserError(f"{folder} already holds a checkpoint: choose another folder, or delete it")
        folder.mkdir(parents=True, exist_ok=True)
        checkpointer.remove_unfinished()
        try:
            _save(folder / "0.saving", shapes, pieces, {"format": FORMAT, "step": 0, **meta})
            complete(folder / "0.saving", folder / "0")
        except Exception as error:
            checkpointer.remove_unfinished()
            if os_error_number(error) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"the disk is full: free some space for the weights in {folder}") from error
            raise


def _save(
    folder: Path, shapes: Params, pieces: Iterator[tuple[Keys, Index, np.ndarray]], meta: dict[str, Any]
) -> None:
    handler = _PieceHandler(pieces)
    registry = ocp.type_handlers.create_type_handler_registry((jax.ShapeDtypeStruct, handler))
    params = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    items = ocp.CompositeCheckpointHandler(params=params, meta=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(items) as writer:
        args = ocp.args.Composite(params=ocp.args.PyTreeSave(shapes), meta=ocp.args.JsonSave(meta))
        writer.save(folder, args=args)


def _frugal(context: ts.Context) -> ts.Context:
    """The same with a smaller cache than Orbax's 100 MB, which reading and writing fill for nothing."""
    return ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 8 << 20}}, parent=context)


class _PieceHandler(ocp.type_handlers.NumpyHandler):
    """Writes pieces as they come where Orbax would write whole arrays."""

    def __init__(self, pieces: Iterator[tuple[Keys, Index, np.ndarray]]):
        super().__init__()
        self._pieces = pieces

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        writing = self._write(values, infos)  # once Orbax has made the folder
        return [ocp.future.CommitFutureAwaitingContractedSignals(writing, name="pieces")]

    async def _write(self, values: Sequence[Any], infos: Sequence[Any]) -> None:
        context = _frugal(infos[0].ts_context)
        tensors = {
            info.name: _Tensor(value, info, context) for value, info in zip(values, infos, strict=True)
        }
        for path, index, piece in self._pieces:
            await tensors[".".join(path)].write(index, piece)
        for tensor in tensors.values():
            tensor.require_complete()


class _Tensor:
    """A parameter on its way to the disk."""

    def __init__(self, leaf: jax.ShapeDtypeStruct, info: Any, context: ts.Context):
        self._leaf, self._info, self._context = leaf, info, context
        self._array: ts.TensorStore | None = None
        self._written: set[Box] = set()
        self._grid: tuple[int, ...] | None = None  # the first piece's extents, while all pieces keep to it

    async def write(self, index: Index, piece: np.ndarray) -> None:
        box = self._claim(index, piece)
        extents = tuple(stop - start for start, stop in box)
        if self._array is None:
            spec = ocp.type_handlers.get_json_tspec_write(
                self._info,
                use_ocdbt=True,
                global_shape=self._leaf.shape,
                local_shape=extents,
                dtype=self._leaf.dtype,
                process_index=0,
                arg=layout(self._leaf),
            )
            self._array = await ts.open(ts.Spec(spec), create=True, open=True, context=self._context)
        await self._array[_slices(box)].write(piece.reshape(extents))

    def _claim(self, index: Index, piece: np.ndarray) -> Box:
        """The part of the array that `index` names, noted as written."""
        box, shape = _select(index, self._leaf.shape)
        if piece.shape != shape or piece.dtype != self._leaf.dtype:
            raise ValueError(
                f"{self._info.name}{list(index)} is {self._leaf.dtype}{list(shape)}, "
                f"and the piece is {piece.dtype}{list(piece.shape)}"
            )
        if not self._written:
            self._grid = tuple(stop - start for start, stop in box)
        if self._grid is not None and not _on_grid(box, self._grid, self._leaf.shape):
            self._grid = None
        # Places of one grid are the same or apart, so thousands of experts aren't compared in pairs.
        overlaps = self._grid is None and any(_overlap(box, other) for other in self._written)
        if box in self._written or overlaps:
            raise ValueError(f"{self._info.name}: {box} is written twice")
        self._written.add(box)
        return box

    def require_complete(self) -> None:
        size = math.prod(self._leaf.shape)
        done = sum(math.prod(stop - start for start, stop in box) for box in self._written)
        if done != size:
            raise ValueError(f"{self._info.name}: {done} of {size} values were written")


def _select(index: Index, shape: tuple[int, ...]) -> tuple[Box, tuple[int, ...]]:
    """The part of an array that `index` names, and the shape that NumPy gives it."""
    box, kept = [], []
    for axis, size in enumerate(shape):
        entry = index[axis] if axis < len(index) else slice(None)
        if isinstance(entry, slice):
            start, stop, step = entry.indices(size)
            if step != 1:
                raise ValueError(f"{entry} has a step")
            kept.append(max(0, stop - start))
        else:
            start = range(size)[entry]  # raises IndexError
            stop = start + 1
        box.append((start, stop))
    if len(index) > len(shape):
        raise IndexError(f"{index} of an array of shape {shape}")
    return tuple(box), tuple(kept)


def _on_grid(box: Box, extents: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return all(
        extent > 0 and start % extent == 0 and stop == min(start + extent, size)
        for (start, stop), extent, size in zip(box, extents, shape, strict=True)
    )


def _overlap(box: Box, other: Box) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True))


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
