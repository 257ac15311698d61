"""Peaks of devices, by the names that JAX gives them."""

from __future__ import annotations

import pytest

from core.devices import peak_flops


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 494e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989e12, 494e12),
        ("TPU v4", 275e12, None),
        ("TPU v5", 459e12, None),
        ("TPU v5 lite", 197e12, None),
        ("TPU v6 lite", 918e12, None),
    ],
)
def test_a_known_device_has_its_dense_peak(kind, bfloat16, float32):
    assert peak_flops(kind, "bfloat16") == bfloat16
    assert peak_flops(kind, "float32") == float32


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA GB200",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "TPU v4 lite",
        "TPU7x",
    ],
)
def test_an_unknown_device_has_none_rather_than_a_wrong_one(kind):
    assert peak_flops(kind, "bfloat16") is None
