"""What saving costs training: the stall, the steps beside the writing, and a save that is waited for.

    python -m benchmarks.checkpoint [--rounds 5] [--widths 256 512 1024] [--folder runs/checkpoint-benchmark]

Real training steps of Llamas of six layers with AdamW, saved as production does. In each round, in turns:
steps alone; a save and the steps until it is on the disk; a save that is waited for before the next step.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.training import Training
from benchmarks.worker import timed
from core import devices
from core.errors import run_command
from core.options import MeshConfig
from llm.config import TrainConfig
from llm.model.config import ModelConfig

if TYPE_CHECKING:
    from core.checkpoint import Checkpointer

SEQUENCE = 256


class Round(NamedTuple):
    """Seconds."""

    alone: float  # a step with nothing else to do, median
    stall: float  # until a save returns
    beside: list[float]  # steps until it is on the disk
    write: float  # from the call of `save` to then
    waited: float  # a save with the waiting for it

    @property
    def lost(self) -> float:
        """What the save held training up: the stall, and what the steps beside the writing took longer."""
        return self.stall + sum(self.beside) - len(self.beside) * self.alone


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--batch", type=int, default=1, help="rows of 256 tokens")
    parser.add_argument("--folder", type=Path, default=Path("runs/checkpoint-benchmark"))
    options = parser.parse_args(argv)
    devices.prepare()
    print(
        "| parameters, M | on disk, MB | step, s | stall, s | waited for, s | stall / waited | written in, s "
        "| step beside / alone | lost / waited |\n|" + " --- |" * 9
    )
    for width in options.widths:
        shutil.rmtree(options.folder, ignore_errors=True)
        print(_row(*_measure(options, width)), flush=True)
    shutil.rmtree(options.folder)


def _measure(options: argparse.Namespace, width: int) -> tuple[int, int, list[Round]]:
    """Parameters, bytes of a checkpoint, and the rounds."""
    import jax

    from core.checkpoint import Checkpointer
    from core.mesh import make_mesh

    mesh = make_mesh(MeshConfig())
    training = Training(_model(width), TrainConfig(steps=1000), options.batch, SEQUENCE, mesh)
    for _ in range(3):
        training.step()
    with jax.set_mesh(mesh), Checkpointer(options.folder) as checkpointer:
        rounds = [_round(training, checkpointer, 2 * number) for number in range(1, options.rounds + 1)]
        newest = options.folder / str(checkpointer.latest_step())
    return training.model.count, sum(p.stat().st_size for p in newest.rglob("*") if p.is_file()), rounds


def _model(width: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=8192, num_layers=6, embed_dim=width, num_heads=width // 64, num_kv_heads=width // 64,
        head_dim=64, mlp_dim=width * 11 // 4, max_length=SEQUENCE, tied_head=True,
    )  # fmt: skip


def _round(training: Training, checkpointer: Checkpointer, number: int) -> Round:
    """Saves the steps `number` and `number` + 1."""
    alone = [timed(training.step)[0] for _ in range(4)]
    folder, begun = checkpointer.folder / str(number), time.time()
    stall, _ = timed(lambda: _save(training, checkpointer, number))
    beside = []
    while not folder.exists():
        beside.append(timed(training.step)[0])
    write = (folder / "manifest.json").stat().st_mtime - begun  # written last
    checkpointer.wait()
    waited, _ = timed(lambda: (_save(training, checkpointer, number + 1), checkpointer.wait()))
    return Round(median(alone), stall, beside, write, waited)


def _save(training: Training, checkpointer: Checkpointer, number: int) -> None:
    from core.state import split

    checkpointer.save(number, *split(training.state), {})


def _row(parameters: int, size: int, rounds: list[Round]) -> str:
    """Medians over the rounds, and the least and the most of the ratios."""

    def ratio(values: Iterable[float]) -> str:
        ordered = sorted(values)
        return f"{median(ordered):.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"

    seconds = [f"{median(r[i] for r in rounds):.3f}" for i in (0, 1, 4)]
    cells = [
        f"{parameters / 1e6:.1f}", f"{size / 1e6:,.0f}", *seconds,
        ratio(r.stall / r.waited for r in rounds),
        f"{median(r.write for r in rounds):.2f}",
        ratio(mean(r.beside) / r.alone for r in rounds),
        ratio(r.lost / r.waited for r in rounds),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run_command(main)
