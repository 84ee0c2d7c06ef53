"""What an answer says, token by token: words, JSON of the asked schema, calls of tools."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from servers.sim import schema, text
from servers.sim.constraints import Constraint
from servers.sim.errors import dumps

_CALL = re.compile(  # of the hermes parser
    r'<tool_call>\s*\{"name":\s*"([^"]+)",\s*"arguments":\s*(.*?)\}\s*</tool_call>', re.DOTALL)
AUTO_CALL_SHARE = 0.5  # of the answers to which tools were offered
Delta = dict[str, Any]


class Said(NamedTuple):
    """One token. `text` is what the model says; `delta`: what a client of a chat is told of it,
    which of a tool call's frame is nothing (None)."""

    text: str
    json: bytes  # of the text
    delta: Delta | None


class Script(NamedTuple):
    """`tokens`: how many there are, with the EOS; None: words without end, and the engine draws
    the length. `calls`: the text may hold tool calls. `foreseen`: the texts of its tokens once
    more, for the prefix cache."""

    said: Iterator[Said]
    tokens: int | None
    foreseen: Iterator[str]
    calls: bool = False


@dataclass(frozen=True, slots=True)
class Habits:
    """Of the simulated model."""

    invalid_json_frac: float = 0.0
    auto_call_frac: float = AUTO_CALL_SHARE


def said(piece: str) -> Said:
    return Said(piece, dumps(piece), {"content": piece})


WORDS = tuple(map(said, text.WORDS))


def write(asked: Constraint, habits: Habits, rng: random.Random) -> Script:
    """The script of one answer. Raises Refused for a constraint that makes no sense."""
    if asked.choice:
        return of_text(rng.choice(asked.choice), bool(asked.tool_choice), rng)
    if asked.tools and (asked.tool_choice != "auto" or rng.random() < habits.auto_call_frac):
        return of_text(_call(asked, habits, rng), True, rng)
    if asked.schema is not None:
        value = schema.instance(asked.schema, rng)
        if rng.random() < habits.invalid_json_frac:
            return of_text(schema.spoiled(value, asked.schema, rng), False, rng)
        return of_text(json.dumps(value, ensure_ascii=False), False, rng)
    if asked.regex is not None:
        return of_text(schema.matching(asked.regex, rng), False, rng)
    seed = rng.getrandbits(32)
    return Script((WORDS[i] for i in text.words(seed)), None,
                  (text.WORDS[i] for i in text.words(seed)), bool(asked.tools))


def _call(asked: Constraint, habits: Habits, rng: random.Random) -> str:
    fitting = [t for t in asked.tools if t[0] == asked.tool_choice] or list(asked.tools)
    name, parameters = rng.choice(fitting)
    value = schema.instance(parameters, rng)
    arguments = json.dumps(value, ensure_ascii=False)
    if rng.random() < habits.invalid_json_frac:
        arguments = schema.spoiled(value, parameters, rng)
    head = json.dumps({"name": name}, ensure_ascii=False)[:-1]
    return f'<tool_call>\n{head}, "arguments": {arguments}}}\n</tool_call>'


def of_text(whole: str, calls: bool, rng: random.Random) -> Script:
    tokens = list(_with_calls(whole, rng) if calls else map(said, text.pieces(whole)))
    return Script(iter(tokens), len(tokens) + 1, (t.text for t in tokens), calls)


def _with_calls(whole: str, rng: random.Random) -> Iterator[Said]:
    """What stands before the first call is content; of the calls only name and arguments are
    told, and nothing of what stands between and after them."""
    end = 0
    for index, match in enumerate(_CALL.finditer(whole)):
        before = text.pieces(whole[end:match.start()])
        yield from (map(said, before) if index == 0 else map(_unsaid, before))
        *frame, last = text.pieces(whole[match.start():match.end(1) + 1])
        yield from map(_unsaid, frame)
        yield Said(last, b"", {"content": None, "tool_calls": [
            {"id": call_id(rng), "type": "function", "index": index,
             "function": {"name": match[1]}}]})
        yield from map(_unsaid, text.pieces(whole[match.end(1) + 1:match.start(2)]))
        for piece in text.pieces(match[2]):
            yield Said(piece, b"", {"content": None, "tool_calls": [
                {"index": index, "function": {"arguments": piece}}]})
        yield from map(_unsaid, text.pieces(whole[match.end(2):match.end()]))
        end = match.end()
    rest = text.pieces(whole[end:])
    yield from (map(_unsaid, rest) if end else map(said, rest))


def _unsaid(piece: str) -> Said:
    return Said(piece, b"", None)


def call_id(rng: random.Random) -> str:
    return f"chatcmpl-tool-{rng.getrandbits(64):016x}"


def parsed(whole: str, rng: random.Random) -> tuple[str | None, Sequence[Delta]]:
    """(content, tool calls) of an answer that is not streamed. Arguments that are no JSON make it
    all content, as hermes does."""
    found = list(_CALL.finditer(whole))
    if not found or not all(_is_json(m[2]) for m in found):
        return whole, ()
    return whole[:found[0].start()] or None, [
        {"id": call_id(rng), "type": "function", "function": {"name": m[1], "arguments": m[2]}}
        for m in found]


def _is_json(said: str) -> bool:
    try:
        json.loads(said)
    except ValueError:
        return False
    return True
