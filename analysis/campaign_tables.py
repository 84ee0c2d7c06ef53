"""Tables of how fast servers answer: speed, time to first token, lengths, tasks. Each takes a
campaign's cells and gives a table; a row pools the repeats of what is measured alike."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from analysis.matrix import (
    Matrix,
    Measured,
    Table,
    by_server,
    frame_of,
    grouped,
    interval,
    per_value,
    ran,
    spread,
    why_not,
)
from analysis.steps import GIB
from loadgen import metrics
from loadgen.campaign import is_simulated
from loadgen.record import Outcome

REPEATS = "± is half of Student's 95 % interval over the repeats' means."


def speed(matrix: Matrix) -> Table:
    """Tokens per second of one answer while it is written: the mean of 1/TPOT."""
    found, rows = matrix.of("speed"), []
    tasks = list(dict.fromkeys(m.work.name for m in found))
    for server, own in by_server(found):
        row: dict[str, Any] = {"server": server}
        for task in tasks:
            row |= spread(f"{task}, tok/s", [_decode_tok_s(m) for m in ran(own)
                                             if m.work.name == task])
        means = [row[f"{t}, tok/s"] for t in tasks if row[f"{t}, tok/s"] is not None]
        row["mean, tok/s"] = sum(means) / len(means) if means else None
        row |= _counts(own)
        rows.append(row)
    return Table("speed", "Generation speed", frame_of(rows),
                 "Decode only, per request: 1 / TPOT, without the time to the first token. Mean: "
                 f"of the tasks. {REPEATS}")


def ttft(matrix: Matrix) -> Table:
    rows = []
    for server, own in by_server(matrix.of("ttft")):
        values = _all(own, "ttft_s")
        row: dict[str, Any] = {
            "server": server, **spread("mean, ms", [
                _ms(_all(part, "ttft_s").mean()) for _, part in grouped(
                    ran(own), lambda m: m.done.cell.repeat)]),  # of all tasks together
            "min, ms": _ms(values.min()), "max, ms": _ms(values.max()),
            "p50, ms": _quantile_ms(values, 0.5), "p99, ms": _quantile_ms(values, 0.99)}
        rows.append(row | _counts(own))
    return Table("ttft", "Time to first token", frame_of(rows),
                 "From the instant the request was due. A p99 stands only from "
                 f"{metrics.min_n(0.99)} answers on. {REPEATS}")


def memory(matrix: Matrix) -> Table:
    """Of the fullest GPU, over all of a server's cells."""
    rows = []
    for server, own in by_server(matrix.cells):
        there = ran(own)
        # what was loaded is known at a start; in later cells of the same server it may have grown
        loaded = next((x / GIB for m in there if m.run is not None
                       and (x := m.run.gpu_loaded_bytes) is not None), None)
        peaks = [g.memory_peak_bytes / GIB for m in there if m.run is not None
                 for g in m.run.gpus if g.memory_peak_bytes is not None]
        totals = [g.memory_total_bytes / GIB for m in there if m.run is not None
                  for g in m.run.gpus if g.memory_total_bytes is not None]
        peak = max(peaks, default=None)
        rows.append({
            "server": server, "GPUs": own[0].server.tensor_parallel if there else None,
            "after load, GiB": loaded, "peak, GiB": peak,
            "increase, GiB": None if loaded is None or peak is None else peak - loaded,
            "of, GiB": max(totals, default=None), "KV cache, tokens": _kv_cache_tok(there),
            "note": why_not([m for m in own if m.run is None or m.died])})
    return Table("memory", "GPU memory", frame_of(rows),
                 "Per GPU, the fullest one, as NVML shows it. vLLM takes the memory of its KV "
                 "cache when it starts, so that load hardly changes it: how full the cache is "
                 "stands in the table of concurrency. Smaller weights leave it more tokens.")


def _kv_cache_tok(there: list[Measured]) -> int | None:
    """Of a server that says so, as it starts."""
    told = [m.run.manifest.server.get("kv_cache_tok") for m in there if m.run is not None]
    return next((x for x in told if isinstance(x, int)), None)


def long_text(matrix: Matrix) -> Table:
    rows = []
    for (server, tok), own in per_value(matrix.of("long_text"), _prompt_tok):
        rows.append({
            "server": server, "input, tokens": tok,
            **spread("speed, tok/s", [_decode_tok_s(m) for m in ran(own)]),
            **spread("TTFT, s", [m.sample["ttft_s"].mean() for m in ran(own)]), **_counts(own)})
    return Table("long_text", "Long texts", frame_of(rows),
                 f"Speed while the answer is written: 1 / TPOT. {REPEATS}")


def longest_context(matrix: Matrix) -> Table:
    rows = []
    for server, own in by_server(matrix.of("longest_context")):
        rows.append({
            "server": server, "context, tokens": own[0].server.max_model_len,
            "input, tokens": _prompt_tok(own[0]) if ran(own) else None,
            **spread("TTFT, s", [m.answers["ttft_s"].mean() for m in ran(own)]),
            **spread("E2E, s", [m.answers["e2e_s"].mean() for m in ran(own)]), **_counts(own)})
    return Table("longest_context", "Latency at the longest context", frame_of(rows),
                 "The whole context of the server: a prompt that leaves room for the answer alone. "
                 f"Where a context does not fit, the longest that does has a row. {REPEATS}")


def document(matrix: Matrix) -> Table:
    rows = []
    for (server, tok), own in per_value(matrix.of("document"), _prompt_tok):
        rows.append({
            "server": server, "input, tokens": tok,
            **spread("first token, s", [m.answers["ttft_s"].mean() for m in ran(own)]),
            **spread("all, s", [m.answers["e2e_s"].mean() for m in ran(own)]),
            "output, tokens": _mean(own, "output_tok"), **_counts(own)})
    return Table("document", "Summary of a long document", frame_of(rows), REPEATS)


def input_length(matrix: Matrix) -> Table:
    rows = []
    for (server, tok), own in per_value(matrix.of("input_length"), _prompt_tok):
        gap = _all(own, "itl_max_s").max()
        rows.append({
            "server": server, "input, tokens": tok,
            **spread("TTFT, s", [m.answers["ttft_s"].mean() for m in ran(own)]),
            **spread("total, s", [m.answers["e2e_s"].mean() for m in ran(own)]),
            "longest pause, ms": _ms(gap), "all succeeded?": _succeeded(own), **_counts(own)})
    return Table("input_length", "Input length and latency", frame_of(rows),
                 "Longest pause: the largest gap between two token events of any answer, which "
                 f"readers see as a stutter. {REPEATS}")


def longest_output(matrix: Matrix) -> Table:
    rows = []
    for server, own in by_server(matrix.of("longest_output")):
        there = ran(own)
        ends = Counter[str]()
        for m in there:
            ends.update(_finish_reasons(m))
        rows.append({
            "server": server, "asked, tokens": own[0].work.output_tokens if there else None,
            **spread("produced, tokens", [m.answers["output_tok"].mean() for m in there]),
            **spread("time, s", [m.answers["e2e_s"].mean() for m in there]),
            **spread("speed, tok/s", [_whole_tok_s(m) for m in there]),
            "why it ended": ", ".join(f"{k} {n}" for k, n in ends.most_common()),
            "repeats itself": _repetitions(there),
            **_counts(own)})
    return Table("longest_output", "Longest output", frame_of(rows),
                 "Speed: tokens over the whole time of the request. Why it ended: length is the "
                 "limit that was asked for, stop the model's own end. " + REPEATS)


def tasks(matrix: Matrix) -> Table:
    """One row per server and task, whatever it is."""
    rows = []
    for (server, task), own in per_value(matrix.of("tasks"), lambda m: m.work.name):
        there = ran(own)
        good, n = sum(m.row["good"] for m in there), sum(m.row["n"] for m in there)
        rows.append({
            "server": server, "task": task,
            **spread("TTFT, ms", [_ms(m.answers["ttft_s"].mean()) for m in there]),
            **spread("E2E, s", [m.answers["e2e_s"].mean() for m in there]),
            **spread("speed, tok/s", [_decode_tok_s(m) for m in there]),
            "met the SLO": f"{good:,.0f} of {n:,.0f}" if n else "", **_counts(own)})
    return Table("tasks", "Tasks", frame_of(rows), f"Speed: 1 / TPOT. {REPEATS}")


def servers(matrix: Matrix) -> Table:
    """What the rows stand for."""
    rows = []
    for s in matrix.campaign.servers:
        simulated = is_simulated(matrix.campaign, s)
        rows.append({
            "server": s.name, "model": s.model,
            "back end": f"{s.kind}{', simulated' if simulated else ''}",
            "GPUs": f"{s.tensor_parallel} × {s.gpu}" if s.gpu else str(s.tensor_parallel),
            "weights": s.quantization or "16 bit", "context, tokens": s.max_model_len,
            f"price, {matrix.campaign.currency} per GPU-hour": s.price_per_gpu_hour,
            "options": " ".join((*s.options, *(s.sim_options if simulated else ())))})
    return Table("servers", "Servers", frame_of(rows))


# ------------------------------------------------------------------------------------ figures


def _decode_tok_s(m: Measured) -> float | None:
    tpot = m.answers["tpot_s"].dropna()
    return float((1 / tpot[tpot > 0]).mean()) if len(tpot) else None


def _whole_tok_s(m: Measured) -> float | None:
    f = m.answers
    return float((f["output_tok"] / f["e2e_s"]).mean()) if len(f) else None


def _prompt_tok(m: Measured) -> float | None:
    """As asked for, else as it was."""
    if m.done.cell.prompt_tok is not None:
        return m.done.cell.prompt_tok
    return None if m.run is None else round(m.sample["prompt_tok"].mean())


def _finish_reasons(m: Measured) -> list[str]:
    assert m.run is not None
    path = m.run.folder.path / "records.parquet"
    found = pd.read_parquet(path, columns=["outcome", "finish_reason"])
    return [str(r or o) for o, r in zip(found["outcome"], found["finish_reason"], strict=True)]


def _repetitions(there: list[Measured]) -> str:
    """How many of the checked answers, and what was found in the first of them."""
    told = [v for m in there if m.run is not None for v in m.run.verdicts]
    bad = [v for v in told if not v.ok]
    if not told:
        return ""
    return f"{len(bad)} of {len(told)}" + (f": {bad[0].kind}, {bad[0].says}" if bad else "")


def _succeeded(own: list[Measured]) -> str:
    there = ran(own)
    if not there:
        return "not run"
    outcomes = Counter[str]()
    for m in there:
        outcomes.update(m.sample["outcome"])
    bad = {k: n for k, n in outcomes.items() if k != Outcome.OK.value}
    return "yes" if not bad else "no: " + ", ".join(f"{n} {k}" for k, n in sorted(bad.items()))


def _counts(own: list[Measured]) -> dict[str, Any]:
    there = ran(own)
    return {"answers": sum(len(m.answers) for m in there) or None,
            "repeats": len({m.done.cell.repeat for m in there}) or None, "note": why_not(own)}


def _all(own: list[Measured], column: str) -> "pd.Series[float]":
    parts = [m.sample[column].dropna().to_numpy(float) for m in ran(own)]
    return pd.Series(np.concatenate([np.empty(0), *parts]))


def _mean(own: list[Measured], column: str) -> float | None:
    return interval(m.answers[column].mean() for m in ran(own))[0]


def _quantile_ms(values: "pd.Series[float]", q: float) -> float | None:
    if len(values) < (metrics.min_n(q) if q > 0.5 else 1):
        return None
    found = metrics.quantile(values.to_numpy(), q)
    return _ms(found.value) if found else None


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None or math.isnan(value_s) else 1000 * value_s
