"""Runs that are killed and damaged, through the real command: they go on from the newest good checkpoint and
end as if nothing had happened, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import QUICK_COMPILES
from runs import ROOT, assert_same_bits, clean_environment, command, named, numbers, saved
from tiny import copy_corpus, experiment

from core.checkpoint import Checkpointer
from core.config import load, to_yaml
from core.loop import first_state
from core.state import split
from llm.config import Experiment
from llm.loop import task_of
from llm.setup import set_up

EVERY = 7  # steps between checkpoints


class Place(NamedTuple):
    """Where the runs of this file are, and what they share."""

    corpus: Path
    runs: Path
    environment: dict[str, str]

    def config(self, name: str, steps: int) -> Path:
        path = self.runs / f"{name}.yaml"
        options = {
            "train": {
                "steps": steps,
                "attention": "blockwise",
                "scan_layers": False,
            },  # as the quickstart does
            "checkpoint": {"every": EVERY, "keep": 3},
            "eval": {"every": 50, "prompts": ["def f(x):"], "sample_tokens": 8},
        }
        path.write_text(to_yaml(experiment(self.corpus, self.runs, name, **options)))
        return path

    def run(self, config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(config, *arguments), capture_output=True, text=True, cwd=ROOT, env=self.environment
        )

    def finish(self, config: Path, *arguments: str) -> Path:
        done = self.run(config, *arguments)
        assert done.returncode == 0, done.stderr
        return self.runs / config.stem


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "corpus").mkdir()
    (folder / "runs").mkdir()
    environment = clean_environment(folder) | {"XLA_FLAGS": QUICK_COMPILES}
    return Place(copy_corpus(folder / "corpus"), folder / "runs", environment)


@pytest.fixture(scope="module")
def calm(place) -> Path:
    """A run that nothing happened to."""
    return place.finish(place.config("calm", 100))


def last_step(run: Path) -> int:
    """The last step whose line in `metrics.jsonl` is whole."""
    with contextlib.suppress(FileNotFoundError), open(run / "metrics.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        whole = file.read().split(b"\n")[:-1]
        return json.loads(whole[-1])["step"] if whole else 0
    return 0


def writing(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.saving*"))


def kill_at(moment: str, process: subprocess.Popen, run: Path, step: int, chance: random.Random) -> None:
    def wait(condition: Callable[[], bool]) -> None:
        while not condition():
            assert process.poll() is None, "it ended before it was killed: make the run longer"
            time.sleep(0.0005)

    def held_while_writing() -> bool:
        """Stop it and look again: on a busy machine the write may be over before a kill."""
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.01)
        held = writing(run)
        if not held:
            process.send_signal(signal.SIGCONT)
        return held

    if moment == "start-up":
        before, deadline = last_step(run), time.monotonic() + chance.uniform(0, 5)
        wait(lambda: time.monotonic() > deadline or last_step(run) != before)
    else:
        wait(lambda: last_step(run) >= step)
        time.sleep(chance.uniform(0, 0.01))
        if moment == "writing":
            wait(lambda: writing(run) and held_while_writing())
    assert process.poll() is None, "it ended before it was killed: make the run longer"
    process.kill()
    process.wait()


def kill_again_and_again(place: Place, name: str, steps: int, kills: int, seed: int) -> Path:
    """Start the run with --resume and kill it, in its start-up, at a random step, and while it writes."""
    print("seed", seed)  # with which a failure is repeated
    chance = random.Random(seed)
    run, config = place.runs / name, place.config(name, steps)
    checkpoints = Checkpointer(run / "checkpoints")
    targets = sorted(chance.sample(range(EVERY, steps - 3 * EVERY), kills))
    newest = None
    for kill, target in enumerate(targets):
        log = place.runs / f"{name}.log"
        with open(log, "w") as output:
            process = subprocess.Popen(
                command(config, "--resume"), cwd=ROOT, env=place.environment, stdout=output, stderr=output
            )
        moment = ("training", "writing", "start-up")[kill % 3]
        kill_at(moment, process, run, target, chance)
        said, step = log.read_text(), last_step(run)
        if newest and "training" in said:
            assert f"resuming from step {newest}" in said
        assert "Traceback" not in said and "damaged" not in said, said
        newest = checkpoints.newest_intact() or 0
        assert step - 2 * EVERY <= newest <= step, "at most the one being written is lost"
        assert moment != "writing" or writing(run)
        print(f"kill {kill} in {moment} at step {step}: checkpoint {newest}")
    return place.finish(config, "--resume")


def assert_same_run(run: Path, calm: Path) -> None:
    assert numbers(run) == numbers(calm)
    steps = load(Experiment, run / "config.yaml").train.steps
    assert [line["step"] for line in numbers(run)] == list(range(1, steps + 1))
    assert_same_bits(saved(run), saved(calm))
    assert (run / "samples.md").read_text() == (calm / "samples.md").read_text()


@pytest.mark.slow
def test_a_run_killed_in_training_and_in_a_write_ends_as_if_it_had_not_been(place, calm):
    run = kill_again_and_again(place, "killed", 100, kills=2, seed=0)
    assert_same_run(run, calm)
    left = {path.name for path in (run / "checkpoints").iterdir() if not path.name.isdecimal()}
    assert not left, "what was not finished, or half deleted, is gone"


@pytest.mark.slow
def test_twenty_random_kills(place):
    run = kill_again_and_again(place, "killed-often", 800, kills=20, seed=1)
    assert_same_run(run, place.finish(place.config("calm-for-long", 800)))


def flip_a_bit(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return "checksum differs from what was written"


def truncate(path: Path, chance: random.Random) -> str:
    size = path.stat().st_size
    os.truncate(path, kept := chance.randrange(size))
    return f"truncated ({kept} of {size} bytes)"


def empty(path: Path, chance: random.Random) -> str:
    size = path.stat().st_size
    os.truncate(path, 0)
    return f"truncated (0 of {size} bytes)"


DAMAGES = (flip_a_bit, truncate, empty)


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_the_state_before_it_is_taken_up(damage, place, calm, tmp_path, caplog):
    """Here on eight devices, while the run was on one."""
    print("seed", seed := 0)
    chance = random.Random(seed)
    run = Path(shutil.copytree(calm, tmp_path / "calm"))
    setup = set_up(load(Experiment, calm / "config.yaml", [f"run.dir={tmp_path}"]), resume=True)
    expected = saved(calm, 98)
    newest = run / "checkpoints/100"
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) > 10
    for path in files:
        intact = path.read_bytes()
        reason = damage(path, chance)
        name = path.relative_to(newest)
        if path.name == "manifest.json" and path.parent == newest:
            reason = "not what was written"
        caplog.clear()
        with Checkpointer(run / "checkpoints") as checkpointer:
            state = first_state(task_of(setup), checkpointer)
        assert f"checkpoint 100 is damaged and passed over: {newest}/{name}: {reason}" in caplog.text
        params, rest = split(state)
        assert int(state.step) == 98
        assert_same_bits(named(params, "params") | named(rest, "opt"), expected)
        path.write_bytes(intact)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_the_command_says_what_it_rejects_and_goes_on(place, calm):
    config = place.config("damaged", 100)
    run = Path(shutil.copytree(calm, place.runs / "damaged"))
    shutil.copy(config, run / "config.yaml")
    chance = random.Random(0)
    newest, second = run / "checkpoints/100/manifest.json", largest(run / "checkpoints/98/opt")
    empty(newest, chance)
    flip_a_bit(second, chance)
    done = place.run(config, "--resume")
    assert done.returncode == 0, done.stderr
    for message in (
        f"warning: checkpoint 100 is damaged and passed over: {newest}: not what was written\n",
        f"warning: checkpoint 98 is damaged and passed over: {second}: checksum differs from what was",
        "resuming from step 91\n",
    ):
        assert message in done.stderr
    assert_same_run(run, calm)
    aside = {path.name for path in (run / "checkpoints").glob("*.aside")}
    assert aside == {"98.aside", "100.aside"}

    for step in Checkpointer(run / "checkpoints").steps():
        truncate(largest(run / f"checkpoints/{step}"), chance)
    done = place.run(config, "--resume")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"error: every checkpoint in \S+ is damaged \(100/.*; 98/.*\): bring one", done.stderr)
