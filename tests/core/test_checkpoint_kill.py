"""Checkpoints through kills, full disks and several processes: complete or absent, the one before intact."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from core.checkpoint import Checkpointer
from core.errors import UserError

ROOT = Path(__file__).parents[2]

CHILD = """
    import os, signal, sys
    from pathlib import Path
    import jax, jax.numpy as jnp
    from core import checkpoint

    folder, moment, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def state(step):
        return {"w": jnp.full((size,), float(step))}, {"m": jnp.full((size,), -float(step))}

    target = jax.eval_shape(lambda: state(0))
    with checkpoint.Checkpointer(folder, keep=2) as checkpointer:
        start = checkpointer.newest_intact() or 0
        if start:
            restored = checkpointer.restore(start, *target)
            assert all((restored[i][k] == s * start).all() for i, k, s in ((0, "w", 1), (1, "m", -1)))
            assert checkpointer.read_meta(start)["step"] == start
        print("from", start, flush=True)
        for step in range(start + 1, start + (4 if moment == "never" else 1000)):
            if step == start + 3:
                checkpointer.wait()
                if moment == "manifest":
                    checkpoint.manifest.write = die
                elif moment == "rename":
                    os.rename = die
                elif moment == "renamed":
                    checkpoint.sync_folder = die
                elif moment == "deleting":
                    checkpoint.shutil.rmtree = lambda path, **_: die() if "deleting" in str(path) else None
            checkpointer.save(step, *state(step), {})
            print("saving", step, flush=True)
"""


def start_child(folder: Path, moment: str, size: int = 50_000) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), moment, str(size)],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_kill_at_each_moment_of_a_save_leaves_the_checkpoints_before(tmp_path):
    folder = tmp_path / "c"
    # Each child saves two checkpoints undisturbed and is killed in the third.
    for moment, expected in {"manifest": 2, "rename": 4, "renamed": 7, "deleting": 10}.items():
        with start_child(folder, moment) as child:
            assert child.wait() == -signal.SIGKILL, child.stderr.read()
        checkpointer = Checkpointer(folder)
        assert checkpointer.newest_intact() == expected, moment
        assert len(checkpointer.steps()) >= 2
    with start_child(folder, "never") as child:
        assert child.wait() == 0, child.stderr.read()
    assert sorted(p.name for p in folder.iterdir()) == ["12", "13"]


def kill_at_random(folder: Path, times: int) -> None:
    random = np.random.default_rng(0)
    reached = 0
    for _ in range(times):
        with start_child(folder, "random", size=1_000_000) as child:
            line = child.stdout.readline()
            assert line.startswith("from "), child.stderr.read()
            assert int(line.split()[1]) >= reached
            lines = [child.stdout.readline() for _ in range(random.integers(1, 4))]
            # Else it ended by itself; -9 would say that another, such as a system out of memory, killed it.
            assert all(lines), f"exit code {child.wait()}: {child.stderr.read()}"
            time.sleep(random.uniform(0.0, 0.3))
            child.kill()
            begun = [int(line.split()[1]) for line in [*lines, *child.stdout]]
        newest = Checkpointer(folder).newest_intact() or 0
        assert newest >= begun[-1] - 1  # a save waits for the one before it
        reached = newest
    assert reached > 0


def test_random_kills_never_lose_a_checkpoint(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    kill_at_random(tmp_path / "c", times=2)
    assert "damaged" not in caplog.text


@pytest.mark.slow
def test_many_random_kills_never_lose_a_checkpoint(tmp_path, caplog):
    kill_at_random(tmp_path / "c", times=30)
    assert "damaged" not in caplog.text


def test_a_full_disk_is_told_and_the_checkpoint_before_stands(small_disk, capfd):
    params = {str(i): jax.random.normal(jax.random.key(i), (256, 1024)) for i in range(2)}
    opt = optax.trace(0.9).init(params)
    checkpointer = Checkpointer(small_disk / "c")
    checkpointer.save(1, params, opt, {})
    checkpointer.wait()
    checkpointer.save(2, params, opt, {})
    with pytest.raises(UserError, match=r"checkpoint 2 .* the disk is full; checkpoint 1 still stands; free"):
        checkpointer.save(3, params, opt, {})
    assert checkpointer.steps() == [1] and not list((small_disk / "c").glob("*.saving*"))
    assert checkpointer.newest_intact() == 1
    shutil.rmtree(small_disk / "c" / "1")  # the user frees some space
    checkpointer.save(2, params, opt, {})
    checkpointer.close()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    restored = Checkpointer(small_disk / "c").restore_params(2, shapes)
    assert all((restored[name] == value).all() for name, value in params.items())
    assert "Traceback" not in capfd.readouterr().err


def test_a_file_size_limit_is_told_without_traceback(tmp_path):
    script = """
        import resource, sys
        from pathlib import Path
        import jax
        from core.checkpoint import Checkpointer
        from core.errors import run_command

        def main(arguments):
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
            params = {str(i): jax.random.normal(jax.random.key(i), (256, 1024)) for i in range(4)}
            with Checkpointer(Path(arguments[0])) as checkpointer:
                checkpointer.save(1, params, params, {})

        run_command(main)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "c")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: checkpoint 1 could not be written to {tmp_path}/c: File too large;"
    )
    assert "Traceback" not in done.stderr


PROCESS = """
    import sys
    from pathlib import Path
    import jax, numpy as np
    from jax.experimental.multihost_utils import sync_global_devices
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from core.checkpoint import Checkpointer
    from core.errors import UserError

    folder, port, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, initialization_timeout=60)
    sharding = NamedSharding(jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,)), P("fsdp"))

    def array(step):
        whole = np.random.default_rng(step).normal(size=(16, 8)).astype(np.float32)
        return {"w": jax.make_array_from_callback(whole.shape, sharding, lambda i: whole[i])}

    def damage(name):
        sync_global_devices("before " + name)
        if process == 0:
            (folder / name).unlink()
        sync_global_devices("after " + name)

    with Checkpointer(folder) as checkpointer:
        assert checkpointer.newest_intact() is None
        for step in (1, 2, 3):
            checkpointer.save(step, array(step), array(-step % 7), {})
    damage("3/params/_METADATA")
    checkpointer = Checkpointer(folder)
    assert checkpointer.newest_intact() == 2
    target = {"w": jax.ShapeDtypeStruct((16, 8), np.float32, sharding=sharding)}
    for restored, saved in zip(checkpointer.restore(2, target, target), (array(2), array(-2 % 7))):
        for a, b in zip(restored["w"].addressable_shards, saved["w"].addressable_shards):
            assert (np.asarray(a.data) == np.asarray(b.data)).all()
    damage("2/manifest.json")
    try:
        Checkpointer(folder).newest_intact()
    except UserError as error:
        print("refused:", error)
"""


@pytest.mark.slow
def test_two_processes_save_agree_on_what_is_intact_and_fail_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), str(tmp_path / "c"), port, str(i)],
            cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert all("every checkpoint in" in text for text in said)
