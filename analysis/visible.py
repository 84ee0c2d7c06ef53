"""The first visible text beside the first token, where a model thinks before it speaks."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from analysis.frame import Run
from analysis.steps import duration
from loadgen import metrics

DIFFERS_S = 0.001  # a stream that begins with half a character shows it a token later; thoughts …
OF_REQUESTS = 0.01  # … come in more than a few answers
TITLE = "First visible text"
HEADS = ("class", "level", "n", "TTFT p50", "visible p50", "visible p90", "thinks p50",
         "no visible text")
NOTE = ("TTFT is the time to the first token, also of a thought; visible: to the first text that "
        "is none, from the same due instant. An answer that ended before it said anything visible "
        "stands in the last column.")


def of(run: Run) -> list[dict[str, Any]]:
    """A row for each class and level where the two differ."""
    f = run.frame[run.frame["in_window"] & ~run.frame["void"] & run.frame["ttft_s"].notna()]
    rows: Any = f.groupby(["cls", "value"])
    return [row for (cls, value), own in rows
            if (row := _row(str(cls), float(value), own)) is not None]


def _row(cls: str, value: float, own: pd.DataFrame) -> dict[str, Any] | None:
    thinks = own["visible_s"] - own["ttft_s"]
    never = own["visible_s"].isna() & (own["outcome"] == "OK")
    if ((thinks > DIFFERS_S) | never).mean() <= OF_REQUESTS:
        return None
    return {"class": cls, "value": value, "n": len(own), "ttft_p50_s": _at(own["ttft_s"], 0.5),
            "visible_p50_s": _at(own["visible_s"], 0.5), "visible_p90_s": _at(
                own["visible_s"], 0.9), "thinks_p50_s": _at(thinks, 0.5),
            "never_visible": int(never.sum())}


def _at(values: "pd.Series[float]", q: float) -> float | None:
    known = values.dropna()
    if q > 0.5 and len(known) < metrics.min_n(q):
        return None
    found = metrics.quantile(known, q)
    return found.value if found else None


def cells(run: Run) -> Iterator[list[str]]:
    for r in of(run):
        yield [r["class"], f"{r['value']:g}", str(r["n"]),
               *(duration(r[x]) for x in ("ttft_p50_s", "visible_p50_s", "visible_p90_s",
                                          "thinks_p50_s")), str(r["never_visible"])]


def sentence(run: Run) -> str | None:
    """Of the highest level; None: what comes first is visible."""
    rows = of(run)
    if not rows:
        return None
    top = [r for r in rows if r["value"] == max(x["value"] for x in rows)]
    return "First visible text: " + "; ".join(
        f"{r['class']} {duration(r['visible_p50_s'])} (median), where the first token comes at "
        f"{duration(r['ttft_p50_s'])}" for r in top) + f", at {top[0]['value']:g}."
