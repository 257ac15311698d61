"""Checkpoints: bit for bit, onto any mesh; damage to any file is found and named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from core import manifest
from core.checkpoint import Checkpointer
from core.errors import UserError


def make_state(seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "blocks": {"kernel": jax.random.normal(keys[0], (16, 8)), "bias": jax.random.normal(keys[1], (8,))},
        "embed": jax.random.normal(keys[2], (8, 16), jnp.bfloat16),
    }
    return params, optax.adam(1e-3).init(params)


def targets(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with Checkpointer(folder) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, *make_state(step), {"data": {"skipped": [[3, 5]]}})
    return folder


@pytest.fixture
def folder(two_saved, tmp_path):
    return Path(shutil.copytree(two_saved, tmp_path / "checkpoints"))


def files_of(step_folder: Path) -> list[str]:
    return sorted(p.relative_to(step_folder).as_posix() for p in step_folder.rglob("*") if p.is_file())


def test_restores_the_same_bits_of_every_dtype(tmp_path):
    values = np.array([0.0, -0.0, np.inf, np.nan, 1e-45, 0.1], np.float32)
    params = {
        "float32": jnp.array(values)
        .at[3]
        .set(jax.lax.bitcast_convert_type(jnp.int32(0x7FC12345), jnp.float32)),
        "bfloat16": jnp.array(values, jnp.bfloat16),
        "int8": jnp.arange(-128, 128, dtype=jnp.int8),
        "bool": jnp.array([True, False]),
        "key": jax.random.key(3),
        "none": None,
    }
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(7, params, {"count": jnp.int32(7)}, {})
        checkpointer.wait()
        restored, opt = checkpointer.restore(7, targets(params), targets({"count": jnp.int32(0)}))
    assert int(opt["count"]) == 7
    assert_same_bits(jax.random.key_data(restored.pop("key")), jax.random.key_data(params.pop("key")))
    assert_same_bits(restored, params)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.identity(),
        optax.sgd(0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(0.1))),
        optax.masked(optax.adam(0.1), {"blocks": {"kernel": True, "bias": False}, "embed": True}),
    ],
    ids=["empty", "stateless", "chain", "masked"],
)
def test_optimizer_states_keep_their_structure(tmp_path, optimizer):
    params, _ = make_state()
    state = optimizer.init(params)
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(1, params, state, {})
        checkpointer.wait()
        assert_same_bits(checkpointer.restore(1, targets(params), targets(state)), (params, state))


@pytest.mark.parametrize(("saved_on", "restored_on"), [(1, 8), (8, 1), (8, 4), (2, 8)])
def test_restores_onto_another_mesh(tmp_path, saved_on, restored_on):
    def place(devices):
        mesh = jax.make_mesh(
            (devices,), ("fsdp",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,)
        )
        return NamedSharding(mesh, P("fsdp"))

    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8)), "bias": jnp.arange(8.0)}
    state = optax.adam(1e-3).init(params)[0].mu
    on_mesh = jax.device_put((params, state), place(saved_on))
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(1, *on_mesh, {})
        checkpointer.wait()
        there = place(restored_on)
        restored = checkpointer.restore(1, targets(params, there), targets(state, there))
    assert_same_bits(restored, (params, state))
    assert all(x.sharding == there for x in jax.tree.leaves(restored))


def test_the_saved_values_survive_donation(tmp_path):
    params = {str(i): jax.random.normal(jax.random.key(i), (256, 1024)) for i in range(8)}
    expected = jax.tree.map(lambda x: np.array(x, copy=True), params)
    update = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x + 1, tree), donate_argnums=0)
    shapes = targets(params)
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(1, params, {}, {})
        for _ in range(5):
            params = jax.block_until_ready(update(params))
        checkpointer.wait()
        assert_same_bits(checkpointer.restore_params(1, shapes), expected)


def test_meta_holds_what_was_given_with_format_and_step(folder):
    meta = Checkpointer(folder).read_meta(2)
    assert meta == {"format": 1, "step": 2, "data": {"skipped": [[3, 5]]}}


def test_the_newest_are_kept(tmp_path):
    with Checkpointer(tmp_path / "c", keep=2) as checkpointer:
        assert checkpointer.steps() == [] and checkpointer.newest_intact() is None
        for step in (5, 10, 100):
            checkpointer.save(step, *make_state(step), {})
        checkpointer.save(100, *make_state(0), {})  # stands already
        checkpointer.wait()
        assert checkpointer.steps() == [10, 100] and checkpointer.latest_step() == 100
        params, opt = make_state(100)
        assert_same_bits(checkpointer.restore(100, targets(params), targets(opt)), (params, opt))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["10", "100"]


def test_parameters_alone_need_no_optimizer(folder):
    shutil.rmtree(folder / "2" / "opt")
    checkpointer = Checkpointer(folder)
    assert checkpointer.newest_intact(optimizer=False) == 2
    params, _ = make_state(2)
    assert_same_bits(checkpointer.restore_params(2, targets(params)), params)


def test_reading_changes_nothing(folder):
    (folder / "3.saving.orbax-checkpoint-tmp").mkdir()
    (folder / "2" / "meta" / "metadata").write_text("{}")
    before = sorted(folder.rglob("*"))
    with Checkpointer(folder) as checkpointer:
        assert checkpointer.newest_intact() == 1
        checkpointer.read_meta(1)
    assert sorted(folder.rglob("*")) == before


def flip_bit(path: Path) -> str:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << (len(data) % 8)
    path.write_bytes(data)
    return "not what was written" if path.name == manifest.NAME else "checksum differs"


def truncate(path: Path) -> str:
    os.truncate(path, path.stat().st_size - 1)
    return "not what was written" if path.name == manifest.NAME else "truncated"


def empty(path: Path) -> str:
    os.truncate(path, 0)
    return "not what was written" if path.name == manifest.NAME else "truncated (0 of"


def lengthen(path: Path) -> str:
    path.write_bytes(path.read_bytes() + b"\n")
    return "not what was written" if path.name == manifest.NAME else "too long"


def remove(path: Path) -> str:
    path.unlink()
    return "missing"


@pytest.mark.parametrize("damage", [flip_bit, truncate, empty, lengthen, remove])
def test_damage_to_any_file_is_named_and_the_checkpoint_before_it_used(folder, caplog, damage):
    names = files_of(folder / "2")
    assert {"manifest.json", "meta/metadata", "params/_METADATA", "opt/manifest.ocdbt"} < set(names)
    for name in names:
        path = folder / "2" / name
        intact = path.read_bytes()
        problem = damage(path)
        caplog.clear()
        checkpointer = Checkpointer(folder)
        assert checkpointer.newest_intact() == 1, name
        assert f"2/{name}: {problem}" in caplog.text
        with pytest.raises(UserError, match=f"{name}: {problem}".replace("(", r"\(")):
            checkpointer.restore(2, *map(targets, make_state()))
        path.write_bytes(intact)
    assert Checkpointer(folder).newest_intact() == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 1}', '{"format": "x", "files": {}}', '{"files": 3, "format": 1}'],
)
def test_a_manifest_of_garbage_is_damage(folder, text):
    (folder / "2" / "manifest.json").write_text(text)
    assert Checkpointer(folder).newest_intact() == 1


def test_every_bit_of_the_manifest_counts(folder):
    path = folder / "2" / "manifest.json"
    intact = path.read_bytes()
    for i in range(0, len(intact), 7):
        path.write_bytes(intact[:i] + bytes([intact[i] ^ 1 << (i % 8)]) + intact[i + 1 :])
        assert manifest.find_damage(folder / "2", ()) == "manifest.json: not what was written"


def test_all_damaged_is_an_error_that_names_them(folder):
    for step in ("1", "2"):
        flip_bit(folder / step / "params" / "_METADATA")
    with pytest.raises(UserError, match=r"every checkpoint .*\(2/params/_METADATA: .*; 1/params/_METADATA: "):
        Checkpointer(folder).newest_intact()


def test_a_run_that_went_back_keeps_the_damaged_checkpoint_aside(folder, caplog):
    flip_bit(folder / "2" / "meta" / "metadata")
    with Checkpointer(folder) as checkpointer:
        assert checkpointer.newest_intact() == 1
        checkpointer.restore(1, *map(targets, make_state()))
        checkpointer.save(2, *make_state(2), {})
    assert "2.aside" in caplog.text
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "2.aside"]
    assert Checkpointer(folder).newest_intact() == 2


def test_a_newer_format_asks_for_an_update(folder):
    path = folder / "2" / "manifest.json"
    path.write_text(manifest._render(2, json.loads(path.read_text())["files"]))
    for read in (lambda c: c.newest_intact(), lambda c: c.read_meta(2)):
        with pytest.raises(UserError, match=r"format 2, and this version reads up to 1: update"):
            read(Checkpointer(folder))


def test_a_missing_step_is_an_error(folder):
    with pytest.raises(UserError, match=r"no checkpoint of step 3; there are: 1, 2"):
        Checkpointer(folder).read_meta(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"embed": jnp.zeros((8, 17), jnp.bfloat16)},
            r"'embed' is bfloat16\[8, 16\] there and bfloat16\[8, 17\]",
        ),
        ({"embed": jnp.zeros((8, 16))}, r"'embed' is bfloat16\[8, 16\] there and float32\[8, 16\] here"),
        ({"head": jnp.zeros(3)}, r"'head' is absent there and float32\[3\] here"),
        ({"blocks": {"kernel": jnp.zeros((16, 8))}}, r"'blocks.bias' is float32\[8\] there and absent here"),
    ],
)
def test_another_model_is_an_error_that_names_the_parameter(folder, change, message):
    with pytest.raises(UserError, match=message):
        Checkpointer(folder).restore_params(2, targets(make_state()[0] | change))


def test_a_checkpoint_that_is_held_outlives_its_turn(tmp_path):
    with Checkpointer(tmp_path / "checkpoints", keep=2) as checkpointer:
        holds: list[tuple[int, ...]] = [(), (), (), (4,), (0, 4), (4,), (5,), (0,), ()]
        for step, hold in enumerate(holds, 1):
            checkpointer.save(step, *make_state(), {}, hold=hold)
            if step == 6:
                checkpointer.wait()
                assert checkpointer.steps() == [4, 5, 6]
        checkpointer.wait()
        assert checkpointer.steps() == [8, 9]


def test_later_checkpoints_are_discarded_and_may_be_saved_anew(folder):
    with Checkpointer(folder) as checkpointer:
        assert checkpointer.newest_intact() == 2
        checkpointer.discard_after(1)
        assert checkpointer.steps() == [1]
        params, opt_state = make_state(7)
        checkpointer.save(2, params, opt_state, {})
        checkpointer.wait()
        assert_same_bits(checkpointer.restore_params(2, targets(params)), params)
