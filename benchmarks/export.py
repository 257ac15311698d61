"""Export and import of ours against `save_pretrained` and `from_pretrained`: seconds and peak memory per GB.

    python -m benchmarks.export [--layers 15] [--rounds 5] [--folder runs/export-benchmark]

A Llama with random float32 weights, 67 MB a layer. Every call is made in a process of its own, which says how
long the call alone took and the most memory (VmHWM) that the process had until it ended; the calls take
turns. They do not do the same: an export reads a checkpoint and checks its sums, an import writes one and
makes it durable, and `from_pretrained` ends with the model in memory, as our `read_params` does. What the two
sides wrote is compared, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.worker import timed
from core.errors import run_command

WIDTH, VOCABULARY = 1024, 8192


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/export-benchmark"))
    options = parser.parse_args(argv)
    shutil.rmtree(options.folder, ignore_errors=True)
    checkpoint, run = options.folder / "checkpoint", options.folder / "run"
    gigabytes = _make(checkpoint, options.layers) / 1e9
    _call("import", checkpoint, run)
    _compare(options.folder, checkpoint, run)
    print(
        f"{gigabytes:.2f} GB of weights, {options.rounds} rounds, medians\n\n"
        "| | seconds | seconds per GB | peak memory, GB | per GB of weights |\n|" + " --- |" * 5
    )
    source = {name: run if name == "export" else checkpoint for name in VARIANTS}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name, results in found.items():
            results.append(_call(name, source[name], options.folder / "out"))
            shutil.rmtree(options.folder / "out", ignore_errors=True)
    for name, results in found.items():
        seconds, peak = (median(r[key] for r in results) for key in ("seconds", "peak"))
        low, high = min(r["seconds"] for r in results), max(r["seconds"] for r in results)
        print(
            f"| {LABELS[name]} | {seconds:.2f} ({low:.2f} to {high:.2f}) | {seconds / gigabytes:.2f} | "
            f"{peak:.2f} | {peak / gigabytes:.2f} |"
        )
    shutil.rmtree(options.folder)


def _make(folder: Path, layers: int) -> int:
    """Write the checkpoint, and say how many bytes of weights it has."""
    from export.families.llama import LLAMA
    from export.families.table import tensors
    from export.shards import write_tensors
    from export.write import shapes_of
    from llm.model.config import ModelConfig
    from llm.tokenizer import save, train_bpe

    config = ModelConfig(
        vocab_size=VOCABULARY, num_layers=layers, embed_dim=WIDTH, num_heads=16, num_kv_heads=16, head_dim=64,
        mlp_dim=4 * WIDTH, max_length=2048,
    )  # fmt: skip
    shapes = {tensor.name: tensor.shape for tensor in tensors(LLAMA.table, shapes_of(config))}
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    values = (rng.standard_normal(shape, np.float32) for shape in shapes.values())
    write_tensors(folder, shapes, np.dtype(np.float32), values)
    (folder / "config.json").write_text(json.dumps(LLAMA.to_json(config) | {"dtype": "float32"}))
    save(train_bpe([Path(__file__).read_text()], 300), folder)
    return 4 * sum(map(math.prod, shapes.values()))


def _compare(folder: Path, checkpoint: Path, run: Path) -> None:
    """What the two sides write of the same weights must be the same."""
    from export.shards import find_tensors

    _call("export", run, folder / "ours")
    _call("save_pretrained", checkpoint, folder / "theirs")
    ours, theirs = find_tensors(folder / "ours"), find_tensors(folder / "theirs")
    if ours.keys() != theirs.keys():
        sys.exit(f"the two wrote different tensors: {sorted(ours.keys() ^ theirs.keys())}")
    for name, tensor in ours.items():
        if tensor.read().tobytes() != theirs[name].read().tobytes():
            sys.exit(f"the two wrote different values of {name}")
    for side in ("ours", "theirs"):
        shutil.rmtree(folder / side)


def _call(what: str, source: Path, out: Path) -> dict[str, float]:
    """One call in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.export", "--measure", what, str(source), str(out)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def _measure(what: str, source: str, out: str) -> dict[str, float]:
    call = VARIANTS[what](Path(source), Path(out))
    seconds, _ = timed(call)
    return {"seconds": seconds, "peak": _peak()}


def _peak() -> float:
    """The most memory that this process had, GB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e9


def _export(source: Path, out: Path) -> Callable[[], Any]:
    import core.tensors  # noqa: F401
    from core.run import RunFolder
    from export.write import export_run

    return lambda: export_run(RunFolder.open(source), out)


def _import(source: Path, out: Path) -> Callable[[], Any]:
    import core.tensors  # noqa: F401
    from export.read import import_run

    return lambda: import_run(source, out)


def _read_params(source: Path, out: Path) -> Callable[[], Any]:
    import jax

    from export.read import read_config, read_params
    from llm.model.transformer import blueprint

    jax.devices()
    return lambda: jax.block_until_ready(read_params(source, blueprint(read_config(source)).shapes))


def _save_pretrained(source: Path, out: Path) -> Callable[[], Any]:
    model = _from_pretrained(source, out)()
    return lambda: model.save_pretrained(out)


def _from_pretrained(source: Path, out: Path) -> Callable[[], Any]:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()

    def load():
        model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.sum()  # it maps the file, and would read it when the values are first used
        return model

    return load


VARIANTS = {
    "export": _export,
    "save_pretrained": _save_pretrained,
    "import": _import,
    "read_params": _read_params,
    "from_pretrained": _from_pretrained,
}
LABELS = {
    "export": "export of a run",
    "save_pretrained": "`save_pretrained`",
    "import": "import as a run",
    "read_params": "`read_params`",
    "from_pretrained": "`from_pretrained`",
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(_measure(*sys.argv[2:])))
    else:
        run_command(main)
