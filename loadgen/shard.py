"""One generator process: plain asyncio, no Locust, no gevent. Commands come as JSON lines on
stdin, frames go out as JSON lines on stdout, records go to its own journal.

    stdin   Setup, then Command("leg") … Command("stop") … Command("cancel"), Command("lease")
    stdout  Frame(kind="ready"), Frame("progress") twice a second, Frame("ended") per leg

It dies with its parent: by pdeathsig, at EOF of stdin, and when no lease came for some seconds
(the parent may be stopped, not dead). An orphan that goes on firing is worse than a lost run.
"""

import asyncio
import gc
import itertools
import os
import resource
import time
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from loadgen import child, datasets, net, scenario
from loadgen.client import Client
from loadgen.drive import LegRun, Work
from loadgen.errors import GeneratorError, ScenarioError, StoreError
from loadgen.leg import Health, Leg
from loadgen.net import now_ns
from loadgen.outputs import Outputs
from loadgen.prompts import Ratio
from loadgen.pulse import PROBE_S, Pulse
from loadgen.store import SCHEMA, Header, Journal
from loadgen.target import Target

LEASE_S = 5.0
FRAME_S = 0.5


class Setup(Struct, frozen=True):
    """What a shard must know; the first line on its stdin."""

    run: str
    journal: str  # path
    shard: int
    of: int
    scenario: dict[str, Any]
    target: Target
    ratios: dict[str, Ratio]
    parent_pid: int
    lease_s: float = LEASE_S


class Command(Struct, frozen=True, omit_defaults=True):
    """leg: run it from `t0_ns`. stop: no new requests, await what is in flight. cancel: now.
    lease: the parent is alive."""

    do: Literal["leg", "stop", "cancel", "lease"]
    leg: Leg | None = None
    t0_ns: int = 0


class Frame(Struct, frozen=True, omit_defaults=True):
    """What a shard tells while a leg runs; counts are of the leg so far. `ended` carries the
    leg's last due instant and, if the shard had to give up, why."""

    kind: Literal["ready", "progress", "ended"]
    leg: str = ""
    t_ns: int = 0
    inflight: int = 0
    done: int = 0
    done_good: int = 0
    streams: int = 0  # of those in flight: have begun
    silent_s: float = 0.0  # since anything came on any of those in flight …
    usual_s: float = 0.0  # … and the longest that was before, since the process began
    complete: bool = False  # the window is over and all that was due in it has ended
    sampled: int = 0  # ended requests that were due in the window …
    good: int = 0  # … and the good ones among them
    outcomes: dict[str, int] = {}
    stalls: list[tuple[int, int]] = []
    lag_s: float = 0.0  # of the event loop, the latest of the last second
    cpu_frac: float | None = None  # of a core, over the leg so far
    health: Health | None = None  # with `ended` only
    stopped_ns: int | None = None
    failed: str | None = None


class Hush:
    """How long nothing has come at all, as far as two looks a second can tell."""

    def __init__(self) -> None:
        self.usual_s = 0.0
        self._seen: object = None
        self._since_ns: int | None = None  # None: nothing is in flight

    def look(self, now_ns: int, inflight: int, seen: object) -> float:
        """`seen`: whatever changes when a byte comes or a request ends. s."""
        if not inflight or self._since_ns is None or seen != self._seen:
            if self._since_ns is not None:
                self.usual_s = max(self.usual_s, (now_ns - self._since_ns) / 1e9)
            self._since_ns, self._seen = (now_ns if inflight else None), seen
        return 0.0 if self._since_ns is None else (now_ns - self._since_ns) / 1e9


class Shard:
    """The process: its pool of connections, its journal, the leg that runs."""

    def __init__(self, setup: Setup, client: Client) -> None:
        checked = scenario.parse(setup.scenario, "setup")
        journal = Journal(Path(setup.journal))
        journal.append(Header(SCHEMA, setup.run, setup.shard, now_ns(), time.time_ns()))
        self.work = Work(
            checked, {c.name: checked.slo_of(c.name) for c in checked.classes}, setup.ratios,
            client, journal, setup.shard, setup.of, itertools.count())
        self.running: LegRun | None = None
        self._hush = Hush()
        self.leased_ns = now_ns()
        self._lease_s = setup.lease_s

    def begin(self, leg: Leg, t0_ns: int) -> LegRun:
        """From here on `running` takes stop and cancel."""
        self._pulse = Pulse(t0_ns)
        tally = self.work.client.tally
        self._full_reads, self._lingered = tally.full_reads, tally.lingered
        self.running = LegRun(self.work, leg, t0_ns)
        return self.running

    async def leg(self, run: LegRun) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()  # a pause of the collector would be in the stamps
        self._pulse.begin()
        reporter = asyncio.create_task(self._report(run))
        try:
            await run.run()
        finally:
            reporter.cancel()
            self._pulse.end()
            gc.enable()
            gc.unfreeze()
        self.running = None
        _tell(self._frame("ended", run))

    async def _report(self, run: LegRun) -> None:
        """Progress frames, the pulse, and the lease."""
        next_frame, expired = now_ns(), 0
        while True:
            beat_ns = net.next_tick_ns(PROBE_S)
            await asyncio.sleep((beat_ns - now_ns()) / 1e9)
            now = now_ns()
            self._pulse.beat(beat_ns - round(PROBE_S * 1e9), now, self.work.client.flown_ns())
            expired = expired + 1 if (now - self.leased_ns) / 1e9 > self._lease_s else 0
            if expired > 1 / PROBE_S:  # not right after a stall, that the parent had as well
                run.error = GeneratorError("no lease from the parent: it is stopped or gone")
                run.cancel()
            if now >= next_frame or run.complete:
                next_frame = now + round(FRAME_S * 1e9)
                self._pulse.look()
                _tell(self._frame("progress", run))

    def _frame(self, kind: Literal["progress", "ended"], run: LegRun) -> Frame:
        pulse, ended = self._pulse, kind == "ended"
        streams, came = self.work.client.came()
        silent_s = self._hush.look(now_ns(), self.work.client.inflight, (run.done, came))
        return Frame(kind=kind, leg=run.leg.id, t_ns=now_ns(), inflight=self.work.client.inflight,
                     done=run.done, done_good=run.done_good, complete=run.complete,
                     sampled=run.sampled, good=run.good, streams=streams, silent_s=silent_s,
                     usual_s=self._hush.usual_s, lag_s=pulse.lag_recent_s(),
                     cpu_frac=pulse.cpu_frac(now_ns()),
                     outcomes=dict(run.outcomes), stalls=pulse.stalls,
                     health=self._health(run) if ended else None,
                     stopped_ns=run.stopped_ns,
                     failed=_says(run.error))

    def _health(self, run: LegRun) -> Health:
        leg, now = run.leg, now_ns()
        self._pulse.beat(now - round(PROBE_S * 1e9), now, self.work.client.flown_ns())
        from_ns = run.t0_ns + round(leg.warmup_s * 1e9)
        to_ns = min(now, now if run.stopped_ns is None else run.stopped_ns)
        if leg.measure_s is not None and leg.num_sessions is None:
            to_ns = min(to_ns, from_ns + round(leg.measure_s * 1e9))
        tally = self.work.client.tally
        return msgspec.structs.replace(
            self._pulse.health(self.work.shard, now, from_ns, to_ns),
            full_reads=tally.full_reads - self._full_reads,
            lingered=tally.lingered - self._lingered, rcvbuf_bytes=tally.rcvbuf_bytes)


def _says(error: BaseException | None) -> str | None:
    """A full disk in its own words; anything else is a bug of ours, and shows its type."""
    known = isinstance(error, StoreError | GeneratorError)
    if error is None:
        return None
    return str(error) if known else f"{type(error).__name__}: {error}"


_decode_command = msgspec.json.Decoder(Command, dec_hook=scenario.dec_hook).decode
_encode_frame = msgspec.json.Encoder().encode


def _tell(frame: Frame) -> None:
    os.write(1, _encode_frame(frame) + b"\n")


def raise_fd_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(setup: Setup, lines: asyncio.StreamReader) -> None:
    checked = scenario.parse(setup.scenario, "setup")
    journal = Path(setup.journal)
    outputs = Outputs(journal.with_name(f"outputs-{setup.shard}.jsonl"), checked)
    async with Client(setup.target, checked, outputs) as client:
        try:
            for c in checked.classes:
                if c.dataset is not None:
                    datasets.read(c.dataset)
            shard = Shard(setup, client)
        except (StoreError, ScenarioError) as e:
            _tell(Frame(kind="ready", failed=str(e)))
            return
        _tell(Frame(kind="ready", t_ns=now_ns()))
        leg: asyncio.Task[None] | None = None
        while line := await lines.readline():
            command = _decode_command(line)
            shard.leased_ns = now_ns()
            if command.do == "leg" and command.leg is not None:
                leg = asyncio.create_task(shard.leg(shard.begin(command.leg, command.t0_ns)))
            elif shard.running is not None and command.do == "stop":
                shard.running.stop()
            elif shard.running is not None and command.do == "cancel":
                shard.running.cancel()
        if leg is not None and not leg.done() and shard.running is not None:
            shard.running.cancel()  # stdin closed: the parent is gone; keep the records and end
            await asyncio.wait([leg], timeout=LEASE_S)


async def _main(lines: asyncio.StreamReader) -> None:
    if not (line := await lines.readline()):
        return  # started ahead of its work, and none came
    setup = msgspec.json.decode(line, type=Setup)
    child.die_with_parent(setup.parent_pid)
    raise_fd_limit()
    await _serve(setup, lines)


def main() -> None:
    child.run(_main)


if __name__ == "__main__":
    main()
