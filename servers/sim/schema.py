"""Values that a JSON schema allows, and texts that a regular expression matches: what a model
says when its output is constrained."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from re import _constants as rc  # type: ignore[attr-defined]
from re import _parser as rp  # type: ignore[attr-defined]
from typing import Any

from servers.sim.errors import Refused
from servers.sim.text import WORDS

_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_FORMATS = {"date": "2026-03-14", "time": "15:09:26Z", "date-time": "2026-03-14T15:09:26Z",
            "email": "user@example.com", "uri": "https://example.com/a", "ipv4": "192.0.2.1",
            "uuid": "123e4567-e89b-42d3-a456-426614174000", "ipv6": "2001:db8::1",
            "hostname": "example.com", "duration": "P3D"}
_DEEPEST = 12  # levels of a schema that names itself: below, only what is required
_TOO_DEEP = 60
_SPAN = 100  # numbers without an upper bound lie so far above the lower one
_MOST = 10_000  # values, characters, repeats: more than any answer holds
_REPEATS = 3  # `x*` matches so many more than it must, at most


def bad_grammar(why: str) -> Refused:
    return Refused(400, f"Grammar error: {why}")


def instance(schema: Any, rng: random.Random) -> Any:
    """A value that `schema` allows. Raises Refused for a schema that is none."""
    try:
        return _Maker(schema, rng).make(schema, 0)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise bad_grammar(f"the schema cannot be read: {str(e)[:80]}") from None


def spoiled(value: Any, schema: Any, rng: random.Random) -> str:
    """`value` as JSON text that is wrong in one of the ways that models have: cut short, a text
    around it, a required field left out or misnamed, a list or a number as a string."""
    whole = json.dumps(value, ensure_ascii=False)
    ways = [whole[:-1] or "{", f"Here is the JSON: {whole}"]
    required = schema.get("required") if isinstance(schema, dict) else None
    if isinstance(value, dict) and isinstance(required, list) and required:
        ways += [json.dumps(x, ensure_ascii=False) for x in _misshapen(value, required)]
    return rng.choice(ways)


def _misshapen(value: Mapping[str, Any], required: Sequence[str]) -> list[dict[str, Any]]:
    first = required[0]
    found: list[dict[str, Any]] = [
        {k: v for k, v in value.items() if k != first},
        {f"{k}_value" if k == first else k: v for k, v in value.items()}]
    for kind in (list, int):
        name = next((k for k in required if type(value.get(k)) is kind), None)
        if name is not None:
            found.append({**value, name: json.dumps(value[name], ensure_ascii=False)})
    return found


class _Maker:
    def __init__(self, root: Any, rng: random.Random) -> None:
        self._root, self._rng, self._made = root, rng, 0

    def make(self, schema: Any, depth: int) -> Any:
        self._made += 1
        if depth > _TOO_DEEP or self._made > _MOST:
            raise bad_grammar("the schema requires itself without end, or too much")
        if schema is True or schema == {}:
            return self._word()
        if not isinstance(schema, dict):
            raise bad_grammar(f"a schema must be an object, not {str(schema)[:40]}")
        schema = self._resolved(schema)
        if "const" in schema:
            return schema["const"]
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return self._rng.choice(schema["enum"])
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                rest = {k: v for k, v in schema.items() if k != key}
                # deep down the last alternative: by custom that is where null or the leaf stands
                one = schema[key][-1] if depth > _DEEPEST else self._rng.choice(schema[key])
                return self.make(_merged([rest, self._resolved(one)]), depth + 1)
        return self._of_type(_type(schema, self._rng), schema, depth)

    def _resolved(self, schema: Any) -> Any:
        """Without $ref and allOf."""
        for _ in range(_TOO_DEEP):
            if not isinstance(schema, dict):
                return schema
            if isinstance(ref := schema.get("$ref"), str):
                rest = {k: v for k, v in schema.items() if k != "$ref"}
                schema = _merged([self._at(ref), rest])
            elif isinstance(parts := schema.get("allOf"), list):
                rest = {k: v for k, v in schema.items() if k != "allOf"}
                schema = _merged([rest, *map(self._resolved, parts)])
            else:
                return schema
        raise bad_grammar("a $ref leads back to itself")

    def _at(self, ref: str) -> Any:
        here = self._root
        for name in ref.removeprefix("#").split("/")[1:]:
            key = name.replace("~1", "/").replace("~0", "~")
            if not isinstance(here, dict) or key not in here:
                raise bad_grammar(f"Cannot find field {key} in {ref}")
            here = here[key]
        return here

    def _of_type(self, kind: str, schema: Mapping[str, Any], depth: int) -> Any:
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "string":
            return self._string(schema)
        if kind in ("integer", "number"):
            return self._number(schema, kind == "integer")
        return self._rng.random() < 0.5 if kind == "boolean" else None

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties") or {}
        required = list(schema.get("required") or ())
        if not isinstance(properties, dict):
            raise bad_grammar("properties must be an object")
        named = [k for k in properties if k in required or (
            depth <= _DEEPEST and properties[k] is not False and self._rng.random() < 0.7)]
        more = schema.get("additionalProperties", True)
        out = {k: self.make(properties[k], depth + 1) for k in named}
        out |= {k: self.make(more, depth + 1) for k in required if k not in properties}
        for k in properties:
            if len(out) >= _size(schema, "minProperties", 0):
                break
            if k not in out:
                out[k] = self.make(properties[k], depth + 1)
        while more is not False and len(out) < _size(schema, "minProperties", 0):
            out[f"{self._word()}{len(out)}"] = self.make(more, depth + 1)
        return out

    def _array(self, schema: Mapping[str, Any], depth: int) -> list[Any]:
        least = _size(schema, "minItems", 0 if depth > _DEEPEST else 1)
        most = min(_size(schema, "maxItems", least + 2), max(least, 1) + 2)
        n = self._rng.randint(min(least, most), most) if depth <= _DEEPEST else least
        first = list(schema.get("prefixItems") or ())[:max(n, least)]
        items = schema.get("items", True)
        out = [self.make(s, depth + 1) for s in first]
        if items is False:
            return out
        for _ in range(20 * n):  # where they must be unique, some draws are wasted
            if len(out) >= n:
                break
            value = self.make(items, depth + 1)
            if not (schema.get("uniqueItems") and value in out):
                out.append(value)
        return out

    def _string(self, schema: Mapping[str, Any]) -> str:
        if isinstance(pattern := schema.get("pattern"), str):
            return matching(pattern, self._rng)
        if (known := _FORMATS.get(str(schema.get("format")))) is not None:
            return known
        least, most = _size(schema, "minLength", 0), schema.get("maxLength")
        said = self._word()
        while len(said) < least or (most is None and self._rng.random() < 0.3):
            said += f" {self._word()}"
        return said if most is None else said[:int(most)]

    def _number(self, schema: Mapping[str, Any], whole: bool) -> float:
        step = schema.get("multipleOf") or (1 if whole else 0.01)
        low, high = schema.get("minimum"), schema.get("maximum")
        if (above := schema.get("exclusiveMinimum")) is not None:
            low = max(above + step, above + step if low is None else low)
        if (below := schema.get("exclusiveMaximum")) is not None:
            high = min(below - step, below - step if high is None else high)
        low = (min(0, high) if high is not None else 0) if low is None else low
        high = low + _SPAN * step if high is None else high
        if high < low:
            raise bad_grammar(f"minimum {low} is greater than maximum {high}")
        k = self._rng.randint(-int(-low // step), max(-int(-low // step), int(high // step)))
        value = min(max(k * step, low), high)
        return round(value) if whole else round(value, 10)

    def _word(self) -> str:
        return self._rng.choice(WORDS).strip()


def _size(schema: Mapping[str, Any], key: str, default: int) -> int:
    value = schema.get(key, default)
    if not isinstance(value, int) or value < 0 or (value > _MOST and key.startswith("min")):
        raise bad_grammar(f"{key} must be a number from 0 to {_MOST}")
    return value


def _type(schema: Mapping[str, Any], rng: random.Random) -> str:
    kind = schema.get("type")
    if kind is None:
        kind = ("object" if "properties" in schema or "required" in schema else
                "array" if "items" in schema or "prefixItems" in schema else
                "number" if "minimum" in schema or "maximum" in schema else "string")
    kinds = kind if isinstance(kind, list) and kind else [kind]
    for one in kinds:
        if one not in _TYPES:
            raise bad_grammar(f"Invalid type: {one}")
    return str(rng.choice(kinds))


def _merged(parts: Sequence[Any]) -> Any:
    out: dict[str, Any] = {}
    for part in parts:
        if part is True:
            continue
        if not isinstance(part, dict):
            raise bad_grammar(f"a schema must be an object, not {str(part)[:40]}")
        both = {"properties": {**out.get("properties", {}), **part.get("properties", {})},
                "required": [*out.get("required", []), *part.get("required", [])]}
        out |= {**part, **{k: v for k, v in both.items() if v}}
    return out


# --------------------------------------------------------------------------- regular expressions


def matching(pattern: str, rng: random.Random) -> str:
    """A text that `pattern` matches. Raises Refused where it is none, or is too clever."""
    try:
        return _text(rp.parse(pattern.removeprefix("^").removesuffix("$")), rng, {})
    except (re.error, RecursionError, OverflowError) as e:
        raise bad_grammar(f"Invalid regex: {str(e)[:80]}") from None


def _text(parsed: Any, rng: random.Random, groups: dict[int, str]) -> str:
    return "".join(_node(op, arg, rng, groups) for op, arg in parsed)


def _node(op: Any, arg: Any, rng: random.Random, groups: dict[int, str]) -> str:
    if op is rc.LITERAL:
        return chr(arg)
    if op is rc.NOT_LITERAL:
        return "a" if chr(arg) != "a" else "b"
    if op is rc.ANY:
        return rng.choice("abcdefghijklmnopqrstuvwxyz")
    if op is rc.IN:
        return _of_class(arg, rng)
    if op is rc.BRANCH:
        return _text(rng.choice(arg[1]), rng, groups)
    if op is rc.SUBPATTERN:
        groups[arg[0]] = _text(arg[3], rng, groups)
        return groups[arg[0]]
    if op is rc.GROUPREF:
        return groups.get(arg, "")
    if op in (rc.MAX_REPEAT, rc.MIN_REPEAT):
        low, high, what = arg
        if low > _MOST:
            raise bad_grammar(f"Invalid regex: more than {_MOST} repeats")
        n = rng.randint(low, min(high, low + _REPEATS))
        return "".join(_text(what, rng, groups) for _ in range(n))
    if op is rc.AT:
        return ""
    raise bad_grammar(f"Invalid regex: {op} is not supported")


_CLASSES = {
    rc.CATEGORY_DIGIT: "0123456789", rc.CATEGORY_SPACE: " ", rc.CATEGORY_WORD: "abcxyz019_",
    rc.CATEGORY_NOT_DIGIT: "abc ", rc.CATEGORY_NOT_SPACE: "ab1", rc.CATEGORY_NOT_WORD: "- "}


def _of_class(items: Any, rng: random.Random) -> str:
    if items[0][0] is rc.NEGATE:
        rest = items[1:]
        return next((c for c in "abcXYZ019 _-.," if not _is_in(c, rest)), "\u00e9")
    op, arg = rng.choice(items)
    if op is rc.RANGE:
        return chr(rng.randint(*arg))
    return rng.choice(_CLASSES[arg]) if op is rc.CATEGORY else chr(arg)


def _is_in(c: str, items: Any) -> bool:
    return any(ord(c) == arg if op is rc.LITERAL else arg[0] <= ord(c) <= arg[1] if op is rc.RANGE
               else c in _CLASSES[arg] for op, arg in items)
