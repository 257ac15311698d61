"""Safetensors files: what the format's own reader makes of ours, and what damage is named."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from core.errors import UserError
from export.shards import INDEX, SINGLE, find_tensors, write_tensors

SHAPES = {"b": (3, 5), "a": (7,), "large": (40, 10), "c": (2, 2, 3)}


@pytest.fixture(params=[np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)], ids=str)
def values(request):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(request.param) for name, shape in SHAPES.items()}


def write(folder, values, **options):
    dtype = next(iter(values.values())).dtype
    write_tensors(
        folder, {name: v.shape for name, v in values.items()}, dtype, iter(values.values()), **options
    )


def test_in_one_file_or_several_read_by_the_formats_own_reader(values, tmp_path):
    for name, options, count in (("one", {}, 1), ("several", {"shard_bytes": 100}, 3)):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, values, **options)
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) == count
        theirs = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
                theirs |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        ours = find_tensors(folder)
        assert theirs.keys() == ours.keys() == values.keys()
        for key, value in values.items():
            assert ours[key].read().tobytes() == value.tobytes()
            assert np.array_equal(theirs[key].float().numpy(), value.astype(np.float32))
            assert ours[key].offset % value.itemsize == 0
    index = json.loads((tmp_path / "several" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
    assert index["weight_map"]["large"] == "model-00002-of-00003.safetensors"


def test_values_of_another_shape_are_a_mistake_of_ours(tmp_path):
    with pytest.raises(ValueError, match=r"a is float32\(3,\), not float32\(4,\)"):
        write_tensors(tmp_path, {"a": (4,)}, np.dtype(np.float32), iter([np.ones(3, np.float32)]))


def flip(text: bytes) -> bytes:
    return text[:8] + b"?" + text[9:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"model.safetensors is cut off: c ends at byte \d+ of \d+; copy it anew"),
        (lambda data: data[:40], "is cut off or no safetensors file"),
        (lambda data: b"PK", "is cut off or no safetensors file"),
        (lambda data: b"\xff" * 8 + data[8:], "is cut off or no safetensors file"),
        (flip, "is damaged: its header can't be read"),
        (lambda data: data.replace(b'"shape":[7]', b'"shape":[8]'), "is damaged: its header can't be read"),
        (lambda data: data.replace(b'"shape":[7]', b'"shape":null'), "is damaged: its header can't be read"),
    ],
)
def test_damage_is_named(damage, message, tmp_path):
    write(tmp_path, {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()})
    path = tmp_path / SINGLE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        find_tensors(tmp_path)


def test_a_missing_file_of_several_is_named(tmp_path):
    write(tmp_path, {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}, shard_bytes=100)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=f"lacks model-00002-of-00003.safetensors, which {INDEX} names"):
        find_tensors(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(UserError, match=f"{INDEX} is damaged"):
        find_tensors(tmp_path)
