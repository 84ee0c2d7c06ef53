"""What the legs of a search show: of one level, of the edge between safe and unsafe, of all. The
same from a running sweep and from a run folder; what to do next is the ramp's affair.

The estimand: the largest level c such that A(c) ≥ target, and no tested level below contradicts it.
A(c) is the share of good requests over runs at c: every SLO of its class met from the due time on,
complete; all that was due is in the denominator. Besides, no distress of the server.

Only confirmations, a soak and a recovery prove: their requests are fresh, while the ladder's and
the refinement's chose the level. They prove together, by a bound that holds whenever one looks
(`sequential`). Any leg at a level may refute it, alone, at the higher confidence `refute`; a leg
that crowded its own start (`judge`) only says where to look. Where a soak failed, short legs prove
nothing any more: each level needs its own (`soaks`).
"""

import itertools
import math
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from loadgen import metrics, sequential, soaks
from loadgen.judge import Criteria, Judgement, LoadVerdict
from loadgen.leg import Axis, Phase

PROVES: frozenset[Phase] = frozenset({"confirm", "soak", "recover"})
SHORT: frozenset[Phase] = frozenset({"ladder", "refine", "confirm", "reference"})
OF_LEVEL: frozenset[Phase] = PROVES | SHORT  # same load, same arrivals
ELSEWHERE: frozenset[Phase] = frozenset({"reference", "overload"})  # not at the safe level
CHECKS: tuple[Phase, ...] = ("reference", "soak", "poisson", "burst", "overload", "recover")
LUCK = 0.1  # a level further under the target than this is not confirmed, however few it rests on
STRAIN_N = 3  # requests below which their quantile does not guide a search
# Of the logarithm of `strain` between runs on the simulator: its standard deviation, and how many
# of them its mean keeps under the limits. Open legs whose work is known are evened and differ less.
CLOSED, OPEN, EVENED = (0.015, 1.0), (0.17, 1.25), (0.13, 1.65)  # by trial: docs/method.md
WORK = 0.6  # a leg of w times the prompt tokens comes w**WORK as near its limits: on the simulator
SPREAD_LEGS = 3.0
DRIFT = 1.15  # medians of two legs of a level: replicates are within 1.05 of each other
DRIFT_TTFT = 1.5  # those of TTFT hang on who comes together
DRIFT_N = 20


class Pooled(Struct, frozen=True):
    """What the confirmations of one level show together; `legs` runs, worth n / `design`
    independent requests. `more_n`: how many more at this share would prove it."""

    value: float
    good: int
    n: int
    lower: float
    upper: float
    load: LoadVerdict
    legs: int = 1
    design: float = 1.0
    more_n: int | None = None
    more_s: float | None = None


class Check(Struct, frozen=True):
    """Something that was tried at the safe level beside the steady load that proved it."""

    kind: Phase
    load: LoadVerdict
    good: int
    n: int
    held_s: float
    recovery_s: float | None = None  # after the overload: until it was as before
    value: float = 0.0  # the level, or whose throughput came as open arrivals …
    offered_rps: float = 0.0  # … and that is so many per second
    held: bool = False  # its share was at the target, and stayed there


class Conclusion(Struct, frozen=True):
    """The sweep's answer. `safe`: largest safe level; `unsafe`: smallest unsafe one; `missed`: the
    smallest level (above `safe`, if there is one) that missed the target without being surely
    unsafe; `at_least`: nothing above `safe` did either; `soak_failed`: the lowest level whose short
    runs held and whose long one did not, so that no level counts that was not soaked; `doubts`:
    what weakens it (drift, attainment that is not monotone); `near`: levels above that kept their
    limits by too little to count on it again; `more_s`: so much more load would settle an
    UNRESOLVED; `not_tried`: checks that the budget did not hold."""

    axis: Axis
    load: LoadVerdict
    safe: float | None
    unsafe: float | None
    at_least: bool
    proof: Pooled | None
    suspect: bool
    reasons: list[str]
    target: float
    confidence: float
    doubts: list[str] = []
    near: list[float] = []
    checks: list[Check] = []
    not_tried: list[Phase] = []
    more_s: float | None = None
    missed: float | None = None
    soak_failed: float | None = None


def usable(judged: Sequence[Judgement]) -> list[Judgement]:
    """What counts, with `strain` as it would be if no leg had been lucky in what came."""
    return evened([j for j in judged if j.measurement != "INVALID" or j.died])


def evened(legs: Sequence[Judgement]) -> list[Judgement]:
    """Half a minute of Poisson arrivals holds a tenth more or fewer requests than its rate says,
    and of a mix's long prompts a quarter. How near a leg came to its limits hangs on that, and its
    rate does not; so it is brought to what its rate stands for, by the mean of all open legs."""
    told = [j for j in legs if _tells_work(j)]
    n = sum(j.n for j in told)
    each_tok = sum(j.prompt_tok for j in told) / n if n else 0.0
    return [msgspec.structs.replace(j, strain=j.strain * (
        j.value * j.window_s * each_tok / j.prompt_tok) ** WORK)
            if j.strain and _tells_work(j) else j for j in legs]


def _tells_work(j: Judgement) -> bool:
    return j.open_loop and j.phase in OF_LEVEL and j.prompt_tok > 0 and not j.cut


def pooled(judged: Sequence[Judgement], level: float, criteria: Criteria) -> Pooled | None:
    """Confirmations of `level` taken together; None: it was not confirmed yet."""
    legs = _proving(judged, level)
    if not legs:
        return None
    seen = sequential.share([_blocks(j) for j in legs], criteria.target, criteria.confidence,
                            criteria.runs_differ, (criteria.refute, criteria.refutes_differ))
    load: LoadVerdict = "UNRESOLVED"
    if seen.upper < criteria.target or any(contradicts(j, criteria) for j in legs):
        load = "UNSAFE"
    elif (seen.lower >= criteria.target and has_margin(legs) and not any(j.rises for j in legs)
          and not soaks.is_lost(judged, level, criteria)
          and (soaks.is_held(judged, level, criteria) or not soaks.failed(judged, criteria))):
        load = "SAFE"
    more_n = more_s = None
    if load == "UNRESOLVED":
        more_n = sequential.more_n(seen, criteria.target, criteria.confidence)
        rps = sum(j.n for j in legs) / max(sum(j.window_s for j in legs), 1e-9)
        more_s = more_n / rps if more_n is not None and rps > 0 else None
    return Pooled(level, seen.good, seen.n, seen.lower, seen.upper, load, len(legs), seen.design,
                  more_n, more_s)


def _proving(judged: Sequence[Judgement], level: float) -> list[Judgement]:
    return [j for j in judged if j.value == level and j.phase in PROVES
            and j.measurement != "INVALID" and not (j.phase == "recover" and j.crowded)]


def has_margin(legs: Sequence[Judgement], in_the_end: bool = False) -> bool:
    """The limits are kept by as much as runs differ in how near they come to them. Near its
    capacity an open loop's queue makes one run of half a minute perfect and the next one a loss, so
    that a share of good requests says little. The spread is that between runs on the simulator;
    what the replicates show is weighed against it. `in_the_end`: after many more legs like
    these."""
    told = [(math.log(j.strain), j.open_loop) for j in legs if j.strain]
    if not told or any(x == math.inf for x, _ in told):
        return True  # failed requests are more than the target allows: the share itself says so
    r = len(told)
    mean = sum(x for x, _ in told) / r
    spread, margin = CLOSED
    if told[0][1]:
        spread, margin = EVENED if all(j.prompt_tok for j in legs) else OPEN
    variance = (SPREAD_LEGS * spread**2 + sum((x - mean) ** 2 for x, _ in told)) / (
        SPREAD_LEGS + r - 1)
    return mean + margin * math.sqrt(variance * (1 + (0 if in_the_end else 1 / r))) <= 0


def contradicts(j: Judgement, criteria: Criteria) -> bool:
    """This leg alone shows that its level is not safe. Of a confirmation only distress and a
    refuted class do: its share counts together with the others of its level, as one bad run in
    twenty is no surprise."""
    if j.died or j.load != "UNSAFE" or j.phase not in OF_LEVEL:
        return j.died
    return (j.phase not in PROVES or j.distress or bool(j.refuted_classes)
            or j.upper >= criteria.target)


def _blocks(j: Judgement) -> sequential.Blocks:
    return j.blocks or [(j.good, j.n)]


def status(judged: Sequence[Judgement], level: float, criteria: Criteria) -> LoadVerdict:
    """What all legs of a level say: UNSAFE if one of them does, or the server died at it, or its
    confirmations taken together refute it; SAFE only by its confirmations."""
    if any(contradicts(j, criteria) for j in judged if j.value == level):
        return "UNSAFE"
    proof = pooled(judged, level, criteria)
    return proof.load if proof is not None else "UNRESOLVED"


def levels_of(judged: Sequence[Judgement]) -> list[float]:
    """That were tested as such, ascending."""
    return sorted({j.value for j in judged if j.phase in OF_LEVEL or j.died})


def promising(judged: Sequence[Judgement], criteria: Criteria) -> list[float]:
    """Levels that may be safe and look so, ascending: neither they nor lower ones are
    contradicted."""
    return [x for x in _open(judged, criteria) if looks_good(judged, x, criteria)]


def candidate(judged: Sequence[Judgement], criteria: Criteria) -> float | None:
    """The level that is the answer's best hope: the largest promising one; if none is, the lowest
    that is not contradicted."""
    not_contradicted = _open(judged, criteria)
    good = [x for x in not_contradicted if looks_good(judged, x, criteria)]
    return max(good, default=min(not_contradicted, default=None))


def _open(judged: Sequence[Judgement], criteria: Criteria) -> list[float]:
    found = []
    for level in levels_of(judged):
        if status(judged, level, criteria) == "UNSAFE":
            break
        found.append(level)
    return found


def proven(judged: Sequence[Judgement], criteria: Criteria) -> float | None:
    """The largest level that is SAFE and that no lower one contradicts."""
    return max((x for x in _open(judged, criteria) if status(judged, x, criteria) == "SAFE"),
               default=None)


def looks_good(judged: Sequence[Judgement], level: float, criteria: Criteria) -> bool:
    """Its share of good requests is at the target, or one miss under it, which with so few is
    luck. Confirmations, where there are any, speak alone."""
    legs = [j for j in judged if j.value == level and j.measurement != "INVALID"
            and j.phase in OF_LEVEL]
    confirmed = _proving(legs, level)
    if soaks.is_lost(legs, level, criteria):
        return False
    legs = [j for j in legs if not j.crowded] or legs
    if any(j.rises for j in confirmed) or not has_margin(confirmed, in_the_end=True):
        return False
    good, n = (sum(j.good for j in confirmed or legs), sum(j.n for j in confirmed or legs))
    return n > 0 and good / n >= criteria.target - LUCK and good + 1 >= criteria.target * n


def has_missed(judged: Sequence[Judgement], level: float, criteria: Criteria) -> bool:
    """So many requests of it missed that it does not look good, or a soak of it did not hold."""
    here = [j for j in judged if j.value == level and j.phase in OF_LEVEL]
    return sum(j.n for j in here) > 0 and (status(judged, level, criteria) == "UNSAFE" or (
        not looks_good(judged, level, criteria) and (
            soaks.is_lost(judged, level, criteria) or sum(j.good for j in here) + 1
            < criteria.target * sum(j.n for j in here))))


def strain(judged: Sequence[Judgement], level: float) -> float | None:
    """How near the limits came at a level, by the leg of most requests; None: they do not tell."""
    here = [j for j in judged if j.value == level and j.phase in OF_LEVEL and j.strain is not None
            and j.n >= STRAIN_N]
    return max(here, key=lambda j: (not j.crowded, j.n)).strain if here else None


def crossing(judged: Sequence[Judgement], high: float, aim: float) -> float | None:
    """At which load, up to `high`, the limits come so near; read off between two levels, on
    logarithms. None: no two levels tell."""
    told = [(x, s, n) for x in levels_of(judged) if x <= high
            and (s := strain(judged, x)) is not None and 0 < s < math.inf
            and (n := sum(j.n for j in judged if j.value == x and j.phase in OF_LEVEL))]
    seen = [(x, s) for i, (x, s, n) in enumerate(told)  # not of few requests, one of them unlucky,
            if not any(t < s and m >= n for _, t, m in told[i + 1:])]  # where more did better above
    for (a, low), (b, over) in itertools.pairwise(seen):
        if over > aim:
            if low >= aim:
                return None
            return float(a * (b / a) ** (math.log(aim / low) / math.log(over / low)))
    return None


# ------------------------------------------------------------------------------------- conclusion


def conclude(judged: Sequence[Judgement], axis: Axis, criteria: Criteria) -> Conclusion:
    """The answer that these legs give."""
    legs = usable(judged)
    levels = levels_of(legs)
    unsafe = next((x for x in levels if status(legs, x, criteria) == "UNSAFE"), None)
    proofs = [p for x in levels if (unsafe is None or x < unsafe)
              and (p := pooled(legs, x, criteria)) is not None]
    best = max((p for p in proofs if p.load == "SAFE"), key=lambda p: p.value, default=None)
    bad = [x for x in levels if (best is None or x > best.value) and has_missed(legs, x, criteria)]
    load: LoadVerdict = "UNRESOLVED"
    if best is not None:
        load = "SAFE"
    elif unsafe is not None and unsafe == levels[0]:
        load = "UNSAFE"
    shown = best or max(proofs, key=lambda p: p.value, default=None)
    doubts = [*drifts(legs), *not_monotone(legs, criteria)]
    near = [p.value for p in proofs if p.load == "UNRESOLVED" and p.lower >= criteria.target
            and (best is None or p.value > best.value)]
    soaked_in_vain = min(soaks.failed(legs, criteria), default=None)
    checks = _checks(legs, best.value, criteria) if best else []
    spoiled = best is not None and any(j.measurement == "SUSPECT" for j in legs
                                       if j.value == best.value and j.phase in PROVES)
    kinds = [k for k in CHECKS if not (axis == "rate" and k == "poisson")]
    return Conclusion(
        axis=axis, load=load, safe=best.value if best else None, unsafe=unsafe,
        at_least=best is not None and unsafe is None and not bad, proof=shown,
        suspect=spoiled or (best is not None and bool(doubts)),
        reasons=_why(legs, unsafe, criteria),
        target=criteria.target, confidence=criteria.confidence, doubts=doubts, near=near,
        checks=checks,
        not_tried=[k for k in kinds if best and not any(
            j.phase == k and (j.value == best.value or k in ELSEWHERE) for j in legs)],
        more_s=shown.more_s if shown is not None and load == "UNRESOLVED" and (
            soaked_in_vain is None) else None,
        missed=min(bad, default=None),
        soak_failed=soaked_in_vain)


def _why(legs: Sequence[Judgement], unsafe: float | None,
         criteria: Criteria) -> list[str]:
    first = sorted((j for j in legs if j.value == unsafe and j.load == "UNSAFE"
                    and j.phase in OF_LEVEL), key=lambda j: not contradicts(j, criteria))
    return [f"at {j.value:g}: {reason}" for j in first[:1] for reason in j.reasons]


def _checks(legs: Sequence[Judgement], safe: float, criteria: Criteria) -> list[Check]:
    """The overload's is at a higher level, Poisson arrivals may be at lower ones as well; all
    others at the safe one."""
    found = []
    for j in legs:
        if j.phase in CHECKS and (j.value == safe or j.phase in ("overload", "reference")
                                  or (j.phase == "poisson" and j.value < safe)):
            back_s = j.settled_s if j.phase == "recover" else None
            found.append(Check(j.phase, j.load, j.good, j.n, j.window_s, back_s, j.value,
                               j.offered_rps, keeps(j, criteria)))
    return found


def keeps(j: Judgement, criteria: Criteria) -> bool:
    """A check's share of good requests was at the target, and it did not become worse."""
    return (j.n > 0 and j.good >= criteria.target * j.n and j.load != "UNSAFE"
            and j.rises is None)


def drifts(legs: Sequence[Judgement]) -> list[str]:
    """Levels whose later legs were unlike their first: the server, or what is beside it, changed
    meanwhile, so that levels that were tried at different times cannot be compared."""
    found = []
    for level in levels_of(legs):
        here = [j for j in legs if j.value == level and j.phase in SHORT
                and not j.died and not j.crowded and j.n >= DRIFT_N]
        if len(here) < 2 or here[0].cut:
            continue
        for name, most in (("tpot_p50_s", DRIFT), ("ttft_p50_s", DRIFT_TTFT)):
            first, last = getattr(here[0], name), getattr(here[-1], name)
            if here[-1].cut and first and last and last < first:
                continue  # it is cut while its slow answers are under way: it may be slower still
            if first and last and not 1 / most <= last / first <= most:
                what = "TPOT" if name.startswith("tpot") else "TTFT"
                how = "slower" if last > first else "faster (does a cache know the prompts?)"
                found.append(f"drift: at {level:g} the median {what} went from "
                             f"{1000 * first:.3g} to {1000 * last:.3g} ms, {how}: the server was "
                             "not the same throughout")
    return found


def not_monotone(legs: Sequence[Judgement], criteria: Criteria) -> list[str]:
    """A level that is surely worse than a higher one; nothing is smoothed away."""
    seen = []
    for level in levels_of(legs):
        here = [j for j in legs if j.value == level and j.phase in OF_LEVEL and j.n]
        good, n = sum(j.good for j in here), sum(j.n for j in here)
        if n:
            worth = n / sequential.design_effect([_blocks(j) for j in here],
                                                 criteria.refutes_differ)
            seen.append((level, good / n, metrics.lower_bound(good / n * worth, worth,
                                                              criteria.refute),
                         metrics.upper_bound(good / n * worth, worth, criteria.refute)))
    for i, (low, share, _, upper) in enumerate(seen):
        better = next((x for x in seen[i + 1:] if x[2] > upper), None)
        if better:
            return [f"not monotone: {100 * share:.0f} % were good at {low:g}, and "
                    f"{100 * better[1]:.0f} % at {better[0]:g}"]
    return []
