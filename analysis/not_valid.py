"""Where most misses of a load are answers that came in time and are not valid: which check failed
and how, whether load has a part in it, and what to try, which is then no lower load."""

from collections import Counter
from collections.abc import Sequence

from analysis import checked
from analysis.frame import Run
from analysis.steps import percent
from loadgen import metrics
from loadgen.judge import Judgement
from loadgen.scenario import RequestClass
from loadgen.store import Verdict
from loadgen.validate import CUT

KINDS = 3  # that are named, of each class
ADVICE = {
    "json": "force its form (`response_format` with a schema: guided decoding), spell the schema "
            "out in the prompt, or take another model",
    "forced": "its form is forced already, so see whether the server honours `response_format` "
              "(its guided decoding), or take another model",
    "tool": "force the call (`tool_choice`), see that the server's tool parser is the model's "
            "(--tool-call-parser), or take another model",
    "repetition": "set `repetition_penalty` in its sampling, or take another model",
    "python": "ask for it otherwise in the prompt, or take another model",
    "length": "ask for the length in the prompt, or take another model",
    "cut": "max_tokens cut most of them off, so give `output_tokens` more"}
OTHER = "ask for it otherwise in the prompt, change the sampling, or take another model"


def is_why(run: Run, j: Judgement) -> bool:
    """Answers that came in time and failed their check are most of its misses, and alone more than
    the target allows."""
    if j.died or not j.misses.get("answer"):
        return False
    alone = int((run.sample(j.leg)["misses"] == "answer").sum())
    return alone > (j.n - j.good) / 2 and alone > (1 - run.criteria.target) * j.n


def says(run: Run, j: Judgement) -> str:
    """What failed, in one sentence: how many, by which check of which class, with what kind of
    error; and whether load has a part in it, if lower loads were tried."""
    wrong = j.misses["answer"]
    late = j.n - int(run.sample(j.leg)["misses"].isin(["", "answer"]).sum())
    in_time = "all came in time" if not late else f"{j.n - late} of {j.n} came in time"
    each = "; ".join(_of_class(run, cls, own) for cls, own in _by_class(_failed(run, j)))
    return (f"At {j.value:g} {wrong} of {j.n} ({percent(wrong / j.n)}) were answered with what "
            f"failed its check: {each}; {in_time}{_beside_lower(run, j)}.")


def advice(run: Run, j: Judgement) -> str:
    """What to try, in one sentence."""
    cls, own = _by_class(_failed(run, j))[0]
    what = ADVICE["cut"] if _is_cut(own) else _way(run.scenario.of(cls))
    lower = _lower(run, j)
    if lower is not None and falls(run, j):
        return (f"A lower load helps, as validity falls with it (`loadgen sweep` finds the largest "
                f"safe one); to have more, {what}.")
    if lower is not None:
        return f"A lower load does not mend that: {what}."
    see = f"--quality {max(2, round(j.value))} --num-prompts 100"
    return (f"That is for the prompt, the model or its decoding: {what}; whether load has any part "
            f"in it, `loadgen run` with `{see}` shows.")


def falls(run: Run, j: Judgement) -> bool:
    """The share of valid answers is surely lower than at lower loads."""
    lower = _lower(run, j)
    valid, n = _share(run, [j.value])
    return lower is not None and metrics.upper_bound(valid, n, run.criteria.confidence) < (
        metrics.lower_bound(*lower, run.criteria.confidence))


# ------------------------------------------------------------------------------------------ parts


def _beside_lower(run: Run, j: Judgement) -> str:
    lower = _lower(run, j)
    if lower is None:
        return ""
    there = f"{percent(lower[0] / lower[1])} of {lower[1]}"
    return (f"; at lower loads {there} were valid" if falls(run, j) else
            f"; at lower loads no more were valid than chance allows ({there})")


def _lower(run: Run, j: Judgement) -> tuple[int, int] | None:
    """Valid and checked answers of all lower loads; None where there were none."""
    found = _share(run, [k.value for k in run.judgements if k.value < j.value])
    return found if found[1] else None


def _share(run: Run, values: Sequence[float]) -> tuple[int, int]:
    legs = {leg.id for leg, _ in run.legs if leg.value in values}
    own = [v for v in run.verdicts if v.leg in legs and v.counts]
    return sum(v.ok for v in own), len(own)


def _failed(run: Run, j: Judgement) -> list[Verdict]:
    """Verdicts that made misses of the leg's sample."""
    sample = run.sample(j.leg)
    inside = set(zip(sample["session"], sample["turn"], strict=True))
    return [v for v in run.verdicts
            if v.leg == j.leg and v.wrong is not None and (v.session, v.turn) in inside]


def _by_class(failed: Sequence[Verdict]) -> list[tuple[str, list[Verdict]]]:
    """The class with most of them first."""
    return [(cls, [v for v in failed if v.cls == cls])
            for cls, _ in Counter(v.cls for v in failed).most_common()]


def _of_class(run: Run, cls: str, own: Sequence[Verdict]) -> str:
    """ "json of class log, invalid JSON 50 and extra text 10"."""
    kinds = Counter(v.wrong for v in own).most_common()
    told = [f"{kind} {n}" for kind, n in kinds[:KINDS]]
    rest = sum(n for _, n in kinds[KINDS:])
    return f"{checked.classes(run)[cls]} of class {cls}, " + ", ".join(
        told + ([f"others {rest}"] if rest else []))


def _is_cut(own: Sequence[Verdict]) -> bool:
    return 2 * sum(v.says.endswith(CUT) for v in own) > len(own)


def _way(cls: RequestClass) -> str:
    check = str(cls.validator.__struct_config__.tag) if cls.validator is not None else ""
    return ADVICE.get("forced" if check == "json" and cls.response_format else check, OTHER)
