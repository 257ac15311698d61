"""What the chat page is made of, without a browser: sentences, requests, rates, tokens, the command."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from core.errors import UserError
from launch.address import is_loopback
from launch.chat import client, tokens
from launch.chat.__main__ import _servers
from launch.chat.answer import Answering, Progress, Settings, messages_of, request_for
from launch.chat.catalog import Catalog
from launch.chat.client import Model, Server, ServerError, refusal
from launch.chat.engine import first_mode
from launch.chat.look import as_text, turns
from llm.chat import TEMPLATE

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        (" https://models.example/v1/ ", "https://models.example/v1"),
        ("https://models.example/team/v1", "https://models.example/team/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_a_url_with_v1_or_without_is_the_same_server(given, url):
    assert Server.of(given).url == url


@pytest.mark.parametrize(
    "given", ["", "127.0.0.1:8000", "ftp://a", "http://", "http://:80", "http://a:port", "http://[::1"]
)
def test_what_is_no_url_is_the_users_mistake(given):
    with pytest.raises(UserError, match="give the address of a server"):
        Server.of(given)


def test_loopback_is_this_machine_alone():
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost", "a.localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "localhost.example", ""]))


# What vLLM, OpenAI's servers and FastAPI say, word for word where that is short.
TOO_LONG = (
    "This model's maximum context length is 64 tokens. However, you requested 80 tokens (16 in the messages, "
    "64 in the completion). Please reduce the length of the messages or completion."
)


TOO_MANY = (
    "max_tokens=4000 cannot be greater than max_model_len=512. Please request fewer output tokens. "
    "(parameter=max_tokens, value=4000)."
)
REFUSED = "The server at here:1 refuses the request."
BAD_KEY = "The server at here:1 refuses the key: start this page with the right one (--api-key)."
BUSY = "The server at here:1 has too much to do: try again"
FAILED = "The server at here:1 failed at this request: its log says why."
NOT_FOUND = "The server at here:1 doesn't offer this: look for a slip in the URL. It says: Not Found."
LONG = (
    "This is too long for the model's context: clear the chat, shorten the text, or lower “Max new tokens”. "
    f"It says: {TOO_LONG}"
)
NO_MODEL = "The server at here:1 has no model m: choose another."
TRACEBACK = 'Traceback (most recent call last):\n File "x.py"'


@pytest.mark.parametrize(
    ("status", "body", "wait", "sentence"),
    [
        (401, {"error": "Unauthorized"}, "", BAD_KEY),
        (401, {"error": {"message": "Incorrect API key provided: sk-abc"}}, "", BAD_KEY),
        (404, {"error": {"message": "The model `m` does not exist."}}, "", NO_MODEL),
        (404, {"detail": "Not Found"}, "", NOT_FOUND),
        (400, {"error": {"message": TOO_LONG}}, "", LONG),
        (400, {"error": {"message": TOO_MANY}}, "", LONG.replace(TOO_LONG, TOO_MANY)),
        (400, {"object": "error", "message": "It is so."}, "", f"{REFUSED} It says: It is so."),
        (422, {"detail": [{"loc": [], "msg": "Field required"}]}, "", f"{REFUSED} It says: Field required."),
        (429, {"error": {"message": "Too many."}}, "12", f"{BUSY} in 12 seconds. It says: Too many."),
        (503, {}, "", f"{BUSY} in a moment."),
        (500, {"error": {"message": TRACEBACK}}, "", FAILED),
        (500, {"error": {"message": "{'loc': 3}"}}, "", FAILED),
        (502, {}, "", FAILED),
    ],
)  # fmt: skip
def test_a_refusal_reads_as_a_sentence(status, body, wait, sentence):
    assert refusal("here:1", status, body, "m", wait) == sentence


def test_a_servers_long_words_are_cut():
    said = refusal("here:1", 400, {"error": {"message": "word\n" * 1000}}, "m")
    assert len(said) < 320 and "\n" not in said and said.endswith("word…")


def test_every_failure_of_the_connection_is_a_sentence_without_its_technicalities():
    request = httpx.Request("GET", "http://here:1")
    kinds = [
        kind
        for kind in vars(httpx).values()
        if isinstance(kind, type) and issubclass(kind, httpx.TransportError)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        said = client.failure("here:1", kind("[Errno 111] secret detail", request=request))
        assert "here:1" in said and said.endswith(".") and "secret" not in said and "Errno" not in said


def test_events_are_split_at_newlines_only_wherever_the_pieces_end():
    told = ["a\u2028b", "é\x85", "{}", "[DONE]"]
    raw = b": ping\r\n\r\n" + b"".join(f"data: {text}\n\n".encode() for text in told)

    async def read(size: int) -> list[str]:
        async def pieces():
            for start in range(0, len(raw), size):
                yield raw[start : start + size]

        return [event async for event in client._events(pieces())]

    for size in (1, 2, 3, 7, len(raw)):
        assert asyncio.run(read(size)) == told


def test_turns_alternate_in_a_request_and_completed_texts_are_not_in_it():
    def turn(role, content, mode="chat"):
        return {"role": role, "content": content, "mode": mode}

    history = [
        turn("user", "unanswered"), turn("user", "again"), turn("assistant", "yes"),
        turn("user", "def f(", "complete"), turn("assistant", "x):", "complete"), turn("user", "so?"),
    ]  # fmt: skip
    assert messages_of(history, "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "unanswered\n\nagain"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "so?"},
    ]
    assert messages_of(history[:1], "  ") == [{"role": "user", "content": "unanswered"}]
    path, body = request_for("complete", Model("m", "vllm"), history, "Be brief.", Settings(top_k=3, seed=0))
    assert path == "completions" and body["prompt"] == "so?" and "messages" not in body
    assert (body["model"], body["top_k"], body["seed"]) == ("m", 3, 0)
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    path, body = request_for("chat", Model("m", "another"), history, "", Settings())
    assert path == "chat/completions" and not {"top_k", "seed", "prompt"} & set(body)
    assert body["stream_options"] == {"include_usage": True}


def _progress(*chunks: tuple[float, str, int | None], end: str | None = None) -> Progress:
    progress = Progress(started=10.0)
    for now, text, count in chunks:
        usage = {"usage": {"completion_tokens": count}} if count is not None else {}
        progress.add({"choices": [{"delta": {"content": text}}], **usage}, now)
    progress.add({"choices": [{"text": "", "finish_reason": end}]}, now)
    return progress


HALF = "first token after 0.50 s"


@pytest.mark.parametrize(
    ("chunks", "end", "note"),
    [
        (
            [(10.5, "a", None), (11.5, "b", None), (12.5, "c", None)],
            None,
            f"3 pieces · 1.0 pieces/s · {HALF}",
        ),
        ([(10.5, "ab", 2), (12.5, "c", 6)], "length", f"6 tokens · 2.0 tokens/s · {HALF} · limit reached"),
        ([(10.5, "x", 1)], "stop", f"1 token · {HALF}"),
        ([(10.25, "", None)], "stop", "The model ended its answer at once."),
        ([(10.25, "", None)], None, "Waiting for the first token …"),
    ],
)
def test_rates_count_from_the_first_token_and_take_the_servers_own_count(chunks, end, note):
    assert _progress(*chunks, end=end).note() == note


def test_a_reason_that_is_no_word_and_half_a_character_do_no_harm():
    progress = Progress(started=10.0)
    progress.add(json.loads('{"choices": [{"text": "a\\ud83d", "finish_reason": {"a": 1}}]}'), 10.5)
    assert progress.text == "a?" and progress.note() == f"1 piece · {HALF}"


def test_a_count_that_comes_last_is_taken():
    progress = _progress((10.5, "a", None), (12.5, "b", None))
    progress.add({"choices": [], "usage": {"completion_tokens": 5}}, 12.5)
    assert progress.note().startswith("5 tokens · 2.0 tokens/s")


@contextlib.asynccontextmanager
async def _raw_server(*writes: bytes, hold: bool = False):
    """A socket that answers any request with these bytes, and tells when the other side went away."""
    gone = asyncio.Event()

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for part in writes:
            writer.write(part)
            await writer.drain()
        if hold:
            while await reader.read(1024):
                pass
            gone.set()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield Server.of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "key"), gone


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


def _event(text: str) -> bytes:
    return f"data: {json.dumps({'choices': [{'text': text}]})}\n\n".encode()


def test_stop_closes_the_connection_while_the_server_says_nothing():
    async def go() -> None:
        async with _raw_server(STREAM, _event("one"), hold=True) as (server, gone):
            answering = Answering(server, "completions", {"model": "m"})
            async for progress in answering.updates():
                if progress.text:
                    answering.stop()
            assert (progress.text, progress.ended) == ("one", "stopped")
            await asyncio.wait_for(gone.wait(), 5)

    asyncio.run(go())


def test_an_abandoned_answer_closes_the_connection():
    async def go() -> None:
        async with _raw_server(STREAM, _event("one"), hold=True) as (server, gone):
            updates = Answering(server, "completions", {"model": "m"}).updates()
            async for progress in updates:
                if progress.text:
                    break
            await updates.aclose()
            await asyncio.wait_for(gone.wait(), 5)

    asyncio.run(go())


@pytest.mark.parametrize(
    ("writes", "text", "sentence"),
    [
        ([STREAM, _event("one")], "one", "broke off before the answer was complete"),
        ([STREAM, _event("one"), b'data: {"error": {"message": "no room"}}\n\n'], "one", "It says: no room."),
        ([b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n<html>"], "", "no OpenAI-compatible server"),
        ([STREAM, b"data: 12\n\n"], "", "no OpenAI-compatible server"),
        *[
            ([STREAM, _event("one"), f"data: {odd}\n\n".encode()], "one", "no OpenAI-compatible server")
            for odd in (
                '{"choices": [null]}', '{"choices": 5}', '{"choices": {"a": 1}}', '{"usage": 5}',
                '{"usage": {"completion_tokens": "5"}}', '{"choices": [{"delta": "x"}]}',
                '{"choices": [{"delta": {"content": ["x"]}}]}', '{"choices": [{"text": 3}]}', "[" * 100_000,
            )
        ],
        ([b"nonsense\r\n\r\n"], "", "broke off before"),
        ([b"HTTP/1.1 401 no\r\ncontent-length: 0\r\n\r\n"], "", "refuses the key"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_a_stream_is_told_and_what_came_before_is_kept(writes, text, sentence):
    async def go() -> str:
        async with _raw_server(*writes) as (server, _):
            answering = Answering(server, "completions", {"model": "m"})
            with pytest.raises(ServerError) as told:
                async for _ in answering.updates():
                    pass
            assert answering.progress.text == text
            return str(told.value)

    assert sentence in asyncio.run(go())


def test_a_server_that_went_away_keeps_its_models_listed():
    body = json.dumps({"data": [{"id": "a"}, {"id": "b"}, {"no": 1}]}).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()

    async def go() -> None:
        async with _raw_server(head + body) as (server, _):
            catalog = Catalog([server])
            assert await catalog.chosen(None) == (server, Model("a"))  # a reader quicker than the list
            assert catalog.names == ["a", "b"] and not catalog.troubles
            assert catalog.find("b") == (server, Model("b"))
        catalog._asked = -math.inf
        await catalog.refresh()
        assert catalog.names == ["a", "b"]
        assert catalog.troubles == [f"No server answers at {server.place}: start it, or wait until it is up."]
        with pytest.raises(ServerError, match="No server answers"):
            catalog.find("c")

    asyncio.run(go())


def _catalog(*servers: Server, models: tuple[str, ...] = ("m",)) -> Catalog:
    """One that has been told already what the servers have."""
    catalog = Catalog(servers)
    catalog._models = {server: [Model(name) for name in models] for server in servers}
    catalog._asked = math.inf
    return catalog


def _sending(content):
    """A server whose every answer is this, as JSON."""
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
    return _raw_server(head + body)


def _answering(*names: str):
    return _sending({"data": [{"id": name} for name in names]})


def test_models_of_one_name_on_two_servers_are_told_apart():
    async def go() -> None:
        async with _answering("m", "other") as (one, _), _answering("m") as (two, _):
            catalog = Catalog([one, two, one])
            await catalog.refresh()
            names = [f"m @ {one.place}", f"other @ {one.place}", f"m @ {two.place}"]
            assert catalog.names == names and one.place != two.place
            assert [catalog.find(name)[0] for name in names] == [one, one, two]
            assert catalog.find(names[2]) == (two, Model("m"))
            with pytest.raises(ServerError, match="Choose a model first"):
                catalog.find("m")

    asyncio.run(go())


def test_servers_at_one_address_are_told_apart_by_their_paths():
    a, b = (Server.of(f"https://gate.example/{team}/v1") for team in "ab")
    catalog = _catalog(a, b)
    assert catalog.names == ["m @ gate.example/a/v1", "m @ gate.example/b/v1"]
    assert [catalog.find(name)[0] for name in catalog.names] == [a, b]


HOSTILE = '<img src=x onerror="a()"> & {{value}} ${1} `b` \''


def test_nothing_of_html_or_of_gradios_templates_is_left_in_text():
    shown = as_text(HOSTILE)
    assert not set("<>{}$`\"'") & set(shown)
    message = {"role": "user", "content": HOSTILE, "mode": "chat"}
    assert shown in turns([message]) and HOSTILE not in turns([message])
    page = tokens.as_html(tokens.Reading([tokens.Token(HOSTILE, 0.5, [(HOSTILE, 0.5)])], [(HOSTILE, 1.0)]))
    assert page.count(shown) >= 4 and "<img" not in page and "{" not in page


def test_a_servers_echo_becomes_tokens_with_their_alternatives():
    echoed = {
        "tokens": ["def", " f", "\n"],
        "token_logprobs": [None, math.log(0.25), math.log(0.5)],
        "top_logprobs": [None, {" g": math.log(0.5), " f": math.log(0.25)}, {"\n": math.log(0.5)}],
    }
    reading = tokens._echoed(echoed)
    assert [(t.label, t.probability) for t in reading.tokens] == [("def", None), ("·f", pytest.approx(0.25))]
    assert reading.tokens[1].likeliest == [("·g", pytest.approx(0.5)), ("·f", pytest.approx(0.25))]
    assert reading.following == [("\\n", pytest.approx(0.5))]
    assert tokens._echoed({"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [None]}) is None


@pytest.mark.parametrize(
    "answer",
    [
        {}, {"choices": 5}, {"choices": {"0": 1}}, {"choices": [None]}, {"choices": [{"logprobs": None}]},
        *[
            {"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}}]}
            for tokens, values, tops in (
                (["a"], [None], [None]), (["a", 5], [None, -1], [None, {}]),
                (["a", "b"], [None, 1e9], [None, {}]), (["a", "b"], [None, "x"], [None, {}]),
                (["a", "b"], [None, -1], [None, ["b"]]), (["a", "b"], [None, -1], [None, {"b": None}]),
            )
        ],
    ],
)  # fmt: skip
def test_a_server_without_an_echo_of_the_usual_form_gives_no_probabilities(answer):
    async def go() -> None:
        async with _sending(answer) as (server, _):
            with pytest.raises(ServerError, match=f"{server.place} gives no probabilities"):
                await tokens.ask(server, "m", "text")

    asyncio.run(go())


def test_an_inspection_and_an_echo_of_the_same_figures_read_alike():
    from llm.inspect.lens import Inspection

    class Letters:
        def token_bytes(self, token: int) -> bytes:
            return bytes([token])

    probabilities = np.array([[0.6, 0.3], [0.5, 0.4]], np.float32)
    letters = np.array([[98, 99], [97, 98]])
    inspection = Inspection(
        np.array([97, 99], np.int32), np.zeros((1, 1, 2, 2), np.float32), np.zeros((1, 2), np.int32),
        np.zeros((1, 2), np.float32), letters, probabilities, -np.log(probabilities[:1, 1]),
    )  # fmt: skip
    reading = tokens.reading_of(inspection, Letters())
    tops = [
        {chr(t): math.log(p) for t, p in zip(*row, strict=True)}
        for row in zip(letters, probabilities, strict=True)
    ]
    echo = {
        "tokens": ["a", "c", "a"],
        "token_logprobs": [None, math.log(0.3), math.log(0.5)],
        "top_logprobs": [None, *tops],
    }
    assert tokens.as_html(reading) == tokens.as_html(tokens._echoed(echo))
    assert ">c: 30.0 %<" in tokens.as_html(reading)


def _page(catalog: Catalog, name: str):
    """What the page does at an event, by the name of its function, and the page's parts by their ids."""
    from launch.chat.page import build

    page = build(catalog)
    (does,) = {f.fn for f in page.fns.values() if getattr(f.fn, "__name__", "") == name}
    return does, {block.elem_id: block for block in page.blocks.values() if getattr(block, "elem_id", None)}


async def _sent(catalog: Catalog, chosen: str, numbers=(0, 1, 0, 8, "")) -> tuple[list[dict], dict]:
    """The page's updates, by the ids of its parts, after "Send"."""
    does, parts = _page(catalog, "on_send")
    updates = does(SimpleNamespace(session_hash="s"), "Hello", [], chosen, "complete", "", *numbers)
    named = [{part.elem_id: value for part, value in update.items()} async for update in updates]
    return named, parts


def test_the_model_chosen_is_the_one_that_answers():
    async def go() -> str:
        done = b"data: [DONE]\n\n"
        async with (
            _raw_server(STREAM, _event("from one"), done) as (one, _),
            _raw_server(STREAM, _event("from two"), done) as (two, _),
        ):
            updates, _ = await _sent(_catalog(one, two), f"m @ {two.place}")
            return updates[-2]["t2t-live"]

    assert "from two" in asyncio.run(go())


@pytest.mark.parametrize("fails", ["the server", "the page"])
def test_send_comes_back_whatever_fails(fails, monkeypatch):
    if fails == "the page":
        monkeypatch.setattr(Progress, "note", lambda self: 1 / 0)

    async def go() -> list[dict]:
        async with _raw_server(STREAM, _event("one"), b'data: {"choices": [null]}\n\n') as (server, _):
            return (await _sent(_catalog(server), "m"))[0]

    updates = asyncio.run(go())
    buttons = [(u["t2t-send"].visible, u["t2t-stop"].visible) for u in updates if "t2t-send" in u]
    assert buttons == [(False, True), (True, False)]
    word = {"the server": "no OpenAI-compatible server", "the page": "This page failed at the answer"}
    assert word[fails] in updates[-1]["t2t-note"] and "t2t-error" in updates[-1]["t2t-note"]


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (0, None, "Temperature is a number from 0 to 2."),
        (1, 0, "Top-p is a number from 0.05 to 1."),
        (2, "", "Top-k is a number from 0 to 200."),
        (3, None, "Max new tokens is a number from 1 to 4096."),
        (3, 5000, "Max new tokens is a number from 1 to 4096."),
        (4, "-1", "The seed is a whole number from 0 to 4294967295, or nothing."),
    ],
)
def test_a_number_that_is_none_is_a_sentence(place, value, sentence):
    numbers = [0.8, 1, 0, 256, ""]
    numbers[place] = value
    ids = ["t2t-temperature", "t2t-top-p", "t2t-top-k", "t2t-max", "t2t-seed"]

    async def go() -> tuple[list[dict], dict]:
        return await _sent(_catalog(Server.of("http://127.0.0.1:9")), "m", numbers)

    updates, parts = asyncio.run(go())
    assert parts[ids[place]].preprocess(value) == value  # Gradio lets it through to us
    assert sentence in updates[-1]["t2t-note"] and not any("t2t-stop" in u for u in updates)


@pytest.mark.parametrize(
    ("template", "mode"),
    [(None, "complete"), (TEMPLATE, "complete"), (TEMPLATE.rstrip(), "complete"), ("{{ messages }}", "chat")],
)
def test_only_a_model_that_came_with_a_template_of_its_own_begins_in_chat(template, mode):
    assert first_mode(SimpleNamespace(chat_template=template)) == mode


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("https://models.example", True), ("http://127.0.0.1:8000", True), ("http://localhost:8000", True),
        ("http://[::1]:8000", True), ("http://models.example", False), ("http://10.0.0.1:8000", False),
        ("http://127.0.0.1.example", False), ("http://127.0.0.1@models.example", False),
    ],
)  # fmt: skip
def test_the_environments_key_goes_only_where_nobody_can_read_it(url, private, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "usual")
    (server,) = _servers([url], None)
    said = capsys.readouterr().err
    assert server.key == ("usual" if private else None)
    assert said.startswith("warning: $OPENAI_API_KEY isn't sent to") != private
    assert [server.key for server in _servers([url, url], "given")] == ["given"]
    assert capsys.readouterr().err == ""


def _run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.chat", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_help_comes_without_jax_or_gradio():
    code = (
        "import sys, launch.chat.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "finally: assert not {'jax', 'gradio', 'httpx', 'openai'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--api-key" in done.stdout


def test_mistakes_are_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        url = ["--url", "http://127.0.0.1:9"]
        for arguments, sentence in (
            ([], "name a model to talk to"),
            (["--url", "localhost"], "--url localhost: give the address of a server"),
            ([*url, "--port", port], f"port {port}: address already in use"),
            ([*url, "--port", "70000"], "--port 70000: choose one from 0"),
            ([*url, "--host", "no.such.host.invalid"], "no address is known by that name"),
            ([*url, "--api-key", "clé"], "--api-key: a key is made of letters"),
            (["--run", str(tmp_path / "none"), "--port", "0"], "holds no run"),
        ):
            done = _run(*arguments)
            assert done.returncode == 2, done.stderr
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
            assert sentence in done.stderr
