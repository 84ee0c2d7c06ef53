"""What a long leg tells that short ones cannot: whether a level goes on as it began. Short legs see
the first answers of slots that started evenly; where answers are alike they may bunch up minutes
later, memory may fill, clocks may go down."""

from collections.abc import Sequence

from loadgen import sequential
from loadgen.judge import Criteria, Judgement
from loadgen.leg import Phase

LONG: frozenset[Phase] = frozenset({"soak", "recover"})
LONG_N = 20  # requests below which a long leg says nothing


def is_long(j: Judgement) -> bool:
    """A leg that crowded its own start is none: what it shows may be of its making."""
    return j.phase in LONG and not j.crowded and j.measurement != "INVALID" and j.n >= LONG_N


def is_lost(judged: Sequence[Judgement], level: float, criteria: Criteria) -> bool:
    """A long leg failed there, or its soak's own share is under the target: however many short
    ones were good beside it, they saw only the start."""
    here = [j for j in judged if j.value == level and is_long(j)]
    soak = [j for j in here if j.phase == "soak"]
    return any(_fails(judged, j, criteria) for j in here) or sum(j.good for j in soak) < (
        criteria.target * sum(j.n for j in soak))


def failed(judged: Sequence[Judgement], criteria: Criteria) -> list[float]:
    """Levels whose long leg failed, ascending. If there is one, short legs prove nothing here, at
    any level."""
    return sorted({j.value for j in judged if is_long(j) and _fails(judged, j, criteria)})


def is_held(judged: Sequence[Judgement], level: float, criteria: Criteria) -> bool:
    return any(j.value == level and j.phase == "soak" and is_long(j)
               for j in judged) and not is_lost(judged, level, criteria)


def _fails(judged: Sequence[Judgement], j: Judgement, criteria: Criteria) -> bool:
    """It became worse and worse, or surely missed the target; or it missed it by so much that the
    short runs of its level surely were better."""
    if j.load == "UNSAFE" or j.rises is not None:
        return True
    upper = _share([j], criteria).upper
    short = [x for x in judged if x.value == j.value and x.phase == "confirm"
             and x.measurement != "INVALID"]
    return upper < criteria.target or (
        j.good < criteria.target * j.n and upper < _share(short, criteria).lower)


def _share(legs: Sequence[Judgement], criteria: Criteria) -> sequential.Share:
    return sequential.share([j.blocks or [(j.good, j.n)] for j in legs], criteria.target,
                            criteria.confidence, criteria.runs_differ)
