"""What `python -m launch.plan` says: tables, JSON, mistakes; and the calibration beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.config import load
from core.devices import DEVICES
from core.errors import UserError
from launch.plan import __main__ as command
from launch.plan import calibration, memory
from launch.plan.device import find
from launch.plan.plan import make_plan, remedies
from llm.config import Experiment

CONFIGS = Path(__file__).parents[2] / "configs" / "llm"


@pytest.fixture
def plan_command(capsys):
    def call(*arguments: str) -> str:
        command.main(["--config", str(CONFIGS / "llama3-70b.yaml"), *arguments])
        return capsys.readouterr().out

    return call


KEYS = {
    "parameters", "fits", "peak_bytes_per_device", "bytes_per_device", "flops_per_step",
    "collective_bytes_per_step", "step_seconds", "mfu", "bound_by",
}  # fmt: skip


def test_json_is_one_object_with_the_keys_that_scripts_rely_on(plan_command):
    answer = json.loads(plan_command("--mesh", "fsdp=64,tensor=8", "--no-compile", "--json", "--price", "2"))
    assert answer.keys() >= KEYS and answer["fits"] and answer["parameters"] == 70_553_706_496
    assert answer["collective_bytes_per_step"].keys() == {"fsdp", "tensor"}
    assert answer["days"] == pytest.approx(answer["tokens"] / answer["tokens_per_second"] / 86400)
    assert answer["cost_usd"] == pytest.approx(2 * answer["days"] * 24 * 512)


def test_the_tables_tell_it(plan_command, tmp_path):
    told = plan_command("--mesh", "fsdp=64,tensor=8", "--no-compile", "--tokens", "1e12")
    for piece in (
        "512 x a100-80gb",
        "backward",
        "tokens/s",
        "MFU",
        "bound by",
        "1.00T tokens",
        "device-hours",
    ):
        assert piece in told
    assert "does not fit" in plan_command(
        "--mesh", "fsdp=8,tensor=8", "--no-compile", "--set", "train.accumulation=2"
    )
    told = plan_command("--sweep", "64", "--no-compile", "--plot", str(tmp_path / "sweep.png"))
    assert "tok/s" in told and (tmp_path / "sweep.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--mesh", "fsdb=8"], "did you mean 'fsdp'"),
        (["--mesh", "fsdp=0"], "AXIS=N"),
        (["--mesh", "fsdp"], "AXIS=N"),
        (["--mesh", "fsdp=64,tensor=16"], r"model.num_kv_heads \(8\) does not divide over mesh.tensor=16"),
        (["--mesh", "fsdp=256,tensor=2"], "data.batch_size / train.accumulation"),
        (["--device", "a100"], "did you mean a100-"),
        (["--device", "gtx", "--no-compile"], "YAML file of your own"),
        (["--device", "nowhere.yaml"], "does not exist"),
        (["--sweep", "0"], "above 0"),
        (["--sweep", "7", "--no-compile"], "power of two"),
        (["--price", "nan"], "above 0"),
        (["--config", str(CONFIGS / "mixtral-8x7b.yaml"), "--set", "train.experts=ragged"], "to padded"),
        (["--device", "tpu-v5p", "--set", "train.dtype=float32", "--no-compile"], "use bfloat16"),
    ],
)
def test_mistakes_are_named(plan_command, arguments, named):
    with pytest.raises(UserError, match=named):
        plan_command(*arguments)


def test_a_device_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "memory_gb: 48\nbfloat16_tflops: 181\nmemory_gb_per_second: 864\nlink_gb_per_second: 32\n"
        "network_gb_per_second: 12.5\ndevices_per_node: 4\n"
    )
    device = find(str(path))
    assert device.memory == 48 * 10**9 and device.node == 4 and device.peaks["bfloat16"] == 181e12
    path.write_text(path.read_text() + "memory: 1\n")
    with pytest.raises(UserError, match="unknown key 'memory'"):
        find(str(path))


def test_experts_with_a_slot_for_every_token_are_told_to_have_fewer(plan_command):
    """One sequence a microbatch, so that only the capacity is left to lower; the table says what it takes."""
    path, mesh = CONFIGS / "qwen3-30b-a3b.yaml", ["mesh.fsdp=4", "mesh.expert=8", "train.accumulation=64"]
    experiment = load(Experiment, path, [*mesh, "model.moe.capacity=null"])
    plan = make_plan(experiment, "a100-40gb", DEVICES["a100-40gb"])
    note, other = next(remedies(plan, DEVICES["a100-40gb"]))
    assert not plan.fits and other.fits and note.startswith("--set model.moe.capacity=2 ")
    rows = 128 * 4096  # a sequence for each expert: formed anew, two bytes each, and as many gradients
    assert memory.slots_at_peak(plan.layout) == 2 * rows * 2 * (2 * 2048 + 3 * 768)
    told = plan_command(
        "--config", str(path), "--set", "model.moe.capacity=null", *(f"--set={one}" for one in mesh),
        "--no-compile",
    )  # fmt: skip
    assert "128 for each token, which takes 8" in told.replace("\n", " ")


def test_the_calibration_is_told(capsys):
    calibration.main([])
    told = capsys.readouterr().out
    assert told.count("fitted") == 2 and told.count("%") == len(calibration.ROWS) - 2
