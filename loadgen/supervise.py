"""Starts shards on this host and runs legs through them: the one place that executes a leg with
real requests. (A leg may also be executed by Locust or by the simulator's virtual time; all of
them give a Window, and records under the leg's id.)"""

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec
from msgspec import Struct

from loadgen import metrics, scenario
from loadgen.errors import GeneratorError, StoreError
from loadgen.leg import Ending, Leg, Window
from loadgen.prompts import Ratio
from loadgen.shard import Command, Frame, Setup
from loadgen.store import LegLine, RunFolder
from loadgen.target import Target

HEAD_START_S = 0.4  # shards open connections and build bodies before a leg's clock starts
CUT_CONFIDENCE = 0.999  # "surely lost" is looked at twice a second: each look may err only rarely
CUT_MARGIN = 0.15
CUT_MIN_N = 20
CUT_MIN_S = 5.0  # a level that is lost still shows its throughput, for the knee:
CUT_OF_WARMUP = 1.6  # right after the start there is decoding only, all prompts are through

_encode = msgspec.json.Encoder(enc_hook=scenario.enc_hook).encode
_decode_frame = msgspec.json.Decoder(Frame).decode

now_ns = time.monotonic_ns


class Progress(Struct, frozen=True):
    """All shards' frames of the running leg, put together."""

    leg: Leg
    elapsed_s: float
    inflight: int = 0
    done: int = 0
    done_good: int = 0
    sampled: int = 0
    good: int = 0
    outcomes: dict[str, int] = {}
    stopping: bool = False
    streams: int = 0  # of those in flight: have begun
    silent_s: float = 0.0  # since anything came on any of them …
    usual_s: float = 0.0  # … and the longest that was before
    lag_s: float = 0.0  # of the worst generator process, the latest of the last second
    cpu_frac: float | None = None  # of the busiest one


class _Process:
    """One shard's process and the last frame it sent."""

    def __init__(self, index: int, process: asyncio.subprocess.Process,
                 news: asyncio.Event) -> None:
        self.index, self.process, self._news = index, process, news
        self.frame = Frame(kind="ready")
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()  # the leg, or the process
        self.dead: str | None = None

    async def listen(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.frame = _decode_frame(line)
            self._news.set()
            if self.frame.kind == "ready":
                self.ready.set()
            elif self.frame.kind == "ended":
                self.ended.set()
        code = await self.process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
        self.dead = f"generator process {self.index} was {how}"
        self.ready.set()
        self.ended.set()
        self._news.set()

    async def tell(self, message: Struct) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(_encode(message) + b"\n")
            await self.process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            pass  # `listen` sees its end


class Shards:
    """A host's generator processes. Use as `async with Shards(…) as shards`."""

    def __init__(self, folder: RunFolder, run: str, plan_scenario: scenario.Scenario,
                 target: Target, ratios: dict[str, Ratio], processes: int = 1) -> None:
        self._folder = folder
        self._setups = [Setup(
            run=run, journal=str(folder.records_path(i).absolute()), shard=i, of=processes,
            scenario=scenario.to_plain(plan_scenario), target=target, ratios=ratios,
            parent_pid=os.getpid()) for i in range(processes)]
        self._shards: list[_Process] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self._interrupts = 0
        self._news = asyncio.Event()  # a frame came, or a shard ended

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def _start(self) -> None:
        for i, setup in enumerate(self._setups):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "loadgen.shard", stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE, limit=2**26, process_group=0)
            shard = _Process(i, process, self._news)
            self._shards.append(shard)
            self._tasks.append(asyncio.create_task(shard.listen()))
            await shard.tell(setup)
        self._tasks.append(asyncio.create_task(self._lease()))
        await asyncio.gather(*(s.ready.wait() for s in self._shards))
        for shard in self._shards:
            if shard.frame.failed:
                raise StoreError(shard.frame.failed)
            if shard.dead:
                raise GeneratorError(f"{shard.dead} before the first leg")

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None,
                        tb: TracebackType | None) -> None:
        for shard in self._shards:
            assert shard.process.stdin is not None
            shard.process.stdin.close()
        for shard in self._shards:
            try:
                async with asyncio.timeout(5):
                    await shard.process.wait()
            except TimeoutError:
                shard.process.kill()
                await shard.process.wait()
        for task in self._tasks:
            task.cancel()

    async def run(self, leg: Leg, died: Callable[[], Awaitable[str | None]],
                  show: Callable[[Progress], None],
                  spoiled: Callable[[], str | None] = lambda: None) -> Window:
        """Runs a leg to the end of its last request. `died()` says why the server is dead,
        `spoiled()` why the measurement cannot be kept, or None; `show` gets progress twice a
        second."""
        self._spoiled = spoiled
        t0_ns = now_ns() + round(HEAD_START_S * 1e9)
        journal = self._folder.legs_journal()
        journal.append(LegLine(leg=leg))
        for shard in self._shards:
            shard.ended.clear()
            shard.frame = Frame(kind="progress")
            if shard.dead:
                shard.ended.set()
            await shard.tell(Command("leg", leg, t0_ns))
        if self._interrupts:
            self._send_all("stop")
        ending, note = await self._watch(leg, t0_ns, died, show)
        window = self._window(leg, t0_ns, ending, note)
        journal.append(LegLine(window=window))
        journal.close()
        return window

    def interrupt(self) -> None:
        """Once: no new requests, those in flight are awaited. Twice: now."""
        self._interrupts += 1
        self._send_all("stop" if self._interrupts == 1 else "cancel")

    # ---------------------------------------------------------------------------------- inside

    def _send_all(self, do: Any) -> None:
        self._tasks += [asyncio.create_task(s.tell(Command(do))) for s in self._shards]

    async def _lease(self) -> None:
        while True:
            await asyncio.sleep(1)
            for shard in self._shards:
                await shard.tell(Command("lease"))

    async def _watch(self, leg: Leg, t0_ns: int, died: Callable[[], Awaitable[str | None]],
                     show: Callable[[Progress], None]) -> tuple[Ending, str | None]:
        """Until all shards have ended the leg; cancels it when it is lost or the server dead."""
        ending: Ending | None = None
        note = None
        while not all(s.ended.is_set() for s in self._shards):
            try:
                async with asyncio.timeout(0.5):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()
            progress = self._progress(leg, t0_ns)
            show(progress)
            if ending is None:
                ending, note = await self._verdict(leg, progress, died)
                if ending is not None:
                    self._send_all("cancel")
        if (why := self._broken()) is not None:
            return "failed", why
        if ending in (None, "done") and (why := await died()) is not None:
            ending, note = "server_died", why
        if ending == "server_died":  # what it died of may be known by now
            return ending, await died() or note
        return ("interrupted", None) if self._interrupts else (ending or "done", note)

    async def _verdict(self, leg: Leg, progress: Progress, died: Callable[
            [], Awaitable[str | None]]) -> tuple[Ending | None, str | None]:
        """Whether the leg is to end now, and why."""
        if (why := self._broken()) is not None:
            return "failed", why
        if (why := await died()) is not None:
            return "server_died", why
        if is_lost(leg, progress.done, progress.done_good, progress.elapsed_s):
            return "cut", None
        done = all(s.ended.is_set() or (s.frame.leg == leg.id and s.frame.complete)
                   for s in self._shards)  # one that has no slot, or no more plan, ends before
        return ("done" if done else None), None

    def _broken(self) -> str | None:
        failed = (s.dead or s.frame.failed for s in self._shards)
        return self._spoiled() or next((why for why in failed if why), None)

    def _progress(self, leg: Leg, t0_ns: int) -> Progress:
        return together(leg, max(0.0, (now_ns() - t0_ns) / 1e9), [s.frame for s in self._shards],
                        self._interrupts > 0)

    def _window(self, leg: Leg, t0_ns: int, ending: Ending, note: str | None) -> Window:
        return window_of(leg, t0_ns, now_ns(), [s.frame for s in self._shards], ending, note)


def together(leg: Leg, elapsed_s: float, frames: Sequence[Frame], stopping: bool) -> Progress:
    """What all shards' last frames say of the running leg; those of another leg say nothing."""
    frames = [f for f in frames if f.leg == leg.id]
    outcomes: dict[str, int] = {}
    for f in frames:
        for name, count in f.outcomes.items():
            outcomes[name] = outcomes.get(name, 0) + count
    return Progress(
        leg, elapsed_s, inflight=sum(f.inflight for f in frames),
        done=sum(f.done for f in frames), done_good=sum(f.done_good for f in frames),
        sampled=sum(f.sampled for f in frames), good=sum(f.good for f in frames),
        outcomes=outcomes, stopping=stopping, streams=sum(f.streams for f in frames),
        silent_s=min((f.silent_s for f in frames if f.inflight), default=0.0),
        usual_s=max((f.usual_s for f in frames), default=0.0),
        lag_s=max((f.lag_s for f in frames), default=0.0),
        cpu_frac=max((f.cpu_frac for f in frames if f.cpu_frac is not None), default=None))


def window_of(leg: Leg, t0_ns: int, end_ns: int, frames: Sequence[Frame], ending: Ending,
              note: str | None) -> Window:
    """The sample's window: as planned, or to where the leg was stopped or ended. All instants are
    of one clock."""
    from_ns = t0_ns + round(leg.warmup_s * 1e9)
    stops = [f.stopped_ns for f in frames if f.stopped_ns is not None]
    to_ns = end_ns  # of so many sessions: to the last answer's end
    if leg.measure_s is not None and leg.num_sessions is None:
        to_ns = from_ns + round(leg.measure_s * 1e9)
    to_ns = max(from_ns, min([to_ns, end_ns, *stops]))
    shards = [f.health for f in frames if f.health is not None]
    return Window(
        leg=leg.id, t0_ns=t0_ns, from_ns=from_ns, to_ns=to_ns, end_ns=end_ns, ending=ending,
        stalls=sorted(x for f in frames for x in f.stalls),
        lag_p99_s=max((h.lag_p99_s for h in shards if h.lag_p99_s is not None), default=None),
        cpu_frac=max((h.cpu_frac for h in shards if h.cpu_frac is not None), default=None),
        records=sum(f.done for f in frames), note=note, shards=shards, alone=True)


def is_lost(leg: Leg, done: int, good: int, elapsed_s: float) -> bool:
    """Of `done` ended requests so few were good that attainment is surely far below what the leg
    asks for, and the level was held long enough to show its throughput. The warm-up's requests
    count; because they crowd each other, and bad ones come in clumps, "far" is a wide margin."""
    if leg.cut_below is None or done < CUT_MIN_N:
        return False
    held_s = elapsed_s - leg.warmup_s
    lost = metrics.upper_bound(good, done, CUT_CONFIDENCE) < leg.cut_below - CUT_MARGIN
    return lost and held_s >= max(CUT_MIN_S, CUT_OF_WARMUP * leg.warmup_s)
