"""A run folder as tables: one row per request, the legs with their windows and judgements,
telemetry as series. Made of the journals alone: a run that was killed loads as well.
"""

import argparse
import itertools
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from msgspec import Struct

from analysis import journals
from analysis.digest import Stretch, digests
from analysis.gaps import Gaps
from analysis.journals import LegResult, LegTask
from loadgen import scenario
from loadgen.errors import LoadgenError
from loadgen.headroom import Peak
from loadgen.judge import Criteria, Judgement, ServerSigns
from loadgen.leg import Axis, Leg, Window
from loadgen.ramp import Conclusion, conclude
from loadgen.record import RequestRecord
from loadgen.scenario import Scenario, Slo
from loadgen.store import Manifest, Row, RunFolder, Verdict
from loadgen.telemetry.signs import (
    GpuSigns,
    gpu_signs_of,
    gpus,
    loaded_bytes,
    series,
    signs_of,
)

Series = Sequence[tuple[int, float]]  # (t_ns, value), ascending
Floats = np.ndarray[tuple[int], np.dtype[np.float64]]

COLUMNS = (
    "leg", "cls", "session", "turn", "value", "phase", "due_s", "sent_s", "end_s", "ttft_s",
    "ttft_service_s", "tpot_s", "itl_max_s", "e2e_s", "lateness_s", "output_tok", "prompt_tok",
    "cached_tok", "outcome", "good", "misses", "in_window", "void", "error", "window_tok",
    "visible_s")


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
    gaps: dict[str, Gaps]  # leg → event gaps of its sample, pooled
    peaks: list[Peak]  # of the generator, in the order of `legs`
    gpus: list[GpuSigns]  # likewise
    states: list[Row]  # of the server, as they changed
    gpu_loaded_bytes: float | None  # memory after load: when the server was ready
    verdicts: list[Verdict] = []  # on answers, where classes have validators

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
    Raises StoreError, ScenarioError."""
    folder = RunFolder(path)
    manifest = folder.manifest()
    mix = scenario.parse(manifest.scenario, where=str(path / "manifest.json"))
    mix = mix.with_slo(slo) if slo else mix
    criteria = Criteria(manifest.target_frac, manifest.confidence,
                        calibration=manifest.calibration)
    where = journals.index(folder)
    legs = _with_windows(folder.legs(), where)
    told = list(folder.rows())
    telemetry, cards = _telemetry(told), gpus(told)
    states = sorted((r for r in told if r.source == "state"), key=lambda r: r.t_ns)
    ready_ns = next((r.t_ns for r in states if r.name == "READY"), None)
    signs = [signs_of(window, telemetry.get("server", {})) for _, window in legs]
    verdicts = [*folder.verdicts().values()]
    t0_ns = min((w.t0_ns for _, w in legs if w.t0_ns), default=0)
    found = journals.all_judged([
        LegTask(leg, window, said, where.get(leg.id, ()), mix, criteria, t0_ns,
                {v.ref: v.wrong for v in verdicts if v.leg == leg.id and v.wrong})
        for (leg, window), said in zip(legs, signs, strict=True)])
    return Run(folder, manifest, mix, criteria, legs, _frame(legs, found),
               [x.judgement for x in found], signs, telemetry, t0_ns,
               folder.torn + sum(x.torn for x in found),
               {leg.id: x.gaps for (leg, _), x in zip(legs, found, strict=True)},
               [x.peak for x in found], [gpu_signs_of(window, cards) for _, window in legs], states,
               loaded_bytes(cards, ready_ns), verdicts)


def _with_windows(legs: Sequence[tuple[Leg, Window | None]],
                  where: Mapping[str, Sequence[Stretch]]) -> list[tuple[Leg, Window]]:
    """Each leg once; one without a window (the run was killed) gets one of what is known."""
    found: dict[str, tuple[Leg, Window]] = {}
    last_ns = 0
    for leg, window in legs:
        known = window or _salvaged(leg, digests(where.get(leg.id, ())), last_ns)
        found[leg.id] = (leg, known)
        last_ns = known.end_ns
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


def _frame(legs: Sequence[tuple[Leg, Window]], found: Sequence[LegResult]) -> pd.DataFrame:
    sizes = [len(x.columns["due_s"]) for x in found]
    each = {"leg": [leg.id for leg, _ in legs], "phase": [leg.phase for leg, _ in legs],
            "value": [leg.value for leg, _ in legs]}
    columns: dict[str, Any] = {}
    for name in COLUMNS:
        if name in each:
            kind = float if name == "value" else object
            columns[name] = np.repeat(np.array(each[name], kind), sizes)
        elif name in journals.TEXT:
            columns[name] = journals.texts(found, name)
        else:
            kind = bool if name in journals.FLAGS else float
            columns[name] = np.concatenate([np.empty(0, kind), *(x.columns[name] for x in found)])
    return pd.DataFrame({c: pd.Series(v, dtype=v.dtype) for c, v in columns.items()})


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
