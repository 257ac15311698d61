"""A training step as production compiles it, on random tokens, ready to be timed and looked into."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from core.options import OptimizerConfig
from llm.config import TrainConfig
from llm.model.config import ModelConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

OPTIMIZER = OptimizerConfig(schedule="constant")


class Training:
    """State, batch and the compiled step. Each row is one text, as with `data.isolate: false`."""

    def __init__(self, config: ModelConfig, train: TrainConfig, batch: int, sequence: int, mesh: Mesh):
        import jax

        from core.optim import make_optimizer
        from core.state import init_state
        from llm.data.loader import Batch
        from llm.model.attention import choose_backend
        from llm.model.transformer import Compute, blueprint
        from llm.step import jit_train_step, put_batch

        self.backend = choose_backend(
            train.attention, jax.default_backend(), config, dtype=train.dtype, length=sequence,
            isolated=False, context=mesh.shape["context"],
        )  # fmt: skip
        self.model = blueprint(config, Compute(train.dtype, self.backend, train.remat, train.scan_layers))
        optimizer = make_optimizer(OPTIMIZER, train.steps, self.model.decay, self.model.axes)
        tokens, targets = random_tokens(config.vocab_size, batch, sequence)
        positions = np.broadcast_to(np.arange(sequence, dtype=np.int32), tokens.shape)
        weights = np.ones(tokens.shape, np.float32)
        with jax.set_mesh(mesh):
            self.state = init_state(self.model, train, optimizer, mesh, seed=0)
            self.batch = put_batch(Batch(tokens, targets, None, positions, weights), mesh)
            self.traced = jit_train_step(self.model, train, optimizer, mesh).trace(self.state, self.batch)
            self.program = self.traced.lower().compile()

    def step(self) -> float:
        """One step, to its end; the loss."""
        import jax

        self.state, metrics = self.program(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


def random_tokens(vocab: int, batch: int, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, S] and those that follow them."""
    stream = np.random.default_rng(0).integers(0, vocab, (batch, sequence + 1))
    return stream[:, :-1].astype(np.int32), stream[:, 1:].astype(np.int32)
