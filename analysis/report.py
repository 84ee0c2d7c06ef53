"""report.html: one file that needs no network, and PNGs of its two main charts."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
from altair.utils import schemapi

from analysis import (
    ceiling,
    charts,
    checked,
    frame,
    given,
    phrases,
    steps,
    tables,
    theme,
    timeline,
    words,
)
from analysis.charts import Chart
from analysis.frame import Run
from analysis.steps import duration, number, percent
from analysis.words import Answer
from loadgen import metrics
from loadgen.errors import StoreError

SWATCH = '<span class="key"><i style="background:{}"></i>{}</span>'


def write(run: Run) -> Path:
    """Writes report.html and, for several levels, qps_latency.png and throughput.png into the
    run's folder; returns the page's path. Raises StoreError."""
    # the bundle is made outside the GIL; checking each datum against Vega-Lite's schema takes a
    # second, and the tests do it
    with ThreadPoolExecutor(1) as beside, schemapi.debug_mode(False):
        library = beside.submit(_library)
        answer = words.answer(run)
        drawn: list[Chart] = []
        body = "\n".join([*_head(run, answer), *_level_charts(run, answer, drawn),
                          *_given(run, drawn), *_run_charts(run, drawn),
                          *tables.of(run, answer), *_ends(run)])
        specs = [charts.spec(c.properties(width="container")) for c in drawn]
        page = _page(run.manifest.model, body, specs, library.result())
    path = run.folder.write("report.html", page.encode())
    if len(answer.levels) > 1:
        label = " (simulated)" if run.simulated else ""
        title = f"{run.manifest.model}{label}: {answer.verdict.headline}"
        for name, pair in (("qps_latency.png", drawn[:2]), ("throughput.png", drawn[2:4])):
            run.folder.write(name, charts.png(pair[0], pair[1], title))
    return path


def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script. Bundling them takes seconds, so the bundle of
    these releases is kept in the user's cache, where it can be."""
    import vl_convert  # noqa: PLC0415

    name = f"vega-{charts.version()}-{metadata.version('vl-convert-python')}.js"
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loadgen" / name
    with suppress(OSError):
        return kept.read_text(encoding="utf-8")
    bundle: str = vl_convert.javascript_bundle(  # type: ignore[call-arg]
        vl_version=charts.version())
    bundle = bundle.replace("</script", r"<\/script")
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}")
        temporary.write_text(bundle, encoding="utf-8")
        temporary.replace(kept)
    return bundle


def _page(title: str, body: str, specs: Sequence[dict[str, Any]], library: str) -> str:
    for spec in specs:
        spec.pop("$schema", None)  # a name, but it looks like an address
    # "<" never appears in the data, so that no text in it can end the script
    data = json.dumps(specs, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}: load test</title>
<style>{theme.CSS}</style></head><body><main>
{body}
</main>
<script>{library}</script>
<script>
const specs = {data};
specs.forEach((spec, i) => vegaEmbed("#c" + i, spec,
  {{mode: "vega-lite", actions: false, renderer: "svg"}}).catch(console.error));
</script></body></html>
"""


def _figure(drawn: list[Chart], chart: Chart | None, caption: str = "") -> str:
    """A place for the chart. `caption` is HTML."""
    if chart is None:
        return ""
    drawn.append(chart)
    said = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><div id="c{len(drawn) - 1}"></div>{said}</figure>'


# ------------------------------------------------------------------------------------- the head


def _head(run: Run, answer: Answer) -> Iterator[str]:
    v, m = answer.verdict, run.manifest
    about = [m.model, str(m.server.get("kind", "")), f"mix {run.scenario.name}",
             run.scenario.description, m.created, f"run {m.run}"]
    yield f'<p class="about">{escape(" · ".join(x for x in about if x))}</p>'
    badges = [("full", v.load), (v.measurement.lower(), v.measurement),
              *([("note", "SIMULATED SERVER")] if run.simulated else [])]
    marks = "".join(f'<span class="badge {kind}">{said}</span>' for kind, said in badges)
    text = "".join(f"<p>{_unbroken(escape(x))}</p>" for x in (" ".join(v.three), *v.sentences))
    yield (f'<section class="verdict {v.load.lower()}">{marks}'
           f"<h1>{escape(v.headline)}</h1>{text}</section>")
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}"
                    "</small></dd></div>" for name, value, note in _keys(run, answer))
    yield f'<dl class="keys">{tiles}</dl>' if tiles else ""
    if run.torn:
        yield (f'<p class="muted torn">{run.torn} torn line{"s" * (run.torn != 1)} in the journals '
               "(a crash) passed over.</p>")


def _unbroken(text: str) -> str:
    """Keeps a number with its sign and unit on one line."""
    return re.sub(r"≤ ([\d.]+) (m?s)\b", "≤\u00a0\\1\u00a0\\2", text).replace(" %", "\u00a0%")


def _keys(run: Run, answer: Answer) -> Iterator[tuple[str, str, str]]:
    """The figures that people quote: name, value, note. Of the safe level, all legs together;
    the proof is the confirmation's alone."""
    if not run.legs:
        return
    c, knee = run.conclusion, answer.knee
    per = "concurrency" if run.axis == "concurrency" else "rate"
    rows = answer.levels.to_dict("records")
    if run.is_run and len(rows) > 1:
        yield from (_key_of(r) for r in rows)
        rows = []
    if not run.is_run:
        least = "≥ " if c.at_least else ""
        yield (f"Max safe {per}", "–" if c.safe is None else f"{least}{c.safe:g}",
               f"first unsafe: {c.unsafe:g}" if c.unsafe is not None else "none was unsafe")
    if knee is not None and run.axis == "concurrency":
        yield ("Knee", "–" if knee.value is None else f"{knee.value:.0f}",
               "not identified" if knee.lo is None or knee.hi is None
               else f"{knee.lo:.0f}–{knee.hi:.0f} at 95 %")
    holds = answer.ceiling
    if knee is not None and run.axis == "concurrency" and holds is not None:
        yield ("Memory holds", "–" if holds.requests is None else
               f"≈ {ceiling.rounded(holds.requests)}", "not known" if holds.live_tok is None
               or holds.kv_cache_tok is None else
               f"{holds.kv_cache_tok:,} KV tokens, {holds.live_tok:,.0f} per request")
    for r in (x for x in rows if run.is_run or x["value"] == c.safe):
        good, n, note = r["good"], r["n"], f"asked for: {percent(c.target)}"
        if not run.is_run and c.proof is not None:
            good, n = c.proof.good, c.proof.n
            note = f"{percent(c.target)} or more, with {percent(c.confidence)} confidence"
        at = "" if run.is_run else f" at {c.safe:g}"
        yield f"Goodput{at}", f"{number(r['goodput_rps'])}/s", f"of {r['offered_rps']:.3g}/s due"
        yield f"Met the SLO{at}", f"{good} of {n}", note
        yield (f"TTFT{at}", duration(r["ttft_p50_s"]), f"median; p90 {duration(r['ttft_p90_s'])}")
        yield (f"TPOT{at}", duration(r["tpot_p50_s"]), f"median; p90 {duration(r['tpot_p90_s'])}")
    if knee is not None and knee.peak_rps is not None:
        yield "Peak throughput", f"{knee.peak_rps:.3g}/s", f"at {knee.peak_at:g}"
    peak = answer.steps["gpu_memory_peak_gib"].max()
    if pd.notna(peak):
        first = answer.steps["gpu_memory_start_gib"].dropna().iloc[0]
        yield "GPU memory, peak", f"{peak:.1f} GiB", f"{first:.1f} GiB at the start, per GPU"


def _key_of(r: Mapping[Any, Any]) -> tuple[str, str, str]:
    """One level of several that were asked for."""
    return (f"Met the SLO at {r['value']:g}", f"{r['good']} of {r['n']}",
            f"median TTFT {duration(r['ttft_p50_s'])}, TPOT {duration(r['tpot_p50_s'])}")


# ------------------------------------------------------------------------------------- charts


def _level_charts(run: Run, answer: Answer, drawn: list[Chart]) -> Iterator[str]:
    if len(answer.levels) < 2:
        return
    few = f"Hollow: fewer than {charts.FEW} answers, too few for a p90."
    yield "<h2>Throughput against latency</h2>"
    yield (f'<p class="muted">Each point is one level, labelled with its {run.axis}; the line '
           f"joins them in that order. {few}</p>")
    yield '<div class="pair">' + "".join(
        _figure(drawn, charts.qps_latency(run, answer, name, title))
        for name, title in (("ttft", "Time to first token"), ("e2e", "Whole answer"))) + "</div>"
    yield "<h2>Throughput and latency against the load</h2>"
    knee = answer.knee
    band = "Grey band: the knee with its 95 % interval, from the dashed fit. "
    yield (f'<p class="muted">{band if knee and knee.value is not None else ""}'
           f"Good: answers that met every limit. {few}</p>")
    yield '<div class="pair">' + _figure(drawn, charts.throughput(run, answer)) + _figure(
        drawn, charts.latency_by_load(run, answer)) + "</div>"
    if rows := checked.quality(run):
        yield "<h2>Answers against the load</h2>"
        yield ('<p class="muted">The same prompts at each level; the table is under “Quality under '
               "load”.</p>")
        yield _figure(drawn, charts.quality(rows))
    yield "<h2>Attainment of the SLO</h2>"
    yield ('<p class="muted">Share of requests that met every limit; left the level and how many '
           f"of how many. {phrases.NO_BOUND} "
           + " ".join(SWATCH.format(c, t) for c, t in (
                   (theme.SAFE, "safe"), (theme.UNSAFE, "unsafe"),
                   (theme.UNRESOLVED, "unresolved: too few to tell"))) + "</p>")
    yield _figure(drawn, charts.attainment(run, answer))


def _given(run: Run, drawn: list[Chart]) -> Iterator[str]:
    """What came from files."""
    if run.frame.empty:
        return
    replayed, files = given.arrivals(run), given.rows(run)
    if replayed:
        yield "<h2>Arrivals of the trace</h2>"
        about = escape(given.trace_file(run) or "Given instants.")
        yield (f'<p class="muted">{about} '
               + " ".join(SWATCH.format(c, t) for c, t in (
                   (theme.MEASURED, "planned"), (theme.BLUE, "started"))) + "</p>")
        for one in replayed:
            yield _figure(drawn, given.curve(one), escape(given.sentence(one)))
    if files:
        yield "<h2>Prompts from files</h2>"
        yield ('<p class="muted">Each entry is sent once before any is sent again. What a server '
               "with a prefix cache had before costs it less.</p>")
        yield tables.table(given.HEADS, files)


def _run_charts(run: Run, drawn: list[Chart]) -> Iterator[str]:
    if run.frame.empty:
        return
    yield "<h2>Distributions</h2>"
    yield '<p class="muted">Share of answers at or under a latency, all of a level’s legs.</p>'
    yield '<div class="pair">' + "".join(_figure(drawn, timeline.ecdf(run, *x)) for x in (
        ("ttft", "Time to first token"), ("tpot", "Time per output token"))) + "</div>"
    yield "<h2>Over time</h2>"
    yield '<p class="muted">' + " ".join(SWATCH.format(c, t) for c, t in (
        (theme.MEASURED, "measured window, with its level"),
        (theme.UNMEASURED, "warm-up and drain"), (theme.UNSAFE, "failed requests"))) + "</p>"
    yield _figure(drawn, timeline.in_flight(run))
    yield '<div class="pair">' + "".join(_figure(drawn, timeline.over_time(run, *x)) for x in (
        ("gpu", "memory_used_bytes", "GPU memory in use, GiB", 1 / steps.GIB),
        ("server", "kv_frac", "KV cache in use, %", 100.0, 100.0),
        ("server", "waiting", "Requests waiting at the server", 1.0),
        ("gpu", "util_frac", "GPU busy, %", 100.0, 100.0))) + "</div>"


# ------------------------------------------------------------------------------------- the end


def _ends(run: Run) -> Iterator[str]:
    found = [(j.leg, f) for j in run.judgements for f in j.findings]
    yield "<h2>Findings on the measurement</h2>"
    items = "".join(f'<li class="{f.verdict.lower()}"><strong>{f.verdict}</strong> · {escape(leg)} '
                    f'· {escape(f.says)}<br><span class="muted">{escape(f.remedy)}</span></li>'
                    for leg, f in found)
    yield (f'<ul class="findings">{items}</ul>' if found else
           '<p class="muted">None: the generator was not the limit.</p>' if run.legs else "")
    yield "<h2>Terms</h2>"
    yield '<dl class="terms">' + "".join(
        f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in metrics.TERMS.items()) + "</dl>"
    manifest = msgspec.json.format(msgspec.json.encode(run.manifest)).decode()
    yield f"<details><summary>Manifest</summary><pre>{escape(manifest)}</pre></details>"


def main() -> None:
    run = frame.open_run(frame.parser("Writes the report of a run.").parse_args())
    try:
        print(write(run))
    except StoreError as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    frame.as_a_filter()
    main()
