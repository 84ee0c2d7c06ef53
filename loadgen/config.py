"""Plain data → checked frozen types, with errors that say where, what, and what is allowed; and
the quantities that carry their unit.
"""

import difflib
import re
import types
import typing
from typing import Any, Literal

import msgspec
from msgspec import Struct

from loadgen.errors import ScenarioError

T = typing.TypeVar("T")

_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_PER_SECOND = {"s": 1.0, "min": 1 / 60, "h": 1 / 3600}


class Seconds(float):
    """A duration in seconds, written with a unit: "50ms", "2s", "5m"."""

    @classmethod
    def parse(cls, text: object) -> "Seconds":
        match = re.fullmatch(r"\s*([\d.e+-]+)\s*(ms|s|min|m|h)\s*", text) if _is_str(text) else None
        if match is None or not _is_number(match[1]):
            raise ValueError(f"{text!r} is not a duration; write a number with its unit, as "
                             '"50ms", "2s" or "5m"')
        if float(match[1]) <= 0:
            raise ValueError(f"{text!r} must be more than zero")
        return cls(float(match[1]) * _SECONDS[match[2]])


class PerSecond(float):
    """A rate in requests per second, written with a unit: "20/s", "90/min"."""

    @classmethod
    def parse(cls, text: object) -> "PerSecond":
        match = re.fullmatch(r"\s*([\d.e+-]+)\s*/\s*(s|min|h)\s*", text) if _is_str(text) else None
        if match is None or not _is_number(match[1]):
            raise ValueError(f'{text!r} is not a rate; write a number per time, as "20/s"')
        if float(match[1]) <= 0:
            raise ValueError(f"{text!r} must be more than zero")
        return cls(float(match[1]) * _PER_SECOND[match[2]])


def _is_str(value: object) -> typing.TypeGuard[str]:
    return isinstance(value, str)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"(\d+(\.\d*)?|\.\d+)(e[+-]?\d\d?)?", text) is not None


def convert(raw: object, into: type[T], where: str) -> T:
    """`raw` as `into`; ScenarioError names place, key, and what is allowed."""
    try:
        return msgspec.convert(raw, into, dec_hook=dec_hook)
    except msgspec.ValidationError as e:
        text, _, at = str(e).partition(" - at ")
        at = at.strip("`").removeprefix("$").lstrip(".")
        raise ScenarioError(f"{where}: {at + ': ' if at else ''}{_plainly(text, into, at, raw)}"
                            ) from None


def dec_hook(kind: type, raw: object) -> object:
    """msgspec hook: reads the unit-carrying types."""
    if kind is Seconds:
        return Seconds.parse(raw)
    if kind is PerSecond:
        return PerSecond.parse(raw)
    raise TypeError(f"no such type in a scenario: {kind}")


def enc_hook(value: object) -> object:
    """msgspec hook: writes the unit-carrying types the way they are read."""
    if isinstance(value, Seconds):
        return f"{float(value)!r}s"
    if isinstance(value, PerSecond):
        return f"{float(value)!r}/s"
    raise TypeError(f"cannot encode {type(value)}")


def to_plain(value: object) -> Any:
    """`value` as plain JSON data that `convert` reads back to an equal one."""
    return msgspec.to_builtins(value, enc_hook=enc_hook)


def nearest(name: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _plainly(text: str, into: Any, at: str, raw: object) -> str:
    """msgspec's message with what it leaves out: the keys and values that may stand there."""
    kinds, value = _at(into, at, raw)
    if unknown := re.search(r"unknown field `(.*)`", text):
        allowed = sorted(_keys(kinds, value))
        return (f"unknown key {unknown[1]!r}{nearest(unknown[1], allowed)}; allowed here: "
                f"{', '.join(allowed)}")
    if missing := re.search(r"missing required field `(.*)`", text):
        return f"key {missing[1]!r} is missing"
    if choices := [str(c) for kind in kinds for c in _literals(kind)]:
        return f"{value!r} is not one of: {', '.join(choices)}{nearest(str(value), choices)}"
    if "| object`" in text or "`int | object" in text:
        what = "turns" if at.endswith("turns") else "tokens"
        return f"{value!r}: write a whole number of {what}, or {{ dist = … }}"
    if "regex" in text:
        return f"{value!r}: use letters, digits, _ . and - only, and not too many"
    return text


def _at(kind: Any, at: str, raw: object) -> tuple[list[Any], object]:
    """The annotations that a msgspec path such as `classes[1].slo` leads to, and the value there.
    Of a tagged union, the member that the data names; for a tag itself, the tags as a Literal."""
    kinds, value = [kind], raw
    for part in re.findall(r"[^.\[\]]+", at):
        if part.isdigit() or part == "...":
            value = value[int(part)] if isinstance(value, list | tuple) else None
            continue
        members = [s for k in kinds for s in _members(k, value)]
        tags = [m.__struct_config__.tag for m in members
                if part == m.__struct_config__.tag_field]
        kinds = [Literal[tuple(tags)]] if tags else [
            f.type for m in members for f in msgspec.structs.fields(m) if f.encode_name == part]
        value = value.get(part) if isinstance(value, dict) else None
    return kinds, value


def _keys(kinds: list[Any], value: object) -> set[str]:
    members = [m for kind in kinds for m in _members(kind, value)]
    names = {f.encode_name for m in members for f in msgspec.structs.fields(m)}
    return names | {m.__struct_config__.tag_field for m in members
                    if m.__struct_config__.tag_field}


def _members(kind: Any, value: object) -> list[Any]:
    """The Struct types that an annotation mentions; of a tagged union only the one that `value`
    names, if it names one."""
    found = _structs(kind)
    named = [s for s in found if isinstance(value, dict) and s.__struct_config__.tag_field
             and value.get(s.__struct_config__.tag_field) == s.__struct_config__.tag]
    return named or found


def _structs(kind: Any) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, Struct):
        return [kind]
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is not None:
        return [s for arg in typing.get_args(kind) for s in _structs(arg)]
    return []


def _literals(kind: Any) -> tuple[object, ...]:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return tuple(c for arg in typing.get_args(kind) for c in _literals(arg))
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
