"""Legs as `vllm bench serve` would have written them: its keys, units and formulas (vLLM 0.32,
vllm/benchmarks/serve.py), for whatever reads its files. Arrays are s, aggregates ms.

Its definitions are not ours. It counts from the send, not from when a request was due; a token is
every event with `choices`, so that the role-only first one ends TTFT and a finish-only one is a
gap; a stream that was cut short is a success, and failed requests are in no latency; throughput
goes to the last answer's end. What cannot be told: texts, which no run keeps; tokens of a server
that counts none, which it would tokenise and which are events here.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from analysis import journals
from analysis.digest import Stretch, lines
from analysis.frame import Run
from analysis.gate import write as write_file
from loadgen import metrics
from loadgen.errors import ScenarioError
from loadgen.judge import is_due
from loadgen.leg import Leg, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Open, Slo
from loadgen.store import RunFolder

METRICS = ("ttft", "tpot", "itl", "e2el", "client_queue_time", "e2el_including_client_queue")
DETAILS = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors")
# what it takes for a success as soon as one event with choices came: its client reads to the end
# of the body, and asks for no finish_reason
ENDED = {Outcome.OK, Outcome.ABORTED, Outcome.SERVER_ERROR_EVENT, Outcome.TRUNCATED, Outcome.EMPTY,
         Outcome.THROTTLED}


class Options(Struct, frozen=True):
    """Its options of the same names."""

    percentile_metrics: tuple[str, ...] = ("ttft", "tpot", "itl")
    metric_percentiles: tuple[float, ...] = (99.0,)
    save_detailed: bool = False
    metadata: tuple[tuple[str, str], ...] = ()


def options_of(percentile_metrics: str | None, metric_percentiles: str | None,
               save_detailed: bool, metadata: Sequence[str]) -> Options:
    """Of a command line. Raises ScenarioError."""
    base = Options()
    names = tuple((percentile_metrics or "").split(",")) if percentile_metrics else None
    if unknown := set(names or ()) - set(METRICS):
        raise ScenarioError(f"--percentile-metrics: no {', '.join(sorted(unknown))}: there are "
                            f"{', '.join(METRICS)}")
    try:
        tails = tuple(float(x) for x in (metric_percentiles or "99").split(","))
        pairs = tuple((k.strip(), v.strip()) for k, v in (x.split("=", 1) for x in metadata))
    except ValueError:
        raise ScenarioError("write --metric-percentiles 50,99 and --metadata K=V") from None
    if not all(0 <= x <= 100 for x in tails):
        raise ScenarioError(f"--metric-percentiles {metric_percentiles}: from 0 to 100")
    return Options(names or base.percentile_metrics, tails, save_detailed, pairs)


class Seen(Struct, frozen=True):
    """A request as its client sees it. What a failed one did not come to is 0."""

    ok: bool
    start_s: float
    ttft_s: float
    itl_s: list[float]
    latency_s: float
    queue_s: float
    prompt_tok: int
    output_tok: int
    error: str
    slo: Slo = Slo()


class Exported(Struct, frozen=True):
    """One leg's file. `due_ttft_s`: its median of the same answers' TTFT by our definition."""

    path: Path
    result: dict[str, Any]
    due_ttft_s: float | None


# ---------------------------------------------------------------------------------- a request


def seen(r: RequestRecord, slo: Slo, began_ns: int | None = None) -> Seen:
    """`began_ns`: of a closed loop, all of whose requests it would have asked for at the start;
    None: each asked for when it was due."""
    start_ns = _start_ns(r)
    stamps = _stamps_ns(r)
    ok = r.outcome in ENDED and bool(stamps)
    return Seen(
        ok=ok, start_s=start_ns / 1e9, ttft_s=(stamps[0] - start_ns) / 1e9 if stamps else 0.0,
        itl_s=[(b - a) / 1e9 for a, b in itertools.pairwise(stamps)],
        latency_s=(stamps[-1] - start_ns) / 1e9 if ok else 0.0,
        queue_s=(start_ns - (r.due_ns if began_ns is None else began_ns)) / 1e9,
        prompt_tok=(r.want_prompt_tok or 0) if r.prompt_tok is None else r.prompt_tok,
        output_tok=(r.output_tok or 0) if ok else 0,
        error="" if ok else r.error or r.outcome.value, slo=slo)


def _start_ns(r: RequestRecord) -> int:
    """Before the connection is opened: its wait is in their TTFT."""
    return r.due_ns if r.sent_ns is None else r.sent_ns - (r.connect_wait_ns or 0)


def _stamps_ns(r: RequestRecord) -> list[int]:
    """Of all events with choices."""
    tokens = [] if r.first_ns is None else [
        r.first_ns + 1000 * x for x in np.cumsum([0, *r.gaps_us]).tolist()]
    others = [x for x in (r.role_ns, r.finish_ns) if x is not None]
    return sorted([*tokens, *others]) if others else tokens


# ------------------------------------------------------------------------------------ formulas


def figures(outputs: Sequence[Seen], duration_s: float, options: Options,
            closed: bool) -> dict[str, Any]:
    """`calculate_metrics` and what `benchmark` makes of it."""
    good = [o for o in outputs if o.ok]
    asked, written = sum(o.prompt_tok for o in good), sum(o.output_tok for o in outputs)
    peak_tok, peak_requests = _peaks(good)
    found: dict[str, Any] = {
        "duration": duration_s, "completed": len(good), "failed": len(outputs) - len(good),
        "total_input_tokens": asked, "total_output_tokens": written,
        "request_throughput": len(good) / duration_s,
        "request_goodput": _goodput(good, duration_s),
        "output_throughput": written / duration_s,
        "total_token_throughput": (asked + written) / duration_s,
        "input_lens": [o.prompt_tok for o in outputs],
        "output_lens": [o.output_tok for o in outputs],
        "ttfts": [o.ttft_s for o in outputs], "itls": [o.itl_s for o in outputs],
        "latencies": [o.latency_s for o in outputs], "start_times": [o.start_s for o in outputs],
        "queue_times": [o.queue_s for o in outputs], "generated_texts": ["" for _ in outputs],
        "errors": [o.error for o in outputs], "max_output_tokens_per_s": peak_tok,
        "max_concurrent_requests": peak_requests, "rtfx": 0.0}
    for name, values in {
            "ttft": [o.ttft_s for o in good],
            "tpot": [_tpot_s(o) for o in good if o.output_tok > 1],
            "itl": [x for o in good for x in o.itl_s],
            "e2el": [o.latency_s for o in good],
            **({"client_queue_time": [o.queue_s for o in good]} if closed else {})}.items():
        if name in options.percentile_metrics:
            found |= _statistics(name, values, options.metric_percentiles)
    return found


def _tpot_s(o: Seen) -> float:
    """0 for an answer of one token: as goodput takes it."""
    return (o.latency_s - o.ttft_s) / (o.output_tok - 1) if o.output_tok > 1 else 0.0


def _goodput(good: Sequence[Seen], duration_s: float) -> float | None:
    """None where no class has a limit that it knows."""
    if not any((o.slo.ttft_s, o.slo.tpot_s, o.slo.e2e_s) != (None, None, None) for o in good):
        return None
    return sum(all(limit is None or float(limit) >= value for limit, value in (
        (o.slo.ttft_s, o.ttft_s), (o.slo.tpot_s, _tpot_s(o)), (o.slo.e2e_s, o.latency_s)))
        for o in good) / duration_s


def _statistics(name: str, values_s: Sequence[float],
                percentiles: Sequence[float]) -> dict[str, float]:
    """The mean of nothing is 0 there."""
    x = np.array(values_s if len(values_s) else [0.0])
    return {f"mean_{name}_ms": float(np.mean(x)) * 1000,
            f"median_{name}_ms": float(np.median(x)) * 1000,
            f"std_{name}_ms": float(np.std(x)) * 1000,
            **{f"p{int(p) if int(p) == p else p}_{name}_ms": float(np.percentile(x, p)) * 1000
               for p in percentiles}}


def _peaks(good: Sequence[Seen]) -> tuple[float, int]:
    """Most events of a second, counted from the first send, and most requests that lived in one."""
    if not good:
        return 0.0, 0
    first_s = min(o.start_s for o in good)
    n = math.ceil(max(o.start_s + o.latency_s for o in good) - first_s) + 1
    events, alive = np.zeros(n), np.zeros(n)
    for o in good:
        at = o.start_s + o.ttft_s
        for gap_s in (0.0, *o.itl_s):
            at += gap_s
            if 0 <= int(at - first_s) < n:
                events[int(at - first_s)] += 1
        alive[int(o.start_s - first_s):int(o.start_s + o.latency_s - first_s) + 1] += 1
    return float(events.max()), int(alive.max())


# ---------------------------------------------------------------------------------------- a leg


def result_of(run: Run, leg: Leg, records: Sequence[RequestRecord], when: datetime,
              options: Options) -> dict[str, Any] | None:
    """The file of one leg's sample; None if it has none that took any time."""
    sample = sorted(records, key=lambda r: (r.due_ns, r.shard, r.seq))
    began_ns = min((_start_ns(r) for r in sample), default=0)
    duration_s = (max((r.end_ns for r in sample), default=0) - began_ns) / 1e9
    if duration_s <= 0:
        return None
    closed = isinstance(leg.load, Closed)
    outputs = [seen(r, run.scenario.slo_of(r.cls), began_ns if closed else None) for r in sample]
    backend = "openai-chat" if run.scenario.endpoint == "chat" else "openai"
    found = {
        "date": when.strftime("%Y%m%d-%H%M%S"), "endpoint_type": backend, "backend": backend,
        "label": leg.id if len(run.legs) > 1 else None, "model_id": run.manifest.model,
        "tokenizer_id": run.manifest.model, "num_prompts": len(sample), **dict(options.metadata),
        **_traffic(leg), **figures(outputs, duration_s, options, closed)}
    left_out = () if options.save_detailed else DETAILS
    return {k: v for k, v in found.items() if k not in left_out}


def _traffic(leg: Leg) -> dict[str, Any]:
    """Its burstiness is the shape of gamma gaps, so that their variation is 1/√burstiness."""
    load = leg.load
    if not isinstance(load, Open):  # a trace has no rate either
        return {"request_rate": "inf", "burstiness": 1.0,
                "max_concurrency": load.concurrency if isinstance(load, Closed) else None}
    shape = {"poisson": 1.0, "constant": math.inf}.get(load.arrivals, 1 / load.cv**2)
    return {"request_rate": float(load.rate_rps), "burstiness": shape, "max_concurrency": None}


def _name(result: Mapping[str, Any]) -> str:
    """As `compute_result_filename` has it."""
    most = result["max_concurrency"]
    return (f"{result['label'] or result['backend']}-{result['request_rate']}qps"
            f"{'' if most is None else f'-concurrency{most}'}-"
            f"{result['model_id'].split('/')[-1]}-{result['date']}.json")


# ------------------------------------------------------------------------------------ the files


def export(run: Run, out: Path | None, options: Options) -> list[Exported]:
    """Writes a file for each leg, and of several ones summary.json, which `vllm bench sweep plot`
    reads. `out`: a folder, or for a run of one leg FILE.json. Raises ScenarioError, StoreError."""
    folder = run.folder.path / "vllm-bench" if out is None else out
    is_file = folder.suffix == ".json"
    if is_file and len(run.legs) != 1:
        raise ScenarioError(f"--out {folder}: this run has {len(run.legs)} levels, each of which "
                            "is a file; name a folder")
    done = []
    for (leg, window), records in _samples(run):
        result = result_of(run, leg, records, _when(run, window), options)
        if result is None:
            continue
        path = folder if is_file else folder / _name(result)
        write_file(path, json.dumps(result).encode())
        ours = [x for r in records if r.outcome in ENDED and (x := metrics.ttft_s(r)) is not None]
        done.append(Exported(path, {**result, "run_number": leg.replicate},
                             float(np.median(ours)) if ours else None))
    if len(run.legs) > 1:
        write_file(folder / "summary.json", json.dumps([x.result for x in done], indent=4).encode())
    return done


def _samples(run: Run) -> Iterator[tuple[tuple[Leg, Window], list[RequestRecord]]]:
    """One leg's whole records at a time."""
    where = journals.index(run.folder)
    for leg, window in run.legs:
        yield (leg, window), [r for stretch in where.get(leg.id, ())
                              for r in _records(run.folder, stretch) if is_due(window, r)]


def _records(folder: RunFolder, stretch: Stretch) -> Iterator[RequestRecord]:
    for line in lines(stretch):
        if not line.startswith(b'{"schema":') and (r := folder.decoded(line)) is not None:
            r.shift(stretch.shift_ns)
            yield r


def _when(run: Run, window: Window) -> datetime:
    """The leg's end on the wall clock, in the zone of the run; virtual time has only the run's."""
    created = datetime.fromisoformat(run.manifest.created)
    header = next(iter(run.folder.headers()), None)
    since_ns = (created.timestamp() * 1e9 if header is None or not header.wall_ns
                else header.wall_ns - header.mono_ns)
    return datetime.fromtimestamp((since_ns + window.end_ns) / 1e9, created.tzinfo)


NOTE = """\
The definitions in it are vLLM's, not ours: latencies count from the send, not from when a request \
was due; every event with choices is a token, an empty first one, too; percentiles are of the \
answers that came, cut ones among them, and failures are in no latency; throughput is until the \
last answer's end. Texts are not kept: generated_texts are empty."""


def says(done: Sequence[Exported]) -> Iterator[str]:
    """For the terminal."""
    for x in done:
        theirs, n = x.result.get("median_ttft_ms"), x.result["num_prompts"]
        ours = "" if x.due_ttft_s is None or theirs is None else (
            f", median TTFT {theirs:.1f} ms ({1000 * x.due_ttft_s:.1f} ms from when due)")
        yield f"{x.path}: {x.result['completed']} of {n} requests{ours}"
    yield NOTE if done else "No level of this run has a request: nothing was written."
