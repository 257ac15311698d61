"""What attention over a divided sequence takes of a device's memory as the sequence grows to 128k tokens.

    python -m benchmarks.ring [--plot FILE]

One attention, forward and backward, in the shape of Llama 3 8B's layers, its sequence divided over eight
devices (`mesh.context=8`): compiled for eight virtual CPU devices and not run, so that the numbers are the
program's, not the machine's. `ring` passes keys and values on; `reference`, left to XLA, gathers them whole
and holds the whole map of its queries. Bytes are the temporaries of one device, with what it receives.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from core import devices
from core.errors import run_command

HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 32, 8, 128, 8
LENGTHS = [2**n for n in range(12, 18)]
MIB = 2**20


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ring", description=__doc__.partition("\n")[0])
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the plot there, as a PNG")
    args = parser.parse_args(argv)
    devices.prepare()
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", CONTEXT)
    print(f"{'tokens':>8} {'keys and values':>16} {'ring':>10} {'reference':>10}   MiB a device, bfloat16")
    found = {"ring": {}, "reference": {}}
    for length in LENGTHS:
        for backend, sizes in found.items():
            sizes[length] = temporary_bytes(length, backend)
        own = 2 * length // CONTEXT * KV_HEADS * HEAD_DIM * 2
        row = (own, found["ring"][length], found["reference"][length])
        print(f"{length:>8,} {row[0] / MIB:>16,.1f} {row[1] / MIB:>10,.1f} {row[2] / MIB:>10,.1f}")
    if args.plot:
        plot(found, args.plot)
        print(args.plot)


def temporary_bytes(length: int, backend: str) -> int:
    """Temporaries of one device in the compiled forward and backward pass of one sequence's attention."""
    import jax
    import jax.numpy as jnp

    from core.mesh import make_mesh, shardings
    from core.options import MeshConfig
    from llm.model.attention import attention

    mesh = make_mesh(MeshConfig(data=1, context=CONTEXT))
    rows = ("act_batch", "act_seq")
    heads, keys = (*rows, "act_heads", "act_head_dim"), (*rows, "act_kv_heads", "act_head_dim")
    places = tuple(shardings(mesh, [heads, keys, keys, heads]))

    def both_passes(q, k, v, g):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, None, backend=backend), q, k, v)
        return out, pull(g)

    shapes = [(1, length, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    with jax.set_mesh(mesh):
        jitted = jax.jit(both_passes, in_shardings=places, out_shardings=(places[0], places[:3]))
        compiled = jitted.lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def plot(found: dict[str, dict[int, int]], path: Path) -> None:
    """Bytes against the length of the sequence, both log."""
    from core.plots import BLUE, INK, RED, new_figure, save, style

    figure = new_figure(6, 3.8)
    axes = figure.subplots()
    for (name, sizes), color in zip(found.items(), (BLUE, RED), strict=True):
        gib = [size / 2**30 for size in sizes.values()]
        axes.plot([*sizes], gib, color=color, marker="o", linewidth=1.2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.axhline(80e9 / 2**30, color=INK, linewidth=0.8, linestyle="--", label="an 80 GB card")
    style(axes, "GiB of temporaries a device", "tokens of the sequence, over eight devices")
    axes.set_xticks(LENGTHS, [f"{length // 1024}k" for length in LENGTHS])
    axes.yaxis.set_major_formatter("{x:g}")
    save(figure, path)


if __name__ == "__main__":
    run_command(main)
