"""The real vLLM over what JAX trained: the same tokens, log-probabilities, stops and conversations.

`make test-serve` makes its environment and names its Python in VLLM_PYTHON.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import jax
import openai
import pytest
import safetensors.numpy
from numpy.testing import assert_allclose
from tiny import experiment

from core.checkpoint import newest_params
from core.config import load
from core.run import RunFolder
from export import hf
from llm.chat import encode_chat, end_of_turn_ids
from llm.config import Experiment
from llm.decode import Completion, generate
from llm.generate import encode_prompt, text_of
from llm.loop import train
from llm.model.transformer import blueprint
from llm.sampling import Sampling, prompt_keys
from llm.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("VLLM_PYTHON", "")
KEY = "a key of ours"
NEW_TOKENS = 24
TALKS = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Answer in verse.\n"},
        {"role": "user", "content": "  What is a {dict}?  "},
        {"role": "assistant", "content": "A mapping."},
        {"role": "user", "content": "Naïve 😀?"},
    ],
]

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python that has vLLM: run `make test-serve`"),
]


class Trained(NamedTuple):
    export: Path
    run: Path

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.run / "tokenizer")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    """A small model of one-line documents, exported; it ends turns where it learned to open a parenthesis.

    Pretraining text has no ends of turns, so the head's rows of these two tokens change places in the
    export, which is then imported.
    """
    folder = tmp_path_factory.mktemp("trained")
    lines = [line for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py"))
             for line in path.read_text().splitlines() if line.strip()]  # fmt: skip
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, line in enumerate(lines[:2000]):
        (corpus / f"{number:04d}.py").write_text(line)
    shape = {"vocab_size": 512, "embed_dim": 64, "head_dim": 32, "mlp_dim": 128, "max_length": 128}
    sections = {"train": {"steps": 150}, "model": shape | {"qk_norm": True, "tied_head": False}}
    sections |= {"eval": {"every": 0, "batches": 1}, "checkpoint": {"every": 1000}}
    sections |= {"data": {"sequence_length": 32, "batch_size": 16}}
    train(experiment(corpus, folder, **sections))
    hf.main(["--run", str(folder / "run"), "--out", str(folder / "first")])
    weights = safetensors.numpy.load_file(folder / "first" / "model.safetensors")
    tokenizer = Tokenizer.load(folder / "run" / "tokenizer")
    pair = [tokenizer.id_of("("), tokenizer.special_ids["<|eot_id|>"]]
    weights["lm_head.weight"][pair] = weights["lm_head.weight"][pair[::-1]]
    safetensors.numpy.save_file(weights, folder / "first" / "model.safetensors")
    hf.main(["--import", str(folder / "first"), "--out", str(folder / "imported")])
    hf.main(["--run", str(folder / "imported"), "--out", str(folder / "export"), "--verify"])
    return Trained(folder / "export", folder / "imported")


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`python -m launch.serve`, once it has printed its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "launch.serve", "--port", port, *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "SERVE_API_KEY": KEY, "SERVED_PORT": port}
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = []
    try:
        for line in server.stdout:
            said.append(line)
            if found := re.search(r"answers at (\S+)", line):
                yield server, found[1]
                break
        else:
            raise AssertionError("".join(said))
    finally:
        server.terminate()  # it has a server of its own to stop
        server.wait(60)


def started_under(url: str) -> list[int]:
    """The processes with the port of `url` in their environment, whatever name they gave themselves."""
    mark, found = f"\0SERVED_PORT={urlsplit(url).port}\0".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in b"\0" + (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


@pytest.fixture(scope="module")
def vllm(trained) -> Iterator[str]:
    with serving("--model", str(trained.export), "--name", "ours", "--vllm-python", PYTHON) as (_, url):
        yield url


@pytest.fixture(scope="module")
def jax_engine(trained) -> Iterator[str]:
    with serving("--model", str(trained.run), "--name", "ours", "--engine", "jax") as (_, url):
        yield url


@pytest.fixture(params=["vllm", "jax_engine"])
def url(request) -> str:
    return request.getfixturevalue(request.param)


def with_prompt_ids(request) -> dict:
    """Asks for the ids of the prompt as the server read it, which vLLM alone tells."""
    return {"return_token_ids": True} if "vllm" in request.node.name else {}


def client(url: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0)


@functools.cache
def prompts() -> list[str]:
    """Fifty, from one word to several lines, as the model saw and as it never did."""
    source = inspect.getsource(inspect).splitlines()
    return [" ".join(source[20 * i : 20 * i + 1 + i % 3])[: 5 + 2 * i] or "import" for i in range(48)] + [
        "Привет, мир 😀",
        "<|eot_id|>",
    ]


@functools.cache
def generated(trained: Trained, stops: bool) -> list[Completion]:
    ids = [encode_prompt(trained.tokenizer, prompt) for prompt in prompts()]
    return greedy(trained, ids, NEW_TOKENS, end_of_turn_ids(trained.tokenizer) if stops else [])


def greedy(trained: Trained, ids: list[list[int]], count: int, stop: list[int]) -> list[Completion]:
    run = RunFolder.open(trained.run)
    config = load(Experiment, run.config).model
    params = newest_params(run, blueprint(config).shapes)
    return generate(config, params, ids, prompt_keys(jax.random.key(0), ids), Sampling(), count, stop)


def complete(url: str, trained: Trained, prompt, **settings):
    return client(url).completions.create(
        model="ours", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, **settings
    )


def test_greedy_tokens_and_log_probabilities_are_those_of_generate(vllm, trained):
    ids = [encode_prompt(trained.tokenizer, prompt) for prompt in prompts()]
    answer = complete(
        vllm, trained, ids, logprobs=1, extra_body={"ignore_eos": True, "return_token_ids": True}
    )
    ours = generated(trained, stops=False)
    assert len({tuple(row.token_ids) for row in ours}) > 30, "answers all alike would prove little"
    for theirs, row, prompt in zip(answer.choices, ours, prompts(), strict=True):
        assert theirs.token_ids == row.token_ids, prompt
        assert_allclose(theirs.logprobs.token_logprobs, row.log_probabilities, rtol=0, atol=1e-3)


def test_a_text_begins_with_one_begin_of_text_and_ends_where_it_does_in_generate(url, trained, request):
    """Prompts as text: what begins a text is the server's to add. 'ignore_eos' isn't asked for."""
    tokenizer = trained.tokenizer
    # A special token's spelling in a completion's prompt is control to vLLM and text to us.
    written = prompts()[:-1]
    answer = complete(url, trained, written, extra_body=with_prompt_ids(request))
    reasons = []
    for theirs, row, prompt in zip(answer.choices, generated(trained, stops=True)[:-1], written, strict=True):
        if with_prompt_ids(request):
            assert theirs.prompt_token_ids == encode_prompt(tokenizer, prompt)
            assert theirs.prompt_token_ids.count(tokenizer.bos_id) == 1
        assert theirs.text == text_of(tokenizer, row.token_ids), prompt
        ended = row.token_ids[-1] in end_of_turn_ids(tokenizer)
        assert theirs.finish_reason == ("stop" if ended else "length")
        reasons.append(row.token_ids[-1] if ended else None)
    assert {None, *end_of_turn_ids(tokenizer)} == set(reasons), "each way to end should have occurred"


@pytest.mark.parametrize("talk", TALKS)
def test_a_conversation_is_rendered_as_in_training(url, trained, talk, request):
    answer = client(url).chat.completions.create(
        model="ours", messages=talk, max_tokens=8, temperature=0, extra_body=with_prompt_ids(request)
    )
    expected = encode_chat(trained.tokenizer, talk)
    assert answer.usage.prompt_tokens == len(expected)
    if with_prompt_ids(request):
        assert answer.prompt_token_ids == expected and expected.count(trained.tokenizer.bos_id) == 1
    (row,) = greedy(trained, [expected], 8, end_of_turn_ids(trained.tokenizer))
    assert answer.choices[0].message.content == text_of(trained.tokenizer, row.token_ids)


def test_openai_s_client_streams(url):
    assert [model.id for model in client(url).models.list()] == ["ours"]
    settings = {"model": "ours", "messages": TALKS[1], "max_tokens": 12, "temperature": 0}
    whole = client(url).chat.completions.create(**settings)
    pieces = client(url).chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
    )
    text, usage, reasons = "", None, []
    for piece in pieces:
        text += "".join(choice.delta.content or "" for choice in piece.choices)
        reasons += [choice.finish_reason for choice in piece.choices if choice.finish_reason]
        usage = piece.usage or usage
    assert (text, reasons) == (whole.choices[0].message.content, [whole.choices[0].finish_reason])
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_stop_words_and_seeds(url):
    ask = functools.partial(client(url).completions.create, model="ours", prompt="def ", max_tokens=20)
    whole = ask(temperature=0).choices[0].text
    stop = whole[len(whole) // 2 :][:2]
    assert ask(temperature=0, stop=[stop]).choices[0].text == whole[: whole.index(stop)]
    drawn = [ask(temperature=1.5, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_langchain_talks_to_it(url):
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="ours", base_url=url, api_key=KEY, temperature=0, max_tokens=12)
    said = chat.invoke([("system", "Answer in verse."), ("user", "Hello")])
    assert said.usage_metadata["output_tokens"] <= 12
    assert "".join(
        piece.text for piece in chat.stream([("system", "Answer in verse."), ("user", "Hello")])
    ) == (said.text)


def test_a_request_without_the_key_is_refused(url):
    with pytest.raises(openai.AuthenticationError):
        client(url, "another").models.list()


def test_a_longer_context_than_the_model_s_is_refused(url):
    with pytest.raises(openai.BadRequestError, match="128"):
        client(url).completions.create(model="ours", prompt="word " * 200, max_tokens=4)


@pytest.mark.parametrize(
    ("engine", "number"), [("vllm", signal.SIGINT), ("jax", signal.SIGINT), ("jax", signal.SIGTERM)]
)
def test_it_stops_in_order(trained, engine, number):
    model = trained.export if engine == "vllm" else trained.run
    with serving("--model", str(model), "--engine", engine, "--vllm-python", PYTHON) as (server, url):
        assert len(started_under(url)) > (2 if engine == "vllm" else 0)
        server.send_signal(number)
        assert server.wait(60) == 0
        with pytest.raises(OSError):
            urllib.request.urlopen(url.replace("/v1", "/health"), timeout=5)
    assert not started_under(url), "workers were left behind"


def test_vllm_s_own_last_words_are_told(trained, tmp_path):
    """A config that it can't serve."""
    broken = tmp_path / "broken"
    shutil.copytree(trained.export, broken)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    command = [sys.executable, "-m", "launch.serve", "--model", str(broken), "--port", "0"]
    done = subprocess.run(
        [*command, "--vllm-python", PYTHON], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: vLLM ended with exit code 1; its last words:\n")
