"""Reads taken together give the record that one after the other gives, whatever was cut where."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen import bulk
from loadgen.record import Recorder, RequestRecord, Shot
from tests import captures
from tests.captures import DATA

SHOT = Shot(leg="l", shard=0, seq=0, session=0, turn=0, cls="c", due_ns=0, body=b"", max_tokens=64)
STREAMS = sorted(p.stem for p in DATA.glob("*.http") if captures.load(p.stem).is_stream)


def event(delta: dict[str, Any], **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **more}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}
    said = json.dumps(chunk, separators=(",", ":"), ensure_ascii=False)
    return b"data: " + said.encode() + b"\n\n"


ROLE = event({"role": "assistant", "content": ""})
END = event({}, finish_reason="stop") + b"data: [DONE]\n\n"
texts = st.text(max_size=12) | st.sampled_from(
    ["", '"', "\\", "\\n", '"}}]}\n\ndata: ', "é中", "\x00", "\ud83d\ude00", '"content":"x"'])


def record(reads: list[tuple[int, bytes]], batches: list[int] | None) -> RequestRecord:
    """`batches`: how many reads are taken together each time, over and over; None: one by one."""
    recorder = Recorder(SHOT)
    recorder.sent(1)
    recorder.response(2, 200, "text/event-stream", False)
    if batches is None:
        for stamp, data in reads:
            recorder.feed(stamp, data)
    else:
        rest, sizes = iter(reads), itertools.cycle(batches)
        while taken := list(itertools.islice(rest, next(sizes))):
            recorder.feed_reads([stamp for stamp, _ in taken], [data for _, data in taken])
    return recorder.end(10**9)


def cut(body: bytes, sizes: list[int]) -> list[tuple[int, bytes]]:
    """Reads of these sizes, over and over, a microsecond and a bit apart."""
    reads: list[tuple[int, bytes]] = []
    at = nth = 0
    for size in itertools.cycle(sizes):
        if at >= len(body):
            return reads
        reads.append((1000 + 1700 * nth, body[at:at + size]))
        at, nth = at + size, nth + 1
    return reads


sizes = st.lists(st.integers(1, 700), min_size=1, max_size=6)
batches = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@pytest.mark.parametrize("name", STREAMS)
@given(sizes=sizes, batches=batches)
@settings(max_examples=15, deadline=None)
def test_a_recorded_stream_gives_the_same_record(name: str, sizes: Any, batches: Any) -> None:
    reads = cut(captures.load(name).body, sizes)
    assert record(reads, batches) == record(reads, None)


@given(said=st.lists(texts, max_size=20), sizes=sizes, batches=batches,
       key=st.sampled_from(["content", "reasoning_content", "reasoning"]),
       newline=st.sampled_from([b"\n", b"\r\n", b"\r"]))
@settings(max_examples=300, deadline=None)
def test_texts_of_any_kind_give_the_same_record(said: Any, sizes: Any, batches: Any, key: Any,
                                                newline: Any) -> None:
    body = ROLE + b"".join(event({key: text.encode("utf-8", "replace").decode()})
                           for text in said) + END
    reads = cut(body.replace(b"\n", newline), sizes)
    assert record(reads, batches) == record(reads, None)


@given(noise=st.lists(st.sampled_from([
    event({"content": "a"}), event({"content": ""}), event({"content": "b"}, token_ids=[1, 2]),
    event({"content": "c"}, finish_reason="length"), event({"reasoning_content": "d"}),
    event({"tool_calls": [{"index": 0}]}), b": ping\n\n", b"\n", b"data:\n\n", b"data: {\n\n",
    b'data: {"error": {"message": "no", "code": 500}}\n\n', b"data: [DONE]\n\n",
    b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n',
    event({"content": "a"}).replace(b'"a"', b'"\xff"'), event({"content": "a"})[:-1],
    event({"content": "a"}).replace(b'"a"', b'"\\x"'),
    event({"content": "a"}).replace(b'"a"', b'"\\ud83d"'),
    event({"content": "a"}).replace(b'"a"', b'"\\ude00\\ud83d"'),
    event({"content": "a"}).replace(b'"a"', b'"\\ud83d\\ude00 \\u00e9"'),
    event({"content": "a"})[6:]]),
    max_size=30), sizes=sizes, batches=batches)
@settings(max_examples=400, deadline=None)
def test_streams_of_any_events_give_the_same_record(noise: Any, sizes: Any, batches: Any) -> None:
    reads = cut(ROLE + event({"content": "x"}) + b"".join(noise) + END, sizes)
    assert record(reads, batches) == record(reads, None)


def test_events_like_the_first_never_reach_the_slow_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from loadgen import openai

    seen: list[bytes] = []
    read = openai.read

    def spied(payload: bytes, first: bool) -> openai.Event:
        seen.append(payload)
        return read(payload, first)

    monkeypatch.setattr(openai, "read", spied)
    pieces = [ROLE, *(event({"content": f" word{k}"}) for k in range(200)), END]
    r = record([(1000 * k, data) for k, data in enumerate(pieces, 1)], [300])
    assert (r.n_events, r.outcome.value, r.finish_reason) == (200, "OK", "stop")
    assert r.gaps_us == [1] * 199
    assert len(seen) == 4  # the role, one token, the finish and [DONE]


@pytest.mark.parametrize("payload", [
    b'{"choices":[{"index":0,"delta":{"tool_calls":[]}}]}', b'{"content":null}', b"[DONE]",
    b'{"content":"a\nb"}', b'{"content":"a'])
def test_an_event_without_a_plain_text_is_no_template(payload: bytes) -> None:
    assert bulk.template_of(payload) is None
