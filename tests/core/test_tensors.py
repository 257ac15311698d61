"""Parameters in pieces: the same bits, what is asked for and no more, complete or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import core.checkpoint
from core.checkpoint import Checkpointer, newest_params
from core.errors import UserError
from core.run import RunFolder
from core.tensors import SavedParams, write_params

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_chunks(monkeypatch):
    """As if these small arrays were large ones."""
    monkeypatch.setattr(core.checkpoint, "_PIECE", 5000)
    monkeypatch.setattr(core.checkpoint, "_CHUNK", 20_000)


def make_params() -> dict:
    random = np.random.default_rng(0)
    bits = lambda *shape: random.integers(0, 2**16, shape, np.uint16)  # noqa: E731
    return {
        "blocks": {
            "kernel": random.normal(size=(3, 64, 64)).astype(np.float32),
            "experts": random.normal(size=(2, 4, 32, 64)).astype(np.float32),
            "scale": bits(3, 64).view(jnp.bfloat16.dtype),  # NaNs of all kinds too
        },
        "embedding": random.normal(size=(256, 64)).astype(np.float32),
        "temperature": np.float32(0.1),
    }


def shapes_of(params: dict, sharding=None) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params)


def pieces(params: dict, rows: int = 96) -> Iterator[tuple]:
    for name, value in params["blocks"].items():
        for i in reversed(range(len(value))):
            yield ("blocks", name), (i,), value[i]
    for start in range(0, 256, rows):
        rest = slice(start, start + rows)
        yield ("embedding",), (rest,), params["embedding"][rest]
    yield ("temperature",), (), np.asarray(params["temperature"])


def assert_same_bits(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.shape(x) == np.shape(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def bytes_read() -> int:
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def chunks(folder: Path, name: str) -> tuple[int, ...]:
    base = {"driver": "file", "path": f"{folder}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result().chunk_layout.read_chunk.shape


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("fsdp",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("devices", [1, 4])
def test_layers_experts_and_rows_lie_apart_and_are_read_alone(devices, tmp_path, small_chunks):
    params, sharding = make_params(), NamedSharding(mesh_of(devices), P())
    split = NamedSharding(mesh_of(devices), P(None, None, "fsdp"))
    placed = jax.device_put(params, sharding)
    placed["blocks"]["kernel"] = jax.device_put(params["blocks"]["kernel"], split)
    run = RunFolder(tmp_path)
    with Checkpointer(run.checkpoints) as checkpointer:
        checkpointer.save(1, placed, {"kernel": placed["blocks"]["kernel"]}, {})
    folder = run.checkpoints / "1" / "params"
    assert chunks(folder, "blocks.kernel") == (1, 64, 64 // devices)
    assert chunks(folder, "blocks.experts")[:2] == (1, 1)
    assert chunks(folder, "blocks.scale")[0] == 3, "too small to be cut"
    assert chunks(folder, "embedding")[0] == 64
    saved = SavedParams.open(run)
    assert saved.step == 1 and saved.shapes == shapes_of(params)
    kernel, experts, embedding = params["blocks"]["kernel"], params["blocks"]["experts"], params["embedding"]
    for path, index, value, most in (
        (("blocks", "kernel"), (1,), kernel[1], 64 * 64 * 4),
        (("blocks", "kernel"), (slice(-1, None),), kernel[-1:], 64 * 64 * 4),
        (("blocks", "experts"), (1, -2), experts[1, -2], 32 * 64 * 4),
        (("embedding",), (slice(0, 5), 3), embedding[0:5, 3], 64 * 64 * 4),
        (("embedding",), (slice(60, 70),), embedding[60:70], 128 * 64 * 4),
        (("blocks", "scale"), (), params["blocks"]["scale"], 3 * 64 * 2),
    ):
        before = bytes_read()
        part = saved.read(path, index)
        assert part.shape == value.shape and part.tobytes() == value.tobytes()
        assert bytes_read() - before <= most + 4000, "the chunks, and their index"
    with pytest.raises(IndexError):
        saved.read(("embedding",), (256,))


def test_a_checkpoint_of_whole_arrays_is_read_as_well(tmp_path, monkeypatch):
    """As versions before wrote them."""
    params, run = make_params(), RunFolder(tmp_path)
    monkeypatch.setattr(core.checkpoint, "layout", lambda leaf: core.checkpoint.ocp.SaveArgs())
    with Checkpointer(run.checkpoints) as checkpointer:
        checkpointer.save(1, jax.tree.map(jnp.asarray, params), {}, {})
    assert chunks(run.checkpoints / "1" / "params", "blocks.experts") == (2, 4, 32, 64)
    part = SavedParams.open(run).read(("blocks", "experts"), (1, slice(1, 3)))
    assert part.tobytes() == params["blocks"]["experts"][1, 1:3].tobytes()
    assert_same_bits(newest_params(run, shapes_of(params)), params)


@pytest.mark.parametrize(("saved_on", "restored_on"), [(4, 8), (8, 2)])
def test_small_chunks_are_restored_onto_another_mesh(saved_on, restored_on, tmp_path, small_chunks):
    params = {"kernel": np.random.default_rng(0).normal(size=(3, 64, 64)).astype(np.float32)}
    place = {n: NamedSharding(mesh_of(n), P(None, "fsdp")) for n in (saved_on, restored_on)}
    run = RunFolder(tmp_path)
    with Checkpointer(run.checkpoints) as checkpointer:
        checkpointer.save(1, jax.device_put(params, place[saved_on]), {}, {})
    restored = newest_params(run, shapes_of(params, place[restored_on]))
    assert_same_bits(restored, params)
    assert restored["kernel"].sharding == place[restored_on]


@pytest.mark.parametrize("rows", [256, 96, 64])
def test_what_is_written_in_pieces_is_restored_bit_for_bit(rows, tmp_path, small_chunks):
    params, run = make_params(), RunFolder(tmp_path)
    write_params(run, shapes_of(params), pieces(params, rows), {"source": "a test"})
    assert [p.name for p in run.checkpoints.iterdir()] == ["0"]
    assert_same_bits(newest_params(run, shapes_of(params)), params)
    everywhere = NamedSharding(mesh_of(8), P())
    with Checkpointer(run.checkpoints) as checkpointer:
        assert checkpointer.newest_intact() == 0
        assert checkpointer.read_meta(0) == {"format": 1, "step": 0, "source": "a test"}
        assert_same_bits(checkpointer.restore_params(0, shapes_of(params, everywhere)), params)
    assert chunks(run.checkpoints / "0" / "params", "blocks.experts") == (1, 1, 32, 64)
    saved = SavedParams.open(run)
    assert saved.read(("embedding",), (slice(20, 30),)).tobytes() == params["embedding"][20:30].tobytes()
    with pytest.raises(UserError, match="already holds a checkpoint"):
        write_params(run, shapes_of(params), pieces(params), {})


def without_last(params):
    return list(pieces(params))[:-1]


def twice(params):
    return [*pieces(params), (("embedding",), (slice(255, 256), slice(8, 9)), params["embedding"][255:, 8:9])]


def other_type(params):
    return [(("embedding",), (), params["embedding"].astype(np.float64))]


def other_shape(params):
    return [(("embedding",), (slice(0, 4),), params["embedding"][:1])]


def out_of_range(params):
    return [(("blocks", "kernel"), (3,), params["blocks"]["kernel"][0])]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (without_last, ValueError, "temperature: 0 of 1 values were written"),
        (twice, ValueError, r"embedding: .* is written twice"),
        (other_type, ValueError, r"embedding\[\] is float32\[256, 64\], and the piece is float64\[256, 64\]"),
        (other_shape, ValueError, r"is float32\[4, 64\], and the piece is float32\[1, 64\]"),
        (out_of_range, IndexError, "out of range"),
        (lambda params: [(("head",), (), params["embedding"])], KeyError, "head"),
    ],
)
def test_what_is_not_the_whole_is_refused_and_leaves_nothing(spoil, error, message, tmp_path):
    params, run = make_params(), RunFolder(tmp_path)
    with pytest.raises(error, match=message):
        write_params(run, shapes_of(params), iter(spoil(params)), {})
    assert not list(run.checkpoints.iterdir())
    write_params(run, shapes_of(params), pieces(params), {})
    assert_same_bits(newest_params(run, shapes_of(params)), params)


def test_a_full_disk_is_told_and_nothing_is_left(small_disk):
    run = RunFolder(small_disk)
    shapes = {"kernel": jax.ShapeDtypeStruct((8, 1 << 20), np.uint8)}
    parts = ((("kernel",), (i,), np.full(1 << 20, i, np.uint8)) for i in range(8))
    with pytest.raises(UserError, match="the disk is full: free some space for the weights in"):
        write_params(run, shapes, parts, {})
    assert not list(run.checkpoints.iterdir())


CHILD = """
    import os, signal, sys
    from pathlib import Path
    import jax, numpy as np
    from core.run import RunFolder
    from core.tensors import SavedParams, write_params

    run, moment = RunFolder(Path(sys.argv[1])), sys.argv[2]
    layers, piece = 8, (2 << 20, 4)  # 32 MiB in float32
    shapes = {"kernel": jax.ShapeDtypeStruct((layers, *piece), np.float32)}

    def memory(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    def pieces():
        for i in range(layers):
            if moment == "killed" and i == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield ("kernel",), (i,), np.full(piece, i, np.float32)

    if moment == "read":
        saved = SavedParams.open(run)
        saved.read(("kernel",), (0, slice(0, 1)))
        before = memory("VmRSS")
        for i in range(layers):
            assert (saved.read(("kernel",), (i,)) == i).all()
    else:
        np.asarray(jax.numpy.zeros(1))
        before = memory("VmRSS")
        write_params(run, shapes, pieces(), {})
    print(memory("VmHWM") - before)
"""


def child(run: Path, moment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(run), moment],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True,
    )  # fmt: skip


def test_a_kill_leaves_no_checkpoint(tmp_path):
    done = child(tmp_path, "killed")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "checkpoints").iterdir()) and not Checkpointer(tmp_path / "checkpoints").steps()
    with pytest.raises(UserError, match="has no checkpoint"):
        SavedParams.open(RunFolder(tmp_path))
    params = make_params()
    write_params(RunFolder(tmp_path), shapes_of(params), pieces(params), {})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["0"]


@pytest.mark.slow
def test_memory_is_of_a_few_pieces_not_of_the_whole(tmp_path):
    """270 MB in pieces of 34 MB."""
    piece = 32 << 20
    for moment in ("write", "read"):
        done = child(tmp_path, moment)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 4 * piece, moment
