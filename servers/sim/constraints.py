"""What an answer must look like: JSON of a schema, a call of a tool, one of some texts."""

import json
from dataclasses import dataclass
from typing import Any

from servers.sim.errors import Refused, bad, invalid


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the answer must look like; at most one is set. `tool_choice`: "auto", "required", or
    the name of one of `tools`."""

    schema: Any = None
    choice: tuple[str, ...] = ()
    regex: str | None = None
    tools: tuple[tuple[str, Any], ...] = ()  # (name, schema of its arguments)
    tool_choice: str | None = None
    named: bool = False
    parallel: bool = True  # several tools may be called


def parse(body: dict[str, Any], chat: bool) -> Constraint:
    asked = body.get("structured_outputs") or {}
    if not isinstance(asked, dict):
        raise invalid("dict_type", "body.structured_outputs", "Input should be a valid dictionary",
                      asked)
    tools, tool_choice, named = _tools(body) if chat else ((), None, False)
    parallel = body.get("parallel_tool_calls") is not False
    choice = asked.get("choice") or ()
    if choice:
        if not isinstance(choice, list):
            raise invalid("list_type", "body.structured_outputs.choice", "Input should be a valid "
                          "list", choice)
        return Constraint(choice=tuple(map(str, choice)), tools=tools, tool_choice=tool_choice)
    if tool_choice not in (None, "auto"):
        return Constraint(tools=tools, tool_choice=tool_choice, named=named, parallel=parallel)
    schema = _schema(body, asked)
    if schema is not None:
        return Constraint(schema=schema)
    if asked.get("regex"):
        return Constraint(regex=str(asked["regex"]))
    return Constraint(tools=tools, tool_choice=tool_choice, parallel=parallel)


def _schema(body: dict[str, Any], asked: dict[str, Any]) -> Any:
    wanted = body.get("response_format")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if isinstance(wanted, dict) and kind == "json_schema":
        holder = wanted.get("json_schema")
        if not isinstance(holder, dict):
            raise invalid("missing", "body.response_format.json_schema", "Field required", wanted)
        return holder.get("schema", True)
    if kind == "json_object" or asked.get("json_object"):
        return {"type": "object", "minProperties": 2, "additionalProperties": {"type": "string"}}
    schema = asked.get("json")
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as e:
        raise Refused(400, f"Grammar error: {e}") from None


def _tools(body: dict[str, Any]) -> tuple[tuple[tuple[str, Any], ...], str | None, bool]:
    """(tools, which of them, whether one was named); nothing where no tool may be called."""
    given, choice = body.get("tools") or [], body.get("tool_choice")
    if not given:
        if choice not in (None, "none"):
            raise bad("tool_choice", "When using `tool_choice`, `tools` must be set.")
        return (), None, False
    functions = [t.get("function") if isinstance(t, dict) else None
                 for t in (given if isinstance(given, list) else [given])]
    tools = []
    for i, function in enumerate(functions):
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid("missing", f"body.tools.{i}.function", "Field required", given)
        tools.append((function["name"], function.get("parameters") or {"type": "object"}))
    if isinstance(choice, dict):
        name = (choice.get("function") or {}).get("name")
        if name not in [n for n, _ in tools]:
            raise bad("tool_choice", "The tool specified in `tool_choice` does not match any of "
                      "the specified `tools`")
        return tuple(tools), str(name), True
    if choice == "none":
        return (), None, False
    if choice not in (None, "auto", "required"):
        raise bad("tool_choice", "Invalid value for `tool_choice`: it must be \"none\", \"auto\", "
                  "\"required\" or a named tool.", choice)
    return tuple(tools), choice or "auto", False
