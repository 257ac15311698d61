"""Where a run's time goes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from core.devices import peak_flops
from llm.config import Experiment
from llm.model.flops import training_flops_per_token


class Meter:
    """Times laps by name, and turns the time between two measurements into rates."""

    def __init__(self, experiment: Experiment, mesh: Mesh):
        data = experiment.data
        self.tokens_per_step = data.batch_size * data.sequence_length
        self.flops_per_token = training_flops_per_token(experiment.model, data.sequence_length)
        peak = peak_flops(jax.devices()[0].device_kind, experiment.train.dtype)
        self.peak = peak * mesh.size if peak else None
        self.laps: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    @contextlib.contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Count the time of the block as `name`'s."""
        start = time.perf_counter()
        yield
        self.laps[name] += time.perf_counter() - start

    def measure(self, step: int) -> dict[str, float | int]:
        """Tokens so far, and the rates and seconds since the last call; evaluation stands apart.

        `checkpoint_seconds` is what saving has held up since the last call; `mfu` is the model's
        arithmetic over the devices' dense peak, and missing where that is not known.
        """
        now = time.perf_counter()
        step_seconds = now - self.last - self.laps["evaluation"] - self.laps["checkpoint"]
        rate = self.tokens_per_step / step_seconds
        values: dict[str, float | int] = {
            "tokens": step * self.tokens_per_step,
            "tokens_per_second": rate,
            "data_seconds": self.laps["data"],
            "compute_seconds": step_seconds - self.laps["data"],
            "checkpoint_seconds": self.laps["checkpoint"],
        }
        if self.peak:
            values["mfu"] = rate * self.flops_per_token / self.peak
        self.last = now
        self.laps.clear()
        return values
