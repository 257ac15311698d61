"""The chat page in a real browser, before the real server of a tiny run."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from processes import environment
from tiny import copy_corpus, experiment

from llm.loop import train

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(not CHROMIUM, reason="there is no browser: install chromium, or name it in $CHROMIUM"),
]

CONTEXT = 4096
KEY = "right-key"
BOX, SEND, STOP, NOTE, LOG = "#t2t-box textarea", "#t2t-send", "#t2t-stop", "#t2t-note", "#t2t-log"
SECONDS = 30_000  # of patience on a busy machine, in Playwright's milliseconds
expect.set_options(timeout=SECONDS)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Where the run and the programs compiled for it are kept."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "corpus").mkdir()
    train(experiment(copy_corpus(folder / "corpus"), folder / "runs", "tiny", model={"max_length": CONTEXT}))
    return folder


class Server:
    """The JAX server in a process of its own, always on the same port."""

    def __init__(self, made: Path) -> None:
        self._made = made
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        run, port = str(self._made / "runs" / "tiny"), str(self._port)
        command = [sys.executable, "-m", "launch.serve", "--engine", "jax", "--model", run]
        self._process = subprocess.Popen(
            [*command, "--port", port, "--api-key", KEY], cwd=ROOT, env=environment(self._made / "jax")
        )
        wait_for(lambda: self.health() is not None or self._process.poll() is not None, 120)
        assert self._process.poll() is None

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def health(self) -> dict | None:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", trust_env=False).json()
        return None

    def busy_rows(self) -> int:
        health = self.health()
        assert health is not None
        return health["running"]


def wait_for(happens, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it didn't happen"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(made) -> Iterator[Server]:
    server = Server(made)
    yield server
    server.kill()


@contextlib.contextmanager
def command(made: Path, *arguments: str, key: str = KEY) -> Iterator[str]:
    """`python -m launch.chat` as a user starts it; yields the page's address, and ends it by Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.chat", "--port", "0", *arguments],
        cwd=ROOT, env=environment(made / "jax", OPENAI_API_KEY=key), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        match = re.fullmatch(r"chat page: (http://127\.0\.0\.1:\d+)  \(Ctrl-C ends it\)\n", said)
        assert match, said
        yield match[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()


@pytest.fixture(scope="module")
def by_url(made, server) -> Iterator[str]:
    with command(made, "--url", server.url) as address:
        yield address


@pytest.fixture(scope="module")
def by_run(made) -> Iterator[str]:
    with command(made, "--run", str(made / "runs" / "tiny")) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser) -> Iterator[Page]:
    """An empty tab; at the end, no script may have failed and nothing been asked of another machine."""
    failed: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("request", lambda r: r.url.startswith(("http://127.0.0.1:", "data:")) or failed.append(r.url))
    yield page
    context.close()
    assert failed == []


def go(page: Page, address: str, mode: str = "Complete the text", tokens: int = 24) -> None:
    """Open the page, and make answers the same each time."""
    page.goto(address)
    expect(page.locator("#t2t-model input")).to_have_value(re.compile("tiny"))
    page.get_by_label(mode, exact=True).check()
    page.locator("#t2t-temperature input[type=number]").fill("0")
    page.locator("#t2t-max input[type=number]").fill(str(tokens))
    page.locator("#t2t-max input[type=number]").blur()


def ask(page: Page, text: str) -> None:
    page.fill(BOX, text)
    page.press(BOX, "Enter")
    expect(page.locator(BOX)).to_have_value("")


def answered(page: Page) -> str:
    """The log once the answer is complete."""
    expect(page.locator(NOTE)).to_contain_text(re.compile(r"^\s*\d+ tokens? .*first token after \d+\.\d\d s"))
    expect(page.locator(SEND)).to_be_visible()
    return page.locator(LOG).inner_text()


def test_an_answer_streams_and_stop_frees_the_servers_row(page, by_url, server):
    go(page, by_url, tokens=4000)
    ask(page, "def main(")
    live = page.locator("#t2t-live .t2t-complete span")
    expect(live).not_to_be_empty()
    lengths = [len(live.inner_text())]
    wait_for(lambda: lengths.append(len(live.inner_text())) or lengths[-1] > lengths[0])
    assert server.busy_rows() == 1
    page.click(STOP)
    expect(page.locator(NOTE)).to_contain_text("stopped")
    wait_for(lambda: server.busy_rows() == 0, 5)
    text = answered(page)
    count = int(page.locator(NOTE).inner_text().split()[0])
    assert text.startswith("def main(") and lengths[-1] > lengths[0] and 1 < count < 4000
    expect(page.locator(STOP)).to_be_hidden()


def test_regenerate_edit_and_clear(page, by_url):
    go(page, by_url)
    ask(page, "def one(")
    first = answered(page)
    page.fill("#t2t-seed textarea, #t2t-seed input", "5")
    page.locator("#t2t-temperature input[type=number]").fill("1.5")
    page.locator("#t2t-temperature input[type=number]").blur()
    page.click("#t2t-regenerate")
    expect(page.locator(LOG)).not_to_have_text(first)
    again = answered(page)
    assert again.startswith("def one(") and again != first and again.count("def one(") == 1
    page.click("#t2t-regenerate")
    page.wait_for_timeout(300)
    assert answered(page) == again  # the seed stayed
    page.click("#t2t-edit")
    expect(page.locator(BOX)).to_have_value("def one(")
    expect(page.locator(".t2t-turn")).to_have_count(0)
    ask(page, "def two(")
    assert answered(page).startswith("def two(")
    page.click("#t2t-clear")
    expect(page.locator(".t2t-turn")).to_have_count(0)


def test_a_chat_has_turns_and_a_system_prompt(page, by_url):
    go(page, by_url, "Chat")
    page.fill("#t2t-system textarea", "Be brief.")
    ask(page, "Hello")
    answered(page)
    ask(page, "And now?")
    expect(page.locator(".t2t-turn")).to_have_count(4)
    answered(page)
    users = page.locator(".t2t-user").all_inner_texts()
    assert users == ["Hello", "And now?"]


def test_html_in_messages_stays_text(page, by_url):
    hostile = (
        '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> {{value}} ${1+1} **b** `c`'
    )
    for mode in ("Chat", "Complete the text"):
        go(page, by_url, mode)
        ask(page, hostile)
        assert hostile in answered(page)
        page.get_by_role("tab", name="Probabilities").click()
        page.fill("#t2t-text-in textarea", hostile)
        page.click("#t2t-show")
        expect(page.locator("#t2t-reading .t2t-token").first).to_be_visible()
        assert page.evaluate("window.hacked") is None
        assert page.locator("#t2t-log img, #t2t-log script, #t2t-log strong, #t2t-reading img").count() == 0


def test_a_seed_that_is_none_and_a_text_too_long_are_sentences(page, by_url):
    go(page, by_url)
    page.fill("#t2t-seed textarea, #t2t-seed input", "five")
    ask(page, "def one(")
    expect(page.locator(f"{NOTE} .t2t-error")).to_contain_text("The seed is a whole number")
    page.fill("#t2t-seed textarea, #t2t-seed input", "")
    ask(page, "word " * CONTEXT)
    expect(page.locator(f"{NOTE} .t2t-error")).to_contain_text("too long for the model's context")
    page.click("#t2t-clear")
    ask(page, "def one(")
    assert answered(page).startswith("def one(")


def test_an_emptied_number_is_the_lowest_once_it_is_left(page, by_url):
    go(page, by_url)
    most = page.locator("#t2t-max input[type=number]")
    most.fill("")
    ask(page, "def one(")
    assert answered(page).startswith("def one(")
    expect(most).to_have_value("1")
    assert page.locator(NOTE).inner_text().startswith("1 token ")


def test_of_two_models_of_one_name_the_chosen_one_answers(page, made, server):
    with command(made, "--run", str(made / "runs" / "tiny"), "--url", server.url) as address:
        go(page, address, tokens=4000)
        page.locator("#t2t-model input").click()
        page.get_by_role("option", name=server.url.removeprefix("http://")).click()
        ask(page, "def main(")
        expect(page.locator("#t2t-live .t2t-complete span")).not_to_be_empty()
        assert server.busy_rows() == 1
        page.click(STOP)
        wait_for(lambda: server.busy_rows() == 0, 5)


def test_closing_the_tab_frees_the_servers_row(page, by_url, server):
    go(page, by_url, tokens=4000)
    ask(page, "def main(")
    expect(page.locator("#t2t-live .t2t-complete span")).not_to_be_empty()
    assert server.busy_rows() == 1
    page.close()
    wait_for(lambda: server.busy_rows() == 0, 5)


def test_the_server_goes_in_the_middle_of_an_answer_and_comes_back(page, by_url, server):
    go(page, by_url, tokens=4000)
    ask(page, "def main(")
    expect(page.locator("#t2t-live .t2t-complete span")).not_to_be_empty()
    server.kill()
    error = page.locator(f"{NOTE} .t2t-error")
    try:
        expect(error).to_contain_text("broke off before the answer was complete")
        assert len(page.locator(LOG).inner_text()) > len("def main(")
        expect(page.locator("#t2t-trouble")).to_contain_text("No server answers at 127.0.0.1")
        page.click("#t2t-regenerate")
        expect(error).to_contain_text("No server answers at 127.0.0.1")
        assert page.locator(LOG).inner_text().strip() == "def main("
    finally:
        server.start()
    expect(page.locator("#t2t-trouble")).to_be_hidden()
    page.locator("#t2t-max input[type=number]").fill("8")
    page.locator("#t2t-max input[type=number]").blur()
    page.click("#t2t-regenerate")
    assert len(answered(page)) > len("def main(")


def test_a_wrong_key_is_a_sentence(page, made, server):
    with command(made, "--url", server.url, key="wrong") as address:
        page.goto(address)
        expect(page.locator("#t2t-trouble")).to_contain_text("refuses the key")
        ask(page, "Hello")
        expect(page.locator(f"{NOTE} .t2t-error")).to_contain_text("refuses the key")


def show(page: Page, address: str, text: str) -> None:
    """Have the second tab show a text."""
    page.goto(address)
    expect(page.locator("#t2t-model input")).to_have_value(re.compile("tiny"))
    page.get_by_role("tab", name="Probabilities").click()
    page.fill("#t2t-text-in textarea", text)
    page.click("#t2t-show")


def rows(page: Page) -> list[str]:
    """What that tab says of each token."""
    page.locator("#t2t-reading summary").click()
    return page.locator("#t2t-reading tbody tr").all_inner_texts()


def test_probabilities_are_the_same_from_parameters_and_from_a_server(page, by_run, by_url):
    text = "def read(self, size=-1):\n    return"
    show(page, by_run, text)
    ours = rows(page)
    maps = page.locator("#t2t-maps img")
    expect(maps).to_be_visible()
    overview = maps.get_attribute("src")
    page.locator("#t2t-view input").click()
    page.get_by_role("option", name="layer 1").click()
    expect(maps).to_have_attribute("alt", "attention maps of layer 1")
    assert maps.get_attribute("src") != overview
    page.locator(".t2t-token").nth(2).hover()
    expect(page.locator(".t2t-token").nth(2).locator(".t2t-card")).to_be_visible()

    show(page, by_url, text)
    theirs = rows(page)
    expect(page.locator("#t2t-maps")).to_contain_text("need the model's parameters")
    assert len(ours) > 5 and all("%" in row for row in ours[1:])
    assert ours[-len(theirs) :][1:] == theirs[1:]


def test_a_run_answers_without_any_other_server(page, by_run):
    page.goto(by_run)
    expect(page.get_by_label("Complete the text", exact=True)).to_be_checked()
    go(page, by_run)
    ask(page, "def one(")
    assert answered(page).startswith("def one(")
    show(page, by_run, "x " * 200)
    expect(page.locator("#t2t-word")).to_contain_text("give one of 2 to 128")
