"""How the page looks: system fonts, the blue of all plots, light and dark; and text as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradio.themes import Base

SANS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Liberation Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
EMPTY = '<p class="t2t-empty">Ask something, or give the beginning of a text.</p>'

# Of Gradio's HTML templates, which must find none of theirs in what a model wrote.
_MARKS = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})


def as_text(text: str) -> str:
    """Text as HTML that shows it to the letter."""
    return escape(text).translate(_MARKS)


def said(text: str, error: bool = False) -> str:
    """A line about what goes on; an error stands out, and is read out at once where a reader listens."""
    if not text:
        return ""
    kind, role = ("t2t-error", "alert") if error else ("t2t-note", "status")
    return f'<p class="{kind}" role="{role}">{as_text(text)}</p>'


def turns(history: Sequence[Mapping[str, Any]]) -> str:
    """Messages one below the other; what completes a text follows it at once, in its own colour."""
    shown: list[str] = []
    for message in history:
        if message["mode"] == "complete" and message["role"] == "assistant":
            shown[-1] += f"<span>{as_text(message['content'])}</span>"
        else:
            kind = "complete" if message["mode"] == "complete" else message["role"]
            shown.append(f'<div class="t2t-turn t2t-{kind}">{as_text(message["content"])}')
    return "".join(f"{turn}</div>" for turn in shown) or EMPTY


def answer(question: Mapping[str, Any], text: str) -> str:
    """An answer as it comes, and before it the text that it completes.

    Left open at its end, so that Gradio sends what is new and not all again; browsers close it.
    """
    if question["mode"] == "complete":
        return f'<div class="t2t-turn t2t-complete">{as_text(question["content"])}<span>{as_text(text)}'
    return f'<div class="t2t-turn t2t-assistant">{as_text(text)}' if text else ""


def theme() -> Base:
    """Gradio's plain theme with fonts that are already there."""
    import gradio as gr

    blue = gr.themes.colors.Color(
        c50="#f1f7fc", c100="#dcebf6", c200="#bcd8ed", c300="#8fbfe0", c400="#5a9fcf", c500="#2a78b5",
        c600="#24699f", c700="#1f5884", c800="#1b4868", c900="#163a54", c950="#0c2336",
    )  # fmt: skip
    plain = gr.themes.Default(
        primary_hue=blue, neutral_hue="slate", font=SANS, font_mono=MONO, spacing_size="sm", text_size="md"
    )
    return plain.set(
        block_border_width="0px", block_shadow="none", block_background_fill="*background_fill_primary",
        block_background_fill_dark="*background_fill_primary",
    )  # fmt: skip


HEAD = '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'

# --p is a probability, --shade its place on the scale of colours. The log is a column from below, by which
# browsers keep its end in view.
CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; width: 100%; }
.gradio-container main { width: 100%; padding: 0 !important; }
#t2t-head { align-items: end; }
#t2t-head h1 { font-size: 1.2rem; font-weight: 650; margin: 0 0 .5rem; }
#t2t-log {
  height: calc(100dvh - 285px); min-height: 240px; overflow-y: auto; flex-wrap: nowrap;
  flex-direction: column-reverse; border: 1px solid var(--border-color-primary); border-radius: 10px;
}
#t2t-turns { display: block; padding: .9rem .9rem 0; margin-bottom: auto; flex-grow: 0; }
.t2t-empty { color: var(--body-text-color-subdued); text-align: center; padding: 2rem 0; }
.t2t-turn {
  white-space: pre-wrap; overflow-wrap: anywhere; width: fit-content; max-width: 88%; margin: 0 0 .8rem;
  padding: .55rem .85rem; border-radius: 12px; line-height: 1.5; background: var(--background-fill-secondary);
}
.t2t-turn.t2t-user { margin-left: auto; background: var(--primary-100); }
.dark .t2t-turn.t2t-user { background: var(--primary-800); }
.t2t-turn.t2t-complete {
  width: auto; max-width: none; border-radius: 0; padding: 0 0 0 .8rem; background: none;
  font-family: var(--font-mono); font-size: .9rem; border-left: 3px solid var(--primary-500);
}
.t2t-complete span { color: var(--primary-600); }
.dark .t2t-complete span { color: var(--primary-300); }
#t2t-under { align-items: center; min-height: 2.2rem; }
.t2t-note, .t2t-error { margin: 0; font-size: .875rem; }
.t2t-note { color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.t2t-error {
  padding: .5rem .8rem; border-left: 3px solid #d1495b; border-radius: 4px;
  background: color-mix(in srgb, #d1495b 12%, transparent); overflow-wrap: anywhere;
}
#t2t-box textarea {
  border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .6rem .8rem;
}
.t2t-text {
  font-family: var(--font-mono); font-size: .95rem; overflow-wrap: anywhere;
  padding-right: 13rem; /* room for the last token's card */
}
.t2t-token, .t2t-first {
  position: relative; display: inline-block; max-width: 100%; line-height: 1.5; padding: 0 .12em;
  margin: 0 1px 5px 0; border-radius: 3px; cursor: default;
}
.t2t-first { color: var(--body-text-color-subdued); outline: 1px dashed var(--border-color-primary); }
.t2t-token, .t2t-legend span {
  background: color-mix(in oklab, #d5e6f3 calc(var(--shade) * 100%), #f08a5d); color: #10202c;
}
.t2t-token:hover, .t2t-token:focus { outline: 2px solid #2a78b5; }
.t2t-card {
  display: none; position: absolute; left: 0; top: 100%; z-index: 20; width: 15rem; padding: .6rem .7rem;
  font-size: .8rem; line-height: 1.5; color: var(--body-text-color);
  background: var(--background-fill-primary);
  border: 1px solid var(--border-color-primary); border-radius: 6px; box-shadow: 0 4px 16px #0003;
}
.t2t-token:hover .t2t-card, .t2t-token:focus .t2t-card { display: block; }
.t2t-bars { display: grid; gap: .2rem; max-width: 30rem; font-size: .85rem; }
.t2t-bars > span { display: grid; grid-template-columns: 7rem 1fr 4rem; gap: .5rem; align-items: center; }
.t2t-bars code, .t2t-table code { font-family: var(--font-mono); overflow-wrap: anywhere; background: none; }
.t2t-bars i { height: .7em; width: calc(var(--p) * 100%); min-width: 1px; background: #2a78b5; }
.t2t-bars span span { text-align: right; font-variant-numeric: tabular-nums; }
.t2t-card .t2t-bars > span { grid-template-columns: 5.5rem 1fr 3.6rem; }
.t2t-legend { display: flex; align-items: center; gap: 3px; margin: .3rem 0 .6rem; font-size: .8rem; }
.t2t-legend { flex-wrap: wrap; white-space: nowrap; }
.t2t-legend span { width: 1.4rem; height: .8rem; border-radius: 2px; margin-left: .6rem; }
.t2t-legend span:first-child { margin-left: 0; }
.t2t-table { margin-top: 1rem; font-size: .85rem; }
.t2t-table table { border-collapse: collapse; margin-top: .5rem; }
.t2t-table th, .t2t-table td { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top; }
.t2t-figure { overflow-x: auto; }
.t2t-figure img { min-width: 42rem; max-width: 100%; border-radius: 6px; background: white; }
#t2t-ask { align-items: center; padding: 0 var(--spacing-lg); }
@media (max-width: 640px) {
  .gradio-container > .main { padding: .3rem !important; }
  #t2t-head, #t2t-under { flex-wrap: wrap; }
  #t2t-head > *, #t2t-note { flex: 1 0 100% !important; }
  #t2t-head h1 { margin: 0; }
  #t2t-log { height: calc(100dvh - 400px); }
  .t2t-text { padding-right: 0; }
  .t2t-card { position: fixed; inset: auto 1rem 1rem 1rem; width: auto; }
}
"""
