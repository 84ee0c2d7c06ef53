"""The rules by which a measurement is SUSPECT or INVALID: each with its threshold's reason and
what to do about it. The generator's own limit must never be reported as the server's."""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from loadgen import metrics
from loadgen.leg import Leg, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Open

Measurement = Literal["VALID", "SUSPECT", "INVALID"]

LATE_S = 0.005  # an open-loop start this late is felt against a TTFT of 100 ms …
LATE_OF_TTFT = 0.05  # … and a TTFT is not known better than its start
CPU_SUSPECT = 0.80  # of one core: above it queueing in the client grows without bound
CPU_INVALID = 0.97
LAG_SUSPECT_S = 0.020  # stamps are taken by the loop: its lag is in each of them
VOID_INVALID = 0.5  # a leg that lost half of its sample to host stalls is no measurement
PROMPT_OFF = 0.15  # prompts this far from the wanted length are another load …
PROMPT_OFF_TOK = 32  # … unless it is but a chat template's words


class Finding(Struct, frozen=True):
    """A rule that fired."""

    rule: str
    verdict: Literal["SUSPECT", "INVALID"]
    says: str
    remedy: str


def check(leg: Leg, window: Window, records: Sequence[RequestRecord], n_read: int,
          server_lag_frac: float | None = None, blind: bool = False) -> list[Finding]:
    """The rules that fire for a leg. `records`: those due in the window, voided ones left out;
    `n_read`: all of the leg's that were read; `server_lag_frac`: share of the simulator's steps
    that came more than 5 ms late; `blind`: the server's telemetry was lost in this window."""
    found = [*_starts(leg, records), *_host(window), *_tokens(records)]
    if window.records is not None and n_read < window.records:
        found.append(Finding(
            "records-lost", "INVALID", f"{window.records - n_read} of {window.records} records "
            "cannot be read: what is left is no sample", "look for the lines in records-*.jsonl"))
    if window.ending == "interrupted":
        found.append(Finding("interrupted", "SUSPECT", "the leg broke off; it is judged by what "
                             "was due before", "run it again"))
    if blind:
        found.append(Finding(
            "no-telemetry", "SUSPECT", "/metrics answered before, and not in this window: "
            "preemptions and a full KV cache would not have been seen", "see the server's log"))
    if server_lag_frac is not None and server_lag_frac > 0.05:
        found.append(Finding(
            "simulator-late", "SUSPECT",
            f"the simulator was late in {server_lag_frac:.0%} of its steps: its times are this "
            "host's, not the profile's", "give it a core of its own, or simulate a slower GPU"))
    return found


def verdict(findings: Sequence[Finding]) -> Measurement:
    kinds = {f.verdict for f in findings}
    return "INVALID" if "INVALID" in kinds else "SUSPECT" if kinds else "VALID"


def _starts(leg: Leg, records: Sequence[RequestRecord]) -> list[Finding]:
    found = []
    dropped = sum(r.outcome is Outcome.DROPPED for r in records)
    if dropped:
        why = next((r.error for r in records if r.outcome is Outcome.DROPPED), None)
        found.append(Finding(
            "dropped", "INVALID", f"the generator could not start {dropped} requests ({why})",
            "raise max_inflight or `ulimit -n`, or use more generator processes"))
    late = metrics.quantile((x for r in records if (x := metrics.lateness_s(r)) is not None), 0.99)
    ttft = metrics.quantile((x for r in records if (x := metrics.ttft_s(r)) is not None), 0.5)
    if late and ttft and late.value > max(LATE_S, LATE_OF_TTFT * ttft.value):
        open_loop = isinstance(leg.load, Open)
        found.append(Finding(
            "late-starts", "INVALID" if late.value > ttft.value else "SUSPECT",
            f"1 % of requests were sent {1000 * late.value:.0f} ms or more after they were due "
            f"(median TTFT {1000 * ttft.value:.0f} ms)",
            "more generator processes, a quieter host" + ("" if open_loop else
            "; a server that accepts connections slowly shows here as well")))
    return found


def _host(window: Window) -> list[Finding]:
    found = []
    if window.ending == "failed":
        found.append(Finding("generator-failed", "INVALID", window.note or "the generator failed",
                             "mend what it names; `loadgen doctor` checks this host"))
    if window.cpu_frac is not None and window.cpu_frac > CPU_SUSPECT:
        found.append(Finding(
            "generator-cpu", "INVALID" if window.cpu_frac > CPU_INVALID else "SUSPECT",
            f"a generator process used {window.cpu_frac:.0%} of its core",
            "use --processes, or a generator host of its own"))
    if window.lag_p99_s is not None and window.lag_p99_s > LAG_SUSPECT_S:
        found.append(Finding(
            "loop-lag", "SUSPECT", f"the generator's event loop was {1000 * window.lag_p99_s:.0f} "
            "ms behind at p99: stamps carry that error", "a quieter host, or --processes"))
    if stalls := _stalls(window):
        lost = sum(b - a for a, b in stalls) / 1e9
        length = max(window.to_ns - window.from_ns, 1) / 1e9
        found.append(Finding(
            "host-stall", "INVALID" if lost > VOID_INVALID * length else "SUSPECT",
            f"the generator's host stood still {len(stalls)} times, {lost:.1f} s in all; "
            "requests that lived through it are left out", "a host that is not shared"))
    return found


def _stalls(window: Window) -> list[tuple[int, int]]:
    """Stalls inside the measured window; what several shards saw at once is one stall."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(window.stalls):
        a, b = max(start, window.from_ns), min(end, window.to_ns)
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        elif a < b:
            merged.append((a, b))
    return merged


def _tokens(records: Sequence[RequestRecord]) -> list[Finding]:
    found = []
    ok = [r for r in records if r.outcome is Outcome.OK]
    by_event = sum(r.tok_source != "usage" for r in ok)
    if by_event:
        found.append(Finding(
            "no-usage", "SUSPECT", f"{by_event} of {len(ok)} answers came without usage: tokens "
            "were counted by events, of which one may hold several",
            "a server that honours stream_options.include_usage"))
    both = [(r.prompt_tok, r.want_prompt_tok) for r in ok if r.prompt_tok and r.want_prompt_tok]
    if both:
        off = sum(got for got, _ in both) / sum(want for _, want in both) - 1
        mean_off_tok = abs(sum(got - want for got, want in both)) / len(both)
        if abs(off) > PROMPT_OFF and mean_off_tok > PROMPT_OFF_TOK:
            found.append(Finding(
                "prompt-length", "SUSPECT", f"prompts were {off:+.0%} of the wanted tokens",
                "a server with /tokenize, or one that returns usage, lets them be calibrated"))
    return found
