"""One contrastive training run: everything `python -m clip.train` reads. Reading it needs no JAX."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from clip.data.config import DataConfig
from clip.model.config import CLIPConfig
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

EVALUATED = ("heldout_loss", "image_to_text_recall_at_1", "text_to_image_recall_at_1")


@config
class TrainConfig:
    """The training step and how many of them."""

    steps: int = Field(ge=1)
    # Of the products; weights and sums stay float32. float16 brings dynamic loss scaling.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    accumulation: int = Field(1, ge=1)  # microbatches a step; each example still sees the whole batch
    loss: Literal["softmax", "sigmoid"] = "softmax"  # CLIP's (InfoNCE), or SigLIP's
    # Where an example's negatives are compared with it: `dense` on every device for the whole batch, `local`
    # on its own device, `chunked` the same in pieces of `chunk`, so that only they are held.
    negatives: Literal["dense", "local", "chunked"] = "local"
    chunk: int = Field(1024, ge=1)
    remat: Literal["none", "full", "dots"] = "none"
    # Of both towers. `auto`: cuDNN's where it can, else the reference, see `clip.setup.choose_attention`.
    attention: Literal["auto", "reference", "blockwise", "pallas", "cudnn", "ring"] = "auto"
    scan_layers: bool = True  # false: a step on a CPU takes a tenth less time, and longer to compile

    @property
    def average(self) -> None:
        """No moving average of the parameters is kept (`core.state.StepOptions`)."""


@config
class EvalConfig:
    """Held-out loss, retrieval and zero-shot accuracy, each `every` steps and at the end."""

    every: int = Field(0, ge=0)  # 0: at the end only
    images: int | None = Field(None, ge=1)  # at most so many in a scheduled evaluation; None: all


@config
class Experiment:
    """The whole configuration of a contrastive training run."""

    run: RunConfig
    data: DataConfig
    model: CLIPConfig
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
        batch = self.data.batch_size
        if batch % self.train.accumulation:
            raise ValueError(
                f"data.batch_size ({batch}) is not a multiple of "
                f"train.accumulation ({self.train.accumulation})"
            )
        if self.train.loss == "sigmoid" and not self.model.logit_bias:
            raise ValueError(
                "train.loss sigmoid needs model.logit_bias: true, or nearly all pairs start wrong"
            )
        if self.train.loss == "softmax" and self.model.logit_bias:
            raise ValueError("model.logit_bias has no effect on train.loss softmax: set one or the other")
        self.divergence.require_watched(EVALUATED, self.eval.every)
        self.tokenizer.require_room(self.model.text.vocab_size, "model.text.vocab_size")
        return self
