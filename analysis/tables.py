"""The report's tables, as HTML."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

import pandas as pd

from analysis import (
    charts,
    checked,
    deaths,
    gpus,
    otherwise,
    phrases,
    retention,
    steps,
    throttled,
    visible,
)
from analysis.frame import Run
from analysis.steps import duration, number, percent
from analysis.words import Answer
from loadgen import metrics

VERDICTS = frozenset({"SAFE", "UNSAFE", "INVALID", "SUSPECT"})
LONG = 32  # characters; a longer cell is a text, and begins at the left
FIRST = 11  # columns of steps.HEADS that fit a page together
MORE = ("prompt tok/s", "TTFT max", "ITL p99", "running", "waiting", "preemptions", "prefix hits")
SERVER = ("leg", "queued / prefill / decode, ms", "its processes, GiB", "cores")
GENERATOR = ("leg", "sent late, p99", "loop lag, p99", "CPU", "waited for a core", "dropped",
             "stood still", "GC", "descriptors")
GPU = ("leg", "GiB at start", "GiB peak", "over after load", "of GiB", "busy", "power", "SM clock",
       "hottest", "clocks held down")
ADDS_UP = ("leg", "connecting, p99", "load that was there", "Little’s law",
           "server counts: requests / prompt / output tokens")


GPU_NOTE = ("Memory is of the fullest GPU, power of all together; busy, power and clock are means "
            "over the measured window. Held down: share of samples in which NVML named a reason.")


def of(run: Run, answer: Answer) -> Iterator[str]:
    if not run.legs:
        return
    rows = answer.steps.to_dict("records")
    yield "<h2>All legs</h2>"
    yield ('<p class="muted">A p90 stands only where there are '
           f"{charts.FEW} values or more. {phrases.NO_BOUND}</p>")
    cells = [steps.cells(r) for r in rows]  # in two tables: one would be twice the page's width
    yield table(steps.HEADS[:FIRST], (own[:FIRST] for own in cells))
    yield table(("leg", *steps.HEADS[FIRST:], *MORE), (
        [own[0], *own[FIRST:], *_more(r)] for own, r in zip(cells, rows, strict=True)))
    yield table(SERVER, ([r["leg"], *_server(r)] for r in rows))
    yield table(("leg", "why"), ([r["leg"], r["reasons"].ljust(LONG + 1)] for r in rows))
    if run.states:
        yield "<h2>The server’s states</h2>"
        yield f'<p class="muted">{escape(deaths.sentence(run) or "It did not die.")}</p>'
        yield table(("at", "leg", "state", "evidence"), (
            [f"{s['t_s']:.1f} s", s["leg"] or "–", s["state"], (s["why"] or "").ljust(LONG + 1)]
            for s in deaths.states(run) if s["why"] or s["state"] == "STARTING"))
    if any(gpu.n for gpu in run.gpus):
        yield "<h2>The server’s GPUs</h2>"
        yield f'<p class="muted">{escape(gpus.sentence(run) or "")} {GPU_NOTE}</p>'
        yield table(GPU, (_gpu(run, r) for r in rows))
    yield "<h2>What other ways of measuring would have said</h2>"
    yield ('<p class="muted">The same requests three ways. From the send, whoever waits in the '
           "client’s queue does not count; of complete answers only, failures do not; and a tool "
           "that waits for each answer sends nothing while the server stands still, so what was "
           "due then is never measured. In a closed loop a request is due when its slot is free, "
           "and the first and the last are much the same. Never: so many had no first "
           "token.</p>")
    yield table(otherwise.HEADS, otherwise.cells(otherwise.of(run)))
    yield "<h2>The generator</h2>"
    yield ('<p class="muted">How the load generator itself was; of several processes, the one '
           "that is worst off. ≤: the largest of too few for a p99. Load that was there: of an "
           "open loop’s starts those made in the window, of a closed loop’s slots those that were "
           "full. Little’s law: what it counted in flight against what its records add up to (± "
           "what may be chance). Server counts: against the records; 1 is the same.</p>")
    yield table(GENERATOR, map(_generator, rows))
    yield table(ADDS_UP, map(_adds_up, rows))
    if len(run.frame):
        yield "<h2>By class</h2>"
        yield table(("class", "level", "n", "met the SLO", "TTFT p50", "TPOT p50", "E2E p50",
                      "output tokens p50"), _classes(run))
    if checked.says(run):
        yield "<h2>Answers</h2>"
        yield f'<p class="muted">{escape(checked.NOTE)} {escape(checked.says(run))}</p>'
        yield table(checked.HEADS, checked.cells(run))
        yield table(checked.SHOWN_HEADS, checked.examples(run))
    if found := [*checked.quality_cells(run)]:
        yield "<h2>Quality under load</h2>"
        yield f'<p class="muted">{escape(checked.QUALITY_NOTE)}</p>'
        yield table(checked.QUALITY_HEADS, found)
    for part in (retention, visible, throttled):
        yield from _part(part.TITLE, part.NOTE, part.HEADS, part.cells(run))
    missed = [j for j in run.judgements if j.misses]
    if missed:
        reasons = sorted({x for j in missed for x in j.misses})
        yield "<h2>Misses by reason</h2>"
        yield '<p class="muted">A request may break several limits.</p>'
        yield table(("leg", "n", "missed", *(phrases.MISSES.get(x, x) for x in reasons)),
                     ([j.leg, str(j.n), str(j.n - j.good),
                       *(str(j.misses.get(x, "")) for x in reasons)] for j in missed))
    f = run.frame[run.frame["error"] != ""]
    said = Counter(zip(f["outcome"], f["error"], strict=True)).most_common(12)
    if said:
        yield "<h3>What failed requests were told</h3>"
        yield table(("outcome", "requests", "message"), (
            [outcome, str(n), error.ljust(LONG + 1)] for (outcome, error), n in said))


def _part(title: str, note: str, heads: Iterable[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """A table with its heading; nothing where there is nothing to tell."""
    if shown := list(rows):
        yield f"<h2>{escape(title)}</h2>"
        yield f'<p class="muted">{escape(note)}</p>'
        yield table(heads, shown)


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are text; one that is a verdict gets its colour."""
    top = "".join(f"<th>{escape(x)}</th>" for x in heads)
    lines = []
    for row in rows:
        marked = ((x, x.lower() if x in VERDICTS else "text" if len(x) > LONG else "") for x in row)
        lines.append("<tr>" + "".join(f'<td class="{kind}">{escape(x)}</td>' if kind else
                                      f"<td>{escape(x)}</td>" for x, kind in marked) + "</tr>")
    return (f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}'
            "</tbody></table></div>")


def _more(r: Mapping[Any, Any]) -> list[str]:
    return [number(r["prompt_tok_s"], ".0f"), duration(r["ttft_max_s"]), duration(r["itl_p99_s"]),
            number(r["running_mean"]), number(r["waiting_mean"]), number(r["preemptions"], ".0f"),
            percent(r["prefix_hit_frac"])]


def _server(r: Mapping[Any, Any]) -> list[str]:
    return [" / ".join(number(1000 * (r[f"{x}_mean_s"] or math.nan), ".0f")
                       for x in ("queue", "prefill", "decode")),
            number(r["server_rss_gib"]), number(r["server_cpu_cores"], ".2f")]


def _gpu(run: Run, r: Mapping[Any, Any]) -> list[str]:
    loaded, peak = run.gpu_loaded_bytes, r["gpu_memory_peak_gib"]
    more = None if loaded is None or pd.isna(peak) else peak - loaded / steps.GIB
    held = percent(r["gpu_slowed_frac"])
    if r["gpu_slowed_by"]:
        held += f": {r['gpu_slowed_by']}"

    def unit(value: float | None, name: str) -> str:
        return "–" if value is None or pd.isna(value) else f"{value:.0f} {name}"
    return [str(r["leg"]), number(r["gpu_memory_start_gib"], ".1f"),
            number(r["gpu_memory_peak_gib"], ".1f"), number(more, "+.1f"),
            number(r["gpu_memory_total_gib"], ".0f"), percent(r["gpu_util_frac"]),
            unit(r["gpu_power_w"], "W"), unit(r["gpu_sm_clock_mhz"], "MHz"),
            unit(r["gpu_temperature_max_c"], "°C"), held]


def _generator(r: Mapping[Any, Any]) -> list[str]:
    fds = "–" if pd.isna(r["fds"]) else f"{r['fds']:.0f} of {r['fd_limit']:.0f}"
    core = percent(r["run_queue_frac"])
    if not pd.isna(r["run_queue_each_s"]):
        core += f", {1000 * r['run_queue_each_s']:.2g} ms each"
    return [str(r["leg"]), _tail(r, "late"), duration(r["lag_p99_s"]), percent(r["cpu_frac"]),
            core, number(r["dropped"], ".0f"), duration(r["stall_s"]) if r["stalls"] else "0",
            duration(r["gc_pause_s"]), fds]


def _adds_up(r: Mapping[Any, Any]) -> list[str]:
    there = r["slots_frac"] if pd.isna(r["begun_frac"]) else r["begun_frac"]
    little = "–" if pd.isna(r["little_residual"]) else (
        f"{100 * r['little_residual']:+.1f} % (± {100 * r['little_tolerance']:.1f} %)")
    counts = [number(r[f"server_{x}_ratio"]) for x in ("requests", "prompt_tok", "output_tok")]
    return [str(r["leg"]), _tail(r, "connect"), percent(there), little,
            "–" if set(counts) == {"–"} else " / ".join(counts)]


def _tail(r: Mapping[Any, Any], name: str) -> str:
    """The p99; of too few, the largest."""
    p99, most = r[f"{name}_p99_s"], r[f"{name}_max_s"]
    return duration(p99) if pd.isna(most) or pd.notna(p99) else (
        f"≤ {duration(most)}" if most else duration(most))


def _classes(run: Run) -> Iterator[list[str]]:
    """Rows of class by level, all of a level's legs."""
    f = run.frame[run.frame["in_window"] & ~run.frame["void"]]
    for (cls, value), own in f.groupby(["cls", "value"]):
        yield [str(cls), f"{value:g}", str(len(own)), f"{int(own['good'].sum())} of {len(own)}",
               *(duration(_median(own, f"{x}_s", steps.cut_off(own, x)))
                 for x in ("ttft", "tpot", "e2e")),
               number(_median(own, "output_tok"), ".0f")]


def _median(own: pd.DataFrame, name: str, cut_off: Iterable[float] = ()) -> float | None:
    found = metrics.quantile(own[name].dropna(), 0.5, cut_off)
    return found.value if found else None
