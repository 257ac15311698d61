"""`python -m llm.generate --run R --prompt P`: continue text with a run's newest checkpoint.

JAX is imported only where it is needed, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import codecs
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core import devices, log
from core.config import load
from core.errors import UserError, run_command
from core.kinds import LANGUAGE_MODEL
from core.run import RunFolder
from llm.chat import end_of_turn_ids
from llm.config import Experiment
from llm.data.shards import boundaries
from llm.model.config import ModelConfig
from llm.tokenizer.reading import decode_utf8
from llm.tokenizer.tokenizer import Tokenizer

_log = logging.getLogger("llm.generate")  # also where this is the main module


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m llm.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, metavar="FOLDER", help="the folder of a run")
    parser.add_argument(
        "--prompt",
        required=True,
        action="append",
        dest="prompts",
        metavar="TEXT",
        help="text to continue; several are continued together, equal ones each in its own way",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest token; default: 0.8"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="then from the likeliest of those that make up P"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TOKEN",
        help="end after this token too, a special one's name or text that is one token; any number of times",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text; default: 0")
    parser.add_argument(
        "--json",
        action="store_true",
        help="a JSON object per prompt: prompt, prompt_token_ids, token_ids, text, log_probabilities",
    )
    args = parser.parse_args(argv)
    if not all(args.prompts):
        raise UserError("--prompt is empty: give the text to continue")
    args.prompts = [decode_utf8(os.fsencode(prompt), "--prompt") for prompt in args.prompts]
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: choose one from 0 to {2**32 - 1}")
    run = RunFolder.open(args.run, LANGUAGE_MODEL)
    experiment = load(Experiment, run.config)
    tokenizer = Tokenizer.load(run.tokenizer)
    stop = end_of_turn_ids(tokenizer) + [token_id(tokenizer, token) for token in args.stop]
    log.setup("llm")
    devices.prepare()
    from core.checkpoint import newest_params
    from llm.model.transformer import blueprint
    from llm.sampling import Sampling

    sampling = Sampling.of(args.temperature, args.top_k, args.top_p)
    params = newest_params(run, blueprint(experiment.model).shapes)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in args.prompts]
    _generate(args, experiment, tokenizer, params, prompts, sampling, stop)


def _generate(args, experiment: Experiment, tokenizer: Tokenizer, params, prompts, sampling, stop) -> None:
    import jax

    from llm.decode import Completion, stream
    from llm.sampling import prompt_keys

    keys = prompt_keys(jax.random.key(args.seed), prompts)
    rows = [Completion([], []) for _ in prompts]
    printer = None if args.json else Printer(tokenizer, args.prompts)
    started = time.perf_counter()
    for pieces in stream(
        experiment.model,
        params,
        prompts,
        keys,
        sampling,
        args.max_new_tokens,
        stop,
        experiment.train.dtype,
    ):
        for row, piece in zip(rows, pieces, strict=True):
            row.token_ids.extend(piece.token_ids)
            row.log_probabilities.extend(piece.log_probabilities)
        if printer is not None:
            printer.add([piece.token_ids for piece in pieces])
    if printer is not None:
        printer.end()
    else:
        for prompt, ids, row in zip(args.prompts, prompts, rows, strict=True):
            answer = {
                "prompt": prompt,
                "prompt_token_ids": ids,
                "token_ids": row.token_ids,
                "text": text_of(tokenizer, row.token_ids),
                "log_probabilities": row.log_probabilities,
            }
            print(json.dumps(answer, ensure_ascii=False))
    seconds = time.perf_counter() - started
    _log.info("%d tokens in %.1f s with compiling", sum(len(row.token_ids) for row in rows), seconds)


def sample_texts(
    config: ModelConfig,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    dtype: str = "float32",
) -> list[str]:
    """The text that follows each prompt, up to an end of text, `max_new_tokens` or the model's context.

    Under `jax.set_mesh` the parameters may be sharded; with several processes each calls this.

    Raises:
        UserError: if a prompt is empty, or leaves no room in the context.
    """
    import jax

    from llm.decode import generate
    from llm.sampling import Sampling, prompt_keys

    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    room = max(1, config.max_length - max(map(len, ids)))
    rows = generate(
        config,
        params,
        ids,
        prompt_keys(jax.random.key(seed), ids),
        Sampling.of(temperature),
        min(max_new_tokens, room),
        end_of_turn_ids(tokenizer),
        dtype,
    )
    return [text_of(tokenizer, row.token_ids) for row in rows]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids after the token that begins every text, as in training."""
    begin, _ = boundaries(tokenizer)
    return [begin, *tokenizer.encode(prompt)]


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token by name, or of a text that is one token.

    Raises:
        UserError: if the text is not one token.
    """
    found = tokenizer.special_ids.get(token, tokenizer.id_of(token))
    if found is None:
        pieces = [text_of(tokenizer, [i]) for i in tokenizer.encode(token)]
        raise UserError(
            f"--stop {token!r} is not one token but {pieces}; special ones are {[*tokenizer.special_ids]}"
        )
    return found


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`, which go on with another; no special tokens, and U+FFFD for what isn't UTF-8."""
    decoder = TextDecoder(tokenizer)
    return decoder.add(ids) + decoder.end()


class TextDecoder:
    """Turns the tokens after a prompt into text as they come, an unfinished character when its rest came."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.special_ids.values())
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(
            b"".join(self._tokenizer.token_bytes(i) for i in ids if i not in self._special)
        )

    def end(self) -> str:
        return self._utf8.decode(b"", final=True)


class Printer:
    """Prints each prompt and what follows it: the first one's as it comes, the others' after it."""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[str]):
        self._prompts = prompts
        self._decoders = [TextDecoder(tokenizer) for _ in prompts]
        self._texts = [""] * len(prompts)
        self._show(prompts[0])

    def add(self, rows: Sequence[Sequence[int]]) -> None:
        new = [decoder.add(ids) for decoder, ids in zip(self._decoders, rows, strict=True)]
        self._show(new[0])
        self._texts = [text + more for text, more in zip(self._texts, new, strict=True)]

    def end(self) -> None:
        rest = [decoder.end() for decoder in self._decoders]
        self._show(rest[0] + "\n")
        for prompt, text, more in list(zip(self._prompts, self._texts, rest, strict=True))[1:]:
            self._show(f"\n---\n{prompt}{text}{more}\n")

    def _show(self, text: str) -> None:
        print(text, end="", flush=True)


if __name__ == "__main__":
    run_command(main)
