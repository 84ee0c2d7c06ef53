"""The charts, as Altair charts without a width: the page gives them its own, the PNGs a fixed one.
Data are small tables of what is drawn, never the records."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from analysis import labels, phrases, theme
from analysis.ceiling import Ceiling, rounded
from analysis.frame import Run
from analysis.knee import Knee
from analysis.words import Answer
from loadgen import metrics

Rows = Sequence[Mapping[Any, Any]]
Chart = alt.LayerChart | alt.FacetChart
TIME = ("datum.value == 0 ? '0' : datum.value < 0.9995 ? format(datum.value * 1000, '~g') + ' ms'"
        " : format(datum.value, '~g') + ' s'")
FEW = metrics.min_n(0.9)  # below it a level has no p90, and its median is drawn hollow


def data(rows: Rows) -> alt.Data:
    """Inline data; absent numbers become null."""
    return alt.Data(values=[{k: None if isinstance(v, float) and math.isnan(v) else v
                             for k, v in r.items()} for r in rows])  # type: ignore[no-untyped-call]


def ticks(values: Iterable[float]) -> list[float]:
    """1-2-5 steps that enclose the values, for a log axis."""
    lo, hi = min(values), max(values)
    steps = [m * 10.0**e for e in range(-5, 6) for m in (1, 2, 5)]
    first = max((i for i, x in enumerate(steps) if x <= lo * 1.0001), default=0)
    last = min((i for i, x in enumerate(steps) if x >= hi * 0.9999), default=len(steps) - 1)
    return steps[first:max(last, first + 1) + 1]


def said(base: alt.Chart, field: str, colour: str | alt.Color, **mark: Any) -> list[alt.Chart]:
    """Text on a halo, so that lines do not strike it through."""
    halo: dict[str, Any] = {"stroke": theme.PAPER, "strokeWidth": 3, "color": theme.PAPER}
    plain: dict[str, Any] = {"color": colour} if isinstance(colour, str) else {}
    text = base.mark_text(**mark, **plain).encode(text=f"{field}:N")
    return [base.mark_text(**mark, **halo).encode(text=f"{field}:N"),
            text if plain else text.encode(color=colour)]


def _time_axis(values_s: Sequence[float], title: str) -> alt.Y:
    """A y axis of durations, logarithmic if they span more than a factor 8."""
    top = max(values_s, default=1.0)
    low = min((x for x in values_s if x > 0), default=top)
    axis = alt.Axis(labelExpr=TIME, tickCount=5)
    scale = alt.Scale(domain=[0, top * 1.08])
    if top > 8 * low:
        at = ticks([low, top])
        axis = alt.Axis(labelExpr=TIME, values=at)
        scale = alt.Scale(type="log", domain=[at[0], at[-1]])
    return alt.Y("s:Q", scale=scale, axis=axis, title=title)


def _load_axis(run: Run, values: Sequence[float], field: str = "value") -> alt.X:
    axis = alt.Axis(values=list(values), format="~g", grid=False)
    return alt.X(f"{field}:Q", title=phrases.unit(run), axis=axis,
                 scale=alt.Scale(type="log", base=2,
                                 domain=[min(values) / 1.12, max(values) * 1.3]))


def _status(run: Run, value: float) -> str:
    """The label of a level: its value, and what was concluded on it."""
    if run.is_run:
        return ""
    c = run.conclusion
    return "safe" if value == c.safe else "unsafe" if value == c.unsafe else ""


STATUS = alt.Color("status:N", legend=None, scale=alt.Scale(
    domain=["", "safe", "unsafe"], range=[theme.INK, theme.SAFE, theme.UNSAFE]))


# ------------------------------------------------------------------- throughput against latency


def qps_latency(run: Run, answer: Answer, name: str, title: str) -> Chart:
    """Achieved requests/s (x) against a latency's p50 and p90 (y), joined in the order of load."""
    rows = [{"value": r["value"], "rps": r["achieved_rps"], "q": q, "s": r[f"{name}_{q}_s"],
             "n": r[f"{name}_n"], "few": r[f"{name}_n"] < FEW,
             "status": _status(run, r["value"])}
            for r in answer.levels.to_dict("records") for q in ("p50", "p90")
            if pd.notna(r[f"{name}_{q}_s"])]
    for r in rows:
        r["label"] = f"{r['value']:g} {r['status']}".strip()
    last = {q: max((r for r in rows if r["q"] == q), key=lambda r: r["value"], default=None)
            for q in ("p50", "p90")}
    limit = getattr(run.scenario.slo, f"{name}_s")
    shown_s = [r["s"] for r in rows] + ([limit] if limit else [])
    y = _time_axis(shown_s, "")
    labels.place(rows, shown_s)
    top = max((r["rps"] for r in rows), default=1.0)
    x = alt.X("rps:Q", title="Achieved requests per second", axis=alt.Axis(tickCount=6),
              scale=alt.Scale(domain=[0, top * 1.2], nice=False))
    series = alt.Color("q:N", legend=None, scale=alt.Scale(
        domain=["p50", "p90"], range=[theme.BLUE, theme.LIGHT_BLUE]))
    base = alt.Chart(data(rows)).encode(x=x, y=y, tooltip=[
        alt.Tooltip("value:Q", title=run.axis), alt.Tooltip("q:N", title="quantile"),
        alt.Tooltip("rps:Q", title="achieved /s", format=".3g"),
        alt.Tooltip("s:Q", title="latency, s", format=".3g"), alt.Tooltip("n:Q", title="n")])
    ends = said(alt.Chart(data([r for r in last.values() if r])).encode(x=x, y=y), "q", series,
                 align="left", dx=9, fontWeight=600)
    chart: Chart = alt.layer(
        *_limit(limit, y), base.mark_line(strokeWidth=2).encode(color=series, order="value:Q"),
        base.transform_filter("datum.status != ''").mark_point(
            size=260, filled=False, strokeWidth=2).encode(color=STATUS),
        base.transform_filter("!datum.few").mark_point(
            size=55, filled=True, opacity=1).encode(color=series),
        base.transform_filter("datum.few").mark_point(
            size=50, fill=theme.PAPER, strokeWidth=1.8, opacity=1).encode(stroke=series),
        *(mark for dx, dy, align in labels.SPOTS for mark in said(base.transform_filter(
            f"datum.dx == {dx} && datum.dy == {dy}"), "label", STATUS, align=align, dx=dx, dy=dy)),
        *ends).resolve_scale(color="independent", stroke="independent").properties(
            title=title, height=300)
    return chart


def _limit(limit_s: float | None, y: alt.Y) -> list[alt.Chart]:
    """A dashed rule at an SLO's limit."""
    if limit_s is None:
        return []
    at = alt.Chart(data([{"s": limit_s, "text": f"limit {phrases.limit(limit_s)}"}]))
    return [at.mark_rule(strokeDash=[4, 4], color=theme.MUTED).encode(y=y), *said(
        at.encode(y=y, x=alt.value(0)), "text", theme.MUTED, align="left", baseline="bottom", dx=4,
        dy=-3)]


# ------------------------------------------------------------------------- against the load


def throughput(run: Run, answer: Answer) -> Chart:
    """Achieved and good requests/s over the load, with the fitted law, knee and safe level."""
    levels = answer.levels.to_dict("records")
    values = [r["value"] for r in levels]
    x = _load_axis(run, values)
    top = max(r["achieved_rps"] for r in levels)
    y = alt.Y("rps:Q", title="", axis=alt.Axis(tickCount=5),
              scale=alt.Scale(domain=[0, max(top, 0.01) * 1.2], nice=False))
    names = {"achieved": theme.BLUE, "good": theme.SAFE}
    rows = [{"value": r["value"], "rps": r[f"{k}_rps"], "what": what, "n": r["n"],
             "few": r["n"] < FEW}
            for r in levels for k, what in (("achieved", "achieved"), ("goodput", "good"))]
    colour = alt.Color("what:N", legend=None, scale=alt.Scale(
        domain=list(names), range=list(names.values())))
    base = alt.Chart(data(rows)).encode(x=x, y=y, color=colour, tooltip=[
        alt.Tooltip("value:Q", title=run.axis), "what:N", alt.Tooltip("rps:Q", format=".3g"),
        "n:Q"])
    close = abs(rows[-1]["rps"] - rows[-2]["rps"]) < 0.07 * top  # their names would overlap
    last = base.transform_filter(f"datum.value == {max(values)}")
    return alt.layer(
        *_knee(run, answer.knee, values), *_fitted(answer.knee, values, x, y),
        *_ceiling(run, answer.ceiling, values),
        *_safe(run, answer.knee, x), *_line(base),
        *(last.transform_filter(f"datum.what == '{what}'").mark_text(
            align="left", dx=7, dy=dy, fontWeight=600).encode(text="what:N")
          for what, dy in (("achieved", -6 * close), ("good", 7 * close))),
    ).properties(title="Throughput, requests per second", height=280)


def latency_by_load(run: Run, answer: Answer) -> Chart:
    levels = answer.levels.to_dict("records")
    values = [r["value"] for r in levels]
    names = {"E2E": theme.INK, "TTFT": theme.BLUE}
    rows = [{"value": r["value"], "what": what, "q": q, "s": r[f"{what.lower()}_{q}_s"],
             "n": r[f"{what.lower()}_n"], "few": r[f"{what.lower()}_n"] < FEW}
            for r in levels for what in names for q in ("p50", "p90")
            if pd.notna(r[f"{what.lower()}_{q}_s"])]
    x, y = _load_axis(run, values), _time_axis([r["s"] for r in rows], "")
    colour = alt.Color("what:N", legend=None, scale=alt.Scale(
        domain=list(names), range=list(names.values())))
    base = alt.Chart(data(rows)).encode(x=x, y=y, color=colour, detail="q:N", tooltip=[
        alt.Tooltip("value:Q", title=run.axis), "what:N", "q:N",
        alt.Tooltip("s:Q", title="s", format=".3g"), "n:Q"])
    median, tail = (base.transform_filter(f"datum.q == '{q}'") for q in ("p50", "p90"))
    return alt.layer(
        *_knee(run, answer.knee, values, labelled=False), *_safe(run, answer.knee, x),
        tail.mark_line(strokeWidth=1.5, strokeDash=[2, 3]), *_line(median),
        median.transform_filter(f"datum.value == {max(values)}").mark_text(
            align="left", dx=7, fontWeight=600).encode(text="what:N"),
    ).properties(title="Latency: p50 solid, p90 dotted", height=280)


def _line(base: alt.Chart) -> list[alt.Chart]:
    """A line with its points, hollow where there are few answers."""
    few, many = (base.transform_filter(x) for x in ("datum.few", "!datum.few"))
    return [base.mark_line(strokeWidth=2), many.mark_point(filled=True, size=50, opacity=1),
            few.mark_point(fill=theme.PAPER, size=45, opacity=1)]


def _knee(run: Run, knee: Knee | None, values: Sequence[float],
          labelled: bool = True) -> list[alt.Chart]:
    """The knee's rule on the band of its interval."""
    if knee is None or knee.value is None:
        return []
    at = alt.Chart(data([{"value": knee.value, "lo": knee.lo, "hi": knee.hi, "text":
                           f"knee {knee.value:.0f} ({knee.lo:.0f}–{knee.hi:.0f})"}]))
    x = _load_axis(run, values)
    text = at.mark_text(align="right", baseline="top", dx=-5, dy=2, color=theme.MUTED).encode(
        x=x, y=alt.value(0), text="text:N")
    return [at.mark_rect(color="#eceff2").encode(x=_load_axis(run, values, "lo"), x2="hi:Q"),
            at.mark_rule(color=theme.MUTED).encode(x=x), *([text] if labelled else [])]


def _ceiling(run: Run, ceiling: Ceiling | None, values: Sequence[float]) -> list[alt.Chart]:
    """A rule at the number of requests that the KV cache holds, where the chart reaches so far;
    its label stands at the bottom, where the curves do not."""
    if run.axis != "concurrency" or ceiling is None or ceiling.requests is None or not (
            min(values) <= ceiling.requests <= 1.3 * max(values)):
        return []
    at = alt.Chart(data([{"value": ceiling.requests, "text":
                           f"memory holds {rounded(ceiling.requests)}"}]))
    x = _load_axis(run, values)
    right = 1.6 * ceiling.requests < max(values)  # there is room for the text
    return [at.mark_rule(color=theme.UNSAFE, strokeDash=[2, 3]).encode(x=x),
            *said(at.encode(x=x, y=alt.value("height")), "text", theme.MUTED, baseline="bottom",
                  align="left" if right else "right", dx=5 if right else -5, dy=-4)]


def _fitted(knee: Knee | None, values: Sequence[float], x: alt.X, y: alt.Y) -> list[alt.Chart]:
    if knee is None or knee.value is None or knee.fit is None:
        return []
    rows = [{"value": float(c), "rps": knee.fit.rps(float(c))}
            for c in np.geomspace(min(values), max(values), 60)]
    return [alt.Chart(data(rows)).mark_line(
        strokeWidth=1.2, strokeDash=[4, 3], color=theme.MUTED).encode(x=x, y=y)]


def _safe(run: Run, knee: Knee | None, x: alt.X) -> list[alt.Chart]:
    """A rule at the safe level; its label keeps off the knee's."""
    safe = run.conclusion.safe
    if safe is None:
        return []
    right = knee is None or knee.value is None or safe >= knee.value
    at = alt.Chart(data([{"value": safe, "text": f"safe {safe:g}"}]))
    return [at.mark_rule(color=theme.SAFE, strokeWidth=1.5).encode(x=x),
            at.mark_text(align="left" if right else "right", baseline="top", fontWeight=600,
                         dx=5 if right else -5, dy=2 if right else 18, color=theme.SAFE).encode(
                             x=x, y=alt.value(0), text="text:N")]


def attainment(run: Run, answer: Answer) -> Chart:
    """Per leg: the share of good requests, against the target."""
    legs = sorted((r for r in answer.steps.to_dict("records") if r["n"]), key=lambda r: r["value"])
    names = [f"{r['value']:g}{'' if r['phase'] in ('ladder', 'run') else ' ' + r['phase']} · "
             f"{r['good']}/{r['n']}" for r in legs]
    names = [f"{x} ({k})" if (k := names[: i + 1].count(x)) > 1 else x
             for i, x in enumerate(names)]  # a leg that was repeated has a row of its own
    rows = [{"leg": name, "share": r["attainment_frac"],
             "load": "INVALID" if r["measurement"] == "INVALID" else r["load"]}
            for name, r in zip(names, legs, strict=True)]
    y = alt.Y("leg:O", sort=names, title=None, axis=alt.Axis(
        domain=False, ticks=False, labelPadding=10, labelOverlap=False))
    x = alt.X("share:Q", title="", axis=alt.Axis(format="%", tickCount=5),
              scale=alt.Scale(domain=[0, 1.02], nice=False))
    verdicts = ["SAFE", "UNSAFE", "UNRESOLVED", "INVALID"]
    colour = alt.Color("load:N", legend=None, scale=alt.Scale(
        domain=verdicts, range=[theme.SAFE, theme.UNSAFE, theme.UNRESOLVED, "#bbbbbb"]))
    shape = alt.Shape("load:N", legend=None, scale=alt.Scale(
        domain=verdicts, range=["circle", "triangle-left", "diamond", "cross"]))
    base = alt.Chart(data(rows)).encode(y=y, color=colour, tooltip=[
        "load:N", alt.Tooltip("share:Q", format=".1%")])
    target = alt.Chart(data([{"share": run.criteria.target, "text":
                               f"target {100 * run.criteria.target:g} %"}])).encode(x=x)
    return alt.layer(
        target.mark_rule(strokeDash=[4, 4], color=theme.INK),
        target.mark_text(align="right", baseline="bottom", dy=-4, dx=6).encode(
            y=alt.value(0), text="text:N"),
        base.mark_point(filled=True, size=80, opacity=1).encode(x=x, shape=shape),
    ).properties(height=25 * len(rows))


def quality(found: Rows) -> Chart:
    """By concurrency the share of valid answers, and of those like the ones at the lowest."""
    rows = [{"value": r["value"], "what": what, "share": r[part] / r[whole]} for r in found
            for what, part, whole in (("valid", "valid", "n"), ("same", "same", "compared"))
            if r[whole]]
    colour = alt.Color("what:N", title=None, scale=alt.Scale(
        domain=["valid", "same"], range=[theme.BLUE, theme.LIGHT_BLUE]))
    base = alt.Chart(data(rows)).encode(
        x=alt.X("value:O", title="Concurrent requests", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("share:Q", title="", axis=alt.Axis(format="%", tickCount=5),
                scale=alt.Scale(domain=[0, 1.02], nice=False)),
        color=colour, tooltip=["what:N", alt.Tooltip("share:Q", format=".1%")])
    chart: Chart = alt.layer(base.mark_line(strokeWidth=2), base.mark_point(
        filled=True, size=55, opacity=1)).properties(height=200)
    return chart


# ------------------------------------------------------------------------------------- outputs


def spec(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The Vega-Lite spec in the page's style."""
    plain: dict[str, Any] = chart.to_dict(validate=False)
    plain["config"] = theme.CHART
    return plain


def png(left: Chart, right: Chart, title: str) -> bytes:
    """Two panels side by side, at twice the pixels."""
    import vl_convert  # noqa: PLC0415

    both = alt.hconcat(left.properties(width=480), right.properties(width=480),
                       spacing=40).resolve_scale(color="independent").properties(
                           title=alt.Title(title, fontSize=15))
    data: bytes = vl_convert.vegalite_to_png(spec(both), vl_version=version(), scale=2)
    return data


def version() -> str:
    """The Vega-Lite release that Altair writes, as vl_convert names it: "6.1"."""
    return ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
