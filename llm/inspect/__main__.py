"""`python -m llm.inspect --run R --prompt P`: pictures of what a run's newest model makes of a text.

JAX is imported only where it is needed, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from core import devices, log
from core.config import load
from core.errors import UserError, run_command
from core.run import RunFolder
from llm.config import Experiment
from llm.generate import encode_prompt
from llm.model.config import ModelConfig
from llm.tokenizer.reading import decode_utf8
from llm.tokenizer.tokenizer import Tokenizer

LONGEST = 128  # tokens that the pictures can show

_log = logging.getLogger("llm.inspect")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llm.inspect",
        description=__doc__.splitlines()[0],
        epilog="Writes heads.png (where each head looks), attention-layer-N.png, next-token.png, "
        "logit-lens.png (what each layer would predict) and surprisal.png (what each token costs).",
    )
    parser.add_argument("--run", required=True, type=Path, metavar="FOLDER", help="the folder of a run")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to read")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the pictures; default: the run's plots/")
    parser.add_argument("--top-k", type=int, default=10, metavar="K", help="next tokens shown; default: 10")
    args = parser.parse_args(argv)
    if not args.prompt:
        raise UserError("--prompt is empty: give the text to read")
    prompt = decode_utf8(os.fsencode(args.prompt), "--prompt")
    run = RunFolder.open(args.run)
    experiment = load(Experiment, run.config)
    tokenizer = Tokenizer.load(run.tokenizer)
    ids = encode_prompt(tokenizer, prompt)
    _check(len(ids), args.top_k, experiment.model)
    out = args.out or run.plots
    ...
