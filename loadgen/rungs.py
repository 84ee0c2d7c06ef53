"""The rules of a calibration: what was seen on a rung, what ends a ladder, and what a ladder says
of the generator. Pure."""

import math
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from loadgen.headroom import PROVEN, Calibration, LimitedBy, rounded
from loadgen.validity import CPU_SUSPECT

Kind = Literal["streams", "starts"]
ERROR_MS = {"streams": 1.0, "starts": 2.0}  # p99: of gaps and TTFT; of a start's lateness
SERVER_LATE_MS = 5.0  # p99: beyond it the null server does not keep the pace that was asked for
IDLE = 0.5  # of a core: below it an error is hardly the generator's
FAR = 0.2  # of a core: four times as much is still allowed


class Rung(Struct, frozen=True):
    """One load, held for some seconds. `rate_per_s`: token events that the server sent, or
    requests that reached it. `error_p99_ms`: see ERROR_MS. None: too little was seen to tell."""

    kind: Kind
    asked: int  # streams, or starts per second
    rate_per_s: float
    core_frac: float | None  # that the generator would need to keep up
    us_per_event: float | None
    error_p99_ms: float | None
    server_late_p99_ms: float | None
    failed: int = 0  # requests that did not end well …
    dropped: int = 0  # … and those for which there was no file descriptor or port
    stalled_s: float = 0.0  # the host stood still, as server or generator noticed
    ttft_n: int = 0  # first tokens and gaps that the error rests on
    gap_n: int = 0


class Found(Struct, frozen=True):
    """What a ladder shows: up to `rate_per_s` (with so many streams, of that kind) all was well."""

    rate_per_s: float
    limited_by: LimitedBy
    us_per_event: float | None


def limit_of(rung: Rung) -> LimitedBy | None:
    """What was too much on this rung; None: nothing. CPU is counted, so that a late server does
    not excuse it; what a late server makes of the rest is not the generator's."""
    if rung.dropped:
        return "file descriptors"
    if rung.core_frac is not None and rung.core_frac > CPU_SUSPECT:
        return "core"
    if rung.server_late_p99_ms is not None and rung.server_late_p99_ms > SERVER_LATE_MS:
        return "null server"
    if rung.failed or (rung.error_p99_ms or 0.0) > ERROR_MS[rung.kind]:
        return "error"
    return None


def is_spoiled(rung: Rung) -> bool:
    """The host may be to blame for what went wrong: worth a second try, and no reason to end."""
    limit = limit_of(rung)
    idle = limit == "error" and rung.core_frac is not None and rung.core_frac < IDLE
    return idle or (limit in ("error", "null server") and rung.stalled_s > 0)


def better(first: Rung, second: Rung) -> Rung:
    """Of two tries of one rung: a stalled host only ever makes it look worse."""
    return second if limit_of(second) is None or limit_of(first) is not None else first


def next_step(steps: Sequence[int], rung: Rung) -> int | None:
    """The rung after this one; None: it was the last. Far from the core's limit one is left out,
    as long as that is no more than four times the load."""
    left = [n for n in steps if n > rung.asked]
    if len(left) > 1 and left[1] <= 4 * rung.asked and (
            rung.core_frac is not None and rung.core_frac < FAR):
        return left[1]
    return left[0] if left else None


def between(rungs: Sequence[Rung]) -> int | None:
    """A step that halves what is unknown between the last good rung and the one that was too much;
    None: there are not two, or they lie close."""
    good, bad = _parted(rungs)
    if not good or bad is None or bad.asked < 1.2 * good[-1].asked:
        return None
    return round(math.sqrt(good[-1].asked * bad.asked))


def found_on(rungs: Sequence[Rung], out_of_descriptors: bool = False) -> Found | None:
    """Of a ladder that ended at a rung with a limit, or where time or, as `out_of_descriptors`
    says, the host's file descriptors or ports did. None: not even the lowest rung held. The core
    is met between two rungs: its use grows with the rate in a straight line (both were measured);
    of all else only the last good rung is known."""
    good, bad = _parted(rungs)
    costs = [r.us_per_event for r in (good or rungs) if r.us_per_event is not None]
    cost = costs[-1] if costs else None
    if bad is not None and bad.core_frac is not None and limit_of(bad) == "core":
        rate, used = (good[-1].rate_per_s, good[-1].core_frac or 0.0) if good else (0.0, 0.0)
        share = (CPU_SUSPECT - used) / (bad.core_frac - used)
        return Found(rate + share * max(0.0, bad.rate_per_s - rate), "core", cost)
    if not good:
        return None
    ended: LimitedBy = "file descriptors" if out_of_descriptors else "not reached"
    if bad is not None and not is_spoiled(bad):
        ended = limit_of(bad) or ended
    return Found(good[-1].rate_per_s, ended, cost)


def _parted(rungs: Sequence[Rung]) -> tuple[list[Rung], Rung | None]:
    """The good rungs, and the lowest one above them that was too much. One below a good rung that
    was too much had a bad host: more load was no trouble."""
    up = sorted(rungs, key=lambda r: r.asked)
    good = [r for r in up if limit_of(r) is None]
    bad = [r for r in up if limit_of(r) is not None and (not good or r.asked > good[-1].asked)]
    return good, bad[0] if bad else None


# -------------------------------------------------------------------------------------- in words


_UNTIL = {
    ("streams", "core"): f"before its core is {100 * CPU_SUSPECT:.0f} % busy",
    ("starts", "core"): f"before its core is {100 * CPU_SUSPECT:.0f} % busy",
    ("streams", "error"): f"before 1 % of its stamps are off by more than {ERROR_MS['streams']:g} "
                          "ms",
    ("starts", "error"): f"before 1 % of them are more than {ERROR_MS['starts']:g} ms late"}
_LEAST = {"null server": "the null server was the limit", "not reached": "more was not shown",
          "file descriptors": "this host's file descriptors or ports were the limit"}


def sentence(c: Calibration) -> str:
    """The result, with what limited it."""
    return ("One generator process of this host: " + "; ".join((
        _up_to(c.events_per_s, f"events/s ({rounded(c.streams)} streams at 20 ms/token)",
               "streams", c.events_limited_by),
        _up_to(c.starts_per_s, "starts/s", "starts", c.starts_limited_by))) + ".")


def _up_to(rate_per_s: float, what: str, kind: Kind, limit: LimitedBy) -> str:
    if limit in PROVEN:
        return f"{rounded(rate_per_s)} {what} {_UNTIL[kind, limit]}"
    return f"at least {rounded(rate_per_s)} {what}: {_LEAST[limit]}"
