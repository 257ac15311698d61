"""One pretraining experiment: everything `python -m llm.train` reads. Reading it needs no JAX."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from core.config import config
from core.options import (
    CheckpointConfig,
    DivergenceConfig,
    InitConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
)
from llm.data.config import Source, check_weights
from llm.model.config import ModelConfig

EVALUATED = ("heldout_loss", "heldout_bits_per_byte")  # what `llm.eval.heldout` measures


@config
class DataConfig:
    """What is read and in which pieces.

    A source is a string, `embedded` or a glob of files, or a mapping, as `{path: "*.jsonl", field: body}`,
    `{huggingface: NAME, split: train}` or `{tfds: NAME}`, see `Source` and docs/data.md.
    """

    sequence_length: int = Field(ge=1)
    batch_size: int = Field(ge=1)  # sequences in a step, over all devices and microbatches
    sources: tuple[Source, ...] = Field((Source(path="embedded"),), min_length=1)
    # Sources of their own; None: a share of `sources` by name.
    heldout: tuple[Source, ...] | None = Field(None, min_length=1)
    heldout_fraction: float = Field(0.05, gt=0, lt=1)
    # Whether a token sees its own document only; false: all that stands before it in the window.
    isolate: bool = True
    broken_fraction: float = Field(0.001, ge=0, lt=1)  # of the records in a shard that may be left out
    # A file that drops documents or weighs them, see `llm.data.selection`; None: all count alike.
    selection: str | None = None
    cache: str | None = None  # tokenizers and token shards; None: `.cache` beside the runs

    @model_validator(mode="after")
    def _check(self):
        check_weights(self.sources)
        for number, source in enumerate(self.heldout or ()):
            if source.weight is not None:
                raise ValueError(f"data.heldout.{number} has a weight: held-out text is read once, all of it")
        return self


@config
class TrainConfig:
    """The training step and how many of them."""

    steps: int = Field(ge=1)
    # Of the products; weights and sums stay float32. float16 brings dynamic loss scaling.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    accumulation: int = Field(1, ge=1)  # microbatches a step
    # Decay per step of a moving average of the parameters, which is then the run's model; None: no average.
    average: float | None = Field(None, gt=0, lt=1)
    z_loss: float = Field(0.0, ge=0, allow_inf_nan=False)
    loss_chunk: int = Field(512, ge=1)  # positions of each sequence whose logits exist at one time
    remat: Literal["none", "full", "dots"] = "none"
    scan_layers: bool = True
    attention: Literal["auto", "reference", "blockwise", "pallas", "cudnn", "ring"] = "auto"
    # How tokens go to their experts: in slots, or only the rows there are, which takes a GPU.
    experts: Literal["padded", "ragged"] = "padded"


@config
class EvalConfig:
    """Held-out loss and samples, each `every` steps and at the end."""

    every: int = Field(0, ge=0)  # 0: at the end only
    # At most so many microbatches in a scheduled evaluation, spread over the split; None: as at the end.
    batches: int | None = Field(None, ge=1)
    prompts: tuple[str, ...] = ()
    sample_tokens: int = Field(128, ge=1)


@config
class Experiment:
    """The whole configuration of a pretraining run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    seed: int = Field(0, ge=0, lt=2**32)  # JAX looks at no more bits
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    divergence: DivergenceConfig = Field(default_factory=DivergenceConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    init: InitConfig = Field(default_factory=InitConfig)

    @model_validator(mode="after")
    def _check(self):
        length, batch = self.data.sequence_length, self.data.batch_size
        if length > self.model.max_length:
            raise ValueError(
                f"data.sequence_length ({length}) is longer than model.max_length ({self.model.max_length})"
            )
        if batch % self.train.accumulation:
            raise ValueError(
                f"data.batch_size ({batch}) is not a multiple of "
                f"train.accumulation ({self.train.accumulation})"
            )
        self.divergence.require_watched(EVALUATED, self.eval.every)
        self.tokenizer.require_room(self.model.vocab_size, "model.vocab_size")
        return self
