"""A leg's records as digests: read one batch after the other, their gaps become sums at C's speed
and are forgotten. What a record means is said in `loadgen.metrics` and `judge` alone: a Digest
answers them as the whole record would.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Raw, Struct

from analysis.gaps import Pool, flatten
from loadgen.headroom import Peak
from loadgen.judge import is_due
from loadgen.leg import Window
from loadgen.record import RequestRecord

S = 1_000_000_000
BATCH = 500  # records whose gaps fit a core's cache
NONE = Raw(b"")
Column = np.ndarray[tuple[int], np.dtype[Any]]


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
    """Lines of one leg that follow each other in a journal, from byte to byte. `shift_ns`: what
    brings their stamps to the first clock of the run."""

    path: Path
    start: int
    stop: int
    shift_ns: int


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
            each = lines(stretch)
            while chunk := list(itertools.islice(each, BATCH)):
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
            gaps = _decode_ints(r.gaps_us) if r.gaps_us else None  # one event has none
            r.window_tok = window_tok(r, gaps or [], told, self._window)
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


def lines(stretch: Stretch) -> Iterator[bytes]:
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


def digests(stretches: Sequence[Stretch]) -> list[Digest]:
    """A leg's records, where no window is known yet."""
    return [r for batch in Reader(stretches, None).batches() for r in batch]
