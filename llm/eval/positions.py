"""`python -m llm.eval.positions --run R`: held-out loss by how many tokens of context came before.

Windows of `--length` tokens tile every held-out document that is long enough, one after the other, so each
position averages over the same documents and nearly the same places in them. Runs are compared on the same
windows, which may be longer than what a run was trained at: that is how one sees what its RoPE does there.
JAX is imported only where it is needed, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from core import devices, log
from core.config import load
from core.errors import UserError, run_command
from core.kinds import LANGUAGE_MODEL
from core.options import InitConfig, TokenizerConfig
from core.plots import plot_by_position
from core.run import RunFolder
from llm.config import Experiment
from llm.data.loader import Batch, TokenDataset, across_documents, spread
from llm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from core.module import Blueprint, Params

PIECES = 32  # of a window, each of which has its own mean
MOST_TOKENS = 4 << 20  # to measure on, spread evenly over the split
_log = logging.getLogger("llm.eval.positions")  # also where this is the main module


class Subject(NamedTuple):
    """A run to measure, with some keys of its configuration changed: those in the label, or for all runs."""

    label: str
    run: RunFolder
    experiment: Experiment


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m llm.eval.positions", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run",
        required=True,
        action=_Run,
        dest="runs",
        metavar="FOLDER",
        help="the folder of a run; any number of times, also the same run with other --set",
    )
    parser.add_argument(
        "--set",
        action=_Set,
        metavar="KEY=VALUE",
        help="change a key of the run named before it, such as --set model.rope_theta=40000",
    )
    parser.add_argument(
        "--length", type=int, default=1024, metavar="N", help="of a window in tokens, default: 1024"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="default: plots/positions.png in the last run's folder"
    )
    parser.add_argument("--json", action="store_true", help=f"one JSON object: means of {PIECES} pieces")
    args = parser.parse_args(argv)
    if args.length < 2 or args.length.bit_count() != 1:
        raise UserError(f"--length {args.length}: choose a power of two, such as 1024")
    subjects = _subjects(args.runs)
    _check_comparable(subjects)
    plot = args.plot or subjects[-1].run.plots / "positions.png"
    log.setup("llm")
    devices.prepare()
    from llm.prepare import prepare

    dataset = prepare(_as_evaluated(subjects[0])).heldout
    windows = find_windows(dataset, args.length)
    losses = [_measure(subject, dataset, args.length, windows) for subject in subjects]
    labels = [subject.label for subject in subjects]
    starts = np.arange(0, args.length, args.length // len(losses[0]))
    plot_by_position(starts, dict(zip(labels, losses, strict=True)), plot)
    if args.json:
        runs = [
            {"label": label, "loss": float(loss.mean()), "loss_by_position": loss.tolist()}
            for label, loss in zip(labels, losses, strict=True)
        ]
        found = {"length": args.length, "windows": len(windows), "positions": starts.tolist(), "runs": runs}
        print(json.dumps(found))
    else:
        _print(labels, losses, args.length, len(windows))
    _log.info("plot: %s", plot)


class _Run(argparse.Action):
    """Appends the folder and a list for what --set changes in it."""

    def __call__(self, parser, namespace, value, option=None):
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), (Path(value), [])])


class _Set(argparse.Action):
    """Adds the override to those of the run named last."""

    def __call__(self, parser, namespace, value, option=None):
        if not namespace.runs:
            parser.error("--set changes a key of the --run named before it: name the run first")
        namespace.runs[-1][1].append(value)


def _subjects(runs: list[tuple[Path, list[str]]]) -> list[Subject]:
    in_all = set.intersection(*(set(overrides) for _, overrides in runs))
    subjects = []
    for folder, overrides in runs:
        run, own = RunFolder.open(folder, LANGUAGE_MODEL), [each for each in overrides if each not in in_all]
        label = folder.resolve().name + (f" ({', '.join(own)})" if own else "")
        subjects.append(Subject(label, run, load(Experiment, run.config, overrides)))
    return subjects


def _check_comparable(subjects: list[Subject]) -> None:
    """Positions and losses are of tokens, which must be the same; what is held out should be."""
    first = subjects[0]
    tokenizer = Tokenizer.load(first.run.tokenizer).fingerprint
    held_out = lambda data: (data.sources, data.heldout, data.heldout_fraction)  # noqa: E731
    for other in subjects[1:]:
        if Tokenizer.load(other.run.tokenizer).fingerprint != tokenizer:
            raise UserError(
                f"{other.run.path} has another tokenizer than {first.run.path}: a token of one is not a "
                "token of the other; measure them one at a time"
            )
        if held_out(other.experiment.data) != held_out(first.experiment.data):
            _log.warning(
                "%s has other data than %s, and may have been trained on what is held out there",
                other.run.path, first.run.path,
            )  # fmt: skip


def _as_evaluated(subject: Subject) -> Experiment:
    """The run's configuration, whose held-out text needs nothing but its folder and what lies beside it."""
    experiment = subject.experiment
    cache = experiment.data.cache or str(subject.run.path.absolute().parent / ".cache")
    return dataclasses.replace(
        experiment,
        tokenizer=TokenizerConfig(path=str(subject.run.tokenizer)),
        init=InitConfig(),
        data=dataclasses.replace(experiment.data, cache=cache, selection=None),
    )


def find_windows(dataset: TokenDataset, length: int) -> NDArray[np.int64]:
    """[N, 2] the shard and the first token in it of each window: `length` tokens and the target of the last.

    Those of a document lie end to end from its beginning; what is left over at its end is in none.

    Raises:
        UserError: if no document is long enough.
    """
    found, longest = [np.zeros((0, 2), np.int64)], 0
    for number in range(len(dataset.first_token) - 1):
        shard = dataset.open_shard(number)
        targets = (np.diff(shard.starts) - 1) * (shard.weights > 0)
        longest = max(longest, int(targets.max(initial=0)))
        counts = targets // length
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        begins = np.repeat(shard.starts[:-1], counts) + within * length
        found.append(np.stack([np.full_like(begins, number), begins], axis=1))
    windows = np.concatenate(found)
    if not len(windows):
        raise UserError(
            f"--length {length}: no held-out document is as long; the longest has {longest} tokens to predict"
        )
    return windows[spread(len(windows), max(1, MOST_TOKENS // length))]


def window_batches(
    dataset: TokenDataset, length: int, windows: NDArray[np.int64], batch_size: int, rows: slice = slice(None)
) -> Iterator[Batch]:
    """These windows in order, of each batch this process's `rows`; padding fills the last one up."""
    for first in range(0, len(windows), batch_size):
        tokens = np.zeros((batch_size, length + 1), np.int32)
        for row, (number, begin) in enumerate(windows[first : first + batch_size].tolist()):
            tokens[row] = dataset.open_shard(number).tokens[begin : begin + length + 1]
        real = np.arange(batch_size) < len(windows) - first
        tokens, real = tokens[rows], real[rows, None].astype(np.int32)
        segments = np.broadcast_to(real, tokens[:, 1:].shape)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape)
        yield Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, segments.astype(np.float32))


def make_losses(
    blueprint: Blueprint, pieces: int, chunk: int, mesh: Mesh
) -> Callable[[Params, Iterator[Batch]], NDArray[np.float64]]:
    """`losses(params, batches) -> [pieces]`: mean loss of each piece of a window, in nats a token."""
    import jax
    import jax.numpy as jnp

    from core.mesh import shardings
    from llm.model.loss import cross_entropy
    from llm.step import BATCH_AXES, put_batch

    def by_piece(x: jax.Array) -> jax.Array:
        """[B, S, ...] -> [pieces, B, S / pieces, ...]"""
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, -1, *x.shape[2:]), 1, 0)

    def sums(params: Params, batch: Batch) -> jax.Array:
        model = blueprint.bind(params)
        hidden = model(batch.tokens, batch.positions, batch.segment_ids).hidden
        counted = (batch.weights > 0).astype(jnp.float32)

        def of(piece):
            hidden, targets, counted = piece
            _, parts = cross_entropy(hidden, model.head_kernel, targets, counted, chunk=chunk)
            return jnp.stack([parts.nll, counted.sum()])

        return jax.lax.map(of, (by_piece(hidden), by_piece(batch.targets), by_piece(counted)))

    jitted = jax.jit(sums, in_shardings=(shardings(mesh, blueprint.axes), shardings(mesh, BATCH_AXES)))

    def losses(params: Params, batches: Iterator[Batch]) -> NDArray[np.float64]:
        total = np.zeros((pieces, 2))
        for batch in batches:
            total += np.asarray(jitted(params, put_batch(batch, mesh)), np.float64)
        return total[:, 0] / total[:, 1]

    return losses


def _measure(
    subject: Subject, dataset: TokenDataset, length: int, windows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Mean loss of each piece, computed as in training and on the same mesh."""
    import jax

    from core.checkpoint import newest_params
    from core.mesh import check_divides, local_rows, make_mesh, num_shards, shardings
    from llm.model.attention import choose_backend
    from llm.model.transformer import Compute, blueprint

    experiment, options = subject.experiment, subject.experiment.train
    mesh = make_mesh(experiment.mesh)
    check_divides(mesh, {"--length": ("act_stream", length)})
    backend = choose_backend(
        options.attention,
        jax.default_backend(),
        experiment.model,
        dtype=options.dtype,
        length=length,
        isolated=experiment.data.isolate,
        context=mesh.shape["context"],
    )
    model = blueprint(experiment.model, Compute(options.dtype, backend, "none", options.scan_layers))
    targets = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        model.shapes,
        shardings(mesh, model.axes),
    )
    params = newest_params(subject.run, targets)
    microbatch = experiment.data.batch_size // options.accumulation * experiment.data.sequence_length
    with jax.set_mesh(mesh):
        batch_size = max(1, microbatch // length // num_shards("act_batch")) * num_shards("act_batch")
        batches = window_batches(dataset, length, windows, batch_size, local_rows(mesh, batch_size))
        if not experiment.data.isolate:
            batches = map(across_documents, batches)
        return make_losses(model, min(length, PIECES), options.loss_chunk, mesh)(params, batches)


def _print(labels: list[str], losses: list[NDArray[np.float64]], length: int, windows: int) -> None:
    title = f"held-out loss in nats a token, {windows:,} windows of {length:,} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("position", no_wrap=True)
    for label in labels:
        table.add_column(label, justify="right", overflow="fold")
    pieces = len(losses[0])
    edges = [0, *(2**i for i in range(pieces.bit_length()))]  # each bucket as long as all before it
    for first, last in itertools.pairwise(edges):
        start, stop = first * length // pieces, last * length // pieces
        means = [f"{loss[first:last].mean():.3f}" for loss in losses]
        table.add_row(f"{start:,} to {stop - 1:,}", *means, end_section=last == pieces)
    table.add_row("all", *(f"{loss.mean():.3f}" for loss in losses))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run_command(main)
