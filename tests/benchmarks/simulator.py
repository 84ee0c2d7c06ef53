"""How much the simulator's HTTP server can do on one core: token events per second with its
schedule kept, engine and metrics included; and what open streams and idle connections cost.

    python -m tests.benchmarks.simulator                     the three below
    python -m tests.benchmarks.simulator rate [--streams 256] [--rate 42000] [--seconds 10]
    python -m tests.benchmarks.simulator streams [--streams 2000]
    python -m tests.benchmarks.simulator idle [--connections 10000]

The server has core 0, the reader (raw sockets, which counts bytes and parses nothing) another one.
The engine's steps are paced for --rate by the simulator's --speed, and its front end costs nothing:
what is measured is this program, not the vLLM that it plays. A step is late when its last write
came more than 5 ms after it was due.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import select
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from servers.sim.__main__ import engine_config, parse
from servers.sim.costs import StepTime
from tests.benchmarks.harness import CLIENT_CORE, ROOT, SERVER_CORE, on_core

PROFILE = """[constants]
source = "no front end: for tests/benchmarks/simulator.py"
front_token_s = 0
front_request_s = 0
front_latency_s = 0
"""
OPTIONS = ("--gpu", "h200", "--model", "qwen2.5-7b", "--max-num-seqs", "4096",
           "--max-num-batched-tokens", "8192")
CONTEXT_TOK = 300  # of a stream, about, where the step's time is looked up
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Seen:
    """Between two looks at the server. `late_frac`: of its steps."""

    wall_s: float
    events: int
    tokens: float
    steps: float
    late_frac: float
    worst_s: float
    cpu_frac: float
    rss_mb: float


@dataclass(frozen=True)
class Served:
    process: "subprocess.Popen[bytes]"
    port: int

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as f:
            text = f.read().decode()
        return {s.name: s.value for family in text_string_to_metric_families(text)
                for s in family.samples if not s.name.endswith("_bucket")}

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@contextlib.contextmanager
def serving(speed: float) -> Iterator[Served]:
    """The simulator on its core."""
    with tempfile.TemporaryDirectory() as folder:
        profile, log = Path(folder) / "profile.toml", Path(folder) / "log.txt"
        profile.write_text(PROFILE)
        with log.open("wb") as f, on_core(SERVER_CORE, -5):
            process = subprocess.Popen(
                [sys.executable, "-m", "servers.sim", *OPTIONS, "--port", "0", "--profile",
                 str(profile), "--speed", f"{speed:.6g}"], cwd=ROOT, stdout=f, stderr=f)
        try:
            yield Served(process, _port(process, log))
        finally:
            process.terminate()
            process.wait(30)


def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    until_s = time.monotonic() + 30
    while time.monotonic() < until_s and process.poll() is None:
        said = log.read_text()
        if "Starting vLLM server" in said:
            return int(said.rpartition(":")[2])
        time.sleep(0.05)
    raise RuntimeError(f"the simulator did not start:\n{log.read_text()[-2000:]}")


def speed_for(streams: int, rate_eps: float) -> float:
    """At which so many streams make so many events per second."""
    step_s = StepTime(engine_config(parse(list(OPTIONS))).machine).of(
        streams, streams, streams * CONTEXT_TOK, streams * CONTEXT_TOK)
    return rate_eps * step_s / streams


def _asked(tokens: int) -> bytes:
    body = json.dumps({"model": "qwen2.5-7b", "prompt": "Say something.", "stream": True,
                       "max_tokens": tokens, "ignore_eos": True}).encode()
    return (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body))


class Reader:
    """Streams on raw sockets. Each asks again when its answer has ended; answers have from half to
    one and a half times so many tokens, so that they do not all end at once."""

    def __init__(self, port: int, tokens: int) -> None:
        self._asks = itertools.cycle([_asked(n) for n in random.Random(1).choices(
            range(tokens // 2, tokens * 3 // 2), k=1000)])
        self._port = port
        self._epoll = select.epoll()
        self._socks: dict[int, socket.socket] = {}
        self.events = self.ended = 0

    def open(self, n: int, ask: bool = True) -> None:
        for _ in range(n):
            sock = socket.create_connection(("127.0.0.1", self._port), timeout=60)
            sock.setblocking(False)
            self._socks[sock.fileno()] = sock
            self._epoll.register(sock.fileno(), select.EPOLLIN)
            if ask:
                sock.send(next(self._asks))
                self.read(0.0)

    def read(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while True:
            for fd, _ in self._epoll.poll(max(0.0, min(0.1, until_s - time.monotonic()))):
                self._take(fd)
            if time.monotonic() >= until_s:
                return

    def _take(self, fd: int) -> None:
        sock = self._socks[fd]
        data = sock.recv(1 << 16)
        if not data:
            raise RuntimeError("the simulator closed a connection")
        self.events += data.count(b"data: {")
        if data.endswith(b"0\r\n\r\n"):
            self.ended += 1
            sock.send(next(self._asks))

    def close(self) -> None:
        for sock in self._socks.values():
            sock.close()


def watched(server: Served, reader: Reader, seconds: float) -> Seen:
    before, cpu_s, events = server.metrics(), server.cpu_s(), reader.events
    at_s = time.monotonic()
    reader.read(seconds)
    wall_s, cpu_s = time.monotonic() - at_s, server.cpu_s() - cpu_s
    events = reader.events - events
    after = server.metrics()
    told = {k: after[k] - before[k] for k in ("sim:steps_total", "sim:late_steps_total",
                                              "vllm:generation_tokens_total")}
    return Seen(wall_s, events, told["vllm:generation_tokens_total"], told["sim:steps_total"],
                told["sim:late_steps_total"] / max(1.0, told["sim:steps_total"]),
                after["sim:lag_seconds"], cpu_s / wall_s, server.rss_mb())


def rate(streams: int, rate_eps: float, seconds: float, tokens: int = 512) -> Seen:
    with serving(speed_for(streams, rate_eps)) as server, on_core(CLIENT_CORE, -5):
        reader = Reader(server.port, tokens)
        reader.open(streams)
        reader.read(2.0)  # the first answers have begun and, of some, ended
        seen = watched(server, reader, seconds)
        reader.close()
    return seen


def idle(connections: int) -> tuple[float, float]:
    """Megabytes before, and with so many connections that say nothing."""
    with serving(1.0) as server, on_core(CLIENT_CORE, -5):
        before_mb = server.rss_mb()
        reader = Reader(server.port, 16)
        reader.open(connections, ask=False)
        with contextlib.suppress(RuntimeError):  # uvicorn's five seconds are not over yet
            reader.read(1.0)
        server.metrics()  # it answers
        after_mb = server.rss_mb()
        reader.close()
    return before_mb, after_mb


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    p.add_argument("what", nargs="?", choices=("rate", "streams", "idle"))
    p.add_argument("--streams", type=int)
    p.add_argument("--rate", type=float, default=42_000.0, help="token events per second")
    p.add_argument("--seconds", type=float, default=10.0)
    p.add_argument("--connections", type=int, default=10_000)
    o = p.parse_args(argv)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if o.what in (None, "rate"):
        _tell(rate(o.streams or 256, o.rate, o.seconds), o.streams or 256)
    if o.what in (None, "streams"):
        _tell(rate(o.streams or 2000, min(o.rate, 20_000.0), o.seconds, tokens=4096),
              o.streams or 2000)
    if o.what in (None, "idle"):
        before_mb, after_mb = idle(o.connections)
        print(f"{o.connections} idle connections: {before_mb:.0f} → {after_mb:.0f} MB")


def _tell(s: Seen, streams: int) -> None:
    print(f"{streams} streams: {s.events / s.wall_s:,.0f} events/s ({s.tokens:,.0f} tokens counted "
          f"in /metrics), {s.late_frac:.2%} of {s.steps:.0f} steps late (worst "
          f"{1000 * s.worst_s:.0f} ms), {s.cpu_frac:.0%} of a core, {s.rss_mb:.0f} MB, load "
          f"{os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
