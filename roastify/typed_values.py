"""Dataclasses from plain values, each of the type that its field declares."""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import types
import typing
from typing import Any, TypeVar

_T = TypeVar("_T")


def typed(kind: type[_T], value: Any, where: str) -> _T:
    """Return a dataclass that JSON values describe.

    Args:
        kind: the dataclass. Its fields are numbers, strings, tuples, dicts, None, or dataclasses.
        value: a mapping with a value for each field that has no default.
        where: what the values are, for messages.

    Raises:
        ValueError: a key is missing or unknown, or a value is of another type; a bool is no number, and infinite
            numbers and NaN are none.
    """
    return _typed(kind, value, where)


def _typed(kind: Any, value: Any, where: str) -> Any:
    if kind in _SCALARS:
        return _scalar(kind, value, where)
    if dataclasses.is_dataclass(kind):
        return _of_fields(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return (
            None if value is None else _typed(next(each for each in arguments if each is not type(None)), value, where)
        )
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{where} is {reprlib.repr(value)}; expected an object")
        return {key: _typed(arguments[1], each, f"{where}.{key}") for key, each in value.items()}
    assert origin is tuple, f"{where} is declared as {kind}"
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} is {reprlib.repr(value)}; expected a list")
    if arguments[-1] is Ellipsis:
        return tuple(_typed(arguments[0], each, f"{where}[{index}]") for index, each in enumerate(value))
    if len(value) != len(arguments):
        raise ValueError(f"{where} has {len(value)} items; expected {len(arguments)}")
    items = enumerate(zip(arguments, value, strict=True))
    return tuple(_typed(each, item, f"{where}[{index}]") for index, (each, item) in items)


_SCALARS = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) is int and abs(value) < 1 << 1000:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{where} is {reprlib.repr(value)}; expected {_SCALARS[kind]}")
    return value


def _of_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {reprlib.repr(value)}; expected an object")
    known, required = _fields(kind)
    if unknown := value.keys() - known.keys():
        raise ValueError(f"{where} has the unknown key {min(unknown)!r}")
    if missing := [name for name in required if name not in value]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return kind(**{name: _typed(known[name], each, f"{where}.{name}") for name, each in value.items()})


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the types of a dataclass's fields, and the names of those without a default."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    required = [each.name for each in fields if each.default is missing and each.default_factory is missing]
    return typing.get_type_hints(kind), required
