"""The server as its clients see it: `openai`, LangChain, httpx, against a tiny model that really runs."""

from __future__ import annotations

import functools
import json
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import jax
import langchain_openai
import numpy as np
import openai
import pytest
import transformers
from tiny import random_params

from core.errors import UserError
from export.read import import_run
from launch.server import Limits, app, running
from launch.server.model import Served
from launch.server.text import StopText
from llm import decode
from llm.chat import encode_chat, end_of_turn_ids
from llm.engine import Engine
from llm.generate import encode_prompt, text_of
from llm.model.config import ModelConfig
from llm.sampling import Sampling, prompt_keys
from llm.tokenizer import Tokenizer, save, train_bpe

CONFIG = ModelConfig(
    vocab_size=320, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24,
    max_length=128,
)  # fmt: skip
LIMITS = Limits(rows=2, waiting=8, choices=6, body_bytes=50_000)
NAME = "tiny-model"
TEXT = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    save(train_bpe([TEXT * 3, "def f(x): return x\n"], 300, "llama3"), folder)
    return Served(NAME, CONFIG, random_params(CONFIG, 0.3), Tokenizer.load(folder))


@pytest.fixture(scope="module")
def url(served):
    with running(served, limits=LIMITS) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


@pytest.fixture
def slow_steps(monkeypatch):
    """A tiny model has answered before its client can go."""
    turn = Engine._turn

    def slowly(self):
        time.sleep(0.05)
        turn(self)

    monkeypatch.setattr(Engine, "_turn", slowly)


@pytest.fixture
def slow_tokens(slow_steps, monkeypatch):
    """Twenty a second: also on a busy machine there is time to look before an answer of 120 has ended."""
    monkeypatch.setattr("llm.engine.STEPS", 1)


def drawn(served: Served, ids: list[int], count: int, stop=True, **sampling: Any) -> decode.Completion:
    """What `llm.generate` draws after a prompt."""
    keys = prompt_keys(jax.random.key(5), [ids])
    stops = end_of_turn_ids(served.tokenizer) if stop else ()
    return decode.generate(
        CONFIG, served.params, [ids], keys, Sampling.of(**{"temperature": 0.0, **sampling}), count, stops
    )[0]


def post(url: str, kind: str = "completions", **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/{kind}", json=body, timeout=60)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == NAME and model.max_model_len == 128


def test_a_completion_is_what_generate_draws(client, served):
    ids = encode_prompt(served.tokenizer, "The quick")
    ours = drawn(served, ids, 12)
    answer = client.completions.create(
        model=NAME, prompt="The quick", max_tokens=12, temperature=0, logprobs=0
    )
    (choice,) = answer.choices
    assert choice.text == text_of(served.tokenizer, ours.token_ids) != ""
    assert choice.finish_reason == ("length" if len(ours.token_ids) == 12 else "stop")
    np.testing.assert_allclose(choice.logprobs.token_logprobs, ours.log_probabilities, rtol=1e-4)
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == len(ours.token_ids)
    by_ids = client.completions.create(model=NAME, prompt=ids, max_tokens=12, temperature=0)
    assert by_ids.choices[0].text == choice.text


def test_a_seed_gives_what_generate_draws_with_it(client, served):
    ids = encode_prompt(served.tokenizer, "fox")
    ours = drawn(served, ids, 20, temperature=1.2, top_k=50, top_p=0.9)
    answer = client.completions.create(
        model=NAME, prompt="fox", max_tokens=20, temperature=1.2, top_p=0.9, seed=5, extra_body={"top_k": 50}
    )
    assert answer.choices[0].text == text_of(served.tokenizer, ours.token_ids)


def test_streaming_joins_to_the_whole_answer(client):
    ask: dict[str, Any] = {"model": NAME, "prompt": "def f", "max_tokens": 40, "seed": 1, "logprobs": 2}
    whole = client.completions.create(**ask, extra_body={"ignore_eos": True})
    chunks = [*client.completions.create(**ask, stream=True, stream_options={"include_usage": True},
                                         extra_body={"ignore_eos": True})]  # fmt: skip
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    (choice,) = whole.choices
    assert "".join(part.text for part in parts) == choice.text
    assert [part.finish_reason for part in parts][-1] == "length" == choice.finish_reason
    assert all(part.finish_reason is None for part in parts[:-1]) and len(parts) > 2
    joined = [i for part in parts for i in part.logprobs.text_offset]
    assert joined == choice.logprobs.text_offset and len(joined) == 40
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices and chunks[0].usage is None


def test_chat(client, served):
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "fox?"}]
    ids = encode_chat(served.tokenizer, messages)
    ours = drawn(served, ids, 10)
    ask = functools.partial(
        client.chat.completions.create, model=NAME, max_completion_tokens=10, temperature=0
    )
    answer = ask(messages=messages, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == text_of(served.tokenizer, ours.token_ids)
    content = choice.logprobs.content
    np.testing.assert_allclose([c.logprob for c in content], ours.log_probabilities, rtol=1e-4)
    assert [bytes(c.bytes) for c in content] == [served.tokenizer.token_bytes(i) for i in ours.token_ids]
    assert content[0].top_logprobs[0].token == content[0].token and len(content[0].top_logprobs) == 3
    assert answer.usage.prompt_tokens == len(ids)
    parts: Any = [{"type": "text", "text": "fo"}, {"type": "text", "text": "x?"}]
    chunks = [*ask(messages=[messages[0], {"role": "user", "content": parts}], stream=True)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content


def test_a_second_turn_with_the_message_that_was_answered(client, served):
    """As OpenAI's documentation has it: with its `"refusal": null`, and what other clients leave out so."""
    ask = functools.partial(client.chat.completions.create, model=NAME, max_tokens=4, temperature=0)
    messages: Any = [{"role": "user", "content": "fox?"}]
    answered = ask(messages=messages).choices[0].message
    messages.append(answered)
    second = ask(messages=messages)
    plain: Any = [messages[0], {"role": "assistant", "content": answered.content}]
    assert second.usage.prompt_tokens == len(encode_chat(served.tokenizer, plain))
    parts = [{"type": "text", "text": "fox?", "cache_control": None}]
    nulls: Any = [{"role": "user", "content": parts, "name": None}, answered.model_dump()]
    options: Any = {"include_usage": True, "include_obfuscation": None}
    *_, last = ask(messages=nulls, stream=True, stream_options=options)
    assert last.usage == second.usage


def test_special_tokens_spelled_in_a_message_are_text(url, served):
    text = "<|eot_id|><|begin_of_text|>"
    answer = post(url, "chat/completions", messages=[{"role": "user", "content": text}], max_tokens=1).json()
    plain = encode_chat(served.tokenizer, [{"role": "user", "content": ""}])
    assert answer["usage"]["prompt_tokens"] == len(plain) + len(served.tokenizer.encode(text))


def test_langchain(url):
    chat = langchain_openai.ChatOpenAI(
        base_url=f"{url}/v1", api_key="any", model=NAME, temperature=0, max_tokens=8, max_retries=0
    )
    answer = chat.invoke([("system", "Be brief."), ("human", "fox?")])
    streamed = [*chat.stream([("system", "Be brief."), ("human", "fox?")])]
    assert answer.content == "".join(chunk.content for chunk in streamed)
    assert answer.usage_metadata["output_tokens"] in range(1, 9)


def test_echo_scores_the_prompt(url, served):
    """As the page of token probabilities asks: of each token but the first, and nothing drawn."""
    ids = encode_prompt(served.tokenizer, TEXT)
    answer = post(url, prompt=TEXT, echo=True, logprobs=5, max_tokens=0).json()
    (choice,) = answer["choices"]
    scores = choice["logprobs"]
    assert choice["text"] == TEXT and answer["usage"]["completion_tokens"] == 0
    assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
    assert len(scores["tokens"]) == len(ids) and "".join(scores["tokens"][1:]) == TEXT
    for at, token in zip(scores["text_offset"][1:], scores["tokens"][1:], strict=True):
        assert TEXT[at:].startswith(token)
    columns = [scores[name][1:] for name in ("tokens", "token_logprobs", "top_logprobs")]
    for token, p, top in zip(*columns, strict=True):
        assert top[token] == p and len(top) in (5, 6) and all(p <= 0 for p in top.values())
    one = post(url, prompt=TEXT, echo=True, logprobs=5, max_tokens=1, temperature=0).json()["choices"][0]
    assert one["text"].startswith(TEXT) and len(one["logprobs"]["tokens"]) == len(ids) + 1
    assert one["logprobs"]["token_logprobs"][1:-1] == pytest.approx(columns[1], rel=1e-4)
    plain = post(url, prompt=TEXT, echo=True, max_tokens=1, temperature=0).json()["choices"][0]
    assert plain["text"] == one["text"] and plain["logprobs"] is None


def test_several_prompts_and_choices(url, served):
    answer = post(url, prompt=["fox", "dog"], n=3, max_tokens=15, seed=5).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [*range(6)]
    assert len(set(texts)) == 6
    prompts = [ids for text in ("fox", "dog") for ids in [encode_prompt(served.tokenizer, text)] * 3]
    assert answer["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[3])
    keys = prompt_keys(jax.random.key(5), prompts)
    stops = end_of_turn_ids(served.tokenizer)
    rows = decode.generate(CONFIG, served.params, prompts, keys, Sampling.of(1.0), 15, stops)
    assert texts == [text_of(served.tokenizer, row.token_ids) for row in rows]


def test_a_stop_sequence_may_span_tokens(url, served):
    ask = {"prompt": "The", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    whole = post(url, **ask).json()["choices"][0]["text"]
    ids = encode_prompt(served.tokenizer, "The")
    tokens = [text_of(served.tokenizer, [i]) for i in drawn(served, ids, 30, stop=False).token_ids]
    at = next(i for i in range(3, 25) if "\ufffd" not in "".join(tokens[i : i + 2]))
    stop = tokens[at][-1] + tokens[at + 1][:1]
    cut = whole[: whole.index(stop)]
    for stream in (False, True):
        response = post(url, **ask, stop=["never there", stop], stream=stream)
        parts = events(response.text) if stream else [response.json()]
        assert "".join(part["choices"][0]["text"] for part in parts) == cut
        assert parts[-1]["choices"][0]["finish_reason"] == "stop"


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_text_held_back_for_a_stop_sequence():
    stop = StopText(["abab", "xyz"])
    assert [stop.add(t) for t in ("1a", "b", "a", "c", "xy", "q", "ab")] == [
        "1",
        "",
        "",
        "abac",
        "",
        "xyq",
        "",
    ]
    assert stop.end() == "ab" and not stop.stopped
    stop = StopText(["ab", "b"])
    assert stop.add("xab") == "x" and stop.stopped


def test_stop_token_ids_and_ignore_eos(url, served):
    ids = encode_prompt(served.tokenizer, "The")
    free = drawn(served, ids, 30, stop=False).token_ids
    ask = {"prompt": "The", "max_tokens": 30, "temperature": 0}
    assert post(url, **ask, ignore_eos=True).json()["usage"]["completion_tokens"] == 30
    stopped = post(url, **ask, ignore_eos=True, stop_token_ids=[free[4]]).json()
    assert stopped["usage"]["completion_tokens"] == free.index(free[4]) + 1
    assert stopped["choices"][0]["finish_reason"] == "stop"


def test_lengths_by_default(url):
    """Sixteen tokens of a completion, of a chat all that fit."""
    answer = post(url, prompt="fox", ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 16
    answer = post(
        url, "chat/completions", messages=[{"role": "user", "content": "fox"}], ignore_eos=True
    ).json()
    assert answer["usage"]["total_tokens"] == CONFIG.max_length
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "param", "named"),
    [
        ({"tools": [{}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"temprature": 1}, "temprature", "not a field"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 127}, "max_tokens", "context is 128 tokens"),
        ({"n": 7}, "n", "at most 6"),
        ({"stop": list("abcde")}, "stop", "at most 4"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop_token_ids": [320]}, "stop_token_ids", "outside 0 to 319"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "give text"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": [1, 320]}, "prompt", "outside 0 to 319"),
        ({"prompt": [1.5]}, "prompt", "give text"),
        ({"prompt": [True]}, "prompt", "give text"),
        ({"prompt": [1] * 128}, "prompt", "context is 128 tokens"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "'stream': true"),
        ({"seed": 2**64}, "seed", "less than"),
    ],
)
def test_what_can_not_be_done_is_named(url, body, param, named):
    response = post(url, **{"prompt": "fox"} | body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == param and named in error["message"]
    assert error["type"] == "invalid_request_error" and "code" in error


def test_what_asks_for_nothing_is_accepted(url):
    neutral = {
        "tools": None,
        "response_format": {"type": "text"},
        "presence_penalty": 0,
        "user": "me",
        "best_of": 1,
    }
    assert post(url, prompt="fox", max_tokens=1, **neutral).status_code == 200


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "at least 1 item"),
        ([{"role": "wizard", "content": "hi"}], "wizard"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": "hi", "name": "me"}], "messages[0].name"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages[0].content"),
        ("hi", "valid list"),
    ],
)
def test_messages_that_are_none(url, messages, named):
    response = post(url, "chat/completions", messages=messages)
    assert response.status_code == 400 and named in response.json()["error"]["message"]


def test_another_model(client):
    with pytest.raises(openai.NotFoundError, match="no model of this name here, only 'tiny-model'"):
        client.completions.create(model="gpt-4", prompt="fox")


def test_no_such_place(url):
    for response in (httpx.get(f"{url}/v2/models"), httpx.get(f"{url}/v1/completions")):
        assert response.status_code in (404, 405) and response.json()["error"]["message"]


def test_a_full_queue_is_told(served, slow_tokens):
    """And when there is room again, requests are taken."""
    with running(served, limits=Limits(rows=1, waiting=1)) as (url, _):
        openings = [_open_stream(url)]
        next(openings[0][1])
        openings.append(_open_stream(url))
        while httpx.get(f"{url}/health").json()["waiting"] < 1:
            time.sleep(0.01)
        refused = post(url, prompt="fox", max_tokens=1)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "overloaded"
        for response, _ in openings:
            response.close()
        _wait_until_idle(url)
        assert post(url, prompt="fox", max_tokens=1).status_code == 200


def test_a_closed_connection_frees_its_slot(url, slow_tokens):
    """Of a stream, and of a client that waits for the whole answer."""
    for _ in range(3):
        response, lines = _open_stream(url)
        next(lines)
        assert httpx.get(f"{url}/health").json()["running"] == 1
        response.close()
        _wait_until_idle(url)
    before = httpx.get(f"{url}/health").json()["tokens"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=LONG, timeout=0.05)
    _wait_until_idle(url)
    assert httpx.get(f"{url}/health").json()["tokens"] - before < 200


LONG = {"prompt": "fox", "max_tokens": 120, "ignore_eos": True, "n": 2}


def _open_stream(url: str):
    session = httpx.Client(timeout=60)
    response = session.send(
        session.build_request("POST", f"{url}/v1/completions", json=LONG | {"n": 1, "stream": True}),
        stream=True,
    )
    assert response.status_code == 200
    return response, response.iter_lines()


def _wait_until_idle(url: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        health = httpx.get(f"{url}/health").json()
        if health["running"] == health["waiting"] == 0:
            return
        assert time.monotonic() < deadline, health
        time.sleep(0.01)


def test_an_answer_that_takes_too_long_is_cut_off(served, slow_tokens):
    with running(served, limits=Limits(rows=1, request_seconds=0.5)) as (url, _):
        response = post(url, **LONG)
        assert response.status_code == 504 and "longer than 0.5 s" in response.json()["error"]["message"]
        with pytest.raises(httpx.RemoteProtocolError):
            post(url, **LONG | {"n": 1, "stream": True})
        _wait_until_idle(url)


def test_the_api_key(served):
    with running(served, api_key="sésame", limits=LIMITS) as (url, _):
        assert httpx.get(f"{url}/health").status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer sesame"},
            {"Authorization": "Basic s\u00e9same".encode()},
        ):
            response = httpx.get(f"{url}/v1/models", headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        key = "Bearer sésame".encode()
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": key}).status_code == 200


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_is_none(served, key):
    with pytest.raises(UserError, match="an empty API key is no key"), running(served, api_key=key):
        pass


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_is_told_before_compiling(served, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(Engine, "warm_up", lambda self: pytest.fail("compiled for nothing"))
    with pytest.raises(UserError, match=rf"needs the package '{package}'.*\[serve\]"), running(served):
        pass


@pytest.mark.parametrize("given", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/json"])
def test_a_body_that_a_page_may_post_unasked_is_refused(url, given):
    """A browser sends these types to any address; of JSON it asks the server first, which doesn't agree."""
    headers = {} if given is None else {"Content-Type": given}
    body = json.dumps({"prompt": "fox", "max_tokens": 1})
    for kind in ("completions", "chat/completions"):
        response = httpx.post(f"{url}/v1/{kind}", content=body, headers=headers)
        assert response.status_code == 415 and "application/json" in response.json()["error"]["message"]
    asks = {"Origin": "http://x", "Access-Control-Request-Method": "POST"}
    response = httpx.options(f"{url}/v1/completions", headers=asks)
    assert response.status_code == 405 and "access-control-allow-origin" not in response.headers
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert httpx.post(f"{url}/v1/completions", content=body, headers=headers).status_code == 200


def test_a_fault_before_the_engine_is_answered(url, monkeypatch, caplog):
    """Of any kind: a StopIteration in a thread is lost to who waits for it."""

    def fail(*args):
        raise StopIteration

    monkeypatch.setattr(app, "encode_chat", fail)
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 1}
    for stream in (False, True):
        response = post(url, "chat/completions", **ask, stream=stream)
        assert response.status_code == 500 and response.json()["error"]["message"] == "the server failed"
    assert "StopIteration" in caplog.text


def test_a_prompt_that_takes_too_long_to_read_is_cut_off(served, monkeypatch):
    read, ended = threading.Event(), []
    monkeypatch.setattr(app, "encode_prompt", lambda *args: ended.append(read.wait(30)))
    with running(served, limits=Limits(rows=1, request_seconds=0.1)) as (url, _):
        for stream in (False, True):
            assert post(url, prompt="fox", stream=stream).status_code == 504
        assert not ended
        read.set()


def test_a_fault_in_a_stream_is_told_and_logged(url, monkeypatch, caplog):
    add = app.CompletionAnswer.add
    left, added = [None, None], []

    def fail(self, index, piece):
        left.pop()  # the third time an IndexError
        added.append(add(self, index, piece))
        return added[-1]

    monkeypatch.setattr(app.CompletionAnswer, "add", fail)
    monkeypatch.setattr("llm.engine.STEPS", 1)
    with caplog.at_level(logging.ERROR):
        response = post(url, prompt="fox", max_tokens=40, ignore_eos=True, stream=True)
    *chunks, last = events(response.text)
    assert chunks == [chunk for chunk in added if chunk is not None]  # None: half a character waits
    assert last["error"]["message"] == "the server failed" and last["error"]["type"] == "server_error"
    assert "a stream failed" in caplog.text and "IndexError: pop from empty list" in caplog.text
    _wait_until_idle(url)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_end_of_the_engine_is_noticed(served, monkeypatch):
    """Not of a step, which ends its requests alone, but of what is beside them."""

    def fail(self):
        raise MemoryError

    with running(served, limits=LIMITS) as (url, ended):
        assert post(url, prompt="fox", max_tokens=1).status_code == 200 and ended() is None
        monkeypatch.setattr(Engine, "_wait", fail)
        post(url, prompt="fox", max_tokens=1)
        deadline = time.monotonic() + 10
        while ended() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "the engine has ended" in str(ended())
        assert httpx.get(f"{url}/health").status_code == 503


def test_a_taken_port_is_told(url, served):
    again = running(served, port=int(url.rsplit(":", 1)[1]), limits=LIMITS)
    with pytest.raises(UserError, match=r"can't listen on 127.0.0.1, port \d+.*choose another"), again:
        pass


def test_closing_ends_streams(served, slow_tokens):
    with running(served, limits=LIMITS) as (url, _):
        _, lines = _open_stream(url)
        next(lines)
    rest = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert rest[-1]["error"]["message"] == "the server is shutting down"


def test_what_is_served(tmp_path: Path, served):
    """A Hugging Face folder, and the run that it is imported into; a folder that is neither is named."""
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=320, num_hidden_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=24, max_position_embeddings=128,
        )
    ).save_pretrained(tmp_path / "exported")  # fmt: skip
    served.tokenizer.save(tmp_path / "exported")
    theirs = Served.of(tmp_path / "exported")
    import_run(tmp_path / "exported", tmp_path / "run")
    ours = Served.of(tmp_path / "run", "my-model")
    assert (theirs.name, ours.name) == ("exported", "my-model") and theirs.config == ours.config
    assert theirs.tokenizer.fingerprint == ours.tokenizer.fingerprint
    assert jax.tree.all(jax.tree.map(np.array_equal, theirs.params, ours.params))
    with pytest.raises(UserError, match="nothing"):
        Served.of(tmp_path / "nothing")
