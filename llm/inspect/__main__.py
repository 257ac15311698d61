"""`python -m llm.inspect --run R --prompt P`: pictures of what a run's newest model makes of a text.

JAX is imported only where it is needed, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from core import devices, log
from core.config import load
from core.errors import UserError, run_command
from core.kinds import LANGUAGE_MODEL
from core.run import RunFolder
from llm.config import Experiment
from llm.generate import encode_prompt
from llm.inspect import LONGEST
from llm.model.config import ModelConfig
from llm.tokenizer.reading import decode_utf8
from llm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llm.inspect.lens import Inspection


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llm.inspect",
        description=__doc__.splitlines()[0],
        epilog="Writes heads.png (where each head looks), attention-layer-N.png, next-token.png, "
        "logit-lens.png (what each layer would predict) and surprisal.png (what each token costs).",
    )
    parser.add_argument("--run", required=True, type=Path, metavar="FOLDER", help="the folder of a run")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to read")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the pictures; default: the run's plots/"
    )
    parser.add_argument("--top-k", type=int, default=10, metavar="K", help="next tokens shown; default: 10")
    args = parser.parse_args(argv)
    if not args.prompt:
        raise UserError("--prompt is empty: give the text to read")
    prompt = decode_utf8(os.fsencode(args.prompt), "--prompt")
    run = RunFolder.open(args.run, LANGUAGE_MODEL)
    experiment = load(Experiment, run.config)
    tokenizer = Tokenizer.load(run.tokenizer)
    ids = encode_prompt(tokenizer, prompt)
    _check(len(ids), args.top_k, experiment.model)
    out = _made(args.out or run.plots)
    log.setup("llm")
    devices.prepare()
    from core.checkpoint import newest_params
    from core.plots import save
    from llm.inspect.lens import inspect
    from llm.model.transformer import blueprint

    params = newest_params(run, blueprint(experiment.model).shapes)
    inspection = inspect(experiment.model, params, ids, args.top_k, experiment.train.dtype)
    _print_next(inspection, tokenizer)
    for name, figure in _figures(inspection, tokenizer):
        save(figure, out / f"{name}.png")
        print(out / f"{name}.png")


def _check(length: int, top_k: int, model: ModelConfig) -> None:
    if not 1 <= top_k <= model.vocab_size:
        raise UserError(f"--top-k {top_k}: choose a number from 1 to model.vocab_size ({model.vocab_size})")
    limit, name = min(
        (model.max_length, "model.max_length"), (LONGEST, "the most that the pictures can show")
    )
    if length > limit:
        raise UserError(
            f"--prompt has {length} tokens with the one that begins every text, and {limit} is {name}: "
            "give a shorter text"
        )


def _made(folder: Path) -> Path:
    """The folder, which is there after this. Raises `UserError` where it can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"the folder {folder} can't be made: {error.strerror}; name another with --out"
        ) from None
    return folder


def _print_next(inspection: Inspection, tokenizer: Tokenizer) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from llm.inspect.labels import token_labels

    table = Table("next token", "probability", box=None, title_justify="left")
    tokens = token_labels(tokenizer, inspection.next_tokens[-1], longest=24)
    for token, probability in zip(tokens, inspection.next_probabilities[-1], strict=True):
        table.add_row(Text(token), f"{probability:.3f}")
    Console(highlight=False).print(table)


def _figures(inspection: Inspection, tokenizer: Tokenizer) -> Iterator[tuple[str, Figure]]:
    """Each picture with its name."""
    from llm.inspect import pictures
    from llm.inspect.labels import token_labels
    from llm.inspect.lens import head_figures, right_guesses

    tokens = token_labels(tokenizer, inspection.tokens)
    yield "heads", pictures.plot_heads(head_figures(inspection.attention))
    for layer, maps in enumerate(inspection.attention):
        titles = [f"layer {layer}, head {head}" for head in range(len(maps))]
        yield f"attention-layer-{layer}", pictures.plot_attention(maps, titles, tokens, min(4, len(maps)))
    likeliest = token_labels(tokenizer, inspection.next_tokens[-1])
    yield "next-token", pictures.plot_next_tokens(tokens, likeliest, inspection.next_probabilities[-1])
    predicted = [token_labels(tokenizer, layer, longest=8) for layer in inspection.lens_tokens]
    probabilities, right = inspection.lens_probabilities, right_guesses(inspection)
    yield "logit-lens", pictures.plot_lens(tokens, predicted, probabilities, right)
    yield "surprisal", pictures.plot_surprisal(tokens, inspection.surprisal)


if __name__ == "__main__":
    run_command(main)
