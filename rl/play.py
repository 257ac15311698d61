"""`python -m rl.play --run R`: watch a trained agent act, as a GIF, or as text where it writes."""

from __future__ import annotations

import argparse
from pathlib import Path

from core import devices, log
from core.errors import UserError, require, run_command


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rl.play", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="a run's folder")
    parser.add_argument("--seed", type=int, metavar="S", help="which of the run's agents; default: its first")
    parser.add_argument("--episodes", type=int, default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument(
        "--sample", action="store_true", help="sample actions, rather than take the likeliest"
    )
    parser.add_argument("--key", type=int, default=0, metavar="K", help="seed of the episodes (default: 0)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: plots/play.gif in the run's folder"
    )
    args = parser.parse_args(argv)
    if args.episodes < 1:
        raise UserError(f"--episodes {args.episodes}: at least 1")
    if not 0 <= args.key < 2**31:
        raise UserError(f"--key {args.key}: a number from 0 to 2**31 - 1")
    if args.out and args.out.suffix != ".gif":
        raise UserError(f"--out {args.out}: the name of a GIF ends in .gif")
    require("rl", "gymnax", "flashbax", "six")
    log.setup("rl")
    devices.prepare()
    from rl.playing import play  # only now, so that --help answers at once

    play(args.run, args.seed, args.episodes, args.key, args.out, greedy=not args.sample)


if __name__ == "__main__":
    run_command(main)
