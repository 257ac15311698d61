"""A plan: what a run on a mesh of devices needs, how long it takes, what holds it back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh

from core.config import parse, to_dict
from core.devices import DEVICES, Device
from core.errors import UserError
from launch.plan import memory
from launch.plan.calibration import efficiency_of
from launch.plan.communication import Exchange, exchanges, sent_by_axis
from launch.plan.layout import Layout
from launch.plan.roofline import Times, times
from llm.config import Experiment
from llm.model.flops import num_parameters
from llm.setup import check_mesh


class Plan(NamedTuple):
    """All that the tables tell; bytes and exchanges are one device's."""

    layout: Layout
    device: str
    moment: str  # of the peak
    kinds: dict[str, int]  # bytes at that moment
    capacity: int
    exchanges: list[Exchange]
    times: Times
    efficiency: float

    @property
    def peak(self) -> int:
        return sum(self.kinds.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.layout.step_tokens / self.times.step

    def hours(self, tokens: float | int) -> float:
        return tokens / self.tokens_per_second / 3600

    def as_json(self, tokens: float | int, price: float | None) -> dict[str, Any]:
        layout, found = self.layout, self.times
        hours = self.hours(tokens)
        return {
            "name": layout.experiment.run.name,
            "device": self.device,
            "devices": layout.devices,
            "mesh": layout.mesh,
            "accumulation": layout.microbatches,
            "remat": layout.experiment.train.remat,
            "parameters": num_parameters(layout.model),
            "fits": self.fits,
            "memory_per_device": self.capacity,
            "peak_bytes_per_device": self.peak,
            "peak_moment": self.moment,
            "bytes_per_device": {kind: self.kinds.get(kind, 0) for kind in memory.KINDS},
            "flops_per_step": found.flops,
            "executed_flops_per_step": found.executed_flops,
            "collective_bytes_per_step": sent_by_axis(self.exchanges),
            "seconds": {
                "compute": found.compute,
                "memory": found.memory,
                "update": found.update,
                "exchanges_exposed": found.exposed,
                "exchanges": found.exchanges,
            },
            "efficiency": self.efficiency,
            "step_seconds": found.step,
            "tokens_per_second": self.tokens_per_second,
            "mfu": found.mfu,
            "bound_by": found.bound_by,
            "tokens": tokens,
            "days": hours / 24,
            "device_hours": hours * layout.devices,
            "cost_usd": None if price is None else hours * layout.devices * price,
        }


def make_plan(experiment: Experiment, name: str, device: Device) -> Plan:
    """Plan a run on its own mesh, of devices of that name.

    Raises:
        UserError: if the model or its microbatches don't divide over the mesh, or its experts are `ragged`.
    """
    layout = Layout.of(experiment)
    if experiment.train.experts == "ragged":
        raise UserError(
            "train.experts is ragged: how many rows its experts get is known only when it runs, and the plan "
            "counts slots; set train.experts to padded"
        )
    check_mesh(experiment, AbstractMesh(tuple(layout.mesh.values()), tuple(layout.mesh)))
    efficiency = efficiency_of(name)
    moment, kinds = memory.peak(layout)
    found = exchanges(layout)
    timed = times(layout, device, efficiency)
    return Plan(layout, name, moment, kinds, device.memory, found, timed, efficiency)


def changed(experiment: Experiment, **sections: dict[str, Any]) -> Experiment:
    """The experiment with keys of some sections replaced, checked as if read from a file.

    Raises:
        UserError: if the result is no valid configuration.
    """
    data = to_dict(experiment)
    for section, values in sections.items():
        data[section] = data[section] | values
    return parse(Experiment, data)


def remedies(plan: Plan, device: Device) -> Iterator[tuple[str, Plan]]:
    """Single changes under which the run would fit, the smallest first: what alters no result and needs
    no more devices, fewer slots for experts, another mesh, then more devices, then larger ones.
    """
    experiment, mesh = plan.layout.experiment, plan.layout.mesh
    train = experiment.train
    steps: list[tuple[str, dict[str, Any]]] = []
    for _, accumulation in zip(range(8), _doubled(train.accumulation), strict=False):
        steps.append((f"--set train.accumulation={accumulation}", {"train": {"accumulation": accumulation}}))
    for remat in {"none": ("dots", "full"), "dots": ("full",), "full": ()}[train.remat]:
        steps.append((f"--set train.remat={remat}", {"train": {"remat": remat}}))
    moe = experiment.model.moe
    for capacity in (2.0, 1.25):
        if moe is not None and (moe.capacity is None or moe.capacity > capacity):
            bounded = to_dict(moe) | {"capacity": capacity}
            note = f"--set model.moe.capacity={capacity:g} (what finds no slot is dropped)"
            steps.append((note, {"model": {"moe": bounded}}))
    if mesh["data"] > 1:
        moved = mesh | {"data": 1, "fsdp": mesh["data"] * mesh["fsdp"]}
        steps.append((f"--mesh {spelled(moved)}", {"mesh": moved}))
    for _, tensor in zip(range(3), _doubled(mesh["tensor"]), strict=False):
        if mesh["fsdp"] % (tensor // mesh["tensor"]) == 0:
            moved = mesh | {"tensor": tensor, "fsdp": mesh["fsdp"] * mesh["tensor"] // tensor}
            steps.append((f"--mesh {spelled(moved)}", {"mesh": moved}))
    for _, fsdp in zip(range(10), _doubled(mesh["fsdp"]), strict=False):
        more = mesh | {"fsdp": fsdp}
        note = f"--mesh {spelled(more)} ({plan.layout.devices * fsdp // mesh['fsdp']:,} devices)"
        steps.append((note, {"mesh": more}))
    for note, sections in steps:
        try:
            other = make_plan(changed(experiment, **sections), plan.device, device)
        except UserError:
            continue
        if other.fits:
            yield note, other
    for name, larger in sorted(DEVICES.items(), key=lambda item: item[1].memory):
        if larger.memory >= plan.peak and larger.memory > plan.capacity:
            yield f"--device {name}", make_plan(experiment, name, larger)
            return


def _doubled(number: int) -> Iterator[int]:
    while True:
        number *= 2
        yield number


def spelled(mesh: dict[str, int]) -> str:
    """As `--mesh` takes it."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"
