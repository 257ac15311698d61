"""A Hugging Face checkpoint as our model: its configuration, its parameters, or a run of its own."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip.config import Experiment as DualExperiment
from clip.model.config import CLIPConfig
from core.config import parse, to_dict, to_yaml
from core.errors import UserError
from core.log import in_bytes, progress
from core.run import RunFolder
from export import dual
from export.families import named_family
from export.families.dual import DualFamily
from export.families.family import Family
from export.families.table import Tensor, contiguous, tensors
from export.folder import new_folder
from export.shards import Stored, find_tensors
from export.write import shapes_of
from llm.config import Experiment
from llm.data.shards import boundaries
from llm.model.config import ModelConfig
from llm.tokenizer.files import read as read_json_bytes
from llm.tokenizer.tokenizer import Tokenizer

_SEQUENCE = 1024  # tokens that training starts with: whatever the context, they fit most machines
_log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A checkpoint whose configuration and tensors are those of a model of ours."""

    family: Family | DualFamily
    config: ModelConfig | CLIPConfig
    tensors: list[Tensor]
    stored: Mapping[str, Stored]


def read_config(folder: Path) -> ModelConfig | CLIPConfig:
    """The model that the `config.json` in `folder` describes.

    Raises:
        UserError: for a kind of model, or a key of its, that isn't supported.
    """
    data = _read_json(folder)
    return named_family(data, folder / "config.json").from_json(data, folder / "config.json")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's configuration and headers, and check that each tensor is there and none besides.

    Raises:
        UserError: if not, naming the tensor; and as `read_config` and `find_tensors` do.
    """
    config, family = read_config(folder), named_family(_read_json(folder), folder / "config.json")
    wanted, stored = tensors(family.table, shapes_of(config)), find_tensors(folder, family.buffers)
    shapes = {tensor.name: tensor.shape for tensor in wanted}
    for name, shape in shapes.items():
        if name not in stored:
            raise UserError(f"{folder} lacks the tensor {name} {list(shape)}{_about_head(family, name)}")
        if stored[name].shape != shape:
            raise UserError(
                f"{folder}: the tensor {name} is {list(stored[name].shape)}, and by config.json {list(shape)}"
            )
    _refuse_others(folder, family, config, stored, set(shapes))
    return Checkpoint(family, config, wanted, stored)


def read_params(folder: Path, target: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a checkpoint, in the types and on the devices that `target` says.

    Beside what is placed, the part of one parameter that a device holds is in memory.

    Args:
        folder: a Hugging Face checkpoint of ours or of others.
        target: nested dict of `jax.ShapeDtypeStruct`, as `blueprint(config).shapes`; those without a
            sharding go to the first device.

    Raises:
        UserError: as `open_checkpoint` does.
    """
    import jax

    checkpoint = open_checkpoint(folder)
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(tree: Any, path: str) -> Any:
        if isinstance(tree, dict):
            return {key: place(value, f"{path}.{key}" if path else key) for key, value in tree.items()}
        part = _Parameter(checkpoint, path, tree.shape, np.dtype(tree.dtype))
        return jax.make_array_from_callback(tree.shape, tree.sharding or first, part.read)

    return place(target, "")


def import_run(folder: Path, out: Path) -> None:
    """Make the run `out` of a checkpoint: configuration, tokenizer, and a checkpoint of step 0.

    float16 and bfloat16 are widened to float32, which changes no value. A tensor at a time is in memory.

    Raises:
        UserError: as `open_checkpoint` does, or if the tokenizer isn't supported or has more ids than the
            model, or `out` exists.
    """
    import jax

    from core.tensors import write_params

    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    tokenizer: Tokenizer
    experiment: Experiment | DualExperiment
    if isinstance(config, CLIPConfig):
        tokenizer, rows = dual.read_tokenizer(folder), config.text.vocab_size
        dual.require_padding(tokenizer, config)
        experiment = dual.experiment(config, out)
    else:
        tokenizer, rows, experiment = _read_tokenizer(folder), config.vocab_size, _experiment(config, out)
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids, and the model {rows}: "
            "they don't belong together"
        )
    shapes: dict[str, Any] = {}
    for path, shape in shapes_of(config).items():
        *sections, name = path.split(".")
        section = shapes
        for key in sections:
            section = section.setdefault(key, {})
        section[name] = jax.ShapeDtypeStruct(shape, np.float32)
    with new_folder(out) as unfinished:
        run = RunFolder.create(unfinished, to_yaml(experiment))
        tokenizer.save(run.tokenizer)
        write_params(run, shapes, _pieces(checkpoint), {"imported": checkpoint.family.name})
    _log.info("%s, a %s, as the run %s", folder, checkpoint.family.name, out)


class _Parameter:
    """One of our parameters, put together from the tensors that hold it."""

    def __init__(self, checkpoint: Checkpoint, path: str, shape: tuple[int, ...], dtype: np.dtype):
        self._shape, self._dtype, self._stored = shape, dtype, checkpoint.stored
        self._holders = {
            tensor.at: (tensor, tensor.row.paths.index(path))
            for tensor in checkpoint.tensors
            if path in tensor.row.paths
        }

    def read(self, index: tuple[slice, ...] | None) -> np.ndarray:
        """The values at `index`, a slice for each axis."""
        assert index is not None
        ranges = [range(*part.indices(size)) for part, size in zip(index, self._shape, strict=True)]
        values = np.empty([len(part) for part in ranges], self._dtype)
        for at, (tensor, position) in self._holders.items():
            if all(i in part for i, part in zip(at, ranges, strict=False)):
                piece = tensor.to_ours(self._stored[tensor.name].read())[position]
                where = tuple(i - part.start for i, part in zip(at, ranges, strict=False))
                values[where] = piece[index[len(at) :]]
        return values


def _pieces(checkpoint: Checkpoint) -> Iterator[tuple[tuple[str, ...], tuple[int, ...], np.ndarray]]:
    done, stored = 0, checkpoint.stored
    total = sum(stored[t.name].dtype.itemsize * int(np.prod(t.shape)) for t in checkpoint.tensors)
    with progress("import", total, show=in_bytes) as update:
        for tensor in checkpoint.tensors:
            value = stored[tensor.name].read()
            done += value.nbytes
            for path, piece in zip(tensor.row.paths, tensor.to_ours(value), strict=True):
                piece = contiguous(piece).astype(np.float32, copy=False)
                yield tuple(path.split(".")), tensor.at, piece
            update(done)


def _refuse_others(
    folder: Path,
    family: Family | DualFamily,
    config: ModelConfig | CLIPConfig,
    stored: Mapping[str, Stored],
    known: set[str],
) -> None:
    """No tensor may be left over, but for a tied head that was stored once more."""
    head, embedding = (_theirs(family, ours) for ours in ("head", "embedding"))
    for name in stored:
        if name in known:
            continue
        if name != head or not (isinstance(config, ModelConfig) and config.tied_head):
            raise UserError(
                f"{folder}: config.json has no place for the tensor {name} {list(stored[name].shape)}"
            )
        assert embedding is not None
        if stored[head].read().tobytes() != stored[embedding].read().tobytes():
            raise UserError(
                f"{folder}: by tie_word_embeddings the head is the embedding, and {head} differs from it: "
                "one of the two is wrong; with a head of its own, say false there"
            )


def _theirs(family: Family | DualFamily, ours: str) -> str | None:
    return next((row.theirs for row in family.table if row.ours == ours), None)


def _about_head(family: Family | DualFamily, name: str) -> str:
    is_head = name == _theirs(family, "head")
    return ": if the embedding is its head, config.json must say tie_word_embeddings" if is_head else ""


def _read_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    boundaries(tokenizer)  # raises where no token ends a text
    return tokenizer


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name that of a Hugging Face checkpoint, downloaded before")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no Hugging Face checkpoint (no config.json)")
    return json.loads(read_json_bytes(folder / "config.json"))


def _experiment(config: ModelConfig, out: Path) -> Experiment:
    """What an imported model trains with unless told otherwise: gently, on the text that is at hand."""
    return parse(
        Experiment,
        {
            "run": {"name": out.name, "dir": str(out.parent)},
            "data": {"sequence_length": min(_SEQUENCE, config.max_length), "batch_size": 8},
            "tokenizer": {"path": str(out / "tokenizer")},
            "model": to_dict(config),
            "train": {"steps": 1000, "remat": "dots"},
            "optimizer": {"learning_rate": 1e-5, "warmup_steps": 50},
            "eval": {"every": 200, "batches": 16},
            "checkpoint": {"every": 200},
        },
    )
