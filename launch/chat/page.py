"""The page itself, in Gradio: a tab to talk to a model, and one to see what it makes of a text."""

from __future__ import annotations

import asyncio
import os
from typing import Any

# Before Gradio is imported: nothing is told to anyone outside.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr

from core.errors import UserError
from launch.chat import tokens
from launch.chat.catalog import Catalog
from launch.chat.client import ServerError
from launch.chat.inside import Inside
from launch.chat.look import CSS, HEAD, said, theme
from launch.chat.talk import chat_tab

SECONDS_BETWEEN_LOOKS = 4.0  # at the servers, whether they are there
NEEDS_RUN = (
    "Attention maps need the model's parameters: start this page with --run FOLDER and choose that model."
)
# Of events whose work is short, and which don't wait for others'.
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def build(catalog: Catalog, inside: Inside | None = None, mode: str = "chat") -> gr.Blocks:
    """The page.

    Args:
        catalog: the models to choose from.
        inside: the one whose parameters are here, if any.
        mode: what is chosen at first: "chat" or "complete".
    """
    with gr.Blocks(title="token-to-tensor chat", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_id="t2t-head"):
            gr.HTML("<h1>token-to-tensor</h1>", min_width=150)
            model = gr.Dropdown(
                [], label="Model", elem_id="t2t-model", filterable=False, min_width=220, scale=2
            )
        trouble = gr.HTML(elem_id="t2t-trouble", visible=False)
        with gr.Tab("Chat"):
            chat_tab(page, catalog, model, mode)
        with gr.Tab("Probabilities"):
            _tokens_tab(catalog, model, inside)
        _watch(page, catalog, model, trouble)
    return page


def mount_options() -> dict[str, Any]:
    """How Gradio is to serve the page: nothing shared, recorded or shown but the page."""
    return {
        "theme": theme(),
        "css": CSS,
        "head": HEAD,
        "footer_links": [],
        "run_history": False,
        "show_error": False,
        "ssr_mode": False,
        "mcp_server": False,
        "enable_monitoring": False,
    }


def _watch(page: gr.Blocks, catalog: Catalog, model: gr.Dropdown, trouble: gr.HTML) -> None:
    """Keep the list of models, and the word about servers that are gone, up to date."""
    seen = gr.State(None)

    async def look(chosen: str | None, seen: Any):
        await catalog.refresh()
        names, troubles = now = (catalog.names, catalog.troubles)
        if now == seen:
            return gr.skip(), gr.skip(), gr.skip()
        keep = chosen if chosen in names else next(iter(names), None)
        word = gr.HTML(said(" ".join(troubles), error=True), visible=bool(troubles))
        return gr.Dropdown(choices=names, value=keep), word, now

    for event in (page.load, gr.Timer(SECONDS_BETWEEN_LOOKS).tick):
        event(look, [model, seen], [model, trouble, seen], **QUIET)


def _tokens_tab(catalog: Catalog, model: gr.Dropdown, inside: Inside | None) -> None:
    views = inside.views if inside else []
    text = gr.Textbox(
        label="Text", lines=3, max_lines=12, elem_id="t2t-text-in", autoscroll=False,
        placeholder="The text whose tokens are to be looked at.",
    )  # fmt: skip
    with gr.Row(elem_id="t2t-ask"):
        show = gr.Button("Show", variant="primary", elem_id="t2t-show", scale=0, min_width=110)
        word = gr.HTML(elem_id="t2t-word")
    reading = gr.HTML(elem_id="t2t-reading")
    view = gr.Dropdown(
        views, value=next(iter(views), None), label="Attention", filterable=False, visible=False,
        elem_id="t2t-view",
    )  # fmt: skip
    maps = gr.HTML(elem_id="t2t-maps")

    def is_here(name: str | None) -> bool:
        return inside is not None and catalog.find(name)[0].url == inside.url

    async def on_show(text: str, name: str | None, view: str):
        if not text.strip():
            return said("Give a text first."), gr.skip(), gr.skip(), gr.skip()
        try:
            server, chosen = await catalog.chosen(name)
            if not is_here(name):
                html = tokens.as_html(await tokens.ask(server, chosen.name, text))
                return "", html, gr.Dropdown(visible=False), said(NEEDS_RUN)
            assert inside is not None
            inspection = await asyncio.to_thread(inside.inspect, text)
            picture = await asyncio.to_thread(inside.picture, text, view)
        except (ServerError, UserError) as error:
            return said(str(error), error=True), "", gr.Dropdown(visible=False), ""
        html = tokens.as_html(tokens.reading_of(inspection, inside.tokenizer))
        return "", html, gr.Dropdown(visible=True), picture

    async def on_view(text: str, name: str | None, view: str):
        try:
            if not text.strip() or not is_here(name):
                return gr.skip()
            assert inside is not None
            return await asyncio.to_thread(inside.picture, text, view)
        except (ServerError, UserError):
            return gr.skip()

    shared: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    outputs = [word, reading, view, maps]
    show.click(on_show, [text, model, view], outputs, show_progress_on=[reading], **shared)
    view.input(on_view, [text, model, view], maps, **shared)
