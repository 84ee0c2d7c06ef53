"""Bounds that hold whenever one looks, of requests that come in clumps."""

import random

import pytest

from loadgen import metrics, sequential
from loadgen.sequential import bounds, clumping, design_effect, more_n, share


@pytest.mark.parametrize("p", [0.95, 0.9])
def test_looking_after_every_block_errs_no_more_often_than_it_says(p: float) -> None:
    """300 runs of 600 requests, looked at 30 times each: at 0.95 the lower bound may be over the
    truth at any of them in 5 % of runs (a binomial bound is in more than 12 %)."""
    rng = random.Random(1)
    ours = naive = 0
    for _ in range(300):
        good, over, under = 0, False, False
        for n in range(20, 601, 20):
            good += sum(rng.random() < p for _ in range(20))
            over |= bounds(good, n, 0.95, 0.95)[0] > p
            under |= good / n > p and metrics.lower_bound(good, n) > p
        ours, naive = ours + over, naive + under
    assert ours <= 20
    assert naive > 36


def test_an_upper_bound_errs_no_more_often_either() -> None:
    rng = random.Random(2)
    wrong = 0
    for _ in range(200):
        good, under = 0, False
        for n in range(20, 401, 20):
            good += sum(rng.random() < 0.9 for _ in range(20))
            under |= bounds(good, n, 0.95, 0.95)[1] < 0.9
        wrong += under
    assert wrong <= 14


def test_it_costs_a_third_more_requests_than_one_look() -> None:
    def needed(misses: int) -> int:
        return next(n for n in range(misses + 1, 2000)
                    if bounds(n - misses, n, 0.95, 0.95)[0] >= 0.95)

    assert [needed(m) for m in (0, 1, 2, 4)] == [68, 125, 171, 251]  # one look: 59, 93, 124, 181


def test_bounds_of_nothing_and_of_all() -> None:
    assert bounds(0, 0, 0.95, 0.95) == (0.0, 1.0)
    assert bounds(0, 40, 0.95, 0.95)[0] == 0.0
    assert bounds(40, 40, 0.95, 0.95)[1] == 1.0
    assert 0.99 <= bounds(10**6, 10**6, 0.95, 0.95)[0] < 1.0


def test_requests_of_one_leg_are_worth_less_than_as_many_of_three() -> None:
    one, three = [[(10, 10)] * 30], [[(10, 10)] * 10] * 3
    assert design_effect(three) < design_effect(one)
    assert share(three, 0.95, 0.95).lower > share(one, 0.95, 0.95).lower
    assert design_effect(one, runs_differ=0.0) == 1.0
    assert design_effect([]) == 1.0


def test_clumps_and_legs_that_differ_raise_the_design_effect() -> None:
    even, clumped = [[(9, 10)] * 20], [[(10, 10), (10, 10), (10, 10), (6, 10)] * 5]
    assert clumping(even) == 1.0
    assert clumping(clumped) > 2
    alike, unlike = [[(9, 10)] * 10] * 4, [[(10, 10)] * 10] * 3 + [[(6, 10)] * 10]
    assert design_effect(unlike) > 2 * design_effect(alike)


def test_it_says_how_many_more_would_prove_it_or_that_none_would() -> None:
    seen = share([[(10, 10)] * 10 + [(9, 10)]], 0.95, 0.95)
    more = more_n(seen, 0.95, 0.95)
    assert more is not None
    assert 10 < more < 400
    assert more_n(share([[(9, 10)] * 20], 0.95, 0.95), 0.95, 0.95) is None
    assert sequential.more_n(share([], 0.95, 0.95), 0.95, 0.95) is not None
