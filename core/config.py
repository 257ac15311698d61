"""Configurations are data: YAML files, parsed into frozen dataclasses.

A file may extend one other (`extends: base.yaml`, relative to itself); `--set a.b=c` overrides last.
Whatever is unknown, of a wrong type or impossible is a `UserError` that names the key, where it was
written and the nearest valid name.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic.dataclasses import dataclass as pydantic_dataclass

from core.errors import UserError

T = TypeVar("T")


@typing.dataclass_transform(frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Declare a section of a configuration: a frozen dataclass that refuses unknown keys."""
    return pydantic_dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))(cls)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE` and `--set KEY=VALUE`, which every command that reads a config shares."""
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one key, such as --set train.steps=100; may be given any number of times",
    )


def load(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read `path`, what it extends, and the `key=value` overrides into a `schema` dataclass.

    Raises:
        UserError: for a missing or malformed file, an unknown key, a wrong type, an impossible value.
    """
    data, origins = _read_file(Path(path), ())
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override!r} is not KEY=VALUE, for example --set train.steps=100")
        _set(data, origins, key.strip().split("."), _parse_yaml(value, f"--set {key}"))
    return parse(schema, data, origins, str(path))


def parse(schema: type[T], data: dict, origins: dict[str, str] | None = None, where: str = "config") -> T:
    """Turn nested mappings into a `schema` dataclass, or raise a `UserError` that names the key."""
    origins = origins or {}
    _refuse_unknown(schema, data, (), origins, where)
    try:
        return pydantic.TypeAdapter(schema).validate_python(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        place = _place(key, origins, where)
        if first["type"] == "missing":
            raise UserError(f"{place}: the required key '{key}' is missing") from None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("value_error", "assertion_error"):
            raise UserError(f"{place}: {f'{key}: ' if key else ''}{message}") from None
        raise UserError(f"{place}: '{key}' is {first['input']!r}: {message.lower()}") from None


def to_dict(value: Any) -> dict:
    """The resolved configuration as plain nested mappings, keys as in YAML."""
    return pydantic.TypeAdapter(type(value)).dump_python(value, mode="json", by_alias=True)


def to_yaml(value: Any) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal value."""
    return yaml.safe_dump(to_dict(value), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `3e-4` as text; like YAML 1.2, this one reads it as a number."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None


def _read_file(path: Path, seen: tuple[Path, ...]) -> tuple[dict, dict[str, str]]:
    if path.resolve() in seen:
        raise UserError(f"{path}: 'extends' comes back to this file; remove one of them")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"the config file {path} does not exist{_nearest_file(path)}") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(f"the config file {path} can't be read: {error}") from None
    data = _parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found {type(data).__name__}")
    base, origins = {}, {}
    if "extends" in data:
        base, origins = _read_file(path.parent / str(data.pop("extends")), (*seen, path.resolve()))
    _merge(base, data, (), origins, str(path))
    return base, origins


def _merge(into: dict, new: dict, prefix: tuple[str, ...], origins: dict[str, str], where: str) -> None:
    for key, value in new.items():
        name = (*prefix, str(key))
        origins[".".join(name)] = where
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, name, origins, where)
        else:
            into[key] = value


def _set(data: dict, origins: dict[str, str], keys: list[str], value: Any) -> None:
    for i, key in enumerate(keys):
        origins[".".join(keys[: i + 1])] = "--set"
        if i == len(keys) - 1:
            data[key] = value
        elif not isinstance(data.get(key), dict):
            data[key] = {}
        data = data[key]


def _refuse_unknown(
    schema: type, data: dict, prefix: tuple[str, ...], origins: dict[str, str], where: str
) -> None:
    sections = dict(_sections(schema))
    names = [field_alias(field) for field in dataclasses.fields(schema)]  # type: ignore[arg-type]
    for key, value in data.items():
        full = ".".join((*prefix, str(key)))
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean '{'.'.join((*prefix, near[0]))}'?" if near else f"valid: {', '.join(names)}"
            raise UserError(f"{_place(full, origins, where)}: unknown key '{full}'; {hint}")
        if key in sections and isinstance(value, dict):
            _refuse_unknown(sections[key], value, (*prefix, str(key)), origins, where)


def field_alias(field: dataclasses.Field) -> str:
    """The key of a field in YAML: its alias where the name is a word of Python's (`from`)."""
    return getattr(field.default, "alias", None) or field.name


def _sections(schema: type) -> Iterator[tuple[str, type]]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        hint = hints[field.name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for option in options:
            if dataclasses.is_dataclass(option):
                yield field_alias(field), option  # type: ignore[misc]


def _place(key: str, origins: dict[str, str], where: str) -> str:
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, where)


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor does the folder {path.parent})"
    names = [p.name for p in path.parent.glob("*.yaml")]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
