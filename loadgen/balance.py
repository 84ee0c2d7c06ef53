"""Pure: what must add up in a leg. Its starts against those that were asked for, its slots against
the requests in them, its records against the generator's own count and the server's."""

import math
from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct

from loadgen import metrics
from loadgen.leg import Leg, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Open, Trace

CHANCE = 4  # standard deviations of a plan's own randomness that are let pass
EDGE_S: Final = 0.02  # by which a request's ends may be noticed apart by the two witnesses
NOTICE_S = 0.005  # an end that is noticed this late is in nobody's way
LITTLE_OFF = 0.02
TEMPLATE = (1.15, 32)  # a prompt is at most so much longer than wanted: share, tokens

Spans = list[tuple[int, int]]


class Counted(Struct, frozen=True):
    """What the server counted over a leg's whole life; None: it does not say."""

    requests: float | None = None  # that finished; aborted ones are left out
    prompt_tok: float | None = None
    output_tok: float | None = None


class Tally(Struct, frozen=True):
    """One thing that both sides counted. Ours is a range: of a request that did not end well, the
    server may have counted any part."""

    server: float
    least: float
    most: float

    @property
    def ratio(self) -> float | None:
        """Server over client; 1 where the range holds the server's count."""
        if self.least <= self.server <= self.most:
            return 1.0
        ours = self.least if self.server < self.least else self.most
        return self.server / ours if ours else None


class Balance(Struct, frozen=True):
    """None: it cannot be said for this leg. Counts of starts are of the window."""

    late_p99_s: float | None = None  # own lateness: without the wait for a connection
    late_max_s: float | None = None
    late_n: int = 0
    connect_p99_s: float | None = None  # wait for a connection; 0 for who found one open
    connect_max_s: float | None = None
    connect_frac: float | None = None  # of the requests that were sent: opened a connection
    asked: float | None = None  # open loop: starts that should have been …
    begun: int | None = None  # … and that were
    inflight_mean: float | None = None  # L: by stamps, while the host did not stand still
    slots_frac: float | None = None  # closed loop: L over its slots
    turnaround_s: float | None = None  # mean time that a slot was empty between two requests
    little_residual: float | None = None  # (generator's count − λW) / λW
    little_tolerance: float | None = None
    reads: int = 0  # that brought a token event, of the whole leg
    requests: Tally | None = None
    prompt_tok: Tally | None = None
    output_tok: Tally | None = None

    @property
    def begun_frac(self) -> float | None:
        return self.begun / self.asked if self.asked and self.begun is not None else None


def of(leg: Leg, window: Window, sample: Sequence[RequestRecord],
       records: Sequence[RequestRecord], counted: Counted | None = None,
       rests: bool = False) -> Balance:
    """`sample`: those due in the window, voided ones left out; `records`: all of the leg's;
    `rests`: slots do so by plan, while their users think."""
    late = [x for r in sample if (x := own_lateness_s(r)) is not None]
    waits = [(r.connect_wait_ns or 0) / 1e9 for r in sample if r.sent_ns is not None]
    asked, begun = _starts(leg, window, records)
    mean, slots, turnaround = _slots(leg, window, records, rests)
    residual, tolerance = _little(window, records)
    mine = counted if counted is not None and window.alone else Counted()
    return Balance(
        late_p99_s=_p99(late), late_max_s=max(late, default=None), late_n=len(late),
        connect_p99_s=_p99(waits), connect_max_s=max(waits, default=None),
        connect_frac=sum(w > 0 for w in waits) / len(waits) if waits else None,
        asked=asked, begun=begun, inflight_mean=mean, slots_frac=slots, turnaround_s=turnaround,
        little_residual=residual, little_tolerance=tolerance,
        reads=sum(r.n_reads for r in records),
        requests=_tally(mine.requests, _requests(records)),
        prompt_tok=_tally(mine.prompt_tok, _prompt_tok(records)),
        output_tok=_tally(mine.output_tok, _output_tok(records)))


def own_lateness_s(r: RequestRecord) -> float | None:
    """Lateness without the wait for a connection, which may well be the server's; of a request
    that was sent again, as the server had closed its connection, there is none."""
    late = metrics.lateness_s(r)
    return None if late is None or r.stale_retries else late - (r.connect_wait_ns or 0) / 1e9


def lingered(window: Window) -> int:
    """Answers that the server kept open beyond their end: each took its slot that much longer, of
    which its record says nothing."""
    return sum(h.lingered for h in window.shards)


def stalls_inside(window: Window) -> Spans:
    """Stalls inside the measured window; what several shards saw at once is one stall."""
    merged: Spans = []
    for start, end in sorted(window.stalls):
        a, b = max(start, window.from_ns), min(end, window.to_ns)
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        elif a < b:
            merged.append((a, b))
    return merged


def _p99(values: Sequence[float]) -> float | None:
    found = metrics.quantile(values, 0.99)
    return found.value if found else None


# ----------------------------------------------------------------------------------- open loops


def _starts(leg: Leg, window: Window,
            records: Sequence[RequestRecord]) -> tuple[float | None, int | None]:
    """Starts of an open loop that were asked for in the window, and that were made in it. Asked
    for is what was due; a generator that fell so far behind that it never came to its plan's end
    left no records there, so it is what the rate makes likely, where that is more. The rate is of
    sessions; their later turns are due when answers let them."""
    if not isinstance(leg.load, Open | Trace):
        return None, None
    a, b = window.from_ns, window.to_ns
    begun = sum(x is not None and a <= x < b for x in map(begun_ns, records))
    arrived = sum(a <= r.due_ns < b and not r.turn for r in records)
    later = sum(a <= r.due_ns < b and r.turn > 0 for r in records)
    asked = float(arrived)
    if isinstance(leg.load, Trace):
        whole = sum(a <= window.t0_ns + round(s * 1e9) < b for s in leg.load.due_s)
        asked = max(asked, whole if leg.num_sessions is None else 0)
    elif leg.num_sessions is None:
        mean = leg.load.rate_rps * (b - a) / 1e9
        cv = {"constant": 0.0, "gamma": leg.load.cv}.get(leg.load.arrivals, 1.0)
        asked = mean if arrived < mean - CHANCE * cv * math.sqrt(mean) - 1 else asked
    return asked + later, begun


def begun_ns(r: RequestRecord) -> int | None:
    """When its start was made: its connection is asked for, or it is sent. None: it was dropped."""
    if r.outcome is Outcome.DROPPED:
        return None
    return r.due_ns if r.sent_ns is None else r.sent_ns - (r.connect_wait_ns or 0)


# --------------------------------------------------------------------------------- in flight


def _slots(leg: Leg, window: Window, records: Sequence[RequestRecord], rests: bool,
           ) -> tuple[float | None, float | None, float | None]:
    """Requests in flight in the mean while the host did not stand still; for a closed loop, of
    its slots, and how long a slot was empty between two requests; that not where slots rest by
    plan, nor where requests were dropped, which is why they are empty then."""
    clear = _clear(window)
    length_ns = sum(b - a for a, b in clear)
    if not length_ns or not records:
        return None, None, None
    flying_ns = sum(_inside(r, clear) for r in records)
    mean = flying_ns / length_ns
    if not isinstance(leg.load, Closed) or not window.alone or leg.num_sessions is not None or (
            rests) or any(r.outcome is Outcome.DROPPED for r in records) or lingered(window):
        return mean, None, None
    slots = leg.load.concurrency
    starts = sum(x is not None and any(a <= x < b for a, b in clear)
                 for x in map(begun_ns, records))
    empty_s = max(0.0, slots * length_ns - flying_ns) / 1e9
    return mean, mean / slots, empty_s / starts if starts else None


def _little(window: Window,
            records: Sequence[RequestRecord]) -> tuple[float | None, float | None]:
    """Little's law, L = λW, between two witnesses: L is what the generator itself counted in
    flight; λW is the time in flight of the records, cut at the edges of the window, so that no
    request at an edge makes a difference. Tolerance: 2 %, an end that was noticed a little late,
    and chance, which shrinks with √n (a change of the count may be seen up to EDGE_S apart,
    uniformly: Δ/√12 for each of 2n changes, ±3 σ). Nothing is said of a host
    that stood still, nor where requests were dropped: for how long those were in flight is not in
    their records."""
    counts = [h.inflight_s for h in window.shards]
    if not counts or None in counts or stalls_inside(window) or any(
            r.outcome is Outcome.DROPPED for r in records) or lingered(window):
        return None, None
    span = [(window.from_ns, window.to_ns)]
    inside = [x for r in records if (x := _inside(r, span))]
    n, ours_s = len(inside), sum(inside) / 1e9
    if not n:
        return None, None
    each_s = ours_s / n
    chance = 3 * EDGE_S * math.sqrt(2 / 12) / (each_s * math.sqrt(n))
    theirs_s = sum(x for x in counts if x is not None)
    return theirs_s / ours_s - 1, LITTLE_OFF + NOTICE_S / each_s + chance


def _clear(window: Window) -> Spans:
    """The window without the stalls."""
    edges = [window.from_ns, *(x for pair in stalls_inside(window) for x in pair), window.to_ns]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]


def _inside(r: RequestRecord, spans: Iterable[tuple[int, int]]) -> int:
    """How long a request was in flight within these spans, ns."""
    start = begun_ns(r)
    return 0 if start is None else sum(max(0, min(r.end_ns, b) - max(start, a)) for a, b in spans)


# ---------------------------------------------------------------------------------- the server


def _tally(server: float | None, ours: tuple[float, float] | None) -> Tally | None:
    return None if server is None or ours is None else Tally(server, *ours)


def _requests(records: Sequence[RequestRecord]) -> tuple[float, float]:
    sent = sum((r.sent_ns is not None) * (1 + r.stale_retries) for r in records)
    return sum(r.outcome is Outcome.OK for r in records), sent


def _prompt_tok(records: Sequence[RequestRecord]) -> tuple[float, float] | None:
    least = more = 0.0
    for r in records:
        if r.outcome is Outcome.OK:
            if r.prompt_tok is None:
                return None
            least += r.prompt_tok
        elif r.sent_ns is not None:
            if r.want_prompt_tok is None:
                return None
            more += TEMPLATE[0] * r.want_prompt_tok + TEMPLATE[1]
    return least, least + more


def _output_tok(records: Sequence[RequestRecord]) -> tuple[float, float] | None:
    least = more = 0.0
    for r in records:
        seen = r.output_tok or r.n_events
        least += seen
        if r.outcome is not Outcome.OK and r.sent_ns is not None:
            if r.max_tokens is None:
                return None
            more += max(0, r.max_tokens - seen)
    return least, least + more
