"""The SSE parser: recorded streams and hand-made ones, in every cut."""

import itertools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.sse import LineTooLong, SseParser
from tests import captures

STREAMS = captures.streams()
LONG = 20_000  # bytes; longer streams are cut everywhere in their first and last part only


def events(*pieces: bytes) -> list[bytes]:
    """What a fresh parser says of these pieces."""
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def pieces(body: bytes, size: int) -> list[bytes]:
    return [body[i : i + size] for i in range(0, len(body), size)]


def shortened(body: bytes) -> bytes:
    """The stream without the middle of its events, if it is long."""
    if len(body) < LONG:
        return body
    whole = body.split(b"\n\n")
    return b"\n\n".join([*whole[:5], *whole[-5:]])


def expected(data: bytes) -> list[bytes]:
    """The standard's algorithm on the whole input, written for plainness."""
    found: list[bytes] = []
    held: list[bytes] = []
    lines = re.split(rb"\r\n|\n|\r", data.removeprefix(b"\xef\xbb\xbf"))
    for line in lines[:-1]:
        if not line:
            if held:
                found.append(b"\n".join(held))
            held = []
            continue
        field, _, value = line.partition(b":")
        if field == b"data":
            held.append(value.removeprefix(b" "))
    return found


# --------------------------------------------------------------------------- recorded streams


def test_there_are_recorded_streams_of_each_sort() -> None:
    for sort in ("10_", "20_", "43_", "72_", "75_", "77_", "78_"):
        assert any(name.startswith(sort) for name in STREAMS), sort


@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_stream_is_one_event_per_chunk(name: Any) -> None:
    recorded = captures.load(name)
    assert events(recorded.body) == [
        chunk.removeprefix(b"data: ").removesuffix(b"\n\n") for chunk in recorded.chunks]


@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_stream_cut_anywhere_gives_the_same_events(name: Any) -> None:
    body = shortened(captures.load(name).body)
    whole = expected(body)
    assert len(whole) > 1
    for cut in range(len(body) + 1):
        assert events(body[:cut], body[cut:]) == whole, cut


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_stream_in_small_pieces_gives_the_same_events(name: Any, size: Any) -> None:
    body = shortened(captures.load(name).body)
    assert events(*pieces(body, size)) == expected(body)


@pytest.mark.parametrize("ending", [b"\n", b"\r", b"\r\n"], ids=["LF", "CR", "CRLF"])
def test_every_line_ending_gives_the_same_events_in_every_cut(ending: Any) -> None:
    lf = captures.load("18_chat_stream_eos").body
    body, whole = lf.replace(b"\n", ending), expected(lf)
    assert events(body) == whole
    assert events(*pieces(body, 1)) == whole
    for cut in range(len(body) + 1):
        assert events(body[:cut], body[cut:]) == whole, cut


# -------------------------------------------------------------------------------- hand-made ones

RULES = {
    "one event": (b"data: a\n\n", [b"a"]),
    "no space after the colon": (b"data:a\n\n", [b"a"]),
    "only one space is taken": (b"data:  a\n\n", [b" a"]),
    "several data lines are joined": (b"data: a\ndata:\ndata: b\n\n", [b"a\n\nb"]),
    "data without a colon": (b"data\n\n", [b""]),
    "two bare data lines": (b"data\ndata\n\n", [b"\n"]),
    "empty data is an event": (b"data:\n\n", [b""]),
    "a field that only begins like data": (b"database: a\ndata2\n\n", []),
    "a field with a space before its name": (b" data: a\n\n", []),
    "comments": (b": ping\n\n:\n\ndata: a\n: in between\ndata: b\n\n", [b"a\nb"]),
    "event and id are passed over": (b"event: x\nid: 7\nretry: 9\ndata: a\n\n", [b"a"]),
    "an event without data is none": (b"event: x\n\ndata: a\n\n", [b"a"]),
    "empty lines alone": (b"\n\n\n\ndata: a\n\n\n\n\n", [b"a"]),
    "byte order mark": (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
    "byte order mark later is no mark": (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),
    "a second byte order mark is no mark": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
    "line endings in a mix": (b"data: a\r\n\rdata: b\n\r\ndata: c\r\rdata: d\n\n",
                              [b"a", b"b", b"c", b"d"]),
    "data lines that end in CRLF": (b"data: a\r\ndata: b\r\n\r\ndata: c\r\n\r\n", [b"a\nb", b"c"]),
    "data lines that end in CR": (b"data: a\rdata: b\r\rdata: c\r\r", [b"a\nb", b"c"]),
    "a colon in the data": (b"data: a: b\n\n", [b"a: b"]),
    "torn last event": (b"data: a\n\ndata: b\n", [b"a"]),
    "torn last line": (b"data: a\n\ndata: b", [b"a"]),
    "nothing": (b"", []),
}


@pytest.mark.parametrize(("stream", "said"), RULES.values(), ids=RULES)
def test_rules_of_the_standard_hold_in_every_cut(stream: Any, said: Any) -> None:
    assert expected(stream) == said, "the test's own algorithm"
    assert events(stream) == said
    assert events(*pieces(stream, 1)) == said
    for cut in range(len(stream) + 1):
        assert events(stream[:cut], b"", stream[cut:]) == said, cut


def test_an_event_is_given_at_its_last_byte() -> None:
    parser = SseParser()
    for byte in b"data: a\r":
        assert parser.feed(bytes([byte])) == []
    assert parser.feed(b"\r") == [b"a"]
    assert parser.feed(b"\n") == []
    assert parser.feed(b"data: b\n\n") == [b"b"]


WORDS = [b"data:", b"data: ", b"data", b":", b"event: x", b"id", b" ", b"\xe4", b"\xef\xbb\xbf",
         b"\n", b"\n\n", b"\r", b"\r\n"]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(WORDS), max_size=40), st.lists(st.integers(0, 160), max_size=8))
def test_any_bytes_in_any_cuts_are_read_as_the_standard_says(words: Any, cuts: Any) -> None:
    stream = b"".join(words)
    at = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    assert events(*(stream[a:b] for a, b in itertools.pairwise(at))) == expected(stream)


# ------------------------------------------------------------------------------------ long lines


@pytest.mark.parametrize("size", [4096, 65536, 800_000])
def test_a_line_of_700_kb_is_one_event(size: Any) -> None:
    text = b"x" * 700_000
    assert events(*pieces(b"data: a\n\ndata: " + text + b"\n\ndata: b\n\n", size)) == [
        b"a", text, b"b"]


@pytest.mark.parametrize("before", [b"", b"data: a\n\n"])
def test_a_line_without_end_is_given_up(before: Any) -> None:
    parser = SseParser(max_line_bytes=1000)
    parser.feed(before)
    parser.feed(b"x" * 1000)
    with pytest.raises(LineTooLong, match="1000 bytes"):
        parser.feed(b"x")


@pytest.mark.parametrize("before", [b"", b"data: a\n\n", b"data: b\n\nda"])
def test_many_short_lines_in_one_read_are_no_long_line(before: Any) -> None:
    parser = SseParser(max_line_bytes=64)
    parser.feed(before)
    rest = b"ta: 0\n\n" if before.endswith(b"da") else b"data: 0\n\n"
    assert len(parser.feed(rest + b"data: 1\n\n" * 20)) == 21
