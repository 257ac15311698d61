"""Where a run's time goes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

from jax.sharding import Mesh

from core.devices import peak_flops


class Meter:
    """Times laps by name, and turns the time between two measurements into rates."""

    def __init__(self, unit: str, per_step: int, flops: float | int | None, dtype: str, mesh: Mesh):
        """A step handles `per_step` of `unit`, of each `flops` operations in `dtype` (None: not known)."""
        self.unit, self.per_step, self.flops = unit, per_step, flops
        peak = peak_flops(mesh.devices.flat[0].device_kind, dtype)
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
        """How many so far, and the rates and seconds since the last call; evaluation stands apart.

        `checkpoint_seconds` is what saving has held up since the last call; `mfu` is the model's
        arithmetic over the devices' dense peak, and missing where that is not known.
        """
        now = time.perf_counter()
        step_seconds = now - self.last - self.laps["evaluation"] - self.laps["checkpoint"]
        rate = self.per_step / step_seconds
        values: dict[str, float | int] = {
            self.unit: step * self.per_step,
            f"{self.unit}_per_second": rate,
            "data_seconds": self.laps["data"],
            "compute_seconds": step_seconds - self.laps["data"],
            "checkpoint_seconds": self.laps["checkpoint"],
        }
        if self.peak and self.flops:
            values["mfu"] = rate * self.flops / self.peak
        self.last = now
        self.laps.clear()
        return values
