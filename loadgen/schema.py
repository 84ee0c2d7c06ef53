"""JSON in an answer, and what a JSON Schema of ours says against it: type, properties, required,
additionalProperties, enum, const, items, lengths and bounds. Other keywords are not looked at."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

NOTHING: Final[Any] = object()  # no value: None is one of JSON's
_FENCED = re.compile(r"\A\s*```(?:json|JSON)?[ \t]*\n(.*)\n\s*```\s*\Z", re.DOTALL)
_DEEP = 100  # levels of brackets; Python's reader has no more patience either
_BEGINS = re.compile(r"[{\[]")

Fault = tuple[str, str]  # kind of error, and where and what


def value_in(text: str, fence: bool) -> tuple[Any, str | None, str]:
    """(value, kind of error or None, words). "extra text" comes with the value that stands in it;
    "invalid JSON" with NOTHING."""
    if fence and (inside := _FENCED.match(text)):
        text = inside.group(1)
    try:
        return _loads(text), None, ""
    except (ValueError, RecursionError) as e:
        why = str(e)
    for start in (m.start() for m in list(_BEGINS.finditer(text))[:_DEEP]):
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            if text[start] == "{":
                break  # what follows stands inside it; a footnote's [ is none
            continue
        if isinstance(value, dict) or (isinstance(value, list) and value):
            around = " ".join((text[:start] + text[end:]).split())
            return value, "extra text", f"beside the JSON stands {around[:60]!r}"
    return NOTHING, "invalid JSON", why


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _loads(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant)


# ------------------------------------------------------------------------------------ the schema


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "integer": lambda v: (isinstance(v, int) and not isinstance(v, bool))
    or (isinstance(v, float) and v.is_integer()),
}


def fault(value: Any, schema: Mapping[str, Any], path: str = "$") -> Fault | None:
    """The first fault, in the order of the schema; None: it is as the schema says."""
    return _type(value, schema, path) or _value(value, schema, path) or (
        _object(value, schema, path) if isinstance(value, dict)
        else _array(value, schema, path) if isinstance(value, list) else None)


def _type(value: Any, schema: Mapping[str, Any], path: str) -> Fault | None:
    kinds = schema.get("type")
    if kinds is None:
        return None
    wanted = [kinds] if isinstance(kinds, str) else list(kinds)
    if any(_TYPES[k](value) for k in wanted):
        return None
    says = f"{path} is {_name(value)}, and was to be {' or '.join(wanted)}"
    if "array" in wanted and isinstance(value, str):
        return "array as string", says
    return "wrong data type", says


def _name(value: Any) -> str:
    kind = next(k for k in ("null", "boolean", "integer", "number", "string", "array", "object")
                if _TYPES[k](value))
    return f"{kind} {json.dumps(value, ensure_ascii=False)[:40]}"


def _value(value: Any, schema: Mapping[str, Any], path: str) -> Fault | None:
    if "enum" in schema and value not in schema["enum"]:
        allowed = ", ".join(json.dumps(x, ensure_ascii=False) for x in schema["enum"])
        return "wrong value", f"{path} is {_name(value)}; allowed: {allowed[:120]}"
    if "const" in schema and value != schema["const"]:
        return "wrong value", f"{path} is {_name(value)}, and was to be {schema['const']!r}"
    size = len(value) if isinstance(value, str | list) else value
    kinds = ("minLength", "maxLength") if isinstance(value, str) else (
        ("minItems", "maxItems") if isinstance(value, list) else ("minimum", "maximum"))
    if isinstance(size, int | float) and not isinstance(size, bool):
        for key, sign in zip(kinds, (1, -1), strict=True):
            if key in schema and sign * size < sign * schema[key]:
                return "wrong value", f"{path}: {key} is {schema[key]}, and it has {size}"
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        return "wrong value", f"{path} is {_name(value)}, and was to match {schema['pattern']}"
    return None


def _object(value: Mapping[str, Any], schema: Mapping[str, Any], path: str) -> Fault | None:
    known: Mapping[str, Any] = schema.get("properties", {})
    missing = [k for k in schema.get("required", ()) if k not in value]
    closed = schema.get("additionalProperties", True) is False
    strange = [k for k in value if k not in known] if known else []
    if missing and strange:
        return "wrong field name", f"{path}.{strange[0]} instead of {_names(missing)}"
    if missing:
        return "missing field", f"{path} has no {_names(missing)}"
    if strange and closed:
        return "wrong field name", f"{path}.{strange[0]} is not among {_names(list(known))}"
    return next((found for k, inner in known.items() if k in value
                 and (found := fault(value[k], inner, f"{path}.{k}")) is not None), None)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names)


def _array(value: Sequence[Any], schema: Mapping[str, Any], path: str) -> Fault | None:
    inner = schema.get("items")
    if not isinstance(inner, dict):
        return None
    return next((found for i, x in enumerate(value)
                 if (found := fault(x, inner, f"{path}[{i}]")) is not None), None)
