"""A run as a Hugging Face checkpoint: what `transformers`, vLLM and others read."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip.config import Experiment as DualExperiment
from clip.model.config import CLIPConfig
from core.config import load
from core.errors import UserError
from core.files import write_atomically
from core.kinds import DUAL_ENCODER, LANGUAGE_MODEL, kind_of, require_kind
from core.log import in_bytes, progress
from core.run import RunFolder
from export import dual
from export.card import model_card
from export.families import dual_family_of, family_of
from export.families.dual import DualFamily
from export.families.family import Family
from export.families.table import Shape, Tensor, tensors
from export.folder import new_folder, write_json
from export.shards import DTYPES, SHARD_BYTES, write_tensors
from llm.chat import end_of_turn_ids, template_of
from llm.config import Experiment
from llm.model.config import ModelConfig
from llm.tokenizer.files import CONFIG
from llm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from core.tensors import SavedParams

NAMES = {"float32": "F32", "bfloat16": "BF16"}  # as JAX has them, and the files
_UNLIMITED = int(1e20)  # from here on a `model_max_length` says that there is none
_log = logging.getLogger(__name__)


def export_run(run: RunFolder, out: Path, dtype: str = "float32", shard_bytes: int = SHARD_BYTES) -> int:
    """Write the newest checkpoint's parameters to the new folder `out`, in files of at most `shard_bytes`.

    The memory it takes is that of a few tensors of a layer, whatever the model's size. In float32 the values
    are those trained; in bfloat16 they are rounded to the nearest. Returns the step.

    Raises:
        UserError: if no family has such a model, or `out` exists.
    """
    from core.tensors import SavedParams

    experiment = read_experiment(run)
    family: Family | DualFamily
    if isinstance(experiment, DualExperiment):
        family = dual_family_of(experiment.model)
        files = functools.partial(dual.write_files, family, experiment.model, run, dtype)
    else:
        family = family_of(experiment.model)
        files = functools.partial(_write_files, family, experiment.model, run, dtype)
    saved, shapes = SavedParams.open(run), shapes_of(experiment.model)
    _require_shapes(run, saved, shapes)
    wanted, kind = tensors(family.table, shapes), DTYPES[NAMES[dtype]]
    with new_folder(out) as folder:
        card = model_card(out, family, experiment, saved.step, run.read_summary(), dtype)
        write_atomically(folder / "README.md", card)
        files(folder)
        sizes = {tensor.name: tensor.shape for tensor in wanted}
        write_tensors(folder, sizes, kind, _values(saved, wanted, kind), shard_bytes)
    _log.info("%s, step %d, as a %s in %s: %s", run.path, saved.step, family.name, dtype, out)
    return saved.step


def read_experiment(run: RunFolder) -> Experiment | DualExperiment:
    """The run's configuration, a language model's or a dual encoder's.

    Raises:
        UserError: for a run of another kind, and as `core.config.load` does.
    """
    require_kind(run.path, run.config, LANGUAGE_MODEL, DUAL_ENCODER)
    is_dual = kind_of(run.config) == DUAL_ENCODER
    return load(DualExperiment, run.config) if is_dual else load(Experiment, run.config)


def shapes_of(config: ModelConfig | CLIPConfig) -> dict[str, Shape]:
    """The shape of each of our parameters by its path, as `blocks.mlp.up.kernel`."""
    if isinstance(config, CLIPConfig):
        from clip.model.model import blueprint as dual_blueprint

        return flatten(dual_blueprint(config).shapes)
    from llm.model.transformer import blueprint

    return flatten(blueprint(config).shapes)


def flatten(tree: Any, prefix: str = "") -> dict[str, Shape]:
    """The shapes of a nested dict of arrays by path."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tuple(tree.shape)}
    return {
        path: shape
        for key, value in tree.items()
        for path, shape in flatten(value, f"{prefix}{key}.").items()
    }


def _require_shapes(run: RunFolder, saved: SavedParams, shapes: dict[str, Shape]) -> None:
    there = flatten(saved.shapes)
    for path in [*shapes, *there]:
        if shapes.get(path) != there.get(path):
            raise UserError(
                f"checkpoint {saved.step} of {run.path} is not of the model in {run.config}: '{path}' is "
                f"{there.get(path, 'absent')} there and {shapes.get(path, 'absent')} by the configuration"
            )


def _values(saved: SavedParams, wanted: list[Tensor], dtype: np.dtype) -> Iterator[np.ndarray]:
    done, total = 0, sum(np.prod(tensor.shape, dtype=int) for tensor in wanted) * dtype.itemsize
    with progress("export", int(total), show=in_bytes) as update:
        for tensor in wanted:
            pieces = [saved.read(tuple(path.split(".")), tensor.at) for path in tensor.row.paths]
            value = tensor.to_theirs([piece.astype(dtype, copy=False) for piece in pieces])
            done += value.nbytes
            update(done)
            yield value


def _write_files(family: Family, config: ModelConfig, run: RunFolder, dtype: str, folder: Path) -> None:
    """What a language model's folder holds beside its card and weights."""
    tokenizer = Tokenizer.load(run.tokenizer)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    said = family.to_json(config) | ids
    # The latter was the name until transformers 4.56.
    write_json(folder / "config.json", said | {"dtype": dtype, "torch_dtype": dtype})
    # No sampling settings: vLLM would take them for its own defaults.
    write_json(folder / "generation_config.json", ids | {"eos_token_id": end_of_turn_ids(tokenizer)})
    _write_tokenizer(tokenizer, config, folder)


def _write_tokenizer(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> None:
    """The tokenizer's own files, with the chat template that conversations are trained with."""
    tokenizer.save(folder)
    path = folder / CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    template = template_of(tokenizer)
    if template is not None:
        content["chat_template"] = template
    if content.get("model_max_length", _UNLIMITED) >= _UNLIMITED:
        content["model_max_length"] = config.max_length
    write_json(path, content)
