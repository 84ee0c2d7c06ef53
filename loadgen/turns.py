"""How far into their sessions the requests of a window are, against those of whole sessions. A
window that is shorter than a session sees mostly first turns, whose prompts are the shortest."""

import math
from collections.abc import Sequence
from statistics import NormalDist

from msgspec import Struct

from loadgen.record import RequestRecord
from loadgen.scenario import Fixed, Length, Lognormal, Scenario, Uniform

POINTS = 200  # of a lognormal, at equal steps of probability
ERRORS = 2.0  # standard errors of a mean turn that chance may make


class Depth(Struct, frozen=True):
    """Of a class's n requests: the mean number of their turn in the session, the first being 1;
    what whole sessions would have, and by how much chance may differ; about how long a session
    takes, None if no user came to a second turn."""

    cls: str
    n: int
    seen: float
    whole: float
    chance: float
    session_s: float | None

    @property
    def frac(self) -> float:
        """Of the way to where it should be, at best."""
        return (self.seen - 1 + self.chance) / (self.whole - 1)


def of(mix: Scenario, sample: Sequence[RequestRecord],
       records: Sequence[RequestRecord]) -> list[Depth]:
    """Of each class with several turns that has requests in the sample; `records`: all of the
    leg's."""
    found = []
    for c in mix.classes:
        counts = _counts(c.turns)
        turns = sum(counts) / len(counts)
        own = [r.turn + 1 for r in sample if r.cls == c.name]
        if turns <= 1 or not own:
            continue
        whole = sum(k * (k + 1) / 2 for k in counts) / sum(counts)
        square = sum(k * (k + 1) * (2 * k + 1) / 6 for k in counts) / sum(counts)
        each_s = _turn_s([r for r in records if r.cls == c.name])
        found.append(Depth(
            c.name, len(own), sum(own) / len(own), whole,
            ERRORS * math.sqrt((square - whole**2) / len(own)),
            None if each_s is None else turns * each_s))
    return found


def _counts(turns: Length) -> Sequence[int]:
    """Numbers of turns that are equally likely."""
    match turns:
        case Uniform(min=low, max=high):
            return range(low, high + 1)
        case Lognormal(median=median, sigma=sigma, min=low, max=high):
            normal = NormalDist(math.log(median), sigma)
            return [min(max(round(math.exp(normal.inv_cdf((i + 0.5) / POINTS))), low), high)
                    for i in range(POINTS)]
        case Fixed(tokens=n):
            return [n]
        case n:
            return [n]


def _turn_s(records: Sequence[RequestRecord]) -> float | None:
    """Mean time from one turn to the next."""
    due_ns = {(r.session, r.turn): r.due_ns for r in records}
    steps = [after - now for (session, turn), now in due_ns.items()
             if (after := due_ns.get((session, turn + 1))) is not None]
    return sum(steps) / len(steps) / 1e9 if steps else None
