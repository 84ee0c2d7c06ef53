"""What the simulator says under a constraint is what the constraint allows."""

import json
import random
import re
from typing import Any

import jsonschema
import pytest

from servers.sim import schema
from servers.sim.errors import Refused

PERSON = {"type": "object", "properties": {
    "name": {"type": "string", "minLength": 2, "maxLength": 8},
    "age": {"type": "integer", "minimum": 0, "maximum": 99},
    "mood": {"enum": ["good", "bad", None]}, "at": {"type": "string", "format": "date"},
    "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,4}-\\d+$"},
             "minItems": 1, "maxItems": 3, "uniqueItems": True}},
    "required": ["name", "age", "tags"], "additionalProperties": False}
TREE: Any = {"$defs": {"node": {"type": "object", "properties": {
    "value": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["value", "next"]}}, "$ref": "#/$defs/node"}


@pytest.mark.parametrize("given", [
    PERSON, TREE, {"type": ["integer", "null"], "multipleOf": 5, "minimum": -12, "maximum": 12},
    {"type": "array", "prefixItems": [{"const": 1}, {"type": "boolean"}], "items": False,
     "minItems": 2},
    {"allOf": [TREE["$defs"]["node"], {"properties": {"id": {"format": "uuid"}},
                                       "required": ["id"]}], "$defs": TREE["$defs"]},
    {"type": "object", "minProperties": 2, "additionalProperties": {"type": "integer"}},
    {"type": "number", "maximum": -3.5}, {"type": "number", "minimum": 2.5, "maximum": 2.504},
    {"type": "object", "required": ["x"]}, {}, True,
    {"oneOf": [{"type": "string", "maxLength": 0}, {"type": "integer", "minimum": 7}]},
])
def test_an_instance_is_valid_under_its_schema(given: Any) -> None:
    for seed in range(50):
        value = schema.instance(given, random.Random(seed))
        jsonschema.validate(json.loads(json.dumps(value)), given)


def test_a_spoiled_instance_is_not_valid() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        said = schema.spoiled(schema.instance(PERSON, rng), PERSON, rng)
        with pytest.raises((json.JSONDecodeError, jsonschema.ValidationError)):
            jsonschema.validate(json.loads(said), PERSON)


@pytest.mark.parametrize("pattern", [
    "[0-9]{3}-[a-z]{2}", "^(yes|no)$", "\\w+@\\w+\\.com", "[^a-z]x?", "(a|bc)*d+", "[\\d.]{2}",
    "(ab)\\1", "\\S\\s\\D", "."])
def test_a_text_matches_its_regular_expression(pattern: str) -> None:
    for seed in range(50):
        assert re.fullmatch(pattern, schema.matching(pattern, random.Random(seed)))


@pytest.mark.parametrize("given", [
    {"type": "nonsense"}, "text", 3, {"$ref": "#/nowhere"}, {"$ref": "#"},
    {"properties": [1]}, {"type": "integer", "minimum": 2, "maximum": 1},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "string", "pattern": "("}, {"allOf": [1]},
    {"type": "array", "minItems": 10**9}, {"type": "string", "minLength": "x"},
    {"type": "string", "pattern": "a{99999999}"}, {"type": "integer", "minimum": "x"},
    {"type": "array", "minItems": 500, "items": {"type": "array", "minItems": 500}}])
def test_a_schema_that_is_none_is_a_grammar_error(given: Any) -> None:
    with pytest.raises(Refused, match="Grammar error"):
        schema.instance(given, random.Random(0))
