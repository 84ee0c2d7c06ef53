"""What the requests of a leg are worth, as it speaks for its load and not for itself alone:
requests of one moment share their fate, and the next run would be another.

A leg of a search is one of several of some half a minute; by how much they differ is in
`sequential`. A run is as long as it is asked to be, and the longer, the less it differs from the
next. The figures are of runs of 20 s, 60 s and 180 s on the simulator near its edge, where they
differ most (docs/method.md, `python -m tests.benchmarks.coverage --only run`)."""

import math

from loadgen import sequential
from loadgen.leg import Leg
from loadgen.scenario import Closed, Load

# By how much the logarithm of `strain` differs from one run as long as an answer to the next
# (standard deviation), and with which power of a run's length in answers that falls.
NEXT_CLOSED, NEXT_OPEN = (0.135, 0.5), (0.27, 0.25)
MARGIN = 2.0  # so much of it is left in a SAFE run: then one at the edge in twenty is
LEG_ANSWERS = 4.0  # one after the other, in the legs of which REFUTES_DIFFER tells


def of(leg: Leg, answers: float, blocks: sequential.Blocks, differ: tuple[float, float],
       n: int | None = None) -> tuple[float, float]:
    """The share of its requests that it is worth in independent ones, for the lower bound and for
    the upper one. `answers`: how many follow one another in its window; `differ`: ρ of either
    bound; `n`: of a class that has so many of the requests. That runs differ counts against a SAFE
    run by `kept_within`."""
    lower, upper = differ
    if leg.phase == "run":
        _, power = _next(leg.load)
        lower, upper = 0.0, upper * min(1.0, LEG_ANSWERS / answers) ** (2 * power)
    more = max(0, (sum(m for _, m in blocks) if n is None else n) - 1)
    within = sequential.clumping([blocks])
    return 1 / (within + more * lower), 1 / (within + more * upper)


def kept_within(load: Load, answers: float) -> float:
    """The strain (the target's quantile of value over limit) up to which a run is SAFE: of a
    minute with answers of 8 s 0.91 of a limit in a closed loop, 0.72 in an open one. Where requests
    fail, the share itself says so."""
    spread, power = _next(load)
    return math.exp(-MARGIN * spread / answers**power)


def _next(load: Load) -> tuple[float, float]:
    return NEXT_CLOSED if isinstance(load, Closed) else NEXT_OPEN
