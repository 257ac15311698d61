"""Checkpoints: complete or absent, verified when read, restored bit for bit onto any mesh.

A checkpoint is the folder `STEP/` with the items `params`, `opt` and `meta`, written by Orbax in the
background, and a manifest of checksums (`core.manifest`). It gets its name by one rename, when all of it is
on the disk: until then it is `STEP.saving`, and while it is being deleted `STEP.deleting`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from core import manifest
from core.distributed import on_first
from core.errors import UserError
from core.files import sync_folder
from core.run import RunFolder

FORMAT = manifest.FORMAT
_PIECE, _CHUNK = 4 << 20, 64 << 20  # bytes, see `layout`
_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves the state of a run to `folder/STEP` and restores it; the newest `keep` checkpoints are kept.

    So is one of step 0, which holds the weights that the run was imported with (`core.tensors`) and that
    can't be made again.

    Nothing is created or removed before the first `save`, so a run that is still training can be read.
    With several processes each calls every method, on a folder that all of them see.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self._keep = keep
        handler = ocp.CompositeCheckpointHandler(
            params=_arrays(), opt=_arrays(), meta=ocp.JsonCheckpointHandler()
        )
        self._orbax = ocp.AsyncCheckpointer(handler)
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._current: int | None = None  # the step last saved or restored: where the run stands on disk
        self._verified: set[tuple[int, str]] = set()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self, step: int, params: Any, opt_state: Any, meta: Mapping[str, Any], hold: Sequence[int] = ()
    ) -> None:
        """Save in the background; returns once the arrays are copied, so they may be donated then.

        Args:
            step: its number; saving the step that was last saved or restored does nothing.
            params, opt_state: pytrees of arrays.
            meta: whatever JSON can hold; `format` and `step` are added.
            hold: steps; for the first that has a checkpoint at or before it, the newest such one is kept
                however many came after it.

        Raises:
            UserError: when this save or the one before it could not be written, such as on a full disk.
                The checkpoints before it are intact.
        """
        self.wait()
        if step == self._current:
            return
        trees = {"params": (params, jax.tree.map(layout, params)), "opt": (opt_state, None)}
        items = ocp.args.Composite(
            meta=ocp.args.JsonSave({"format": FORMAT, "step": step, **meta}),
            # Orbax refuses an item without arrays, such as the state of plain SGD.
            **{
                name: ocp.args.PyTreeSave(tree, save_args=where)
                for name, (tree, where) in trees.items()
                if jax.tree.leaves(tree)
            },
        )
        with self._naming_disk_errors(step):
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.remove_unfinished()
                self._set_aside_from(step)
            self._orbax.save(self._unfinished(step), args=items)
        self._saving = step, self._background.submit(self._finish, step, hold)

    def wait(self) -> None:
        """Wait until the last `save` is on the disk, and raise what it raises."""
        if self._saving is not None:
            (step, saving), self._saving = self._saving, None
            with self._naming_disk_errors(step):
                saving.result()
            self._current = step

    def close(self) -> None:
        """`wait`, then end the background thread."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            with contextlib.suppress(OSError):  # what it failed to write, `save` or `wait` has told of
                self._orbax.close()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending; they may still turn out to be damaged."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def intact_steps(self) -> list[int]:
        """Those of `steps()` whose checksums are right."""
        return [step for step in self.steps() if self._find_damage(step, ("meta", "params", "opt")) is None]

    def latest_step(self) -> int | None:
        """The newest of `steps()`, unverified; None where there is none."""
        return max(self.steps(), default=None)

    def newest_intact(self, optimizer: bool = True) -> int | None:
        """The newest checkpoint whose checksums are right; None where there is no checkpoint.

        A damaged one is named in a warning and passed over. Without `optimizer`, `opt` isn't looked at.

        Raises:
            UserError: when all are damaged, or one is of a newer format.
        """
        items = ("meta", "params", "opt") if optimizer else ("meta", "params")
        # One process reads the files, and all go on from the same step, or fail together.
        step = on_first(lambda: self._find_intact(items))
        if step is not None:
            self._verified |= {(step, item) for item in items}
        return step

    def restore(self, step: int, params_target: Any, opt_target: Any) -> tuple[Any, Any]:
        """The parameters and the optimizer state of `step`, bit for bit as they were saved.

        Args:
            step: one of `steps()`.
            params_target, opt_target: pytrees of `jax.ShapeDtypeStruct`, whose shardings say where each
                array goes; one without a sharding goes to the first device.

        Raises:
            UserError: when the checkpoint is damaged, of a newer format, or of another tree, shape or type.
        """
        self._require_intact(step, ("meta", "params", "opt"))
        restored = self._restore(step, "params", params_target), self._restore(step, "opt", opt_target)
        self._current = step
        return restored

    def restore_params(self, step: int, target: Any) -> Any:
        """As `restore`, for the parameters alone: the optimizer state is not read, nor need it exist."""
        self._require_intact(step, ("meta", "params"))
        return self._restore(step, "params", target)

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints after `step`: the run leaves the course that they are of."""
        self.wait()
        if jax.process_index() == 0:
            for later in [s for s in self.steps() if s > step]:
                self._delete(later)
        self._current, self._verified = None, {entry for entry in self._verified if entry[0] <= step}

    def read_meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`, with `format` and `step`. Raises `UserError` as `restore` does."""
        self._require_intact(step, ("meta",))
        return ocp.JsonCheckpointHandler().restore(self.folder / str(step) / "meta")

    def _unfinished(self, step: int) -> Path:
        return self.folder / f"{step}.saving"

    def _finish(self, step: int, hold: Sequence[int]) -> None:
        self._orbax.wait_until_finished()
        if jax.process_index() == 0:
            complete(self._unfinished(step), self.folder / str(step))
            trained = [old for old in self.steps() if old > 0]
            held = [max(early) for at in hold if (early := [old for old in trained if old <= at])]
            for old in trained[: -self._keep]:
                if old not in held[:1]:
                    self._delete(old)

    def _delete(self, step: int) -> None:
        condemned = self.folder / f"{step}.deleting"
        os.rename(self.folder / str(step), condemned)  # so a kill never leaves half a checkpoint by its name
        shutil.rmtree(condemned)

    def remove_unfinished(self) -> None:
        for path in self.folder.iterdir():
            if re.fullmatch(r"\d+\.(saving.*|deleting)", path.name):
                for _ in range(50):  # writes that a failed save left behind may still be putting files there
                    shutil.rmtree(path, ignore_errors=True)
                    if not path.exists():
                        break
                    time.sleep(0.1)

    def _set_aside_from(self, step: int) -> None:
        """Rename what stands at `step` or later: damaged, or of a course that the run has left."""
        for old in self.steps():
            if old >= step:
                aside = self.folder / f"{old}.aside"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(self.folder / str(old), aside)
                _log.warning("checkpoint %d is not part of this run any more: kept as %s", old, aside)

    def _find_intact(self, items: tuple[str, ...]) -> int | None:
        damaged = []
        for step in reversed(self.steps()):
            problem = self._find_damage(step, items)
            if problem is None:
                return step
            if (self.folder / str(step)).exists():  # else a run that is still training has just deleted it
                damaged.append(f"{step}/{problem}")
                _log.warning(
                    "checkpoint %d is damaged and passed over: %s/%s/%s", step, self.folder, step, problem
                )
        if damaged:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged ({'; '.join(damaged)}): bring one back from a "
                f"copy, or delete that folder to start again at step 0"
            )
        return None

    def _require_intact(self, step: int, items: tuple[str, ...]) -> None:
        if step not in self.steps():
            found = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.folder} has no checkpoint of step {step}; there are: {found}")
        problem = self._find_damage(step, items)
        if problem:
            raise UserError(
                f"checkpoint {step} is damaged: {self.folder}/{step}/{problem}; delete the folder "
                f"{self.folder / str(step)}, and the checkpoint before it is used"
            )

    def _find_damage(self, step: int, items: tuple[str, ...]) -> str | None:
        items = tuple(item for item in items if (step, item) not in self._verified)
        problem = manifest.find_damage(self.folder / str(step), items) if items else None
        if problem is None:
            self._verified |= {(step, item) for item in items}
        return problem

    def _restore(self, step: int, item: str, target: Any) -> Any:
        folder = self.folder / str(step) / item
        if not jax.tree.leaves(target) and not folder.exists():
            return target
        _require_same_tree(_arrays().metadata(folder).tree, target, folder)
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), target
        )
        where = ocp.checkpoint_utils.construct_restore_args(placed)
        return _arrays().restore(folder, args=ocp.args.PyTreeRestore(placed, restore_args=where))

    @contextlib.contextmanager
    def _naming_disk_errors(self, step: int) -> Iterator[None]:
        """Tell of a disk that can't be written as a `UserError`; TensorStore raises it as ValueError."""
        try:
            yield
        except Exception as error:
            number = os_error_number(error)
            if number is None:
                raise
            if jax.process_index() == 0 and self.folder.is_dir():
                self.remove_unfinished()
            full = number in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full" if full else os.strerror(number)
            remedy = "free some space" if full else "mend that"
            before = self.latest_step()
            rest = f"checkpoint {before} still stands; " if before is not None else ""
            raise UserError(
                f"checkpoint {step} could not be written to {self.folder}: {reason}; "
                f"{rest}{remedy} and run the same command with --resume"
            ) from error


def complete(unfinished: Path, folder: Path) -> None:
    """Make a checkpoint of what was written to `unfinished`: with its checksums, and by one rename."""
    manifest.write(unfinished)
    os.rename(unfinished, folder)
    sync_folder(folder.parent)


def layout(leaf: Any) -> ocp.SaveArgs:
    """How an array lies on the disk: in chunks, which are read whole.

    Each step of a leading axis has chunks of its own where it holds more than `_PIECE` bytes: so layers and
    experts can be read one by one. What is larger than `_CHUNK`, such as an embedding, is cut further. On
    several devices each writes its part in such chunks.
    """
    size = leaf.dtype.itemsize
    inner = [size * math.prod(leaf.shape[axis + 1 :]) for axis in range(len(leaf.shape))]
    axes = tuple(axis for axis, held in enumerate(inner) if held > _PIECE)
    large = axes or size * math.prod(leaf.shape) > _CHUNK
    return ocp.SaveArgs(chunk_byte_size=_CHUNK, shard_axes=axes) if large else ocp.SaveArgs()


def newest_params(run: RunFolder, target: Any) -> Any:
    """The parameters of a run's newest checkpoint that is intact, placed as `Checkpointer.restore` says.

    Raises:
        UserError: when there is no such checkpoint, or it is of another tree, shape or type.
    """
    with Checkpointer(run.checkpoints) as checkpointer:
        step = checkpointer.newest_intact(optimizer=False)
        if step is None:
            raise UserError(f"{run.path} has no checkpoint yet: train it first, or until `checkpoint.every`")
        _log.info("%s, step %d", run.path, step)
        return checkpointer.restore_params(step, target)


def _arrays() -> ocp.PyTreeCheckpointHandler:
    """Compression makes weights 8% smaller, and saving them cost 1.6 times the processor time."""
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _mute_orbax() -> None:
    """What Orbax raises is told once, in words of ours; it also logs it, and the writes that it leaves behind
    when one of them fails (on a full disk) print tracebacks of the event loop that they no longer find."""

    def unraisable(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":
            previous(what)

    previous, sys.unraisablehook = sys.unraisablehook, unraisable
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())


_mute_orbax()


def os_error_number(error: BaseException) -> int | None:
    """The system's number of an error of Python or TensorStore; None for another error."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found.group(1)) if found else None


def _require_same_tree(saved: Any, target: Any, folder: Path) -> None:
    """Orbax would cast another dtype without a word, and tells of another tree in internal terms."""

    def describe(tree: Any) -> dict[str, str]:
        return {
            ".".join(_key(k) for k in path): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree.leaves_with_path(jax.tree.map(_as_saved, tree))
        }

    there, here = describe(saved), describe(target)
    for name in [*here, *there]:
        if there.get(name) != here.get(name):
            raise UserError(
                f"the checkpoint {folder} does not fit this configuration: '{name}' is "
                f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} here; "
                "use the configuration that it was saved with"
            )


def _as_saved(leaf: Any) -> Any:
    """Typed random keys are saved as the integers that they wrap."""
    is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf


def _key(entry: Any) -> str:
    """One step of a path in a pytree, spelled as Orbax does."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise TypeError(f"no name for {entry!r}")
