"""`python -m llm.data.budget --config C`: what a run takes in tokens, operations, time and money.

Formulas alone: it answers at once, without JAX and without the devices. With `--flops` or `--days` it goes
the other way: from what there is to spend to the size that uses it best, and to the steps of this model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

from core.config import add_arguments, load
from core.devices import DEVICES, Device, named
from core.errors import UserError, run_command
from core.words import duration, exponent, short
from llm.config import Experiment
from llm.data.corpus import open_corpus
from llm.data.loader import read_index
from llm.model.flops import (
    active_parameters,
    matmul_parameters,
    num_parameters,
    training_flops_per_token,
)

CHINCHILLA = 20  # tokens per parameter where compute is best spent (Hoffmann et al. 2022, arXiv:2203.15556)
MFU = 0.4  # published for dense models of 7B and more on A100 and H100: 0.37 to 0.52 (docs/gpu.md)
COUNT = 8  # a node
BYTES_PER_TOKEN = 4  # about English under 32,000 tokens or more; the embedded corpus under 2,048 has 3.2


class CorpusSize(NamedTuple):
    """Tokens to train on, None where they can't be told, and how that is known."""

    tokens: int | None
    estimated: bool
    source: str


class Budget(NamedTuple):
    """What a run takes, whatever it runs on. `flops` are those of llm/model/flops.py, `flops_6nd` a rule."""

    parameters: int
    active_parameters: int  # of a token: all but the experts that it doesn't take; N in all that follows
    matmul_parameters: int
    steps: int
    tokens_per_step: int
    tokens: int
    tokens_per_parameter: float
    chinchilla_ratio: float
    flops: float
    flops_6nd: float
    corpus_tokens: int | None
    corpus_tokens_estimated: bool
    epochs: float | None


class Cost(NamedTuple):
    """A run on so many `devices` of one name; None is what isn't known: a peak for the dtype, a price."""

    device: str
    devices: int
    mfu: float
    peak_flops: float | None
    hours: float | None
    device_hours: float | None
    cost_usd: float | None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llm.data.budget", description=__doc__.partition(": ")[2].partition("\n")[0]
    )
    add_arguments(parser)
    parser.add_argument(
        "--device",
        action="append",
        dest="devices",
        metavar="NAME",
        help=f"one of {', '.join(DEVICES)}; may be given several times; default: all",
    )
    parser.add_argument("--count", type=int, default=COUNT, metavar="N", help=f"devices; default: {COUNT}")
    parser.add_argument(
        "--mfu",
        type=float,
        default=MFU,
        metavar="SHARE",
        help=f"of the devices' dense peak that the model's arithmetic reaches; default: {MFU}, since "
        "published runs of dense models on A100 and H100 reach 0.37 to 0.52",
    )
    parser.add_argument("--price", type=float, metavar="USD", help="of one device for an hour")
    parser.add_argument("--flops", type=float, metavar="C", help="spend this many operations in training")
    parser.add_argument("--days", type=float, metavar="D", help="spend this long on --count of one --device")
    parser.add_argument("--json", action="store_true", help="a flat JSON object per device")
    args = parser.parse_args(argv)
    _check(args)
    devices = {name: named(name) for name in args.devices or DEVICES}
    experiment = load(Experiment, args.config, args.overrides)
    compute = args.flops
    if args.days is not None:
        compute = args.days * 86400 * _speed(args.devices[0], experiment.train.dtype, args)
    if compute is not None:
        train = dataclasses.replace(experiment.train, steps=affordable_steps(experiment, compute))
        experiment = dataclasses.replace(experiment, train=train)
    corpus = corpus_size(experiment)
    budget = make_budget(experiment, corpus)
    dtype = experiment.train.dtype
    costs = [
        make_cost(budget.flops, name, device, dtype, args.count, args.mfu, args.price)
        for name, device in devices.items()
    ]
    if args.json:
        for cost in costs:
            print(json.dumps(cost._asdict() | budget._asdict() | _optimum(compute)))
    else:
        _print(experiment, budget, corpus, costs, compute)


def make_budget(experiment: Experiment, corpus: CorpusSize) -> Budget:
    """Count what `experiment` takes in all its steps."""
    active = active_parameters(experiment.model)
    tokens_per_step = experiment.data.batch_size * experiment.data.sequence_length
    tokens = experiment.train.steps * tokens_per_step
    return Budget(
        parameters=num_parameters(experiment.model),
        active_parameters=active,
        matmul_parameters=matmul_parameters(experiment.model),
        steps=experiment.train.steps,
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        tokens_per_parameter=tokens / active,
        chinchilla_ratio=tokens / active / CHINCHILLA,
        flops=tokens * training_flops_per_token(experiment.model, experiment.data.sequence_length),
        flops_6nd=6.0 * active * tokens,
        corpus_tokens=corpus.tokens,
        corpus_tokens_estimated=corpus.estimated,
        epochs=tokens / corpus.tokens if corpus.tokens else None,
    )


def make_cost(
    flops: float, name: str, device: Device, dtype: str, count: int, mfu: float, price: float | None
) -> Cost:
    """Time and money for `flops` on `count` devices that reach `mfu` of their peak for `dtype`."""
    peak = device.peaks.get(dtype)
    hours = flops / (count * peak * mfu) / 3600 if peak else None
    device_hours = None if hours is None else hours * count
    cost = None if device_hours is None or price is None else device_hours * price
    return Cost(name, count, mfu, peak, hours, device_hours, cost)


def compute_optimal(flops: float) -> tuple[float, float]:
    """Parameters N and tokens D with 6 N D = `flops` and D = 20 N: the least loss for this compute."""
    parameters = math.sqrt(flops / (6 * CHINCHILLA))
    return parameters, CHINCHILLA * parameters


def affordable_steps(experiment: Experiment, flops: float) -> int:
    """Whole steps of this model and batch that `flops` are enough for.

    Raises:
        UserError: if they aren't enough for one.
    """
    data = experiment.data
    per_token = training_flops_per_token(experiment.model, data.sequence_length)
    per_step = data.batch_size * data.sequence_length * per_token
    if flops < per_step:
        raise UserError(
            f"{exponent(flops)} FLOPs are less than one step of this model ({exponent(per_step)}): "
            "spend more, or choose a smaller model or data.batch_size"
        )
    return int(flops // per_step)


def corpus_size(experiment: Experiment) -> CorpusSize:
    """Tokens of the training split: from the indices of its shards where they stand, else from its bytes.

    Nothing is tokenized. Of a source's shards in a vocabulary of this size the newest count.
    """
    data, options = experiment.data, experiment.tokenizer
    try:
        corpus = open_corpus(data.sources, data.heldout, data.heldout_fraction)
    except UserError as error:
        return CorpusSize(None, False, str(error))
    cache = Path(data.cache) if data.cache else Path(experiment.run.dir) / ".cache"
    trained = options.path is None and experiment.init.source is None
    largest = options.vocab_size or experiment.model.vocab_size
    counted: dict[str, int] = {}  # of each source's documents
    for path in sorted(cache.glob("shards/*/index.json"), key=lambda path: path.stat().st_mtime):
        try:
            index = read_index(path.parent)
        except UserError:
            continue
        if index["vocab_size"] == largest or (not trained and index["vocab_size"] < largest):
            counted[index["documents"]] = sum(shard["train"]["tokens"] for shard in index["shards"])
    members = [member for member in corpus.members if member.split != "heldout"]
    before = "before data.selection, " if data.selection else ""
    if all(member.fingerprint in counted for member in members):
        tokens = sum(counted[member.fingerprint] for member in members)
        return CorpusSize(tokens, bool(before), f"{before}counted in {cache / 'shards'}")
    sizes = [member.source.num_bytes for member in members]
    if None in sizes:
        return CorpusSize(None, False, "not known before all sources are tokenized")
    size = sum(filter(None, sizes)) * (1 if data.heldout else 1 - data.heldout_fraction)
    rate = f"{short(size)} bytes at {BYTES_PER_TOKEN} a token"
    source = f"{before}estimated: {rate}; exact once the run has shards"
    return CorpusSize(round(size / BYTES_PER_TOKEN), True, source)


def _check(args: argparse.Namespace) -> None:
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu}: it is a share of the peak, above 0 and at most 1, such as {MFU}")
    if args.count < 1:
        raise UserError(f"--count {args.count}: name at least one device")
    if args.price is not None and not 0 <= args.price < math.inf:
        raise UserError(f"--price {args.price}: give the USD that one device costs in an hour, such as 2.5")
    if args.flops is not None and args.days is not None:
        raise UserError("--flops and --days both say what there is to spend: give one of them")
    for name in ("flops", "days"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: give a number above 0")
    if args.days is not None and len(args.devices or ()) != 1:
        raise UserError("--days needs exactly one --device, whose days they are, such as --device h100")


def _speed(name: str, dtype: str, args: argparse.Namespace) -> float:
    peak = named(name).peaks.get(dtype)
    if peak is None:
        raise UserError(f"no peak of '{name}' is known for train.dtype {dtype}: --set train.dtype=bfloat16")
    return args.count * peak * args.mfu


def _optimum(compute: float | None) -> dict[str, float | None]:
    parameters, tokens = compute_optimal(compute) if compute is not None else (None, None)
    return {"compute_flops": compute, "optimal_parameters": parameters, "optimal_tokens": tokens}


def _print(
    experiment: Experiment, budget: Budget, corpus: CorpusSize, costs: list[Cost], compute: float | None
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    facts = Table.grid(padding=(0, 2))
    facts.add_column()
    facts.add_column(justify="right")
    facts.add_column(style="dim")
    data = experiment.data
    share = f"{budget.matmul_parameters / budget.active_parameters:.0%}"
    facts.add_row("parameters", short(budget.parameters), f"{budget.parameters:,}")
    if experiment.model.moe is not None:
        facts.add_row("  active", short(budget.active_parameters), f"{budget.active_parameters:,} a token")
    facts.add_row("  in matrix products", short(budget.matmul_parameters), f"{share}; the head's included")
    facts.add_row(
        "tokens",
        short(budget.tokens),
        f"{budget.steps:,} steps x {data.batch_size:,} sequences x {data.sequence_length:,}",
    )
    ratio = f"{budget.chinchilla_ratio:.3g} x Chinchilla's {CHINCHILLA}"
    facts.add_row("  per parameter", f"{budget.tokens_per_parameter:,.1f}", ratio)
    rule = f"6 x {'active ' if experiment.model.moe else ''}parameters x tokens"
    facts.add_row("FLOPs", exponent(budget.flops), f"{rule}: {exponent(budget.flops_6nd)}")
    about = "about " if corpus.estimated else ""
    tokens = "-" if corpus.tokens is None else about + short(corpus.tokens)
    facts.add_row("corpus tokens", tokens, escape(corpus.source))
    facts.add_row("  epochs", "-" if budget.epochs is None else f"{about}{budget.epochs:,.2f}")
    console.print(experiment.run.name, style="bold", markup=False)
    console.print(facts)
    if compute is not None:
        parameters, optimal = compute_optimal(compute)
        best = f"[bold]{short(parameters)}[/bold] parameters and [bold]{short(optimal)}[/bold] tokens"
        console.print(f"\n{exponent(compute)} FLOPs are best spent on {best} (6ND, D = {CHINCHILLA}N).")
        console.print(f"For this model they are enough for the {short(budget.tokens)} tokens above:")
        console.print(f"  --set train.steps={budget.steps}", style="bold", soft_wrap=True)
    console.print()
    console.print(_devices_table(costs, experiment.train.dtype))


def _devices_table(costs: list[Cost], dtype: str):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    priced = any(cost.cost_usd is not None for cost in costs)
    title = f"on {costs[0].devices:,} of each, {dtype}, at {costs[0].mfu:.0%} of their peak (MFU)"
    table = Table(
        title=title,
        title_justify="left",
        title_style="",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    if any(cost.peak_flops is None for cost in costs):
        table.caption = f"-: no peak is known for {dtype}"
    table.add_column("device")
    for name in ("peak TFLOP/s", "time", "device-hours", *(["USD"] if priced else [])):
        table.add_column(name, justify="right")
    for cost in costs:
        if cost.hours is None or cost.peak_flops is None or cost.device_hours is None:
            table.add_row(cost.device, "-", "-", "-", *(["-"] if priced else []))
            continue
        hours = f"{cost.device_hours:,.0f}" if cost.device_hours >= 100 else f"{cost.device_hours:.3g}"
        row = [f"{cost.peak_flops / 1e12:,.0f}", duration(cost.hours), hours]
        table.add_row(cost.device, *row, *([f"{cost.cost_usd:,.2f}"] if priced else []))
    return table


if __name__ == "__main__":
    run_command(main)
