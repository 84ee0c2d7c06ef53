"""The verdict in three sentences that an operator understands: what was found and how sure it is,
what stands in the way of more, what to do."""

from collections.abc import Sequence

from analysis import not_valid
from analysis.frame import Run
from analysis.phrases import (
    MISSES,
    NOT_OURS,
    count,
    daily,
    load_of,
    open_arrivals,
    slo_of,
)
from analysis.steps import percent
from loadgen import metrics, ramp
from loadgen.judge import KV_FULL_FRAC, PREEMPTED_FRAC, Judgement, ServerSigns
from loadgen.ramp import Conclusion
from loadgen.validity import Finding

WAITING = 1.0  # requests in the server's queue in the mean: more than a batch that is made up


def of(run: Run) -> list[str]:
    if not run.legs:
        return ["No leg was run: there is nothing to judge.", "The journals hold no request.",
                "Run it again, and see what the terminal and server.log say."]
    if not run.is_run:
        return _sweep(run, run.conclusion)
    return _one(run, run.judgements[0]) if len(run.judgements) == 1 else _several(run)


# ---------------------------------------------------------------------------------------- a search


def _sweep(run: Run, c: Conclusion) -> list[str]:
    last = run.judgements[-1]
    if c.load == "UNRESOLVED" and last.measurement == "INVALID" and not last.died:
        return _invalid(run, last, "No verdict")
    if c.load == "SAFE" and c.safe is not None:
        return [f"Safe up to {'at least ' if c.at_least else ''}{load_of(run, c.safe)} of this mix "
                f"({_sure(run)} ≥ {percent(c.target)} meet {slo_of(run)}; {_rests_on(run, c)}).",
                _next(run, c), _keep(run, c.safe, c.at_least)]
    if c.load == "UNSAFE" and c.unsafe is not None:
        worst = _worst(run, c.unsafe)
        sure = (f" ({_sure(run)} < {percent(c.target)} meet {slo_of(run)}; "
                f"{count(worst.n, 'request')})" if worst.upper < c.target else "")
        lower = ("No load is left to keep: loosen the limits, or use a faster server."
                 if c.unsafe <= 1 else "Look for a safe load below it, with --levels.")
        if not_valid.is_why(run, worst):
            lower = not_valid.advice(run, worst)
        return [f"Not safe at any tested level, from {load_of(run, c.unsafe)} up{sure}.",
                cause(run, worst), _mend(worst) or lower]
    return _unresolved(run, c)


def _unresolved(run: Run, c: Conclusion) -> list[str]:
    if c.soak_failed is not None:
        return _soaked_out(run, c.soak_failed)
    usable = [j for j in run.judgements if j.measurement != "INVALID" or j.died]
    level = c.proof.value if c.proof else ramp.candidate(usable, run.criteria)
    here = [j for j in usable if j.value == level]
    own = [j for j in here if j.phase == "confirm"] or here
    good, n = sum(j.good for j in own), sum(j.n for j in own)
    under = "" if c.unsafe is None else f" below {c.unsafe:g}"
    if level is None:
        return ["Unresolved: no level could be judged.", _next(run, c),
                "Run it again with more time: --budget."]
    above = _next(run, c) if c.unsafe is not None else "No tested level was shown to be unsafe."
    return [f"Unresolved: no level{under} was shown to be safe (at {level:g}, {good} of {n} met "
            f"{slo_of(run)}).",
            above, _settle(run, own, "--budget")]


def _soaked_out(run: Run, failed: float) -> list[str]:
    short = max((j.value for j in run.judgements if j.phase == "confirm" and j.load == "SAFE"),
                default=None)
    held = "" if short is None else f"short runs held up to {load_of(run, short)}, but "
    return [f"Unresolved: {held}a long one did not at {failed:g}, and none below it was soaked "
            "long enough to be shown safe.", soaked_in_vain(run, failed),
            "Rely on none of these levels until a soak of one holds: more time with --budget."]


def _rests_on(run: Run, c: Conclusion) -> str:
    """ "3 runs, 2,310 requests": those that prove it."""
    soaked = any(x.kind == "soak" and x.held for x in c.checks)
    runs, n = (c.proof.legs, c.proof.n) if c.proof else (0, 0)
    return f"{count(runs, 'run')}, {count(n, 'request')}" + (
        "" if soaked else "; not soak-tested")


def _next(run: Run, c: Conclusion) -> str:
    if c.soak_failed is not None and (c.missed is None or c.soak_failed <= c.missed):
        return soaked_in_vain(run, c.soak_failed)
    if c.missed is not None and (c.unsafe is None or c.missed < c.unsafe):
        return missed(run, c.missed)
    if c.unsafe is None:
        return "No higher level was tested: it may take more."
    return cause(run, _worst(run, c.unsafe))


def _keep(run: Run, safe: float, at_least: bool) -> str:
    keep = daily(run, safe)
    unit = "/s" if run.axis == "rate" else ""
    further = "--max-rate" if run.axis == "rate" else "--max-concurrency"
    more = f", or look further up with {further} {2 * safe:g}" if at_least else ""
    if keep >= safe:
        return f"There is nothing below {safe:g} to keep to: plan with a second server{more}."
    return f"Keep {keep:g}{unit} ({100 * keep / safe:.0f} %) for daily use{more}{_of_open(run)}."


def _of_open(run: Run) -> str:
    """Up to which rate requests kept the limits that come whether or not others are answered."""
    too_fast, kept = open_arrivals(run)
    if too_fast is None:
        return ""
    share = f"({percent(too_fast.good / max(too_fast.n, 1))} of {too_fast.n:,} met them)"
    if kept is None:
        return (f": arrivals that do not wait for answers (Poisson) missed the limits even at "
                f"{too_fast.offered_rps:.3g}/s {share}, and no rate was found that holds")
    return (f": arrivals that do not wait for answers (Poisson) kept the limits up to "
            f"{kept.offered_rps:.3g}/s ({percent(kept.good / kept.n)} of {kept.n:,}), and not at "
            f"{too_fast.offered_rps:.3g}/s {share}")


# -------------------------------------------------------------------- loads that were asked for


def _one(run: Run, j: Judgement) -> list[str]:
    where = load_of(run, j.value)
    target = percent(run.criteria.target)
    share = f"{slo_of(run)}; {count(j.n, 'request')}"
    if j.died:
        return [f"The server died at {where}.", cause(run, j), _mend(j)]
    if j.measurement == "INVALID":
        return _invalid(run, j, f"No verdict at {where}")
    if j.load == "SAFE":
        return [f"Met at {where} ({_sure(run)} ≥ {target} meet {share}).",
                f"{j.good} of {j.n} did.",
                "Of higher loads it says nothing: `loadgen sweep` finds the largest safe one."]
    if j.load == "UNSAFE":
        sure = f" ({_sure(run)} < {target} meet {share})" if j.upper < run.criteria.target else ""
        if not_valid.is_why(run, j):
            return [f"Not met at {where}: too few answers are valid{sure}.", cause(run, j),
                    not_valid.advice(run, j)]
        return [f"Not met at {where}{sure}.", cause(run, j),
                "Try a lower load: `loadgen sweep` finds the largest safe one."]
    if j.near and j.strain is not None:
        return [f"Unresolved at {where}: {j.good} of {j.n} met {slo_of(run)}, but "
                f"{percent(1 - run.criteria.target)} came to {percent(round(j.strain, 2))} of a "
                "limit or more.",
                "So near the limits runs of one server differ, and another may well miss them.",
                "`loadgen sweep` makes several and tells; or try a lower load."]
    return [f"Unresolved at {where}: {j.good} of {j.n} met {slo_of(run)}.",
            not_valid.says(run, j) if not_valid.is_why(run, j) else
            f"Asked for is {target} with {percent(run.criteria.confidence)} confidence.",
            _settle(run, [j], "-t" if "locust" in run.manifest.command[:1] else "--duration")]


def _several(run: Run) -> list[str]:
    bad = [j for j in run.judgements if j.load != "SAFE" or j.measurement == "INVALID"]
    total = count(sum(j.n for j in run.judgements), "request")
    if not bad:
        return [f"Met at each of {len(run.judgements)} loads ({_sure(run)} ≥ "
                f"{percent(run.criteria.target)} meet {slo_of(run)}, at each; {total}).",
                "None was refuted.",
                "Of higher loads it says nothing: `loadgen sweep` finds the largest safe one."]
    first = min(bad, key=lambda j: ((j.load != "UNSAFE" and not j.died), j.value))
    what = ("the server died" if first.died else "it was not measured"
            if first.measurement == "INVALID" else "it is unresolved"
            if first.load != "UNSAFE" else "too few answers were valid"
            if not_valid.is_why(run, first) else "the limits were not met")
    said = _one(run, first)
    return [f"Of {len(run.judgements)} loads ({total}) {len(bad)} did not pass; at {first.value:g} "
            f"{what}.", said[1], said[2]]


# ----------------------------------------------------------------------------------------- phrases


def cause(run: Run, j: Judgement) -> str:
    """What went wrong at a level that is not safe, the deepest cause that is known."""
    if j.died:
        return f"At {j.value:g} {next(iter(j.reasons), 'the server died')}."
    if not_valid.is_why(run, j):
        return not_valid.says(run, j)
    signs = next((s for (leg, _), s in zip(run.legs, run.signs, strict=True) if leg.id == j.leg),
                 ServerSigns())
    full = (signs.kv_full_frac or 0.0) > KV_FULL_FRAC
    preempted = (signs.preemptions or 0.0) > PREEMPTED_FRAC * max(j.n, 1)
    if full or preempted:
        said = " and ".join([*(["the KV cache is full"] if full else []),
                             *(["requests are preempted"] if preempted else [])])
        return f"At {j.value:g} {said}."
    if j.n == 0:
        return f"At {j.value:g} no request was due in the window."
    share = f"At {j.value:g} only {percent(j.good / j.n)} of {j.n} met them" if j.good else (
        f"At {j.value:g} none of {j.n} met them")
    left = {k: n for k, n in j.misses.items() if k != "CANCELLED"}
    worst = max(left, key=lambda k: left[k], default=None)
    waits = signs.waiting_mean is not None and signs.waiting_mean > WAITING
    why = "" if worst is None else f": most misses are by {MISSES.get(worst, worst)}"
    queue = f", and {signs.waiting_mean:.3g} requests wait in the server's queue" if waits else ""
    return f"{share}{why}{queue}."


def soaked_in_vain(run: Run, level: float) -> str:
    """Short runs of a level held and a long one did not."""
    soak = next(j for j in run.judgements if j.value == level and j.phase in ("soak", "recover"))
    short = [j for j in run.judgements if j.value == level and j.phase == "confirm"]
    held = (f"{count(len(short), 'short run')} held ({sum(j.good for j in short):,} of "
            f"{sum(j.n for j in short):,}), but " if short else "")
    share = f"{percent(soak.good / soak.n)} of {soak.n:,} met them"
    how = f"only {share}" if soak.rises is None else f"it became worse and worse ({share})"
    return (f"At {level:g} {held}in a long one of {soak.window_s:.0f} s {how}: only levels count "
            "that were soaked.")


def missed(run: Run, level: float) -> str:
    """A level missed the target in too few requests, or after too short a start, to be sure."""
    here = [j for j in run.judgements if j.value == level and j.n and j.measurement != "INVALID"]
    good, n = sum(j.good for j in here), sum(j.n for j in here)
    why = ("its prompts crowded each other at the start" if all(j.crowded for j in here)
           else "too few to be sure")
    return f"At {level:g} {percent(good / n)} of {n:,} met them, which does not settle it: {why}."


def _worst(run: Run, level: float) -> Judgement:
    here = [j for j in run.judgements if j.value == level]
    return max(here, key=lambda j: (j.died, j.load == "UNSAFE", j.n))


def _mend(j: Judgement) -> str:
    return "Mend that first: server.log in the run folder has its last words." if j.died else ""


def _sure(run: Run) -> str:
    return f"{percent(run.criteria.confidence)} confident that"


def _settle(run: Run, legs: Sequence[Judgement], option: str) -> str:
    """What would settle it: requests, and the minutes that they take."""
    good, n = sum(j.good for j in legs), sum(j.n for j in legs)
    miss = (n - good) / n if n else 0.0
    more = metrics.needed_n(run.criteria.target, miss, run.criteria.confidence)
    if more is None and legs and not_valid.is_why(run, legs[-1]):
        return not_valid.advice(run, legs[-1])
    if more is None:
        return (f"If that share stays, {percent(run.criteria.target)} is missed: a longer run "
                f"would show it ({option}), a lower load may hold.")
    rps = max((j.achieved_rps for j in legs), default=0.0)
    confirmed = any(j.phase in ("confirm", "run") for j in legs)
    missing = max(more - n, 1) if confirmed else more  # those of a ladder chose the level
    minutes = max(1, round(missing / rps / 60 + 0.5)) if rps > 0 else None
    time = "" if minutes is None else f", about {count(minutes, 'more minute')}"
    return f"{count(missing, 'more request')} like these would settle it{time}: {option}."


def _invalid(run: Run, j: Judgement, head: str) -> list[str]:
    found = next((f for f in j.findings if f.verdict == "INVALID"), None)
    failed = any(w.ending == "failed" for leg, w in run.legs if leg.id == j.leg)
    limit = (NOT_OURS[found.rule] if found and found.rule in NOT_OURS else
             "the load generator failed" if failed else
             "the load generator was the limit, not the server")
    return [f"{head}: {limit}.", *_finding(found)]


def _finding(f: Finding | None) -> list[str]:
    if f is None:
        return ["The measurement is invalid.", "See the findings."]
    return [f"{f.says[:1].upper()}{f.says[1:]}.", f"{f.remedy[:1].upper()}{f.remedy[1:]}."]
