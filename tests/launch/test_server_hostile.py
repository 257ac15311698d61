"""A thousand malformed and hostile requests: each is refused with a 4xx, and the server lives."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from test_server import CONFIG, NAME, _wait_until_idle, served, slow_steps  # noqa: F401

from launch.server import Limits, running
from launch.server.connections import ImpatientProtocol

LIMITS = Limits(rows=1, waiting=8, choices=6, body_bytes=50_000, body_seconds=1.0)
# Text that each is asked for before and after: what it says must not change.
ASK = {"prompt": "fox", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def url(served):  # noqa: F811
    with running(served, limits=LIMITS) as (url, _):
        yield url


@pytest.fixture(autouse=True)
def _lives(url):
    def answer() -> str:
        response = httpx.post(f"{url}/v1/completions", json=ASK)
        assert response.status_code == 200
        return response.json()["choices"][0]["text"]

    before = answer()
    yield
    assert answer() == before
    deadline = time.monotonic() + 10
    while (health := httpx.get(f"{url}/health").json())["running"] + health["waiting"]:
        assert time.monotonic() < deadline, health
        time.sleep(0.01)


SURROGATE, DEEP = "\ud800", "[" * 20_000
WRONG: dict[str, list[Any]] = {
    "model": [1, [], "other", SURROGATE, "x" * 10_000],
    "prompt": [
        1, {}, True, "", [], [[]], ["", "fox"], [[], [1]], [-1], [320], [2**70], [1.0], [None],
        ["fox", 1], [[1], "fox"], [[[1]]], SURROGATE, "a" + SURROGATE, [SURROGATE], [1] * 200, ["fox"] * 7,
        "fox " * 5_000,
    ],
    "max_tokens": [-1, 0, 1.5, "8", [], 128, 10**9, 2**63, 10**400, True, 1e300],
    "temperature": [-0.1, "1", [], 101, 1e999, -1e999, True, 10**400],
    "top_p": [0, -1, 1.1, "1", 1e999],
    "top_k": [-2, 0.5, "5", 2**63, True],
    "n": [0, -1, 7, 10**9, 2**64, "1", 1.5, 1e999, True],
    "seed": ["1", 1.5, 2**63, -(2**63) - 1, []],
    "stop": [1, [1], [""], "", list("abcde"), [None], {}, SURROGATE, [["a"]]],
    "stop_token_ids": [1, ["a"], [-1], [320], [2**70], [True]],
    "logprobs": [-1, 21, "1", 1.5, True, 2**64],
    "echo": [1, "yes", []],
    "stream": [1, "yes", [], {}],
    "stream_options": [{}, {"include_usage": True}, 1, {"x": 1}],
    "ignore_eos": [1, "no"],
    "best_of": [2, -1, "a"],
    "tools": [[{}], 1, "x"],
    "tool_choice": ["required", {}],
    "response_format": [{"type": "json_object"}, 1, []],
    "logit_bias": [{"1": 1}, 1],
    "presence_penalty": [1, "x", 1e999],
    "frequency_penalty": [-1],
    "suffix": ["x", 1],
    "min_p": [0.1],
    "": [1],
    "\x00": [1],
    SURROGATE: [1],
    "__class__": ["x"],
    "k" * 5_000: [1],
}  # fmt: skip
MESSAGES: list[Any] = [
    None, 1, "hi", {}, [], [1], ["hi"], [[]], [{}], [{"role": "user"}], [{"content": "hi"}],
    [{"role": "wizard", "content": "hi"}], [{"role": 1, "content": "hi"}], [{"role": "user", "content": 1}],
    [{"role": "user", "content": None}], [{"role": "user", "content": ["hi"]}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"type": "image_url"}]}],
    [{"role": "user", "content": SURROGATE}], [{"role": SURROGATE, "content": "hi"}],
    [{"role": "<|eot_id|>", "content": "hi"}], [{"role": "user", "content": "hi", "tool_calls": []}],
    [{"role": "tool", "content": "hi"}], [{"role": "user", "content": "fox " * 5_000}],
    [{"role": "user", "content": "hi"}] * 200, [{"role": "user", "content": "hi", "name": "me"}],
    # No character of the private use area is left to mark the special token's spelling with.
    [{"role": "user", "content": "<|eot_id|>" + "".join(map(chr, range(0xE000, 0xF900)))}],
]  # fmt: skip
BODIES = [
    b"", b" ", b"null", b"1", b'"prompt"', b"[]", b"true", b"{", b'{"prompt"', b'{"prompt":}',
    b"{'prompt': 'x'}", b"NaN", b'{"prompt":"x","top_p":NaN}', b'{"prompt":"x","top_p":-Infinity}',
    b"\xff\xfe", b"\x00", b'{"prompt":"\xff"}', b'{"prompt":"\xed\xa0\x80"}', b"\xef\xbb\xbf{}",
    DEEP.encode(), b'{"a":' * 9_000, b'{"prompt":' + DEEP.encode() + b"]" * 20_000 + b"}",
    b"9" * 20_000, b'{"prompt":"x","n":' + b"9" * 9_000 + b"}", b'{"prompt":"x","top_p":1e-99999}',
    '{"prompt":"x"}'.encode("utf-16"), '{"prompt":"x"}'.encode("utf-32"), b'{"prompt":"x"}garbage',
    b"prompt=x&n=1", b"--x\r\nContent-Disposition: form-data\r\n\r\n--x--", b'{"prompt":"x\n"}',
    b'{"prompt":"x",}', b"<xml/>", b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"messages":[' + b'{"a":' * 450 + b"1" + b"}" * 450 + b"]}",
]  # fmt: skip


JSON = {"Content-Type": "application/json"}


def refused(response: httpx.Response, asked: Any) -> None:
    assert 400 <= response.status_code < 500, (response.status_code, response.text, asked)
    assert {*response.json()["error"]} == {"message", "type", "param", "code"}
    assert len(response.content) < 2_000, asked


def test_wrong_values_and_bodies(url):
    """A thousand: each wrong value alone, several together, at both endpoints; bodies that are no JSON."""
    rng, count = random.Random(0), 0
    alone = [{name: value} for name, values in WRONG.items() for value in values]
    mixed = [
        {name: rng.choice(WRONG[name]) for name in rng.sample([*WRONG], rng.randint(2, 6))}
        for _ in range(400)
    ]
    with httpx.Client(base_url=url, headers=JSON, timeout=10) as client:
        for changes in alone + mixed:
            body = json.dumps({"prompt": "fox", "model": NAME, **changes}).encode()
            refused(client.post("/v1/completions", content=body), changes)
            chat = {k: v for k, v in changes.items() if k not in ("prompt", "logprobs", "echo", "best_of")}
            count += 1
            if chat:
                body = json.dumps({"messages": [{"role": "user", "content": "fox"}], **chat}).encode()
                refused(client.post("/v1/chat/completions", content=body), chat)
                count += 1
        for messages in MESSAGES:
            refused(client.post("/v1/chat/completions", content=json.dumps({"messages": messages})), messages)
            count += 1
        for body in BODIES:
            for kind in ("completions", "chat/completions"):
                refused(client.post(f"/v1/{kind}", content=body), body[:80])
                count += 1
    assert count >= 1000


def test_random_json(url):
    """Documents made at random of the names and values that the fields have."""
    rng = random.Random(1)
    leaves = [
        None,
        True,
        0,
        -1,
        1,
        2**31,
        2**64,
        0.5,
        -1e300,
        1e999,
        "",
        "user",
        "text",
        SURROGATE,
        "\x00",
        "😀",
    ]
    names = [*WRONG, "messages", "role", "content", "type", "text"]

    def value(depth: int) -> Any:
        kind = rng.random()
        if depth == 0 or kind < 0.4:
            return rng.choice(leaves)
        if kind < 0.7:
            return [value(depth - 1) for _ in range(rng.randint(0, 4))]
        return {rng.choice(names): value(depth - 1) for _ in range(rng.randint(0, 6))}

    with httpx.Client(base_url=url, headers=JSON) as client:
        for number in range(400):
            asked = value(4)
            body = json.dumps(asked).encode()
            kind = ("completions", "chat/completions")[number % 2]
            response = client.post(f"/v1/{kind}", content=body)
            if response.status_code != 200:  # some are not wrong
                refused(response, asked)


def raw(url: str, data: bytes, wait: float = 5) -> bytes:
    """What the server answers to these bytes, until it closes or is silent."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=wait) as connection:
        connection.sendall(data)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
                if b'"error"' in answer and answer.endswith(b"}"):
                    break
        except (TimeoutError, ConnectionError):
            pass
        return answer


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [400]),
        (b"GET / HTTP/9.9\r\n\r\n", [400, 404, 505]),
        (b"nonsense\r\n\r\n", [400]),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 200_000 + b"\r\n\r\n", [400, 431]),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [400, 404, 414]),
        (POST + b"Content-Length: -5\r\n\r\n", [400]),
        (POST + b"Content-Length: abc\r\n\r\n", [400]),
        (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", [400]),
        (POST + b"Content-Length: 99999999999999999999999\r\n\r\n{}", [400, 408, 413]),
        (POST + b"Content-Length: 100\r\n\r\n{}", [408]),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", [400]),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n0\r\n\r\n", [400]),
        (POST + b"Transfer-Encoding: gzip\r\n\r\n{}", [400, 501]),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", [408]),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n" + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 20, [413]),
        (POST + b"Content-Length: 60000\r\n\r\n" + b"x" * 60_000, [413]),
        (POST + b"Content-Length: 0\r\n\r\n", [400]),
        (POST + b"\r\n", [400]),
    ],
)
def test_bad_http(url, data, statuses):
    answer = raw(url, data)
    line = answer.split(b"\r\n", 1)[0]
    assert any(line.startswith(b"HTTP/1.1 %d" % status) for status in statuses), answer[:300]


def test_a_head_that_does_not_end(url):
    """Of a first request, and of one that follows another."""
    for before in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
        started = time.monotonic()
        raw(url, before + b"POST /v1/completions HTTP/1.1\r\nHost:", wait=10)
        assert time.monotonic() - started < 6


def test_connections_that_go_in_the_middle(url):
    """Anywhere in a request, and in a stream that was asked for."""
    body = json.dumps({"prompt": "fox", "max_tokens": 120, "stream": True, "ignore_eos": True}).encode()
    whole = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    place = urlsplit(url)
    for end in [*range(0, len(whole), 7), len(whole)]:
        with socket.create_connection((place.hostname, place.port), timeout=5) as connection:
            connection.sendall(whole[:end])


def test_a_client_that_never_reads(served, slow_steps, monkeypatch):  # noqa: F811
    """When its time is up its rows are free and its connection is closed, with what it didn't take."""
    unsent, lost = [], threading.Event()
    look, connection_lost = ImpatientProtocol._look, ImpatientProtocol.connection_lost

    def looking(self):
        if self.transport.is_closing():
            unsent.append(self.transport.get_write_buffer_size())
        look(self)

    def losing(self, exc):
        connection_lost(self, exc)
        if unsent:
            lost.set()

    monkeypatch.setattr(ImpatientProtocol, "_look", looking)
    monkeypatch.setattr(ImpatientProtocol, "connection_lost", losing)
    # Some kilobytes a token: what comes in the time is more than the buffers of both ends take.
    ask = {"max_tokens": 100, "n": 64, "stream": True, "logprobs": True, "top_logprobs": 20}
    body = json.dumps({"messages": [{"role": "user", "content": "fox"}], "ignore_eos": True, **ask}).encode()
    head = POST.replace(b"completions", b"chat/completions") + b"Content-Length: %d\r\n\r\n" % len(body)
    limits = Limits(rows=16, request_seconds=3, body_seconds=0.5)
    with running(served, limits=limits) as (url, _), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect((urlsplit(url).hostname, urlsplit(url).port))
        connection.sendall(head + body)
        time.sleep(1)
        health = httpx.get(f"{url}/health").json()
        assert health["running"] and health["waiting"] and not lost.is_set()
        assert lost.wait(10) and unsent[0] > 0
        _wait_until_idle(url)
        assert httpx.get(f"{url}/health").json()["tokens"] < 64 * 100
