"""`python -m launch.plan.largest --device a100-80gb`: the largest model that trains on one device.

By optimizer and remat policy, with the optimizer's state on the device and in the host's memory. Models are
Llama-shaped: heads of 128, an mlp of about 8/3 the width, as deep as wide / 128, untied embeddings.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

from core.config import parse
from core.errors import run_command
from core.words import short
from launch.plan.device import find
from llm.config import Experiment
from llm.model.flops import num_parameters

VOCAB, LENGTH, HEAD = 32000, 2048, 128


class Largest(NamedTuple):
    optimizer: str
    remat: str
    offload: bool
    width: int
    layers: int
    parameters: int
    peak_bytes: int
    tokens_per_second: float
    mfu: float


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.plan.largest", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", default="a100-80gb", metavar="NAME", help="or a YAML file of your own")
    parser.add_argument("--json", action="store_true", help="a JSON object a row")
    args = parser.parse_args(argv)
    find(args.device)
    rows = [
        largest(args.device, optimizer, remat, offload)
        for optimizer in ("adamw", "muon", "sgd")
        for remat in ("none", "dots", "full")
        for offload in ((False,) if optimizer == "sgd" else (False, True))
    ]
    if args.json:
        for row in rows:
            print(json.dumps(row._asdict()))
        return
    _print(rows, args.device)


def experiment(width: int, optimizer: str, remat: str, offload: bool) -> Experiment:
    """A step of one sequence."""
    data: dict[str, Any] = {
        "run": {"name": "largest"},
        "data": {"sequence_length": LENGTH, "batch_size": 1, "isolate": False},
        "model": {
            "vocab_size": VOCAB, "num_layers": width // HEAD, "embed_dim": width, "num_heads": width // HEAD,
            "num_kv_heads": width // HEAD, "head_dim": HEAD, "mlp_dim": -(-8 * width // 3 // 256) * 256,
            "max_length": LENGTH,
        },
        "train": {"steps": 1000, "dtype": "bfloat16", "remat": remat, "loss_chunk": 512},
        "optimizer": {"name": optimizer, "offload": offload},
        "mesh": {"data": 1},
    }  # fmt: skip
    return parse(Experiment, data)


def largest(device: str, optimizer: str, remat: str, offload: bool) -> Largest:
    """By bisection over the width, in heads."""
    from launch.plan.plan import make_plan

    low, high = 1, 256  # heads: that many fit, that many don't
    while high - low > 1:
        middle = (low + high) // 2
        fits = make_plan(experiment(middle * HEAD, optimizer, remat, offload), device, find(device)).fits
        low, high = (middle, high) if fits else (low, middle)
    plan = make_plan(experiment(low * HEAD, optimizer, remat, offload), device, find(device))
    model = plan.layout.model
    return Largest(
        optimizer, remat, offload, model.embed_dim, model.num_layers, num_parameters(model), plan.peak,
        plan.tokens_per_second, plan.times.mfu,
    )  # fmt: skip


def _print(rows: list[Largest], device: str) -> None:
    from launch.plan.table import console, grid

    table = grid(
        f"the largest model that trains on one {device}: bfloat16 products, a row of {LENGTH:,} tokens"
    )
    for name in ("optimizer", "remat", "its state", "parameters", "width", "layers", "GB", "tokens/s", "MFU"):
        left = name in ("optimizer", "remat", "its state")
        table.add_column(name, justify="left" if left else "right")
    for row in rows:
        place = "on the host" if row.offload else "none" if row.optimizer == "sgd" else "on the device"
        table.add_row(
            row.optimizer, row.remat, place, f"[bold]{short(row.parameters)}[/]", f"{row.width:,}",
            str(row.layers),
            f"{row.peak_bytes / 1e9:.1f}", f"{row.tokens_per_second:,.0f}", f"{row.mfu:.1%}",
        )  # fmt: skip
    console().print(table)


if __name__ == "__main__":
    run_command(main)
