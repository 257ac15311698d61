"""What a run is made of, checked before its first step: folder, mesh, model, optimizer, data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from jax.sharding import Mesh

from clip.config import Experiment
from clip.data.captions import count_cut
from clip.data.corpus import Splits, open_splits
from clip.data.tokenizer import CaptionTokenizer, caption_tokenizer
from clip.model.config import CLIPConfig
from clip.model.model import blueprint, check_mesh
from core.config import to_yaml
from core.distributed import first_before_others, on_first
from core.errors import UserError
from core.kinds import DUAL_ENCODER
from core.mesh import check_divides, make_mesh
from core.module import Blueprint
from core.optim import Optimizer, make_optimizer
from core.run import RunFolder
from core.start import initial_run
from llm.model.attention import Backend, choose_backend
from llm.model.config import BlockShape
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
    backend = choose_attention(options.attention, jax.default_backend(), experiment.model, options.dtype)
    compute = Compute(options.dtype, backend, options.remat, options.scan_layers)
    model = blueprint(experiment.model, compute)
    optimizer = make_optimizer(experiment.optimizer, options.steps, model.decay, model.axes)
    device = jax.devices()[0]
    _log.info(
        "%.1fM parameters on %d x %s; %s products, %s attention",
        model.count / 1e6, jax.device_count(), device.device_kind, options.dtype, backend,
    )  # fmt: skip
    run = RunFolder(experiment.run.folder)
    source = None
    if experiment.init.source is not None and not run.has_checkpoint:  # else it needs the other no more
        source = initial_run(experiment.init.source, DUAL_ENCODER)
    on_first(lambda: _create(run, experiment, resume))
    splits, tokenizer = first_before_others(lambda: _prepare(experiment, run, source))
    return Setup(experiment, run, mesh, model, optimizer, splits, tokenizer)


def choose_attention(
    asked: Literal["auto", "reference", "blockwise", "pallas", "cudnn", "ring"],
    platform: str,
    config: CLIPConfig,
    dtype: str,
) -> Backend:
    """The attention backend of both towers: the one asked for; by `auto` cuDNN's where both can have it, else
    the reference, since an image or a caption is a block or two, of which `blockwise` saves nothing.

    Args:
        asked: `train.attention`.
        platform: as `jax.default_backend()` names it.
        dtype: of the products.

    Raises:
        UserError: if a tower can't have the backend asked for, with the reason and one that it can have.
    """
    rows: tuple[tuple[str, BlockShape, int], ...] = (
        ("image", config.image, config.image.num_positions),
        ("text", config.text, config.text.length),
    )
    best = set()
    for name, tower, length in rows:
        try:
            best.add(
                choose_backend(asked, platform, tower, dtype=dtype, length=length, isolated=False, context=1)
            )
        except UserError as error:
            raise UserError(f"model.{name}, with heads of {tower.head_dim} dimensions: {error}") from None
    if asked != "auto":
        return asked
    return "cudnn" if best == {"cudnn"} else "reference"


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
