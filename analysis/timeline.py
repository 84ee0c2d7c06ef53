"""The charts over time, and the distributions: those that a single leg has as well."""


import altair as alt
import numpy as np

from analysis import phrases, steps, theme
from analysis.charts import TIME, Chart, data, said, ticks
from analysis.frame import Run
from loadgen.judge import NOT_ERRORS


def ecdf(run: Run, name: str, title: str) -> Chart | None:
    """The share of answers at or under a latency, one line per level, at most 120 steps each. An
    answer that was cut off never arrives: its level's line ends below 100 %."""
    rows = []
    values = sorted({leg.value for leg, _ in run.legs})
    for value in values:
        sample = run.sample(*(leg.id for leg, _ in run.legs if leg.value == value))
        x_s = np.sort(sample[f"{name}_s"].dropna().to_numpy())
        picked = np.unique(np.linspace(0, len(x_s) - 1, min(len(x_s), 120)).round().astype(int))
        n = len(x_s) + len(steps.cut_off(sample, name))
        rows += [{"level": f"{value:g}", "s": float(x_s[i]), "share": (i + 1) / n}
                 for i in picked.tolist()] if len(x_s) else []
    if not rows:
        return None
    limit = getattr(run.scenario.slo, f"{name}_s")
    at_s = ticks([max(r["s"], 1e-5) for r in rows] + ([limit] if limit else []))
    x = alt.X("s:Q", title="", axis=alt.Axis(labelExpr=TIME, values=at_s),
              scale=alt.Scale(type="log", domain=[at_s[0], at_s[-1]]))
    y = alt.Y("share:Q", title="", axis=alt.Axis(format="%", tickCount=5))
    colour = alt.Color("level:O", sort=[f"{v:g}" for v in values],
                       scale=alt.Scale(scheme="viridis", reverse=True),
                       title=phrases.unit(run), legend=alt.Legend(
                           columns=8, symbolType="stroke", titleOrient="top")
                       if len(values) > 1 else None)
    lines = alt.Chart(data(rows)).mark_line(interpolate="step-after", strokeWidth=1.8).encode(
        x=x, y=y, color=colour, tooltip=["level:O", alt.Tooltip("s:Q", format=".3g"),
                                         alt.Tooltip("share:Q", format=".1%")])
    marks = []
    if limit is not None:
        at = alt.Chart(data([{"s": limit, "text": f"limit {phrases.limit(limit)}"}])).encode(x=x)
        marks = [at.mark_rule(strokeDash=[4, 4], color=theme.MUTED), *said(
            at.encode(y=alt.value(236)), "text", theme.MUTED, align="right", dx=-4,
            baseline="bottom")]
    return alt.layer(lines, *marks).properties(title=title, height=240)


# ---------------------------------------------------------------------------------- over time


def in_flight(run: Run) -> Chart | None:
    """Requests in flight, and a tick for each that failed, on the legs' windows."""
    f = run.frame
    if f.empty:
        return None
    starts = np.sort(f["sent_s"].fillna(f["due_s"]).to_numpy())
    ends = np.sort(f["end_s"].to_numpy())
    grid = np.linspace(0, float(ends[-1]), 500)
    n = np.searchsorted(starts, grid, "right") - np.searchsorted(ends, grid, "right")
    failed = f[~f["outcome"].isin([x.value for x in NOT_ERRORS])]
    x, span = _run_axis(run)
    y = alt.Y("n:Q", title="", axis=alt.Axis(tickCount=5, tickMinStep=1),
              scale=alt.Scale(domain=[0, max(1, int(n.max())) * 1.15], nice=False))
    lines = alt.Chart(data([{"s": float(t), "n": int(k)} for t, k in
                             zip(grid, n, strict=True)])).mark_line(
        interpolate="step-after", color=theme.BLUE, strokeWidth=1.5).encode(x=x, y=y)
    marks = alt.Chart(data([{"s": t, "n": 0, "outcome": o} for t, o in zip(
        failed["end_s"][:1000], failed["outcome"][:1000], strict=True)])).mark_tick(
        orient="vertical", color=theme.UNSAFE, height=14, thickness=1.5, opacity=0.7).encode(
            x=x, y=alt.value(192), tooltip=["outcome:N", alt.Tooltip("s:Q", format=".1f")])
    return alt.layer(*_legs(run, x, span, named=True), lines,
                     *([marks] if len(failed) else [])).properties(
        title="Requests in flight", height=200)


def over_time(run: Run, source: str, name: str, title: str, factor: float,
              top: float | None = None) -> Chart | None:
    """A telemetry series times `factor`, on the legs' windows; None if there is none."""
    points = [((t - run.t0_ns) / 1e9, v * factor)
              for t, v in run.telemetry.get(source, {}).get(name, ())]
    if not points or not run.legs:
        return None
    points = points[:: max(1, len(points) // 500)]
    x, span = _run_axis(run)
    top = top or max(1.0, 1.15 * max(v for _, v in points))
    y = alt.Y("v:Q", title="", axis=alt.Axis(tickCount=4),
              scale=alt.Scale(domain=[0, top], nice=False))
    line = alt.Chart(data([{"s": t, "v": v} for t, v in points if span[0] <= t <= span[1]]))
    return alt.layer(*_legs(run, x, span), line.mark_line(
        color=theme.BLUE, strokeWidth=1.5, interpolate="step-after").encode(x=x, y=y)).properties(
            title=title, height=120)


def _run_axis(run: Run) -> tuple[alt.X, tuple[float, float]]:
    span = (0.0, max((w.end_ns - run.t0_ns) / 1e9 for _, w in run.legs))
    return alt.X("s:Q", title="Seconds since the start", axis=alt.Axis(grid=False, tickCount=6),
                 scale=alt.Scale(domain=span, nice=False)), span


def _legs(run: Run, x: alt.X, span: tuple[float, float], named: bool = False) -> list[alt.Chart]:
    """Each leg's measured window in blue on its warm-up and drain in grey."""
    rows = []
    for leg, w in run.legs:
        for kind, a, b in (("around", w.t0_ns, w.end_ns), ("measured", w.from_ns, w.to_ns)):
            rows.append({"s": (a - run.t0_ns) / 1e9, "to": min((b - run.t0_ns) / 1e9, span[1]),
                         "kind": kind, "label": f"{leg.value:g}" if kind == "measured" else ""})
    base = alt.Chart(data(rows)).encode(x=x)
    shade = [base.transform_filter(f"datum.kind == '{kind}'").mark_rect(
        color=colour, opacity=1).encode(x2="to:Q")
        for kind, colour in (("around", theme.UNMEASURED), ("measured", theme.MEASURED))]
    text = base.transform_filter("datum.label != ''").mark_text(
        align="left", baseline="top", dx=2, dy=3, color=theme.MUTED, fontSize=10).encode(
            y=alt.value(0), text="label:N")
    return [*shade, *([text] if named else [])]
