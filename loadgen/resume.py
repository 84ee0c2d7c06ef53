"""A search that was stopped goes on from its journals: what it had finished is told to the search
again, and what it asks for next is run. Reads the run folder; starts nothing."""

import re
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from loadgen.errors import FolderError, ScenarioError
from loadgen.judge import ServerSigns
from loadgen.leg import Leg, Window
from loadgen.ramp import SweepPlan
from loadgen.record import RequestRecord
from loadgen.store import Journal, LegLine, Manifest, Resumed, RunFolder
from loadgen.sweep import Executor
from loadgen.telemetry.signs import series, signs_of

STANDS = ("done", "cut", "server_died")  # endings of a leg that is not run again
SAME_CLOCK_NS = 5_000_000_000  # a wall clock is set by less than that; a new boot differs by more
OF_ITS_START = ("--port", "--parent-pid")  # options of a server that differ each time
CLOSE = 0.01  # a vLLM finds a few KV blocks more or less at each start
REPEATS = 1000  # apart from all seeds of the first try


class Stopped(Struct, frozen=True):
    """What a run folder says of its search. `done`: the legs that stand. `decided_s`: what of the
    budget was spent each time that the search looked, up to the last of them; `spent_s`: in all,
    with the leg that was cut. `tries`: how often the search was started so far."""

    folder: RunFolder
    manifest: Manifest
    plan: SweepPlan
    done: list[tuple[Leg, Window]]
    decided_s: list[float]
    spent_s: float
    tries: int


def stopped(path: Path) -> Stopped:
    """Raises FolderError, StoreError; ScenarioError if the folder holds no search."""
    folder = RunFolder(path)
    manifest = folder.manifest()
    if manifest.plan is None:
        raise ScenarioError(f"{path} holds no search with a plan: only a `loadgen sweep` of this "
                            "version or a later one can go on")
    try:
        plan = msgspec.convert(manifest.plan, SweepPlan)
    except msgspec.ValidationError as e:
        raise FolderError(f"{path}/manifest.json: plan: {e}; the search was of another version of "
                          "loadgen, which could go on with it") from None
    done: list[tuple[Leg, Window]] = []
    before: list[float] = []
    decided_s: list[float] = []
    tries = 1
    for leg, window in folder.legs():
        if window is None or window.ending not in STANDS:
            break
        done.append((leg, window))
    for line in folder.leg_lines():
        if line.spent_s is not None:
            before.append(line.spent_s)
        elif line.leg is not None and done and line.leg.id == done[-1][0].id:
            decided_s = list(before)
        elif line.resumed is not None:
            before, tries = before[:line.resumed.looks], tries + 1
    return Stopped(folder, manifest, plan, done, decided_s, _spent_s(folder), tries)


def _spent_s(folder: RunFolder) -> float:
    """Of the budget, over all starts of the search: of each from its first leg's start to the last
    thing that is known of it."""
    apart = folder.apart().resumed
    spent_s = apart[-1].spent_s if apart else 0.0
    sizes = {folder.path / name: size for name, size in apart[-1].sizes.items()} if apart else {}
    kept = set(apart[-1].kept) if apart else set()
    stamps = [x for r in folder.records(sizes) for x in (r.due_ns, r.end_ns)]
    stamps += [x for leg, w in folder.legs() if w is not None and leg.id not in kept
               for x in (w.t0_ns, w.end_ns)]
    return spent_s + (max(stamps) - min(stamps)) / 1e9 if stamps else spent_s


class Clock:
    """How much of the budget is spent, as the search asks for it; each answer is written down, so
    that the search can be told the same again."""

    def __init__(self, journal: Journal | None, before: Stopped | None = None) -> None:
        self._journal = journal
        self._again = list(before.decided_s) if before else []
        self._spent_s = before.spent_s if before else 0.0
        self._began: float | None = None

    def __call__(self) -> float:
        if self._again:
            return self._again.pop(0)
        now_s = time.monotonic()
        if self._began is None:
            self._began = now_s
        spent_s = self._spent_s + now_s - self._began
        if self._journal is not None:
            self._journal.append(LegLine(spent_s=spent_s))
        return spent_s


class NextLeg(Exception):
    """The search asks for a leg that was not run yet."""


class Replay:
    """Gives a search the legs that stand, then has others run, with seeds of their own: a server
    that still runs would find the prompts of the leg that was cut in its cache. Without an executor
    it raises NextLeg there."""

    def __init__(self, before: Stopped, executor: Executor | None = None) -> None:
        self._before, self._executor = before, executor
        self._left = list(before.done)
        self._server = series(before.folder.rows(), "server") if self._left else {}
        self._records: dict[str, list[RequestRecord]] = {leg.id: [] for leg, _ in before.done}
        for r in before.folder.records() if self._left else ():
            if r.leg in self._records:
                self._records[r.leg].append(r)
        self._asked = False

    async def run_leg(self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]:
        if self._left:
            kept, window = self._left.pop(0)
            if (kept.id, kept.load) != (leg.id, leg.load):
                raise ScenarioError(differs(self._before.folder.path, leg, kept))
            return window, self._records.pop(kept.id), signs_of(window, self._server)
        if self._executor is None:
            raise NextLeg
        self._asked = True
        return await self._executor.run_leg(msgspec.structs.replace(
            leg, seed=leg.seed + REPEATS * self._before.tries))

    async def restart(self, why: str) -> None:
        """A server that died in a leg that stands was started anew since."""
        if self._asked and self._executor is not None:
            await self._executor.restart(why)


def differs(path: Path, leg: Leg, kept: Leg) -> str:
    return (f"{path}: the search would ask for {leg.id} where {kept.id} was run: it was of another "
            "version of loadgen, which could go on with it")


def note(before: Stopped, now_ns: int, wall_ns: int) -> Resumed:
    """What legs.jsonl is to say before the search goes on. `now_ns` and `wall_ns`: the host's
    clocks, read together."""
    header = next(iter(before.folder.headers()), None)
    apart_ns = 0 if header is None else (
        (wall_ns - now_ns) - (header.wall_ns - header.mono_ns))
    known_ns = sum(r.shift_ns for r in before.folder.apart().resumed)
    shift_ns = apart_ns if abs(apart_ns) > SAME_CLOCK_NS else 0
    files = (*before.folder.path.glob("records-*.jsonl"),
             *before.folder.path.glob("telemetry-*.jsonl"),
             *before.folder.path.glob("outputs-*.jsonl"))
    return Resumed(
        when=datetime.now().astimezone().isoformat(timespec="seconds"), spent_s=before.spent_s,
        kept=[leg.id for leg, _ in before.done], looks=len(before.decided_s),
        sizes={x.name: x.stat().st_size for x in sorted(files)}, shift_ns=shift_ns - known_ns)


# -------------------------------------------------------------------------------------- the server


def unlike(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In which facts a server differs from the one that the search began with."""
    return [f"{name}: {before.get(name)} before, {now.get(name)} now"
            for name in sorted({*before, *now} - {"log"})
            if not _alike(_lasting(before.get(name)), _lasting(now.get(name)))]


def _lasting(value: Any) -> Any:
    """Without what differs at each start of the same server."""
    if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
        return value
    kept: list[str] = []
    skip = False
    for word in value:
        if not skip and word not in OF_ITS_START:
            kept.append(re.sub(r"(--port)=\d+", r"\1", word))
        skip = word in OF_ITS_START
    return kept


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return all(_alike(a.get(k), b.get(k)) for k in {*a, *b})
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    if numbers:
        return bool(abs(a - b) <= CLOSE * max(abs(a), abs(b)))
    return bool(a == b)
