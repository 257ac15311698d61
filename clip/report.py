"""What a finished run tells: its figures, and a plot of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from rich.console import Console
from rich.table import Table

from core.metrics import read_metrics
from core.plots import plot_loss
from core.rewind import read_rewinds
from core.run import RunFolder

_LABELS = {
    "heldout_loss": "held-out loss",
    "image_to_text_recall_at_1": "image to caption, recall@1",
    "text_to_image_recall_at_1": "caption to image, recall@1",
    "zero_shot_accuracy": "zero-shot, top-1",
}


def finish(run: RunFolder, parameters: int, before: Sequence[Mapping[str, float | int]]) -> None:
    """Write `summary.json` and the plot, and print the last evaluation's figures.

    `before` are the metrics that this start found. If it has taken no step since, `summary.json` stays as it
    is, with what `clip.zeroshot` has put there.
    """
    metrics = read_metrics(run.metrics)
    last = metrics[-1]
    evaluated = {
        name: value
        for name, value in last.items()
        if name.startswith(("heldout_", "image_to_text_", "text_to_image_", "zero_shot_"))
    }
    summary = {
        **evaluated,
        "images_per_second": median(line["images_per_second"] for line in metrics),
        "train_seconds": sum(line["data_seconds"] + line["compute_seconds"] for line in metrics),
        "images": last["images"],
        "parameters": parameters,
        "rewinds": len(read_rewinds(run.rewinds)),
    }
    if metrics != before or not run.read_summary():
        run.write_summary(summary)
    plot_loss(metrics, run.plots / "loss.png", "images", "loss (nats a pair)")
    console = Console(highlight=False)
    table = Table(title="held-out images and captions", title_justify="left")
    table.add_column("")
    table.add_column("this model", justify="right")
    for name, label in _LABELS.items():
        if name in evaluated:
            value = evaluated[name]
            table.add_row(label, f"{value:.3f}" if name.endswith("loss") else f"{value:.1%}")
    console.print(table)
    command = f"python -m clip.zeroshot --run {run.path}"
    console.print(f"{command}   measures what it makes of images", soft_wrap=True)
    console.print(f"loss: {run.plots / 'loss.png'}   figures: {run.summary}", soft_wrap=True)
