"""Tables of how much load servers take: concurrency with "stable?", users, cost, the safe level,
the largest concurrency before a death, throttling."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pandas as pd
from msgspec import Struct

from analysis import steps, words
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
from loadgen import metrics, unit
from loadgen.record import Outcome

KV_NEAR = 0.90  # of the cache: beyond it the next long answer may push another one out
STABLE = (
    "Stable? “yes”: of the requests of all repeats together, at least the target share (95 %) met "
    "the SLO, with 95 % confidence, and no repeat came so near the limits that the next may miss "
    "them; nothing was preempted, the KV cache stayed below 90 %, and the "
    "measurement is valid. “no”: the server died, or the same requests refute the target, or the "
    "server was in distress (more than 1 % preempted, or the cache above 95 % in more than 5 % of "
    "the samples). “near the limit”: neither, with the reason. "
    "“too few”: nothing speaks against it, but even if every request had been good, so few of them "
    "would not show 95 %. ± is half of Student's 95 % "
    "interval over the repeats.")


class Stability(Struct, frozen=True):
    answer: str  # yes, near the limit, no, too few, unknown
    why: str = ""


def stability(own: Iterable[Measured]) -> Stability:
    """Of the repeats of one load."""
    there = ran(own)
    if not there:
        return Stability("unknown")
    if died := next((m.died for m in there if m.died), None):
        return Stability("no", died if len(died) < 60 else f"{died[:60]}…")
    judged = [j for m in there if m.run is not None for j in m.run.judgements]
    usable = [j for j in judged if j.measurement != "INVALID" and j.n]
    if not usable:
        return Stability("unknown", "measurement invalid")
    criteria = next(m.run.criteria for m in there if m.run is not None)
    good, n = sum(j.good for j in usable), sum(j.n for j in usable)
    share = f"{good:,} of {n:,} met the SLO"
    if any(j.distress for j in usable):
        why = next(j.reasons[0] for j in usable if j.distress)
        return Stability("no", why + f" (one of {len(usable)} repeats)" * (len(usable) > 1))
    if metrics.upper_bound(good, n, criteria.confidence) < criteria.target:
        return Stability("no", share)
    preempted = sum(m.row["preemptions"] for m in there if pd.notna(m.row["preemptions"]))
    if preempted:
        return Stability("near the limit", f"{preempted:.0f} preemptions")
    kv = max((m.row["kv_max_frac"] for m in there if pd.notna(m.row["kv_max_frac"])), default=0.0)
    if kv >= KV_NEAR:
        return Stability("near the limit", f"KV cache {100 * kv:.0f} % full")
    if metrics.lower_bound(n, n, criteria.confidence) < criteria.target:
        return Stability("too few", f"{share}, and were all good that would prove nothing yet")
    if metrics.lower_bound(good, n, criteria.confidence) < criteria.target:
        return Stability("near the limit", share)
    near = next((j for j in usable if j.near), None)
    if near is not None:
        return Stability("near the limit", near.reasons[0])
    rising = next((j for j in usable if j.rises is not None), None)
    if rising is not None:
        return Stability("near the limit", "it got slower as it went on")
    return Stability("yes")


def concurrency(matrix: Matrix) -> Table:
    rows = []
    for (server, load), own in per_value(matrix.of("concurrency"), lambda m: m.done.cell.load):
        there = ran(own)
        rows.append({
            "server": server, "concurrency": load,
            **spread("mean TTFT, ms", [1000 * m.row["ttft_mean_s"] for m in there
                                       if m.row["ttft_mean_s"] is not None]),
            **spread("output, tok/s", _column(there, "output_tok_s")),
            "memory per GPU, GiB": _most(there, "gpu_memory_peak_gib"),
            **_stable(there), "KV cache, %": _percent(_most(there, "kv_max_frac")),
            "preemptions": sum(_column(there, "preemptions")) if there else None,
            "GPU busy, %": _percent(interval(_column(there, "gpu_util_frac"))[0]),
            "met the SLO": _met(there), **_repeats_and_why(own)})
    return Table("concurrency", "Concurrency", frame_of(rows), STABLE)


def users(matrix: Matrix) -> Table:
    """As Locust's own table of a load by users, but with what it lacks."""
    rows = []
    for (server, load), own in per_value(matrix.of("users"), lambda m: m.done.cell.load):
        there = ran(own)
        n, errors = sum(_column(there, "n")), sum(_column(there, "errors"))
        rows.append({
            "server": server, "users": load, **spread("QPS", _column(there, "achieved_rps")),
            **spread("mean E2E, s", _column(there, "e2e_mean_s")),
            "errors, %": 100 * errors / n if n else None,
            "errors at most, %": 100 * metrics.upper_bound(int(errors), int(n), 0.95)
            if n else None,
            "memory per GPU, GiB": _most(there, "gpu_memory_peak_gib"),
            **_stable(there), "met the SLO": _met(there), **_repeats_and_why(own)})
    return Table("users", "Load by users", frame_of(rows),
                 "A user sends its next request when the last one is answered. Errors at most: the "
                 f"upper 95 % bound of their share, which 0 % of few requests hides. {STABLE}")


def utilisation(matrix: Matrix) -> Table:
    rows = []
    for server, own in by_server(matrix.of("utilisation")):
        runs = [m for m in ran(own) if m.work.what == "run"]
        rows.append({
            "server": server,
            **spread("GPU busy, %", [100 * x for x in _column(runs, "gpu_util_frac")]),
            **spread("output, tok/s", _column(runs, "output_tok_s")),
            **_survived(own), "note": why_not([m for m in own if m.died is None])})
    return Table("utilisation", "GPU utilisation and the largest concurrency", frame_of(rows),
                 "Busy: mean share of the measured time in which a kernel ran (NVML). Largest "
                 "concurrency: requests in flight that the server survived, by going up until it "
                 "dies, then halving to the unit with a restart after each death. A vLLM that is "
                 "sound does not run out of memory under load: it makes requests wait, or preempts "
                 "them; then the figure is how far it was tried.")


def _survived(own: list[Measured]) -> dict[str, Any]:
    searches = [m for m in ran(own) if m.work.what == "oom"]
    if not searches:
        return {}
    found = [unit.boundary(m.run.judgements) for m in searches if m.run is not None]
    fatal = min((b.fatal for b in found if b.fatal is not None), default=None)
    survived = min((b.survived for b in found if b.survived is not None), default=None)
    died = next((m.died for m in searches if m.died), None)
    return {"largest concurrency": survived, "dies at": fatal,
            "died of": died or "nothing: more was not tried"}


def cost(matrix: Matrix) -> Table:
    """Of each server: one request alone, and the largest stable load."""
    money, rows = matrix.campaign.currency, []
    for server, own in by_server(matrix.of("cost")):
        best = best_load(own)
        row: dict[str, Any] = {"server": server, "GPUs": own[0].server.tensor_parallel}
        alone = [m for m in ran(own) if m.done.cell.load == 1]
        row |= spread("alone: E2E, ms", [1000 * x for x in _column(alone, "e2e_mean_s")])
        row["stable up to"] = best
        at = [m for m in ran(own) if m.done.cell.load == best] if best is not None else []
        gpus, price = own[0].server.tensor_parallel, own[0].server.price_per_gpu_hour
        tokens = [x / gpus for x in _column(at, "output_tok_s")]
        good = [x / gpus for x in _column(at, "goodput_rps")]
        row |= spread("tokens per GPU-second", tokens)
        row |= spread("good requests per GPU-second", good)
        if price:
            row[f"million tokens per {money}"] = _scaled(interval(tokens)[0], 3600 / price / 1e6)
            row[f"good requests per {money}"] = _scaled(interval(good)[0], 3600 / price)
        rows.append(row | {"note": why_not([m for m in own if m.died is None])})
    return Table("cost", "Cost efficiency", frame_of(rows),
                 "Stable up to: the largest tested concurrency with “yes” under “stable?”; tokens "
                 "(output) and good requests (those that met the SLO) are at that load. Prices are "
                 "the campaign file's, per GPU-hour.")


def best_load(own: Iterable[Measured]) -> float | None:
    """The largest load that is stable and below which none was refuted."""
    best = None
    for load, group in sorted(grouped([m for m in own if m.done.cell.load is not None],
                                      lambda m: m.done.cell.load)):
        found = stability(group)
        if found.answer == "no":
            break
        if found.answer == "yes":
            best = float(load)
    return best


def safe(matrix: Matrix) -> Table:
    rows = []
    for (server, work), own in grouped(matrix.of("safe"), lambda m: (m.server.name, m.work.name)):
        for m in own:
            if m.run is None:
                continue
            answer, c = words.answer(m.run), m.run.conclusion
            at = answer.levels[answer.levels["value"] == c.safe].to_dict("records")
            knee = answer.knee
            rows.append({
                "server": server, "workload": work, "axis": m.run.axis,
                "verdict": c.load, "safe up to": c.safe, "unsafe from": c.unsafe,
                "met the SLO": f"{c.proof.good:,} of {c.proof.n:,}" if c.proof else "",
                "knee": knee.value if knee else None,
                "peak, requests/s": knee.peak_rps if knee else None,
                "TTFT p50, ms": _scaled(at[0]["ttft_p50_s"], 1000) if at else None,
                "TPOT p50, ms": _scaled(at[0]["tpot_p50_s"], 1000) if at else None,
                f"requests per {matrix.campaign.currency}": safe_per_money(m),
                "note": why_not([m]) or "its limit lies higher: no load above was tried"
                * (c.safe is not None and c.at_least)})
        if not ran(own):
            rows.append({"server": server, "workload": work, "note": why_not(own)})
    return Table("safe", "Largest safe load", frame_of(rows),
                 "Found by a sweep and proved by a hold-out; latencies are at the safe level, and "
                 "so are the answers for the money, at the campaign file's price per GPU-hour.")


def safe_per_money(m: Measured) -> float | None:
    """Answers per unit of money at the safe load; None where none was found, or no price."""
    if m.run is None or m.run.is_run or not m.run.legs or not m.server.price_per_gpu_hour:
        return None
    level = m.run.conclusion.safe
    rps = interval(j.achieved_rps for j in m.run.judgements
                   if j.value == level and j.phase in ("confirm", "soak"))[0]
    return _scaled(rps, 3600 / m.server.price_per_gpu_hour / m.server.tensor_parallel)


def throttled(matrix: Matrix) -> Table:
    rows = []
    for (server, load), own in per_value(matrix.of("throttled"), lambda m: m.done.cell.load):
        there, outcomes = ran(own), Counter[str]()
        for m in there:
            outcomes.update(m.sample["outcome"])
        n = sum(outcomes.values())
        refused, ok = outcomes[Outcome.THROTTLED.value], outcomes[Outcome.OK.value]
        rows.append({
            "server": server, "asked for, requests/s": load, "requests": n or None,
            "answered, %": _percent(ok / n if n else None),
            "throttled, %": _percent(refused / n if n else None),
            "failed, %": _percent((n - ok - refused) / n if n else None),
            "answered, requests/s": interval(_column(there, "achieved_rps"))[0],
            "repeats": len(there) or None, "note": why_not(own)})
    return Table("throttled", "A proxy that limits its clients", frame_of(rows),
                 "Throttled: 429, or 503 with its signs: the proxy's doing, apart from failures of "
                 "the server. A miss for goodput all the same.")


# ------------------------------------------------------------------------------------ figures


def _stable(there: list[Measured]) -> dict[str, Any]:
    return {"stable?": stability(there).answer if there else None}


def _repeats_and_why(own: list[Measured]) -> dict[str, Any]:
    """How often, and why it is not stable, or was not run."""
    there = ran(own)
    why = stability(there).why if there else ""
    note = why_not([m for m in own if m.died is None])
    return {"repeats": len(there) or None, "note": "; ".join(x for x in (why, note) if x)}


def _column(there: Iterable[Measured], name: str) -> list[float]:
    return [float(x) for m in there if m.row and (x := m.row[name]) is not None and pd.notna(x)]


def _most(there: Iterable[Measured], name: str) -> float | None:
    return max(_column(there, name), default=None)


def _met(there: list[Measured]) -> str:
    good, n = sum(_column(there, "good")), sum(_column(there, "n"))
    return f"{good:,.0f} of {n:,.0f} ({steps.percent(good / n)})" if n else ""


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None or pd.isna(value) else value * by
