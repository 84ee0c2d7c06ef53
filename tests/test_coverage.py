"""Intervals that a report prints hold the truth about as often as they say; the whole table, with
more searches: `python -m tests.benchmarks.coverage`."""

import pytest

from tests.benchmarks import coverage
from tests.benchmarks.coverage import Held, counted


def share(cases: list[list[Held]], holds: str) -> float:
    found = [x for name, x in counted(cases).items() if holds in name]
    return sum(k for k, _ in found) / sum(n for _, n in found)


def test_the_knee_s_interval_holds_the_knee_of_long_legs() -> None:
    """On the wide side: a closed loop's counts vary less than the Poisson ones it supposes."""
    assert share([coverage.of_a_knee(seed) for seed in range(12)], "knee") >= 11 / 12


def test_three_legs_of_a_search_hold_the_share_over_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the edge, where it is hardest; a fifth of them may miss at 92 %, once in fifty tests."""
    monkeypatch.setattr(coverage, "POINTS", (("concurrency", 38.0, coverage.EDGE),))
    coverage.learn(True, map)
    found = [coverage.of_a_search(seed) for seed in range(24)]
    assert share(found, "three legs of a search: lower") >= 19 / 24
    assert share(found, "three legs of a search: upper") >= 23 / 24


def test_counts_are_by_interval_and_wilson_s_interval_is_the_known_one() -> None:
    assert counted([[("a", True), ("b", False)], [("a", False)]]) == {"a": (1, 2), "b": (0, 1)}
    assert coverage.wilson(90, 100) == pytest.approx((0.826, 0.945), abs=1e-3)
