"""What a run is made of, checked before its first step: folder, mesh, model, optimizer, data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from clip.config import Experiment
from clip.data.captions import count_cut
from clip.data.corpus import Splits, open_splits
from clip.data.tokenizer import CaptionTokenizer, caption_tokenizer
from clip.model.config import CLIPConfig
from clip.model.model import blueprint, check_mesh
from core.checkpoint import Checkpointer, newest_params
from core.config import load, to_dict, to_yaml
from core.distributed import first_before_others, on_first
from core.errors import UserError
from core.mesh import check_divides, make_mesh, shardings
from core.module import Blueprint, Params
from core.optim import Optimizer, make_optimizer
from core.run import RunFolder
from core.state import State, init_state, restored_state, state_from, targets
from llm.model.transformer import Compute
from llm.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class Setup(NamedTuple):
    """Nothing here changes while a run trains."""

    experiment: Experiment
    run: RunFolder
    mesh: Mesh
    model: Blueprint
    optimizer: Optimizer
    splits: Splits
    tokenizer: Tokenizer

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint keeps to know its data again."""
        return {
            "pairs_fingerprint": self.splits.train.fingerprint,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
        }


def set_up(experiment: Experiment, resume: bool) -> Setup:
    """Make, or with `resume` take up, the run's folder; look at the images; make a tokenizer if need be.

    Raises:
        UserError: for anything in the configuration, the data or the run folder that the user can mend.
    """
    mesh, options = make_mesh(experiment.mesh), experiment.train
    check_mesh(experiment.model, mesh)
    rows = experiment.data.batch_size // options.accumulation
    check_divides(mesh, {"data.batch_size / train.accumulation": ("act_batch", rows)})
    model = blueprint(experiment.model, Compute(dtype=options.dtype, remat=options.remat))
    optimizer = make_optimizer(experiment.optimizer, options.steps, model.decay, model.axes)
    device = jax.devices()[0]
    _log.info(
        "%.1fM parameters on %d x %s; %s products",
        model.count / 1e6, jax.device_count(), device.device_kind, options.dtype,
    )  # fmt: skip
    run = RunFolder(experiment.run.folder)
    source = None if run.has_checkpoint else _initial(experiment.init.source)
    on_first(lambda: _create(run, experiment, resume))
    splits, tokenizer = first_before_others(lambda: _prepare(experiment, run, source))
    return Setup(experiment, run, mesh, model, optimizer, splits, tokenizer)


def _initial(source: str | None) -> RunFolder | None:
    """The run whose weights are begun from; one that has a checkpoint of its own needs it no more."""
    if source is None:
        return None
    try:
        return RunFolder.open(Path(source))
    except UserError as error:
        raise UserError(
            f"init.from: {error}; train or import that run first, or name its folder with --set init.from=..."
        ) from None


def _create(run: RunFolder, experiment: Experiment, resume: bool) -> None:
    RunFolder.create(run.path, to_yaml(experiment), resume)


def _prepare(experiment: Experiment, run: RunFolder, source: RunFolder | None) -> tuple[Splits, Tokenizer]:
    data, text = experiment.data, experiment.model.text
    cache = Path(data.cache) if data.cache else Path(experiment.run.dir) / ".cache"
    splits = open_splits(data, experiment.seed, cache)
    tokenizer = _tokenizer(experiment, splits, run, source, cache)
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"the tokenizer in {tokenizer.path} has {tokenizer.vocab_size} tokens, more than "
            f"model.text.vocab_size ({text.vocab_size}): raise that"
        )
    cut, count, longest = count_cut(splits.train, tokenizer, text.length)
    if cut:
        _log.warning(
            "%d of %d captions are cut to model.text.length (%d); the longest has %d tokens",
            cut, count, text.length, longest,
        )  # fmt: skip
    _log.info("%s images to train on, %s held out", f"{len(splits.train):,}", f"{len(splits.heldout):,}")
    return splits, tokenizer


def _tokenizer(
    experiment: Experiment, splits: Splits, run: RunFolder, source: RunFolder | None, cache: Path
) -> Tokenizer:
    """That of the weights that the run begins with, if any: they mean nothing under another vocabulary."""
    options, weights = experiment.tokenizer, run if run.has_checkpoint else source
    if weights is not None:
        tokenizer = CaptionTokenizer.load(weights.tokenizer)
        if options.path and CaptionTokenizer.load(options.path).fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"tokenizer.path: {options.path} is not the tokenizer of the weights to begin with "
                f"({tokenizer.path}), to which its ids would mean something else: leave tokenizer.path out"
            )
        return tokenizer
    return caption_tokenizer(
        splits.train,
        cache,
        path=options.path,
        vocab_size=options.vocab_size or experiment.model.text.vocab_size,
        pattern=options.pattern,
        name=f"{'tokenizer' if options.vocab_size else 'model.text'}.vocab_size",
    )


def state_at(setup: Setup, checkpointer: Checkpointer, step: int) -> State:
    """The state that the checkpoint of `step` holds; at step 0 that of weights that were imported, of
    `init.from`'s or of fresh ones.
    """
    experiment, model, mesh = setup.experiment, setup.model, setup.mesh
    made_of = model, experiment.train, setup.optimizer, mesh
    if step > 0:
        return restored_state(*made_of, checkpointer, step)
    if 0 in checkpointer.steps():
        params = checkpointer.restore_params(0, targets(model.shapes, shardings(mesh, model.axes)))
        return state_from(*made_of, params)
    if experiment.init.source is None:
        return init_state(*made_of, experiment.seed)
    run = RunFolder.open(Path(experiment.init.source))
    return state_from(*made_of, load_params(run, experiment.model, model, mesh))


def load_params(run: RunFolder, config: CLIPConfig, model: Blueprint, mesh: Mesh) -> Params:
    """The parameters of a run's newest intact checkpoint, placed on the mesh; the optimizer is not read.

    A model that computes otherwise with the same parameters (another patch dropout, say) may take them,
    which is said.

    Raises:
        UserError: if there is no such checkpoint, or its model has another shape.
    """
    trained = load(Experiment, run.config).model
    there, here = _flat(to_dict(trained), "model"), _flat(to_dict(config), "model")
    differing = ", ".join(
        f"{key} is {there.get(key)} there and {here.get(key)} here"
        for key in {**here, **there}
        if here.get(key) != there.get(key)
    )
    if _shapes(blueprint(trained)) != _shapes(model):
        raise UserError(
            f"init.from: the model in {run.path} has other parameters than `model` here ({differing}): "
            f"take over the `model` section of {run.config}"
        )
    if differing:
        _log.info("init.from: the weights of %s in another model: %s", run.path, differing)
    return newest_params(run, targets(model.shapes, shardings(mesh, model.axes)))


def _flat(section: Any, key: str) -> dict[str, Any]:
    if not isinstance(section, dict):
        return {key: section}
    return {k: v for name, value in section.items() for k, v in _flat(value, f"{key}.{name}").items()}


def _shapes(model: Blueprint) -> Params:
    return jax.tree.map(lambda s: s.shape, model.shapes)


def require_same_data(setup: Setup, step: int, meta: Mapping[str, Any]) -> None:
    """Raise `UserError` if the run's checkpoint of `step` was trained on other pairs or another tokenizer."""
    folder = setup.run.checkpoints
    if meta["pairs_fingerprint"] != setup.identity["pairs_fingerprint"]:
        raise UserError(
            f"the images or captions have changed since checkpoint {step} in {folder} was written: "
            "restore them, or start another run (run.name) that begins from this one (init.from)"
        )
    if meta["tokenizer_fingerprint"] != setup.identity["tokenizer_fingerprint"]:
        raise UserError(
            f"the tokenizer in {setup.tokenizer.path} is not the one that checkpoint {step} in {folder} was "
            "trained with: bring that back"
        )
