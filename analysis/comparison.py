"""A comparison of two runs as text: for the terminal, and as Markdown."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.ci import plain
from analysis.compare import ALPHA, Comparison, Difference, Regression
from analysis.spread import RUNS_DIFFER, RUNS_DIFFER_OPEN, SHARES
from analysis.steps import duration, percent

HEADS = ("level", "figure", "base", "new", "change", "interval", "n", "verdict")
COLOURS = {"better": "green", "worse": "red", "no evidence": "dim"}
METHOD = ("Intervals: block bootstrap (blocks of time as long as an answer), widened by Student’s "
          f"t; {1 - ALPHA:.0%} for all figures together. Assumed of two runs of one server: their "
          f"latencies differ by {RUNS_DIFFER:.0%} (standard deviation; in an open loop by "
          f"{RUNS_DIFFER_OPEN:.0%}), their shares of good requests by 1.5 points at 95%, goodput "
          "by both; where legs of a level in one run show more, by that.")


def cells(d: Difference) -> tuple[str, ...]:
    return (f"{d.level:g}", d.name, _value(d.name, d.base), _value(d.name, d.new),
            _change(d.change_frac), f"{_change(d.lo)} … {_change(d.hi)}", f"{d.n[0]}, {d.n[1]}",
            d.change)


def _value(name: str, value: float) -> str:
    if name in SHARES:
        return percent(value)
    return f"{value:.3g}/s" if name == "goodput" else duration(value)


def _change(change: float) -> str:
    if not abs(change) < 1e6:
        return "any"
    return f"{100 * change:+.1f} %" if abs(change) < 10 else f"{change + 1:.3g} ×"


def sentences(c: Comparison) -> Iterator[str]:
    if c.unlike:
        yield f"Allowed to differ: {'; '.join(c.unlike)}."
    if not c.differences:
        yield "No level has enough requests in both runs to be compared."
    x, y = c.safe
    if x is not None and y is not None:
        yield f"Largest safe {c.axis}: {x:g} → {y:g}."
    worse = sum(d.change == "worse" for d in c.differences)
    better = sum(d.change == "better" for d in c.differences)
    yield f"{worse} of {len(c.differences)} figures are worse beyond noise, {better} better."
    yield from map(_regression, c.regressions)
    yield METHOD


def _regression(r: Regression) -> str:
    by = f"{100 * r.limit_frac:g} %"
    if r.level is None or r.lo is None or r.hi is None:
        return f"{r.name}: no level has enough requests in both runs to tell."
    span = f"{_change(r.lo)} … {_change(r.hi)}"
    said = {"regressed": f"worse by more than {by}", "held": f"not worse by more than {by}",
            "open": f"these runs cannot tell whether it is worse by {by}: longer ones would"}
    return f"{r.name} at {r.level:g}: {said[r.held]} ({span})."


def show(console: Console, c: Comparison) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for head in HEADS:
        table.add_column(head, justify="left" if head in ("figure", "verdict") else "right")
    for d in c.differences:
        *own, change = cells(d)
        table.add_row(*own, Text(change, style=COLOURS[change]))
    if c.differences:
        console.print(table)
    for sentence in sentences(c):
        console.print(sentence, highlight=False, soft_wrap=not console.is_terminal)


def markdown(c: Comparison) -> str:
    lines = [HEADS, ("---:", "---", *["---:"] * 5, "---"), *map(cells, c.differences)]
    head = f"### {plain(c.base)} → {plain(c.new)}"
    parts = [head, "\n".join("| " + " | ".join(
        x if i < 2 else plain(x) for x in line) + " |" for i, line in enumerate(lines))
        if c.differences else "", "\n".join(f"- {plain(x)}" for x in sentences(c))]
    return "\n\n".join(x for x in parts if x) + "\n"
