"""Configurations are data: YAML files, parsed into frozen dataclasses.

A file may extend one other (`extends: base.yaml`, relative to itself); `--set a.b=c` overrides last.
Whatever is unknown, of a wrong type or impossible is a `UserError` that names the key, where it was
written and the nearest valid name.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
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
    make = pydantic_dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
    return typing.cast(type[T], make(cls))


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
    _refuse_unknown(schema, data, (), origins, where, list(_keys(schema, ())))
    try:
        # Strict, so that `true` is no number and "8" neither; from JSON, where a list may become a tuple.
        return pydantic.TypeAdapter(schema).validate_json(json.dumps(data, default=str), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        place = _place(key, origins, where)
        if first["type"] == "missing":
            raise UserError(f"{place}: the required key '{key}' is missing") from None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("value_error", "assertion_error"):
            raise UserError(f"{place}: {f'{key}: ' if key else ''}{message}") from None
        raise UserError(
            f"{place}: '{key}' is {first['input']!r}: {message[:1].lower()}{message[1:]}"
        ) from None


def to_dict(value: Any) -> dict:
    """The resolved configuration as plain nested mappings, keys as in YAML."""
    return pydantic.TypeAdapter(type(value)).dump_python(value, mode="json", by_alias=True)


def to_yaml(value: Any) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal value."""
    return yaml.dump(to_dict(value), Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML as one expects it: `3e-4` is a number, `1e6` a whole one, a date is text, no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' stands twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> float | int:
        number = self.construct_yaml_float(node)
        return int(number) if "e" in node.value.lower() and number.is_integer() else number


_Loader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that `_Loader` would read as something else."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def from_yaml(text: str) -> Any:
    """What YAML says, numbers as `load` reads them. Raises `yaml.YAMLError` for what is none."""
    return yaml.load(text, _Loader)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return from_yaml(text)
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
        by = f" ('extends' of {seen[-1]})" if seen else ""
        raise UserError(f"the config file {path}{by} does not exist{_nearest_file(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"the config file {path} is not UTF-8 text (byte {error.start}): save it as such"
        ) from None
    except OSError as error:
        raise UserError(f"the config file {path} can't be read: {error.strerror}") from None
    data = _parse_yaml(text, str(path))
    if not isinstance(data, dict):
        found = "an empty file" if data is None else type(data).__name__
        raise UserError(f"{path}: expected 'key: value' lines, found {found}")
    base: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if "extends" in data:
        parent = data.pop("extends")
        if not isinstance(parent, str):
            raise UserError(f"{path}: 'extends' is {parent!r}: it names one file, relative to this one")
        base, origins = _read_file(path.parent / parent, (*seen, path.resolve()))
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
    schema: type, data: dict, prefix: tuple[str, ...], origins: dict[str, str], where: str, valid: list[str]
) -> None:
    sections, lists = dict(_sections(schema)), dict(_lists(schema))
    names = [field_alias(field) for field in dataclasses.fields(schema)]
    for key, value in data.items():
        name = (*prefix, str(key))
        full = ".".join(name)
        if key not in names:
            hint = _nearest_keys(str(key), prefix, names, valid)
            raise UserError(f"{_place(full, origins, where)}: unknown key '{full}'; {hint}")
        if key in sections and isinstance(value, dict):
            _refuse_unknown(sections[key], value, name, origins, where, valid)
        elif key in lists and isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, dict):
                    _refuse_unknown(lists[key], item, (*name, str(i)), origins, where, valid)


def _nearest_keys(key: str, prefix: tuple[str, ...], names: list[str], valid: list[str]) -> str:
    """The same name in another section, else a similar one in this section, else all that stand here."""
    near = [full for full in valid if full.rpartition(".")[2] == key]
    near = near or [".".join((*prefix, n)) for n in difflib.get_close_matches(key, names, n=1, cutoff=0.5)]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"valid here: {', '.join(names)}"


def _keys(schema: type, prefix: tuple[str, ...]) -> Iterator[str]:
    """The dotted names of all keys of `schema` and its sections."""
    sections = dict(_sections(schema))
    for field in dataclasses.fields(schema):
        name = (*prefix, field_alias(field))
        yield ".".join(name)
        if name[-1] in sections:
            yield from _keys(sections[name[-1]], name)


def field_alias(field: dataclasses.Field) -> str:
    """The key of a field in YAML: its alias where the name is a word of Python's (`from`)."""
    return getattr(field.default, "alias", None) or field.name


def _sections(schema: type) -> Iterator[tuple[str, type]]:
    """Keys whose value is a section."""
    for key, option in _options(schema):
        if dataclasses.is_dataclass(option):
            yield key, option  # type: ignore[misc]


def _lists(schema: type) -> Iterator[tuple[str, type]]:
    """Keys whose value is a list of sections."""
    for key, option in _options(schema):
        item = typing.get_args(option)[0] if typing.get_origin(option) is tuple else None
        if dataclasses.is_dataclass(item):
            yield key, item  # type: ignore[misc]


def _options(schema: type) -> Iterator[tuple[str, Any]]:
    """Keys and the types that they may have."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        for option in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
            yield field_alias(field), option


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
