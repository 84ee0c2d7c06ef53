"""The benchmark's instrument: its log is what a raw client received, and nothing else."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from servers.null import log as truth
from servers.null.server import Server, key_of

EVENT = re.compile(rb"([0-9a-f]+)\r\n(data: .*?\n\n)\r\n", re.DOTALL)


@contextlib.contextmanager
def serving(ttft_ms=0.0, itl_ms=0.0, grid=True, coalesce=1) -> Iterator[Server]:
    server = Server(round(ttft_ms * 1e6), round(itl_ms * 1e6), None, grid, coalesce, logs=True)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.stopped = True
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", server.port)).close()  # wakes it
        thread.join(5)


def body(tokens: int, user: int | None) -> bytes:
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens, "stream": True,
             "stream_options": {"include_usage": True}}
    return json.dumps(asked | ({} if user is None else {"user": str(user)})).encode()


def ask(sock: socket.socket, what: bytes) -> list[tuple[int, bytes]]:
    """(when its last byte was there, payload) of each event of one answer."""
    sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
                 % (len(what), what))
    got, found, seen = b"", [], 0
    while not got.endswith(b"\r\n0\r\n\r\n"):
        data = sock.recv(65536)
        assert data, "the server closed the connection"
        at = time.monotonic_ns()
        got += data
        events = EVENT.findall(got)
        for size, event in events[seen:]:
            assert int(size, 16) == len(event)
            found.append((at, event[6:-2]))
        seen = len(events)
    return found


def logged(server: Server, tmp_path) -> truth.Truth:
    server.save(tmp_path / "truth.bin")
    return truth.load(tmp_path / "truth.bin")


@pytest.mark.parametrize("coalesce", [1, 3])
@pytest.mark.parametrize("grid", [True, False])
def test_the_log_holds_every_event_that_a_client_received_in_order(tmp_path, grid, coalesce):
    with serving(10, 2, grid, coalesce) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            began_ns = time.monotonic_ns()
            answers = [ask(sock, body(n, n)) for n in (1, 2, 7)]  # one kept-alive connection
        known = logged(server, tmp_path)
    assert list(known.requests[:, 0]) == [1, 2, 7]
    assert (np.diff(known.writes[:, 4]) >= 0).all()
    for row, (n, received) in enumerate(zip((1, 2, 7), answers, strict=True)):
        writes = known.writes[(known.writes[:, 0] == row) & (known.writes[:, 1] >= 0)]
        events = [k for _, first, many, *_ in writes for k in range(first, first + many)]
        assert events == list(range(n + 3))
        assert len(received) == n + 3  # role, tokens, usage, [DONE]
        assert received[-1][1] == b"[DONE]"
        assert json.loads(received[-2][1])["usage"]["completion_tokens"] == n
        assert json.loads(received[n][1])["choices"][0]["finish_reason"] == "length"
        sent_ns = np.repeat(writes[:, 4], writes[:, 2])
        assert all(at >= sent for (at, _), sent in zip(received, sent_ns, strict=True))
        assert began_ns < known.requests[row, 1] <= known.requests[row, 2] < sent_ns[0]


def test_events_keep_their_schedule_and_none_comes_early(tmp_path):
    with serving(20, 5, grid=False) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            ask(sock, body(20, None))
        known = logged(server, tmp_path)
    assert known.requests[0, 0] == key_of(body(20, None))
    tokens = known.writes[(known.writes[:, 1] >= 1) & (known.writes[:, 1] <= 20)]
    assert list(np.diff(tokens[:, 3])) == [5_000_000] * 19
    assert tokens[0, 3] == known.requests[0, 2] + 20_000_000
    assert (tokens[:, 4] >= tokens[:, 3]).all()


def test_streams_in_phase_share_their_instants(tmp_path):
    with serving(10, 5) as server:
        def one(user):
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                ask(sock, body(10, user))
        threads = [threading.Thread(target=one, args=(i,)) for i in range(5)]
        for thread in threads:
            thread.start()
            time.sleep(0.0013)
        for thread in threads:
            thread.join()
        known = logged(server, tmp_path)
    due = known.writes[known.writes[:, 1] >= 1, 3]
    assert (due % 5_000_000 == 0).all()


def test_a_client_that_reads_late_gets_everything_and_the_log_says_so(tmp_path):
    with serving() as server:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            what = body(20_000, 3)
            sock.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(what), what))
            time.sleep(0.3)
            got = b""
            while not got.endswith(b"\r\n0\r\n\r\n"):
                got += sock.recv(2**20)
        known = logged(server, tmp_path)
    assert len(EVENT.findall(got)) == 20_003 == known.events
    assert (known.writes[:, 5] == -1).any()


def test_a_client_that_leaves_costs_nobody_else_anything(tmp_path):
    with serving(5, 1) as server:
        gone = socket.create_connection(("127.0.0.1", server.port))
        what = body(10_000, 1)
        gone.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(what), what))
        time.sleep(0.05)
        gone.close()
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            assert len(ask(sock, body(20, 2))) == 23
        known = logged(server, tmp_path)
    assert known.requests[0, 4] == 0
    assert known.requests[1, 4] > 0


def test_accuracy_finds_the_errors_that_were_put_in():
    ms = 1_000_000
    writes = [[0, k, 1, 0, 100 * ms + 20 * ms * k, 100 * ms + 20 * ms * k + 5000]
              for k in range(1, 5)]
    known = truth.Truth(np.array([[7, 10 * ms, 11 * ms, 4, 1]]), np.array(writes),
                        np.empty((0, 2), np.int64))
    stamps = np.array([w[4] for w in writes])
    stamps[2] += 3 * ms
    found = truth.accuracy(known, [truth.Seen(7, 0, 9 * ms, stamps)])
    assert found.ttft is not None
    assert found.gap is not None
    assert (found.ttft.max, found.gap.max, found.gap.p50) == (1.0, 3.0, 3.0)
    assert (found.requests, found.wrong, found.aside) == (1, 0, 0)
    short = truth.accuracy(known, [truth.Seen(7, 0, 9 * ms, stamps[:3])])
    assert short.wrong == 1


def test_a_host_stall_is_set_aside():
    ms = 1_000_000
    at = np.arange(1, 101) * 20 * ms
    writes = np.stack([np.zeros(100, int), np.arange(1, 101), np.ones(100, int), at, at, at + 5000],
                      axis=1)
    known = truth.Truth(np.array([[7, 0, 0, 100, 1]]), writes,
                        np.array([[1000 * ms, 1100 * ms]]))
    stamps = at.copy()
    stamps[(at >= 1000 * ms) & (at <= 1100 * ms)] += 50 * ms
    found = truth.accuracy(known, [truth.Seen(7, 0, 1, stamps)])
    assert found.gap is not None
    assert found.gap.max == 0
    assert 6 <= found.aside <= 8


def test_whoever_asks_gets_the_log_so_far_and_the_next_one_begins_anew(tmp_path):
    command = [sys.executable, "-m", "servers.null", "--itl-ms", "1", "--keep-log"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = int(process.stdout.readline().split()[1])
        with socket.create_connection(("127.0.0.1", port)) as idle:
            ask(idle, body(5, 1))
            with socket.create_connection(("127.0.0.1", port)) as broken_off:
                what = body(100_000, 2)
                broken_off.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b"
                                   % (len(what), what))
                assert broken_off.recv(100)
                for k, users in ((0, [1, 2]), (1, [3])):
                    path = tmp_path / f"{k}.bin"
                    if k:
                        ask(idle, body(5, 3))
                    process.stdin.write(f"{path}\n")
                    process.stdin.flush()
                    assert process.stdout.readline() == "SAVED\n"
                    known = truth.load(path)
                    assert list(known.requests[:, 0]) == users
                    assert int(known.writes[:, 0].max()) == len(users) - 1
                while broken_off.recv(65536):
                    pass
        process.stdin.close()
        assert process.wait(10) == 0
