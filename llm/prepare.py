"""What has to stand before the first step: a tokenizer and token shards, made where they are missing."""

from __future__ import annotations

import hashlib
import logging
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.errors import UserError
from core.run import RunFolder
from llm.config import Experiment
from llm.data.corpus import Corpus, open_corpus
from llm.data.loader import TokenDataset, open_dataset
from llm.data.shards import build_shards, shards_key
from llm.tokenizer import Tokenizer, save, train_bpe

_log = logging.getLogger(__name__)


class Text(NamedTuple):
    """The text of a run as the training loop sees it."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: TokenDataset
    heldout: TokenDataset

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint keeps to know its text again: the documents, and their ids."""
        return {
            "corpus_fingerprint": self.corpus.fingerprint,
            "tokens_fingerprint": shards_key(self.corpus, self.tokenizer),
        }


def prepare(experiment: Experiment) -> Text:
    """Train the tokenizer on the training split and tokenize both splits, or reuse what stands.

    Both are kept by the fingerprint of what they were made from, so a changed corpus makes new ones.

    Raises:
        UserError: for sources that can't be read, or a tokenizer that doesn't fit the model.
    """
    data = experiment.data
    cache = Path(data.cache) if data.cache else Path(experiment.run.dir) / ".cache"
    corpus = open_corpus(data.sources, data.heldout, data.heldout_fraction)
    tokenizer = _tokenizer(experiment, corpus, cache / "tokenizers")
    if tokenizer.vocab_size > experiment.model.vocab_size:
        raise UserError(
            f"the tokenizer in {tokenizer.path} has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size ({experiment.model.vocab_size}): raise that to a multiple of 128 above it"
        )
    shards = build_shards(corpus, tokenizer, cache / "shards")
    train, heldout = (open_dataset([shards], split, data.sequence_length) for split in ("train", "heldout"))
    _log.info(
        "corpus %s: %s tokens to train on, %s held out",
        corpus.fingerprint, f"{train.num_tokens:,}", f"{heldout.num_tokens:,}",
    )  # fmt: skip
    return Text(corpus, tokenizer, train, heldout)


def _tokenizer(experiment: Experiment, corpus: Corpus, cache: Path) -> Tokenizer:
    options = experiment.tokenizer
    named = None if options.path is None else Tokenizer.load(options.path)
    if experiment.init.source is not None:  # weights mean nothing under another vocabulary
        theirs = Tokenizer.load(RunFolder.open(Path(experiment.init.source)).tokenizer)
        if named is not None and named.fingerprint != theirs.fingerprint:
            raise UserError(
                f"tokenizer.path: {named.path} is not the tokenizer of init.from's weights ({theirs.path}), "
                "to which its ids would mean something else: leave tokenizer.path out"
            )
        return theirs
    if named is not None:
        return named
    vocab_size = options.vocab_size or experiment.model.vocab_size
    key = hashlib.blake2b(f"{corpus.fingerprint} {vocab_size} {options.pattern}".encode(), digest_size=8)
    folder = cache / key.hexdigest()
    if not folder.is_dir():
        texts = (document.text for document in corpus.documents("train"))
        name = f"{'tokenizer' if options.vocab_size else 'model'}.vocab_size"
        bpe = train_bpe(texts, vocab_size, options.pattern, size=corpus.num_bytes, name=name)
        unfinished = cache / f".{folder.name}-{uuid.uuid4().hex}"
        try:
            save(bpe, unfinished)
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process trained the same at the same time, and was first
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Tokenizer.load(folder)


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """[2, V] bytes of text that each id stands for within a text, and where it begins one.

    They are 0 for special and unused ids, and so it is what follows an id of no bytes that begins a text.
    """
    special = set(tokenizer.special_ids.values())
    return np.array(
        [
            [0 if i in special else len(tokenizer.token_bytes(i, begins)) for i in range(vocab_size)]
            for begins in (False, True)
        ],
        np.int32,
    )
