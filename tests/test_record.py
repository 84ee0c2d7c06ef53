"""The recorder: recorded streams and made ones, with synthetic stamps, become records."""

import itertools
import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.record import Outcome, Recorder, RequestRecord, Shot
from tests import captures

MS = 1_000_000
DUE, SENT, HEADERS, END = 1000 * MS, 1001 * MS, 1002 * MS, 9000 * MS
SHOT = Shot(leg="ladder-4-r0", shard=1, seq=7, session=15, turn=0, cls="chat", due_ns=DUE,
            body=b"{}", want_prompt_tok=50, max_tokens=64)
STREAMS = captures.streams()
DONE = b"data: [DONE]\n\n"


def recorder(status: int = 200, content_type: str = "text/event-stream; charset=utf-8",
             retry_after: bool = False, throttle_status: tuple[int, ...] = ()) -> Recorder:
    """One whose headers have come."""
    r = Recorder(SHOT, throttle_status)
    r.sent(SENT)
    r.response(HEADERS, status, content_type, retry_after)
    return r


def replay(name: str, failure: Outcome | None = None) -> RequestRecord:
    """A capture, one chunk a read: chunk i at HEADERS + (i + 1) ms + 300 ns."""
    recorded = captures.load(name)
    r = recorder(recorded.status, recorded.content_type)
    for i, chunk in enumerate(recorded.chunks):
        r.feed(stamp(i), chunk)
    return r.end(END, failure)


def stamp(chunk: int) -> int:
    return HEADERS + (chunk + 1) * MS + 300


def event(delta: dict[str, Any] | None = None, finish: str | None = None,
          **top: Any) -> bytes:
    """A chat event; without arguments a token whose text is "a"."""
    delta = {"content": "a"} if delta is None else delta
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **top}).encode() + b"\n\n"


def usage(**counts: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


ROLE = event({"role": "assistant", "content": ""})
FINISH = event({}, "stop")
USAGE = usage(prompt_tokens=50, total_tokens=52, completion_tokens=2)
ERROR = b'data: {"error": {"message": "m", "type": "t", "param": null, "code": 500}}\n\n'
GOOD = (ROLE, event(), event(), FINISH, USAGE, DONE)


def record_of(*reads: bytes, failure: Outcome | None = None) -> RequestRecord:
    """Read i comes at HEADERS + (i + 1) ms + 300 ns."""
    r = recorder()
    for i, data in enumerate(reads):
        r.feed(stamp(i), data)
    return r.end(END, failure)


# ---------------------------------------------------------------------------- recorded answers

EVENTS = {
    # how a capture ends: (outcome, finish_reason, token events, output tokens)
    "10_chat_stream_usage": ("OK", "length", 8, 8),
    "11_chat_stream_nousage": ("OK", "length", 8, 8),
    "12_chat_stream_continuous_usage": ("OK", "length", 4, 4),
    "14_chat_stream_max1": ("OK", "length", 1, 1),
    "16_chat_stream_ignore_eos_64": ("OK", "length", 61, 64),  # three events hold two tokens
    "17_chat_stream_stop_string": ("OK", "stop", 9, 12),  # text that may be the stop is held back
    "18_chat_stream_eos": ("OK", "stop", 5, 6),  # the sixth is the end of sequence
    "19_chat_stream_logprobs": ("OK", "length", 3, 3),
    "19_chat_stream_return_token_ids": ("OK", "length", 3, 3),
    "20_cmpl_stream_usage": ("OK", "length", 8, 8),
    "21_cmpl_stream_nousage": ("OK", "length", 8, 8),
    "23_cmpl_stream_max1": ("OK", "length", 1, 1),
    "24_cmpl_prompt_token_ids": ("OK", "length", 4, 4),
    "31_chat_json_schema_stream": ("OK", "stop", 62, 63),  # end of sequence
    "40_tools_auto_random_stream": ("OK", "length", 8, 8),
    "41_tools_auto_forced_call_stream": ("OK", "tool_calls", 16, 56),  # the parser swallows tags
    "42_tools_auto_forced_two_stream": ("OK", "tool_calls", 37, 112),
    "43_tools_required_stream": ("OK", "tool_calls", 3, 41),
    "44_tools_named_stream": ("OK", "stop", 2, 34),
    "45_tools_none_stream": ("OK", "length", 8, 8),
    "46_tools_required_cut_stream": ("EMPTY", "length", 0, 6),  # cut inside the swallowed tag
    "48_tools_named_strict_stream": ("OK", "stop", 10, 55),
    "48_tools_required_strict_stream": ("OK", "tool_calls", 11, 65),
    "72_sigkill_api_server_midstream": ("TRUNCATED", None, 19, 19),
    "75_cuda_oom_injected_midstream": ("SERVER_ERROR_EVENT", None, 20, 20),
    "75b_oom_chat_stream": ("SERVER_ERROR_EVENT", None, 252, 252),
    "76_sigkill_worker_midstream": ("SERVER_ERROR_EVENT", None, 20, 20),
    "77_queue_overflow_raced_200_with_error_event": ("THROTTLED", None, 0, None),
    "78_sigterm_api_midstream": ("ABORTED", "abort", 21, 22),
    "79_worker_hangs_sigstop": ("TRUNCATED", None, 19, 19),
}
NOT_SENT_BY_US = {"19_chat_stream_n2"}  # two answers in one stream


def test_every_recorded_stream_is_looked_at() -> None:
    assert set(EVENTS) == set(STREAMS) - NOT_SENT_BY_US


@pytest.mark.parametrize(("name", "ends"), EVENTS.items(), ids=EVENTS)
def test_a_recorded_stream_ends_as_it_did(name: Any, ends: Any) -> None:
    r = replay(name)
    assert (r.outcome.value, r.finish_reason, r.n_events, r.output_tok) == ends


@pytest.mark.parametrize("name", EVENTS)
def test_tokens_come_from_usage_where_the_server_says_them(name: Any) -> None:
    r = replay(name)
    said = [json.loads(c[6:]).get("usage") for c in captures.load(name).chunks
            if c.startswith(b"data: {")]
    counts = [u for u in said if u]
    if counts:
        assert (r.prompt_tok, r.output_tok) == (
            counts[-1]["prompt_tokens"], counts[-1]["completion_tokens"])
        assert r.tok_source == "usage"
    else:
        assert r.prompt_tok is None
        assert r.tok_source == ("events" if r.n_events else None)


@pytest.mark.parametrize("name", EVENTS)
def test_events_of_a_recorded_stream_have_the_stamps_of_their_chunks(name: Any) -> None:
    r = replay(name)
    tokens = [i for i, c in enumerate(captures.load(name).chunks) if c.startswith(b"data: {")
              for choice in json.loads(c[6:]).get("choices", ())
              if choice.get("text") or choice.get("delta", {}).get("content")
              or choice.get("delta", {}).get("tool_calls")
              or (choice.get("delta", {}).get("content") == "" and "role" not in choice["delta"])]
    assert r.n_events == len(tokens)
    assert (r.sent_ns, r.headers_ns) == (SENT, HEADERS)
    if tokens:
        assert r.first_ns == stamp(tokens[0])
        assert r.last_ns is not None
        assert abs(r.last_ns - stamp(tokens[-1])) <= 1000
        assert r.gaps_us == [1000 * (b - a) for a, b in itertools.pairwise(tokens)]
        assert r.reads is None


ENDED_BY = {
    ("72_sigkill_api_server_midstream", Outcome.DISCONNECTED): Outcome.DISCONNECTED,
    ("72_sigkill_api_server_midstream", Outcome.CANCELLED): Outcome.CANCELLED,
    ("79_worker_hangs_sigstop", Outcome.STALLED): Outcome.STALLED,
    ("79_worker_hangs_sigstop", Outcome.ABANDONED): Outcome.ABANDONED,
    ("79_worker_hangs_sigstop", Outcome.TIMEOUT_TOTAL): Outcome.TIMEOUT_TOTAL,
    ("75_cuda_oom_injected_midstream", Outcome.DISCONNECTED): Outcome.SERVER_ERROR_EVENT,
    ("76_sigkill_worker_midstream", Outcome.CANCELLED): Outcome.SERVER_ERROR_EVENT,
    ("77_queue_overflow_raced_200_with_error_event", Outcome.DISCONNECTED): Outcome.THROTTLED,
    ("78_sigterm_api_midstream", Outcome.DISCONNECTED): Outcome.ABORTED,
    ("10_chat_stream_usage", Outcome.DISCONNECTED): Outcome.OK,
    ("11_chat_stream_nousage", Outcome.STALLED): Outcome.OK,
}


@pytest.mark.parametrize(("how", "outcome"), ENDED_BY.items(), ids=str)
def test_what_the_socket_saw_counts_unless_the_stream_had_said_its_end(
        how: Any, outcome: Any) -> None:
    r = replay(*how)
    assert r.outcome is outcome
    assert r.error is None or outcome is not Outcome.OK


ANSWERS = [name for name in captures.names("") if not captures.load(name).is_stream]


@pytest.mark.parametrize("name", [n for n in ANSWERS if captures.load(n).status >= 400])
def test_a_recorded_error_answer_is_an_http_error_with_its_words(name: Any) -> None:
    recorded = captures.load(name)
    r = replay(name)
    full = name == "77_queue_overflow_rejected"
    assert r.outcome is (Outcome.THROTTLED if full else Outcome.HTTP_ERROR)
    assert r.status == recorded.status
    said = json.loads(recorded.body)
    words = said["detail"] if "detail" in said else said["error"]["message"]
    assert r.error == f"HTTP {recorded.status}: {words[:500]}"[:500]
    assert (r.n_events, r.output_tok, r.first_ns, r.tok_source) == (0, None, None, None)


@pytest.mark.parametrize("name", ["13_chat_nonstream", "22_cmpl_nonstream"])
def test_a_whole_answer_instead_of_a_stream_is_a_bad_stream(name: Any) -> None:
    assert replay(name).outcome is Outcome.BAD_STREAM


@pytest.mark.parametrize("name", [*EVENTS, *ANSWERS])
def test_a_record_survives_the_journal(name: Any) -> None:
    r = replay(name)
    line = msgspec.json.encode(r)
    assert b"\n" not in line
    assert msgspec.json.decode(line, type=RequestRecord) == r


# -------------------------------------------------------------------------------------- any cut


def still(pieces: list[bytes]) -> RequestRecord:
    """All pieces at one instant, so that only `reads` can depend on the cuts."""
    r = recorder()
    for piece in pieces:
        r.feed(stamp(0), piece)
    return msgspec.structs.replace(r.end(END), reads=None)


@pytest.mark.parametrize("name", [*EVENTS, *NOT_SENT_BY_US])
def test_a_stream_in_small_pieces_gives_the_same_record(name: Any) -> None:
    body = captures.load(name).body
    whole = still([body])
    for size in (1, 7, 4096):
        assert still([body[i : i + size] for i in range(0, len(body), size)]) == whole


@pytest.mark.parametrize("body", [b"".join(GOOD), captures.load("43_tools_required_stream").body,
                                  captures.load("77_queue_overflow_raced_200_with_error_event").body
                                  ], ids=["made", "tools", "full"])
def test_a_stream_cut_anywhere_gives_the_same_record(body: Any) -> None:
    whole = still([body])
    for cut in range(len(body) + 1):
        assert still([body[:cut], body[cut:]]) == whole, cut


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(EVENTS)), st.integers(0, 2**32))
def test_reads_and_gaps_hold_every_event_whatever_the_cuts(name: Any, seed: Any) -> None:
    body, rng = captures.load(name).body, random.Random(seed)
    cuts = sorted(rng.sample(range(len(body)), min(len(body), rng.randint(1, 20))))
    r = recorder()
    now, stamps, reads = HEADERS, [], []
    for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True):
        now += rng.randint(0, 5 * MS)
        before = r.n_events
        r.feed(now, body[a:b])
        stamps += [now] * (r.n_events - before)
        reads += [r.n_events - before] if r.n_events > before else []
    done = r.end(END)
    assert done.n_events == len(stamps)
    if stamps:
        assert (done.first_ns, done.n_events) == (stamps[0], len(stamps))
        assert done.last_ns is not None
        assert abs(done.last_ns - stamps[-1]) <= 1000
        assert all(gap >= 0 for gap in done.gaps_us)
        assert done.reads == (reads if len(reads) < len(stamps) else None)


def test_gaps_add_up_to_last_minus_first() -> None:
    r = recorder()
    stamps = [HEADERS + 1234 * i * i + 999 * i for i in range(2000)]
    for now in stamps:
        r.feed(now, event())
    done = r.end(END)
    assert abs(1000 * sum(done.gaps_us) - (stamps[-1] - stamps[0])) <= 1000


def test_events_of_one_read_share_a_stamp_and_reads_says_so() -> None:
    r = record_of(ROLE + event() + event(), event(), FINISH + USAGE, DONE)
    assert (r.first_ns, r.gaps_us, r.reads) == (stamp(0), [0, 1000], [2, 1])


def test_one_event_per_read_needs_no_reads() -> None:
    assert record_of(*GOOD).reads is None


def test_an_event_has_the_stamp_of_the_read_that_completed_it() -> None:
    piece = event()
    assert record_of(piece[:5], piece[5:-1], piece[-1:], FINISH).first_ns == stamp(2)


# ------------------------------------------------------------------------------ the proper end


def test_a_good_stream_is_ok() -> None:
    r = record_of(*GOOD)
    assert (r.outcome, r.finish_reason, r.error) == (Outcome.OK, "stop", None)
    assert (r.leg, r.shard, r.seq, r.session, r.turn, r.cls, r.due_ns, r.want_prompt_tok,
            r.max_tokens) == ("ladder-4-r0", 1, 7, 15, 0, "chat", DUE, 50, 64)
    assert (r.first_ns, r.gaps_us, r.first_visible_ns) == (stamp(1), [1000], stamp(1))


def test_events_with_choices_and_no_token_keep_their_stamps() -> None:
    r = record_of(*GOOD)
    assert (r.role_ns, r.finish_ns) == (stamp(0), stamp(3))
    bare = record_of(event(), event({"content": "b"}, "length"), USAGE, DONE)
    assert (bare.outcome, bare.role_ns, bare.finish_ns) == (Outcome.OK, None, None)
    twice = record_of(ROLE, event({}), event(), event({}), FINISH, USAGE, DONE)
    assert (twice.role_ns, twice.finish_ns) == (stamp(0), stamp(4))  # the first, and the last


def test_the_end_is_where_finish_reason_and_usage_are_there() -> None:
    assert record_of(*GOOD).end_ns == stamp(4)


def test_without_usage_the_end_is_done() -> None:
    assert record_of(event(), FINISH, DONE).end_ns == stamp(2)


def test_without_usage_and_done_the_end_is_the_body_s() -> None:
    r = record_of(event(), FINISH)
    assert (r.outcome, r.end_ns) == (Outcome.OK, END)


def test_usage_before_the_finish_reason_is_not_the_end() -> None:
    r = record_of(event(usage={"completion_tokens": 1}), event(
        usage={"completion_tokens": 2}), failure=Outcome.DISCONNECTED)
    assert (r.outcome, r.end_ns) == (Outcome.DISCONNECTED, END)


@pytest.mark.parametrize("failure", [
    Outcome.DISCONNECTED, Outcome.STALLED, Outcome.TIMEOUT_TOTAL, Outcome.CANCELLED,
    Outcome.ABANDONED])
def test_a_failure_after_the_proper_end_is_none(failure: Any) -> None:
    r = record_of(*GOOD[:-1], failure=failure)
    assert (r.outcome, r.end_ns, r.error) == (Outcome.OK, stamp(4), None)


@pytest.mark.parametrize("failure", [
    Outcome.DISCONNECTED, Outcome.STALLED, Outcome.TIMEOUT_TOTAL, Outcome.CANCELLED,
    Outcome.ABANDONED])
def test_a_failure_before_it_keeps_what_was_seen(failure: Any) -> None:
    r = record_of(ROLE, event(), event(), failure=failure)
    assert (r.outcome, r.end_ns, r.output_tok, r.tok_source) == (failure, END, 2, "events")
    assert (r.first_ns, r.gaps_us, r.finish_reason) == (stamp(1), [1000], None)


def test_done_alone_proves_nothing() -> None:
    assert record_of(DONE).outcome is Outcome.EMPTY
    assert record_of(ROLE, event(), DONE).outcome is Outcome.TRUNCATED
    assert record_of(ROLE, event(), DONE, failure=Outcome.DISCONNECTED).outcome is (
        Outcome.DISCONNECTED)


def test_a_stream_without_one_token_is_empty() -> None:
    for reads in ((), (b": ping\n\n",), (ROLE, FINISH, DONE), (ROLE, USAGE, DONE)):
        r = record_of(*reads)
        assert r.outcome is Outcome.EMPTY
        assert r.error
        assert (r.first_ns, r.last_ns, r.n_events) == (None, None, 0)


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "content_filter"])
def test_good_finish_reasons_are_ok(reason: Any) -> None:
    assert record_of(event(), event({}, reason), DONE).outcome is Outcome.OK


def test_another_finish_reason_is_not_ok() -> None:
    r = record_of(event(), event({}, "error"), DONE)
    assert (r.outcome, r.error) == (Outcome.SERVER_ERROR_EVENT, "finish_reason 'error'")
    assert record_of(event(), event({}, "abort"), USAGE, DONE).outcome is Outcome.ABORTED
    assert record_of(ROLE, event({}, "abort"), USAGE, DONE).outcome is Outcome.ABORTED


# --------------------------------------------------------------------------------------- errors

AFTER_ERROR = {
    "nothing": (), "done": (DONE,), "tokens and a finish": (event(), FINISH, USAGE, DONE),
    "another error": (ERROR.replace(b'"m"', b'"other"'),), "garbage": (b"data: garbage\n\n",),
}


@pytest.mark.parametrize("after", AFTER_ERROR.values(), ids=AFTER_ERROR)
@pytest.mark.parametrize("before", [(), (ROLE, event())], ids=["at once", "after a token"])
@pytest.mark.parametrize("failure", [None, Outcome.DISCONNECTED])
def test_an_error_event_stands_whatever_follows(before: Any, after: Any, failure: Any) -> None:
    r = record_of(*before, ERROR, *after, failure=failure)
    assert (r.outcome, r.error) == (Outcome.SERVER_ERROR_EVENT, "t: m")


def test_an_error_event_after_the_proper_end_is_an_error() -> None:
    assert record_of(*GOOD[:-1], ERROR, DONE).outcome is Outcome.SERVER_ERROR_EVENT


def test_a_full_queue_in_the_middle_of_a_stream_is_an_error() -> None:
    full = captures.load("77_queue_overflow_raced_200_with_error_event").chunks[0]
    assert record_of(full, DONE).outcome is Outcome.THROTTLED
    assert record_of(ROLE, event(), full, DONE).outcome is Outcome.SERVER_ERROR_EVENT


@pytest.mark.parametrize("bad", [b"data: {\n\n", b"data: <html>\n\n", b'data: {"choices":7}\n\n'])
def test_an_event_of_no_sense_is_a_bad_stream(bad: Any) -> None:
    r = record_of(ROLE, event(), bad, *GOOD)
    assert r.outcome is Outcome.BAD_STREAM
    assert r.error
    assert r.first_ns == stamp(1)


def test_a_line_without_end_is_a_bad_stream() -> None:
    r = recorder()
    for i in range(17):
        r.feed(stamp(i), b"x" * 2**20)
    assert r.fatal is Outcome.BAD_STREAM
    assert r.end(END).outcome is Outcome.BAD_STREAM


PAGE = b"<html>\r\n<title>Welcome to nginx!</title><p class=\"error\">:data</p></html>\r\n"


@pytest.mark.parametrize("kind", ["text/html", "text/plain", "text/event-stream", ""])
@pytest.mark.parametrize("size", [1, 7, len(PAGE)])
@pytest.mark.parametrize("failure", [None, Outcome.DISCONNECTED])
def test_a_page_with_status_200_is_a_bad_stream_whatever_it_is_called_and_however_it_is_cut(
        kind: str, size: int, failure: Outcome | None) -> None:
    r = recorder(200, kind)
    for i in range(0, len(PAGE), size):
        r.feed(stamp(i), PAGE[i:i + size])
    done = r.end(END, failure)
    assert (done.outcome, done.status, done.first_ns) == (Outcome.BAD_STREAM, 200, None)
    assert (done.error or "").startswith("HTTP 200: <html>")


def test_an_error_in_json_that_is_called_a_stream_is_the_servers_error() -> None:
    r = record_of(b' {"error":', b'{"message":"m"}}')
    assert (r.outcome, r.error) == (Outcome.SERVER_ERROR_EVENT, "HTTP 200: m")


@pytest.mark.parametrize("opening", [b"", b"\n\n", b": ping\n\n", b"\xef\xbb\xbfevent: x\n\n",
                                     b"da", b"data: {", b"retry: 3\nid: 1\n\n", b"\r\n: \r\n"])
def test_a_stream_without_an_event_is_no_page(opening: bytes) -> None:
    assert record_of(opening).outcome is Outcome.EMPTY
    assert record_of(opening, failure=Outcome.DISCONNECTED).outcome is Outcome.DISCONNECTED


@pytest.mark.parametrize("kind", ["text/html; charset=UTF-8", "text/plain", ""])
def test_a_stream_under_another_name_is_a_stream(kind: str) -> None:
    """Proxies that were written for pages name what they pass on as they like."""
    r = recorder(200, kind)
    for i, part in enumerate(GOOD):
        r.feed(stamp(i), part)
    assert r.end(END).outcome is Outcome.OK


HTTP = {
    # (status, retry_after, throttle_status, body): outcome
    (429, False, (), b""): Outcome.THROTTLED,
    (503, False, (), b""): Outcome.HTTP_ERROR,
    (503, True, (), b""): Outcome.THROTTLED,
    (503, False, (), b'{"error":{"message":"queue is full"}}'): Outcome.THROTTLED,
    (503, False, (503,), b""): Outcome.THROTTLED,
    (502, False, (503,), b""): Outcome.HTTP_ERROR,
    (502, False, (400, 502), b""): Outcome.THROTTLED,
    (500, True, (), b""): Outcome.HTTP_ERROR,
    (400, False, (), b'{"error":{"message":"queue is full"}}'): Outcome.HTTP_ERROR,
    (301, False, (), b""): Outcome.HTTP_ERROR,
    (204, False, (), b""): Outcome.HTTP_ERROR,
}


@pytest.mark.parametrize(("answer", "outcome"), HTTP.items(), ids=str)
@pytest.mark.parametrize("failure", [None, Outcome.DISCONNECTED])
def test_status_and_headers_tell_throttling_from_failure(
        answer: Any, outcome: Any, failure: Any) -> None:
    status, retry_after, throttle_status, body = answer
    r = recorder(status, "application/json", retry_after, throttle_status)
    for i in range(len(body)):
        r.feed(stamp(i), body[i : i + 1])
    done = r.end(END, failure)
    assert (done.outcome, done.status, done.end_ns) == (outcome, status, END)
    assert done.error is not None
    assert done.error.startswith(f"HTTP {status}: ")


def test_an_event_stream_with_a_bad_status_is_an_http_error() -> None:
    r = recorder(500)
    r.feed(stamp(0), b"".join(GOOD))
    done = r.end(END)
    assert (done.outcome, done.n_events) == (Outcome.HTTP_ERROR, 0)


def test_json_with_status_200_that_holds_an_error_is_a_server_error() -> None:
    r = recorder(200, "application/json")
    r.feed(stamp(0), b'{"error":{"message":"m"}}')
    done = r.end(END)
    assert (done.outcome, done.error) == (Outcome.SERVER_ERROR_EVENT, "HTTP 200: m")


@pytest.mark.parametrize("failure", [Outcome.CONNECT_FAILED, Outcome.DROPPED, Outcome.CANCELLED])
def test_a_request_without_an_answer_is_what_the_socket_saw(failure: Any) -> None:
    done = Recorder(SHOT).end(END, failure, "words")
    assert (done.outcome, done.error, done.end_ns) == (failure, "words", END)
    assert (done.sent_ns, done.headers_ns, done.status, done.first_ns) == (None,) * 4


def test_the_stamp_of_a_retried_request_is_of_the_second_send() -> None:
    r = Recorder(SHOT)
    r.sent(SENT)
    r.stale_retries += 1
    r.sent(SENT + MS)
    r.response(HEADERS, 200, "text/event-stream", False)
    r.feed(stamp(0), b"".join(GOOD))
    done = r.end(END)
    assert (done.sent_ns, done.stale_retries, done.outcome) == (SENT + MS, 1, Outcome.OK)


# ------------------------------------------------------------------------------ tokens and text


def test_continuous_usage_gives_tokens_per_event() -> None:
    r = record_of(event({"role": "assistant", "content": ""}, usage={"completion_tokens": 0}),
                  *(event(usage={"completion_tokens": n}) for n in (1, 3, 4)),
                  event({}, "stop", usage={"completion_tokens": 4}), DONE)
    assert (r.event_tok, r.output_tok, r.tok_source) == ([1, 2, 1], 4, "usage")
    assert replay("12_chat_stream_continuous_usage").event_tok == [1, 1, 1, 1]


def test_token_ids_give_tokens_per_event_and_a_count_without_usage() -> None:
    body = captures.load("19_chat_stream_return_token_ids").chunks
    assert replay("19_chat_stream_return_token_ids").event_tok == [1, 1, 1]
    r = record_of(*body[:-2], DONE)
    assert (r.output_tok, r.tok_source) == (3, "events")


def test_reasoning_is_a_token_but_not_visible() -> None:
    r = record_of(ROLE, event({"reasoning_content": "hm"}), event({"content": ""}), event(),
                  FINISH, DONE)
    assert (r.first_ns, r.first_visible_ns, r.n_events) == (stamp(1), stamp(3), 3)


def test_only_the_first_event_can_be_role_only() -> None:
    r = record_of(ROLE, ROLE, event(), FINISH, DONE)
    assert (r.first_ns, r.n_events) == (stamp(1), 2)


def test_a_usage_event_before_the_role_does_not_use_up_the_first() -> None:
    assert record_of(USAGE, ROLE, event(), FINISH, DONE).first_ns == stamp(2)


def test_cached_tokens_are_kept() -> None:
    r = record_of(event(), FINISH, usage(prompt_tokens=5, completion_tokens=1,
                                         prompt_tokens_details={"cached_tokens": 4}), DONE)
    assert (r.prompt_tok, r.output_tok, r.cached_tok) == (5, 1, 4)


def test_usage_that_counts_nothing_leaves_the_count_to_the_events() -> None:
    r = record_of(event(), event(), FINISH, usage(prompt_tokens=5), DONE)
    assert (r.prompt_tok, r.output_tok, r.tok_source, r.cached_tok) == (5, 2, "events", None)
