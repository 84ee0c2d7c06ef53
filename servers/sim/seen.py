"""What a run folder tells of a server's pace: token gaps by how many streams there were, and how
long prompts took that met an empty server. (The folder is read here without loadgen's own types:
a server knows nothing of loads.)"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet
from msgspec import Struct

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

MOST_GAPS = 200_000
MIN_N = 20  # gaps in a bin


class CannotFit(Exception):
    """A folder that is no run, or tells nothing."""


class Seen(Struct, frozen=True):
    """What is read of a record."""

    leg: str
    outcome: str
    due_ns: int
    end_ns: int
    sent_ns: int | None = None
    first_ns: int | None = None
    gaps_us: list[int] | None = None
    event_tok: list[int] | None = None
    prompt_tok: int | None = None
    want_prompt_tok: int | None = None
    output_tok: int | None = None


@dataclass(frozen=True)
class Decode:
    """Quiet token gaps, binned: streams, tokens in their caches, seconds of a step, how many."""

    streams: Floats
    context_tok: Floats
    gap_s: Floats
    n: Floats


def read(folder: Path) -> list[Seen]:
    """Requests of a run folder that were sent; those that were cut off were in the server, too.
    Raises CannotFit."""
    found = list(_journalled(folder)) or list(_table(folder))
    kept = [r for r in found if r.sent_ns and (r.prompt_tok or r.outcome != "OK")]
    if not any(r.outcome == "OK" for r in kept):
        raise CannotFit(f"{folder}: holds no answered requests (records-*.jsonl, records.parquet)")
    return kept


def _journalled(folder: Path) -> Iterator[Seen]:
    decode = msgspec.json.Decoder(Seen).decode
    for path in sorted(folder.glob("records-*.jsonl")):
        for line in path.read_bytes().splitlines():
            if line.startswith(b'{"schema":'):
                continue
            try:
                yield decode(line)
            except msgspec.DecodeError:  # the torn last line of a crash
                continue


def _table(folder: Path) -> Iterator[Seen]:
    """The same from what is left where journals were thrown away."""
    path = folder / "records.parquet"
    if path.exists():
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches(columns=[f.name for f in msgspec.structs.fields(Seen)]):
            yield from msgspec.convert(batch.to_pylist(), list[Seen])


class SeenLeg:
    """How many streams of a leg decoded, and how many prompts were on their way, at any time."""

    def __init__(self, records: Sequence[Seen]) -> None:
        self.records = records
        sent = np.array([r.sent_ns or 0 for r in records], float)
        self.first = np.array([r.first_ns or r.end_ns for r in records], float)
        last = self.first + 1e3 * np.array([sum(r.gaps_us or ()) for r in records], float)
        self.sent = sent
        self._sent, self._first, self._last = np.sort(sent), np.sort(self.first), np.sort(last)
        prompt = np.array([(r.prompt_tok or r.want_prompt_tok or 0) if r.first_ns else 0
                           for r in records], float)
        speed = np.array([(r.output_tok or 1) for r in records]) / np.maximum(last - self.first, 1)
        begun = prompt - speed * self.first  # a stream's context at t: begun + speed * t
        self._by_first = _sums(self.first, begun, speed)
        self._by_last = _sums(last, begun, speed)

    @property
    def peak(self) -> float:
        """Streams at once, at most."""
        return float(self.streams(self._first).max())

    def streams(self, t: Floats) -> Floats:
        return (np.searchsorted(self._first, t, "right")
                - np.searchsorted(self._last, t, "left")).astype(float)

    def prompts(self, t: Floats) -> Floats:
        return (np.searchsorted(self._sent, t, "right")
                - np.searchsorted(self._first, t, "right")).astype(float)

    def sent_between(self, a: Floats, b: Floats) -> Floats:
        return (np.searchsorted(self._sent, b, "right")
                - np.searchsorted(self._sent, a, "right")).astype(float)

    def context_tok(self, t: Floats) -> Floats:
        total = np.zeros_like(t)
        for sign, (at, begun, speed) in ((1, self._by_first), (-1, self._by_last)):
            i = np.searchsorted(at, t, "right")
            total += sign * (begun[i] + speed[i] * t)
        return total


def _sums(at: Floats, *values: Floats) -> tuple[Floats, ...]:
    order = np.argsort(at)
    return at[order], *(np.concatenate([[0.0], np.cumsum(v[order])]) for v in values)


def legs_of(records: Sequence[Seen]) -> list[SeenLeg]:
    names = sorted({r.leg for r in records})
    return [SeenLeg([r for r in records if r.leg == name]) for name in names]


def quiet_gaps(legs: Sequence[SeenLeg]) -> Decode:
    """Gaps during which no prompt was on its way: each is one step of all streams."""
    rows = [row for leg in legs for row in _gaps_of(leg, MOST_GAPS // len(legs))]
    if not rows:
        raise CannotFit("no token gap without a prompt in it: the run needs a lower level")
    streams, context, gap, n = (np.array(column, float) for column in zip(*rows, strict=True))
    return Decode(streams, context, gap, n)


def _gaps_of(leg: SeenLeg, most: int) -> list[tuple[float, float, float, float]]:
    every = max(1, sum(len(r.gaps_us or ()) for r in leg.records) // most)
    starts, gaps = [], []
    for r in leg.records:
        us = np.array(r.gaps_us or (), float)
        at = (r.first_ns or 0) + 1e3 * np.concatenate([[0.0], np.cumsum(us)])[:-1]
        one = np.array(r.event_tok[1:] if r.event_tok else np.ones(len(us))) == 1
        starts.append(at[one][::every])  # events of several tokens tell of no step
        gaps.append(us[one][::every] / 1e6)
    t, gap = np.concatenate(starts), np.concatenate(gaps)
    middle = t + gap * 0.5e9
    streams = leg.streams(middle)
    quiet = (leg.prompts(t) == 0) & (leg.sent_between(t, t + gap * 1e9) == 0) & (streams > 0)
    context = leg.context_tok(middle)
    rows = []
    for n in np.unique(streams[quiet]):
        here = quiet & (streams == n)
        if here.sum() >= MIN_N:
            rows.append((float(n), float(np.median(context[here])), float(np.median(gap[here])),
                         float(here.sum())))
    return rows


def lone_prompts(legs: Sequence[SeenLeg]) -> tuple[Floats, Floats]:
    """(prompt tokens, seconds from sent to first token) of those that met an empty server."""
    found: list[tuple[float, float]] = []
    for leg in legs:
        alone = (leg.streams(leg.sent) == 0) & (leg.prompts(leg.sent) == 1) & (
            leg.sent_between(leg.sent, leg.first) == 0)
        found += [(r.prompt_tok or 0, ((r.first_ns or 0) - (r.sent_ns or 0)) / 1e9)
                  for r, lone in zip(leg.records, alone, strict=True)
                  if lone and r.outcome == "OK"]
    tokens, seconds = np.array(found, float).reshape(-1, 2).T
    return tokens, seconds
