"""What a stream says in pieces is what the whole answer says at once."""

import json
import random
from collections import Counter
from typing import Any

import pytest

from servers.sim import scripts, text, wire
from servers.sim.answers import Answer
from servers.sim.choice import Choice
from servers.sim.metrics import Tally

VOCAB = 151_936
SAID = [{"role": "user", "content": "Hello"}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "上海 1", "b": [1, 2]}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def answered(body: dict[str, Any], chat: bool = True, most: int = 60,
             ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(events, the whole choice) of one answer in both ways."""
    out: list[Any] = []
    for stream in (True, False):
        asked = {"model": "m", "messages": SAID, "prompt": "a b", "stream": stream, **body}
        ask = wire.parse_ask(asked, chat, ["m"], 4096, VOCAB)
        answer = Answer(ask, "1", VOCAB)
        script = scripts.write(ask.constraint, scripts.Habits(), random.Random(7))
        choice, events = Choice(answer, 0, script, 0.0, Tally(4096)), []
        for k in range(1, most + 1):
            if choice.reason is None:
                events += choice.token(float(k), "length" if k == most else None)
        out.append([json.loads(e.removeprefix(b"data: ")) for e in events] if stream else
                   choice.told())
    return out[0], out[1]


def streamed(events: list[dict[str, Any]]) -> str:
    return "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])


@pytest.mark.parametrize("stop", [["world"], ["o w"], ["x", "wide"], ["Hello"], ["!"], ["never"],
                                  ["d b", "batch"], [" ", "w"]])
def test_a_stop_string_ends_the_text_before_it_streamed_and_whole(stop: list[str]) -> None:
    said = "Hello wide world of batch!"
    events, whole = answered({"stop": stop, "structured_outputs": {"choice": [said]}})
    cut = min((said.find(s) for s in stop if s in said), default=len(said))
    hit = next((s for s in stop if said.startswith(s, cut)), None)
    assert streamed(events) == whole["message"]["content"] == said[:cut]
    assert events[-1]["choices"][0]["stop_reason"] == whole["stop_reason"] == hit
    assert whole["finish_reason"] == "stop"


def test_words_that_hold_a_stop_string_stop_as_well() -> None:
    events, whole = answered({"stop": ["e"]})
    assert whole["finish_reason"] == "stop"
    assert "e" not in streamed(events)


@pytest.mark.parametrize("before", ["", "Let me see.\n"])
def test_tool_calls_are_the_same_streamed_and_whole(before: str) -> None:
    events, whole = answered({"tools": TOOLS, "structured_outputs": {
        "choice": [f"{before}{CALL}\n{CALL}"]}}, most=200)
    deltas = [c for e in events for d in e["choices"] for c in d["delta"].get("tool_calls", ())]
    for k, call in enumerate(whole["message"]["tool_calls"]):
        mine = [d for d in deltas if d["index"] == k]
        assert mine[0]["function"] == {"name": call["function"]["name"]}
        arguments = "".join(d["function"]["arguments"] for d in mine[1:])
        assert arguments == call["function"]["arguments"] == '{"a": "上海 1", "b": [1, 2]}'
    assert len(whole["message"]["tool_calls"]) == 2
    assert streamed(events) == before == (whole["message"]["content"] or "")
    assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == "tool_calls"


def test_two_tools_are_called_at_once_only_where_that_is_allowed() -> None:
    tools = [{"type": "function", "function": {"name": n, "parameters": {"type": "object"}}}
             for n in "fg"]
    for allowed, most in ((True, 2), (False, 1)):
        body = {"messages": SAID, "tools": tools, "tool_choice": "required",
                "parallel_tool_calls": allowed}
        asked = wire.parse_ask({"model": "m", **body}, True, ["m"], 4096, VOCAB).constraint
        rng = random.Random(7)
        calls = [len(scripts.parsed("".join(s.text for s in scripts.write(
            asked, scripts.Habits(), rng).said), rng)[1]) for _ in range(100)]
        assert max(calls) == most
        assert min(calls) == 1


def test_a_call_that_is_cut_is_text_of_the_whole_answer_and_nothing_of_the_stream() -> None:
    events, whole = answered({"tools": TOOLS, "tool_choice": "required"}, most=4)
    assert whole["finish_reason"] == events[-1]["choices"][0]["finish_reason"] == "length"
    assert whole["message"]["content"] == "<tool_call"
    assert streamed(events) == ""


def test_token_ids_are_those_that_tokenize_gives() -> None:
    events, whole = answered({"return_token_ids": True}, most=20)
    ids = [t for e in events for c in e["choices"] for t in c.get("token_ids") or ()]
    assert ids == text.token_ids(text.pieces(streamed(events)), VOCAB) == whole["token_ids"]
    assert events[0]["prompt_token_ids"] == text.token_ids(text.chat_pieces(SAID), VOCAB)


def test_logprobs_of_completions_point_into_the_text() -> None:
    events, whole = answered({"logprobs": 2, "echo": True, "max_tokens": 9}, chat=False, most=9)
    told = whole["logprobs"]
    assert [whole["text"][o:].startswith(t) for o, t in zip(told["text_offset"], told["tokens"],
                                                            strict=True)] == [True] * 11
    assert whole["text"].startswith("a b")
    assert "".join(e["choices"][0]["text"] for e in events) == whole["text"]


def test_every_token_is_told_of_where_its_id_or_logprob_was_asked_for() -> None:
    for more in ({"return_token_ids": True}, {"logprobs": True}):
        events, _ = answered({"tools": TOOLS, "structured_outputs": {"choice": [CALL]}, **more})
        assert len(events) == 1 + len(text.pieces("")) + _tokens(CALL)


def _tokens(call: str) -> int:
    script = scripts.of_text(call, True, random.Random(0))
    return script.tokens or 0


def test_a_stop_string_far_into_a_long_answer_is_found_once() -> None:
    said = " ".join(f"word{k}" for k in range(300)) + " END tail"
    events, whole = answered({"stop": ["END"], "structured_outputs": {"choice": [said]}}, most=3000)
    assert streamed(events) == whole["message"]["content"] == said[:said.index("END")]
    assert Counter(bool(e["choices"][0]["finish_reason"]) for e in events)[True] == 1
