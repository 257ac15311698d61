"""`python -m llm.prepare --config FILE`: the tokenizer and the token shards of a run.

Training makes what is missing; this command makes it beforehand, on as many machines as there are. It needs
no JAX: in a Slurm array, the same line in each task tokenizes a corpus together.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core import log
from core.config import add_arguments, load
from core.errors import UserError, run_command
from core.run import RunFolder
from llm.config import Experiment
from llm.data.corpus import Corpus, Member, open_corpus
from llm.data.loader import Mixture, TokenDataset, open_dataset, read_index
from llm.data.selection import read_selection, selection_fingerprint
from llm.data.shards import boundaries, build_shards, shards_key, unfinished
from llm.tokenizer import Tokenizer, keep, train_bpe

_log = logging.getLogger("llm.prepare")  # also where this is the main module

# A tokenizer is trained on no more bytes than this, from at most so many shards. nanochat takes as much for
# 65,536 tokens; counting it takes ten minutes on two cores at the rate of benchmarks/RESULTS.md.
TOKENIZER_BYTES = 2_000_000_000
_TOKENIZER_SHARDS = 256


class Text(NamedTuple):
    """The text of a run as the training loop sees it."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: TokenDataset | Mixture
    heldout: TokenDataset
    selection: str | None  # fingerprint of what `data.selection` says of the documents

    @property
    def identity(self) -> dict[str, str | None]:
        """What a checkpoint keeps to know its text again: the documents, their ids, and which are kept."""
        keys = [shards_key(member, self.tokenizer) for member in self.corpus.members]
        return {
            "corpus_fingerprint": self.corpus.fingerprint,
            "tokens_fingerprint": hashlib.blake2b(repr(keys).encode(), digest_size=8).hexdigest(),
            "selection_fingerprint": self.selection,
        }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m llm.prepare", description=__doc__)
    add_arguments(parser)
    array = "default: that of the Slurm array this runs in, else"
    parser.add_argument("--task", type=int, metavar="I", help=f"which of the tasks this is; {array} 0")
    parser.add_argument("--tasks", type=int, metavar="N", help=f"how many share the shards; {array} 1")
    args = parser.parse_args(argv)
    experiment = load(Experiment, args.config, args.overrides)
    task, tasks = _share(args.task, args.tasks, os.environ)
    log.setup("llm")
    corpus, _, folders = _tokenize(experiment, task, tasks)
    left = sum(len(unfinished(*pair)) for pair in zip(corpus.members, folders, strict=True))
    _log.info(
        "corpus %s: %d of %d shards are finished%s",
        corpus.fingerprint, len(corpus.shards) - left, len(corpus.shards),
        "; the others are other tasks'" if left else ", in " + ", ".join(map(str, folders)),
    )  # fmt: skip


def _share(task: int | None, tasks: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Which task this is, of how many: as the command line says, else as Slurm does."""
    if task is None and tasks is None and "SLURM_ARRAY_TASK_ID" in environment:
        number, first, step, tasks = (
            int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", "0"), ("MIN", "0"), ("STEP", "1"), ("COUNT", "1"))
        )
        task = (number - first) // step
    if task is None and tasks not in (None, 1):
        raise UserError(f"--tasks {tasks} without --task: say which of them this is, counted from 0")
    task, tasks = task or 0, 1 if tasks is None else tasks
    if not 0 <= task < tasks:
        raise UserError(
            f"task {task} of {tasks}: tasks are numbered from 0 to --tasks less one; in a Slurm array, give "
            "the range alone (--array=0-15)"
        )
    return task, tasks


def prepare(experiment: Experiment) -> Text:
    """Train the tokenizer on the training split and tokenize both splits, or reuse what stands.

    Both are kept by the fingerprint of what they were made from, so a changed corpus makes new ones.

    Raises:
        UserError: for sources that can't be read, a split without documents, or a tokenizer that doesn't
            fit the model.
    """
    corpus, tokenizer, folders = _tokenize(experiment)
    data, length = experiment.data, experiment.data.sequence_length
    heldout = open_dataset(folders, "heldout", length)
    _refuse_empty(experiment, corpus, folders)
    selection = read_selection(Path(data.selection), folders) if data.selection else None
    trained = [(m, f) for m, f in zip(corpus.members, folders, strict=True) if m.split != "heldout"]
    weights = [member.weight for member, _ in trained if member.weight is not None]
    train: TokenDataset | Mixture
    if weights:
        train = Mixture([open_dataset([f], "train", length, selection) for _, f in trained], weights)
    else:
        train = open_dataset([folder for _, folder in trained], "train", length, selection)
    _log.info(
        "corpus %s: %s tokens to train on, %s held out",
        corpus.fingerprint, f"{train.num_tokens:,}", f"{heldout.num_tokens:,}",
    )  # fmt: skip
    return Text(
        corpus, tokenizer, train, heldout, None if selection is None else selection_fingerprint(selection)
    )


def _tokenize(
    experiment: Experiment, task: int = 0, tasks: int = 1
) -> tuple[Corpus, Tokenizer, tuple[Path, ...]]:
    """The corpus, its tokenizer, and each member's shards, of which a task makes its own."""
    data = experiment.data
    cache = Path(data.cache) if data.cache else Path(experiment.run.dir) / ".cache"
    if cache.exists() and not cache.is_dir():
        raise UserError(f"data.cache: {cache} is a file: name a folder")
    corpus = open_corpus(data.sources, data.heldout, data.heldout_fraction, data.broken_fraction)
    tokenizer = _tokenizer(experiment, corpus, cache / "tokenizers")
    if tokenizer.vocab_size > experiment.model.vocab_size:
        raise UserError(
            f"the tokenizer in {tokenizer.path} has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size ({experiment.model.vocab_size}): raise that to a multiple of 128 above it"
        )
    return corpus, tokenizer, build_shards(corpus, tokenizer, cache / "shards", task, tasks)


def _refuse_empty(experiment: Experiment, corpus: Corpus, folders: Sequence[Path]) -> None:
    """Both splits must hold documents, and so must the training split of each source that has a weight."""
    train = [_count(folder, "train") for folder in folders]
    held = sum(_count(folder, "heldout") for folder in folders)
    fraction = f"data.heldout_fraction ({experiment.data.heldout_fraction:g})"
    if not held:
        raise UserError(
            "data.heldout holds no document" if experiment.data.heldout
            else f"no document is held out: raise {fraction}, or name sources of their own in data.heldout"
        )  # fmt: skip
    weighted = [m.label for m, count in zip(corpus.members, train, strict=True) if m.weight and not count]
    if weighted or not sum(train):
        raise UserError(
            f"no document of {weighted[0] if weighted else 'data.sources'!r} is left to train on: "
            f"lower {fraction}, or name sources of their own in data.heldout"
        )


def _count(folder: Path, split: str) -> int:
    return sum(shard[split]["documents"] for shard in read_index(folder)["shards"])


def _tokenizer(experiment: Experiment, corpus: Corpus, cache: Path) -> Tokenizer:
    options = experiment.tokenizer
    named = None if options.path is None else Tokenizer.load(options.path)
    own, source = RunFolder(experiment.run.folder), experiment.init.source
    imported = (own.checkpoints / "0").exists()
    if imported or source is not None:  # weights mean nothing under another vocabulary
        # It needs the other no more once it has a checkpoint.
        run = own if own.has_checkpoint or source is None else RunFolder.open(Path(source))
        theirs = Tokenizer.load(run.tokenizer)
        if named is not None and named.fingerprint != theirs.fingerprint:
            whose = "the imported" if imported else "init.from's"
            raise UserError(
                f"tokenizer.path: {named.path} is not the tokenizer of {whose} weights ({theirs.path}), "
                "to which its ids would mean something else: leave tokenizer.path out"
            )
        return theirs
    if named is not None:
        return named
    vocab_size = options.vocab_size or experiment.model.vocab_size
    parts = (corpus.fingerprint, vocab_size, options.pattern, TOKENIZER_BYTES)
    folder = cache / hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
    if not folder.is_dir():
        size = None if corpus.num_bytes is None else min(TOKENIZER_BYTES, corpus.num_bytes)
        name = f"{'tokenizer' if options.vocab_size else 'model'}.vocab_size"
        bpe = train_bpe(_sample(corpus), vocab_size, options.pattern, size=size, name=name)
        keep(folder, bpe)
    return Tokenizer.load(folder)


def _sample(corpus: Corpus) -> Iterator[str]:
    """The training split; of a large one, or one of unknown size, alike from shards spread over all of it."""
    if corpus.num_bytes is not None and corpus.num_bytes <= TOKENIZER_BYTES:
        yield from (document.text for document in corpus.documents("train"))
        return
    shards = [(member, number) for member, number in corpus.shards if member.split != "heldout"]
    apart, left = -(-len(shards) // _TOKENIZER_SHARDS), TOKENIZER_BYTES
    for first in range(apart):  # shards may be empty: all but the first of a compressed file are
        streams = [_training_texts(*shard) for shard in shards[first::apart]]
        while streams and left > 0:
            share, unfinished = left // len(streams) + 1, []
            for stream in streams:
                taken = 0
                for text in stream:
                    yield text
                    taken += len(text.encode())
                    if taken >= share:
                        unfinished.append(stream)
                        break
                left -= taken
            streams = unfinished


def _training_texts(member: Member, shard: int) -> Iterator[str]:
    for document in member.documents(shard):
        if member.split_of(document.name) == "train":
            yield document.text


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """[2, V] bytes of text that each id stands for within a text, and where it begins one.

    They are 0 for special and unused ids, and so it is what follows an id of no bytes that begins a text.
    """
    special = {*tokenizer.special_ids.values(), *boundaries(tokenizer)}
    return np.array(
        [
            [0 if i in special else len(tokenizer.token_bytes(i, begins)) for i in range(vocab_size)]
            for begins in (False, True)
        ],
        np.int32,
    )


if __name__ == "__main__":
    run_command(main)
