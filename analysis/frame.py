"""A run folder as tables: one row per request, the legs with their windows and judgements,
telemetry as series. Made of the journals alone: a run that was killed loads as well.
"""

import argparse
import itertools
import signal
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from msgspec import Struct

from loadgen import metrics, scenario
from loadgen.errors import LoadgenError
from loadgen.headroom import Peak, peak_of
from loadgen.judge import Criteria, Judgement, ServerSigns, is_due, judge
from loadgen.leg import Axis, Leg, Window
from loadgen.ramp import Conclusion, conclude
from loadgen.record import RequestRecord
from loadgen.scenario import Scenario, Slo
from loadgen.store import Manifest, Row, RunFolder
from loadgen.telemetry.signs import (
    GpuSigns,
    gpu_signs_of,
    gpus,
    loaded_bytes,
    series,
    signs_of,
)

Series = Sequence[tuple[int, float]]  # (t_ns, value), ascending
Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
Floats = np.ndarray[tuple[int], np.dtype[np.float64]]

COLUMNS = (
    "leg", "cls", "session", "turn", "value", "phase", "due_s", "sent_s", "end_s", "ttft_s",
    "ttft_service_s", "tpot_s", "itl_max_s", "e2e_s", "lateness_s", "output_tok", "prompt_tok",
    "cached_tok", "outcome", "good", "misses", "in_window", "void", "error", "window_tok")
TEXT = ("leg", "cls", "phase", "outcome", "misses", "error")
FLAGS = ("good", "in_window", "void")


class Run(Struct, frozen=True, eq=False):
    """A loaded run. Instants `*_s` in `frame` count from `t0_ns`, the first leg's start; absent
    values are NaN, absent texts empty. `window_tok` is the output tokens of a request whose
    events came inside its leg's window. The sample of a leg: `in_window` and not `void`."""

    folder: RunFolder
    manifest: Manifest
    scenario: Scenario
    criteria: Criteria
    legs: list[tuple[Leg, Window]]
    frame: pd.DataFrame
    judgements: list[Judgement]  # in the order of `legs`
    signs: list[ServerSigns]  # likewise
    telemetry: dict[str, dict[str, Series]]  # source → name → series
    t0_ns: int
    torn: int  # lines of the journals that could not be read
    gaps_us: dict[str, Ints]  # leg → event gaps of its sample, pooled
    peaks: list[Peak]  # of the generator, in the order of `legs`
    gpus: list[GpuSigns]  # likewise
    states: list[Row]  # of the server, as they changed
    gpu_loaded_bytes: float | None  # memory after load: when the server was ready

    def gaps_s(self, *legs: str) -> Floats:
        """Event gaps of the samples of these legs, pooled, s."""
        return np.concatenate([np.empty(0, np.int64), *(self.gaps_us[x] for x in legs)]) / 1e6

    def sample(self, *legs: str) -> pd.DataFrame:
        f = self.frame
        return f[f["leg"].isin(legs) & f["in_window"] & ~f["void"]]

    @property
    def is_run(self) -> bool:
        """Every leg was asked for as such: each load is judged for itself, no search concludes."""
        return bool(self.legs) and all(leg.phase == "run" for leg, _ in self.legs)

    @property
    def axis(self) -> Axis:
        return self.legs[0][0].axis if self.legs else "concurrency"

    @property
    def conclusion(self) -> Conclusion:
        return conclude(self.judgements, self.axis, self.criteria)

    @property
    def simulated(self) -> bool:
        return bool(self.manifest.server.get("simulated"))


def load(path: Path, slo: Slo | None = None) -> Run:
    """The run in folder `path`, judged by its own SLO or, where `slo` says so, by that one.
    Holds all records for a moment (about 9 bytes per output token). Raises StoreError,
    ScenarioError."""
    folder = RunFolder(path)
    manifest = folder.manifest()
    mix = scenario.parse(manifest.scenario, where=str(path / "manifest.json"))
    mix = mix.with_slo(slo) if slo else mix
    criteria = Criteria(manifest.target_frac, manifest.confidence,
                        calibration=manifest.calibration)
    records: dict[str, list[RequestRecord]] = {}
    for r in folder.records():
        records.setdefault(r.leg, []).append(r)
    started = folder.legs()
    legs = _with_windows(started, records)
    told = list(folder.rows())
    telemetry, cards = _telemetry(told), gpus(told)
    states = sorted((r for r in told if r.source == "state"), key=lambda r: r.t_ns)
    ready_ns = next((r.t_ns for r in states if r.name == "READY"), None)
    signs = [signs_of(window, telemetry.get("server", {})) for _, window in legs]
    judgements = []
    for (leg, window), said in zip(legs, signs, strict=True):
        judgements.append(judge(leg, window, records.get(leg.id, []), said, mix, criteria))
    t0_ns = min((w.t0_ns for _, w in legs if w.t0_ns), default=0)
    gaps = {leg.id: array("q") for leg, _ in legs}
    rows = [_row(r, leg, window, mix, t0_ns, gaps[leg.id])
            for leg, window in legs for r in records.get(leg.id, ())]
    return Run(folder, manifest, mix, criteria, legs, _frame(rows), judgements, signs, telemetry,
               t0_ns, folder.torn, {x: np.frombuffer(g, np.int64) for x, g in gaps.items()},
               [peak_of(records.get(leg.id, ())) for leg, _ in legs],
               [gpu_signs_of(window, cards) for _, window in legs], states,
               loaded_bytes(cards, ready_ns))


def _with_windows(legs: Sequence[tuple[Leg, Window | None]],
                  records: Mapping[str, Sequence[RequestRecord]]) -> list[tuple[Leg, Window]]:
    """Each leg once; one without a window (the run was killed) gets one of what is known."""
    found: dict[str, tuple[Leg, Window]] = {}
    last_ns = 0
    for leg, window in legs:
        found[leg.id] = (leg, window or _salvaged(leg, records.get(leg.id, ()), last_ns))
        last_ns = found[leg.id][1].end_ns
    return list(found.values())


def _salvaged(leg: Leg, records: Sequence[RequestRecord], before_ns: int) -> Window:
    """The window of a leg that broke off: until the last due time that left a record, or until
    the first request that left none. What was in flight is lost, and the slow ones are among it;
    up to there every request is known."""
    t0 = min((r.due_ns for r in records), default=before_ns)
    known_ns = max((r.due_ns for r in records), default=t0)
    for shard in {r.shard for r in records}:
        own = sorted((r for r in records if r.shard == shard), key=lambda r: r.seq)
        known_ns = min([known_ns, *(a.due_ns for a, b in itertools.pairwise(own)
                                    if b.seq > a.seq + 1)])
    from_ns = t0 + round(leg.warmup_s * 1e9)
    return Window(leg=leg.id, t0_ns=t0, from_ns=from_ns, to_ns=max(from_ns, known_ns + 1),
                  end_ns=max((r.end_ns for r in records), default=t0), ending="interrupted",
                  note="the run ended before this leg did")


# ------------------------------------------------------------------------------------- the frame


def _row(r: RequestRecord, leg: Leg, window: Window, mix: Scenario, t0_ns: int,
         gaps: "array[int]") -> tuple[object, ...]:
    """Values in the order of COLUMNS; the record's gaps join the leg's if it is in the sample."""
    why = metrics.misses(r, mix.slo_of(r.cls))
    in_window = is_due(window, r)
    void = window.is_void(r.due_ns, r.end_ns)
    if in_window and not void:
        gaps.extend(r.gaps_us)
    sent_s = None if r.sent_ns is None else metrics.seconds_between(t0_ns, r.sent_ns)
    return (r.leg, r.cls, r.session, r.turn, leg.value, leg.phase,
            metrics.seconds_between(t0_ns, r.due_ns), sent_s,
            metrics.seconds_between(t0_ns, r.end_ns), metrics.ttft_s(r),
            metrics.ttft_service_s(r), metrics.tpot_s(r), metrics.itl_max_s(r), metrics.e2e_s(r),
            metrics.lateness_s(r), r.output_tok, r.prompt_tok, r.cached_tok, r.outcome.value,
            not why, ", ".join(why), in_window, void, r.error or "", _window_tok(r, window))


def _window_tok(r: RequestRecord, window: Window) -> float:
    """Output tokens that came inside the window. Where an event's tokens are not known, each
    holds output_tok / n_events."""
    if r.first_ns is None or not r.output_tok:
        return 0.0
    stamps_ns = r.first_ns + 1000 * np.cumsum([0, *r.gaps_us])
    inside = (stamps_ns >= window.from_ns) & (stamps_ns < window.to_ns)
    if r.event_tok and len(r.event_tok) == r.n_events:
        return float(np.asarray(r.event_tok)[inside].sum())
    return float(inside.sum()) * r.output_tok / r.n_events


def _frame(rows: Sequence[tuple[object, ...]]) -> pd.DataFrame:
    columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)) if rows else {}
    kinds = {c: object if c in TEXT else bool if c in FLAGS else float for c in COLUMNS}
    return pd.DataFrame({c: pd.Series(list(columns.get(c, ())), dtype=kinds[c]) for c in COLUMNS})


def _telemetry(rows: Iterable[Row]) -> dict[str, dict[str, Series]]:
    by_source: dict[str, list[Row]] = {}
    for r in rows:
        by_source.setdefault(r.source, []).append(r)
    return {source: _gpus(own) if source == "gpu" else {**series(own, source)}
            for source, own in by_source.items()}


def _gpus(rows: Sequence[Row]) -> dict[str, Series]:
    """Of several GPUs, the fullest one's memory and the mean of everything else."""
    found: dict[str, dict[int, list[float]]] = {}
    for r in rows:
        found.setdefault(r.name, {}).setdefault(r.t_ns, []).append(r.value)
    return {name: [(t, max(v) if name.startswith("memory") else sum(v) / len(v))
                   for t, v in sorted(at.items())] for name, at in found.items()}


# ----------------------------------------------------------------------------- the command lines


def parser(doc: str) -> argparse.ArgumentParser:
    """The arguments that all of `python -m analysis.…` share."""
    args = argparse.ArgumentParser(description=doc.splitlines()[0])
    args.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    args.add_argument("--slo", help="judge by other limits, as ttft=1s,tpot=50ms")
    return args


def as_a_filter() -> None:
    """For a process that is a script: `… | head` ends it without a word."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def open_run(args: argparse.Namespace) -> Run:
    """The run that the arguments name; one line on stderr and exit 2 if there is none."""
    try:
        return load(args.run, scenario.parse_slo(args.slo) if args.slo else None)
    except LoadgenError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
