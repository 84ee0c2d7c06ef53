"""Charts of a campaign, each of a table's own frame."""

from typing import Any

import altair as alt
import pandas as pd

from analysis import theme
from analysis.charts import Chart, data, ticks
from analysis.matrix import PLUS_MINUS, Table

COLOURS = [theme.BLUE, "#e69f00", theme.SAFE, "#cc79a7", theme.LIGHT_BLUE, "#c4500a", "#6b6b6b"]
STABLE = {"yes": theme.SAFE, "near the limit": "#b58900", "no": theme.UNSAFE,
          "too few": theme.LIGHT_BLUE, "unknown": theme.UNRESOLVED}


def of(table: Table) -> list[Chart]:
    """Side by side; none where there is nothing to draw."""
    f, heads = table.frame, [str(c) for c in table.frame]
    if table.name == "concurrency":
        return [_curve(f, "concurrency", "mean TTFT, ms"),
                _curve(f, "concurrency", "output, tok/s")]
    if table.name == "users":
        return [_curve(f, "users", "QPS"), _curve(f, "users", "mean E2E, s")]
    if table.name == "input_length":
        return [_line(f, "input, tokens", "TTFT, s"), _line(f, "input, tokens", "total, s")]
    if table.name == "speed":
        return [_bars(f, [c for c in heads if c.endswith(", tok/s") and not c.startswith((
            PLUS_MINUS, "mean"))], "tok/s")]
    if table.name == "memory" and "after load, GiB" in f:
        return [_bars(f, ["after load, GiB", "peak, GiB"], "GiB per GPU")]
    if table.name == "cost" and "tokens per GPU-second" in f:
        return [_bars(f, [c], c) for c in heads if c.startswith(("tokens per", "million tokens"))]
    if table.name == "structured" and "valid, %" in f:
        return [_bars(f, ["valid, %"], "valid, %", by="workload")]
    return []


def _long(f: pd.DataFrame, columns: list[str], by: str | None = None) -> list[dict[str, Any]]:
    rows = []
    for r in f.to_dict("records"):
        for c in columns:
            if pd.notna(r.get(c)):
                half = r.get(f"{PLUS_MINUS}{c}")
                half = 0.0 if half is None or pd.isna(half) else half
                lo, hi = r.get("low, %", max(0.0, r[c] - half)), r.get("high, %", r[c] + half)
                rows.append({"server": r["server"], "what": r[by] if by else _what(c),
                             "text": f"{r[c]:,.0f}" if r[c] >= 100 else f"{r[c]:.3g}",
                             "value": r[c], "lo": lo, "hi": hi})
    return rows


def _what(column: str) -> str:
    return column.rpartition(", ")[0] or column


def _colour(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a line by its server; those that come after the last colour are dashed."""
    names = list(dict.fromkeys(r["server"] for r in rows))
    legend = None if len(names) == 1 else alt.Legend(labelLimit=260, columns=2)
    found: dict[str, Any] = {"color": alt.Color(
        "server:N", title=None, sort=names, legend=legend, scale=alt.Scale(
            domain=names, range=[COLOURS[i % len(COLOURS)] for i in range(len(names))]))}
    if len(names) > len(COLOURS):
        found["strokeDash"] = alt.StrokeDash(
            "server:N", title=None, sort=names, legend=legend, scale=alt.Scale(
                domain=names, range=[[1, 0] if i < len(COLOURS) else [6, 3]
                                     for i in range(len(names))]))
    return found


def _bars(f: pd.DataFrame, columns: list[str], title: str, by: str | None = None) -> Chart:
    """Grouped bars with their intervals: a bar for each column, or each row's `by`."""
    rows = _long(f, columns, by)
    names = list(dict.fromkeys(r["server"] for r in rows))
    wide = len({r["what"] for r in rows}) > 1
    y = alt.Y("server:N", sort=names, title=None, axis=alt.Axis(
        labelLimit=220, ticks=False, domain=False, labelOverlap=False))
    most = 1.15 * max((r["hi"] for r in rows), default=1)
    share = {"values": [0, 20, 40, 60, 80, 100]} if title.endswith("%") else {"tickCount": 5}
    x = alt.X("value:Q", title=title, axis=alt.Axis(**share),
              scale=alt.Scale(domain=[0, most]))
    base = alt.Chart(data(rows)).encode(y=y, tooltip=[
        "server:N", "what:N", alt.Tooltip("value:Q", title=title, format=".4g")])
    whats = list(dict.fromkeys(r["what"] for r in rows))
    offset = {"yOffset": alt.YOffset("what:N", sort=whats)} if wide else {}
    colour = alt.Color("what:N", title=None, sort=whats, scale=alt.Scale(
        domain=whats, range=COLOURS[:len(whats)]), legend=alt.Legend() if wide else None)
    height = max(90, len(names) * (16 * len(whats) + 12) + 30)
    return alt.layer(
        base.mark_bar(height={"band": 0.8}).encode(x=x, color=colour, **offset),
        base.mark_rule(color=theme.PAPER, strokeWidth=4).encode(x="lo:Q", x2="hi:Q", **offset),
        base.mark_rule(color=theme.INK).encode(x="lo:Q", x2="hi:Q", **offset),
        base.mark_text(align="left", dx=6, color=theme.INK).encode(
            x="hi:Q", text="text:N", **offset),
    ).properties(height=height, title=title)


def _curve(f: pd.DataFrame, x: str, y: str) -> Chart:
    """Over the load; each point in the colour of its "stable?"."""
    rows = [{"server": r["server"], "x": r[x], "y": r[y], "stable": str(
        r.get("stable?") or "unknown").partition(":")[0]}
        for r in f.to_dict("records") if pd.notna(r.get(y)) and pd.notna(r.get(x))]
    values = sorted({r["x"] for r in rows})
    ax = alt.X("x:Q", title=x, scale=alt.Scale(type="log", base=2), axis=alt.Axis(
        values=values, format="~g", grid=False))
    ay = _upwards([r["y"] for r in rows])
    known = [k for k in STABLE if any(r["stable"] == k for r in rows)]
    base = alt.Chart(data(rows)).encode(x=ax, y=ay, tooltip=[
        "server:N", alt.Tooltip("x:Q", title=x), alt.Tooltip("y:Q", title=y, format=".4g"),
        alt.Tooltip("stable:N", title="stable?")])
    chart: Chart = alt.layer(
        base.mark_line(strokeWidth=2).encode(**_colour(rows)),
        base.mark_point(size=70, filled=True, opacity=1, stroke=theme.PAPER).encode(
            fill=alt.Fill("stable:N", title="stable?", legend=alt.Legend(orient="top"),
                          scale=alt.Scale(domain=known, range=[STABLE[k] for k in known]))),
    ).resolve_scale(color="independent", fill="independent", strokeDash="independent").properties(
        title=y, height=280)
    return chart


def _upwards(values: list[float]) -> alt.Y:
    """From 0; logarithmic where the largest would hide all others."""
    least = min((v for v in values if v > 0), default=1.0)
    if max(values, default=1.0) < 50 * least:
        return alt.Y("y:Q", title=None, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5))
    at = ticks([least, max(values)])
    return alt.Y("y:Q", title=None, axis=alt.Axis(values=at, format=",~g"),
                 scale=alt.Scale(type="log", domain=[at[0], at[-1]]))


def _line(f: pd.DataFrame, x: str, y: str) -> Chart:
    rows = [{"server": r["server"], "x": r[x], "y": r[y]} for r in f.to_dict("records")
            if pd.notna(r.get(y)) and pd.notna(r.get(x))]
    values = sorted({r["x"] for r in rows})
    base = alt.Chart(data(rows)).encode(
        x=alt.X("x:Q", title=x, scale=alt.Scale(type="log", base=2),
                axis=alt.Axis(values=values, format=",~g", grid=False)),
        y=_upwards([r["y"] for r in rows]),
        tooltip=["server:N", alt.Tooltip("x:Q", title=x),
                 alt.Tooltip("y:Q", title=y, format=".4g")])
    style = _colour(rows)
    silent = style["color"].legend(None)
    chart: Chart = alt.layer(
        base.mark_line(strokeWidth=2).encode(**style),
        base.mark_point(filled=True, size=55, opacity=1).encode(color=silent),
    ).resolve_scale(color="independent", strokeDash="independent").properties(title=y, height=260)
    return chart
