"""One contrastive training step of ours against `transformers.CLIPModel` on PyTorch, eager and compiled.

    python -m benchmarks.clip_training [--shape small narrow] [--device cuda] [--json FILE]

A step is the pixels' normalization, both towers, the softmax loss over the batch, backward, clipping by
global norm, AdamW and the bound on the logit scale, on float32 master weights. All variants start from the
same weights and see the same batch; the losses of the first steps must agree, so all do the same work. Each
runs in a process of its own and they take turns: what counts is the ratio within a round.

With `--device cuda` it is ViT-B/32 in bfloat16 on random images that are on the device already: images/s and
the share of the device's peak (MFU).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.worker import Worker
from clip.model.config import CLIPConfig
from core.config import parse, to_dict
from core.devices import peak_flops

VARIANTS = ("ours", "eager", "compiled")


def of(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    shape = {"embed_dim": width, "num_layers": layers, "num_heads": heads, "mlp_dim": 4 * width}
    return shape | {"activation": "quick_gelu"} | more


# Models, and images in a step. `small` has 7.6M parameters; `narrow` is half as wide and deep as ViT-B/32.
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "small": (
        {
            "embed_dim": 256,
            "image": of(256, 6, 4, size=64, patch_size=8),
            "text": of(192, 4, 3, vocab_size=4608, length=32),
        },
        64,
    ),
    "narrow": (
        {
            "embed_dim": 256,
            "image": of(384, 6, 6, size=224, patch_size=32),
            "text": of(256, 6, 4, vocab_size=8192, length=77),
        },
        32,
    ),
}


def model_and_batch(shape: str) -> tuple[CLIPConfig, int]:
    if shape in SHAPES:
        model, batch = SHAPES[shape]
        return parse(CLIPConfig, model), batch
    return parse(CLIPConfig, yaml.safe_load(Path(f"configs/clip/{shape}.yaml").read_text())["model"]), 1024


def flops(config: CLIPConfig, batch: int) -> float:
    """Of a step's matrix products, forward and twice that backward; causal attention at what it needs."""

    def tower(shape, tokens: int) -> float:
        layer = 4 * shape.embed_dim**2 + 2 * shape.embed_dim * shape.mlp_dim
        seen = tokens / 2 if shape.causal else tokens
        return shape.num_layers * tokens * 2 * (layer + 2 * seen * shape.embed_dim)

    image, text = config.image, config.text
    patches = 2 * image.num_patches * 3 * image.patch_size**2 * image.embed_dim
    joint = 2 * config.embed_dim * (image.embed_dim + text.embed_dim + batch)
    return 3 * batch * (tower(image, image.num_positions) + tower(text, text.length) + patches + joint)


def measure(shape: str, args: argparse.Namespace, report) -> dict[str, Any]:
    config, batch = model_and_batch(shape)
    batch = args.batch or batch
    with tempfile.TemporaryDirectory() as folder:
        spec = {
            "model": to_dict(config), "batch": batch, "dtype": args.dtype, "device": args.device,
            "weights": str(Path(folder) / "weights.npz"), "train": json.loads(args.train),
            "attention": args.attention, "scan_layers": not args.unroll,
        }  # fmt: skip
        workers: dict[str, Worker] = {}
        try:
            for name in sorted(args.variants, key=VARIANTS.index):
                report(f"{shape}: starting {name}")
                command = json.dumps(spec | {"variant": name})
                workers[name] = Worker("benchmarks.clip_training_worker", command)
            losses = {name: worker.ask(steps=3)["losses"] for name, worker in workers.items()}
            rounds: dict[str, list[dict]] = {name: [] for name in workers}
            for index in range(args.rounds):
                for name, worker in workers.items():
                    report(f"{shape}: round {index + 1} of {args.rounds}, {name}")
                    rounds[name].append(worker.ask(steps=args.steps))
            facts = workers["ours"].facts
        finally:
            for worker in workers.values():
                worker.close()
    peak = peak_flops(facts["device_kind"], args.dtype)
    result = {"shape": shape, "batch": batch, "parameters": facts["parameters"], "variants": {}}
    for name, parts in rounds.items():
        if not np.allclose(losses[name], losses["ours"], rtol=3e-3 if args.dtype == "float32" else 3e-2):
            raise SystemExit(f"{name} computes something else: losses {losses[name]}, ours {losses['ours']}")
        seconds = [s for part in parts for s in part["seconds"]]
        median = statistics.median(seconds)
        # Rounds are paired: a ratio within each, so that a change of the machine's load cancels.
        pairs = zip(parts, rounds["ours"], strict=True)
        ratios = [statistics.median(a["seconds"]) / statistics.median(b["seconds"]) for a, b in pairs]
        result["variants"][name] = {
            "first_losses": losses[name],
            "median_seconds": median,
            "fastest_seconds": min(seconds),
            "images_per_second": batch / median,
            "gflops": flops(config, batch) / median / 1e9,
            "mfu": peak and flops(config, batch) / median / (peak * facts["devices"]),
            "cpu_seconds": statistics.median(part["cpu_seconds"] for part in parts),
            "ours_is_faster_by": statistics.median(ratios),
            "ours_is_faster_by_range": [min(ratios), max(ratios)],
        }
    return result


def print_table(results: list[dict[str, Any]]) -> None:
    print(
        "| model, batch | step | seconds, median | fastest | images/s | GFLOP/s | MFU "
        "| speed of ours over this, by round |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for result in results:
        label = f"{result['shape']}, {result['parameters'] / 1e6:.1f}M, {result['batch']}"
        for name, v in result["variants"].items():
            low, high = v["ours_is_faster_by_range"]
            ratio = "" if name == "ours" else f"{v['ours_is_faster_by']:.2f} ({low:.2f} to {high:.2f})"
            mfu = "" if v["mfu"] is None else f"{v['mfu']:.1%}"
            print(
                f"| {label} | {name} | {v['median_seconds']:.3f} | {v['fastest_seconds']:.3f} "
                f"| {v['images_per_second']:,.0f} | {v['gflops']:,.0f} | {mfu} | {ratio} |"
            )
            label = ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", nargs="+", metavar="SHAPE",
        help=f"{', '.join(SHAPES)}, or a file of configs/clip such as vit-b-32; default: the first two "
        "on a CPU, vit-b-32 on a GPU",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, help="images in a step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--attention", default="reference", help="of ours, such as blockwise or cudnn")
    parser.add_argument("--unroll", action="store_true", help="ours with layers unrolled, not scanned")
    parser.add_argument("--train", default="{}", help="JSON of `train` settings for ours, as of remat")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each variant in a round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args()
    from rich.console import Console

    on_cpu = args.device == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    shapes = args.shape or (list(SHAPES) if on_cpu else ["vit-b-32"])
    if "ours" not in args.variants:
        args.variants = ["ours", *args.variants]
    with Console(stderr=True).status("starting") as status:
        results = [measure(shape, args, status.update) for shape in shapes]
    print_table(results)
    if args.json:
        args.json.write_text(json.dumps({"device": args.device, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
