"""What kind of model a run trains, told from the shape of its configuration alone: whoever opens a run of
another kind is to learn so, and what reads it, rather than that a key is unknown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from core.config import from_yaml
from core.errors import UserError


class Kind(NamedTuple):
    """Attributes:
    name: of what is trained.
    command: what reads such a run, with `{}` for its folder.
    """

    name: str
    command: str


LANGUAGE_MODEL = Kind("a language model", "python -m llm.generate --run {} --prompt TEXT")
DUAL_ENCODER = Kind("a dual encoder of images and captions", "python -m clip.zeroshot --run {}")
AGENT = Kind("an agent", "python -m rl.play --run {}")


def kind_of(config: Path) -> Kind | None:
    """The kind that a run's configuration is of; None where it is damaged or like none of them."""
    try:
        tree = from_yaml(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if _has(tree, "env"):
        return AGENT
    if _has(tree, "model", "image"):
        return DUAL_ENCODER
    return LANGUAGE_MODEL if _has(tree, "data", "sequence_length") else None


def require_kind(folder: Path, config: Path, *wanted: Kind) -> None:
    """Raise `UserError` if the run in `folder` is known to be of another kind, naming what reads it."""
    found = kind_of(config)
    if found is not None and found not in wanted:
        raise UserError(
            f"{folder} is a run of {found.name}, and this takes one of "
            f"{' or '.join(kind.name for kind in wanted)}; what reads it: {found.command.format(folder)}"
        )


def _has(tree: Any, *keys: str) -> bool:
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True
