"""Devices to plan for: those of `core.devices` by name, or one of your own from a YAML file."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from core.config import config, load
from core.devices import Device, named
from core.errors import UserError


@config
class DeviceFile:
    """A device as its data sheet tells it; bandwidths are what one device sends, each way."""

    memory_gb: float = Field(gt=0, allow_inf_nan=False)  # of 10**9 bytes
    bfloat16_tflops: float = Field(gt=0, allow_inf_nan=False)  # dense
    float32_tflops: float | None = Field(None, gt=0, allow_inf_nan=False)
    memory_gb_per_second: float = Field(gt=0, allow_inf_nan=False)
    link_gb_per_second: float = Field(gt=0, allow_inf_nan=False)  # to others of its node
    network_gb_per_second: float = Field(gt=0, allow_inf_nan=False)  # to other nodes
    devices_per_node: int = Field(8, ge=1)


def find(name: str) -> Device:
    """The device by name, or from the file if `name` ends in `.yaml`.

    Raises:
        UserError: for an unknown name, or a file that lacks something or has something else.
    """
    if not name.endswith((".yaml", ".yml")):
        try:
            return named(name)
        except UserError as error:
            raise UserError(f"{error} Or name a YAML file of your own, see docs/scaling.md") from None
    file = load(DeviceFile, Path(name))
    peaks = {"bfloat16": file.bfloat16_tflops * 1e12, "float16": file.bfloat16_tflops * 1e12}
    if file.float32_tflops is not None:
        peaks["float32"] = file.float32_tflops * 1e12
    return Device(
        (),
        peaks,
        round(file.memory_gb * 1e9),
        file.memory_gb_per_second * 1e9,
        file.link_gb_per_second * 1e9,
        file.network_gb_per_second * 1e9,
        file.devices_per_node,
    )
