"""The tab to talk in: a log, an entry, and how answers are drawn."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr

from launch.chat import look
from launch.chat.answer import Answering, Settings, request_for
from launch.chat.catalog import Catalog
from launch.chat.client import ServerError
from launch.chat.look import EMPTY, said, turns

_log = logging.getLogger(__name__)
FAULT = "This page failed at the answer: the terminal that it was started in says why."
History = list[dict[str, str]]  # messages with `role`, `content` and the `mode` they were made in

# The lowest, the highest and the step of each slider, in the order of `_settings_of`.
_RANGES: dict[str, tuple[float | int, float | int, float | int]] = {
    "Temperature": (0, 2, 0.05),
    "Top-p": (0.05, 1, 0.05),
    "Top-k (0: all tokens)": (0, 200, 1),
    "Max new tokens": (1, 4096, 1),
}


def chat_tab(page: gr.Blocks, catalog: Catalog, model: gr.Dropdown, first_mode: str) -> None:
    """Lay out the tab, and say what its buttons do."""
    working: dict[str, Answering] = {}  # by session
    history = gr.State([])
    with gr.Row():
        with gr.Column(scale=7, min_width=320):
            with gr.Column(elem_id="t2t-log"), gr.Column(elem_id="t2t-turns"):
                log = gr.HTML(EMPTY)
                live = gr.HTML(elem_id="t2t-live")
            with gr.Row(elem_id="t2t-under"):
                note = gr.HTML(elem_id="t2t-note", min_width=200)
                again, edit, clear = (
                    gr.Button(name, size="sm", elem_id=f"t2t-{name.lower()}", scale=0, min_width=width)
                    for name, width in (("Regenerate", 96), ("Edit", 56), ("Clear", 56))
                )
            with gr.Row(equal_height=True):
                box = gr.Textbox(
                    label="Message", show_label=False, container=False, lines=1, max_lines=8, scale=8,
                    placeholder="Message", autofocus=True, elem_id="t2t-box", min_width=180,
                )  # fmt: skip
                send = gr.Button("Send", variant="primary", scale=0, min_width=88, elem_id="t2t-send")
                stop = gr.Button(
                    "Stop", variant="stop", scale=0, min_width=88, elem_id="t2t-stop", visible=False
                )
        with gr.Column(scale=3, min_width=260):
            controls = _controls(first_mode)

    async def answer(
        past: History, name: str | None, mode: str, system: str, numbers: Sequence[Any], session: str
    ) -> AsyncIterator[dict]:
        """Updates of the page while the model answers the last message of `past`."""
        yield {history: past, log: turns(past), live: ""}
        try:
            server, chosen = await catalog.chosen(name)
            settings = _settings_of(*numbers)
        except (ServerError, ValueError) as error:
            yield {note: said(str(error), error=True)}
            return
        path, body = request_for(mode, chosen, past, system, settings)
        working[session] = answering = Answering(server, path, body)
        word = ""
        done = past[:-1] if mode == "complete" else past
        yield {
            log: turns(done) if done else "",
            send: gr.Button(visible=False),
            stop: gr.Button(visible=True),
        }
        try:
            async for progress in answering.updates():
                if working.get(session) is not answering:
                    return  # cleared meanwhile
                word = said(progress.note())
                yield {live: look.answer(past[-1], progress.text), note: word}
        except ServerError as error:
            word = said(str(error), error=True)
        except Exception:  # whatever it is, the reader gets the button to send back
            _log.exception("an answer failed")
            word = said(FAULT, error=True)
        finally:
            answering.stop()
            if still := working.get(session) is answering:
                del working[session]
        if not still:
            return
        if text := answering.progress.text:
            past = [*past, {"role": "assistant", "content": text, "mode": mode}]
        yield {
            history: past, log: turns(past), live: "", note: word,
            send: gr.Button(visible=True), stop: gr.Button(visible=False),
        }  # fmt: skip

    async def on_send(request: gr.Request, text: str, past: History, name, mode, system, *numbers: Any):
        session = request.session_hash or ""
        if not text.strip() or session in working:
            yield {note: gr.skip()}
            return
        yield {box: ""}
        past = [*past, {"role": "user", "content": text, "mode": mode}]
        async for update in answer(past, name, mode, system, numbers, session):
            yield update

    async def on_again(request: gr.Request, past: History, name, mode, system, *numbers: Any):
        session = request.session_hash or ""
        past = _before_answer(past)
        if not past or session in working:
            yield {note: gr.skip()}
            return
        past = [*past[:-1], {**past[-1], "mode": mode}]
        async for update in answer(past, name, mode, system, numbers, session):
            yield update

    def on_edit(request: gr.Request, past: History):
        """The last question goes back to where it was written, and its answer goes."""
        past = _before_answer(past)
        if not past or request.session_hash in working:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        return past[-1]["content"], past[:-1], turns(past[:-1]), ""

    async def on_stop(request: gr.Request) -> None:
        if (answering := working.get(request.session_hash or "")) is not None:
            answering.stop()

    async def on_clear(request: gr.Request):
        if (answering := working.pop(request.session_hash or "", None)) is not None:
            answering.stop()
        return [], EMPTY, "", "", gr.Button(visible=True), gr.Button(visible=False)

    asked = [history, model, *controls]
    shown = [box, history, log, live, note, send, stop]
    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on([box.submit, send.click], on_send, [box, *asked], shown, concurrency_limit=None, **hidden)
    again.click(on_again, asked, shown, concurrency_limit=None, **hidden)
    edit.click(on_edit, [history], [box, history, log, note], queue=False, **hidden)
    stop.click(on_stop, None, None, queue=False, **hidden)
    clear.click(on_clear, None, [history, log, live, note, send, stop], queue=False, **hidden)
    page.unload(on_stop)


def _before_answer(past: History) -> History:
    """A history up to its last question."""
    while past and past[-1]["role"] == "assistant":
        past = past[:-1]
    return past


def _controls(first_mode: str) -> list[Any]:
    """The controls beside the log: mode, system prompt, then what `_settings_of` takes, in its order."""
    default = Settings()
    mode = gr.Radio(
        [("Chat", "chat"), ("Complete the text", "complete")], value=first_mode, label="What the model does",
        info="A model trained on text alone, without instruction tuning, can only complete.",
        elem_id="t2t-mode",
    )  # fmt: skip
    system = gr.Textbox(
        label="System prompt", lines=2, max_lines=6, elem_id="t2t-system", visible=first_mode == "chat"
    )
    values = (default.temperature, default.top_p, default.top_k, default.max_tokens)
    sliders = [
        gr.Slider(low, high, value, step=step, label=label, elem_id=f"t2t-{label.split()[0].lower()}")
        for (label, (low, high, step)), value in zip(_RANGES.items(), values, strict=True)
    ]
    for slider in sliders:  # Gradio's check fails at an emptied number without a word; `_settings_of` has one
        slider.preprocess = lambda payload: payload  # type: ignore[method-assign]
    seed = gr.Textbox(label="Seed", placeholder="empty: another answer each time", elem_id="t2t-seed")
    mode.change(
        lambda mode: gr.Textbox(visible=mode == "chat"), mode, system,
        queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    return [mode, system, *sliders, seed]


def _settings_of(temperature: Any, top_p: Any, top_k: Any, most: Any, seed: str) -> Settings:
    """Raises `ValueError` with a sentence."""
    given = (temperature, top_p, top_k, most)
    for (label, (low, high, _)), value in zip(_RANGES.items(), given, strict=True):
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"{label.partition(' (')[0]} is a number from {low} to {high}.")
    seed = seed.strip()
    if seed and not (seed.isascii() and seed.isdigit() and int(seed) < 2**32):
        raise ValueError(f"The seed is a whole number from 0 to {2**32 - 1}, or nothing.")
    return Settings(temperature, top_p, int(top_k), int(most), int(seed) if seed else None)
