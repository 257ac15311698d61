"""`python -m clip.train --config FILE`: from images and captions to a dual encoder in a run folder."""

from __future__ import annotations

import argparse

from clip.config import Experiment
from core import devices, distributed, log
from core.config import add_arguments, load
from core.errors import run_command


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m clip.train", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if any")
    parser.add_argument(
        "--profile", type=int, metavar="STEP", help="trace three steps from STEP on into the run's profile/"
    )
    args = parser.parse_args(argv)
    experiment = load(Experiment, args.config, args.overrides)
    log.setup("clip", "llm")
    devices.prepare()
    distributed.join()
    from clip.loop import train  # only now, so that --help and mistakes in a config answer at once

    train(experiment, resume=args.resume, profile=args.profile)


if __name__ == "__main__":
    run_command(main, again="run the same command with --resume")
