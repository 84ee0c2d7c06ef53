"""The exit code of a run that is over: pure, so that a host without the analysis has it, too."""

from collections.abc import Sequence

from loadgen.errors import (
    DIED,
    INCONCLUSIVE,
    INTERRUPTED,
    INVALID,
    PASS,
    PRECEDENCE,
    SLO_MISSED,
)
from loadgen.evidence import Conclusion
from loadgen.judge import Judgement


def exit_code(judgements: Sequence[Judgement], answer: Conclusion | None, ending: str | None,
              stop: str | None = None) -> int:
    """130 > 2 > 3 > 4 > 1 > 5 > 0, of a run (`answer` None) over all its legs. A sweep that found
    its safe level passes even if a higher one killed the server. `ending`: of the last leg;
    `stop`: why a search that ran just now stopped."""
    if stop == "interrupted" or (stop is None and ending == "interrupted"):
        return INTERRUPTED
    searched = [j for j in judgements if j.phase != "unit"]
    if not searched:
        return INVALID
    if answer is None:
        codes = {_leg_code(j) for j in judgements}
        return next(c for c in PRECEDENCE if c in codes)
    if "failed" in (stop, ending):
        return INVALID
    if answer.safe is not None:
        return PASS
    if stop == "GENERATOR_LIMIT" or searched[-1].measurement == "INVALID":
        return INVALID
    if stop == "SERVER_DIED" or searched[-1].died:
        return DIED
    return SLO_MISSED if answer.load == "UNSAFE" else INCONCLUSIVE


def _leg_code(j: Judgement) -> int:
    """Of a leg that was asked for as such."""
    if j.measurement == "INVALID":
        return INVALID
    return DIED if j.died else {"SAFE": PASS, "UNSAFE": SLO_MISSED}.get(j.load, INCONCLUSIVE)
