"""All that is watched beside the load of one session, in one place: rows as they come, the run
folder's journals of them, and what could not be kept. If a row cannot be kept, the leg fails: a
level whose KV cache nobody saw must not be called safe."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from loadgen.errors import StoreError
from loadgen.store import Journal, Row, RunFolder
from loadgen.target import Target
from loadgen.telemetry import gpu
from loadgen.telemetry import server as scraping

RECENT_NS = 10_000_000_000  # rows that are kept in memory from before a leg: differences need them


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
        while self._journals:
            self._journals.popitem()[1].close()

    async def sample(self) -> None:
        """The server's counters while nothing of ours is in flight: what they grow by over a leg
        is the leg's."""
        assert self._target is not None
        self.keep(await scraping.once(self._target))

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
        since_ns = time.monotonic_ns() - RECENT_NS
        self.rows = [r for r in self.rows if r.t_ns >= since_ns]

    # ---------------------------------------------------------------------------------- inside

    def _begin(self, doing: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(doing))
