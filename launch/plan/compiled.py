"""The cross-check: the production training step compiled for as many virtual CPU devices, in a child process.

JAX fixes the number of its devices when it starts, so `python -m launch.plan.compiled` reads an experiment as
JSON on standard input, each line one, and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.config import parse, to_dict
from core.errors import UserError
from llm.config import Experiment


class Compiled(NamedTuple):
    """What the compiled program says of itself; bytes on one device, and sent by one in a step, by axis."""

    seconds: float
    argument_bytes: int
    temporary_bytes: int
    flops: float  # the bodies of loops counted once, as XLA does
    gathered_bytes: float  # by all-gathers over all axes, in what `collective_bytes` holds
    collective_bytes: dict[str, float]
    collective_counts: dict[str, int]  # by kind and axis, as `all-gather fsdp`


def compile_all(experiments: Sequence[Experiment], devices: int) -> list[Compiled]:
    """Compile the training step of each for its mesh, on `devices` virtual ones.

    Raises:
        UserError: if the compiler fails.
    """
    lines = "\n".join(json.dumps(to_dict(experiment)) for experiment in experiments)
    done = subprocess.run(
        [sys.executable, "-m", "launch.plan.compiled", str(devices)],
        input=lines,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        raise UserError(
            f"the step could not be compiled for {devices} devices (--no-compile leaves it out):\n"
            + done.stderr[-2000:]
        )
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def compile_step(experiment: Experiment) -> Compiled:
    """Compile in this process, whose devices must be as many as the mesh has."""
    import jax

    from core.mesh import make_mesh
    from launch.plan.program import collectives

    started = time.perf_counter()
    mesh = make_mesh(experiment.mesh)
    lowered = lower(experiment, mesh)
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd.*"})
        found = [
            one
            for path in Path(folder).glob("*after_spmd-partitioning*")
            for one in collectives(path.read_text(), dict(mesh.shape))
        ]
    sent: dict[str, float] = {}
    counts: dict[str, int] = {}
    for one in found:
        sent[one.axis] = sent.get(one.axis, 0.0) + one.sent
        key = f"{one.kind} {one.axis}"
        counts[key] = counts.get(key, 0) + one.times
    memory = compiled.memory_analysis()
    jax.clear_caches()
    return Compiled(
        time.perf_counter() - started, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        compiled.cost_analysis()["flops"],
        sum(one.sent for one in found if one.kind == "all-gather"), sent, counts,
    )  # fmt: skip


def lower(experiment: Experiment, mesh: Any):
    """The production step, traced and lowered with abstract inputs."""
    import jax
    import jax.numpy as jnp

    from core.optim import make_optimizer
    from core.state import first_step
    from llm.data.loader import Batch
    from llm.model.attention import Backend
    from llm.model.transformer import Compute, blueprint
    from llm.setup import check_mesh
    from llm.step import jit_train_step

    check_mesh(experiment, mesh)
    train, data = experiment.train, experiment.data
    # An accelerator's kernels can't be compiled here; this one keeps as much and also never holds a map.
    backend: Backend = "reference" if train.attention == "reference" else "blockwise"
    if mesh.shape["context"] > 1:
        backend = "ring"
    model = blueprint(experiment.model, Compute(train.dtype, backend, train.remat, train.scan_layers))
    optimizer = make_optimizer(experiment.optimizer, train.steps, model.decay, model.axes)
    shape = (data.batch_size, data.sequence_length)
    ids, weights = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    segments = ids if data.isolate or backend == "ring" else None
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda params: first_step(train, optimizer, params), model.shapes)
        step = jit_train_step(model, train, optimizer, mesh)
        return step.lower(state, Batch(ids, ids, segments, ids, weights))


def main() -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(compile_step(parse(Experiment, json.loads(line)))._asdict()), flush=True)


if __name__ == "__main__":
    main()
