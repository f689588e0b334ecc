"""Values of a recipe's fields, read from text and YAML. The type of a field decides how text is read."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from accessory.errors import ConfigError

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


def check(condition: bool, name: str, given: object, wanted: str) -> None:
    """ConfigError where the condition does not hold."""
    if not condition:
        raise ConfigError(f"{name}: got {given!r}, but it must be {wanted}")


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type that the annotation `hint` names. Text is read. ConfigError names what would do."""
    optional = get_origin(hint) in (types.UnionType, Union)  # the latter of a Literal and None
    if optional:
        hint = next(t for t in get_args(hint) if t is not types.NoneType)
        if value is None or value == "":
            return None
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        out, wanted = _read_choice(value, choices), "one of " + ", ".join(str(c or "false") for c in choices)
    else:
        read, wanted = _READERS[get_origin(hint) or hint]
        out = read(value)
    check(out is not None, name, value, wanted + (", or null" if optional else ""))
    return out


def _read_bool(value: Any) -> bool | None:
    if isinstance(value, str):
        return True if value.lower() in _TRUE else False if value.lower() in _FALSE else None
    return value if isinstance(value, bool) else None


def _read_int(value: Any) -> int | None:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _read_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _read_str(value: Any) -> str | None:
    return os.fspath(value) or None if isinstance(value, str | Path) else None


def _read_texts(value: Any) -> list[str] | None:
    """A list of texts; a single text is a list of one."""
    if not isinstance(value, list | tuple):
        value = [value]
    texts = [text for v in value if (text := _read_str(v)) is not None]
    return texts if len(texts) == len(value) else None


def _read_names(value: Any) -> tuple[str, ...] | None:
    texts = _read_texts(value)
    return None if texts is None else tuple(texts)


def _read_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if value in choices and (isinstance(value, str) or value is False):
        return value
    boolean = _read_bool(value)
    if boolean is None or False not in choices:
        return None
    return choices[1] if boolean else False  # true means the first of the names


_READERS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (_read_bool, "true or false"),
    int: (_read_int, "a whole number"),
    float: (_read_float, "a number"),
    str: (_read_str, "text"),
    list: (_read_texts, "a list of texts"),
    tuple: (_read_names, "a list of names"),
}


# --------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML in which every scalar but null is text. The fields know their types; YAML would guess."""


_NULL = "tag:yaml.org,2002:null"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == _NULL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_mapping(path: str | Path) -> Iterator[tuple[Any, Any, int]]:
    """(key, value, line) of a YAML file's mapping, repeated keys included; ConfigError names file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    with _yaml_errors(str(path), lines=True):
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: expected lines of the form key: value")
        for key, value in node.value:
            line = key.start_mark.line + 1
            yield loader.construct_object(key, deep=True), loader.construct_object(value, deep=True), line


def read_value(text: str, origin: str) -> Any:
    """A single value in YAML; ConfigError begins with `origin`."""
    with _yaml_errors(origin, lines=False):
        return yaml.load(text, _Loader)


@contextmanager
def _yaml_errors(origin: str, *, lines: bool) -> Iterator[None]:
    try:
        yield
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"{origin}:{mark.line + 1}" if lines and mark is not None else origin
        raise ConfigError(f"{place}: not YAML ({problem or 'a character that may not be there'})") from error
