"""Locust's client and ours see the same: one server replays the same bytes to `loadgen.client`
(aiohttp) and to `loadgen.fleet.stream` (requests on gevent), and the records are equal.

What may differ, and why: stamps and gaps are two measurements (one of them may be the kernel's);
`reads` because http.client hands out one chunk at a time, others all that is there (their sum is
the same); and the words of an `error` where it was a library that spoke, not the server."""

import asyncio
import contextlib
import gzip
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadgen.client import Client
from loadgen.record import Outcome, RequestRecord
from loadgen.target import Target
from servers.base import free_port
from tests import captures
from tests.captures import Capture
from tests.raw_server import (
    DONE,
    FIN,
    HEAD,
    HOLD,
    LAST,
    PING,
    RST,
    RawServer,
    Script,
    Step,
    chunk,
    drip,
    event,
    finish,
    good,
    head,
    role,
    token,
    usage,
    whole,
)
from tests.test_client import BUSY, DEAD, DRIPS, LONG, Stale, made, run, shot

ROOT = Path(__file__).resolve().parent.parent
STAMPS = ("due_ns", "end_ns", "sent_ns", "headers_ns", "first_ns", "first_visible_ns",
          "role_ns", "finish_ns", "connect_wait_ns")
TRANSPORT = (Outcome.DISCONNECTED, Outcome.ABORTED)  # who speaks of an abort's end: the library
LIBRARY = re.compile(r"(HttpParser\w*|ClientResponseError|BadStatusLine|ValueError): ")
HOST_STALLS_S = 8.0  # on a shared host; no deadline that a test counts on is shorter


class Child:
    """The process in which gevent lives."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gevent_client"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lock = threading.Lock()

    async def ask(self, url: str, timeouts: dict[str, str] | None = None,
                  mixed: list[dict[str, Any]] | None = None, throttle_status: Sequence[int] = (),
                  **case: Any) -> list[RequestRecord]:
        """The records of a Case; `mixed`: the classes of its scenario."""
        mix = {"name": "t", "timeouts": {**LONG, **(timeouts or {})},
               "throttle_status": list(throttle_status),
               "classes": mixed or [{"name": "c", "kind": "chat", "prompt_tokens": 32,
                                       "output_tokens": 8}]}
        return await asyncio.to_thread(self._ask, {"url": url, "mix": mix, **case})

    def _ask(self, case: dict[str, Any]) -> list[RequestRecord]:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
            return msgspec.json.decode(self._line(), type=list[RequestRecord])

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # a test failed in the middle of a case
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with ready() as process:
        yield process


@contextlib.contextmanager
def ready() -> Iterator[Child]:
    process = Child()
    try:
        assert process._line() == "ready\n"
        yield process
    finally:
        process.close()


def scripted(scripts: Sequence[Script]) -> RawServer:
    """Answers with these, the last one again and again."""
    return RawServer(lambda k: scripts[min(k, len(scripts) - 1)])


def answers(child: Child, scripts: Sequence[Script], n: int = 1,
            **case: Any) -> tuple[list[RequestRecord], RawServer]:
    """Records of n requests of one Locust user, one after the other."""
    found: list[RequestRecord] = []
    server = scripted(scripts)

    async def test() -> None:
        async with server:
            found.extend(await child.ask(server.url, n=n, **case))
    run(test())
    for r in found:
        check_order(r)
    return found, server


def answer(child: Child, script: Script, **case: Any) -> RequestRecord:
    return answers(child, [script], **case)[0][0]


def check_order(r: RequestRecord) -> None:
    stamps = [x for x in (r.due_ns, r.sent_ns, r.headers_ns, r.first_ns, r.last_ns)
              if x is not None]
    assert stamps == sorted(stamps)
    assert r.end_ns >= stamps[-1] - 1000  # gaps are kept to 1 µs


def both(child: Child, scripts: Sequence[Script], n: int | None = None, timeouts: dict[str, str]
         | None = None, abandon_after_s: float | None = None, throttle_status: Sequence[int] = (),
         ) -> list[tuple[RequestRecord, RequestRecord]]:
    """The records of both clients of requests that are answered by `scripts`, one by one."""
    n = len(scripts) if n is None else n
    ours: list[RequestRecord] = []
    theirs: list[RequestRecord] = []

    async def test() -> None:
        mix = made(timeouts, throttle_status=list(throttle_status))
        async with (scripted(scripts) as server,
                    Client(Target(server.url, "m"), mix) as client):
            ours.extend([await client.send(shot(k, abandon_after_s=abandon_after_s))
                         for k in range(n)])
        async with scripted(scripts) as server:
            theirs.extend(await child.ask(server.url, timeouts, throttle_status=throttle_status,
                                          n=n, abandon_after_s=abandon_after_s))
    run(test())
    for r in theirs:
        check_order(r)
    return list(zip(ours, theirs, strict=True))


def without_stamps(r: RequestRecord) -> dict[str, Any]:
    """All of a record that must be the same; of what may differ, whether it is there."""
    found: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(r, stamp_kind="user"))
    found |= {name: getattr(r, name) is not None for name in STAMPS}
    found |= {"gaps_us": len(r.gaps_us), "reads": sum(r.reads) if r.reads else r.n_events}
    if r.outcome in TRANSPORT or LIBRARY.match(r.error or ""):
        found["error"] = r.error is not None
    return found


def assert_same(pairs: list[tuple[RequestRecord, RequestRecord]], names: Sequence[object]) -> None:
    for (ours, theirs), name in zip(pairs, names, strict=True):
        assert without_stamps(theirs) == without_stamps(ours), (name, ours.error, theirs.error)


# ------------------------------------------------------------------- one byte stream, one record


def framed(capture: Capture) -> bytes:
    """The body with its chunks as the server cut it; without the last one where it never came."""
    return b"".join(chunk(x) for x in capture.chunks) + (LAST if capture.whole else b"")


def head_of(capture: Capture, framing: str) -> bytes:
    more = {"chunked": {"transfer_encoding": "chunked"}, "close": {"connection": "close"},
            "length": {"content_length": str(len(capture.body) + (not capture.whole))}}[framing]
    own = {k.replace("-", "_"): v for k, v in capture.headers.items()
           if k not in ("transfer-encoding", "content-length", "connection")}
    return head(f"{capture.status} X", **own, **more)


def cut(data: bytes, size: int) -> list[Step]:
    """In pieces, each with an instant to be read before the next one comes."""
    return [x for at in range(0, len(data), size) for x in (data[at:at + size], 0.001)]


def replays(capture: Capture) -> dict[str, Script]:
    """One capture in the ways that a server, a proxy and a network may send it."""
    wire, end = framed(capture), [] if capture.whole else [FIN]
    chunks: list[Step] = [x for c in capture.chunks for x in (chunk(c), 0.001)]
    size = max(7, len(wire) // 120)
    return {
        "as the server cut it": [head_of(capture, "chunked"), *chunks,
                                 *([LAST] if capture.whole else []), *end],
        "all at once": [head_of(capture, "chunked") + wire, *end],
        "cut at odd places": [*cut(head_of(capture, "chunked") + wire, size), *end],
        "ended by the close of the connection": [
            *cut(head_of(capture, "close") + capture.body, size + 4), FIN],
        "with a content length": [*cut(head_of(capture, "length") + capture.body, size + 9), *end],
        "in one chunk": [head_of(capture, "chunked") + chunk(capture.body)
                         + (LAST if capture.whole else b""), *end],
        "reset after its last byte": [head_of(capture, "chunked") + wire.removesuffix(LAST), 0.05,
                                      RST],
    }


@pytest.mark.parametrize("name", captures.names(""))
def test_a_recorded_answer_gives_both_clients_the_same_record(child: Child, name: str) -> None:
    ways = replays(captures.load(name))
    assert_same(both(child, list(ways.values())), list(ways))


@pytest.mark.parametrize("name", ["10_chat_stream_usage", "78_sigterm_api_midstream",
                                  "52_err_bad_model"])
def test_an_answer_that_breaks_off_anywhere_gives_both_clients_the_same_record(
        child: Child, name: str) -> None:
    capture = captures.load(name)
    head, body = head_of(capture, "chunked"), b"".join(chunk(x) for x in capture.chunks[:3]) + LAST
    end = len(body) - len(LAST) + 1  # http.client asks for no more than the last chunk's 0
    at = sorted({*range(0, end, 61), *range(end - 70, end)})
    assert_same(both(child, [[head + body[:n], FIN] for n in at]), at)


def test_a_head_that_breaks_off_is_a_failure_of_the_server(child: Child) -> None:
    """http.client takes half a head for a whole one, so that it may be another failure."""
    at = range(0, len(HEAD), 7)
    failures = {Outcome.DISCONNECTED, Outcome.BAD_STREAM, Outcome.EMPTY}
    for (ours, theirs), n in zip(both(child, [[HEAD[:n], FIN] for n in at]), at, strict=True):
        assert {ours.outcome, theirs.outcome} <= failures, (n, ours.outcome, theirs.outcome)


SCRIPTS: dict[str, Script] = {
    "whole": good(),
    "without done": [HEAD + token() * 2 + finish() + LAST],
    "error event": [HEAD + token() * 2 + event({"error": DEAD}) + DONE + LAST],
    "error event, then a finish": [HEAD + token() + event({"error": DEAD}) + finish() + usage(1)
                                   + DONE + LAST],
    "full queue": [HEAD + event({"error": BUSY}) + DONE + LAST],
    "no finish reason": [HEAD + token() * 2 + DONE + LAST],
    "abort": [HEAD + token() + finish("abort") + DONE + LAST],
    "no JSON": [HEAD + token() + chunk(b'data: {"choices": [broken\n\n') + token() + LAST],
    "no UTF-8": [HEAD + token() + chunk(b"data: \xff\xfe\n\n") + finish() + DONE + LAST],
    "JSON instead of a stream": [whole("200 OK", b'{"choices":[{"message":{"content":"hi"}}]}')],
    "empty": [HEAD + LAST],
    "empty with a length": [head(content_type="text/event-stream", content_length="0")],
    "role and end": [HEAD + role() + finish() + usage(0) + DONE + LAST],
    "pings": [HEAD + PING + token() + PING + finish() + usage(1) + DONE + LAST],
    "closed after it": [*good(), FIN],
    "HTTP/1.0": [b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
                 b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
                 b"data: [DONE]\n\n", FIN],
    "429": [whole("429 Too Many Requests", b"", retry_after="1")],
    "529, named": [whole("529 Overloaded", b"{}")],
    "503": [whole("503 Service Unavailable", b'{"error":"backend is down"}')],
    "a page": [whole("502 Bad Gateway", b"<h1>502</h1>", content_type="text/html")],
    "a page with status 200": [whole("200 OK", b"<h1>Hi</h1>", content_type="text/html")],
    "a page called a stream": [HEAD + chunk(b"<h1>") + chunk(b"Hi</h1>") + LAST],
    "a page that breaks": [head(content_type="text/html", content_length="900") + b"<h1>Hi", FIN],
    "redirect": [whole("307 Temporary Redirect", b"", location="/other")],
    "short body": [head(content_type="text/event-stream", content_length="5000")
                   + b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', 0.05, FIN],
    "error body that breaks": [head("500 Oh", content_type="application/json",
                                    content_length="1000") + b'{"error":"half', RST],
    "reset in the stream": [HEAD + role() + token(), 0.1, token(), 0.1, RST],
    "finish, then a break": [HEAD + token() + finish(), 0.05, FIN],
    "end, then a reset": [HEAD + token() + finish() + usage(1) + DONE, 0.05, RST],
    "a big event": [HEAD + token("a") + token("y" * 700_000), 0.05, token("c"),
                    finish() + usage(3) + DONE + LAST],
    "no HTTP": [b"220 smtp.example.org ESMTP\r\n", FIN],
    "TLS": [b"\x15\x03\x01\x00\x02\x02\x46", FIN],
    "nonsense status": [b"HTTP/1.1 nonsense\r\n\r\n", FIN],
}


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_each_kind_of_answer_gives_both_clients_the_same_record(child: Child, name: str) -> None:
    assert_same(both(child, [SCRIPTS[name]], throttle_status=[529]), [name])


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_an_answer_does_not_spoil_the_next_one(child: Child, name: str) -> None:
    found, _ = answers(child, [SCRIPTS[name], good()], n=2)
    assert (found[1].outcome, found[1].n_events) == (Outcome.OK, 3)


# ----------------------------------------------------------------------- each outcome, of Stream


def test_a_whole_answer_is_ok_with_its_stamps_and_tokens(child: Child) -> None:
    r = answer(child, [HEAD + role() + token("a"), 0.05, token("b"), 0.05, token(""),
                       finish("length") + usage(3, 10) + DONE + LAST])
    assert (r.outcome, r.error, r.status, r.finish_reason) == (Outcome.OK, None, 200, "length")
    assert (r.output_tok, r.prompt_tok, r.tok_source, r.n_events) == (3, 10, "usage", 3)
    assert min(r.gaps_us) >= 40_000
    assert r.connect_wait_ns is not None
    assert r.connect_wait_ns > 0
    assert (r.stale_retries, r.first_visible_ns) == (0, r.first_ns)


def test_the_request_that_goes_over_the_wire_is_the_shots(
        child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "你好" * 30_000}]})
    found, server = answers(child, [good()], bodies=[body],
                            headers={"X-Team": "search", "Authorization": "Bearer k"})
    assert found[0].outcome is Outcome.OK
    assert server.requests[0].body == body.encode()
    lines = server.requests[0].head.lower().split("\r\n")
    assert lines[0] == "post /v1/chat/completions http/1.1"
    for line in ("x-team: search", "authorization: bearer k", "content-type: application/json",
                 "accept-encoding: identity", f"content-length: {len(body.encode())}"):
        assert line in lines


def test_an_answer_that_is_compressed_against_our_wish_is_read(child: Child) -> None:
    body = gzip.compress(b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}'
                         b"\n\ndata: [DONE]\n\n")
    r = answer(child, [whole("200 OK", body, content_type="text/event-stream",
                             content_encoding="gzip")])
    assert (r.outcome, r.n_events) == (Outcome.OK, 1)


def test_one_user_keeps_its_connection(child: Child) -> None:
    found, server = answers(child, [good()], n=20)
    assert {r.outcome for r in found} == {Outcome.OK}
    assert server.connections == 1
    assert [r.connect_wait_ns is None for r in found] == [False] + [True] * 19


def test_many_users_are_in_flight_at_once_each_on_its_connection(child: Child) -> None:
    async def test() -> None:
        go = asyncio.Event()
        async with RawServer(lambda _: [HEAD + token(), go, finish() + usage(1) + DONE + LAST]
                             ) as server:
            asking = asyncio.create_task(child.ask(server.url, n=100, together=True))
            await server.until(lambda: server.inflight == 100, 20)
            go.set()
            assert {r.outcome for r in await asking} == {Outcome.OK}
            assert server.connections == 100
    run(test())


def test_a_refused_connection_is_connect_failed(child: Child) -> None:
    r = asyncio.run(child.ask(f"http://127.0.0.1:{free_port()}"))[0]
    assert r.outcome is Outcome.CONNECT_FAILED
    assert (r.sent_ns, r.headers_ns, r.first_ns, r.status) == (None,) * 4
    assert r.error
    assert "refused" in r.error


def test_a_name_that_cannot_be_resolved_is_connect_failed(child: Child) -> None:
    r = asyncio.run(child.ask("http://no-such-host.invalid:1"))[0]
    assert r.outcome is Outcome.CONNECT_FAILED
    assert "no-such-host.invalid" in (r.error or "")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://127.0.0.1:1", "http://", "http://[::1",
                                 "http://127.0.0.1:99999"])
def test_no_address_whatever_raises_for_a_request(child: Child, url: str) -> None:
    r = asyncio.run(child.ask(url))[0]
    assert r.outcome in (Outcome.CONNECT_FAILED, Outcome.BAD_STREAM, Outcome.DROPPED)
    assert r.error


def test_headers_that_cannot_be_sent_are_dropped(child: Child) -> None:
    found, server = answers(child, [good()], headers={"X-A": "b\r\nX-B: c"})
    assert found[0].outcome is Outcome.DROPPED
    assert not server.requests


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_without_file_descriptors_the_request_is_dropped_not_the_servers_failure(
        host: str) -> None:
    """In a process of its own: sockets of other tests, closed late, would give theirs back."""
    async def test() -> None:
        async with RawServer(lambda _: good()) as server:
            url = server.url.replace("127.0.0.1", host)
            first, second = await fresh.ask(url, n=2, without_descriptors=True)
            assert (first.outcome, first.sent_ns) == (Outcome.DROPPED, None)
            assert first.error
            assert second.outcome is Outcome.OK
    with ready() as fresh:
        run(test())


@pytest.mark.parametrize("drip", list(DRIPS))
def test_without_a_token_in_time_the_first_token_timed_out(child: Child, drip: str) -> None:
    r = answer(child, DRIPS[drip], timeouts={"first_token": "400ms"})
    assert (r.outcome, r.n_events) == (Outcome.TIMEOUT_FIRST_TOKEN, 0)
    assert r.sent_ns is not None
    assert 0.39e9 < r.end_ns - r.due_ns < HOST_STALLS_S * 1e9


@pytest.mark.parametrize("then", [[HOLD], drip(PING, 0.1, 100),
                                  drip(event({"choices": []}), 0.1, 100)])
def test_silence_after_token_k_is_a_stall_that_pings_do_not_end(
        child: Child, then: list[Step]) -> None:
    r = answer(child, [HEAD + role() + token() * 4, *then], timeouts={"stall": "400ms"})
    assert (r.outcome, r.n_events, r.status) == (Outcome.STALLED, 4, 200)
    assert 0.39e9 < r.end_ns - (r.last_ns or 0) < HOST_STALLS_S * 1e9


def test_each_token_moves_the_stall_deadline(child: Child) -> None:
    r = answer(child, [HEAD, *drip(token(), 0.4, 6), finish() + usage(6) + DONE + LAST],
               timeouts={"stall": "2s"})
    assert (r.outcome, r.n_events) == (Outcome.OK, 6)


def test_a_slow_drip_of_tokens_ends_at_the_total(child: Child) -> None:
    r = answer(child, [HEAD, *drip(token(), 0.05, 300)], timeouts={"total": "600ms"})
    assert r.outcome is Outcome.TIMEOUT_TOTAL
    assert r.n_events >= 1
    assert r.end_ns - r.due_ns < HOST_STALLS_S * 1e9


def test_two_classes_of_timeouts_do_not_mix(child: Child) -> None:
    classes = [{"name": n, "kind": "chat", "prompt_tokens": 32, "output_tokens": 8, **more}
               for n, more in (("c", {}), ("hasty", {"timeouts": {
                   "first_token": "300ms", "stall": "9s", "total": "9s"}}))]
    found, _ = answers(child, [[HEAD, 1.5, *good()[1:]]], n=2, classes=["c", "hasty"],
                       together=True, mixed=classes)
    assert [r.outcome is Outcome.TIMEOUT_FIRST_TOKEN for r in found] == [False, True]


def test_a_server_that_keeps_the_body_open_does_not_delay_the_end(child: Child) -> None:
    before_ns = time.monotonic_ns()
    r = answer(child, [HEAD + token() + finish() + usage(1) + DONE, HOLD])
    assert r.outcome is Outcome.OK
    assert r.end_ns - (r.last_ns or 0) < 500_000_000
    assert time.monotonic_ns() - before_ns < HOST_STALLS_S * 1e9


def test_a_client_that_leaves_by_plan_has_abandoned_and_keeps_what_it_saw(child: Child) -> None:
    async def test() -> None:
        async with RawServer(lambda _: [HEAD + token() * 2, HOLD]) as server:
            r = (await child.ask(server.url, abandon_after_s=0.5))[0]
            assert (r.outcome, r.n_events, r.finish_reason) == (Outcome.ABANDONED, 2, None)
            await server.until(lambda: server.inflight == 0)  # HOLD ends at the client's FIN
    run(test())


@pytest.mark.parametrize("end", [FIN, RST])
def test_a_break_before_any_answer_on_a_fresh_connection_is_not_retried(
        child: Child, end: Step) -> None:
    found, server = answers(child, [[end], good()])
    assert (found[0].outcome, found[0].stale_retries) == (Outcome.DISCONNECTED, 0)
    assert len(server.requests) == 1


@pytest.mark.parametrize("end", [FIN, RST])
def test_a_break_on_a_connection_that_had_to_be_made_again_is_not_retried(
        child: Child, end: Step) -> None:
    """The server closed the first one in peace; what breaks then is fresh, not stale."""
    found, server = answers(child, [[*good(), FIN], [end], good()], n=2)
    assert [r.outcome for r in found] == [Outcome.OK, Outcome.DISCONNECTED]
    assert found[1].stale_retries == 0
    assert found[1].connect_wait_ns is not None
    assert len(server.requests) == 2


@pytest.mark.parametrize("end", [FIN, RST])
def test_a_stale_connection_is_retried_once_on_a_fresh_one(child: Child, end: Step) -> None:
    async def test() -> None:
        stale = Stale(end)
        async with stale.server as server:
            first, second = await child.ask(server.url, n=2)
            assert (first.outcome, first.stale_retries) == (Outcome.OK, 0)
            assert (second.outcome, second.stale_retries, second.n_events) == (Outcome.OK, 1, 3)
            assert second.connect_wait_ns is not None  # the fresh connection's
            assert [x.connection for x in server.requests] == [0, 0, 1]
            assert [x.body for x in server.requests] == [b"{}"] * 3
    run(test())


@pytest.mark.parametrize("end", [FIN, RST])
def test_a_retry_that_breaks_as_well_is_disconnected(child: Child, end: Step) -> None:
    async def test() -> None:
        stale = Stale(end, broken=1)
        async with stale.server as server:
            records = await child.ask(server.url, n=2)
            assert records[1].outcome is Outcome.DISCONNECTED
            assert records[1].stale_retries == 1
            assert len(server.requests) == 3
    run(test())


def test_a_break_after_the_head_is_not_retried_on_a_kept_connection(child: Child) -> None:
    found, server = answers(child, [good(), [HEAD, 0.05, RST]], n=2)
    assert [r.outcome for r in found] == [Outcome.OK, Outcome.DISCONNECTED]
    assert found[1].stale_retries == 0
    assert len(server.requests) == 2


@pytest.mark.parametrize("junk", [b"zz\r\nnot a chunk size\r\n", b"5\r\ntoo long for five\r\n"])
@pytest.mark.parametrize("pause", [[], [0.1]])
def test_a_chunk_that_is_none_is_a_bad_stream_with_the_stamps_before(
        child: Child, junk: bytes, pause: list[Step]) -> None:
    r = answer(child, [HEAD + token(), *pause, junk, HOLD])
    assert (r.outcome, r.status) == (Outcome.BAD_STREAM, 200)
    assert r.n_events == 1
    assert r.error


def test_a_line_without_end_is_a_bad_stream_and_bounded(child: Child) -> None:
    pieces: list[Step] = [chunk(b"x" * 2**20) for _ in range(40)]
    r = answer(child, [HEAD, *pieces, HOLD])
    assert r.outcome is Outcome.BAD_STREAM
    assert "line" in (r.error or "")


@pytest.mark.parametrize(("kill_at", "script", "seen"), [
    (0, [HOLD], (0, None)), (0, [HEAD, HOLD], (0, 200)),
    (2, [HEAD + role() + token() * 2, HOLD], (2, 200))])
def test_a_killed_user_leaves_a_record_with_what_had_come(
        child: Child, kill_at: int, script: Script, seen: tuple[int, int | None]) -> None:
    async def test() -> None:
        async with RawServer(lambda _: script) as server:
            r = (await child.ask(server.url, kill_at=kill_at))[0]
            assert (r.outcome, r.n_events, r.status) == (Outcome.CANCELLED, *seen)
            assert r.sent_ns is not None
            await server.until(lambda: server.inflight == 0)  # the connection is closed
    run(test())


# ---------------------------------------------------------------------------------- right stamps


Framed = Callable[[bytes], bytes]
FIRST, SECOND = (json.dumps({"choices": [{"delta": {"content": x}, "finish_reason": y}]}).encode()
                 for x, y in (("a", None), ("b", "stop")))
FIRST, SECOND = b"data: " + FIRST + b"\n\n", b"data: " + SECOND + b"\n\ndata: [DONE]\n\n"
FRAMINGS: dict[str, tuple[dict[str, str], Framed, bytes]] = {
    "chunked": ({"transfer_encoding": "chunked"}, chunk, LAST),
    "with a content length": ({"content_length": str(len(FIRST + SECOND))}, bytes, b""),
    "ended by the close": ({"connection": "close"}, bytes, b""),
}


@pytest.mark.parametrize("framing", list(FRAMINGS))
def test_a_small_first_event_is_stamped_when_it_comes_not_when_a_buffer_is_full(
        child: Child, framing: str) -> None:
    """The server holds the second event back until it is told that the first one was seen: the
    client's own stamp of it must lie before that. `iter_lines` of FastHttpUser fails here."""
    more, frame, last = FRAMINGS[framing]

    async def attempt() -> tuple[float, float, float]:
        wrote: list[int] = []

        class Stamps(asyncio.Event):
            async def wait(self) -> Any:
                wrote.append(time.monotonic_ns())

        stamp = Stamps()
        script: list[Step] = [head(content_type="text/event-stream", **more), 0.1, stamp,
                              frame(FIRST), 0.6, stamp, frame(SECOND) + last, FIN]
        async with RawServer(lambda _: script) as server:
            r = (await child.ask(server.url))[0]
        assert (r.outcome, r.n_events) == (Outcome.OK, 2)
        assert r.first_ns is not None
        assert r.sent_ns is not None
        assert r.headers_ns is not None
        assert wrote[0] <= r.first_ns  # one clock on one host
        assert wrote[1] <= (r.last_ns or 0) + 1000
        return ((r.first_ns - wrote[0]) / 1e9, (r.headers_ns - r.sent_ns) / 1e9,
                (wrote[1] - r.first_ns) / 1e9)

    tries = [asyncio.run(asyncio.wait_for(attempt(), 30)) for _ in range(3)]
    late_s, headers_s, before_s = min(tries)
    assert late_s < 0.05  # of some 0.1 ms; a host that stalls may do so in two tries of three
    assert headers_s < 0.1
    assert before_s > 0.4  # a reader that waits for more has the first one with the second


def test_the_head_is_stamped_when_it_is_sent_not_when_the_body_has_gone(child: Child) -> None:
    """A server that does not read: 8 MB of prompt do not fit into the sockets' buffers."""
    async def test() -> None:
        reading = asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reading.wait()
            at_ns.append(time.monotonic_ns())
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(8_000_000)
            writer.write(b"".join(x for x in good() if isinstance(x, bytes)))
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        at_ns: list[int] = []
        server = await asyncio.start_server(slow, "127.0.0.1", 0, limit=2**16)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            asking = asyncio.create_task(child.ask(url, bodies=["x" * 8_000_000]))
            await asyncio.sleep(0.3)
            reading.set()
            r = (await asking)[0]
            assert r.outcome is Outcome.OK, r.error
            assert (r.sent_ns or 0) < at_ns[0]
    run(test())


def test_a_flood_to_one_user_neither_starves_the_others_nor_outlives_its_deadline(
        child: Child) -> None:
    """The socket has always more to read: whoever reads on without a pause keeps all others from
    their stamps, and the deadlines from passing."""
    flood = (token("x" * 50) * 2000, 0.0)

    def script(k: int) -> Script:
        return [HEAD, *(flood * 3000)] if k == 0 else [HEAD + token(), 0.3, *good()[1:]]

    async def test() -> None:
        async with RawServer(script) as server:
            found = await child.ask(server.url, {"total": "3s"}, n=3, together=True)
        flooded = [r for r in found if r.outcome is Outcome.TIMEOUT_TOTAL]
        others = [r for r in found if r.outcome is Outcome.OK]
        assert (len(flooded), len(others)) == (1, 2)
        assert flooded[0].n_events > 5000
        assert flooded[0].end_ns - flooded[0].due_ns < HOST_STALLS_S * 1e9
        assert max(r.end_ns - r.due_ns for r in others) < 2.9e9  # it did not wait for the flood
    run(test())
