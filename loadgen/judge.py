"""Pure: the records of one leg → measurement verdict and load verdict, with bounds and reasons.
Used by the running sweep and by the analysis alike, so that both say the same.

A leg's bounds are Clopper and Pearson's, of as many requests as its own are worth: requests of one
moment share their fate, so the sample is cut into blocks longer than an answer, whose spread says
by how much (`sequential.clumping`), and runs differ. What several legs of a level show together is
in `evidence`.

These bounds decide, and are not printed: near the limits one leg cannot show how unlike it the next
would be, so that no bound of a leg holds as often as it says (docs/method.md). A run is SAFE only
where, besides, it kept the limits by as much as runs differ in how near they come to them
(`worth`)."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from msgspec import Struct

from loadgen import balance, headroom, metrics, sequential, settle, validity, worth
from loadgen.balance import Balance, Counted
from loadgen.headroom import Calibration
from loadgen.leg import Leg, Phase, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Scenario
from loadgen.validity import Finding, Measurement

LoadVerdict = Literal["SAFE", "UNSAFE", "UNRESOLVED"]

PREEMPTED_FRAC = 0.01  # more preempted than this: KV cache thrash, a latency cliff to come
KV_FULL = 0.95  # KV cache use beyond this …
KV_FULL_FRAC = 0.05  # … in more than this share of samples
BLOCK_S = 2.0  # a block is at least so long, and as long as an answer takes
NOT_ERRORS = frozenset({Outcome.OK, Outcome.ABANDONED, Outcome.THROTTLED, Outcome.CANCELLED,
                        Outcome.DROPPED})  # the server's error share leaves out our own doings

CROWDED = 0.75  # of an answer: slots that all start in less than this crowd each other …
CROWDS = frozenset({"ttft", "e2e", "CANCELLED"})  # … and these misses may be the crowd's

STEADY = frozenset({"run", "refine", "confirm", "reference", "soak", "poisson"})  # must hold


class ServerSigns(Struct, frozen=True):
    """What the server said of itself during a window; None: it does not say."""

    preemptions: float | None = None  # in the window
    kv_full_frac: float | None = None  # share of samples with KV use > KV_FULL
    kv_max: float | None = None
    prefix_hit_frac: float | None = None
    running_mean: float | None = None
    waiting_mean: float | None = None
    queue_s: float | None = None  # mean of the requests that ended in the window: waited …
    prefill_s: float | None = None  # … until the first token …
    decode_s: float | None = None  # … until the last
    scrape_s: float | None = None  # that its /metrics took to answer, mean
    late_step_frac: float | None = None  # the simulator's own lag
    blind: bool = False  # it told before, and not in this window
    died: str | None = None
    counted: Counted = Counted()  # over the leg's whole life


class Criteria(Struct, frozen=True):
    """What "safe" asks for: attainment ≥ target at one-sided confidence. A search's legs are
    many: one of them refutes only at `refute`, so that all of a search together err no more
    often than one confirmation. `runs_differ`, `refutes_differ`: ρ of `sequential`, for the lower
    and the upper bound."""

    target: float = 0.95
    confidence: float = 0.95
    refute: float = 0.995
    runs_differ: float = sequential.RUNS_DIFFER
    refutes_differ: float = sequential.REFUTES_DIFFER
    calibration: Calibration | None = None  # of the generator; beyond it no measurement is sure


class Judgement(Struct, frozen=True):
    """The verdicts on one leg, and the few numbers that decide a sweep's next step."""

    leg: str
    value: float
    phase: Phase
    n: int  # requests in the sample: due in the window, not void
    good: int
    void: int
    lower: float  # one-sided bounds of attainment
    upper: float
    measurement: Measurement
    load: LoadVerdict
    reasons: list[str]
    findings: list[Finding]
    misses: dict[str, int]  # by outcome or broken limit; a request may break several
    outcomes: dict[str, int]
    errors: int
    error_lower: float  # lower bound of the server's error share
    classes: dict[str, tuple[int, int]]  # good, n
    refuted_classes: list[str]
    cut: bool
    died: bool
    window_s: float
    offered_rps: float
    achieved_rps: float
    goodput_rps: float
    ttft_p50_s: float | None
    tpot_p50_s: float | None
    e2e_p50_s: float | None
    answer_s: float | None  # mean E2E of all complete answers, the warm-up's too: for pacing
    balance: Balance = Balance()
    distress: bool = False  # of the server, beyond all latencies
    open_loop: bool = False
    blocks: list[tuple[int, int]] = []  # (good, n) of stretches of the window, in order
    strain: float | None = None  # the target's quantile of value over limit: over 1 it is missed
    settled_s: float | None = None  # since the leg's start; None: it never did, or too few to say
    rises: float | None = None  # by which factor its second half was worse, if there is a trend
    crowded: bool = False  # its slots started faster than they follow one another later …
    excused: bool = False  # … and but for that it would be UNSAFE
    each_session: float = 1.0  # requests due in the window for each session that began in it
    prompt_tok: int = 0  # of the requests that were due in the window
    near: bool = False  # a run that would be SAFE but for how near it came to the limits

    @property
    def attainment(self) -> float | None:
        return self.good / self.n if self.n else None


def sample_of(window: Window, records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """The records of a leg that are judged: due in the window and not void."""
    return [r for r in records if is_due(window, r) and not window.is_void(r.due_ns, r.end_ns)]


def is_due(window: Window, r: RequestRecord) -> bool:
    """The request was due in the window. Of a leg that was cut because it was lost, the warm-up
    counts as well: on those requests, too, it was left."""
    return (window.t0_ns if window.ending == "cut" else window.from_ns) <= r.due_ns < window.to_ns


def judge(leg: Leg, window: Window, records: Sequence[RequestRecord], signs: ServerSigns,
          scenario: Scenario, criteria: Criteria) -> Judgement:
    """`records`: all of the leg's."""
    sample = sample_of(window, records)
    due = sum(is_due(window, r) for r in records)
    slos = {c.name: scenario.slo_of(c.name) for c in scenario.classes}
    why = [metrics.misses(r, slos[r.cls]) for r in sample]
    n, good = len(sample), sum(not w for w in why)
    classes = {c: (sum(not w for r, w in zip(sample, why, strict=True) if r.cls == c),
                   sum(r.cls == c for r in sample)) for c in slos}
    answer_s = _mean_answer_s(records)
    blocks = _blocks(window, [(r.due_ns, not w) for r, w in zip(sample, why, strict=True)],
                     answer_s or 0.0)
    crowded = _is_crowded(leg, answer_s)
    spared = [not w or (crowded and CROWDS.issuperset(w)) for w in why]
    window_s = max(window.to_ns - window.from_ns, 1) / 1e9
    answers = max(1.0, window_s / answer_s) if answer_s else 1.0  # one after the other
    differ = (criteria.runs_differ, criteria.refutes_differ)
    lower_worth, upper_worth = worth.of(leg, answers, blocks, differ)
    sure = criteria.confidence if leg.phase == "run" else criteria.refute
    lower = metrics.lower_bound(good * lower_worth, n * lower_worth, criteria.confidence)
    upper = metrics.upper_bound(good * upper_worth, n * upper_worth, sure)
    errors = sum(r.outcome not in NOT_ERRORS for r in sample)
    books = balance.of(leg, window, sample, records, signs.counted, scenario.thinks)
    findings = validity.check(leg, window, sample, len(records), signs.late_step_frac, signs.blind,
                              books, headroom.beyond(records, criteria.calibration))
    findings += validity.repeats(scenario, records)
    findings += validity.early(leg, window, scenario, sample, records)
    if not leg.again:
        findings += validity.reuse(scenario, sample, signs.prefix_hit_frac, signs.preemptions,
                                   leg.load)
    distress = _distress(signs, n)
    at_most = metrics.upper_bound(sum(spared) * upper_worth, n * upper_worth, sure)
    each = 1 - (1 - sure) / len(classes)  # so that all classes together err as one test would
    refuted = []
    for c, (_, m) in classes.items():
        own = worth.of(leg, answers, blocks, differ, m)[1] if leg.phase == "run" else upper_worth
        kept = sum(ok for r, ok in zip(sample, spared, strict=True) if r.cls == c)
        if m and metrics.upper_bound(kept * own, m * own, each) < criteria.target:
            refuted.append(c)
    strains = sorted(((r.due_ns, x, is_due(window, r)) for r in records
                      if not window.is_void(r.due_ns, r.end_ns)
                      and (x := metrics.strain(r, slos[r.cls])) is not None), key=lambda x: x[0])
    inside = [x for _, x, due_inside in strains if due_inside]
    rises = settle.rises(inside) if leg.phase in STEADY else None
    strain = _strain(inside, criteria.target)
    near = leg.phase == "run" and strain is not None and (
        worth.kept_within(leg.load, answers) < strain < math.inf)
    load: LoadVerdict = "UNRESOLVED"
    if distress or refuted or at_most < criteria.target:
        load = "UNSAFE"
    elif lower >= criteria.target and rises is None and not near:
        load = "SAFE"
    near = near and load == "UNRESOLVED" and lower >= criteria.target and rises is None
    shares = [(metrics.share_inside(r, window.from_ns, window.to_ns), r) for r in records]
    return Judgement(
        leg=leg.id, value=leg.value, phase=leg.phase, n=n, good=good, void=due - n, lower=lower,
        upper=upper, measurement=validity.verdict(findings), load=load,
        reasons=distress + (_too_near(good, n, strain, criteria) if near and strain else _reasons(
            load, good, n, upper, criteria, refuted, rises, lower_worth, crowded)),
        findings=findings,
        misses=dict(Counter(x for w in why for x in w)),
        outcomes=dict(Counter(r.outcome.value for r in sample)), errors=errors,
        error_lower=metrics.lower_bound(errors, n, criteria.confidence), classes=classes,
        refuted_classes=refuted, cut=window.ending == "cut", died=signs.died is not None,
        window_s=window_s,
        offered_rps=sum(window.from_ns <= r.due_ns < window.to_ns for r in records) / window_s,
        achieved_rps=sum(share for share, _ in shares) / window_s,
        goodput_rps=sum(share for share, r in shares
                        if share and not metrics.misses(r, slos[r.cls])) / window_s,
        ttft_p50_s=_median(sample, metrics.ttft_s), tpot_p50_s=_median(sample, metrics.tpot_s),
        e2e_p50_s=_median(sample, metrics.e2e_s), answer_s=answer_s, balance=books,
        distress=bool(distress), open_loop=not isinstance(leg.load, Closed),
        blocks=blocks, strain=strain,
        settled_s=_settled_s(window, strains), rises=rises,
        crowded=crowded, excused=load != "UNSAFE" and upper < criteria.target, near=near,
        each_session=max(1.0, due / max(1, sum(is_due(window, r) and not r.turn for r in records))),
        prompt_tok=sum(r.want_prompt_tok or r.prompt_tok or 0 for r in sample))


def _is_crowded(leg: Leg, answer_s: float | None) -> bool:
    """A closed loop's slots start over the warm-up, and from then on as often as answers end. Of a
    search's leg whose warm-up was much shorter than an answer, TTFTs may be those of a crowd that
    its start made (and which never parts, where all answers are alike): it shows where to look,
    and refutes nothing by them."""
    return (leg.phase not in ("run", "unit") and isinstance(leg.load, Closed)
            and leg.load.concurrency > 1 and answer_s is not None
            and leg.warmup_s < CROWDED * answer_s)


def _blocks(window: Window, seen: Sequence[tuple[int, bool]],
            answer_s: float) -> list[tuple[int, int]]:
    """(good, n) of equal stretches of the time in which these were due."""
    if not seen:
        return []
    start, end = min(due_ns for due_ns, _ in seen), window.to_ns
    count = max(1, int((end - start) / 1e9 / max(BLOCK_S, answer_s)))
    good, n = [0] * count, [0] * count
    for due_ns, met in seen:
        i = min(count - 1, (due_ns - start) * count // max(1, end - start))
        good[i], n[i] = good[i] + met, n[i] + 1
    return [b for b in zip(good, n, strict=True) if b[1]]


def _strain(seen: Sequence[float], target: float) -> float | None:
    ordered = sorted(seen)
    return ordered[math.ceil(target * len(ordered)) - 1] if ordered else None


def _settled_s(window: Window, strains: Sequence[tuple[int, float, bool]]) -> float | None:
    """Of all the leg's requests, the warm-up's too."""
    finite = [(t, x) for t, x, _ in strains if x < math.inf]
    left_out = settle.mser([x for _, x in finite])
    return None if left_out is None else max(0.0, (finite[left_out][0] - window.t0_ns) / 1e9)


def _mean_answer_s(records: Sequence[RequestRecord]) -> float | None:
    took = [x for r in records if (x := metrics.e2e_s(r)) is not None]
    return sum(took) / len(took) if took else None


def _median(sample: Sequence[RequestRecord],
            of: Callable[[RequestRecord], float | None]) -> float | None:
    cut_off = [age for r in sample if of(r) is None and (age := metrics.age_s(r)) is not None]
    found = metrics.quantile((x for r in sample if (x := of(r)) is not None), 0.5, cut_off)
    return found.value if found else None


def _distress(signs: ServerSigns, n: int) -> list[str]:
    """Hard conditions of the server: any of them makes a level unsafe, whatever the latencies."""
    found = []
    if signs.died is not None:
        found.append(f"the server died: {signs.died}")
    if signs.preemptions and signs.preemptions > PREEMPTED_FRAC * max(n, 1):
        found.append(f"{signs.preemptions:.0f} preemptions for {n} requests: the KV cache is "
                     "too small for this load")
    if signs.kv_full_frac is not None and signs.kv_full_frac > KV_FULL_FRAC:
        found.append(f"KV cache over {100 * KV_FULL:g} % full in {100 * signs.kv_full_frac:.0f} % "
                     "of samples")
    return found


def _too_near(good: int, n: int, strain: float, criteria: Criteria) -> list[str]:
    return [f"{good} of {n} requests met the SLO, but {100 * (1 - criteria.target):.3g} % came to "
            f"{100 * strain:.0f} % of a limit or more: another run may well miss it"]


def _reasons(load: LoadVerdict, good: int, n: int, upper: float, criteria: Criteria,
             refuted: list[str], rises: float | None, lower_worth: float,
             crowded: bool) -> list[str]:
    share = f"{good} of {n} requests met the SLO"
    if n == 0:
        return ["no request was due in the window"]
    if load == "UNSAFE" and upper < criteria.target:
        return [f"{share}: surely less than {100 * criteria.target:g} %"]
    if refuted:
        return [f"{share}, but of class {', '.join(refuted)} surely less than "
                f"{100 * criteria.target:g} %"]
    if crowded and upper < criteria.target:
        return [f"{share}, after a start so short that prompts crowded each other: no evidence "
                "against the level"]
    if rises is not None:
        return [f"{share}, but the level does not hold: its second half came {rises:.2f} times as "
                "near to the limits as its first"]
    if load == "UNRESOLVED":
        more = metrics.needed_n(criteria.target, (n - good) / n, criteria.confidence)
        more = math.ceil(more / lower_worth) if more else None
        hint = f"; {more - n} more at this share would" if more and more > n else ""
        return [f"{share}: too few to show {100 * criteria.target:g} %{hint}"]
    return [share]
