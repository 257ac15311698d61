"""Two real processes train as one does: batches, losses and checkpoints; they stop and fail together."""

from __future__ import annotations

import shutil
import signal
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from processes import end_job, start_job
from tiny import copy_corpus, experiment, same_batch

from core.checkpoint import Checkpointer
from core.config import load, to_yaml
from core.mesh import AXES
from core.metrics import read_metrics
from llm.config import Experiment
from llm.data.loader import Batch, train_batch
from llm.loop import train
from llm.prepare import prepare

MESH = {"data": 2, "fsdp": 2, "context": 2}


class Place(NamedTuple):
    """What the tests share: one corpus, its cache, and the run of one process."""

    corpus: Path
    runs: Path
    cache: Path

    def config(self, name: str, **changes) -> Path:
        """The file of an experiment."""
        scheduled = {"every": 6, "prompts": ["def f", "import "], "sample_tokens": 4}
        mesh = {"mesh": MESH, "eval": scheduled, **changes}
        path = self.runs / f"{name}.yaml"
        path.write_text(to_yaml(experiment(self.corpus, self.runs, name, **mesh)))
        return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "corpus").mkdir()
    (folder / "runs").mkdir()
    place = Place(copy_corpus(folder / "corpus"), folder / "runs", folder / "compiled")
    train(load(Experiment, place.config("one")))
    return place


def losses(run: Path) -> list[float]:
    metrics = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    return [line["loss"] for line in metrics]


def arrays(run: Path, step: int) -> dict[str, np.ndarray]:
    """The parameters and the optimizer state of a checkpoint."""
    handler, found = ocp.PyTreeCheckpointHandler(), {}
    for item in ("params", "opt"):
        folder = run / "checkpoints" / str(step) / item
        where = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), handler.metadata(folder).tree)
        restored = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=where))
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
            found[item + jax.tree_util.keystr(path)] = leaf
    return found


BATCHES = """
    import sys
    import jax, numpy as np
    from core import distributed
    distributed.join()
    from core.config import load
    from core.mesh import AXES, make_mesh
    from core.options import MeshConfig
    from llm.config import Experiment
    from llm.data.loader import train_batch
    from llm.prepare import prepare
    from core.mesh import local_rows
    from llm.step import put_batch

    experiment, out = load(Experiment, sys.argv[1]), sys.argv[2]
    data = experiment.data
    text = distributed.first_before_others(lambda: prepare(experiment))
    for sizes in sys.argv[3:]:
        mesh = make_mesh(MeshConfig(*map(int, sizes.split(","))))
        rows = local_rows(mesh, data.batch_size)
        for step in range(3):
            batch = train_batch(text.train, step, data.batch_size, experiment.seed, rows)
            for name, array in put_batch(batch, mesh)._asdict().items():
                for shard in array.addressable_shards:
                    (a, b, _), (c, d, _) = (i.indices(n) for i, n in zip(shard.index, array.shape))
                    place = f"{sizes} {step} {name} {a} {b} {c} {d} {shard.device.id}"
                    np.save(f"{out}/{place}.npy", np.asarray(shard.data))
"""


def test_two_processes_hold_the_batches_of_one(place, tmp_path):
    """Bitwise, on meshes whose processes share rows, columns, or both."""
    script = tmp_path / "batches.py"
    script.write_text(textwrap.dedent(BATCHES))
    meshes = ["8,1,1,1,1", "2,2,1,2,1", "1,2,4,1,1", "1,1,1,8,1", "2,1,1,4,1"]
    assert len(meshes[0].split(",")) == len(AXES)
    command = ["-c", f"import sys; sys.path.insert(0, '.'); exec(open({str(script)!r}).read())"]
    job = start_job([*command, str(place.config("one")), str(tmp_path), *meshes], place.cache)
    codes, said = end_job(job)
    assert codes == [0, 0], said
    settings = load(Experiment, place.config("one"))
    text, data = prepare(settings), settings.data
    for mesh in meshes:
        for step in range(3):
            whole = train_batch(text.train, step, data.batch_size, settings.seed)
            seen = Batch(*(np.full_like(array, -1) for array in whole))
            devices = set()
            for path in tmp_path.glob(f"{mesh} {step} *.npy"):
                *_, name, a, b, c, d, device = path.stem.split(" ")
                getattr(seen, name)[int(a) : int(b), int(c) : int(d)] = np.load(path)
                devices.add(device)
            assert len(devices) == 8 and same_batch(seen, whole), (mesh, step)


def test_two_processes_train_as_one(place):
    codes, said = end_job(start_job(["-m", "llm.train", "--config", str(place.config("two"))], place.cache))
    assert codes == [0, 0], said
    others = [line for line in said[1].splitlines() if "spmd_partitioner" not in line]  # but for the compiler
    assert "2 processes: 0 on" in said[0] and not others  # one speaks for both
    one, two = (read_metrics(place.runs / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(losses(place.runs / "two")) == 12
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "heldout_loss"):
            np.testing.assert_allclose(
                b.get(name, 0), a.get(name, 0), rtol=1e-5, err_msg=f"{a['step']} {name}"
            )
    files = [{path.name for path in (place.runs / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    samples = [(place.runs / name / "samples.md").read_text() for name in ("one", "two")]
    assert samples[0] == samples[1]


COPY = """
    import sys
    from core import distributed
    distributed.join()
    import jax
    from core.checkpoint import Checkpointer
    from core.config import load
    from llm.config import Experiment
    from llm.setup import set_up
    from core.loop import first_state
    from core.state import split
    from llm.loop import task_of

    experiment, target = load(Experiment, sys.argv[1]), sys.argv[2]
    setup = set_up(experiment, resume=True)
    with jax.set_mesh(setup.mesh), Checkpointer(setup.run.checkpoints) as source:
        state = first_state(task_of(setup), source)
        with Checkpointer(target) as copy:
            copy.save(int(state.step), *split(state), {})
"""


def copy_of_one(place: Place, name: str) -> Path:
    """A run of one process that stands at step 12; this one holds the lock on "one"."""
    shutil.copytree(place.runs / "one", place.runs / name)
    return place.config(name)


def test_a_checkpoint_of_one_process_passes_through_two_bitwise(place, tmp_path):
    code = textwrap.dedent(COPY)
    config = copy_of_one(place, "copied")
    codes, said = end_job(start_job(["-c", code, str(config), str(tmp_path / "checkpoints")], place.cache))
    assert codes == [0, 0], said
    before, after = arrays(place.runs / "one", 12), arrays(tmp_path, 12)
    assert before.keys() == after.keys() and len(before) > 10
    for name, value in before.items():
        assert value.dtype == after[name].dtype and np.array_equal(value, after[name]), name


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_one_process_goes_on(place):
    config = place.config("stopped")
    job = start_job(["-m", "llm.train", "--config", str(config)], place.cache)
    metrics = place.runs / "stopped" / "metrics.jsonl"
    while job[1].poll() is None and (not metrics.exists() or metrics.stat().st_size == 0):
        time.sleep(0.05)
    job[1].send_signal(signal.SIGTERM)
    codes, said = end_job(job)
    assert codes == [75, 0], said
    assert "another process is told to stop: saved step" in said[0]
    done = len(losses(place.runs / "stopped"))
    assert Checkpointer(place.runs / "stopped" / "checkpoints").latest_step() == done < 12
    train(load(Experiment, config), resume=True)
    np.testing.assert_allclose(losses(place.runs / "stopped"), losses(place.runs / "one"), rtol=1e-4)


def test_a_user_error_ends_all_with_one_message(place):
    config = copy_of_one(place, "again")
    codes, said = end_job(start_job(["-m", "llm.train", "--config", str(config)], place.cache))
    assert codes == [2, 2], said
    assert sum(text.count("already holds a run: go on with it (--resume)") for text in said) == 1
    assert "Traceback" not in "".join(said)


SLOW_TO_LEAVE = """
    import sys, time
    from core import distributed
    from core.errors import UserError, run_command

    def refuse():
        raise UserError("no")

    def main(_):
        distributed.join()
        leave = distributed._leave
        if not distributed.is_first():
            distributed._leave = lambda code: (time.sleep(0.7), leave(code))
        distributed.on_first(refuse)

    run_command(main)
"""


@pytest.mark.slow
def test_the_first_process_leaves_last(tmp_path):
    """It holds the service without which JAX aborts the others before they can end in their own way."""
    codes, said = end_job(start_job(["-c", textwrap.dedent(SLOW_TO_LEAVE)], tmp_path))
    assert codes == [2, 2], said
