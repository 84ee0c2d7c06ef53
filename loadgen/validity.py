"""The rules by which a measurement is SUSPECT or INVALID: each with its threshold's reason and
what to do about it. The generator's own limit must never be reported as the server's."""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from loadgen import metrics, turns
from loadgen.balance import Balance, Tally, lingered, own_lateness_s, stalls_inside
from loadgen.headroom import Share, rounded
from loadgen.leg import Health, Leg, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Load, Scenario, Trace
from loadgen.sources import shared_tok

Measurement = Literal["VALID", "SUSPECT", "INVALID"]

LATE_S = 0.005  # an open-loop start this late is felt against a TTFT of 100 ms …
LATE_OF_TTFT = 0.05  # … and a TTFT is not known better than its start
CPU_SUSPECT = 0.80  # of one core: above it queueing in the client grows without bound
CPU_INVALID = 0.97
LAG_SUSPECT_S = 0.020  # stamps are taken by the loop: its lag is in each of them …
LAG_OF_ANSWER = 0.05  # … unless they are the kernel's: then it only delays a slot's next request
RUN_QUEUE_SUSPECT = 0.10  # at one instant in ten it wanted a core and had none: p90 holds it …
RUN_QUEUE_INVALID = 0.50  # … and here it waits more than it works: the median does
RUN_QUEUE_S = 0.0005  # each time: on a free core it is 0.1 ms, which delays nothing however often
GC_SUSPECT = 0.01  # of the time: from here on p99 meets a pause …
GC_PAUSE_S = 0.005  # … if that is one that can be felt; short ones are but CPU
FDS_SUSPECT = 0.90  # of the limit: a burst of a tenth more connections would be dropped
FULL_READS_SUSPECT = 0.001  # a full read holds hundreds of events: at one in a thousand reads, one
# event in five shares its stamp with strangers …
FULL_READS_INVALID = 0.10  # … and here the client does not keep up, and its window slows the server
RCVBUF_SUSPECT = 65536  # the kernel books ~1 KiB for an event: one second of a stream at 60/s
BEGUN_SUSPECT = 0.02  # of the starts: more than this lost, and it is another load than asked for …
BEGUN_INVALID = 0.10  # … one that is nearer to another level
BEGUN_EDGE = 3  # starts that may fall to the other side of the window's edges
EMPTY_SUSPECT = 0.05  # of the slots: 32 that are 30.4 are still 32 …
EMPTY_INVALID = 0.20  # … here a ladder's next finer step (2^¼) begins
EMPTY_S = 0.005  # between two requests: answers of 20 ms leave a slot empty for a while, always
CONNECT_S = 0.010  # to connect takes a round trip, and a busy server's loop a few ms to accept …
CONNECT_OF_TTFT = 0.10  # … more than that, and a tenth of TTFT is not the engine's
FOREIGN_SUSPECT = 0.02  # of our requests: others as many as this are seen in no latency yet …
FOREIGN_INVALID = 0.20  # … these are another load
FOREIGN_N = 3  # a health check, a retry that we did not see
TOKENS_OFF = 0.02  # what throughput and TPOT are known to, at best
REUSED_SUSPECT = 0.05  # of the prompts' tokens, more than the scenario declares: a twentieth of …
REUSED_INVALID = 0.10  # … a tenth of the prefill was not done, and TTFT and throughput flatter
REUSED_TOK = 64  # a chat template's words, in whole blocks, are the same in every prompt
REPEATED_SUSPECT = 0.05  # of the prompts, for the same reason
FIRST_TURNS = 0.8  # of the way to the turns of whole sessions: a window of one session, from a
# start in step, comes to about that, and histories are that much shorter
REUSED_LITTLE = 0.5  # of what is declared: the cache is off, or too small for the load
CLOCK_SUSPECT_S = 0.010  # a worker's clock against the master's: curves are joined by it
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
          server_lag_frac: float | None = None, blind: bool = False,
          books: Balance | None = None, over: Share | None = None) -> list[Finding]:
    """The rules that fire for a leg. `records`: those due in the window, voided ones left out;
    `n_read`: all of the leg's that were read; `server_lag_frac`: share of the simulator's steps
    that came more than 5 ms late; `blind`: the server's telemetry was lost in this window;
    `books`: what must add up; `over`: what was more than the generator is calibrated for."""
    found = [*_starts(leg, records), *_host(leg, window, records), *_shards(window),
             *_tokens(records)]
    if books is not None:
        found += [*_reads(window, books), *_load(leg, books, records), *_counts(books)]
    found += _beyond(over)
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
    lates = [x for r in records if (x := own_lateness_s(r)) is not None]
    late = metrics.quantile(lates, 0.99)
    ttft_s = _median_ttft_s(records)
    if late and ttft_s and late.value > max(LATE_S, LATE_OF_TTFT * ttft_s):
        lost = late.value > ttft_s and sum(x > ttft_s for x in lates) > 1  # one is an accident
        found.append(Finding(
            "late-starts", "INVALID" if lost else "SUSPECT",
            f"1 % of requests were sent {1000 * late.value:.0f} ms or more after they were due, "
            f"by the generator's fault (median TTFT {1000 * ttft_s:.0f} ms)",
            "more generator processes, a quieter host"))
    return found


def _median_ttft_s(records: Sequence[RequestRecord]) -> float | None:
    found = metrics.quantile((x for r in records if (x := metrics.ttft_s(r)) is not None), 0.5)
    return found.value if found else None


# ------------------------------------------------------------------------- generator and host


def _host(leg: Leg, window: Window, records: Sequence[RequestRecord]) -> list[Finding]:
    found = []
    if window.ending == "failed":
        found.append(Finding("generator-failed", "INVALID", window.note or "the generator failed",
                             "mend what it names; `loadgen doctor` checks this host"))
    if window.cpu_frac is not None and window.cpu_frac > CPU_SUSPECT:
        found.append(Finding(
            "generator-cpu", "INVALID" if window.cpu_frac > CPU_INVALID else "SUSPECT",
            f"a generator process used {window.cpu_frac:.0%} of its core",
            "use --processes, or a generator host of its own"))
    found += _lag(leg, window, records)
    if stalls := stalls_inside(window):
        lost = sum(b - a for a, b in stalls) / 1e9
        length = max(window.to_ns - window.from_ns, 1) / 1e9
        found.append(Finding(
            "host-stall", "INVALID" if lost > VOID_INVALID * length else "SUSPECT",
            f"the generator's host stood still {len(stalls)} times, {lost:.1f} s in all; "
            "requests that lived through it are left out", "a host that is not shared"))
    return found


def _lag(leg: Leg, window: Window, records: Sequence[RequestRecord]) -> list[Finding]:
    """Where all stamps are the kernel's, an open loop's lag is in its lateness and nowhere else."""
    lag_s, remedy = window.lag_p99_s, "a quieter host, or --processes"
    if lag_s is None or lag_s <= LAG_SUSPECT_S:
        return []
    behind = f"the generator's event loop was {1000 * lag_s:.0f} ms behind at p99: "
    if not records or any(r.stamp_kind != "kernel" and r.first_ns is not None for r in records):
        return [Finding("loop-lag", "SUSPECT", behind + "stamps carry that error", remedy)]
    answer = metrics.quantile((x for r in records if (x := metrics.e2e_s(r)) is not None), 0.5)
    if not isinstance(leg.load, Closed) or answer is None or lag_s <= LAG_OF_ANSWER * answer.value:
        return []
    return [Finding("loop-lag", "SUSPECT", behind + "stamps are the kernel's and do not carry it, "
                    "but a slot's next request went out that much later", remedy)]


def _shards(window: Window) -> list[Finding]:
    """Of each rule, the process that is worst off."""
    found = []
    waits = [(h.run_queue_frac, h) for h in window.shards if h.run_queue_frac is not None
             and h.run_queue_each_s is not None and h.run_queue_each_s > RUN_QUEUE_S]
    if waits and (worst := max(waits, key=lambda x: x[0]))[0] > RUN_QUEUE_SUSPECT:
        found.append(Finding(
            "run-queue", "INVALID" if worst[0] > RUN_QUEUE_INVALID else "SUSPECT",
            f"{_process(worst[1])} was ready to run and had no core for {worst[0]:.0%} of the "
            f"time, {1000 * (worst[1].run_queue_each_s or 0):.2g} ms each time",
            "end what else runs on this host, or give the generator cores of its own (taskset)"))
    life_s = max(window.end_ns - window.t0_ns, 1) / 1e9
    paused = max(window.shards, key=lambda h: h.gc_pause_s, default=None)
    if paused and paused.gc_pause_s > GC_SUSPECT * life_s and paused.gc_pause_max_s > GC_PAUSE_S:
        found.append(Finding(
            "gc-pauses", "SUSPECT", f"Python's garbage collector held {_process(paused)} up for "
            f"{paused.gc_pause_s:.2f} s in all, {1000 * paused.gc_pause_max_s:.0f} ms at a time",
            "`loadgen run` switches it off in a leg; in a locustfile: gc.freeze(), gc.disable()"))
    full = [h for h in window.shards
            if h.fds is not None and h.fd_limit and h.fds > FDS_SUSPECT * h.fd_limit]
    if full:
        found.append(Finding(
            "fd-limit", "SUSPECT", f"{_process(full[0])} had {full[0].fds} of {full[0].fd_limit} "
            "descriptors open: a few connections more would be dropped",
            "raise `ulimit -n` (its hard limit, too), or use more generator processes"))
    errors_s = [h.clock_error_s for h in window.shards if h.clock_error_s is not None]
    if errors_s and max(errors_s) > CLOCK_SUSPECT_S:
        found.append(Finding(
            "clock-error", "SUSPECT", f"a worker's clock is known to {1000 * max(errors_s):.0f} ms "
            "only: what its requests add to curves over time may be off by that (latencies are "
            "not: each is of one clock)", "a shorter way between master and workers"))
    return found


def _reads(window: Window, books: Balance) -> list[Finding]:
    found = []
    full, some = sum(h.full_reads for h in window.shards), books.reads
    if some and full > FULL_READS_SUSPECT * some:
        found.append(Finding(
            "read-behind", "INVALID" if full > FULL_READS_INVALID * some else "SUSPECT",
            f"{full} reads filled the whole read buffer, where {some} brought an event: the client "
            "was behind, and events that came one by one share a stamp",
            "use --processes, or a generator host of its own"))
    small = [h.rcvbuf_bytes for h in window.shards if h.rcvbuf_bytes is not None]
    if small and min(small) < RCVBUF_SUSPECT:
        found.append(Finding(
            "receive-buffer", "SUSPECT", f"a connection's receive buffer was {min(small)} bytes: "
            "once it is full the server waits for the client",
            f"raise net.ipv4.tcp_rmem: its middle number to {RCVBUF_SUSPECT} or more"))
    if held := lingered(window):
        found.append(Finding(
            "held-open", "SUSPECT", f"of {held} answers the server kept the body open after "
            "[DONE]: each took its slot up to a second longer, and fewer requests were sent",
            "a server or proxy that ends the body when the answer has ended"))
    return found


def _process(h: Health) -> str:
    return f"generator process {h.shard}"


# --------------------------------------------------------------------------------- what adds up


def _load(leg: Leg, books: Balance, records: Sequence[RequestRecord]) -> list[Finding]:
    """The load that was asked for was there, and the generator knew what it had in flight."""
    found = []
    if books.asked and books.begun is not None:
        lost = books.asked - books.begun
        if lost > max(BEGUN_EDGE, BEGUN_SUSPECT * books.asked):
            found.append(Finding(
                "achieved-rate", "INVALID" if lost > max(BEGUN_EDGE, BEGUN_INVALID * books.asked)
                else "SUSPECT", f"{books.begun} of {books.asked:.0f} requests were sent in the "
                "window they were due in: the load was less than asked for",
                "use --processes, a generator host of its own, or ask for less"))
    if books.slots_frac is not None and books.turnaround_s is not None and (
            books.turnaround_s > EMPTY_S and books.slots_frac < 1 - EMPTY_SUSPECT):
        found.append(Finding(
            "slots-empty", "INVALID" if books.slots_frac < 1 - EMPTY_INVALID else "SUSPECT",
            f"only {books.inflight_mean:.3g} requests were in flight where {leg.value:g} were "
            f"asked for: after an answer the generator took {1000 * books.turnaround_s:.0f} ms "
            "to send the next request", "use --processes, or a quieter host"))
    if books.little_residual is not None and books.little_tolerance is not None and (
            abs(books.little_residual) > books.little_tolerance):
        found.append(Finding(
            "littles-law", "SUSPECT", "what the generator counted in flight is "
            f"{books.little_residual:+.1%} off what its records add up to "
            f"({books.little_tolerance:.1%} may be chance): it noticed ends late, or records are "
            "missing",
            "a quieter host, or --processes; if that does not mend it, tell us"))
    wait, ttft_s = books.connect_p99_s, _median_ttft_s(records)
    if wait and ttft_s and wait > max(CONNECT_S, CONNECT_OF_TTFT * ttft_s):
        found.append(Finding(
            "connect-wait", "SUSPECT", f"1 % of requests waited {1000 * wait:.0f} ms or more for a "
            f"connection, which is part of their TTFT ({books.connect_frac:.0%} opened one)",
            "a server or proxy that accepts quickly and keeps connections open (keep-alive), a "
            "longer listen queue (net.core.somaxconn)"))
    return found


def _counts(books: Balance) -> list[Finding]:
    """The server's counters against the records."""
    found = []
    asked = books.requests
    others = asked.server - asked.most if asked else 0.0
    if asked and others > max(FOREIGN_N, FOREIGN_SUSPECT * asked.most):
        return [Finding(
            "foreign-load", "INVALID" if others > max(FOREIGN_N, FOREIGN_INVALID * asked.most)
            else "SUSPECT", f"the server finished {asked.server:.0f} requests, of which only "
            f"{asked.most:.0f} are ours: somebody else loads it",
            "have the server to yourself; other tenants' requests are part of every latency")]
    off = [(name, tally) for name, tally in (("prompt", books.prompt_tok),
                                             ("output", books.output_tok)) if _is_off(tally)]
    if off:
        says = " and ".join(f"{t.server:.0f} {name} tokens where its answers say {_ours(t)}"
                            for name, t in off if t)
        found.append(Finding(
            "token-count", "SUSPECT", f"the server's /metrics count {says}",
            "one of them misses something: several server processes with a /metrics each, "
            "answers without usage, a proxy that changes them"))
    return found


def _is_off(tally: Tally | None) -> bool:
    return tally is not None and tally.ratio is not None and abs(tally.ratio - 1) > TOKENS_OFF


def _ours(tally: Tally) -> str:
    low, high = f"{tally.least:.0f}", f"{tally.most:.0f}"
    return low if low == high else f"{low} to {high}"


def reuse(mix: Scenario, records: Sequence[RequestRecord], hit_frac: float | None,
          preemptions: float | None, load: Load | None = None) -> list[Finding]:
    """What the server's prefix cache held of the prompts, against what the scenario, or the blocks
    of a trace, declare they share. Prompts of later turns hold the earlier ones, prompts of a
    dataset what they happen to share, those with tools all the same tools, and a request that was
    preempted finds its own again: then there is nothing to hold it against."""
    sent = [r for r in records if r.first_ns is not None]
    prompt_tok = sum(r.prompt_tok or r.want_prompt_tok or 0 for r in sent)
    given = {c.name for c in mix.classes if c.dataset is not None or c.kind == "tools"}
    if hit_frac is None or not prompt_tok or preemptions or any(
            r.turn or r.cls in given for r in sent):
        return []
    shared = {c.name: c.shared_prefix.tokens for c in mix.classes if c.shared_prefix}
    if isinstance(load, Trace) and load.asked:
        before_tok = shared_tok(load.asked)
        declared = sum(before_tok[r.session] for r in sent) / prompt_tok
    else:
        declared = sum(shared.get(r.cls, 0) for r in sent) / prompt_tok
    over = hit_frac - declared - REUSED_TOK * len(sent) / prompt_tok
    if over > REUSED_SUSPECT:
        return [Finding(
            "prompts-reused", "INVALID" if over > REUSED_INVALID else "SUSPECT",
            f"the server had {hit_frac:.0%} of the prompts' tokens in its prefix cache, where the "
            f"scenario shares {declared:.0%}: they were sent to it before",
            "another --seed than the last run's, or a server without prefix caching")]
    if declared > REUSED_INVALID and hit_frac < REUSED_LITTLE * declared:
        return [Finding(
            "prefix-not-reused", "SUSPECT",
            f"the server had {hit_frac:.0%} of the prompts' tokens in its prefix cache, where the "
            f"scenario shares {declared:.0%}",
            "switch prefix caching on; or its KV cache does not hold the prefixes at this load")]
    return []


def repeats(mix: Scenario, records: Sequence[RequestRecord]) -> list[Finding]:
    """Sessions of a class that were more than its dataset has entries: they were sent again.
    `records`: all of the leg's."""
    found = []
    for c in mix.classes:
        entries = c.dataset.entries if c.dataset is not None else None
        sent = sum(r.cls == c.name and r.turn == 0 and r.outcome is not Outcome.DROPPED
                   for r in records)
        if entries is not None and sent - entries > REPEATED_SUSPECT * sent:
            found.append(Finding(
                "dataset-repeated", "SUSPECT",
                f"{sent - entries} of {sent} prompts of class {c.name} were sent a second time or "
                f"more: its dataset has {entries} entries. A prefix cache holds them then, and "
                "TTFT and throughput flatter", "a larger file, fewer requests, or a server "
                "without prefix caching"))
    return found


def early(leg: Leg, window: Window, mix: Scenario, sample: Sequence[RequestRecord],
          records: Sequence[RequestRecord]) -> list[Finding]:
    """Users of the window had not come as far into their sessions as users come. Where so many
    sessions were asked for, all are whole; what broke off is told as such. `records`: all of the
    leg's."""
    if leg.num_sessions is not None or window.ending != "done":
        return []
    least = min(turns.of(mix, sample, records), key=lambda d: d.frac, default=None)
    if least is None:
        return []
    length_s, whole_s = ((window.to_ns - x) / 1e9 for x in (window.from_ns, window.t0_ns))
    nobody_ended = (least.session_s or 0.0) > whole_s and least.seen < least.whole
    if least.frac >= FIRST_TURNS and not nobody_ended:
        return []
    each = (f"about {least.session_s:.2g} s" if least.session_s is not None else
            "longer than all of the leg")
    return [Finding(
        "first-turns", "SUSPECT", f"requests of class {least.cls} were turn no. {least.seen:.1f} "
        f"of their sessions in the mean, and of whole sessions it is no. {least.whole:.1f}: the "
        f"window of {length_s:.3g} s saw mostly early turns, whose prompts are the shortest (a "
        f"session takes {each})", "--duration and --warmup of several sessions each, or "
        "--num-prompts, which counts whole sessions; of a search, more --budget")]


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


def _beyond(over: Share | None) -> list[Finding]:
    """A limit that the calibration met with this very generator, on this host."""
    if over is None:
        return []
    return [Finding(
        "beyond-calibration", "SUSPECT",
        f"a generator process had up to {rounded(over.peak_per_s)} {over.unit}/s, and this host "
        f"was calibrated for {rounded(over.calibrated_per_s)}/s: {over.used_frac:.0%}",
        "more --processes; or, if it was calibrated while it was busy, `loadgen doctor "
        "--calibrate` once more")]
