"""A Prometheus endpoint of the running test, by a process of its own: it reads the journals as they
grow, so that the processes that make the load do nothing for it, and are never waited for.

    stdin   Setup, then Running and Judged as they come, each a JSON line; it ends with its stdin

It dies with its parent.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import MetricsHandler
from prometheus_client.metrics_core import Metric

from loadgen import child, scenario
from loadgen.board import Board, Judged, Running
from loadgen.errors import ScenarioError
from loadgen.judge import Judgement
from loadgen.leg import Leg
from loadgen.record import RequestRecord
from loadgen.store import Manifest, RunFolder
from loadgen.supervise import Progress

TAIL_S = 0.5
AT_ONCE = 200  # records, between two scrapes
NICE = 10  # the load comes first


class Setup(Struct, frozen=True):
    """The first line on stdin. `fd`: of the socket that listens."""

    folder: str
    fd: int
    sizes: dict[str, int]  # of journals: what was in them before is not counted
    parent_pid: int


def listen(where: str) -> socket.socket:
    """A socket on `[HOST:]PORT`; without a host on 127.0.0.1. Raises ScenarioError."""
    host, colon, port = where.rpartition(":")
    if not port.isdecimal() or int(port) > 65535 or (colon and not host):
        raise ScenarioError(f"--metrics-port {where}: write a port, as 9464, or 0.0.0.0:9464")
    host = host.strip("[]") or "127.0.0.1"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, int(port)))
        sock.listen(16)
    except OSError as e:
        sock.close()
        raise ScenarioError(f"--metrics-port {where}: cannot listen on {host}:{port}: "
                            f"{e.strerror or e}; choose another port, or 0 for a free one"
                            ) from None
    return sock


class Exporter:
    """The parent's side: starts the process, tells it what no journal holds, ends it. What goes
    wrong with it costs the test nothing."""

    def __init__(self, sock: socket.socket, folder: RunFolder) -> None:
        host, port = sock.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadgen.exporter"], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, pass_fds=[sock.fileno()], process_group=0)
        assert self._process.stdin is not None
        self._fd = self._process.stdin.fileno()
        self._send(Setup(str(folder.path.absolute()), sock.fileno(), {
            x.name: x.stat().st_size for x in folder.path.glob("records-*.jsonl")}, os.getpid()))
        os.set_blocking(self._fd, False)
        sock.close()

    def progress(self, now: Progress) -> None:
        leg = now.leg
        self._send(Running(leg.id, leg.phase, leg.axis, leg.value, round(now.elapsed_s, 3),
                           now.inflight, now.done, now.sampled, now.good, round(now.lag_s, 6),
                           now.cpu_frac))

    def judged(self, leg: Leg, j: Judgement) -> None:
        self._send(Judged(leg.id, leg.phase, leg.value, j.good, j.n, j.load,
                          j.measurement))

    def close(self) -> None:
        """Idempotent."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: Struct) -> None:
        """A line that does not fit, or that nobody reads any more, is left out: a later one says
        what is then."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._fd, msgspec.json.encode(message) + b"\n")


# ------------------------------------------------------------------------------------ the process


class _Shared:
    """The board, of which scrapes and journals take turns."""

    def __init__(self, board: Board) -> None:
        self.board, self.lock = board, threading.Lock()

    def collect(self) -> Iterator[Metric]:
        with self.lock:
            yield from list(self.board.collect())


def board_of(manifest: Manifest) -> Board:
    facts = {"run": manifest.run, "model": manifest.model,
             "version": manifest.versions.get("loadgen", ""),
             "simulated": str(bool(manifest.server.get("simulated"))).lower()}
    mix = scenario.parse(manifest.scenario, "manifest")
    return Board(mix, {**facts, "scenario": mix.name}, manifest.target_frac)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One who asked has hung up: nothing that the operator should read of."""


def _serve(shared: _Shared, sock: socket.socket) -> None:
    sock.setblocking(True)  # gevent's are not
    registry = CollectorRegistry()
    registry.register(shared)
    handler: Any = MetricsHandler.factory(registry)
    server = _Server(sock.getsockname()[:2], handler, bind_and_activate=False)
    server.socket.close()
    server.socket = sock
    threading.Thread(target=server.serve_forever, daemon=True).start()


def _follow(shared: _Shared, folder: RunFolder, offsets: dict[Path, int]) -> None:
    """The journals, for ever."""
    while True:
        records: Iterator[RequestRecord] = folder.records(offsets)
        while some := list(islice(records, AT_ONCE)):
            with shared.lock:
                shared.board.add(some)
        time.sleep(TAIL_S)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to translate
    lines = sys.stdin.buffer
    setup = msgspec.json.decode(lines.readline(), type=Setup)
    child.die_with_parent(setup.parent_pid)
    os.nice(NICE)
    folder = RunFolder(Path(setup.folder))
    shared = _Shared(board_of(folder.manifest()))
    _serve(shared, socket.socket(fileno=setup.fd))
    offsets = {folder.path / name: size for name, size in setup.sizes.items()}
    threading.Thread(target=_follow, args=(shared, folder, offsets), daemon=True).start()
    decode = msgspec.json.Decoder(Running | Judged).decode
    for line in lines:
        news = decode(line)
        with shared.lock:
            shared.board.tell(news)


if __name__ == "__main__":
    main()
