"""The folder of a run: where everything about it lies, and what else it needs to be understood later."""

from __future__ import annotations

import contextlib
import datetime
import difflib
import errno
import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core.config import from_yaml
from core.errors import UserError
from core.files import write_atomically
from core.kinds import Kind, require_kind

# Sections and keys: what a resumed run may do otherwise than before: where it lies, the machine, and what
# it keeps and shows. Nothing that decides which numbers are computed: not even `train.steps`, since
# schedules depend on it. (When a run counts as diverging may change: that is what the user mends after it
# has stopped for it.)
MAY_CHANGE = ("run", "mesh", "checkpoint", "eval", "divergence", "data.cache", "data.workers")

_log = logging.getLogger(__name__)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """The folder `path` of a run. Reading a run needs nothing but this folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, YAML."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Commit, versions, machine and command line: a JSON list with an object for each start."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """A flat JSON object a step; see `core.metrics`."""
        return self.path / "metrics.jsonl"

    @property
    def rewinds(self) -> Path:
        """What diverged and what was done about it: a JSON object for each time, see `core.rewind`."""
        return self.path / "rewinds.jsonl"

    @property
    def summary(self) -> Path:
        """The final figures: one flat JSON object, name to number or text."""
        return self.path / "summary.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples.md"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @classmethod
    def create(cls, folder: Path, config_yaml: str, resume: bool = False) -> RunFolder:
        """Make the folder of a run that begins, or with `resume` take up the one that is there.

        A run is there once it has a line of metrics or a checkpoint; what stopped before that (a missing
        data file, say) begins anew, with or without `resume`. With `resume` the saved configuration must
        equal the new one but for `MAY_CHANGE`. The folder stays locked against other processes
        for as long as this one lives. With several processes, only the first calls this.

        Args:
            folder: where; made with its parents.
            config_yaml: the resolved configuration, as `core.config.to_yaml` writes it.

        Raises:
            UserError: when a run is there and `resume` is false, when it is of another configuration,
                when another process is at work in it, when the folder is something else or can't be written.
        """
        run = cls(folder)
        with _naming_unwritable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _require_own(run)
            _lock(folder)
            if run._has_begun():
                if not resume:
                    raise UserError(
                        f"{folder} already holds a run: go on with it (--resume), give this one another name "
                        "(--set run.name=...), or delete the folder"
                    )
                _require_same_config(run.config, config_yaml)
            elif resume:
                _log.info("%s holds no run to go on with: one begins", folder)
            starts = _read_starts(run.environment)
            write_atomically(run.config, config_yaml)
            write_atomically(run.environment, json.dumps([*starts, describe_environment()], indent=1) + "\n")
        return run

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one to go on from, good or damaged."""
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def _has_begun(self) -> bool:
        has_metrics = self.metrics.exists() and self.metrics.stat().st_size > 0
        return has_metrics or self.rewinds.exists() or self.has_checkpoint

    @classmethod
    def open(cls, folder: Path, kind: Kind | None = None) -> RunFolder:
        """The run in `folder`, to read from.

        Raises:
            UserError: where there is none, naming those nearby; if it is of another `kind` than the one
                asked for, naming what reads it.
        """
        run = cls(folder)
        if not run.config.is_file():
            runs = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
            near = difflib.get_close_matches(folder.name, runs, n=1)
            hint = (
                f"did you mean {folder.parent / near[0]}?"
                if near
                else f"runs there: {', '.join(runs) or 'none'}"
            )
            raise UserError(f"{folder} holds no run (no config.yaml); {hint}")
        if kind is not None:
            require_kind(folder, run.config, kind)
        return run

    def read_summary(self) -> dict[str, Any]:
        """What `write_summary` wrote; nothing of a run that hasn't finished, or of a damaged file."""
        try:
            found = json.loads(self.summary.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_summary(self, figures: Mapping[str, Any]) -> None:
        """Write `summary.json` in one step: name to number or text, null for what isn't finite."""
        write_atomically(self.summary, json.dumps({k: plain(v) for k, v in figures.items()}, indent=1) + "\n")


def plain(value: Any) -> Any:
    """A number (also NumPy's or JAX's) as JSON has it; NaN and infinities, which it lacks, become None."""
    if isinstance(value, (str, int)):
        return value
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


def describe_environment() -> dict[str, Any]:
    """What a run was made with: commit of the code, versions, machine, command line, time (UTC)."""
    commit = _git("rev-parse", "HEAD")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain")) if commit else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _git(*arguments: str) -> str | None:
    """What git says of the code's own checkout; None where there is no git or no checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts before this one; the record of a damaged file is given up rather than the run."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    return starts if isinstance(starts, list) else []


def _require_same_config(path: Path, config_yaml: str) -> None:
    try:
        tree = from_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} is damaged: put back the configuration that the run was started with, or start "
            "another run (--set run.name=...)"
        )
    saved, new = dict(flatten(tree)), dict(flatten(from_yaml(config_yaml)))
    differing = [
        key
        for key in [*new, *saved]
        if new.get(key, ...) != saved.get(key, ...)
        and not any(f"{key}.".startswith(f"{may}.") for may in MAY_CHANGE)
    ]
    if differing:
        key, more = differing[0], len(set(differing)) - 1
        there, here = (repr(values[key]) if key in values else "absent" for values in (saved, new))
        raise UserError(
            f"{path.parent} holds a run of another configuration: '{key}' is {there} there and {here} now"
            f"{f', and {more} more differ' if more else ''}; resume it with the values it has, or start "
            "another run (--set run.name=...)"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested mappings, and their values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _require_own(run: RunFolder) -> None:
    """A folder of something else isn't written to."""
    foreign = [p.name for p in run.path.iterdir() if not (p.name.startswith(".") or p.name.endswith(".tmp"))]
    if foreign and not run.config.exists():
        raise UserError(
            f"{run.path} holds no run (no config.yaml) but other things, such as {foreign[0]}: choose "
            "another folder with --set run.name=... or --set run.dir=..."
        )


def _lock(folder: Path) -> None:
    """Two processes in one run would undo each other's work. The kernel lets go when this one ends."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        owner = os.read(descriptor, 32).decode(errors="replace")
        os.close(descriptor)
        raise UserError(f"{folder} is in use by process {owner}: wait for it, or stop it") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())


@contextlib.contextmanager
def _naming_unwritable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the run folder {folder} can't be written: {error.strerror}; choose another with "
            "--set run.dir=... or --set run.name=..."
        ) from error
