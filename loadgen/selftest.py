"""What can one generator process of this host do? Drives a real one, the way runs do, against the
null server: a ladder of streams, then a ladder of starts, each rung held against the server's log.

A rung of streams is one answer per stream, their starts spread over a second; all streams in phase,
as an engine's steps are. A rung of starts is an open loop (Poisson) of short answers.
"""

import contextlib
import itertools
import resource
import select
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from msgspec import Struct

from loadgen import metrics, openai, plan, scenario
from loadgen.calibration import PORTS
from loadgen.errors import GeneratorError
from loadgen.headroom import Calibration
from loadgen.leg import Leg, Window
from loadgen.prompts import Ratio
from loadgen.record import Outcome, RequestRecord
from loadgen.rungs import (
    Found,
    Kind,
    Rung,
    better,
    between,
    found_on,
    is_spoiled,
    limit_of,
    next_step,
)
from loadgen.scenario import Closed, Load, Open, PerSecond, Scenario
from loadgen.store import RunFolder
from loadgen.supervise import Shards
from servers.null import log as logs
from servers.null.launch import NullServer
from servers.null.log import Seen, Truth
from servers.null.server import key_of

TTFT_S = ITL_S = 0.02
PROMPT_TOK = 64
RATIO = Ratio(4.0, 10.0, "guess")
SPARE = 200  # file descriptors and ports for everything else
SAMPLE = 256  # requests of a rung that are held against the log: their bodies are made once more
OVERTIME = 2.5  # a rung that takes so many times as long as it should is cut: it is beyond a limit
BLOCK_NS = 500_000_000
AROUND_S = 1.5  # of a rung, beside its load


class Ladder(Struct, frozen=True):
    """What is tried, from below. Answers of `tokens` and of `short_tokens`; starts last `open_s`;
    none of it begins after its part of `budget_s`."""

    streams: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    starts_per_s: tuple[int, ...] = (250, 500, 1000, 1400, 2000, 2800, 4000, 5600)
    tokens: int = 150
    spread_s: float = 1.0
    short_tokens: int = 4
    open_s: float = 3.0
    budget_s: float = 52.0

    def takes_s(self, kind: Kind) -> float:
        """A rung's load."""
        return (self.spread_s + TTFT_S + self.tokens * ITL_S if kind == "streams" else
                self.open_s + TTFT_S + self.short_tokens * ITL_S)


class Measured(Struct, frozen=True):
    """The result, and all rungs that led to it: the second try of one that was repeated."""

    calibration: Calibration
    rungs: list[Rung]


async def measure(ladder: Ladder, show: Callable[[str], None]) -> Measured:
    """`show` hears what is being done. Raises GeneratorError if nothing could be measured."""
    if not hasattr(select, "epoll"):
        raise GeneratorError("the null server needs epoll: --calibrate works on Linux only")
    began = time.monotonic()
    most = connections()
    streams = [n for n in ladder.streams if n <= most]
    if not streams:
        raise GeneratorError(f"{max(0, most)} connections are possible here and {ladder.streams[0]}"
                             " are the least that tells anything: raise `ulimit -Hn`")
    until = began + ladder.budget_s - 5 * (ladder.takes_s("starts") + 1)
    rungs = await _climb(ladder, "streams", streams, until, show)
    more = await _climb(ladder, "starts", ladder.starts_per_s, began + ladder.budget_s, show)
    out = bool(streams) and len(streams) < len(ladder.streams) and rungs[-1].asked == streams[-1]
    events, starts = _sure(rungs, out), _sure(more)
    return Measured(Calibration(
        when=f"{datetime.now().astimezone():%Y-%m-%d}", streams=round(events.rate_per_s * ITL_S),
        events_per_s=events.rate_per_s, events_limited_by=events.limited_by,
        starts_per_s=starts.rate_per_s, starts_limited_by=starts.limited_by,
        us_per_event=events.us_per_event), [*rungs, *more])


def connections() -> int:
    """As many streams as this host has file descriptors and ports for."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        low, high = map(int, PORTS.read_text(encoding="ascii").split())
        most = min(most, high - low)
    return most - SPARE


def _sure(rungs: list[Rung], out_of_descriptors: bool = False) -> Found:
    found = found_on(rungs, out_of_descriptors)
    if found is None:
        what = "streams" if rungs[0].kind == "streams" else "starts/s"
        raise GeneratorError(f"nothing could be measured: {rungs[0].asked} {what} were too much "
                             f"({limit_of(rungs[0])}); try again when the host is quiet")
    return found


async def _climb(ladder: Ladder, kind: Kind, steps: Sequence[int], until: float,
                 show: Callable[[str], None]) -> list[Rung]:
    """Up to the first rung that is too much by no fault of the host's, and then one between it and
    the last good one."""
    rungs: list[Rung] = []
    with tempfile.TemporaryDirectory(prefix="loadgen-") as folder:
        async with NullServer(TTFT_S, ITL_S) as server:
            tried = _Trial(ladder, kind, RunFolder(Path(folder)), server)
            async with tried.shards:
                step: int | None = steps[0] if steps else None
                while step is not None and (not rungs or _fits(ladder, kind, until)):
                    rung = await _try(tried, step, show, lambda: _fits(ladder, kind, until))
                    rungs.append(rung)
                    ends = limit_of(rung) is not None and not is_spoiled(rung)
                    step = None if ends else next_step(steps, rung)
                step = between(rungs)
                if step is not None and _fits(ladder, kind, until):
                    rungs.append(await _try(tried, step, show, lambda: _fits(ladder, kind, until)))
    return sorted(rungs, key=lambda r: r.asked)


def _fits(ladder: Ladder, kind: Kind, until: float) -> bool:
    return time.monotonic() + ladder.takes_s(kind) + AROUND_S <= until


async def _try(tried: "_Trial", n: int, show: Callable[[str], None],
               again: Callable[[], bool]) -> Rung:
    """A rung; its better one, if the host may have spoiled the first and there is time `again`."""
    what = f"{n} streams" if tried.kind == "streams" else f"{n} starts/s"
    show(what)
    rung = await tried.rung(n)
    if is_spoiled(rung) and again():
        show(f"{what}, once more: the host may have stood still")
        rung = better(rung, await tried.rung(n))
    return rung


class _Trial:
    """One ladder's processes, and what its rungs have in common."""

    def __init__(self, ladder: Ladder, kind: Kind, folder: RunFolder, server: NullServer) -> None:
        self._ladder, self.kind, self._folder, self._server = ladder, kind, folder, server
        self._tokens = ladder.tokens if kind == "streams" else ladder.short_tokens
        self._mix = scenario.parse({"name": "calibration", "classes": [{
            "name": "calibration", "kind": "chat", "prompt_tokens": PROMPT_TOK,
            "output_tokens": self._tokens, "sampling": {"ignore_eos": True}}]}, "calibration")
        self._offsets: dict[Path, int] = {}
        self._tries = 0
        self.shards = Shards(folder, "calibration", self._mix, server.target,
                             {"calibration": RATIO}, 1)

    async def rung(self, n: int) -> Rung:
        """Raises GeneratorError if a process of ours dies."""
        self._tries += 1
        leg = self._leg(n)
        takes_s = OVERTIME * self._ladder.takes_s(self.kind) + AROUND_S
        until, cut = time.monotonic() + takes_s, "too slow"
        window = await self.shards.run(
            leg, _lives, lambda progress: None,
            lambda: cut if time.monotonic() > until else None)
        if window.ending not in ("done", "failed") or window.note not in (None, cut):
            raise GeneratorError(f"the calibration broke off: {window.note or window.ending}")
        truth = await self._server.log()
        records = [r for r in self._folder.records(self._offsets) if r.leg == leg.id]
        if not records or not len(truth.writes):
            raise GeneratorError(f"no answer came from the null server with {n} {self.kind}: is "
                                 "127.0.0.1 reachable?")
        make = streams_rung if self.kind == "streams" else starts_rung
        return make(n, leg, self._mix, self._server.target.model, window, records, truth)

    def _leg(self, n: int) -> Leg:
        streams = self.kind == "streams"
        load: Load = Closed(n) if streams else Open(PerSecond(n), max_inflight=connections())
        return Leg(id=f"{self.kind}-{n}-{self._tries}", value=n, phase="run", replicate=0,
                   axis="concurrency" if streams else "rate", seed=self._tries, load=load,
                   warmup_s=self._ladder.spread_s if streams else 0.0,
                   measure_s=None if streams else self._ladder.open_s,
                   num_sessions=n if streams else None)


async def _lives() -> None:
    """The null server's death shows in its log, that does not come."""


# ------------------------------------------------------------------------- what a rung has shown


def streams_rung(n: int, leg: Leg, mix: Scenario, model: str, window: Window,
                 records: list[RequestRecord], truth: Truth) -> Rung:
    """The core's share is that of the time in which all streams run: cost × rate. What they cost
    includes what is put off until they end."""
    rate = rate_of(truth)
    events = sum(r.n_events for r in records)
    length_s = (window.end_ns - window.t0_ns) / 1e9
    cost_s = None if window.cpu_frac is None else window.cpu_frac * length_s / max(1, events)
    sample = records[:: -(-len(records) // SAMPLE)]
    seen = logs.accuracy(truth, _seen(sample, mix, leg, model))
    spreads = [x.p99 for x in (seen.ttft, seen.gap) if x is not None]
    return Rung(
        "streams", n, rate, None if cost_s is None else cost_s * rate,
        None if cost_s is None else 1e6 * cost_s, max(spreads, default=None), _late_ms(truth),
        *_failures(records), _stalled_s(window, truth),
        ttft_n=seen.ttft.n if seen.ttft else 0, gap_n=seen.gap.n if seen.gap else 0)


def starts_rung(n: int, leg: Leg, mix: Scenario, model: str, window: Window,
                records: list[RequestRecord], truth: Truth) -> Rung:
    """`error_p99_ms` is the lateness of starts. What came after the window was cut off with it."""
    came = np.sort(truth.requests[:, 1])
    span_s = float(np.ptp(came)) / 1e9
    due = [r for r in records if window.from_ns <= r.due_ns < window.to_ns]
    return Rung("starts", n, (len(came) - 1) / span_s if span_s > 0 else 0.0, window.cpu_frac, None,
                lateness_p99_ms(due), _late_ms(truth), *_failures(due), _stalled_s(window, truth))


def lateness_p99_ms(records: Sequence[RequestRecord]) -> float | None:
    """Of each half second its p99, and of these the median: a stall of the host spoils one or two
    of them, too much load spoils all."""
    blocks: dict[int, list[float]] = {}
    for r in records:
        if (late_s := metrics.lateness_s(r)) is not None:
            blocks.setdefault(r.due_ns // BLOCK_NS, []).append(late_s)
    p99s = [x.value for block in blocks.values() if (x := metrics.quantile(block, 0.99))]
    return 1000 * statistics.median(p99s) if p99s else None


def rate_of(truth: Truth) -> float:
    """Token events per second while all streams ran: from the last one's first to the first one's
    last. On average, if there was hardly such a time."""
    tokens = truth.requests[truth.writes[:, 0], 3]
    rows = truth.writes[(truth.writes[:, 1] >= 1) & (truth.writes[:, 1] <= tokens)]
    n = len(truth.requests)
    first, last = np.full(n, np.iinfo(np.int64).max), np.zeros(n, np.int64)
    np.minimum.at(first, rows[:, 0], rows[:, 4])
    np.maximum.at(last, rows[:, 0], rows[:, 4])
    answered = last > 0
    a, b = int(first[answered].max()), int(last[answered].min())
    if b - a < np.ptp(rows[:, 4]) / 4:
        a, b = int(rows[:, 4].min()), int(rows[:, 4].max()) + 1
    inside = (rows[:, 4] >= a) & (rows[:, 4] < b)
    return float(rows[inside, 2].sum()) / (b - a) * 1e9


def _late_ms(truth: Truth) -> float | None:
    late = truth.lateness_ms(but_stalls=True)
    return float(np.quantile(late, 0.99)) if len(late) else None


def _failures(records: list[RequestRecord]) -> tuple[int, int]:
    return (sum(r.outcome is not Outcome.OK for r in records),
            sum(r.outcome is Outcome.DROPPED for r in records))


def _stalled_s(window: Window, truth: Truth) -> float:
    return sum(float(b - a) for a, b in [*window.stalls, *truth.stalls]) / 1e9


def _seen(records: list[RequestRecord], mix: Scenario, leg: Leg, model: str) -> Iterator[Seen]:
    """Records by the server's names for them, which are made of their bodies."""
    cls = mix.classes[0]
    for r in records:
        planned = plan.session(mix, leg.seed, r.session, None)
        text = plan.prompt(cls, planned, 0, leg.seed, RATIO)
        body = openai.body(mix.endpoint, model, text, planned.turns[0].output_tok, cls)
        stamps = ([] if r.first_ns is None else
                  [r.first_ns + 1000 * x for x in itertools.accumulate(r.gaps_us, initial=0)])
        yield Seen(key_of(body), 0, r.sent_ns or 0, np.array(stamps, np.int64))
