"""The configuration sections that every kind of run shares. Reading them needs no JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from core.config import config
from core.errors import UserError


@config
class RunConfig:
    """Name and place of the run folder."""

    name: str
    dir: str = "runs"

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not name or name.startswith(".") or "/" in name:
            raise ValueError(f"run.name is {name!r}: it names one folder, without '/' and not hidden")
        return name

    @property
    def folder(self) -> Path:
        return Path(self.dir) / self.name


@config
class MeshConfig:
    """Devices along each mesh axis; -1, for one axis, takes all devices that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1

    @model_validator(mode="after")
    def _check(self):
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor", "context", "expert")}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name} is {size}: at least 1, or -1 for all remaining devices")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError("more than one mesh axis is -1: only one can take the remaining devices")
        return self

    def sizes(self, devices: int, kind: str = "") -> dict[str, int]:
        """The size of each axis on that many devices, of a `kind` that the message names.

        Raises:
            UserError: if their product is not the number of devices.
        """
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor", "context", "expert")}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        rest = [name for name, size in sizes.items() if size == -1]
        if rest and devices % fixed == 0:
            sizes[rest[0]] = devices // fixed
        if math.prod(sizes.values()) != devices:
            asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size != 1)
            raise UserError(
                f"the mesh {asked or 'of one device'} does not match the {devices} {kind or 'planned'} "
                "device(s): the product of its axes must be the number of devices (-1 takes the rest)"
            )
        return sizes


@config
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2017), Muon or plain SGD, with warm-up and a decay of the learning rate.

    `cosine` falls from the peak to `final_fraction` of it over the whole run; `wsd` (warm-up, stable,
    decay; Hu et al. 2024, arXiv:2404.06395) holds the peak and falls linearly in the last `decay_fraction`,
    or in all that the warm-up leaves of it. `rates` are factors on the updates of some parameters, by path or
    by the path's beginning: an embedding of unit size learns little at the rate of a narrow matrix.
    """

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    learning_rate: float = Field(3e-4, gt=0, allow_inf_nan=False)
    rates: dict[str, float] = Field(default_factory=dict)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    final_fraction: float = Field(0.1, ge=0, le=1)
    decay_fraction: float = Field(0.2, ge=0, le=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    momentum: float = Field(0.95, ge=0, lt=1)  # Muon's
    epsilon: float = Field(1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)
    clip_norm: float | None = Field(1.0, gt=0, allow_inf_nan=False)
    offload: bool = False  # keep the state in the host's memory, and fetch it for each update


@config
class CheckpointConfig:
    """How often a run saves itself, and how many checkpoints it keeps."""

    every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)


@config
class DivergenceConfig:
    """When training counts as having gone wrong (`core.divergence`), and what is done then.

    The run goes back to its last good checkpoint and passes over the batches from `skip` before the first bad
    step to `skip` after the last, at most `rewinds` times; the next time it stops.
    """

    threshold: float = Field(6.0, gt=0, allow_inf_nan=False)  # robust standard deviations above the median
    patience: int = Field(3, ge=1)  # bad steps in a row, or bad evaluations of a watched metric
    skip: int = Field(16, ge=0)
    rewinds: int = Field(3, ge=0)
    watch: dict[str, Literal["min", "max"]] = Field(
        default_factory=dict
    )  # evaluated metric: which way is better

    def require_watched(self, evaluated: Sequence[str], every: int) -> None:
        """Check that evaluations, each `every` steps, are made and have what is watched.

        Raises:
            ValueError: naming the metric or the key.
        """
        for name in self.watch:
            if name not in evaluated:
                raise ValueError(
                    f"divergence.watch: no evaluation has '{name}'; they have {', '.join(evaluated)}"
                )
        if self.watch and not every:
            raise ValueError("divergence.watch needs evaluations while the run trains: set eval.every")


@config
class TokenizerConfig:
    """Where the tokenizer comes from: `path`, or trained on the training split.

    `path` is a `tokenizer.json` (byte-level or with byte fallback), a SentencePiece `.model` (bpe, such as
    Llama 2's), or the folder of one. The ids are the maker's, but special tokens written in a text are text.
    """

    path: str | None = None
    vocab_size: int | None = None  # None: the model's
    pattern: Literal["gpt2", "llama3"] = "llama3"

    def require_room(self, rows: int, key: str) -> None:
        """Check that it fits an embedding of so many `rows`, which `key` says.

        Raises:
            ValueError: naming what doesn't fit, or two keys that exclude each other.
        """
        if self.vocab_size is not None and self.path is not None:
            raise ValueError(
                "tokenizer.vocab_size is for a tokenizer to train, and tokenizer.path names one: give either"
            )
        if self.vocab_size is not None and self.vocab_size > rows:
            raise ValueError(f"tokenizer.vocab_size ({self.vocab_size}) is larger than {key} ({rows})")


@config
class InitConfig:
    """Start from the weights of another run's newest checkpoint."""

    source: str | None = Field(None, alias="from")
