"""The page's client before the real vLLM: streams, counts, and the probabilities of a text's tokens.

`make test-serve` makes its environment and names its Python in VLLM_PYTHON.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterator

import pytest
from tiny import copy_corpus, experiment

from export import hf
from launch.chat import tokens
from launch.chat.answer import Answering, Progress, Settings, request_for
from launch.chat.client import Model, Server, ServerError, list_models
from launch.chat.engine import first_mode
from launch.chat.inside import Inside
from launch.server.model import Served
from launch.vllm import running
from llm.loop import train

PYTHON = os.environ.get("VLLM_PYTHON", "")
KEY = "a key of ours"
TEXT = "def read(self, size=-1):\n    return self.rfile.read(size)"
pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python that has vLLM: run `make test-serve`"),
]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    (folder / "corpus").mkdir()
    shape = {"vocab_size": 512, "embed_dim": 64, "head_dim": 32, "mlp_dim": 128, "max_length": 128}
    data = {"sequence_length": 64}
    quiet = {"eval": {"every": 0, "batches": 1}, "checkpoint": {"every": 1000}}
    train(
        experiment(
            copy_corpus(folder / "corpus"), folder, model=shape, data=data, train={"steps": 150}, **quiet
        )
    )
    hf.main(["--run", str(folder / "run"), "--out", str(folder / "export")])
    return folder / "export"


@pytest.fixture(scope="module")
def server(export) -> Iterator[Server]:
    with running(export, "ours", "127.0.0.1", 0, PYTHON, KEY) as (url, _):
        yield Server.of(url, KEY)


@pytest.fixture(scope="module")
def model(server) -> Model:
    (model,) = asyncio.run(list_models(server))
    return model


def answered(server: Server, model: Model, mode: str, text: str) -> tuple[Progress, list[int | None]]:
    """The whole answer, and the counts of tokens told on the way."""

    async def go() -> tuple[Progress, list[int | None]]:
        counts = []
        history = [{"role": "user", "content": text, "mode": mode}]
        settings = Settings(temperature=0, top_k=3, max_tokens=100 if mode == "complete" else 12, seed=0)
        answering = Answering(server, *request_for(mode, model, history, "Be brief.", settings))
        async for progress in answering.updates():
            counts.append(progress.tokens)
        return answering.progress, counts

    return asyncio.run(go())


def test_a_completion_and_a_chat_stream_with_the_servers_count(server, model):
    assert model == Model("ours", "vllm") and model.counts
    whole, counts = answered(server, model, "complete", "def read(")
    assert whole.text and whole.ended == "length" and whole.tokens == 100
    assert any(count is not None and 0 < count < 100 for count in counts), "counted before the end"
    assert whole.rate is not None and whole.note().startswith("100 tokens · ")
    assert answered(server, model, "complete", "def read(")[0].text == whole.text
    chat, _ = answered(server, model, "chat", "Hello")
    assert chat.tokens is not None and 0 < chat.tokens <= 12 and chat.ended in ("length", "stop")


def test_its_probabilities_of_a_text_are_those_of_an_inspection(server, model, export):
    served = Served.of(export)
    assert first_mode(served.tokenizer) == "complete"  # though an export has a chat template
    ours = tokens.reading_of(
        Inside("", served.config, served.params, served.tokenizer).inspect(TEXT), served.tokenizer
    )
    theirs = asyncio.run(tokens.ask(server, model.name, TEXT))
    known = [token.probability for token in ours.tokens[1:]]
    assert len(known) > 20 and max(known) > 0.3, "a model that knows nothing would prove little"
    assert [token.label for token in theirs.tokens] == [token.label for token in ours.tokens]
    assert theirs.tokens[0].probability is None
    for mine, other in zip(ours.tokens[1:], theirs.tokens[1:], strict=True):
        assert math.log(other.probability) == pytest.approx(math.log(mine.probability), abs=1e-3)
        assert dict(other.likeliest) == pytest.approx(dict(mine.likeliest), rel=1e-3)
    assert dict(theirs.following) == pytest.approx(dict(ours.following[: tokens.SHOWN]), rel=1e-3)


def test_its_refusals_are_sentences(server, model):
    with pytest.raises(ServerError, match="refuses the key"):
        asyncio.run(list_models(Server(server.url, "another")))
    with pytest.raises(ServerError, match="has no model theirs"):
        answered(server, Model("theirs"), "chat", "Hello")
    for mode in ("chat", "complete"):
        with pytest.raises(ServerError, match="too long for the model's context"):
            answered(server, model, mode, "word " * 200)
    with pytest.raises(ServerError, match="too long for the model's context"):
        asyncio.run(tokens.ask(server, model.name, "word " * 200))
