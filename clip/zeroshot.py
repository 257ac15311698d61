"""`python -m clip.zeroshot --run R`: what a trained model recognizes without having been shown it by name.

JAX is imported only where it is needed, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip.config import Experiment
from core import devices, log
from core.config import load
from core.errors import UserError, run_command
from core.kinds import DUAL_ENCODER
from core.run import RunFolder, plain

if TYPE_CHECKING:
    from clip.data.split import Classes, Split
    from clip.eval.heldout import Measured
    from clip.eval.zero_shot import Classification
    from core.module import Params


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m clip.zeroshot",
        description=__doc__.splitlines()[0],
        epilog="Without --images: the run's own held-out split. Writes cases.png (hits and misses), "
        "similarity.png, towers.png (both towers in the plane) and, of classes, confusion.png, confusion.csv "
        "and classes.csv. Without --templates and --out the figures go into the run's summary.json too, "
        "those of --images with the folder's own name: of two of one name the later ones stay there.",
    )
    parser.add_argument("--run", required=True, type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--images", metavar="FOLDER", help="images to classify, or a zip: a folder for each class"
    )
    parser.add_argument(
        "--templates", action="append", default=[], metavar="TEXT|FILE",
        help='what is said of a class, as "a photo of a {}", or a file with such lines; several are averaged',
    )  # fmt: skip
    parser.add_argument("--names", type=Path, metavar="FILE", help="YAML: names of classes by folder")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for pictures and tables; default: the run's plots/"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    args = parser.parse_args(argv)
    if args.names and not args.images:
        raise UserError("--names gives names to the folders of --images: name these too")
    log.setup("core", "llm", "clip")
    templates = [template for given in args.templates for template in _templates(given)]
    run = RunFolder.open(args.run, DUAL_ENCODER)
    experiment = load(Experiment, run.config)
    split = _split(args, experiment, run, templates)
    data = Path(args.images).resolve().name if args.images else None
    out = args.out or (run.plots / data if data else run.plots)
    _make(out)
    devices.prepare()
    params, measured = measure(experiment, run, split)
    figures = _figures(measured, split, data)
    files = _write(out, experiment, split, measured, params)
    if not templates and not args.out:  # the run's own figures; anything else is somebody's trial
        from clip.eval.report import merge_summary

        merge_summary(run, figures)
        files.append(run.summary)
    if args.json:
        plainly = {name: plain(value) for name, value in figures.items()}
        print(json.dumps({**plainly, "files": [str(file) for file in files]}))
    else:
        _print(split, measured, retrieval=not args.images)
        for file in files:
            print(file)


def _templates(given: str) -> list[str]:
    """A template, or those of a file."""
    if "{}" in given:
        return [given]
    try:
        lines = [
            line.strip() for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"--templates {given!r} is neither a template, with {{}} where the class goes, nor a text file"
        ) from None
    for line in lines:
        if "{}" not in line:
            raise UserError(f"--templates: {given} has the line {line!r}, without {{}} for the class")
    if not lines:
        raise UserError(f"--templates: {given} is empty")
    return lines


def _split(args: argparse.Namespace, experiment: Experiment, run: RunFolder, templates: list[str]) -> Split:
    """What is looked at, with the templates and names that were asked for."""
    from clip.data.corpus import open_labelled, open_splits

    cache = Path(experiment.data.cache) if experiment.data.cache else run.path.parent / ".cache"
    split: Split
    if not args.images:
        split = open_splits(experiment.data, experiment.seed, cache).heldout
    else:
        split = open_labelled(args.images, "--images", cache, experiment.data.broken_fraction)
    if split.classes is None:
        if templates:
            raise UserError("--templates are for classes, and the run has captions only: give --images too")
        return split
    classes = split.classes
    if args.names:
        classes = dataclasses.replace(classes, names=_names(args.names, classes.names))
    if templates:
        classes = dataclasses.replace(classes, templates=tuple(templates))
    return split if classes == split.classes else _Renamed(split, classes)


class _Renamed:
    """A split whose classes are called otherwise."""

    def __init__(self, split: Split, classes: Classes):
        self.classes, self._split = classes, split

    @property
    def fingerprint(self) -> str:
        return self._split.fingerprint

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> Any:
        return self._split[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return self._split.captions(index)

    def label(self, index: int) -> int | None:
        return self._split.label(index)


def _names(file: Path, folders: Sequence[str]) -> tuple[str, ...]:
    import yaml

    try:
        # Texts all of them: to others the folder 01 is the number 1, and the class no is False.
        names = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--names {file} can't be read: {str(error).splitlines()[0]}") from None
    if not isinstance(names, dict) or not all(name and isinstance(name, str) for name in names.values()):
        raise UserError(f"--names {file}: write a line a folder, `folder: name`")
    given = {folder.replace("_", " "): name for folder, name in names.items()}
    missing = [folder for folder in folders if folder not in given]
    if missing:
        raise UserError(f"--names {file} has no name for {', '.join(missing[:5])}")
    names = tuple(given[folder] for folder in folders)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"--names {file}: two folders are called {twice!r}, and no model could tell them apart"
        )
    return names


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {folder} can't be made: {error.strerror}; name another with --out"
        ) from None


def measure(experiment: Experiment, run: RunFolder, split: Split) -> tuple[Params, Measured]:
    """The newest parameters of a run and what they make of a split, on all devices that are here."""
    import jax

    from clip.data.tokenizer import CaptionTokenizer
    from clip.eval.heldout import make_measure
    from clip.model.model import blueprint
    from core.checkpoint import newest_params
    from core.mesh import make_mesh, shardings
    from core.options import MeshConfig
    from core.state import targets
    from llm.model.transformer import Compute

    model, mesh = blueprint(experiment.model, Compute(experiment.train.dtype)), make_mesh(MeshConfig())
    params = newest_params(run, targets(model.shapes, shardings(mesh, model.axes)))
    tokenizer = CaptionTokenizer.load(run.tokenizer)
    look = make_measure(model, experiment.model, experiment.data, tokenizer, split, mesh)
    with jax.set_mesh(mesh):
        return params, look(params, None)


def results_of(split: Split, measured: Measured) -> dict[str, Classification]:
    """By what there is to choose from: all classes, and those left out of training where some were."""
    if split.classes is None or not len(measured.labelled):
        return {}
    count, heldout = len(split.classes.names), split.classes.heldout
    results = {f"among all {count} classes": measured.classification()}
    if heldout is not None:
        unseen = [label for label, held in enumerate(heldout) if held]
        results[f"among the {len(unseen)} that training never showed"] = measured.classification(unseen)
    return results


def _figures(measured: Measured, split: Split, data: str | None) -> dict[str, Any]:
    """For `summary.json`; of other images than the run's own, each name says which."""
    from clip.eval.report import figures_of

    figures: dict[str, Any] = {} if data else measured.figures()
    for name, result in zip(
        ("zero_shot", "zero_shot_among_heldout"), results_of(split, measured).values(), strict=False
    ):
        figures |= figures_of(result, name)
    return {f"{name}_on_{data}": value for name, value in figures.items()} if data else figures


def _print(split: Split, measured: Measured, retrieval: bool) -> None:
    from rich.console import Console

    from clip.eval.report import class_table, classification_table, retrieval_table
    from clip.eval.retrieval import chance

    console, results = Console(highlight=False), results_of(split, measured)
    if results and split.classes:
        console.print(classification_table(results))
        console.print(class_table(split.classes.names, next(iter(results.values()))))
    if retrieval:
        count = len(measured.images)
        title = f"retrieval among {count:,} held-out images and {len(measured.pool.captions):,} captions"
        console.print(retrieval_table(measured.figures(), chance(measured.pool, count), title))


def _write(out: Path, experiment: Experiment, split: Split, measured: Measured, params: Params) -> list[Path]:
    """The pictures and tables, and where they are."""
    from clip.eval import pictures
    from clip.eval.cases import cases, similar, towers
    from clip.eval.report import write_classes, write_confusion
    from core.plots import save

    size = experiment.model.image.size
    shown = {
        "cases": pictures.plot_cases(cases(split, measured, params, size)),
        "similarity": pictures.plot_similarity(*similar(split, measured, size)),
        "towers": pictures.plot_towers(*towers(split, measured)),
    }
    files = []
    for result in list(results_of(split, measured).values())[:1]:
        assert split.classes is not None
        names = split.classes.names
        shown["confusion"] = pictures.plot_confusion(
            result.confusion, names, f"accuracy {result.accuracy:.1%}"
        )
        write_confusion(out / "confusion.csv", names, result)
        write_classes(out / "classes.csv", names, result)
        files = [out / "confusion.csv", out / "classes.csv"]
    for name, figure in shown.items():
        save(figure, out / f"{name}.png")
    return [*(out / f"{name}.png" for name in shown), *files]


if __name__ == "__main__":
    run_command(main)
