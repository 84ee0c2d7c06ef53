"""Every outcome of a request, each against a server that produces it, over a real socket."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from loadgen import net, openai, scenario
from loadgen.client import Client
from loadgen.connection import Connection
from loadgen.errors import LoadgenError
from loadgen.net import now_ns
from loadgen.record import Outcome, RequestRecord, Shot
from loadgen.scenario import Scenario
from loadgen.target import Target
from servers.base import free_port
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

LONG = {"first_token": "15s", "stall": "15s", "total": "30s"}  # none of these is to fire
BUSY = {"message": "The engine is currently busy and cannot accept new requests.",
        "type": "Service Unavailable", "param": None, "code": 503}
DEAD = {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        "type": "InternalServerError", "param": None, "code": 500}


def made(timeouts: dict[str, str] | None = None, **more: Any) -> Scenario:
    """A scenario of one class; its timeouts are long but for those named."""
    return scenario.parse({
        "name": "t", "timeouts": {**LONG, **(timeouts or {})},
        "classes": [{"name": "c", "kind": "chat", "prompt_tokens": 32, "output_tokens": 8}],
        **more}, "test")


def shot(seq: int = 0, body: bytes = b"{}", abandon_after_s: float | None = None) -> Shot:
    return Shot(leg="l", shard=0, seq=seq, session=seq, turn=0, cls="c", due_ns=now_ns(),
                body=body, max_tokens=8, abandon_after_s=abandon_after_s)


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test, 40)

    with asyncio.Runner(loop_factory=net.new_loop) as runner:
        runner.run(limited())


def answer(script: Script, timeouts: dict[str, str] | None = None,
           abandon_after_s: float | None = None, **more: Any) -> RequestRecord:
    """The record of one request that is answered by `script`."""
    return answers([script], timeouts, abandon_after_s, **more)[0][0]


def answers(scripts: list[Script], timeouts: dict[str, str] | None = None,
            abandon_after_s: float | None = None, n: int = 1,
            **more: Any) -> tuple[list[RequestRecord], RawServer]:
    """Records of n requests, one after the other, on one client; answers come from `scripts`,
    the last one again and again."""
    found: list[RequestRecord] = []
    server = RawServer(lambda k: scripts[min(k, len(scripts) - 1)])

    async def test() -> None:
        async with server, Client(Target(server.url, "m"), made(timeouts, **more)) as client:
            for k in range(n):
                r = await client.send(shot(k, abandon_after_s=abandon_after_s))
                found.append(r)
            assert client.inflight == 0
    run(test())
    for r in found:
        stamps = [x for x in (r.due_ns, r.sent_ns, r.headers_ns, r.first_ns, r.last_ns)
                  if x is not None]
        assert stamps == sorted(stamps)
        assert r.end_ns >= stamps[-1] - 1000  # gaps are kept to 1 µs
        assert (r.error is None) == (r.outcome is Outcome.OK) or r.error is None
    return found, server


# --------------------------------------------------------------------------------- what is good


def test_a_whole_answer_is_ok_with_its_stamps_and_tokens() -> None:
    r = answer([HEAD + role() + token("a"), 0.05, token("b"), 0.05, token(""),
                finish("length") + usage(3, 10) + DONE + LAST])
    assert r.outcome is Outcome.OK
    assert r.error is None
    assert (r.status, r.finish_reason) == (200, "length")
    assert (r.output_tok, r.prompt_tok, r.tok_source) == (3, 10, "usage")
    assert r.n_events == 3
    assert min(r.gaps_us) >= 40_000
    assert r.connect_wait_ns is not None
    assert r.connect_wait_ns > 0
    assert r.stale_retries == 0
    assert r.inflight == 1
    assert r.first_visible_ns == r.first_ns


def test_the_request_that_goes_over_the_wire_is_the_shots() -> None:
    async def test() -> None:
        async with RawServer(lambda _: good()) as server:
            target = Target(server.url, "m", {"X-Team": "search", "Authorization": "Bearer k"})
            cls = made().classes[0]
            body = openai.body("chat", "m", "你好", 8, cls)
            async with Client(target, made()) as client:
                assert (await client.send(shot(body=body))).outcome is Outcome.OK
            got = server.requests[0]
            assert got.body == body
            lines = got.head.lower().split("\r\n")
            assert lines[0] == "post /v1/chat/completions http/1.1"
            for line in ("x-team: search", "authorization: bearer k",
                         "content-type: application/json", "accept-encoding: identity"):
                assert line in lines
    run(test())


def test_completions_go_to_their_own_path() -> None:
    text = event({"choices": [{"index": 0, "text": "a", "finish_reason": "length"}]})
    found, server = answers([[HEAD + text + usage(1) + DONE + LAST]], endpoint="completions")
    assert found[0].outcome is Outcome.OK
    assert server.requests[0].head.startswith("POST /v1/completions ")


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "content_filter"])
def test_each_proper_finish_reason_is_ok(reason: str) -> None:
    assert answer([HEAD + token() + finish(reason) + DONE + LAST]).outcome is Outcome.OK


def test_an_answer_without_done_and_without_usage_is_ok_if_it_ends_cleanly() -> None:
    r = answer([HEAD + token() + token() + finish() + LAST])
    assert r.outcome is Outcome.OK
    assert (r.output_tok, r.tok_source) == (2, "events")


def test_a_break_after_the_streams_proper_end_is_no_failure() -> None:
    for last in ([RST], [FIN], [HOLD]):
        r = answer([HEAD + token() + finish() + usage(1) + DONE, *last])
        assert r.outcome is Outcome.OK, last


def test_a_server_that_keeps_the_body_open_does_not_delay_the_end() -> None:
    """Neither the record's end, nor (by more than a second) the slot's next request."""
    before_ns = now_ns()
    r = answer([HEAD + token() + finish() + usage(1) + DONE, HOLD])
    assert r.outcome is Outcome.OK
    assert r.end_ns - (r.last_ns or 0) < 500_000_000
    assert now_ns() - before_ns < 8_000_000_000


def test_a_body_that_is_kept_open_is_noticed_where_lines_end_with_crlf() -> None:
    """As sse-starlette writes them."""
    events = [b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}]}',
              b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}',
              b"data: [DONE]"]
    before_ns = now_ns()
    r = answer([HEAD + b"".join(chunk(x + b"\r\n\r\n") for x in events), HOLD])
    assert (r.outcome, r.n_events) == (Outcome.OK, 1)
    assert now_ns() - before_ns < 8_000_000_000


def test_a_body_that_is_kept_open_is_noticed_behind_any_backlog() -> None:
    """The whole answer is there before the client comes to set its deadline."""
    async def test() -> None:
        script: Script = [HEAD + token() + finish() + usage(1) + DONE, HOLD]
        async with (RawServer(lambda _: script) as server,
                    Client(Target(server.url, "m"), made()) as client):
            await client.open_connections(1)
            for _ in range(100):
                client.later(lambda: time.sleep(0.001))
            before_ns = now_ns()
            r = await client.send(shot())
            assert r.outcome is Outcome.OK
            assert now_ns() - before_ns < 8_000_000_000
            assert client.tally.lingered == 1
    run(test())


def test_full_reads_are_counted_also_where_they_end_with_an_event() -> None:
    """As all do, if events have one length that divides a read's."""
    one = token("x" * (256 - len(token(""))))
    assert len(one) == 256

    async def test() -> None:
        script: Script = [HEAD + role(), 0.1, one * 4096, finish() + usage(4096) + DONE + LAST]
        async with (RawServer(lambda _: script) as server,
                    Client(Target(server.url, "m"), made()) as client):
            r = await client.send(shot())
            assert (r.outcome, r.n_events) == (Outcome.OK, 4096)
            assert client.tally.full_reads > 0
    run(test())


@pytest.mark.parametrize("cut", [1, 7, 64])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_events_cut_at_any_byte_give_the_same_record(cut: int, newline: bytes) -> None:
    body = b"".join(x.split(b"\r\n", 1)[1][:-2] for x in (
        role(), token("é中"), PING, token("b"), finish("length"), usage(2), DONE))
    body = body.replace(b"\n", newline)
    pieces: list[Step] = [chunk(body[i:i + cut]) for i in range(0, len(body), cut)]
    r = answer([HEAD, *pieces, LAST])
    assert r.outcome is Outcome.OK
    assert (r.n_events, r.output_tok, r.finish_reason) == (2, 2, "length")


def test_an_event_of_700_kb_is_one_token_event() -> None:
    r = answer([HEAD + token("a"), token("y" * 700_000), 0.05, token("c"), finish() + usage(3)
                + DONE + LAST])
    assert r.outcome is Outcome.OK
    assert r.n_events == 3


def test_events_of_one_read_share_a_stamp_and_say_so() -> None:
    r = answer([HEAD + token() * 3, 0.1, token(), finish() + usage(4) + DONE + LAST])
    assert r.outcome is Outcome.OK
    assert r.n_events == 4
    assert r.reads is not None
    assert sum(r.reads) == 4
    assert r.gaps_us[:2] == [0, 0]
    assert r.gaps_us[2] > 50_000


def test_200_requests_are_in_flight_at_once() -> None:
    async def test() -> None:
        go = asyncio.Event()
        async with (RawServer(lambda _: [HEAD + token(), go, finish() + usage(1) + DONE + LAST])
                    as server, Client(Target(server.url, "m"), made()) as client):
            tasks = [asyncio.create_task(client.send(shot(k))) for k in range(200)]
            await server.until(lambda: server.inflight == 200, 20)
            assert client.inflight == 200
            go.set()
            records = await asyncio.gather(*tasks)
            assert {r.outcome for r in records} == {Outcome.OK}
            assert sorted(r.inflight or 0 for r in records) == list(range(1, 201))
            assert sorted(r.seq for r in records) == list(range(200))
            assert server.connections == 200
    run(test())


def test_opened_connections_are_used_by_the_requests() -> None:
    async def test() -> None:
        async with (RawServer(lambda _: good()) as server,
                    Client(Target(server.url, "m"), made()) as client):
            await client.open_connections(20)
            opened = server.connections
            records = await asyncio.gather(*(client.send(shot(k)) for k in range(opened)))
            assert {r.outcome for r in records} == {Outcome.OK}
            assert {r.connect_wait_ns for r in records} == {None}
            assert server.connections == opened >= 1
    run(test())


# ------------------------------------------------------------------------- aborted and abandoned


def test_finish_reason_abort_is_aborted() -> None:
    r = answer([HEAD + token() + finish("abort") + DONE + LAST])
    assert (r.outcome, r.finish_reason, r.n_events) == (Outcome.ABORTED, "abort", 1)


def test_a_client_that_leaves_by_plan_has_abandoned_and_keeps_what_it_saw() -> None:
    r = answer([HEAD + token() + token(), HOLD], abandon_after_s=0.3)
    assert (r.outcome, r.n_events, r.finish_reason) == (Outcome.ABANDONED, 2, None)


def test_a_client_may_abandon_before_the_first_token() -> None:
    r = answer([HOLD], abandon_after_s=0.3)
    assert (r.outcome, r.n_events, r.status) == (Outcome.ABANDONED, 0, None)


def test_an_answer_that_was_whole_in_time_is_not_abandoned() -> None:
    assert answer(good(), abandon_after_s=20.0).outcome is Outcome.OK


def test_the_server_sees_that_the_client_has_left() -> None:
    async def test() -> None:
        async with (RawServer(lambda _: [HEAD + token(), HOLD]) as server,
                    Client(Target(server.url, "m"), made()) as client):
            r = await client.send(shot(abandon_after_s=0.3))
            assert r.outcome is Outcome.ABANDONED
            await server.until(lambda: server.inflight == 0)  # HOLD ends at the client's FIN
    run(test())


# --------------------------------------------------------------------- throttled and HTTP errors


@pytest.mark.parametrize(("script", "status"), [
    ([whole("429 Too Many Requests", b"")], 429),
    ([whole("429 Too Many Requests", b'{"error":{"message":"slow","code":429}}',
            retry_after="1")], 429),
    ([whole("503 Service Unavailable", b"<html>later</html>", content_type="text/html",
            retry_after="2")], 503),
    ([whole("503 Service Unavailable", json.dumps({"error": BUSY}).encode())], 503),
    ([whole("529 Overloaded", b"{}")], 529),
])
def test_a_server_that_is_full_throttles(script: Script, status: int) -> None:
    r = answer(script, throttle_status=[529])
    assert (r.outcome, r.status) == (Outcome.THROTTLED, status)
    assert str(status) in (r.error or "")


def test_an_error_event_of_a_full_queue_throttles() -> None:
    r = answer([HEAD + event({"error": BUSY}) + DONE + LAST])
    assert (r.outcome, r.status) == (Outcome.THROTTLED, 200)
    assert "cannot accept new requests" in (r.error or "")


def test_503_alone_and_statuses_not_named_are_http_errors() -> None:
    r = answer([whole("503 Service Unavailable", b'{"error":"backend is down"}')])
    assert (r.outcome, r.status) == (Outcome.HTTP_ERROR, 503)
    assert answer([whole("529 Overloaded", b"{}")]).outcome is Outcome.HTTP_ERROR


def test_evidence_of_a_death_wins_over_a_wish_to_be_asked_later() -> None:
    r = answer([whole("503 Service Unavailable", json.dumps({"error": DEAD}).encode(),
                      retry_after="1")])
    assert (r.outcome, r.status) == (Outcome.HTTP_ERROR, 503)


@pytest.mark.parametrize(("status", "body", "said"), [
    ("400 Bad Request", {"error": {"message": "max_tokens must be at least 1", "code": 400}},
     "max_tokens must be at least 1"),
    ("404 Not Found", {"error": {"message": "The model `x` does not exist.", "code": 404}},
     "The model `x` does not exist."),
    ("401 Unauthorized", {"error": "Unauthorized"}, "Unauthorized"),
    ("404 Not Found", {"detail": "Not Found"}, "Not Found"),
    ("500 Internal Server Error", {"error": DEAD}, "EngineCore encountered an issue"),
    ("422 Unprocessable Entity", [1, 2], "[1, 2]"),
])
def test_http_errors_keep_status_and_message(status: str, body: object, said: str) -> None:
    r = answer([whole(status, json.dumps(body).encode())])
    assert (r.outcome, r.status) == (Outcome.HTTP_ERROR, int(status[:3]))
    assert said in (r.error or "")
    assert r.first_ns is None


def test_an_error_page_that_is_no_json_is_kept_in_words() -> None:
    r = answer([whole("502 Bad Gateway", b"<h1>502 Bad Gateway</h1>", content_type="text/html")])
    assert (r.outcome, r.status) == (Outcome.HTTP_ERROR, 502)
    assert "502 Bad Gateway" in (r.error or "")


def test_an_error_body_that_is_no_utf8_is_an_http_error_still() -> None:
    r = answer([whole("500 Internal Server Error", b"\xff\xfe\x00broken")])
    assert (r.outcome, r.status) == (Outcome.HTTP_ERROR, 500)


def test_an_http_error_whose_connection_breaks_keeps_its_status() -> None:
    r = answer([head("500 Internal Server Error", content_type="application/json",
                     content_length="1000") + b'{"error":"half', RST])
    assert (r.outcome, r.status) == (Outcome.HTTP_ERROR, 500)


def test_a_redirect_is_an_http_error_and_is_not_followed() -> None:
    found, server = answers([[whole("307 Temporary Redirect", b"", location="/other")], good()])
    assert (found[0].outcome, found[0].status) == (Outcome.HTTP_ERROR, 307)
    assert len(server.requests) == 1


def test_two_classes_of_timeouts_do_not_mix() -> None:
    async def test() -> None:
        classes = [{"name": n, "kind": "chat", "prompt_tokens": 32, "output_tokens": 8, **more}
                   for n, more in (("c", {}), ("hasty", {"timeouts": {
                       "first_token": "300ms", "stall": "9s", "total": "9s"}}))]
        mix = scenario.parse({"name": "t", "timeouts": LONG, "classes": classes}, "test")
        async with (RawServer(lambda _: [HEAD, 1.0, *good()[1:]]) as server,
                    Client(Target(server.url, "m"), mix) as client):
            shots = [Shot(leg="l", shard=0, seq=k, session=k, turn=0, cls=c, due_ns=now_ns(),
                          body=b"{}") for k, c in enumerate(("c", "hasty"))]
            patient, hasty = await asyncio.gather(*(client.send(x) for x in shots))
            assert hasty.outcome is Outcome.TIMEOUT_FIRST_TOKEN
            assert patient.outcome is not Outcome.TIMEOUT_FIRST_TOKEN
    run(test())


# ------------------------------------------------------------------------------- errors in a 200


@pytest.mark.parametrize("tokens", [0, 2])
def test_an_error_object_in_the_stream_counts_whatever_follows(tokens: int) -> None:
    r = answer([HEAD + token() * tokens + event({"error": DEAD}) + DONE + LAST])
    assert (r.outcome, r.status, r.n_events) == (Outcome.SERVER_ERROR_EVENT, 200, tokens)
    assert "EngineCore encountered an issue" in (r.error or "")


def test_an_error_object_counts_even_if_a_finish_follows() -> None:
    r = answer([HEAD + token() + event({"error": DEAD}) + finish() + usage(1) + DONE + LAST])
    assert r.outcome is Outcome.SERVER_ERROR_EVENT


def test_an_error_object_counts_even_if_the_connection_breaks() -> None:
    assert answer([HEAD + token() + event({"error": DEAD}), 0.05, RST]
                  ).outcome is Outcome.SERVER_ERROR_EVENT


def test_a_full_queue_after_the_first_token_is_a_server_error() -> None:
    assert answer([HEAD + token() + event({"error": BUSY}) + DONE + LAST]
                  ).outcome is Outcome.SERVER_ERROR_EVENT


def test_an_error_object_instead_of_a_stream_is_a_server_error() -> None:
    r = answer([whole("200 OK", json.dumps({"error": DEAD}).encode())])
    assert (r.outcome, r.status) == (Outcome.SERVER_ERROR_EVENT, 200)


# -------------------------------------------------------------------------------- no connection


def test_a_refused_connection_is_connect_failed() -> None:
    async def test() -> None:
        async with Client(Target(f"http://127.0.0.1:{free_port()}", "m"), made()) as client:
            r = await client.send(shot())
            assert r.outcome is Outcome.CONNECT_FAILED
            assert (r.sent_ns, r.headers_ns, r.first_ns, r.status) == (None,) * 4
            assert "127.0.0.1" in (r.error or "")
    run(test())


def test_a_name_that_cannot_be_resolved_is_connect_failed() -> None:
    async def test() -> None:
        async with Client(Target("http://no-such-host.invalid:1", "m"), made()) as client:
            r = await client.send(shot())
            assert r.outcome is Outcome.CONNECT_FAILED
            assert "no-such-host.invalid" in (r.error or "")
    run(test())


# ------------------------------------------------------------------------------------- deadlines


DRIPS: dict[str, Script] = {
    "nothing at all": [HOLD],
    "half a head": [b"HTTP/1.1 200 OK\r\n", HOLD],
    "a head that drips": [b"HTTP/1.1 200 OK\r\n", *drip(b"x: y\r\n", 0.1, 100)],
    "headers only": [HEAD, HOLD],
    "the role only": [HEAD + role(), HOLD],
    "pings": [HEAD, *drip(PING, 0.1, 100)],
    "events without choices": [HEAD, *drip(event({"choices": []}), 0.1, 100)],
}


@pytest.mark.parametrize("drip", list(DRIPS))
def test_without_a_token_in_time_the_first_token_timed_out(drip: str) -> None:
    r = answer(DRIPS[drip], {"first_token": "400ms"})
    assert (r.outcome, r.n_events) == (Outcome.TIMEOUT_FIRST_TOKEN, 0)
    assert r.sent_ns is not None
    assert 0.39e9 < r.end_ns - r.due_ns < 8e9


@pytest.mark.parametrize("then", [
    [HOLD], drip(PING, 0.1, 100)])
def test_silence_after_token_k_is_a_stall_that_pings_do_not_end(then: list[Step]) -> None:
    r = answer([HEAD + role() + token() * 4, *then], {"stall": "400ms"})
    assert (r.outcome, r.n_events, r.status) == (Outcome.STALLED, 4, 200)
    assert r.end_ns - (r.last_ns or 0) < 8e9


def test_each_token_moves_the_stall_deadline() -> None:
    r = answer([HEAD, *drip(token(), 0.4, 6), finish() + usage(6) + DONE + LAST], {"stall": "2s"})
    assert (r.outcome, r.n_events) == (Outcome.OK, 6)


def test_a_slow_drip_of_tokens_ends_at_the_total() -> None:
    r = answer([HEAD, *drip(token(), 0.05, 300)], {"total": "600ms"})
    assert r.outcome is Outcome.TIMEOUT_TOTAL
    assert r.n_events >= 1
    assert r.end_ns - r.due_ns < 8e9


def test_a_plan_to_leave_is_not_a_timeout_of_the_server() -> None:
    r = answer([HEAD + token(), HOLD], {"stall": "10s"}, abandon_after_s=0.3)
    assert r.outcome is Outcome.ABANDONED


# -------------------------------------------------------------------------- broken connections


@pytest.mark.parametrize("end", [FIN, RST])
def test_a_break_in_the_stream_is_disconnected_and_keeps_its_stamps(end: Step) -> None:
    r = answer([HEAD + role() + token(), 0.1, token(), 0.1, end])
    assert (r.outcome, r.status, r.n_events) == (Outcome.DISCONNECTED, 200, 2)
    assert r.first_ns is not None
    assert r.gaps_us[0] > 50_000
    assert (r.output_tok, r.tok_source) == (2, "events")
    assert r.stale_retries == 0


@pytest.mark.parametrize("end", [FIN, RST])
def test_a_break_before_any_answer_on_a_fresh_connection_is_not_retried(end: Step) -> None:
    found, server = answers([[end], good()])
    assert found[0].outcome is Outcome.DISCONNECTED
    assert found[0].stale_retries == 0
    assert len(server.requests) == 1


@pytest.mark.parametrize("end", [FIN, RST])
def test_a_finish_reason_without_a_proper_end_is_disconnected(end: Step) -> None:
    assert answer([HEAD + token() + finish(), 0.05, end]).outcome is Outcome.DISCONNECTED


def test_a_body_shorter_than_its_content_length_is_disconnected() -> None:
    body = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
    r = answer([head(content_type="text/event-stream", content_length="5000") + body, 0.05, FIN])
    assert (r.outcome, r.n_events) == (Outcome.DISCONNECTED, 1)


class Stale:
    """A server that closes each kept-alive connection when it is used again, as one does whose
    idle time is just over. `broken`: so many of the next connections break as well."""

    def __init__(self, end: Step, broken: int = 0) -> None:
        self.end, self.broken = end, broken
        self.server = RawServer(self.script)

    def script(self, k: int) -> Script:
        got = self.server.requests
        used = any(x.connection == got[k].connection for x in got[:k])
        if used:
            return [self.end]
        if k and self.broken:
            self.broken -= 1
            return [self.end]
        return good()


@pytest.mark.parametrize("end", [FIN, RST])
def test_a_stale_connection_is_retried_once_on_a_fresh_one(end: Step) -> None:
    async def test() -> None:
        stale = Stale(end)
        async with (stale.server as server,
                    Client(Target(server.url, "m"), made()) as client):
            first, second = [await client.send(shot(k)) for k in range(2)]
            assert (first.outcome, first.stale_retries) == (Outcome.OK, 0)
            assert (second.outcome, second.stale_retries, second.n_events) == (Outcome.OK, 1, 3)
            assert second.connect_wait_ns is not None  # the fresh connection's
            assert [x.connection for x in server.requests] == [0, 0, 1]
    run(test())


def test_a_connection_that_is_found_broken_in_the_sending_is_stale_as_well(
        monkeypatch: pytest.MonkeyPatch) -> None:
    write, broken = Connection._write, [True]

    def breaks(connection: Connection, data: bytes) -> None:
        if connection.used > 1 and broken.pop():
            raise ConnectionResetError("it had been reset")
        write(connection, data)

    async def test() -> None:
        async with (RawServer(lambda _: good()) as server,
                    Client(Target(server.url, "m"), made()) as client):
            await client.send(shot(0))
            monkeypatch.setattr(Connection, "_write", breaks)
            second = await client.send(shot(1))
            assert (second.outcome, second.stale_retries) == (Outcome.OK, 1)
    run(test())


@pytest.mark.parametrize("end", [FIN, RST])
def test_a_retry_that_breaks_as_well_is_disconnected(end: Step) -> None:
    async def test() -> None:
        stale = Stale(end, broken=1)
        async with (stale.server as server,
                    Client(Target(server.url, "m"), made()) as client):
            records = [await client.send(shot(k)) for k in range(2)]
            assert records[1].outcome is Outcome.DISCONNECTED
            assert records[1].stale_retries == 1
            assert len(server.requests) == 3
    run(test())


def test_idle_connections_that_the_server_closes_cost_no_request() -> None:
    async def test() -> None:
        async with (RawServer(lambda _: [*good(), FIN]) as server,
                    Client(Target(server.url, "m"), made()) as client):
            records = [await client.send(shot(k)) for k in range(20)]
            assert {r.outcome for r in records} == {Outcome.OK}
            assert len(server.requests) == 20 <= server.connections
    run(test())


def test_several_stale_connections_cost_no_request() -> None:
    """After a pause all kept-alive connections are stale at once: the retry must not land on the
    next one of them."""
    async def test() -> None:
        go = asyncio.Event()
        server = RawServer(lambda k: (
            [go, *good()] if k < 5
            else [RST] if any(x.connection == server.requests[k].connection
                              for x in server.requests[:k]) else good()))
        async with server, Client(Target(server.url, "m"), made()) as client:
            tasks = [asyncio.create_task(client.send(shot(k))) for k in range(5)]
            await server.until(lambda: server.inflight == 5)
            go.set()
            assert {r.outcome for r in await asyncio.gather(*tasks)} == {Outcome.OK}
            r = await client.send(shot(5))
            assert (r.outcome, r.stale_retries) == (Outcome.OK, 1)
    run(test())


def test_a_break_after_the_head_is_not_retried_on_a_kept_connection() -> None:
    found, server = answers([good(), [HEAD, 0.05, RST]], n=2)
    assert [r.outcome for r in found] == [Outcome.OK, Outcome.DISCONNECTED]
    assert found[1].stale_retries == 0
    assert len(server.requests) == 2


# ----------------------------------------------------------------- truncated, bad, empty streams


@pytest.mark.parametrize("end", [LAST, DONE + LAST, usage(2) + DONE + LAST])
def test_an_end_without_finish_reason_is_truncated(end: bytes) -> None:
    r = answer([HEAD + token() * 2 + end])
    assert (r.outcome, r.n_events, r.finish_reason) == (Outcome.TRUNCATED, 2, None)
    assert "finish_reason" in (r.error or "")


@pytest.mark.parametrize("script", [
    [HEAD + token() + chunk(b'data: {"choices": [broken\n\n') + token() + finish() + DONE + LAST],
    [HEAD + token() + chunk(b'data: {"choices": 7}\n\n') + finish() + DONE + LAST],
    [HEAD + token() + chunk(b"data: \xff\xfe\n\n") + finish() + DONE + LAST],
    [HEAD + token() + chunk(b"data: [1, 2]\n\n") + finish() + DONE + LAST],
])
def test_malformed_events_are_a_bad_stream_with_the_stamps_before(script: Script) -> None:
    r = answer(script)
    assert (r.outcome, r.status, r.n_events) == (Outcome.BAD_STREAM, 200, 1)
    assert r.error


def test_a_bad_stream_on_a_connection_does_not_spoil_the_next_request() -> None:
    found, _ = answers([[HEAD + chunk(b"data: {broken\n\n"), token(), HOLD], good()], n=2)
    assert [r.outcome for r in found] == [Outcome.BAD_STREAM, Outcome.OK]


@pytest.mark.parametrize("script", [
    [b"220 smtp.example.org ESMTP\r\n", HOLD],
    [b"\x15\x03\x01\x00\x02\x02\x46", HOLD],  # TLS alert: https spoken here
    [b"HTTP/1.1 nonsense\r\n\r\n", HOLD],
    [HEAD + token() + b"zz\r\nnot a chunk size\r\n", HOLD],
    [HEAD + token() + b"5\r\ntoo long for five\r\n", HOLD],
])
def test_what_is_not_http_is_a_bad_stream(script: Script) -> None:
    r = answer(script)
    assert r.outcome is Outcome.BAD_STREAM
    assert r.error


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8",
                                  "Application/JSON"])
def test_a_whole_answer_instead_of_a_stream_is_a_bad_stream(kind: str) -> None:
    r = answer([whole("200 OK", b'{"choices":[{"message":{"content":"hi"}}]}',
                      content_type=kind)])
    assert (r.outcome, r.status) == (Outcome.BAD_STREAM, 200)


def test_an_answer_that_is_packed_is_a_bad_stream_and_says_so() -> None:
    packed = HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")
    r = answer([packed + chunk(b"\x1f\x8b") + LAST])
    assert r.outcome is Outcome.BAD_STREAM
    assert "gzip" in (r.error or "")


def test_a_line_without_end_is_a_bad_stream_and_bounded() -> None:
    pieces: list[Step] = [chunk(b"x" * 2**20) for _ in range(40)]
    found, server = answers([[HEAD, *pieces, HOLD]])
    assert found[0].outcome is Outcome.BAD_STREAM
    assert "line" in (found[0].error or "")
    assert len(server.requests) == 1


@pytest.mark.parametrize("script", [
    [HEAD + LAST], [HEAD + DONE + LAST], [HEAD + role() + finish() + usage(0) + DONE + LAST],
    [HEAD + PING + PING + LAST],
    [head(content_type="text/event-stream", content_length="0")],
])
def test_an_answer_without_one_token_is_empty(script: Script) -> None:
    r = answer(script)
    assert (r.outcome, r.status, r.n_events) == (Outcome.EMPTY, 200, 0)


@pytest.mark.parametrize("script", [
    [whole("200 OK", b"<h1>Welcome to nginx!</h1>", content_type="text/html")],
    [HEAD + chunk(b"<h1>Welcome") + chunk(b" to nginx!</h1>") + LAST],
    [head(content_type="text/html", content_length="9000") + b"<h1>Welcome to nginx!</h1>", FIN],
])
def test_a_page_with_status_200_is_a_bad_stream_and_its_words_are_kept(script: Script) -> None:
    found, _ = answers([script, good()], n=2)
    assert [r.outcome for r in found] == [Outcome.BAD_STREAM, Outcome.OK]
    assert "Welcome to nginx!" in (found[0].error or "")


# ------------------------------------------------------------------------------- our own doings


_NO_DESCRIPTORS = """
import asyncio, os, resource, sys
sys.path.insert(0, ".")
from tests.test_client import made, shot
from tests.raw_server import RawServer, good
from loadgen.client import Client
from loadgen.target import Target

async def main():
    async with RawServer(lambda _: good()) as server:
        async with Client(Target(server.url.replace("127.0.0.1", HOST), "m"), made()) as client:
            taken = []
            try:
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                pass
            first = await client.send(shot(0))
            for fd in taken:
                os.close(fd)
            second = await client.send(shot(1))
            print(first.outcome, second.outcome, first.sent_ns, "::", first.error)

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
asyncio.run(main())
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_without_file_descriptors_the_request_is_dropped_not_the_servers_failure(
        host: str) -> None:
    said = subprocess.run([sys.executable, "-c", _NO_DESCRIPTORS.replace("HOST", repr(host))],
                          capture_output=True, text=True, timeout=30, check=False)
    assert said.stdout.startswith("DROPPED OK None :: "), said.stdout + said.stderr[-2000:]


def _cancelled(when: Callable[[RawServer], bool], script: Script) -> RequestRecord:
    found: list[RequestRecord] = []

    async def test() -> None:
        async with (RawServer(lambda _: script) as server,
                    Client(Target(server.url, "m"), made()) as client):
            task = asyncio.create_task(client.send(shot()))
            await server.until(lambda: when(server))
            await asyncio.sleep(0.2)
            task.cancel()
            found.append(await task)
            assert client.inflight == 0
            await server.until(lambda: server.inflight == 0)
    run(test())
    return found[0]


def test_a_cancelled_request_is_a_record_with_what_had_come() -> None:
    r = _cancelled(lambda s: s.inflight == 1, [HEAD + token() * 2, HOLD])
    assert (r.outcome, r.n_events, r.status) == (Outcome.CANCELLED, 2, 200)


def test_a_request_is_cancelled_while_it_waits_for_headers() -> None:
    r = _cancelled(lambda s: s.inflight == 1, [HOLD])
    assert (r.outcome, r.status) == (Outcome.CANCELLED, None)
    assert r.sent_ns is not None


def test_a_cancelled_request_leaves_its_task_alive() -> None:
    async def test() -> None:
        async with (RawServer(lambda k: [HOLD] if k == 0 else good()) as server,
                    Client(Target(server.url, "m"), made()) as client):
            async def two() -> list[Outcome]:
                return [(await client.send(shot(k))).outcome for k in range(2)]

            task = asyncio.create_task(two())
            await server.until(lambda: server.inflight == 1)
            task.cancel()
            assert await task == [Outcome.CANCELLED, Outcome.OK]
            assert task.cancelling() == 0
    run(test())


def test_cancel_and_a_deadline_at_the_same_instant_give_one_record() -> None:
    """Whoever wins, a record comes and the task is not left half cancelled."""
    async def test() -> None:
        async with (RawServer(lambda _: [HEAD + token(), HOLD]) as server,
                    Client(Target(server.url, "m"), made()) as client):
            for k in range(10):
                task = asyncio.create_task(client.send(shot(k, abandon_after_s=0.1)))
                await asyncio.sleep(0.09 + 0.002 * k)
                task.cancel()
                r = await task
                assert r.outcome in (Outcome.CANCELLED, Outcome.ABANDONED)
    run(test())


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://127.0.0.1:1", "http://", "http://[::1",
                                 "http://127.0.0.1:99999"])
def test_no_address_whatever_makes_the_client_raise_for_a_request(url: str) -> None:
    async def test() -> None:
        try:
            async with Client(Target(url, "m"), made()) as client:
                r = await client.send(shot())
        except LoadgenError:
            return  # refused as a whole is as well
        assert r.outcome in (Outcome.CONNECT_FAILED, Outcome.BAD_STREAM)
        assert r.error
    run(test())


def test_headers_that_cannot_be_sent_make_no_traceback() -> None:
    async def test() -> None:
        async with RawServer(lambda _: good()) as server:
            try:
                async with Client(Target(server.url, "m", {"X-A": "b\r\nX-B: c"}),
                                  made()) as client:
                    r = await client.send(shot())
            except LoadgenError:
                return
            assert r.outcome is not Outcome.OK
            assert not server.requests
    run(test())
