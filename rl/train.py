"""`python -m rl.train --config FILE`: from a configuration to trained agents in a run folder."""

from __future__ import annotations

import argparse

from core import devices, log
from core.config import add_arguments, load
from core.errors import require, run_command
from rl.config import Experiment


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rl.train", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if any")
    args = parser.parse_args(argv)
    experiment = load(Experiment, args.config, args.overrides)
    require("rl", "gymnax", "flashbax", "six")
    log.setup("rl")
    devices.prepare()
    from rl.loop import train  # only now, so that --help and mistakes in a config answer at once

    train(experiment, resume=args.resume)


if __name__ == "__main__":
    run_command(main, again="run the same command with --resume")
