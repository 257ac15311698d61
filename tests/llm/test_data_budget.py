"""What a run takes: parameters against the model itself, the rest against calculations by hand."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import copy_corpus, experiment

from core.config import load, to_yaml
from core.devices import DEVICES
from core.errors import UserError
from llm.config import Experiment
from llm.data import budget
from llm.data.budget import affordable_steps, compute_optimal, corpus_size, make_budget, make_cost
from llm.data.config import Source
from llm.model.config import ModelConfig
from llm.model.flops import num_parameters
from llm.model.transformer import blueprint
from llm.prepare import prepare

ROOT = Path(__file__).parents[2]
CONFIGS = [path for path in sorted((ROOT / "configs/llm").glob("*.yaml")) if path.stem != "base-pretrain"]
LLAMA = str(ROOT / "configs/llm/llama3-8b.yaml")
LLAMA_FLOPS = 6.0 * 7_504_658_432 + 32 * 12 * 4096 * 8192 // 2  # of a token; the second term is attention's


@pytest.fixture
def command(capsys):
    """Calls the command in this process; what it printed."""

    def call(*arguments: str, config: str = LLAMA) -> str:
        budget.main(["--config", config, *arguments])
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parameters_are_those_that_the_model_declares(path):
    config = load(Experiment, path).model
    assert num_parameters(config) == blueprint(config).count


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layer", "qk_norm": True, "bias": "qkv"},
        {"norm": "layer", "bias": "all", "tied_head": True},
        {"activation": "gelu", "bias": "all", "qk_norm": True},
        {"activation": "gelu", "parallel_residual": True, "tied_head": True},
    ],
)
def test_parameters_of_unusual_shapes(changes):
    small = ModelConfig(
        vocab_size=320, num_layers=3, embed_dim=48, num_heads=6, num_kv_heads=2, head_dim=10, mlp_dim=56,
        max_length=64,
    )  # fmt: skip
    config = dataclasses.replace(small, **changes)
    assert num_parameters(config) == blueprint(config).count


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama2-70b", 68_976_648_192),
        ("llama3-70b", 70_553_706_496),
        ("llama3-8b", 8_030_261_248),
        ("pythia-160m", 162_322_944),
        ("qwen2-7b", 7_615_616_512),
    ],
)
def test_published_parameters(name, parameters):
    assert num_parameters(load(Experiment, ROOT / f"configs/llm/{name}.yaml").model) == parameters


def test_json_by_hand(command):
    arguments = ("--device", "h100", "--count", "64", "--mfu", "0.5", "--price", "2", "--json")
    (line,) = command(*arguments).splitlines()
    tokens = 1_800_000 * 1024 * 8192
    hours = tokens * LLAMA_FLOPS / (64 * 989e12 * 0.5) / 3600
    answer = json.loads(line)
    assert answer == {
        "device": "h100",
        "devices": 64,
        "mfu": 0.5,
        "peak_flops": 989e12,
        "hours": pytest.approx(hours),
        "device_hours": pytest.approx(64 * hours),
        "cost_usd": pytest.approx(128 * hours),
        "parameters": 8_030_261_248,
        "active_parameters": 8_030_261_248,
        "matmul_parameters": 7_504_658_432,
        "steps": 1_800_000,
        "tokens_per_step": 1024 * 8192,
        "tokens": tokens,
        "tokens_per_parameter": pytest.approx(tokens / 8_030_261_248),
        "chinchilla_ratio": pytest.approx(tokens / 8_030_261_248 / 20),
        "flops": pytest.approx(tokens * LLAMA_FLOPS),
        "flops_6nd": pytest.approx(6 * tokens * 8_030_261_248),
        "corpus_tokens": None,
        "corpus_tokens_estimated": False,
        "epochs": None,
        "compute_flops": None,
        "optimal_parameters": None,
        "optimal_tokens": None,
    }


def test_every_device_has_a_line_and_an_unknown_peak_no_time(command):
    lines = [json.loads(line) for line in command("--json", "--set", "train.dtype=float32").splitlines()]
    assert [line["device"] for line in lines] == list(DEVICES)
    hours = {line["device"]: line["hours"] for line in lines}
    assert hours["tpu-v4"] is None
    assert hours["a100-80gb"] == pytest.approx(hours["h100"] * 494 / 156)


def test_the_optimum_is_chinchilla():
    """Chinchilla itself: 70B parameters, 1.4T tokens, 5.88e23 operations."""
    parameters, tokens = compute_optimal(6 * 70e9 * 1.4e12)
    assert parameters == pytest.approx(70e9) and tokens == pytest.approx(1.4e12)


def test_days_give_the_steps_that_fill_them(command):
    arguments = ("--device", "h100", "--count", "64", "--json")
    by_days = json.loads(command("--days", "7", *arguments))
    compute = 7 * 86400 * 64 * 989e12 * 0.4
    step = 1024 * 8192 * LLAMA_FLOPS
    assert by_days["steps"] == compute // step
    assert 7 * 24 - step / (64 * 989e12 * 0.4) / 3600 < by_days["hours"] <= 7 * 24
    assert by_days["compute_flops"] == pytest.approx(compute)
    assert 6 * by_days["optimal_parameters"] * by_days["optimal_tokens"] == pytest.approx(compute)
    by_flops = json.loads(command("--flops", str(compute), *arguments))
    assert by_flops == by_days
    pasted = json.loads(command("--set", f"train.steps={by_days['steps']}", *arguments))
    assert (pasted["hours"], pasted["flops"]) == (by_days["hours"], by_days["flops"])


def test_the_table_says_what_to_paste(command):
    text = command("--days", "7", "--device", "h100", "--count", "64", "--price", "2.5")
    assert "  --set train.steps=35465\n" in text
    assert "8,030,261,248" in text and "7.0 days" in text and "11.3B" in text


def test_a_corpus_that_is_not_there_has_a_dash_and_a_reason(command):
    text = " ".join(command("--set", "data.sources=['nowhere/[ab]*.txt']", "--device", "h100").split())
    assert "corpus tokens - data.sources.0: no file matches 'nowhere/[ab]*.txt'" in text
    assert "epochs -" in text


def test_one_step_is_the_least():
    run = load(Experiment, LLAMA)
    step = 1024 * 8192 * LLAMA_FLOPS
    assert affordable_steps(run, step) == 1
    with pytest.raises(UserError, match="less than one step"):
        affordable_steps(run, 0.999 * step)


def test_corpus_tokens_are_counted_where_shards_stand(tmp_path):
    run = experiment(copy_corpus(tmp_path), tmp_path / "runs", data={"cache": str(tmp_path / "cache")})
    size = sum(path.stat().st_size for path in tmp_path.glob("*.py"))
    before = corpus_size(run)
    assert before.estimated and before.tokens == pytest.approx(size * 0.95 / 4, abs=1)
    assert "4 a token" in before.source
    tokens = prepare(run).train.num_tokens
    after = corpus_size(run)
    assert (after.tokens, after.estimated) == (tokens, False)
    assert make_budget(run, after).epochs == 12 * 8 * 16 / tokens
    selected = dataclasses.replace(run, data=dataclasses.replace(run.data, selection="some.jsonl"))
    assert corpus_size(selected).estimated and "before data.selection" in corpus_size(selected).source
    (held := tmp_path / "held.txt").write_text("x" * 100_000)
    apart = dataclasses.replace(run, data=dataclasses.replace(run.data, heldout=(Source(path=str(held)),)))
    assert corpus_size(apart).tokens == pytest.approx(size / 4, abs=1), "what is held out is not trained on"
    (next((tmp_path / "cache/shards").iterdir()) / "index.json").write_text("{")
    assert corpus_size(run).estimated, "a damaged index is not one"
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=301))
    assert corpus_size(other).estimated, "shards in another vocabulary are not this run's"


def test_an_unknown_price_is_no_price():
    device = DEVICES["h100"]
    assert make_cost(989e12 * 3600, "h100", device, "bfloat16", 1, 1.0, None).cost_usd is None
    assert make_cost(989e12 * 3600, "h100", device, "bfloat16", 1, 1.0, 3.0).cost_usd == pytest.approx(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "h10"), "'h10' is not known; did you mean h100"),
        (("--device", "abacus"), "known are a100-40gb"),
        (("--mfu", "0"), "--mfu 0.0"),
        (("--mfu", "40"), "above 0 and at most 1"),
        (("--mfu", "nan"), "--mfu nan"),
        (("--count", "0"), "--count 0"),
        (("--price", "-1"), "--price -1"),
        (("--flops", "0"), "--flops 0"),
        (("--flops", "inf"), "--flops inf"),
        (("--flops", "1e21", "--days", "7", "--device", "h100"), "give one of them"),
        (("--days", "7"), "exactly one --device"),
        (("--days", "7", "--device", "h100", "--device", "b200"), "exactly one --device"),
        (("--days", "7", "--device", "tpu-v4", "--set", "train.dtype=float32"), "no peak of 'tpu-v4'"),
        (("--days", "1e-9", "--device", "h100"), "less than one step"),
    ],
)
def test_mistakes_are_named(command, arguments, message):
    with pytest.raises(UserError) as error:
        command(*arguments)
    assert message in str(error.value)


def test_exit_code_of_a_mistake():
    arguments = ["--config", LLAMA, "--device", "h10"]
    done = subprocess.run(
        [sys.executable, "-m", "llm.data.budget", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_answers_without_jax(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(experiment(copy_corpus(tmp_path), tmp_path)))
    program = (
        "import sys; from llm.data.budget import main; main(sys.argv[1:]); "
        "sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'torch')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--config", str(config)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "estimated" in done.stdout and "tpu-v6e" in done.stdout
