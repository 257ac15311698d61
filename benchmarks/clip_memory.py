"""Peak memory of the contrastive losses against the global batch: dense, local and chunked.

    python -m benchmarks.clip_memory [--devices 8] [--json FILE] [--plot FILE]

The loss and its gradients at the vectors of a batch divided over virtual CPU devices: nothing but the loss,
so that its own memory is seen. It is what the compiled program asks for on one device beside arguments and
results (temporaries). Programs are compiled, not run; `--run` runs those of small batches too.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from core.errors import run_command

MIB = 2**20
FORMS = ("dense", "local", "chunked")
KINDS = ("softmax", "sigmoid")


def measure(kind: str, negatives: str, batch: int, embed: int, chunk: int, run: bool) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from clip.loss import sigmoid_loss, softmax_loss
    from core.mesh import shardings

    scalars = (14.0,) if kind == "softmax" else (10.0, -10.0)
    loss = softmax_loss if kind == "softmax" else sigmoid_loss
    mesh = jax.sharding.get_mesh()
    rows, one = shardings(mesh, ("act_batch",)), shardings(mesh, ())
    places = (rows, rows, *[one] * len(scalars))

    def differentiated(*args):
        return jax.value_and_grad(
            lambda args: loss(*args, negatives=negatives, chunk=chunk), has_aux=True
        )(args)  # fmt: skip

    jitted = jax.jit(differentiated, in_shardings=places, out_shardings=((one, one), places))
    shapes = [jax.ShapeDtypeStruct((batch, embed), jnp.float32)] * 2
    shapes += [jax.ShapeDtypeStruct((), jnp.float32)] * len(scalars)
    program = jitted.lower(*shapes).compile()
    found = {
        "loss": kind, "negatives": negatives, "batch": batch,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }  # fmt: skip
    if run:
        vectors = [jax.random.normal(jax.random.key(i), (batch, embed)) for i in range(2)]
        vectors = [x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in vectors]
        args = [jax.device_put(x, place) for x, place in zip((*vectors, *scalars), places, strict=True)]
        args = [jnp.float32(x) if isinstance(x, float) else x for x in args]
        start = time.perf_counter()
        (value, _), _ = jax.block_until_ready(program(*args))
        found |= {"value": float(value), "seconds": time.perf_counter() - start}
    return found


def print_table(results: list[dict[str, Any]], batches: list[int]) -> None:
    print("| loss | negatives | " + " | ".join(f"{batch:,}" for batch in batches) + " |")
    print("| --- " * (2 + len(batches)) + "|")
    for kind in KINDS:
        for form in FORMS:
            sizes = {
                r["batch"]: r["temporary_bytes"]
                for r in results
                if (r["loss"], r["negatives"]) == (kind, form)
            }
            cells = " | ".join(f"{sizes[batch] / MIB:,.1f}" for batch in batches)
            print(f"| {kind} | {form} | {cells} |")


def plot(results: list[dict[str, Any]], devices: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(KINDS), figsize=(9, 3.6), sharey=True, layout="constrained")
    for side, kind in zip(axes, KINDS, strict=True):
        for form in FORMS:
            points = [r for r in results if (r["loss"], r["negatives"]) == (kind, form)]
            mebibytes = [r["temporary_bytes"] / MIB for r in points]
            side.plot([r["batch"] for r in points], mebibytes, marker="o", label=form)
        side.set(title=kind, xlabel=f"global batch, over {devices} devices", xscale="log", yscale="log")
        side.grid(alpha=0.3)
    axes[0].set_ylabel("temporaries of a device, MiB")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--embed", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--run", type=int, default=0, metavar="N", help="run those of a batch up to N, once")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the table")
    args = parser.parse_args(argv)
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    from rich.console import Console

    from core.mesh import make_mesh
    from core.options import MeshConfig

    results = []
    with jax.set_mesh(make_mesh(MeshConfig())), Console(stderr=True).status("compiling") as status:
        for kind in KINDS:
            for form in FORMS:
                for batch in args.batches:
                    status.update(f"{kind}, {form}, {batch:,}")
                    results.append(measure(kind, form, batch, args.embed, args.chunk, batch <= args.run))
    print_table(results, args.batches)
    for r in results:
        if "value" in r:
            print(f"{r['loss']}, {r['negatives']}, {r['batch']:,}: {r['value']:.5f} in {r['seconds']:.2f} s")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.plot:
        plot(results, args.devices, args.plot)


if __name__ == "__main__":
    run_command(main)
