"""What a finished run tells: its figures beside the baselines', a plot of the loss, samples."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from statistics import mean, median

import numpy as np
from rich.console import Console
from rich.table import Table

from core.files import write_atomically
from core.metrics import read_metrics
from core.plots import plot_loss
from core.rewind import read_rewinds
from core.run import RunFolder
from llm.config import Experiment
from llm.data.loader import Batch, Mixture, TokenDataset, train_batch
from llm.eval.baselines import baselines
from llm.eval.heldout import evaluation_batches
from llm.prepare import Text, token_bytes

_UNIGRAM_TOKENS = 16 << 20  # of the training split, at most, that the unigram model is fitted on
_UNIGRAM_BATCH = 64  # windows

_LABELS = {
    "gzip_bits_per_byte": "gzip -9",
    "xz_bits_per_byte": "xz -9e",
    "unigram_bits_per_byte": "unigram over the tokens",
    "heldout_bits_per_byte": "this model",
}


def append_samples(run: RunFolder, step: int, samples: Sequence[str]) -> None:
    """Add this step's samples to `samples.md`, in place of any of this step or later ones.

    They stand indented, which is code to Markdown, and so that no line of theirs passes for a heading.
    """
    written = run.samples.read_bytes().decode(errors="replace") if run.samples.exists() else ""
    sections = re.split(r"^(?=## step \d+$)", written, flags=re.MULTILINE)
    kept = [s for s in sections if (m := re.match(r"## step (\d+)$", s, re.MULTILINE)) and int(m[1]) < step]
    blocks = [textwrap.indent(sample, "    ", lambda line: True) for sample in samples]
    new = f"## step {step}\n\n" + "\n\n---\n\n".join(blocks) + "\n\n"
    write_atomically(run.samples, "".join([*kept, new]))


def finish(
    run: RunFolder, experiment: Experiment, text: Text, parameters: int, samples: Sequence[str]
) -> dict[str, float | int | str]:
    """Write `summary.json` and the plot, and print the table and the last `samples`."""
    metrics = read_metrics(run.metrics)
    last = metrics[-1]
    stalls = [line["checkpoint_seconds"] for line in metrics if line["checkpoint_seconds"] > 0]
    summary = {
        "heldout_bits_per_byte": last["heldout_bits_per_byte"],
        "heldout_loss": last["heldout_loss"],
        "tokens_per_second": median(line["tokens_per_second"] for line in metrics),
        "train_seconds": sum(line["data_seconds"] + line["compute_seconds"] for line in metrics),
        "checkpoint_stall_seconds": mean(stalls) if stalls else 0.0,  # that a save held training up
        "tokens": last["tokens"],
        "parameters": parameters,
        "rewinds": len(read_rewinds(run.rewinds)),
        "corpus_fingerprint": text.corpus.fingerprint,
    }
    run.write_summary(summary)  # already now: the baselines take a while
    plot_loss(metrics, run.plots / "loss.png")
    vocab_size = experiment.model.vocab_size
    batches = evaluation_batches(experiment, text.heldout, None, final=True)
    heldout, heldout_counts = _read(text, batches, vocab_size)
    summary |= baselines(heldout, _train_counts(experiment, text.train), heldout_counts)
    run.write_summary(summary)
    _print(run, summary, len(heldout), text.heldout.num_bytes, samples)
    return summary


def _read(text: Text, batches: Iterable[Batch], vocab_size: int) -> tuple[bytes, np.ndarray]:
    """The bytes of the tokens that batches predict, and how often each token is among them."""
    lengths = token_bytes(text.tokenizer, vocab_size)
    tables = [
        [text.tokenizer.token_bytes(i, begins)[:length] for i, length in enumerate(lengths[int(begins)])]
        for begins in (False, True)
    ]
    counts = np.zeros(vocab_size, np.int64)
    pieces: list[bytes] = []
    for batch in batches:
        counted = batch.weights > 0
        tokens, begins = batch.targets[counted], lengths[0][batch.tokens[counted]] == 0
        counts += np.bincount(tokens, minlength=vocab_size)
        pieces += [tables[at][token] for at, token in zip(begins.tolist(), tokens.tolist(), strict=True)]
    return b"".join(pieces), counts


def _train_counts(experiment: Experiment, data: TokenDataset | Mixture) -> np.ndarray:
    """How often each token is predicted in the first epoch, or in as much of it as is read."""
    total = np.zeros(experiment.model.vocab_size, np.int64)
    windows = min(data.num_windows, max(1, _UNIGRAM_TOKENS // experiment.data.sequence_length))
    for start in range(0, windows, _UNIGRAM_BATCH):
        rows = slice(windows - start)
        batch = train_batch(data, start // _UNIGRAM_BATCH, _UNIGRAM_BATCH, experiment.seed, rows)
        total += np.bincount(batch.targets[batch.weights > 0], minlength=len(total))
    return total


def _print(run: RunFolder, summary: dict, size: int, all_bytes: int, samples: Sequence[str]) -> None:
    console = Console(highlight=False)
    of_all = "" if size >= all_bytes else f" of {all_bytes:,}, spread evenly"
    table = Table(title=f"{size:,} held-out bytes{of_all}", title_justify="left")
    table.add_column("coded by")
    table.add_column("bits per byte", justify="right")
    for key in sorted(_LABELS, key=lambda key: -summary[key]):
        style = "bold" if key == "heldout_bits_per_byte" else ""
        table.add_row(_LABELS[key], f"{summary[key]:.3f}", style=style)
    console.print(table)
    for sample in samples:
        console.out(f"\n{sample}\n\n---", highlight=False)
    console.print(f"loss: {run.plots / 'loss.png'}   figures: {run.summary}   samples: {run.samples}")
