"""`python -m export.hf`: a run as a Hugging Face checkpoint, or such a checkpoint as a run.

    python -m export.hf --run runs/quickstart --out exports/quickstart --verify
    python -m export.hf --import FOLDER --out runs/imported

What it writes is read by transformers, vLLM and others. docs/export.md has the families of models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clip.config import Experiment as DualExperiment
from core import devices, errors, log
from core.errors import UserError, run_command
from core.run import RunFolder
from export.read import import_run, read_config, read_params
from export.write import export_run, read_experiment

SCHEMES = {"bf16": "bfloat16"}

__all__ = ["export_run", "import_run", "main", "read_config", "read_params"]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m export.hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="FOLDER", help="export the newest checkpoint of this run")
    what.add_argument(
        "--import", type=Path, metavar="FOLDER", dest="source", help="make a run of this checkpoint"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="the new folder")
    parser.add_argument(
        "--scheme",
        choices=SCHEMES,
        help="of the weights: bf16 rounds them to bfloat16, half as large; default: float32, as trained",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the logits (and of a CLIP the embeddings) of both models on PyTorch and JAX; exit 1 if "
        "two are more than 1e-4 apart",
    )
    args = parser.parse_args(argv)
    if args.source is not None and args.scheme is not None:
        raise UserError("--scheme is for an export: a run has float32 weights, which hold the others' values")
    log.setup("llm", "export")
    dtype = SCHEMES.get(args.scheme, "float32")
    if args.verify:  # else nothing is computed, and memory that is freed had better go back
        from export.verify import libraries

        devices.prepare()
        libraries()  # before anything is written
    if args.source is not None:
        import_run(args.source, args.out)
        run, folder, step = RunFolder.open(args.out), args.source, 0
    else:
        run, folder = RunFolder.open(args.run), args.out
        step = export_run(run, args.out, dtype)
    if args.verify:
        _verify(run, step, folder, dtype)


def _verify(run: RunFolder, step: int, folder: Path, dtype: str) -> None:
    from export.verify import LIMIT, verify
    from export.verify_dual import verify_dual

    is_dual = isinstance(read_experiment(run), DualExperiment)
    found = (verify_dual if is_dual else verify)(run, step, folder, dtype)
    print(found.words("" if dtype == "float32" else f" of weights rounded to {dtype}"))
    if not found.difference <= LIMIT:  # also where it is NaN
        errors.end(
            1, f"{folder} is not the model of {run.path}: {found.difference:.2e} is more than {LIMIT:g}"
        )


if __name__ == "__main__":
    run_command(main)
