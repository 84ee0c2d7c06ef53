"""The verdict of a run in plain words. SAFE never stands without its n and its confidence;
UNRESOLVED says what would settle it; INVALID says that the generator was the limit."""

import itertools
from collections.abc import Sequence
from functools import lru_cache

import msgspec
import pandas as pd
from msgspec import Struct

from analysis import ceiling, generator, limits, not_valid, steps, three
from analysis import knee as knees
from analysis.ceiling import Ceiling
from analysis.frame import Run
from analysis.knee import Knee
from analysis.limits import Binding
from analysis.phrases import MISSES, NOT_OURS, count, load_of, slo_of
from analysis.steps import percent
from loadgen import metrics, ramp
from loadgen.judge import Judgement, LoadVerdict
from loadgen.ramp import Conclusion
from loadgen.validity import Finding, Measurement


class Verdict(Struct, frozen=True):
    """`headline` is one sentence; `sentences` give its grounds, the most important first. `three`:
    the same for an operator, in three sentences."""

    load: LoadVerdict
    measurement: Measurement
    headline: str
    sentences: list[str]
    three: list[str] = []


class Answer(Struct, frozen=True):
    """All that is made of a run, once, for terminal, report and summary alike. `knee` is None
    for a run that is no sweep, `ceiling` and `binding` for one without a leg."""

    steps: pd.DataFrame
    levels: pd.DataFrame
    knee: Knee | None
    verdict: Verdict
    ceiling: Ceiling | None = None
    binding: Binding | None = None


@lru_cache(maxsize=1)
def answer(run: Run) -> Answer:
    knee = None if run.is_run or not run.legs else knees.of(run)
    holds = ceiling.of(run) if run.legs else None
    binds = None if holds is None else limits.of(run, holds)
    if not run.legs:
        verdict = Verdict("UNRESOLVED", "INVALID", "No leg was run: there is nothing to judge", [])
    elif knee is None:
        verdict = of_leg(run, *run.judgements) if len(run.legs) == 1 else of_legs(run)
    else:
        verdict = of_sweep(run, run.conclusion, knee)
    more = [] if knee is None or holds is None else [ceiling.says(holds)]
    invalid = knee is None and all(j.load != "UNSAFE" or not_valid.is_why(run, j)
                                   for j in run.judgements)  # then nothing that load meets binds
    if binds is not None and not invalid and (knee is not None or verdict.load == "UNSAFE"):
        more.append(limits.says(binds))
    if verdict.measurement != "INVALID":
        verdict = msgspec.structs.replace(verdict, sentences=_after_the_knee(verdict, more))
    if (said := generator.sentence(run)) is not None:
        verdict = msgspec.structs.replace(verdict, sentences=[*verdict.sentences, said])
    verdict = msgspec.structs.replace(verdict, three=three.of(run))
    return Answer(steps.table(run), steps.levels(run), knee, verdict, holds, binds)


def _after_the_knee(verdict: Verdict, more: Sequence[str]) -> list[str]:
    at = next((i for i, x in enumerate(verdict.sentences, 1) if x.startswith("Knee ")),
              len(verdict.sentences))
    return [*verdict.sentences[:at], *more, *verdict.sentences[at:]]


def verdict(run: Run) -> list[str]:
    """The paragraphs that the terminal shows."""
    said = answer(run).verdict
    label = " (simulated)" if run.simulated else ""
    return [f"{said.load}, {said.measurement}{label}: {' '.join(said.three)}", *said.sentences]


# ---------------------------------------------------------------------------------------- a sweep


def of_sweep(run: Run, conclusion: Conclusion, knee: Knee) -> Verdict:
    usable = [j for j in run.judgements if j.measurement != "INVALID" or j.died]
    last = run.judgements[-1]
    if conclusion.load == "UNRESOLVED" and last.measurement == "INVALID" and not last.died:
        return Verdict("UNRESOLVED", "INVALID", f"No verdict: {_generator(run)}",
                       _findings(last.findings))
    sentences = _grounds(run, conclusion, usable)
    if conclusion.soak_failed is not None:
        sentences.append(three.soaked_in_vain(run, conclusion.soak_failed))
    elif conclusion.missed is not None and (
            conclusion.unsafe is None or conclusion.missed < conclusion.unsafe):
        sentences.append(three.missed(run, conclusion.missed))
    if conclusion.unsafe is not None:
        met = "met it" if sentences else f"met {slo_of(run)}"
        sentences.append(_unsafe(run, usable, conclusion.unsafe, met))
    sentences.append(knees.says(knee))
    suspect = conclusion.suspect if conclusion.load == "SAFE" else any(
        j.measurement == "SUSPECT" for j in usable)
    sentences += beside(conclusion)
    if any(j.measurement == "SUSPECT" for j in usable) and suspect:
        sentences.append("The measurement is suspect: see the findings.")
    return Verdict(conclusion.load, "SUSPECT" if suspect else "VALID",
                   _headline(run, conclusion, usable), sentences)


def beside(conclusion: Conclusion) -> list[str]:
    """What else the search saw: levels too near the limits, doubts, checks of the safe level."""
    found = [f"{level:g} kept the limits, but by too little to count on it in another run."
             for level in conclusion.near]
    found += [f"In doubt: {doubt}." for doubt in conclusion.doubts]
    for c in conclusion.checks:
        if c.kind == "recover":
            if c.recovery_s is not None:
                found.append(f"{CHECKED[c.kind]}: as before after {c.recovery_s:.0f} s.")
            continue
        what = CHECKED[c.kind]
        if c.kind in ("poisson", "burst"):
            what += f", {c.offered_rps:.3g}/s"
        if c.kind == "poisson" and c.value != conclusion.safe:
            what = f"Poisson arrivals at the rate of {c.value:g} at once, {c.offered_rps:.3g}/s"
        found.append(f"{what}: {c.good} of {c.n} met it, {c.load.lower()}.")
    if conclusion.checks and conclusion.not_tried:
        names = ", ".join(CHECKED[kind].lower() for kind in conclusion.not_tried)
        found.append(f"No time was left for: {names}.")
    return found


CHECKED = {"reference": "A lower level once more", "soak": "Soak, fresh prompts",
           "poisson": "The same rate as Poisson arrivals", "burst": "In bursts (CV 2)",
           "overload": "At 1.3 times the load", "recover": "Recovery from it"}


def _headline(run: Run, conclusion: Conclusion, usable: Sequence[Judgement]) -> str:
    if conclusion.load == "SAFE" and conclusion.safe is not None:
        soaked = any(c.kind == "soak" and c.held for c in conclusion.checks)
        least = "at least " if conclusion.at_least else ""
        return (f"Safe up to {least}{load_of(run, conclusion.safe)} of this mix"
                + ("" if soaked else " (not soak-tested)"))
    if conclusion.load == "UNSAFE" and conclusion.unsafe is not None:
        return f"Not safe at any tested level, from {load_of(run, conclusion.unsafe)} up"
    if conclusion.soak_failed is not None:
        return (f"Unresolved: a long run at {load_of(run, conclusion.soak_failed)} did not hold, "
                "and no soak below it did")
    if conclusion.unsafe is not None:
        return f"Unresolved: the safe level is under {load_of(run, conclusion.unsafe)}"
    return "Unresolved: no level was shown to be safe, and none to be unsafe"


def _grounds(run: Run, conclusion: Conclusion, usable: Sequence[Judgement]) -> list[str]:
    proof = conclusion.proof
    if conclusion.load == "SAFE" and proof is not None:
        return [f"{_share(run, proof.good, proof.n)}; {_sure(run)}."]
    if conclusion.load == "UNSAFE" or conclusion.soak_failed is not None:
        return []
    level = proof.value if proof else ramp.candidate(usable, run.criteria)
    if level is None:
        return ["No level could be judged."]
    here = [j for j in usable if j.value == level]
    confirmed = [j for j in here if j.phase == "confirm"]
    good, n = sum(j.good for j in confirmed or here), sum(j.n for j in confirmed or here)
    said = f"At {level:g}, {_share(run, good, n)}; "
    lower = metrics.lower_bound(good, n, run.criteria.confidence)
    if not confirmed and lower >= run.criteria.target:
        return [said + "a confirmation with fresh requests would settle it: give more with "
                "--budget."]
    return [said + _settle(run, confirmed or here)]


def _unsafe(run: Run, usable: Sequence[Judgement], level: float, met: str) -> str:
    """What went wrong at an unsafe level. `met`: "met it", where the limits were just named."""
    worst = next(j for j in usable if j.value == level and j.load == "UNSAFE")
    share = f"{percent(worst.good / worst.n)} of {worst.n}" if worst.good else f"none of {worst.n}"
    left = worst.misses.get("CANCELLED", 0)
    broke = sorted(((k, n) for k, n in worst.misses.items() if k != "CANCELLED"),
                   key=lambda x: -x[1])[:2]
    by = " and ".join(f"{n} by {MISSES.get(k, k)}" for k, n in broke)
    why = [f"missed {by}"] if broke else []
    why += [f"{left} were in flight when the level was given up"] if left else []
    only = "only " if worst.good > 0 and worst.upper < run.criteria.target else ""
    return (f"At {level:g}, {only}{share} {met}" + (f" ({'; '.join(why)})" if why else "")
            + "".join(f"; {x}" for x in worst.reasons[:-1]) + ".")


# ------------------------------------------------------------------------------------- one leg


def of_leg(run: Run, j: Judgement) -> Verdict:
    where = load_of(run, j.value)
    share = _share(run, j.good, j.n)
    if j.measurement == "INVALID" and not j.died:
        return Verdict("UNRESOLVED", "INVALID", f"No verdict at {where}: {_generator(run)}",
                       [*_findings(j.findings), f"{share}."])
    if j.load == "SAFE":
        head, rest = f"Met at {where}", [f"{share}; {_sure(run)}."]
    elif j.load == "UNSAFE":
        head = f"The server died at {where}" if j.died else f"Not met at {where}"
        rest = [_unsafe(run, [j], j.value, f"met {slo_of(run)}"),
                f"Asked for: {percent(run.criteria.target)} of the requests."]
    else:
        head = f"Unresolved at {where}"
        rest = [f"{share}; {_settle(run, [j])}",
                *([f"Class {', '.join(j.refuted_classes)} surely misses the target."]
                  if j.refuted_classes else [])]
    if j.measurement == "SUSPECT":
        rest.append("The measurement is suspect: see the findings.")
    return Verdict(j.load, j.measurement, head, rest)


# ---------------------------------------------------------------------------------- several legs


def of_legs(run: Run) -> Verdict:
    """Loads that were all asked for: each is judged for itself, by the worst of its legs."""
    worst = [max((j for j in run.judgements if j.value == value), key=_badness)
             for value in sorted({j.value for j in run.judgements})]
    sentences, met = [], f"met {slo_of(run)}"
    for j in sorted(run.judgements, key=lambda j: j.value):
        sentences.append(_of_each(run, j, met))
        met = "met it"
    found = [j.measurement for j in run.judgements]
    measurement = max(found, key=("VALID", "SUSPECT", "INVALID").index)
    if measurement != "VALID":
        sentences.append(f"The measurement is {measurement.lower()}: see the findings.")
    loads: list[LoadVerdict] = ["UNRESOLVED" if _kind(j) == "INVALID" else j.load for j in worst]
    load = max(loads, key=("SAFE", "UNRESOLVED", "UNSAFE").index)
    return Verdict(load, measurement, _in_a_row(run, worst), sentences)


def _in_a_row(run: Run, worst: Sequence[Judgement]) -> str:
    """ "1, 2 concurrent requests SAFE; 4 UNSAFE (…)": one judgement per level, ascending."""
    parts: list[str] = []
    for kind, group in itertools.groupby(worst, _kind):
        here = list(group)
        levels = [f"{j.value:g}" for j in here]
        if not parts:
            levels[-1] = load_of(run, here[-1].value)
        at = f"at {here[0].value:g}: " if len(here) > 1 else ""
        why = f" ({at}{_why(here[0])})" if kind != "SAFE" else ""
        parts.append(f"{', '.join(levels)} {kind}{why}")
    return "; ".join(parts)


def _kind(j: Judgement) -> str:
    return "INVALID" if j.measurement == "INVALID" and not j.died else j.load


def _badness(j: Judgement) -> tuple[int, bool]:
    return ("SAFE", "UNRESOLVED", "UNSAFE", "INVALID").index(_kind(j)), j.measurement != "VALID"


def _why(j: Judgement) -> str:
    """The shortest reason that a load is not SAFE."""
    if _kind(j) == "INVALID":
        return next(f.says for f in j.findings if f.verdict == "INVALID")
    return j.reasons[0] if j.load == "UNSAFE" else f"{j.good} of {j.n}"


def _of_each(run: Run, j: Judgement, met: str) -> str:
    """The grounds of one load among several. `met`: "met it", where the limits were just named."""
    if _kind(j) == "UNSAFE":
        return _unsafe(run, [j], j.value, met)
    share = f"At {j.value:g}, " + (f"{j.good} of {j.n} {met}" if j.n else
                                   "no request was due in the window")
    if _kind(j) == "INVALID":
        return f"{share}, which tells nothing: {_findings(j.findings)[0]}"
    return f"{share}; " + (f"{_sure(run)}." if j.load == "SAFE" else _settle(run, [j]))


# ------------------------------------------------------------------------------------- phrases


def _share(run: Run, good: int, n: int) -> str:
    return f"{good} of {n} met {slo_of(run)}" if n else "No request was due in the window"


def _sure(run: Run) -> str:
    """What SAFE says."""
    return (f"with {percent(run.criteria.confidence)} confidence {percent(run.criteria.target)} or "
            "more do")


def _generator(run: Run) -> str:
    rules = {f.rule for f in run.judgements[-1].findings if f.verdict == "INVALID"}
    if len(rules) == 1 and (said := NOT_OURS.get(*rules)) is not None:
        return said
    return ("the load generator failed" if run.legs[-1][1].ending == "failed" else
            "the load generator was the limit, not the server")


def _settle(run: Run, legs: Sequence[Judgement]) -> str:
    target, confidence = run.criteria.target, run.criteria.confidence
    good, n = sum(j.good for j in legs), sum(j.n for j in legs)
    if len(legs) == 1 and (legs[0].near or legs[0].rises is not None):
        return f"{_after(legs[0].reasons[0])}."
    miss = (n - good) / n if n else 0.0
    more = metrics.needed_n(target, miss, confidence) if miss < 1 - target else None
    if more is None:
        return f"at this share no number of requests would show {percent(target)}."
    missing = count(more - n, "more request") if more > n else "a few more requests"
    longer = "a longer run" if run.is_run else "more with --budget"
    return f"{missing} at this share would show {percent(target)}: {longer}."


def _after(reason: str) -> str:
    """A reason without the share that it begins with."""
    return reason.partition(" requests met the SLO, ")[2] or reason


def _findings(findings: Sequence[Finding]) -> list[str]:
    return [f"{f.says[:1].upper()}{f.says[1:]}. Remedy: {f.remedy}." for f in findings]

