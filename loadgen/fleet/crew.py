"""A worker's shards: plain asyncio processes under Locust's, spoken to over pipes. What
`loadgen.supervise.Shards` is to an asyncio process, for one that runs on gevent."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gevent
import msgspec
from msgspec import Struct

from loadgen import scenario
from loadgen.hosts.delivery import Outgoing
from loadgen.hosts.messages import SHARD_LEASE_S, Do, Plan
from loadgen.leg import Leg
from loadgen.shard import Command, Frame, Setup
from loadgen.target import Target

END_S = 4.0  # a shard that was told to end has so long

_encode = msgspec.json.Encoder(enc_hook=scenario.enc_hook).encode
_decode_frame = msgspec.json.Decoder(Frame).decode


class Spares:
    """Processes that have started and wait for their work: starting takes each some 0.5 s of CPU,
    which a test should not wait for."""

    def __init__(self) -> None:
        self._waiting: list[subprocess.Popen[bytes]] = []

    def fill(self, n: int) -> None:
        self._waiting = [p for p in self._waiting if p.poll() is None]
        self._waiting += [_start() for _ in range(n - len(self._waiting))]

    def take(self) -> "subprocess.Popen[bytes]":
        """One that waits, or a new one."""
        while self._waiting:
            if (process := self._waiting.pop()).poll() is None:
                return process
        return _start()

    def end(self) -> None:
        """They hold nothing that could be lost."""
        for process in self._waiting:
            process.kill()
            process.wait()
        self._waiting = []


def _start() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "loadgen.shard"], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, process_group=0)


class _Shard:
    """One process, and the last frame it sent."""

    def __init__(self, setup: Setup, process: "subprocess.Popen[bytes]",
                 news: Callable[[], None]) -> None:
        self.index, self.frame = setup.shard, Frame(kind="progress")
        self.ready = False
        self.dead: str | None = None
        self._news = news
        self.process = process
        self._listening = gevent.spawn(self._listen)
        self.tell(setup)

    @property
    def failed(self) -> str | None:
        return self.dead or self.frame.failed

    def tell(self, message: Struct) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(_encode(message) + b"\n")
            self.process.stdin.flush()
        except (OSError, ValueError):
            pass  # `_listen` sees its end

    def end(self) -> None:
        """EOF: it keeps its records and ends."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it ended before
            self.process.stdin.close()

    def reap(self) -> None:
        try:
            self.process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._listening.kill()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            self.frame = _decode_frame(line)
            self.ready = True
            if self.frame.kind != "progress":
                self._news()
        code = self.process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
        self.dead = f"generator process {self.index} was {how}"
        self._news()


class Crew:
    """All shards of this worker for one test. `news`: a shard is ready, has ended its leg, or is
    dead."""

    def __init__(self, plan: Plan, target: Target, folder: Path, spares: Spares,
                 news: Callable[[], None]) -> None:
        self.plan, self.leg = plan, ""
        self.outgoing: dict[int, Outgoing] = {}
        self._shards: list[_Shard] = []
        self._closed = False
        for shard in range(plan.first, plan.first + plan.n):
            path = folder / f"records-{shard}.jsonl"
            self.outgoing[shard] = Outgoing(plan.run, shard, path)
            self._shards.append(_Shard(Setup(
                run=plan.run, journal=str(path.absolute()), shard=shard, of=plan.of,
                scenario=plan.scenario, target=target, ratios=plan.ratios,
                parent_pid=os.getpid(), lease_s=SHARD_LEASE_S), spares.take(), news))
        self._leasing = gevent.spawn(self._lease)

    @property
    def is_ready(self) -> bool:
        return all(s.ready for s in self._shards)

    @property
    def failed(self) -> str | None:
        if self._closed:
            return next((s.frame.failed for s in self._shards if s.frame.failed), None)
        return next((why for s in self._shards if (why := s.failed)), None)

    @property
    def frames(self) -> dict[int, Frame]:
        """By shard, of the leg that runs or was the last."""
        return {s.index: s.frame for s in self._shards if s.frame.leg == self.leg and self.leg}

    @property
    def is_over(self) -> bool:
        """No shard is in the leg any more."""
        return all(s.dead or s.frame.kind == "ended" for s in self._shards)

    def begin(self, leg: Leg, t0_ns: int) -> None:
        self.leg = leg.id
        for s in self._shards:
            s.frame = Frame(kind="progress", leg=leg.id)
            s.tell(Command("leg", leg, t0_ns))

    def tell(self, do: Do) -> None:
        """stop or cancel."""
        assert do in ("stop", "cancel")
        for s in self._shards:
            s.tell(Command(do))

    def close(self) -> None:
        """Ends all shards; their journals are whole when this returns."""
        self._closed = True
        self._leasing.kill()
        for s in self._shards:
            s.end()
        for s in self._shards:
            s.reap()

    def _lease(self) -> None:
        lease = Command("lease")
        while True:
            gevent.sleep(1)
            for s in self._shards:
                s.tell(lease)

