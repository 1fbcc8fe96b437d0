"""Strict conversion of dataclasses to and from JSON: known keys and values of the field's type."""

import dataclasses
import difflib
import json
import math
import operator
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import field, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, Literal

# Bounds of a number: the comparison that holds inside, and its words.
BOUNDS = {
    "least": (operator.ge, "{} or more"),
    "above": (operator.gt, "more than {}"),
    "most": (operator.le, "at most {}"),
    "below": (operator.lt, "less than {}"),
}
SEED = {"least": 0, "below": 2**63}  # Bounds of seeds: torch's generators take 64 bits.


def near(name: str, names: typing.Iterable[str]) -> str:
    """Return the hint " (near: a, b)" for an unknown name, or "" if no name is near."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    leaf = name.rpartition(".")[2]
    close += [n for n in names if n.rpartition(".")[2] == leaf and n not in close]
    return f" (near: {', '.join(close)})" if close else ""


def flat_keys(cls: type, prefix: str = "") -> list[str]:
    """Return the dotted names of all fields, nested dataclasses included."""
    keys = []
    for f, kind in zip(fields(cls), typing.get_type_hints(cls).values(), strict=True):
        nested = isinstance(kind, type) and is_dataclass(kind)
        keys += flat_keys(kind, f"{prefix}{f.name}.") if nested else [prefix + f.name]
    return keys


def number(default: Any, **bounds: float) -> Any:
    """Declare a field of a number, a tuple of numbers, or None, within two of BOUNDS."""
    return field(default=default, metadata={"bounds": bounds})


def machine(default: Any, **bounds: float) -> Any:
    """Declare a field that fits a run to a machine, so that a resumed run may change it.

    The next machine may lack an attention backend or a compiler, have less memory, or run another
    number of processes. A number has `bounds`, like that of `number`.
    """
    return field(default=default, metadata={"machine": True, "bounds": bounds})


def to_dict(run: Any) -> dict[str, Any]:
    """Return nested plain values with tuples as lists, like json."""
    return json.loads(json.dumps(dataclasses.asdict(run)))


def without_machine(run: Any) -> dict[str, Any]:
    """Return `to_dict(run)` without the fields that `machine` declares, nested ones included."""
    values = {}
    for f in fields(run):
        if not f.metadata.get("machine"):
            value = getattr(run, f.name)
            values[f.name] = without_machine(value) if is_dataclass(value) else value
    return json.loads(json.dumps(values, default=to_dict))


def from_dict(cls: type, data: Any, where: str) -> Any:
    """Invert `to_dict`.

    Raises:
        ValueError: unknown keys, wrong types, values that the class rejects; begins with `where`.
    """
    try:
        return _from_dict(cls, data, where)
    except ValueError as error:
        reason = str(error)
        raise ValueError(reason if reason.startswith(where) else f"{where}: {reason}") from None


def _from_dict(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise ValueError(f"{where}: no such key {key!r}{near(key, hints)}")
    return cls(**{key: _typed(hints[key], value, f"{where}: {key}") for key, value in data.items()})


def _typed(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return _from_dict(typing.cast(type, kind), value, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list):
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise ValueError(f"{where}: expected {len(inner)} values, got {len(value)}")
        return tuple(_typed(inner[0], item, where) for item in value)
    if origin is Literal and value in inner:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        # Bounds reject infinity, and so an integer that is beyond all floats.
        return (
            float(value)
            if abs(value) < 2**1023
            else math.copysign(math.inf, 1 if value > 0 else -1)
        )
    if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) and type(value) is kind:
        return value
    expected = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    raise ValueError(f"{where}: expected {expected}, got {value!r}")


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield dotted keys whose values differ between two nested dictionaries."""
    for key in a.keys() | b.keys():
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield prefix + key


def check_rising(name: str, values: Sequence[int], top: int, what: str) -> None:
    """Raise ValueError unless `values` is non-empty, rises strictly, and lies in 1..top."""
    if not values or list(values) != sorted(set(values)) or values[0] < 1:
        raise ValueError(f"{name}: expected rising numbers from 1 on, got {tuple(values)}")
    if values[-1] > top:
        raise ValueError(f"{name}: expected at most the {what} {top}, got {values[-1]}")


# ---- numbers ----


def check_number(name: str, value: Any, kind: type = int, **bounds: float) -> None:
    """Check a number's type and bounds. NaN is outside of all bounds, and a bool is not a number.

    Raises:
        ValueError: another type, with `name` and the value; a number out of `bounds`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        expected = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name}: expected {expected}, got {value!r:.80}")
    for bound, limit in bounds.items():
        holds, words = BOUNDS[bound]
        if not holds(value, limit):
            raise ValueError(f"{name}: expected {words.format(limit)}, got {value}")


def check_numbers(values: object, prefix: str = "") -> None:
    """Check every number of a dataclass, whose fields `number` and `machine` declare.

    Raises:
        ValueError: as `check_number`, the name being `prefix` and the field's.
    """
    for name, hint, kind, bounds in numeric_fields(type(values)):
        given = getattr(values, name)
        several = typing.get_origin(hint) is tuple
        if several and not isinstance(given, tuple | list):
            raise ValueError(f"{prefix}{name}: expected numbers, got {given!r:.80}")
        if given is not None or type(None) not in typing.get_args(hint):
            for value in given if several else (given,):
                check_number(prefix + name, value, kind, **bounds)


def numeric_fields(cls: type) -> list[tuple[str, Any, type, dict[str, float]]]:
    """Return name, type, int or float, and bounds of each number and of each tuple of numbers.

    Raises:
        TypeError: a number is declared without two bounds.
    """
    found = []
    for f, hint in zip(fields(cls), typing.get_type_hints(cls).values(), strict=True):
        for kind in {hint, *typing.get_args(hint)} & {int, float}:
            bounds = f.metadata.get("bounds", {})
            if len(bounds) != 2:
                raise TypeError(f"{cls.__name__}.{f.name}: expected two bounds, got {bounds}")
            found.append((f.name, hint, kind, dict(bounds)))
    return found
