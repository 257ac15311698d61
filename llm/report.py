"""What a finished run tells: its figures beside the baselines', a plot of the loss, samples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from core.files import write_atomically
from core.metrics import read_metrics
from core.plots import plot_loss
from core.run import RunFolder
from llm.data.corpus import heldout_bytes
from llm.data.loader import TokenDataset
from llm.eval.baselines import baselines
from llm.prepare import Text

_LABELS = {
    "gzip_bits_per_byte": "gzip -9",
    "xz_bits_per_byte": "xz -9e",
    "unigram_bits_per_byte": "unigram over the tokens",
    "heldout_bits_per_byte": "this model",
}


def append_samples(run: RunFolder, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Add this step's samples to `samples.md`, in place of any of this step or later ones."""
    written = run.samples.read_text(encoding="utf-8") if run.samples.exists() else ""
    sections = re.split(r"^(?=## step \d+$)", written, flags=re.MULTILINE)
    kept = [s for s in sections if (m := re.match(r"## step (\d+)$", s, re.MULTILINE)) and int(m[1]) < step]
    blocks = [f"````\n{prompt}{text}\n````\n" for prompt, text in zip(prompts, texts, strict=True)]
    write_atomically(run.samples, "".join([*kept, f"## step {step}\n\n", *blocks, "\n"]))


def finish(run: RunFolder, text: Text, vocab_size: int, parameters: int) -> dict[str, float | int | str]:
    """Write `summary.json` and the plot, and print the table and the last samples."""
    metrics = read_metrics(run.metrics)
    last = metrics[-1]
    costs = baselines(
        heldout_bytes(text.corpus), _counts(text.train, vocab_size), _counts(text.heldout, vocab_size)
    )
    summary = {
        "heldout_bits_per_byte": last["heldout_bits_per_byte"],
        "heldout_loss": last["heldout_loss"],
        "tokens_per_second": median(line["tokens_per_second"] for line in metrics),
        "train_seconds": sum(line["data_seconds"] + line["compute_seconds"] for line in metrics),
        "tokens": last["tokens"],
        "parameters": parameters,
        "corpus_fingerprint": text.corpus.fingerprint,
        **costs,
    }
    run.write_summary(summary)
    plot_loss(metrics, run.plots / "loss.png")
    _print(run, summary, len(heldout_bytes(text.corpus)))
    return summary


def _counts(dataset: TokenDataset, vocab_size: int) -> np.ndarray:
    total = np.zeros(vocab_size, np.int64)
    for number in range(len(dataset.first_token) - 1):
        total += np.bincount(dataset.open_shard(number).tokens, minlength=vocab_size)
    return total


def _print(run: RunFolder, summary: dict, size: int) -> None:
    console = Console(highlight=False)
    table = Table(title=f"{size:,} held-out bytes", title_justify="left")
    table.add_column("coded by")
    table.add_column("bits per byte", justify="right")
    for key in sorted(_LABELS, key=lambda key: -summary[key]):
        style = "bold" if key == "heldout_bits_per_byte" else ""
        table.add_row(_LABELS[key], f"{summary[key]:.3f}", style=style)
    console.print(table)
    if run.samples.exists():
        console.print(run.samples.read_text(encoding="utf-8").rpartition("## ")[2], markup=False)
    console.print(f"loss: {run.plots / 'loss.png'}   figures: {run.summary}   samples: {run.samples}")
