"""Intervals that a report prints hold the truth about as often as they say; the whole table, with
more searches: `python -m tests.benchmarks.coverage`."""

import pytest

from loadgen import worth
from loadgen.leg import Axis
from tests.benchmarks import coverage
from tests.benchmarks.coverage import EDGE, Held, Points, counted


def share(cases: list[list[Held]], holds: str) -> float:
    found = [x for name, x in counted(cases).items() if holds in name]
    return sum(k for k, _ in found) / sum(n for _, n in found)


def test_the_knee_s_interval_holds_the_knee_of_long_legs() -> None:
    """On the wide side: a closed loop's counts vary less than the Poisson ones it supposes."""
    assert share([coverage.of_a_knee(seed) for seed in range(12)], "knee") >= 11 / 12


def test_a_proof_of_three_legs_holds_the_share_over_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the edge, where it is hardest; a fifth of them may miss at 92 %, once in fifty tests."""
    points: Points = (("concurrency", 38.0, EDGE),)
    monkeypatch.setattr(coverage, "POINTS", points)
    coverage.learn(coverage.LEG_S, points, map)
    found = [coverage.of_a_search(seed) for seed in range(24)]
    assert counted(found)["a proof, of three legs: lower bound, concurrency"][1] >= 8
    assert share(found, "a proof, of three legs: lower") >= 0.8
    assert share(found, "called UNSAFE") >= 23 / 24


RUNS = 32
WRONG: list[tuple[str, Axis, float, dict[str, float]]] = [  # … and what `learn` finds for 20 s
    ("SAFE", "rate", 4.2, {"": 0.944, "code": 0.956, "json": 0.900, "summary": 0.958}),
    ("UNSAFE", "concurrency", 42.0, {"": 0.955, "code": 0.978, "json": 0.902, "summary": 0.982})]


@pytest.mark.parametrize(("verdict", "axis", "load", "truths"), WRONG, ids=["SAFE", "UNSAFE"])
def test_a_short_run_is_seldom_judged_wrongly_at_the_edge(
        monkeypatch: pytest.MonkeyPatch, verdict: str, axis: Axis, load: float,
        truths: dict[str, float]) -> None:
    """8 % of them may be, and of 32 then 6 in one test of a hundred. As if each run spoke for
    itself alone, more are: so the test can fail."""
    monkeypatch.setattr(coverage, "RUN_POINTS", ((axis, load, EDGE),))
    for cls, truth in truths.items():
        monkeypatch.setitem(coverage.ATTAINED, (axis, load, coverage.SHORT_S, cls), truth)

    def wrong() -> int:
        found = [coverage.of_a_run(seed, coverage.SHORT_S) for seed in range(RUNS)]
        (held, n), = [x for name, x in counted(found).items() if f"called {verdict}," in name]
        assert n == RUNS
        return n - held

    assert wrong() <= 5
    monkeypatch.setattr(worth, "MARGIN", 0.0)
    monkeypatch.setattr(worth, "LEG_ANSWERS", 0.0)
    assert wrong() > 5


def test_counts_are_by_interval_and_wilson_s_interval_is_the_known_one() -> None:
    assert counted([[("a", True), ("b", False)], [("a", False)]]) == {"a": (1, 2), "b": (0, 1)}
    assert coverage.wilson(90, 100) == pytest.approx((0.826, 0.945), abs=1e-3)
