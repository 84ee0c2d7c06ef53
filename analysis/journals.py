"""Journals → what each leg comes to, with a million of long streams in mind: a leg's records are
read one batch after the other, their gaps become sums at C's speed and are forgotten, and legs are
spread over the cores. What a record means is said in `loadgen.metrics` and `judge` alone: a Digest
answers them as the whole record would.
"""

import gc
import itertools
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Raw, Struct

from analysis.gaps import Gaps, Pool, flatten
from loadgen import metrics
from loadgen.headroom import Peak
from loadgen.judge import Criteria, Judgement, ServerSigns, is_due, judge
from loadgen.leg import Leg, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Scenario
from loadgen.store import Apart, RunFolder

S = 1_000_000_000
BATCH = 500  # records whose gaps fit a core's cache: a larger batch takes seven times as long
ROWS = 10_000  # rows that are tuples at once
SPREAD_BYTES = 96 * 2**20  # of journals from which on a second process is worth its start
NONE = Raw(b"")
Column = np.ndarray[tuple[int], np.dtype[Any]]

FLAGS = ("good", "in_window", "void")
TEXT = ("cls", "outcome", "misses", "error")


class Digest(RequestRecord):
    """A record without its gaps, but with all that is asked of them. `window_tok`: output tokens
    whose events came inside the leg's window."""

    gaps_us: Raw = NONE  # type: ignore[assignment]  # until they are taken in
    reads: Raw = NONE  # type: ignore[assignment]
    event_tok: Raw = NONE  # type: ignore[assignment]
    n_gaps: int = 0
    sum_us: int = 0
    longest_us: int = 0
    reads_n: int | None = None
    window_tok: float = 0.0
    seconds: Any = None  # two arrays: by_second

    @property
    def n_events(self) -> int:
        return 0 if self.first_ns is None else 1 + self.n_gaps

    @property
    def stream_us(self) -> int:
        return self.sum_us

    @property
    def gap_max_us(self) -> int | None:
        return self.longest_us if self.n_gaps else None

    @property
    def n_reads(self) -> int:
        return self.n_events if self.reads_n is None else self.reads_n

    def by_second(self) -> tuple[list[int], list[int]]:
        if self.seconds is None:
            return [], []
        return self.seconds[0].tolist(), self.seconds[1].tolist()


class Stretch(Struct, frozen=True):
    """Lines of one leg that follow each other in a journal, from byte to byte. `apart`: what the
    run's resumptions say of them."""

    path: Path
    start: int
    stop: int
    shift_ns: int


class LegTask(Struct, frozen=True):
    """All that it takes to judge a leg."""

    leg: Leg
    window: Window
    signs: ServerSigns
    stretches: Sequence[Stretch]
    scenario: Scenario
    criteria: Criteria
    t0_ns: int


class LegResult(Struct, frozen=True):
    """`columns`: of the leg's records, in the journals' order; of texts the codes, and in `texts`
    what they stand for."""

    judgement: Judgement
    peak: Peak
    gaps: Gaps
    columns: Mapping[str, Column]
    texts: Mapping[str, Sequence[str]]
    torn: int


# --------------------------------------------------------------------------------------- index


def index(folder: RunFolder) -> dict[str, list[Stretch]]:
    """Where each leg's records are. Lines that are none are counted in `folder.torn`."""
    found: dict[str, list[Stretch]] = {}
    apart = folder.apart()
    for path in sorted(folder.path.glob("records-*.jsonl")):
        for (leg, shift_ns), start, stop in _stretches(folder, path, apart):
            found.setdefault(leg, []).append(Stretch(path, start, stop, shift_ns))
    return found


def _stretches(folder: RunFolder, path: Path,
               apart: Apart) -> Iterator[tuple[tuple[str, int], int, int]]:
    now: tuple[str, int] | None = None
    begun = last = 0
    for line, end in folder.lines(path, 0):
        name = _leg_of(line)
        if name is None:  # a header, or no record
            record = None if line.startswith(b'{"schema":') else folder.decoded(line)
            if record is None:
                if now is not None:
                    yield now, begun, last
                now = None
                continue
            name = record.leg
        start = end - len(line)
        here = apart.of(path.name, start, name) if apart.resumed else (name, 0)
        if here != now:
            if now is not None:
                yield now, begun, last
            now, begun = here, start
        last = end
    if now is not None:
        yield now, begun, last


def _leg_of(line: bytes) -> str | None:
    """The leg that stands first in a line, as the recorder writes it."""
    if not line.startswith(b'{"leg":"'):
        return None
    name = line[8:line.find(b'"', 8)]
    return None if b"\\" in name else name.decode("utf-8", "replace")


# -------------------------------------------------------------------------------------- reading


_decode = msgspec.json.Decoder(Digest).decode
_decode_ints = msgspec.json.Decoder(list[int] | None).decode


class Reader:
    """The digests of a leg's records, batch by batch. `torn` counts lines that are no record."""

    def __init__(self, stretches: Sequence[Stretch], window: Window | None) -> None:
        self.torn = 0
        self.pool = Pool()  # gaps of the sample
        self.seconds = Seconds()
        self._stretches, self._window = stretches, window

    def batches(self) -> Iterator[list[Digest]]:
        for stretch in self._stretches:
            lines = _lines(stretch)
            while chunk := list(itertools.islice(lines, BATCH)):
                batch = [r for line in chunk if (r := self._record(line)) is not None]
                if stretch.shift_ns:
                    for r in batch:
                        r.shift(stretch.shift_ns)
                yield self._take_in(batch)

    def _record(self, line: bytes) -> Digest | None:
        if line == b"\n" or line.startswith(b'{"schema":'):
            return None
        try:
            return _decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.torn += 1
            return None

    def _take_in(self, batch: list[Digest]) -> list[Digest]:
        window = self._window
        flat = flatten([r.gaps_us for r in batch])
        if flat is None:  # odd gaps: one record after the other, as whole records
            return self._settled([r for r in batch if self._one(r)])
        gaps, counts = flat
        sampled = [] if window is None else [
            is_due(window, r) and not window.is_void(r.due_ns, r.end_ns) for r in batch]
        if window is not None:
            self.pool.add(gaps if all(sampled) else gaps[np.repeat(sampled, counts)])
        _sum_up(batch, gaps, counts, window)
        return self._settled(batch)

    def _settled(self, batch: Iterable[Digest]) -> list[Digest]:
        whole = [r for r in batch if self._settle(r)]
        self.seconds.add(whole)
        return whole

    def _settle(self, r: Digest) -> bool:
        """Reads, and tokens per event where the server says. False: the line is no record."""
        try:
            if r.reads:
                reads = _decode_ints(r.reads)
                r.reads_n = None if reads is None else len(reads)
            told = _decode_ints(r.event_tok) if r.event_tok else None
        except msgspec.DecodeError:
            self.torn += 1
            return False
        if told and len(told) == r.n_events and self._window is not None and r.output_tok:
            r.window_tok = window_tok(r, _decode_ints(r.gaps_us) or [], told, self._window)
        r.gaps_us = r.reads = r.event_tok = NONE
        return True

    def _one(self, r: Digest) -> bool:
        try:
            gaps = _decode_ints(r.gaps_us) if r.gaps_us else []
        except msgspec.DecodeError:
            gaps = None
        if gaps is None:
            self.torn += 1
            return False
        plain = msgspec.structs.asdict(r)
        whole = RequestRecord(**{f: plain[f] for f in _FIELDS} | {
            "gaps_us": gaps, "reads": None, "event_tok": None})
        r.n_gaps, r.sum_us, r.longest_us = len(gaps), sum(gaps), max(gaps, default=0)
        seconds = whole.by_second()
        r.seconds = (np.array(seconds[0]), np.array(seconds[1])) if seconds[0] else None
        if self._window is not None:
            r.window_tok = window_tok(r, gaps, None, self._window)
            if is_due(self._window, r) and not self._window.is_void(r.due_ns, r.end_ns):
                self.pool.add(np.array(gaps, np.int64))
        return True


class Seconds:
    """Events and starts of each second: as `headroom.peak_of`, batch by batch."""

    def __init__(self) -> None:
        self._events: dict[int, Counter[int]] = {}
        self._starts: dict[int, Counter[int]] = {}

    def add(self, batch: Sequence[Digest]) -> None:
        for shard in {r.shard for r in batch}:
            own = [r for r in batch if r.shard == shard]
            sent = [r.sent_ns for r in own if r.sent_ns is not None]
            which, many = np.unique(np.array(sent, np.int64) // S, return_counts=True)
            _count(self._starts, shard, which, many)
            came = [r.seconds for r in own if r.seconds is not None]
            if came:
                which, where = np.unique(np.concatenate([x for x, _ in came]), return_inverse=True)
                many = np.bincount(where, np.concatenate([n for _, n in came])).astype(np.int64)
                _count(self._events, shard, which, many)

    def peak(self) -> Peak:
        events, starts = (max((n for own in by.values() for n in own.values()), default=0)
                          for by in (self._events, self._starts))
        return Peak(events, starts)


def _count(by_shard: dict[int, Counter[int]], shard: int, which: Column, many: Column) -> None:
    by_shard.setdefault(shard, Counter()).update(
        dict(zip(which.tolist(), many.tolist(), strict=True)))


_FIELDS = [f.name for f in msgspec.structs.fields(RequestRecord)]


def _lines(stretch: Stretch) -> Iterator[bytes]:
    with stretch.path.open("rb") as f:
        f.seek(stretch.start)
        left = stretch.stop - stretch.start
        for line in f:
            left -= len(line)
            if left < 0:
                return
            yield line


def window_tok(r: RequestRecord, gaps_us: Sequence[int], event_tok: Sequence[int] | None,
               window: Window) -> float:
    """Output tokens that came inside the window. Where an event's tokens are not known, each
    holds output_tok / n_events."""
    if r.first_ns is None or not r.output_tok:
        return 0.0
    stamps_ns = r.first_ns + 1000 * np.cumsum([0, *gaps_us])
    inside = (stamps_ns >= window.from_ns) & (stamps_ns < window.to_ns)
    if event_tok and len(event_tok) == len(stamps_ns):
        return float(np.asarray(event_tok)[inside].sum())
    return float(inside.sum()) * r.output_tok / len(stamps_ns)


def _sum_up(batch: Sequence[Digest], gaps: Column, counts: Column,
            window: Window | None) -> None:
    """The same of a whole batch. `gaps`: all of it, one record's after the other's. How many of a
    record's events came before an instant is looked up in the gaps' running total, so that no
    event has a stamp of its own."""
    ends = np.cumsum(counts)
    heads = ends - counts
    total = np.concatenate([[0], np.cumsum(gaps, dtype=np.int64)])
    sums = total[ends] - total[heads]
    longest = np.zeros(len(batch), np.int64)
    some = counts > 0
    if some.any():
        longest[some] = np.maximum.reduceat(gaps, heads[some])
    first = np.array([-S if r.first_ns is None else r.first_ns for r in batch], np.int64)
    last = first + 1000 * sums

    def before(which: Column, ns: Column) -> Column:
        """Events of these records that came before these instants."""
        begun, over = first[which], last[which] < ns
        at = np.searchsorted(total, -(-(ns - begun) // 1000) + total[heads[which]]) - heads[which]
        found: Column = np.where(ns <= begun, 0, np.where(over, counts[which] + 1, at))
        return found

    spans = last // S - first // S + 1
    edges = np.cumsum(spans)
    which = np.repeat(np.arange(len(batch)), spans)
    seconds = np.arange(len(which)) + np.repeat(first // S - (edges - spans), spans)
    many = before(which, (seconds + 1) * S) - before(which, seconds * S)
    some_came = many > 0
    inside = None
    if window is not None:
        all_of = np.arange(len(batch))
        inside = (before(all_of, np.full(len(batch), window.to_ns))
                  - before(all_of, np.full(len(batch), window.from_ns))).tolist()
    starts = (edges - spans).tolist()
    for i, (r, n, total_us, longest_us, start, stop) in enumerate(zip(
            batch, counts.tolist(), sums.tolist(), longest.tolist(), starts, edges.tolist(),
            strict=True)):
        r.n_gaps, r.sum_us, r.longest_us = n, total_us, longest_us
        if r.first_ns is not None:
            r.seconds = seconds[start:stop], many[start:stop]
            if not some_came[start:stop].all():
                came = some_came[start:stop]
                r.seconds = r.seconds[0][came], r.seconds[1][came]
            if inside is not None and r.output_tok:
                r.window_tok = float(inside[i]) * r.output_tok / (n + 1)


# ------------------------------------------------------------------------------------- judging


def digests(stretches: Sequence[Stretch]) -> list[Digest]:
    """A leg's records, where no window is known yet."""
    return [r for batch in Reader(stretches, None).batches() for r in batch]


def judged(task: LegTask) -> LegResult:
    """A leg from its lines to its verdicts and its part of the frame."""
    collects = gc.isenabled()
    gc.disable()  # records make no cycles, and looking for them again and again takes its time
    try:
        return _judged(task)
    finally:
        if collects:
            gc.enable()


def _judged(task: LegTask) -> LegResult:
    reader = Reader(task.stretches, task.window)
    records = [r for batch in reader.batches() for r in batch]
    parts = [_columns(records[i:i + ROWS], task) for i in range(0, len(records), ROWS)]
    texts, said = _texts(records, task.scenario)
    columns = {name: np.concatenate([np.empty(0, kind), *(p[name] for p in parts)])
               for name, kind in _KIND.items()}
    columns |= {**said, "good": said["misses"] == 0}
    judgement = judge(task.leg, task.window, records, task.signs, task.scenario, task.criteria)
    return LegResult(judgement, reader.seconds.peak(), reader.pool.gaps(), columns,
                     texts, reader.torn)


NUMBERS = ("session", "turn", "due_s", "sent_s", "end_s", "ttft_s", "ttft_service_s", "tpot_s",
           "itl_max_s", "e2e_s", "lateness_s", "output_tok", "prompt_tok", "cached_tok",
           "window_tok")
_KIND: dict[str, Any] = {**dict.fromkeys(NUMBERS, float), "in_window": bool, "void": bool}


def _columns(records: Sequence[Digest], task: LegTask) -> dict[str, Column]:
    """The numbers of these records; NaN where there is none. What they mean is `metrics`' affair,
    whose functions do not care whether they get a number or an array; here they get arrays."""
    def column(name: str) -> Column:
        return np.array([getattr(r, name) for r in records], float)

    since = metrics.seconds_between
    at = {x: np.array([np.nan if (ns := getattr(r, f"{x}_ns")) is None else ns - task.t0_ns
                       for r in records], float) for x in ("due", "sent", "first", "end")}
    events, output = column("n_events"), column("output_tok")
    many = (events >= 2) & (output >= 2)
    ok = np.array([r.outcome is Outcome.OK for r in records], bool)
    nan = np.full(len(records), np.nan)
    longest = np.array([r.gap_max_us for r in records], float)
    window = task.window
    return {
        "session": column("session"), "turn": column("turn"),
        **{f"{x}_s": since(np.zeros(len(records)), at[x]) for x in ("due", "sent", "end")},
        "ttft_s": since(at["due"], at["first"]), "ttft_service_s": since(at["sent"], at["first"]),
        "tpot_s": np.divide(column("sum_us") / 1e6, output - 1, where=many, out=nan.copy()),
        "itl_max_s": longest / 1e6,
        "e2e_s": np.where(ok, since(at["due"], at["end"]), nan),
        "lateness_s": since(at["due"], at["sent"]), "output_tok": output,
        **{x: column(x) for x in ("prompt_tok", "cached_tok", "window_tok")},
        "in_window": np.array([is_due(window, r) for r in records], bool),
        "void": np.array([window.is_void(r.due_ns, r.end_ns) for r in records], bool)
        if window.stalls else np.zeros(len(records), bool)}


def _texts(records: Sequence[Digest],
           mix: Scenario) -> tuple[dict[str, list[str]], dict[str, Column]]:
    """Of each text column what there is, and which of it each record has. Of the misses the first
    one is none."""
    slos = {c.name: mix.slo_of(c.name) for c in mix.classes}
    known: dict[str, dict[str, int]] = {x: {} for x in TEXT}
    known["misses"][""] = 0
    codes = {}
    for name, values in (
            ("cls", (r.cls for r in records)), ("outcome", (r.outcome.value for r in records)),
            ("error", (r.error or "" for r in records)),
            ("misses", (", ".join(metrics.misses(r, slos[r.cls])) for r in records))):
        own = known[name]
        codes[name] = np.fromiter((own.setdefault(x, len(own)) for x in values), np.int32,
                                  len(records))
    return {name: list(own) for name, own in known.items()}, codes


def all_judged(tasks: Sequence[LegTask]) -> list[LegResult]:
    """Every leg, in the tasks' order; large runs on all cores, the largest legs first."""
    sizes = [sum(s.stop - s.start for s in t.stretches) for t in tasks]
    # gevent's patches do not go with a pool; whoever brought them has small runs
    if len(tasks) < 2 or sum(sizes) < SPREAD_BYTES or cores() < 2 or "gevent" in sys.modules:
        return [judged(t) for t in tasks]
    order = sorted(range(len(tasks)), key=lambda i: -sizes[i])
    found: dict[int, LegResult] = {}
    with pool(min(cores(), len(tasks))) as workers:
        found = dict(zip(order, workers.map(judged, [tasks[i] for i in order]), strict=True))
    return [found[i] for i in range(len(tasks))]


def pool(processes: int) -> ProcessPoolExecutor:
    """Fresh processes: a fork would share locks with whatever threads libraries have."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def texts(results: Iterable[LegResult], name: str) -> Column:
    """A text column of all legs, of Python's strings."""
    return np.concatenate([np.empty(0, object), *(
        np.array(r.texts[name], object)[r.columns[name]] for r in results if r.texts[name])])
