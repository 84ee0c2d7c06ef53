"""The generator's event loop and its connections: stamps of the kernel, alarms, TLS, proxies; and
asyncio's own doings on it."""

import asyncio
import contextlib
import functools
import gc
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from loadgen import net, stamps
from loadgen.client import Client
from loadgen.connection import Connection
from loadgen.dial import why_not
from loadgen.net import now_ns
from loadgen.record import Outcome, Recorder
from loadgen.target import Target
from servers.base import free_port
from tests.raw_server import (
    DONE,
    HEAD,
    HOLD,
    LAST,
    RST,
    RawServer,
    Script,
    Step,
    chunk,
    finish,
    good,
    head,
    token,
    usage,
)
from tests.test_client import made, shot


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test, 40)

    with asyncio.Runner(loop_factory=net.new_loop) as runner:
        runner.run(limited())


# ------------------------------------------------------------------------------------- the clock


def test_a_kernels_stamp_becomes_the_monotonic_instant() -> None:
    clock = stamps.Clock()
    before = now_ns()
    stamp = stamps.timespec(time.time_ns())
    after = now_ns()
    [mono] = clock.mono_ns(stamp)
    assert before - 100_000 <= mono <= after + 100_000


def test_no_stamp_is_in_the_future_nor_before_the_one_before() -> None:
    clock = stamps.Clock()
    wall = time.time_ns()
    found = clock.mono_ns(b"".join(map(stamps.timespec, (wall, wall - 5000, wall + 10**12))))
    assert found == sorted(found)
    assert found[-1] <= now_ns()


@pytest.mark.parametrize("step_s", [-10, -0.5, 0.05, 10])
@pytest.mark.parametrize("synced", [True, False])
def test_a_stamp_has_the_offset_of_its_own_time(monkeypatch: pytest.MonkeyPatch, step_s: float,
                                                synced: bool) -> None:
    """The wall clock is set between two reads: neither stamp moves."""
    clock = stamps.Clock()
    for _ in range(50):
        clock.sync()
    first_wall, first = time.time_ns(), now_ns()
    time.sleep(0.01)
    clock.sync()
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + round(step_s * 1e9))
    time.sleep(0.1)
    if synced:
        clock.sync()
    second_wall, second = time.time_ns(), now_ns()
    found = clock.mono_ns(stamps.timespec(first_wall) + stamps.timespec(second_wall), first - 1000)
    assert abs(found[0] - first) < 20_000_000
    assert abs(found[1] - second) < (20_000_000 if synced or abs(step_s) > 1 else 120_000_000)


# --------------------------------------------------------------------------------------- alarms


def test_alarms_ring_in_order_and_never_early() -> None:
    async def test() -> None:
        direct = net.direct_of(asyncio.get_running_loop())
        assert isinstance(direct, net.Selector)
        rung: list[tuple[int, int]] = []
        t0 = now_ns()
        for k in range(200):
            due = t0 + 5_000_000 + k * 300_000
            direct.alarm(due, lambda due=due: rung.append((due, now_ns())))  # type: ignore[misc]
        await asyncio.sleep(0.3)
        assert len(rung) == 200
        assert [due for due, _ in rung] == sorted(due for due, _ in rung)
        assert all(at >= due for due, at in rung)
    run(test())


def test_a_thousand_alarms_at_once_that_ring_themselves_all_ring() -> None:
    async def test() -> None:
        direct = net.direct_of(asyncio.get_running_loop())
        rung: list[int] = []

        def ring(k: int) -> None:
            rung.append(k)
            direct.ring()

        due = now_ns() + 10_000_000
        for k in range(2000):
            direct.alarm(due, functools.partial(ring, k))
        await asyncio.sleep(0.3)
        assert rung == list(range(2000))
    run(test())


def test_what_an_alarm_asks_of_the_loop_is_done_at_once() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        direct = net.direct_of(loop)
        done: list[int] = []
        due = now_ns() + 1_000_000
        direct.alarm(due, lambda: loop.call_soon(lambda: done.append(now_ns())))  # type: ignore[arg-type]
        while now_ns() < due + 1_000_000:  # it is due before the loop comes to wait
            pass
        await asyncio.sleep(1.5)
        assert done[0] - due < 1_000_000_000
    run(test())


def test_an_alarm_that_fails_stops_neither_the_loop_nor_the_next_one() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        said: list[Any] = []
        loop.set_exception_handler(lambda _, context: said.append(context["exception"]))
        direct = net.direct_of(loop)
        rung = asyncio.Event()

        def fails() -> None:
            raise RuntimeError("no")

        direct.alarm(now_ns(), fails)
        direct.alarm(now_ns(), rung.set)
        await asyncio.wait_for(rung.wait(), 5)
        assert [str(e) for e in said] == ["no"]
    run(test())


# ------------------------------------------------------------------------- asyncio on this loop


def test_streams_processes_threads_and_timers_work_on_it(tmp_path: Path) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, net.Loop)

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        sent = b"x" * 3_000_000
        writing = asyncio.create_task(_write(writer, sent))
        assert await reader.readexactly(len(sent)) == sent
        await writing
        writer.close()
        server.close()
        child = await asyncio.create_subprocess_exec(
            "cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
        assert (await child.communicate(b"hello"))[0] == b"hello"
        assert await asyncio.to_thread(lambda: 7) == 7
        fired = loop.create_future()
        loop.call_soon_threadsafe(loop.call_later, 0.01, fired.set_result, 1)
        assert await asyncio.wait_for(fired, 5) == 1
    run(test())


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def test_a_loop_with_only_direct_sockets_still_sees_its_timers() -> None:
    async def test() -> None:
        drips: list[Step] = [HEAD]
        for _ in range(400):
            drips += [token(), 0.002]
        drips.append(HOLD)
        async with (RawServer(lambda _: drips) as server,
                    Client(Target(server.url, "m"), made()) as client):
            flight, landed = client.prepare(shot()), []
            flight.start(lambda: landed.append(1))
            began = now_ns()
            await asyncio.sleep(0.2)
            assert now_ns() - began < 5_000_000_000
            flight.cancel()
            assert flight.result().outcome is Outcome.CANCELLED
            assert landed == [1]
    run(test())


def test_a_glance_reads_between_short_turns_what_a_late_read_would_find_together() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, net.Loop)
        ours, theirs = socket.socketpair()
        got: list[bytes] = []
        with ours, theirs:
            ours.setblocking(False)
            loop.direct.read_directly(ours.fileno(), lambda: got.append(ours.recv(100)))
            for said in (b"1", b"2", b"3"):  # the loop has no turn in between
                theirs.send(said)
                time.sleep(0.001)  # noqa: ASYNC251 (somebody's short turn)
                loop.direct.glance()
            loop.direct.leave(ours.fileno())
        assert got == [b"1", b"2", b"3"]
    run(test())


def test_a_glance_forgets_neither_timers_nor_other_sockets() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, net.Loop)
        ours, theirs = socket.socketpair()
        rung: list[str] = []
        with ours, theirs:
            ours.setblocking(False)
            read = asyncio.create_task(loop.sock_recv(ours, 100))
            timer = asyncio.create_task(asyncio.sleep(0.001))
            loop.direct.alarm(now_ns() + 2_000_000, lambda: rung.append("alarm"))
            await asyncio.sleep(0)
            theirs.send(b"x")
            time.sleep(0.005)  # noqa: ASYNC251 (somebody's long turn)
            loop.direct.glance()
            assert rung == ["alarm"]
            assert await read == b"x"
            await timer
    run(test())


# -------------------------------------------------------------------------------------- stamps


def test_stamps_are_the_kernels_and_do_not_feel_a_loop_that_stands_still() -> None:
    """The server's two tokens are 100 ms apart; this process sleeps over both."""
    async def test() -> None:
        go = asyncio.Event()
        async with RawServer(lambda _: [HEAD, go, token(), finish() + usage(1) + DONE + LAST]
                             ) as server, Client(Target(server.url, "m"), made()) as client:
            await asyncio.sleep(0.2)  # the kernel begins to stamp
            flight = asyncio.create_task(client.send(shot()))
            await server.until(lambda: server.inflight == 1)
            go.set()
            for _ in range(10):
                await asyncio.sleep(0)
            slept = now_ns()
            time.sleep(0.4)  # noqa: ASYNC251  (this is what is tested)
            r = await flight
            assert (r.outcome, r.stamp_kind) == (Outcome.OK, "kernel")
            assert r.first_ns is not None
            assert r.first_ns < slept + 300_000_000
    run(test())


def test_on_another_loop_and_without_kernel_stamps_the_kind_is_said(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps, "ask_for", lambda _: False)

    async def test() -> None:
        async with (RawServer(lambda _: good()) as server,
                    Client(Target(server.url, "m"), made()) as client):
            r = await client.send(shot())
            assert (r.outcome, r.stamp_kind) == (Outcome.OK, "user")
            assert r.sent_ns is not None
            assert r.first_ns is not None
            assert r.sent_ns <= r.first_ns <= r.end_ns
    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_large_request_goes_out_whole() -> None:
    async def test() -> None:
        async with (RawServer(lambda _: good()) as server,
                    Client(Target(server.url, "m"), made()) as client):
            body = b'{"x": "' + b"y" * 4_000_000 + b'"}'
            r = await client.send(shot(body=body))
            assert r.outcome is Outcome.OK
            assert server.requests[0].body == body
    run(test())


# ------------------------------------------------------------------------------- TLS and proxies


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's context, whose authority this process trusts."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


def test_https_streams_with_the_kernels_stamps_over_kept_connections(tls: Any) -> None:
    script: Script = [HEAD + token("a"), 0.05, token("b"), 0.05, finish() + usage(2) + DONE + LAST]

    async def test() -> None:
        async with RawServer(lambda _: script, tls=tls) as server:
            async with Client(Target(server.url, "m"), made()) as client:
                await asyncio.sleep(0.2)  # the kernel begins to stamp
                records = [await client.send(shot(k, body=b"x" * 300_000)) for k in range(3)]
            assert [(r.outcome, r.stamp_kind, r.n_events) for r in records] == [
                (Outcome.OK, "kernel", 2)] * 3
            assert all(r.gaps_us[0] > 20_000 for r in records)
            assert server.connections == 1
            assert all(len(x.body) == 300_000 for x in server.requests)
    run(test())


def test_connections_opened_ahead_are_kept_over_https_too(tls: Any) -> None:
    async def test() -> None:
        async with (RawServer(lambda _: good(), tls=tls) as server,
                    Client(Target(server.url, "m"), made()) as client):
            await client.open_connections(8)
            await asyncio.sleep(0.3)  # the server's tickets come
            records = await asyncio.gather(*(client.send(shot(k)) for k in range(8)))
            assert {r.outcome for r in records} == {Outcome.OK}
            assert {r.connect_wait_ns for r in records} == {None}
            assert server.connections == 8
    run(test())


def test_https_that_breaks_is_disconnected_and_a_stranger_is_not_trusted(
        tls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with RawServer(lambda _: [HEAD + token(), 0.05, RST], tls=tls) as server:
            async with Client(Target(server.url, "m"), made()) as client:
                r = await client.send(shot())
                assert (r.outcome, r.n_events) == (Outcome.DISCONNECTED, 1)
            monkeypatch.delenv("SSL_CERT_FILE")
            async with Client(Target(server.url, "m"), made()) as client:
                r = await client.send(shot())
                assert r.outcome is Outcome.CONNECT_FAILED
                assert "certificate" in (r.error or "").lower()
    run(test())


class Proxy:
    """A small HTTP proxy: CONNECT, and requests with whole addresses, all to one port."""

    def __init__(self, to: int, refuse: bool = False) -> None:
        self._to, self._refuse = to, refuse
        self.heads: list[str] = []

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://user:p%40ss@127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head.decode())
        if self._refuse:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            writer.close()
            return
        up, down = await asyncio.open_connection("127.0.0.1", self._to)
        if head.startswith(b"CONNECT"):
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            down.write(head)
        with contextlib.suppress(OSError):
            await asyncio.gather(_pipe(reader, down), _pipe(up, writer))


async def _pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
    sink.close()


@pytest.mark.parametrize("secure", [False, True])
def test_requests_go_through_an_http_proxy(tls: Any, secure: bool) -> None:
    async def test() -> None:
        async with RawServer(lambda _: good(), tls=tls if secure else None) as server:
            async with Proxy(server.port) as proxy, Client(
                    Target(server.url, "m", proxy=proxy.url), made()) as client:
                r = await client.send(shot(body=b"{}"))
                assert r.outcome is Outcome.OK
                assert server.requests[0].body == b"{}"
                first = proxy.heads[0].split("\r\n")
            assert first[0].startswith("CONNECT 127.0.0.1" if secure else f"POST {server.url}/v1/")
            assert "Proxy-Authorization: Basic dXNlcjpwQHNz" in first
    run(test())


def test_a_run_goes_through_the_proxy_that_it_is_told_of_and_keeps_its_password(
        tmp_path: Path) -> None:
    async def test() -> None:
        async with RawServer(lambda _: good(), get=[head("404 Not Found", content_length="0")]
                             ) as server, Proxy(server.port) as proxy:
            done = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "loadgen.cli", "run", "smoke", "--concurrency", "1",
                "--num-prompts", "3", "--base-url", "http://far.invalid:8000", "--model", "m",
                "--proxy", proxy.url, "--out", str(tmp_path / "run"), "--no-report",
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
            said, _ = await done.communicate()
            assert done.returncode in (0, 1, 5), said
            assert all("http://far.invalid:8000/" in x.split("\r\n")[0] for x in proxy.heads)
        kept = "".join(p.read_text() for p in (tmp_path / "run").glob("*.json*"))
        assert kept.count('"outcome":"OK"') == 3
        assert "p%40ss" not in kept
        assert "p@ss" not in kept
    run(test())


def test_a_proxy_that_refuses_is_connect_failed_in_its_words(tls: Any) -> None:
    async def test() -> None:
        async with (RawServer(lambda _: good(), tls=tls) as server,
                    Proxy(server.port, refuse=True) as proxy,
                    Client(Target(server.url, "m", proxy=proxy.url), made()) as client):
            r = await client.send(shot())
            assert r.outcome is Outcome.CONNECT_FAILED
            assert "407" in (r.error or "")
    run(test())


def test_an_address_that_never_answers_ends_by_the_first_token_time() -> None:
    async def test() -> None:
        with socket.socket() as full:  # a backlog of none that is taken: connecting hangs
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            takers = [socket.socket() for _ in range(4)]
            for taker in takers:
                taker.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    taker.connect(full.getsockname())
            url = f"http://127.0.0.1:{full.getsockname()[1]}"
            async with Client(Target(url, "m"), made({"first_token": "500ms"})) as client:
                r = await client.send(shot())
            for taker in takers:
                taker.close()
            assert (r.outcome, r.sent_ns) == (Outcome.CONNECT_FAILED, None)
    run(test())


# --------------------------------------------------------------------- what may never be left over


def connections() -> int:
    return sum(isinstance(x, Connection) for x in gc.get_objects())


def test_closed_connections_leave_nothing_behind_while_the_collector_is_off() -> None:
    async def test() -> None:
        async with (RawServer(lambda _: [HEAD + token() + finish() + usage(1) + DONE + LAST, RST])
                    as server, Client(Target(server.url, "m"), made()) as client):
            gc.collect()
            gc.disable()
            before = connections()  # of tests before this one
            try:
                for k in range(30):
                    await client.send(shot(k))
                for _ in range(200):  # a reset may yet be on its way
                    left = connections() - before
                    if left <= 2:
                        break
                    await asyncio.sleep(0.01)
            finally:
                gc.enable()
            assert left <= 2
    run(test())


def test_a_second_answer_in_the_same_read_is_no_part_of_the_first() -> None:
    whole = HEAD + token() * 3 + finish() + usage(3) + DONE + LAST

    async def test() -> None:
        async with (RawServer(lambda _: [whole + whole]) as server,
                    Client(Target(server.url, "m"), made()) as client):
            records = [await client.send(shot(k)) for k in range(2)]
            assert [(r.outcome, r.n_events) for r in records] == [(Outcome.OK, 3)] * 2
            assert server.connections == 2
    run(test())


@pytest.mark.parametrize("script", [
    [HEAD + chunk(b"data: " + b"[" * 5000 + b"\n\n") + DONE + LAST],
    [HEAD + chunk(b'data: {"error":' + b"[" * 5000 + b"\n\n") + DONE + LAST],
    [head("500 Internal Server Error", content_type="application/json", content_length="60000")
     + b"[" * 60000]])
def test_json_that_is_nested_without_end_ends_in_a_record(script: list[Step]) -> None:
    async def test() -> None:
        async with (RawServer(lambda _: script) as server,
                    Client(Target(server.url, "m"), made()) as client):
            r = await client.send(shot())
            assert r.outcome in (Outcome.BAD_STREAM, Outcome.HTTP_ERROR)
    run(test())


def test_connections_that_are_opened_ahead_replace_those_that_were_idle_for_long() -> None:
    """Of a leg that ended some time ago: they would all be closed when the next one takes them."""
    async def test() -> None:
        async with (RawServer(lambda _: good()) as server,
                    Client(Target(server.url, "m"), made()) as client):
            await client.open_connections(3)
            for connection in client._idle:
                connection.idle_since_ns -= 3_800_000_000
            await client.open_connections(3)
            await asyncio.sleep(0.3)  # the leg's clock begins
            records = await asyncio.gather(*(client.send(shot()) for _ in range(3)))
            assert [r.connect_wait_ns for r in records] == [None] * 3
            assert server.connections == 6
    run(test())


def test_a_bug_of_ours_is_raised_and_does_not_wait_for_ever(
        monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Recorder, "feed_reads", fails)

    async def test() -> None:
        async with (RawServer(lambda _: good()) as server,
                    Client(Target(server.url, "m"), made()) as client):
            with pytest.raises(RuntimeError, match="a bug"):
                await client.send(shot())
            assert client.inflight == 0
    run(test())


def test_done_again_and_again_does_not_hold_up_the_total() -> None:
    drips: list[Step] = [HEAD]
    for _ in range(60):
        drips += [DONE, 0.1]

    async def test() -> None:
        async with (RawServer(lambda _: drips) as server,
                    Client(Target(server.url, "m"), made({"total": "1s"})) as client):
            began = now_ns()
            r = await client.send(shot())
            assert r.outcome is Outcome.TIMEOUT_TOTAL
            assert now_ns() - began < 4_000_000_000
    run(test())


# ----------------------------------------------------------------- the command line's TLS options


class Pem:
    """An authority's file, a server's context that wants a client's certificate or does not, and
    that certificate with its key, in one file and in two."""

    def __init__(self, folder: Path, wants: bool) -> None:
        authority = trustme.CA()
        self.ca, self.both = folder / "ca.pem", folder / "both.pem"
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        ours = authority.issue_cert("loadgen.example")
        ours.private_key_and_cert_chain_pem.write_to_path(str(self.both))
        ours.cert_chain_pems[0].write_to_path(str(self.cert))
        ours.private_key_pem.write_to_path(str(self.key))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1", "localhost").configure_cert(self.context)
        if wants:
            authority.configure_trust(self.context)
            self.context.verify_mode = ssl.CERT_REQUIRED


async def _loaded(folder: Path, context: ssl.SSLContext, *words: str) -> tuple[int, str]:
    """A run of three requests against a TLS server that knows its models, by the command line."""
    models = b'{"data":[{"id":"m"}]}'
    get = [head(content_type="application/json", content_length=str(len(models))) + models]
    async with RawServer(lambda _: good(), get=get, tls=context) as server:
        done = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "loadgen.cli", "run", "smoke", "--concurrency", "1",
            "--num-prompts", "3", "--base-url", server.url, "--out", str(folder / "run"),
            "--no-report", *words, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT)
        said, _ = await done.communicate()
    assert done.returncode is not None
    return done.returncode, said.decode()


@pytest.mark.parametrize(("wants", "words"), [
    (False, ["--ca-cert", "{ca}"]), (False, ["--insecure"]),
    (True, ["--ca-cert", "{ca}", "--cert", "{both}"]),
    (True, ["--insecure", "--cert", "{cert}", "--key", "{key}"])])
def test_a_run_over_https_trusts_whom_it_is_told_to(
        tmp_path: Path, wants: bool, words: list[str]) -> None:
    pem = Pem(tmp_path, wants)
    code, said = asyncio.run(_loaded(tmp_path, pem.context, *(
        word.format(**{k: str(v) for k, v in vars(pem).items()}) for word in words)))
    assert code in (0, 1, 5), said
    kept = (tmp_path / "run" / "records-0.jsonl").read_text()
    assert kept.count('"outcome":"OK"') == 3
    manifest = (tmp_path / "run" / "manifest.json").read_text()
    assert ('"insecure":true' in manifest.replace(" ", "")) == ("--insecure" in words)


@pytest.mark.parametrize(("wants", "words", "says"), [
    (False, [], "certificate"), (True, ["--insecure"], "cannot be reached")])
def test_a_run_over_https_without_them_says_what_is_wrong(
        tmp_path: Path, wants: bool, words: list[str], says: str) -> None:
    code, said = asyncio.run(_loaded(tmp_path, Pem(tmp_path, wants).context, *words))
    assert code == 4, said
    assert says in said


@pytest.mark.parametrize(("words", "says"), [
    (["--base-url", "http://127.0.0.1:1", "--insecure"], "https"),
    (["--insecure"], "https --base-url"), (["--ca-cert", "{key}"], "https --base-url"),
    (["--base-url", "https://127.0.0.1:1", "--key", "{key}"], "--cert"),
    (["--base-url", "https://127.0.0.1:1", "--cert", "{ca}"], "PEM files"),
    (["--base-url", "https://127.0.0.1:1", "--ca-cert", "{key}"], "PEM files"),
    (["--base-url", "https://127.0.0.1:1", "--ca-cert", "/no/such"], "does not exist")])
def test_tls_options_that_cannot_work_are_refused(
        tmp_path: Path, words: list[str], says: str) -> None:
    pem = Pem(tmp_path, False)
    done = subprocess.run(
        [sys.executable, "-m", "loadgen.cli", "run", "smoke", "--num-prompts", "1", "--out",
         str(tmp_path / "run"), *(w.format(**{k: str(v) for k, v in vars(pem).items()})
                                  for w in words)],
        capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr


def test_who_cannot_be_reached_is_said_in_the_system_s_words() -> None:
    async def said(url: str) -> str:
        async with aiohttp.ClientSession() as session:
            try:
                await session.get(url)
            except aiohttp.ClientError as e:
                return why_not(e)
        raise AssertionError("somebody is there")
    port = free_port()
    assert asyncio.run(said(f"http://127.0.0.1:{port}")) == "Connection refused"
    assert asyncio.run(said("http://no-such-host.invalid")).endswith("is its name right?")
    assert why_not(TimeoutError()) == "no answer in time"
    assert why_not(ConnectionRefusedError(111, "Connect call failed ('::1', 8000)")
                   ) == "Connection refused"
    assert why_not(OSError("the proxy says 502")) == "the proxy says 502"
    assert why_not(ssl.SSLError(1, "wrong version number")).endswith("wrong version number")
    assert why_not(OSError()) == "OSError"
