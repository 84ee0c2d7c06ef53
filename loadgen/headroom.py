"""How much of what a generator process can do did a run ask of it? Pure: records → busiest second
→ share of what `loadgen doctor --calibrate` found this host to be good for.

An event is a token event, as everywhere; all of it is per generator process.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from msgspec import Struct

from loadgen.record import RequestRecord

S = 1_000_000_000
LimitedBy = Literal["core", "error", "null server", "file descriptors", "not reached"]
PROVEN: tuple[LimitedBy, ...] = ("core", "error")  # the generator's own limits; else it can do more


class Calibration(Struct, frozen=True):
    """What one generator process of a host can do. `streams` at one event per 20 ms each are
    `events_per_s`; `us_per_event` is CPU, with the starts and ends of those streams."""

    when: str  # date, ISO 8601
    streams: int
    events_per_s: float
    events_limited_by: LimitedBy
    starts_per_s: float
    starts_limited_by: LimitedBy
    us_per_event: float | None


class Peak(Struct, frozen=True):
    """The busiest second of the busiest process."""

    events_per_s: int = 0
    starts_per_s: int = 0


def peak_of(records: Iterable[RequestRecord]) -> Peak:
    """Of one leg or of several; seconds of the generator's clock."""
    events: dict[int, Counter[int]] = {}
    starts: dict[int, Counter[int]] = {}
    for r in records:
        if r.sent_ns is not None:
            starts.setdefault(r.shard, Counter())[r.sent_ns // S] += 1
        if r.first_ns is not None:
            events.setdefault(r.shard, Counter()).update(
                dict(zip(*r.by_second(), strict=True)))
    return Peak(_highest(events), _highest(starts))


def _highest(by_shard: Mapping[int, Counter[int]]) -> int:
    return max((n for counts in by_shard.values() for n in counts.values()), default=0)


class Share(Struct, frozen=True):
    """A peak beside the calibrated figure that it comes nearest to. `proven`: the calibration met
    the generator's limit; else it only says that so much is no trouble."""

    unit: Literal["events", "starts"]
    peak_per_s: float
    calibrated_per_s: float
    proven: bool

    @property
    def used_frac(self) -> float:
        return self.peak_per_s / self.calibrated_per_s


def share_of(peak: Peak, calibration: Calibration) -> Share:
    return max(_shares(peak, calibration), key=lambda x: x.used_frac)


def beyond(records: Iterable[RequestRecord], calibration: Calibration | None) -> Share | None:
    """What a leg asked for beyond a limit that the calibration did meet; None: nothing."""
    if calibration is None:
        return None
    return next((x for x in _shares(peak_of(records), calibration)
                 if x.proven and x.used_frac > 1), None)


def _shares(peak: Peak, c: Calibration) -> tuple[Share, Share]:
    return (Share("events", peak.events_per_s, c.events_per_s, c.events_limited_by in PROVEN),
            Share("starts", peak.starts_per_s, c.starts_per_s, c.starts_limited_by in PROVEN))


def says(peak: Peak, calibration: Calibration | None, cpu_frac: float | None,
         limit_frac: float) -> str:
    """The generator's part in a run, in one sentence. `cpu_frac`: of its busiest process;
    `limit_frac`: where that is too much."""
    if calibration is not None:
        s = share_of(peak, calibration)
        least = "" if s.proven else "at least "
        return (f"Generator: at most {rounded(s.peak_per_s, math.ceil)} {s.unit}/s in a process, "
                f"{_percent(s.used_frac)} of what this host was calibrated for "
                f"({least}{rounded(s.calibrated_per_s)}/s).")
    busiest = (f"its busiest process used {_percent(cpu_frac)} of a core (limit "
               f"{_percent(limit_frac)})" if cpu_frac is not None else
               f"at most {rounded(peak.events_per_s, math.ceil)} events/s in a process")
    return f"Generator: {busiest}; `loadgen doctor --calibrate` shows what this host can do."


def figures(calibration: Calibration) -> str:
    """A calibration in a few words."""
    c = calibration
    events, starts = ("" if x in PROVEN else "at least "
                      for x in (c.events_limited_by, c.starts_limited_by))
    return (f"{events}{rounded(c.events_per_s)} events/s ({rounded(c.streams)} streams at 20 "
            f"ms/token), {starts}{rounded(c.starts_per_s)} starts/s")


def rounded(value: float, whole: Callable[[float], int] = round) -> str:
    """To two figures, from 100 up: a calibration is no better than that."""
    step = 1 if value < 100 else 10 ** (len(str(int(value))) - 2)
    return f"{whole(value / step) * step:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else "less than 1 %"
