"""Configurations as JSON: nested frozen dataclasses to plain values and back, with clear errors."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar, Union

ConfigT = TypeVar("ConfigT")


def to_dict(config: object) -> dict[str, object]:
    """A (nested) dataclass as a dictionary of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[ConfigT], values: object, path: str = "") -> ConfigT:
    """The dataclass `cls` from what `to_dict` gave. Absent fields take their defaults.

    Raises:
        ValueError: an unknown or a missing field, or a value of the wrong type, by its path.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path or cls.__name__}: expected an object with fields, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown field {_join(path, name)!r}{close_match(name, known)}")
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"missing field {_join(path, name)!r}")
    return cls(**{n: _decode(hints[n], v, _join(path, n)) for n, v in values.items()})


def differences(old: Mapping[str, object], new: Mapping[str, object], path: str = "") -> list[str]:
    """ "path: old -> new" for every value in which two configs in `to_dict` form differ."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, _join(path, name))
        elif a != b:
            found.append(f"{_join(path, name)}: {a!r} -> {b!r}")
    return found


def close_match(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the closest of `known`, or a list of all where none is close."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else f"; known: {', '.join(known)}"


def _decode(hint: object, value: object, path: str) -> object:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{path}: expected one of {args}, got {value!r}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (a for a in args if a is not type(None))
        return _decode(hint, value, path)
    if origin is tuple:
        return _decode_tuple(args, value, path)
    if origin is dict and isinstance(value, dict):
        return {k: _decode(args[1], v, _join(path, k)) for k, v in value.items()}
    expected = origin or hint
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ValueError(f"{path}: expected {expected.__name__}, got {value!r}")
    return value


def _decode_tuple(args: tuple, value: object, path: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{path}: expected a list, got {value!r}")
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise ValueError(f"{path}: expected {len(args)} values, got {value!r}")
    return tuple(
        _decode(a, v, f"{path}.{i}") for i, (a, v) in enumerate(zip(args, value, strict=True))
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
