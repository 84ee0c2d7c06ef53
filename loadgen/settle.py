"""When a leg had settled, and whether it stayed so. Series are in the order of due times; values
are what the SLO limits (so that what settles is what is judged).

MSER-5 (White, Simulation 69, 1997): of means of five, leave out the first d that make the standard
error of the rest smallest; where that is more than half of them, there is no steady part. It looks
for a mean, so a slope is tested besides: means of blocks against time, by Student's t.
"""

import math
from collections.abc import Sequence

BATCH = 5
BLOCKS = 10
SLOPE_T = 4.0  # eight degrees of freedom: 0.2 % by chance, one-sided
LOST = 2.0  # a failed request is as bad as one that took twice its limits
HALVES = 1.25  # … and the second half is so much worse: less is no matter for a verdict


def mser(values: Sequence[float]) -> int | None:
    """How many values to leave out at the start. None: it never settled, or there are too few (20)
    to say."""
    means = [sum(values[i:i + BATCH]) / BATCH for i in range(0, len(values) - BATCH + 1, BATCH)]
    k = len(means)
    if k < 4:
        return None
    best, left_out = math.inf, 0
    total = squares = 0.0
    for d in range(k - 1, -1, -1):
        total, squares, m = total + means[d], squares + means[d] ** 2, k - d
        if m < 3:
            continue
        error = max(0.0, squares - total**2 / m) / m**2
        if error <= best:
            best, left_out = error, d
    return None if left_out > k // 2 else BATCH * left_out


def slope_t(values: Sequence[float]) -> float:
    """Student's t of the slope of BLOCKS means against time; 0 where there are too few."""
    size = len(values) // BLOCKS
    if size < 2:
        return 0.0
    y = [sum(values[i * size:(i + 1) * size]) / size for i in range(BLOCKS)]
    mean, middle = sum(y) / BLOCKS, (BLOCKS - 1) / 2
    sxx = sum((i - middle) ** 2 for i in range(BLOCKS))
    b = sum((i - middle) * v for i, v in enumerate(y)) / sxx
    rest = sum((v - mean - b * (i - middle)) ** 2 for i, v in enumerate(y)) / (BLOCKS - 2)
    if rest <= 0:
        return math.inf if b > 0 else -math.inf if b < 0 else 0.0
    return b / math.sqrt(rest / sxx)


def rises(values: Sequence[float]) -> float | None:
    """By which factor the second half is worse than the first, if there is a trend; else None.
    A value that is infinite (a request that failed) counts as the worst that is not, or as LOST."""
    worst = max([LOST, *(x for x in values if x < math.inf)])
    values = [min(x, worst) for x in values]
    half = len(values) // 2
    first, second = sum(values[:half]), sum(values[len(values) - half:])
    if half == 0 or first <= 0 or second < HALVES * first or slope_t(values) < SLOPE_T:
        return None
    return second / first
