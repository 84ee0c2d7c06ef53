"""Synthetic run folders, written through the store's own API: a closed-loop ladder on a server
whose throughput levels off, and what can go wrong with one."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from msgspec import Struct

from loadgen.leg import Axis, Ending, Leg, Phase, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import (
    Closed,
    Fixed,
    Load,
    Open,
    PerSecond,
    RequestClass,
    Scenario,
    Seconds,
    Slo,
    to_plain,
)
from loadgen.store import SCHEMA, Header, Journal, LegLine, Manifest, Row, RunFolder

S = 1_000_000_000
GIB = 2**30
THROUGHPUT = {1: 0.29, 2: 0.55, 4: 1.0, 8: 1.9, 16: 3.2, 32: 4.7, 64: 5.9, 128: 6.6}  # requests/s
TTFT = {1: 0.15, 2: 0.16, 4: 0.2, 8: 0.28, 16: 0.45, 32: 0.75, 64: 1.6, 128: 6.0}  # s, median
OUTPUT_TOK = {"summary": 175, "code": 240, "json": 118}  # mean 190
MIX = Scenario(
    name="mixed", slo=Slo(ttft_s=Seconds(2), tpot_s=Seconds(0.05)),
    classes=(
        RequestClass(name="summary", kind="summary", weight=20, prompt_tok=Fixed(2048),
                     output_tok=Fixed(160)),
        RequestClass(name="code", kind="code", weight=50, prompt_tok=Fixed(200),
                     output_tok=Fixed(220)),
        RequestClass(name="json", kind="json", weight=30, prompt_tok=Fixed(300),
                     output_tok=Fixed(110))))


@dataclass
class Clock:
    """Where the run is: stamps only ever grow."""

    now_ns: int = 1000 * S
    seq: int = 0
    preemptions: float = 0.0
    rows: list[Row] = field(default_factory=list)


def manifest(**changes: Any) -> Manifest:
    base: dict[str, Any] = {
        "schema": SCHEMA, "run": "synthetic", "created": "2025-11-21T01:00:00+00:00",
        "command": ["loadgen", "sweep", "mixed"], "scenario": to_plain(MIX), "seed": 7,
        "target_frac": 0.95, "confidence": 0.95, "base_url": "http://127.0.0.1:8000",
        "model": "qwen2.5-7b", "server": {"kind": "sim", "simulated": True, "gpu": "4090d"},
        "ratios": {"summary": 4.1}, "versions": {"loadgen": "0.1.0"}, "host": {"cpus": 16},
        "processes": 1}
    return Manifest(**{**base, **changes})


def leg(value: float, phase: Phase, measure_s: float, warmup_s: float = 1.0,
        axis: Axis = "concurrency", replicate: int = 0) -> Leg:
    load: Load = Closed(int(value)) if axis == "concurrency" else Open(PerSecond(value))
    return Leg(id=f"{phase}-{value:g}-r{replicate}", axis=axis, value=value, phase=phase,
               replicate=replicate, seed=1, load=load, warmup_s=warmup_s, measure_s=measure_s)


def write(path: Path, levels: Sequence[int] = tuple(THROUGHPUT), confirm: int | None = 32,
          crash: bool = False, errors: bool = False, measure_s: float = 20.0, proof_s: float = 60.0,
          phase: Phase = "ladder", **changes: Any) -> Path:
    """A sweep, or with phase "run" a run of these levels, which may repeat. `crash`: the last leg
    has no window and its journal a torn line; `errors`: from 64 up, a tenth of the requests meets
    an error that holds markup."""
    folder = RunFolder.create(path, manifest(**changes))
    records, legs = Journal(folder.records_path(0)), folder.legs_journal()
    clock, rng = Clock(), np.random.default_rng(7)
    records.append(Header(SCHEMA, "synthetic", 0, clock.now_ns, 1_763_000_000 * S))
    plan = [leg(c, phase, max(measure_s, 2.5 * c / THROUGHPUT[c]), c / THROUGHPUT[c],
                replicate=list(levels[:i]).count(c)) for i, c in enumerate(levels)]
    plan += [leg(confirm, "confirm", proof_s, 6.0, replicate=i)
             for i in range(1 if crash else 4)] if confirm else []
    for one in plan:
        legs.append(LegLine(leg=one))
        window, done = hold(one, clock, rng, errors)
        killed_ns = window.from_ns + (window.to_ns - window.from_ns) * 3 // 4
        torn = crash and one is plan[-1]
        for r in done:
            if not torn or r.end_ns < killed_ns:
                records.append(r)
        if not torn:
            legs.append(LegLine(window=window))
    if crash:
        with folder.records_path(0).open("ab") as f:
            f.write(b'{"leg":"torn')
    for source in ("server", "gpu"):
        journal = folder.telemetry(source)
        for row in clock.rows:
            if row.source == source:
                journal.append(row)
    return path


def hold(one: Leg, clock: Clock, rng: np.random.Generator,
         errors: bool) -> tuple[Window, list[RequestRecord]]:
    """One leg: each slot sends its next request when the last has ended, until the window does."""
    t0 = clock.now_ns
    start = t0 + round(one.warmup_s * S)
    stop = start + round((one.measure_s or 0) * S)
    slots = [(t0 + i * 1000, i) for i in range(int(one.value))]
    heapq.heapify(slots)
    done = []
    while slots:
        due, slot = heapq.heappop(slots)
        if due < stop:
            r = request(one, due, clock, rng, errors)
            done.append(r)
            heapq.heappush(slots, (r.end_ns + 1_000_000, slot))
    end = max(r.end_ns for r in done)
    measure(one, t0, end, clock)
    clock.now_ns = end + S // 2
    done.sort(key=lambda r: r.end_ns)
    return Window(one.id, t0, start, stop, end, "done", lag_p99_s=0.001, cpu_frac=0.2), done


def request(one: Leg, due: int, clock: Clock, rng: np.random.Generator,
            errors: bool) -> RequestRecord:
    clock.seq += 1
    c = int(one.value)
    cls = str(rng.choice(list(OUTPUT_TOK), p=[0.2, 0.5, 0.3]))
    n = OUTPUT_TOK[cls]
    tpot_s = (c / THROUGHPUT[c] - TTFT[c]) / 190 * rng.lognormal(0, 0.08)
    sent = due + int(rng.exponential(2e5))
    first = sent + int(TTFT[c] * rng.lognormal(0, 0.42) * (1.3 if cls == "summary" else 0.95) * S)
    gaps = np.maximum(1, rng.gamma(9, tpot_s / 9, n - 1) * 1e6).astype(int).tolist()
    r = RequestRecord(
        leg=one.id, shard=0, seq=clock.seq, session=clock.seq, turn=0, cls=cls, due_ns=due,
        end_ns=first + 1000 * sum(gaps), outcome=Outcome.OK, sent_ns=sent, headers_ns=sent + 10**6,
        first_ns=first, first_visible_ns=first, gaps_us=gaps, inflight=c, max_tokens=n,
        want_prompt_tok=300, prompt_tok=300, output_tok=n, tok_source="usage", status=200,
        finish_reason="length")
    if errors and c >= 64 and rng.random() < 0.1:
        r.gaps_us, r.finish_reason = gaps[: n // 2], None
        r.end_ns = first + 1000 * sum(r.gaps_us)
        r.outcome = Outcome.SERVER_ERROR_EVENT
        r.error = "InternalError: <script>alert('x')</script> </script> & more"
    return r


def measure(one: Leg, t0: int, end: int, clock: Clock) -> None:
    c = one.value
    for t in range(t0, end, S):
        full = min(0.97, 0.004 * c + 0.02)
        clock.preemptions += 0.05 if c >= 128 else 0.0
        server = {"running": min(c, 100), "waiting": max(0.0, c - 100), "kv_frac": full,
                  "preemptions": clock.preemptions, "prompt_tok": 1.0, "output_tok": 1.0}
        gpu = {"memory_used_bytes": (14.2 + 8 * full) * GIB, "memory_total_bytes": 24.0 * GIB,
               "util_frac": min(0.99, 0.4 + 0.01 * c)}
        clock.rows += [Row("server", t, k, float(v)) for k, v in server.items()]
        clock.rows += [Row("gpu", t, k, v, {"index": "0"}) for k, v in gpu.items()]


class Plain(Struct, frozen=True):
    """A hand-made run: its legs, windows and records as they are."""

    legs: Sequence[tuple[Leg, Window | None]]
    records: Sequence[RequestRecord]
    rows: Sequence[Row] = ()


def write_plain(path: Path, run: Plain, **changes: Any) -> Path:
    folder = RunFolder.create(path, manifest(**changes))
    records, legs = Journal(folder.records_path(0)), folder.legs_journal()
    records.append(Header(SCHEMA, "synthetic", 0, 0, 1_763_000_000 * S))
    for one, window in run.legs:
        legs.append(LegLine(leg=one))
        if window:
            legs.append(LegLine(window=window))
    for r in run.records:
        records.append(r)
    for row in run.rows:
        folder.telemetry(row.source).append(row)
    return path


def answer_of(one: Leg, due: int, takes_s: float, seq: int) -> RequestRecord:
    """A complete answer of 11 events, the first after a tenth of the time it takes."""
    first = due + round(takes_s * S / 10)
    gaps = [round(takes_s * 9e4)] * 10
    return RequestRecord(
        leg=one.id, shard=0, seq=seq, session=seq, turn=0, cls="code", due_ns=due, sent_ns=due,
        first_ns=first, gaps_us=gaps, end_ns=first + 1000 * sum(gaps), outcome=Outcome.OK,
        output_tok=11, prompt_tok=100, tok_source="usage", status=200, finish_reason="stop")


Kind = Literal["SAFE", "UNSAFE", "UNRESOLVED", "INVALID", "died", "interrupted"]


def run_of(path: Path, *legs: tuple[float, Kind], note: str = "CUDA out of memory",
           error: str = "EMFILE", phase: Phase = "run", **changes: Any) -> Path:
    """A run of these loads, each with what its records say of it: 80 good answers, 80 late ones,
    few, ones that were dropped for an `error`, or a server that died (`note`: of what)."""
    held, records = [], []
    for i, (value, kind) in enumerate(legs):
        one = leg(value, phase, 40.0, 0.0, replicate=[v for v, _ in legs[:i]].count(value))
        t0 = (100 + 100 * i) * S
        for k in range({"UNRESOLVED": 10, "died": 10}.get(kind, 80)):
            takes_s = 25.0 if kind == "UNSAFE" else 0.4
            r = answer_of(one, t0 + k * S // 2, takes_s, seq=100 * i + k)
            if kind == "INVALID":
                r.outcome, r.error = Outcome.DROPPED, error
            records.append(r)
        ending: Ending = ("server_died" if kind == "died" else
                          "interrupted" if kind == "interrupted" else "done")
        held.append((one, Window(one.id, t0, t0, t0 + 40 * S, t0 + 70 * S, ending, note=note)))
    return write_plain(path, Plain(held, records), **changes)


def few(n: int, late_s: float = 0.5) -> Plain:
    """A leg of n answers, the last of which takes so long."""
    one = leg(2, "run", 40.0, 0.0)
    records = [answer_of(one, 100 * S + k * S, 0.4 if k < n - 1 else late_s, seq=k)
               for k in range(n)]
    return Plain([(one, Window(one.id, 100 * S, 100 * S, 140 * S, 170 * S, "done"))], records)
