"""The table of a run: one row per leg (or per level), every number with its n."""

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import frame
from analysis.frame import Floats, Run
from loadgen import metrics
from loadgen.balance import stalls_inside
from loadgen.judge import Judgement
from loadgen.leg import Window
from loadgen.record import Outcome
from loadgen.telemetry.signs import GpuSigns

GIB = 2**30
NONE = np.empty(0)
TAILS = (0.9, 0.99)  # printed only where n ≥ metrics.min_n


def table(run: Run) -> pd.DataFrame:
    """One row per leg, in the order in which they ran. Absent values are NaN."""
    return pd.DataFrame([_leg_row(run, i) for i in range(len(run.legs))])


def levels(run: Run) -> pd.DataFrame:
    """One row per level, ascending: all its legs taken together, but INVALID ones left out, and
    those that came otherwise than the level does: in a closed loop's search as open arrivals, or
    after a start that crowded them, where others did not."""
    rows = []
    usable = [j for j in run.judgements if j.measurement != "INVALID" and j.n
              and j.phase != "burst" and not (j.phase == "poisson" and run.axis == "concurrency")]
    whole = {j.value for j in usable if not j.crowded}
    usable = [j for j in usable if not j.crowded or j.value not in whole]
    for value in sorted({j.value for j in usable}):
        here = [j for j in usable if j.value == value]
        rows.append({"value": value, **_counts(run, here), **_latencies(run, here),
                     **_tokens(run, here)})
    return pd.DataFrame(rows)


def _leg_row(run: Run, i: int) -> dict[str, object]:
    (leg, window), j, signs = run.legs[i], run.judgements[i], run.signs[i]
    return {
        "leg": leg.id, "phase": leg.phase, "value": leg.value, "ending": window.ending,
        **_counts(run, [j]), **_latencies(run, [j]),
        **run.gaps[leg.id].distribution("itl", TAILS), **_tokens(run, [j]),
        "outcomes": ", ".join(f"{k} {n}" for k, n in sorted(j.outcomes.items())),
        "misses": ", ".join(f"{k} {n}" for k, n in sorted(j.misses.items())),
        "running_mean": signs.running_mean, "waiting_mean": signs.waiting_mean,
        "kv_max_frac": signs.kv_max, "preemptions": signs.preemptions,
        "prefix_hit_frac": signs.prefix_hit_frac, "queue_mean_s": signs.queue_s,
        "prefill_mean_s": signs.prefill_s, "decode_mean_s": signs.decode_s,
        "scrape_mean_s": signs.scrape_s, **_gpu(run.gpus[i]),
        **_process(run, window),
        **_generator(window, j),
        "measurement": j.measurement, "load": j.load, "reasons": "; ".join(j.reasons)}


def _counts(run: Run, legs: Sequence[Judgement]) -> dict[str, object]:
    """Rates of several legs are weighted by their windows."""
    n, good = sum(j.n for j in legs), sum(j.good for j in legs)
    errors, window_s = sum(j.errors for j in legs), sum(j.window_s for j in legs)
    return {
        "window_s": window_s, "n": n, "void": sum(j.void for j in legs), "good": good,
        "offered_rps": sum(j.offered_rps * j.window_s for j in legs) / window_s,
        "achieved_rps": sum(j.achieved_rps * j.window_s for j in legs) / window_s,
        "goodput_rps": sum(j.goodput_rps * j.window_s for j in legs) / window_s,
        "attainment_frac": good / n if n else None,
        "errors": errors, "error_frac": errors / n if n else None}


def _latencies(run: Run, legs: Sequence[Judgement]) -> dict[str, object]:
    ids = [j.leg for j in legs]
    sample, out = run.sample(*ids), {}
    for name in ("ttft", "ttft_service", "tpot", "e2e"):
        out.update(distribution(name, sample[f"{name}_s"].dropna().to_numpy(),
                                cut_off(sample, name)))
    return out


def cut_off(sample: pd.DataFrame, name: str) -> Floats:
    """Ages of the answers that we cancelled before they had the value `name`, s: it would have
    been larger, and leaving them out would be an average of survivors."""
    if name == "tpot":  # the age bounds a time since the start, not one per token
        return NONE
    f = sample[(sample["outcome"] == Outcome.CANCELLED.value) & sample[f"{name}_s"].isna()]
    since = f["sent_s"] if name == "ttft_service" else f["due_s"]
    return np.asarray((f["end_s"] - since).dropna(), float)


def distribution(name: str, values_s: Floats, cut_off_s: Floats = NONE) -> dict[str, object]:
    """n (with those cut off), mean and maximum of what is known, median, and tails where n has
    them; medians stand at any n."""
    n = len(values_s) + len(cut_off_s)

    def at(q: float) -> float | None:
        found = metrics.quantile(values_s, q, cut_off_s)
        return found.value if found and (q == 0.5 or n >= metrics.min_n(q)) else None

    known = len(values_s) > 0
    return {f"{name}_n": n, f"{name}_mean_s": float(values_s.mean()) if known else None,
            **{f"{name}_p{100 * q:.0f}_s": at(q) for q in (0.5, *TAILS)},
            f"{name}_max_s": float(values_s.max()) if known else None}


def _tokens(run: Run, legs: Sequence[Judgement]) -> dict[str, object]:
    """Tokens per second of the windows, whoever's they were: output as its events came, a prompt
    when its first token came."""
    output = prompt = window_s = 0.0
    spans = {leg.id: window for leg, window in run.legs}
    for j in legs:
        window = spans[j.leg]
        f = run.frame[run.frame["leg"] == j.leg]
        first_ns = (f["due_s"] + f["ttft_s"]) * 1e9 + run.t0_ns
        inside = (first_ns >= window.from_ns) & (first_ns < window.to_ns)
        output += float(f["window_tok"].sum())
        prompt += float(f["prompt_tok"][inside].sum())
        window_s += j.window_s
    return {"output_tok_s": output / window_s, "prompt_tok_s": prompt / window_s}


def _gpu(gpu: GpuSigns) -> dict[str, object]:
    """Memory of the fullest GPU when the leg began and at its peak; what all did on average."""
    def gib(value: float | None) -> float | None:
        return None if value is None else value / GIB
    return {"gpus": gpu.n or None, "gpu_memory_start_gib": gib(gpu.memory_start_bytes),
            "gpu_memory_peak_gib": gib(gpu.memory_peak_bytes),
            "gpu_memory_total_gib": gib(gpu.memory_total_bytes), "gpu_util_frac": gpu.util_frac,
            "gpu_power_w": gpu.power_w, "gpu_sm_clock_mhz": gpu.sm_clock_mhz,
            "gpu_temperature_max_c": gpu.temperature_max_c, "gpu_slowed_frac": gpu.slowed_frac,
            "gpu_slowed_by": ", ".join(gpu.slowed_by)}


def _process(run: Run, window: Window) -> dict[str, object]:
    """Of the server's processes: memory at most, and cores over the measured window."""
    told = run.telemetry.get("process", {})
    rss = [v for t, v in told.get("rss_bytes", ()) if window.t0_ns <= t <= window.end_ns]
    cores = [v for t, v in told.get("cpu_cores", ()) if window.from_ns <= t < window.to_ns]
    return {"server_rss_gib": max(rss) / GIB if rss else None,
            "server_cpu_cores": float(np.mean(cores)) if cores else None}


def _generator(window: Window, j: Judgement) -> dict[str, object]:
    """How the load generator was meanwhile; of several processes, the one that is worst off. What
    the server counted stands as a ratio to what the records say."""
    books, shards = j.balance, window.shards
    enough = books.late_n >= metrics.min_n(0.99)
    counted = (("requests", books.requests), ("prompt_tok", books.prompt_tok),
               ("output_tok", books.output_tok))
    full = sum(h.full_reads for h in shards)
    stalls = stalls_inside(window)
    return {
        "late_p99_s": books.late_p99_s if enough else None, "late_max_s": books.late_max_s,
        "lag_p99_s": window.lag_p99_s, "cpu_frac": window.cpu_frac,
        "run_queue_frac": _most(h.run_queue_frac for h in shards),
        "run_queue_each_s": _most(h.run_queue_each_s for h in shards),
        "dropped": j.outcomes.get(Outcome.DROPPED.value, 0), "stalls": len(stalls),
        "stall_s": sum(b - a for a, b in stalls) / 1e9,
        "gc_pause_s": _most(h.gc_pause_s for h in shards), "fds": _most(h.fds for h in shards),
        "fd_limit": min((h.fd_limit for h in shards if h.fd_limit), default=None),
        "connect_p99_s": books.connect_p99_s if enough else None,
        "connect_max_s": books.connect_max_s, "connect_frac": books.connect_frac,
        "begun_frac": books.begun_frac, "inflight_mean": books.inflight_mean,
        "slots_frac": books.slots_frac, "little_residual": books.little_residual,
        "little_tolerance": books.little_tolerance,
        "full_reads_frac": full / books.reads if books.reads else None,
        "rcvbuf_bytes": min((h.rcvbuf_bytes for h in shards if h.rcvbuf_bytes), default=None),
        **{f"server_{name}_ratio": tally.ratio if tally else None for name, tally in counted}}


def _most(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


# ------------------------------------------------------------------------------------- printing


def duration(value_s: float | None) -> str:
    """A time as people read it: "840 ms", "2.31 s"; "–" where there is none."""
    if value_s is None or np.isnan(value_s):
        return "–"
    if 0 < value_s < 1e-5:
        return "< 0.01 ms"
    if value_s < 0.9995:
        return f"{1000 * value_s:.3g} ms" if value_s < 0.0995 else f"{1000 * value_s:.0f} ms"
    return f"{value_s:.2f} s" if value_s < 9.995 else f"{value_s:.1f} s"


def number(value: float | None, spec: str = ".3g") -> str:
    return "–" if value is None or np.isnan(value) else format(value, spec)


def percent(value: float | None, down: bool = False) -> str:
    """A share in percent, to 0.1; a lower bound is rounded down."""
    if value is None or np.isnan(value):
        return "–"
    return f"{int(1000 * value + 1e-9) / 10 if down else round(1000 * value) / 10:g} %"


def cells(r: Mapping[Any, Any]) -> list[str]:
    """A row of `table` as people read it, in the order of HEADS."""
    return [
        str(r["leg"]), number(r["n"], ".0f"),
        percent(r["attainment_frac"]), str(r["load"]), str(r["measurement"]),
        *(number(r[x]) for x in ("offered_rps", "achieved_rps", "goodput_rps")),
        *(f"{duration(r[f'{x}_p50_s'])} / {duration(r[f'{x}_p90_s'])}"
          for x in ("ttft", "tpot", "e2e")),
        number(r["output_tok_s"], ".0f"), percent(r["error_frac"]), percent(r["kv_max_frac"])]


HEADS = ("leg", "n", "attainment", "load", "measurement", "offered/s", "achieved/s", "goodput/s",
         "TTFT p50 / p90", "TPOT p50 / p90", "E2E p50 / p90", "output tok/s", "errors", "KV max")


def main(argv: Sequence[str] | None = None) -> None:
    args = frame.parser("The table of a run: one row per leg.")
    args.add_argument("--csv", action="store_true", help="all columns, as CSV")
    options = args.parse_args(argv)
    run = frame.open_run(options)
    rows = table(run)
    if options.csv:
        rows.to_csv(sys.stdout, index=False, quoting=csv.QUOTE_MINIMAL)
        return
    from rich.table import Table  # noqa: PLC0415

    from loadgen.terminal import plain_console  # noqa: PLC0415

    shown = Table(*HEADS, title=f"{run.manifest.run}: {run.manifest.model}")
    for r in rows.to_dict("records"):
        shown.add_row(*cells(r))
    width = None if sys.stdout.isatty() else 200
    plain_console(width).print(shown)
    if run.torn:
        print(f"{run.torn} torn lines were passed over", file=sys.stderr)


if __name__ == "__main__":
    frame.as_a_filter()
    main()
