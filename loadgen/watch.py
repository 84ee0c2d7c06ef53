"""All that is watched beside the load of one session, in one place: rows as they come, the run
folder's journals of them, and what could not be kept. If a row cannot be kept, the leg fails: a
level whose KV cache nobody saw must not be called safe."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from loadgen import health
from loadgen.errors import StoreError
from loadgen.health import Gauges, Health, Named
from loadgen.store import Journal, Row, RunFolder
from loadgen.target import Target
from loadgen.telemetry import gpu, log, process
from loadgen.telemetry import server as scraping
from loadgen.telemetry.signs import HELD_DOWN, series

RECENT_NS = 10_000_000_000  # rows that are kept in memory from before a leg: differences need them
COOL_S, COOL_AGAIN_S = 15.0, 1.0  # at most: for a server to come to rest; where it never did before
LOOK_S = 0.25

now_ns = time.monotonic_ns


class Watcher:
    """`say` tells the operator what cannot be watched, once. Rows that come before there is a run
    folder are written when there is one."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.rows: list[Row] = []  # of the running leg, and from shortly before it
        self.spoiled: str | None = None  # why telemetry could not be kept
        self._say = say
        self._folder: RunFolder | None = None
        self._journals: dict[str, Journal] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._target: Target | None = None
        self._health = Health()
        self._tree: process.Watch | None = None
        self._tail: log.Tail | None = None
        self._oom_kills = process.OomKills()
        self._cool_s = COOL_S
        self._forgets = False  # the server offers to empty its prefix cache, and is ours
        self.oom_line: str | None = None  # of its log, while it lived
        self.log_from = 0  # bytes of the log before it

    def opened(self, folder: RunFolder) -> None:
        """The run folder is there."""
        self._folder = folder
        early, self.rows = self.rows, []
        self.keep(early)

    def begin_gpus(self) -> None:
        self._begin(gpu.watch(self.keep, self._say))

    def begin_server(self, target: Target, simulated: bool) -> None:
        self._target = target
        self._begin(scraping.watch(target, self.keep, simulated))

    async def watch(self, target: Target, simulated: bool, gpus: bool) -> None:
        """All of it, until cancelled."""
        if gpus and not simulated:
            self.begin_gpus()
        self.begin_server(target, simulated)
        try:
            await asyncio.gather(*self._tasks)
        finally:
            await self.close()

    async def close(self) -> None:
        """Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._tree is not None:
            self._tree.stop()
        self._oom_kills.close()
        while self._journals:
            self._journals.popitem()[1].close()

    async def sample(self) -> None:
        """The server's counters while nothing of ours is in flight: what they grow by over a leg
        is the leg's."""
        assert self._target is not None
        self.keep(await scraping.once(self._target))

    async def cool_down(self) -> None:
        """Until the server says that nothing runs and nothing waits; not for ever. The last look
        is its counters before the leg."""
        assert self._target is not None
        if self._forgets:
            self._forgets = await scraping.forget_prefixes(self._target)
        until_s = time.monotonic() + self._cool_s
        while True:
            rows = await scraping.once(self._target)
            self.keep(rows)
            busy = sum(r.value for r in rows if r.name in ("running", "waiting"))
            if not busy:
                return
            if time.monotonic() > until_s:
                if self._cool_s == COOL_S:
                    self._say(f"the server is not idle before a level: {busy:.0f} requests that "
                              "are not this test's run or wait at it")
                self._cool_s = COOL_AGAIN_S
                return
            await asyncio.sleep(LOOK_S)

    # ---------------------------------------------------------------------------- its states

    def started(self, pid: int | None, log_path: Path, since: int, forgets: bool) -> None:
        """The server was started. `pid`: of its first process; `since`: bytes that its log had
        before; `forgets`: its prefix cache may be emptied, if it offers that."""
        self._oom_kills.close()
        self._oom_kills = process.OomKills()
        self.oom_line, self.log_from, self._forgets = None, since, forgets
        self._tail = log.Tail(log_path, since)
        if self._tree is not None:
            self._tree.stop()
        loop = asyncio.get_running_loop()
        self._tree = None if pid is None else process.Watch(
            pid, lambda rows: _hand_over(loop, self.keep, rows))
        self._to(health.started(self._health))

    def ready(self) -> None:
        if self._tail is not None:
            self._tail.new()  # what it said while it started is no level's
        self._to(health.ready(self._health))

    def name(self, why: str, stopped: bool = False) -> Named:
        """What a death is called; from here on that is its state."""
        served = self._health.named.state != "STARTING"
        return self.dead(health.death(why, served, self._oom_kills.says(), stopped))

    def dead(self, named: Named) -> Named:
        self._to(health.died(self._health, named))
        return named

    def stopped(self) -> None:
        """By us, at the end; of one that had died, its death stays the last word."""
        if self._health.named.state not in health.DEAD:
            self.dead(Named("STOPPED", "by us, at the end"))

    def look(self, inflight: int) -> None:
        """Twice a second while a leg runs."""
        t_ns = now_ns()
        if self._tail is not None:
            said = log.rows_of(self._tail.new(), t_ns)
            self.keep(said)
            self.oom_line = self.oom_line or next(
                (r.labels["line"] for r in said if r.name == "oom"), None)
        self._to(health.look(self._health, t_ns, inflight, health.strain(self._gauges(t_ns))))

    def _to(self, after: Health) -> None:
        before, self._health = self._health.named, after
        if (before.state, before.why) != (after.named.state, after.named.why):
            why = {"why": after.named.why} if after.named.why else {}
            self.keep([Row("state", now_ns(), after.named.state, 1.0, why)])

    def _gauges(self, t_ns: int) -> Gauges:
        recent = []
        for row in reversed(self.rows):
            if row.t_ns < t_ns - RECENT_NS:  # they come nearly in the order of time
                break
            if row.t_ns >= t_ns - health.STRAIN_NS:
                recent.append(row)
        told = series(recent, "server")
        bits = [int(r.value) for r in recent if r.name == "throttle_bits"]
        return Gauges(
            running=told.get("running", ()), waiting=told.get("waiting", ()),
            kv_frac=told.get("kv_frac", ()), preemptions=told.get("preemptions", ()),
            slowed_by=tuple(name for bit, name in HELD_DOWN.items() if any(b & bit for b in bits)))

    # ---------------------------------------------------------------------------------- rows

    def keep(self, rows: list[Row]) -> None:
        self.rows += rows
        if self._folder is None:
            return
        try:
            for row in rows:
                if row.source not in self._journals:
                    self._journals[row.source] = self._folder.telemetry(row.source)
                self._journals[row.source].append(row)
        except StoreError as e:
            self.spoiled = str(e)

    def forget_old(self) -> None:
        """Before a leg."""
        since_ns = now_ns() - RECENT_NS
        self.rows = [r for r in self.rows if r.t_ns >= since_ns]

    # ---------------------------------------------------------------------------------- inside

    def _begin(self, doing: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(doing))


def _hand_over(loop: asyncio.AbstractEventLoop, keep: Callable[[list[Row]], None],
               rows: list[Row]) -> None:
    """From another thread; a loop that is closed wants no rows."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(keep, rows)
