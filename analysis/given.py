"""What a run took from files: the arrivals of a recorded trace, as planned and as started, and the
prompts of datasets."""

import math
from collections.abc import Sequence
from pathlib import PurePath

import altair as alt
import numpy as np
from msgspec import Struct

from analysis import theme
from analysis.charts import Chart, data, ticks
from analysis.frame import Run
from loadgen.scenario import Trace, TraceFile

BUCKETS = 80  # at most so many in a curve
HEADS = ("class", "file", "SHA-256", "entries", "left out", "sessions", "sent again")


class Arrivals(Struct, frozen=True):
    """Instants in s after the leg's start; `whole_s`: how long arrivals went on."""

    leg: str
    planned_s: Sequence[float]
    started_s: Sequence[float]
    whole_s: float


class Burst(Struct, frozen=True):
    """`cv`: coefficient of variation of the gaps; 1 is a Poisson process, more comes in bursts.
    `peak`: the fullest second over the mean one. None: too few to tell."""

    n: int
    cv: float | None
    peak: float | None


def arrivals(run: Run) -> list[Arrivals]:
    """Of each leg that replayed given instants."""
    found = []
    for leg, window in run.legs:
        if not isinstance(leg.load, Trace):
            continue
        end_s = math.inf if leg.measure_s is None else leg.warmup_s + leg.measure_s
        planned = [t for t in leg.load.due_s[:leg.num_sessions] if t < end_s]
        f = run.frame
        sent = f[(f["leg"] == leg.id) & (f["turn"] == 0)]["sent_s"].dropna().to_numpy()
        started = np.sort(sent) - (window.t0_ns - run.t0_ns) / 1e9
        found.append(Arrivals(leg.id, planned, started.tolist(), max(
            [*planned[-1:], *started[-1:].tolist(), 1e-3])))
    return found


def burst(instants_s: Sequence[float], whole_s: float) -> Burst:
    n = len(instants_s)
    if n < 3:
        return Burst(n, None, None)
    gaps = np.diff(np.asarray(instants_s))
    mean_s = float(gaps.mean())
    seconds = np.histogram(instants_s, bins=max(1, math.ceil(whole_s)),
                           range=(0.0, float(max(1, math.ceil(whole_s)))))[0]
    return Burst(n, float(gaps.std()) / mean_s if mean_s > 0 else None,
                 float(seconds.max() / seconds.mean()))


def sentence(of: Arrivals) -> str:
    """Both curves in figures."""
    planned, started = (burst(x, of.whole_s) for x in (of.planned_s, of.started_s))
    says = f"{planned.n} requests were planned, {started.n} were started."
    if planned.cv is not None and started.cv is not None and planned.peak and started.peak:
        says += (f" Burstiness, as the coefficient of variation of the gaps (1: Poisson): planned "
                 f"{planned.cv:.2f}, started {started.cv:.2f}. The fullest second had "
                 f"{planned.peak:.1f} times the mean as planned, {started.peak:.1f} times as "
                 "started.")
    return says


def curve(of: Arrivals) -> Chart:
    """Requests per second over time: planned as an area, started as a line on it."""
    steps_s = ticks([0.1, max(of.whole_s, 0.2)])
    step_s = next(s for s in steps_s if of.whole_s / s <= BUCKETS)
    n = max(1, math.ceil(of.whole_s / step_s))
    rows = []
    for what, instants_s in (("planned", of.planned_s), ("started", of.started_s)):
        counts = np.histogram(instants_s, bins=n, range=(0.0, n * step_s))[0]
        rows += [{"s": i * step_s, "rps": float(c) / step_s, "what": what}
                 for i, c in enumerate([*counts, counts[-1]])]
    x = alt.X("s:Q", title="Seconds since the leg's start", axis=alt.Axis(grid=False, tickCount=8),
              scale=alt.Scale(domain=[0, n * step_s], nice=False))
    y = alt.Y("rps:Q", title="", axis=alt.Axis(tickCount=4))
    tooltip = [alt.Tooltip("s:Q", title="s", format=".3g"), alt.Tooltip("rps:Q", format=".3g")]
    base = alt.Chart(data(rows)).encode(x=x, y=y, tooltip=tooltip)
    return alt.layer(
        base.transform_filter("datum.what == 'planned'").mark_area(
            interpolate="step-after", color=theme.MEASURED),
        base.transform_filter("datum.what == 'started'").mark_line(
            interpolate="step-after", color=theme.BLUE, strokeWidth=1.5)).properties(
                title=f"Arrivals per second, over {step_s:g} s each", height=170)


def rows(run: Run) -> list[list[str]]:
    """Each dataset, and how far the run got through it. Sent again are the sessions of a leg
    beyond the number of entries, and of all legs together at least those."""
    found = []
    first = run.frame[run.frame["turn"] == 0]
    for c in run.scenario.classes:
        if c.dataset is None:
            continue
        sent = first[(first["cls"] == c.name) & first["sent_s"].notna()]
        entries = c.dataset.entries or 0
        again = max(0, len(sent) - entries)
        found.append([c.name, PurePath(c.dataset.path).name, (c.dataset.sha256 or "")[:12],
                      f"{entries:,}", f"{c.dataset.broken:,}", f"{len(sent):,}",
                      _again(again, len(run.legs) == 1)])
    return found


def _again(n: int, one_leg: bool) -> str:
    """Legs begin in other places of the file, and what two of them share is not counted here."""
    if one_leg:
        return f"{n:,}"
    return f"at least {n:,}" if n else "–"


def trace_file(run: Run) -> str | None:
    """The recorded trace that the load was of, in a sentence."""
    load = run.scenario.load
    if not isinstance(load, TraceFile) or not arrivals(run):
        return None
    window = ""
    if load.from_s or load.to_s:
        window = (f", from {load.from_s or 0:g} s to "
                  f"{'its end' if load.to_s is None else f'{load.to_s:g} s'}")
    speed = "" if load.scale == 1 else f", its rate times {load.scale:g}"
    return (f"Recorded trace {PurePath(load.path).name} ({load.format}, SHA-256 "
            f"{(load.sha256 or '')[:12]}){window}{speed}.")
