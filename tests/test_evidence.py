"""Drift, levels out of order, bad runs: what is said of them, and that it weakens the verdict."""

import msgspec

from loadgen import evidence
from loadgen.judge import Criteria, Judgement
from loadgen.leg import Leg, Phase
from loadgen.scenario import Closed
from tests.test_ramp import Level, judgement

CRITERIA = Criteria()


def leg(value: float, phase: Phase, good: float = 1.0, n: int = 120,
        replicate: int = 0, **told: object) -> Judgement:
    one = Leg(id=f"{phase}-{value:g}-r{replicate}", axis="concurrency", value=value, phase=phase,
              replicate=replicate, seed=replicate, load=Closed(int(value)), warmup_s=1,
              measure_s=20)
    return msgspec.structs.replace(judgement(one, Level(good=good, rps=n / 20), n), **told)


def concluded(*legs: Judgement) -> evidence.Conclusion:
    return evidence.conclude(legs, "concurrency", CRITERIA)


def test_a_server_that_became_slower_is_said_and_weakens_the_verdict() -> None:
    steady = [leg(8, "confirm", replicate=i) for i in range(3)]
    assert (concluded(*steady).load, concluded(*steady).suspect) == ("SAFE", False)
    drifted = [*steady, leg(8, "confirm", replicate=3, tpot_p50_s=0.013)]
    end = concluded(*drifted)
    assert (end.load, end.suspect) == ("SAFE", True)
    assert end.doubts[0].startswith("drift: at 8 the median TPOT went from 10 to 13 ms, slower")


def test_answers_that_begin_much_sooner_than_at_first_point_to_a_cache() -> None:
    end = concluded(leg(8, "ladder"), leg(8, "confirm"), leg(8, "reference", ttft_p50_s=0.04))
    assert "does a cache know the prompts" in end.doubts[0]
    assert end.suspect


def test_a_level_that_is_worse_than_a_higher_one_is_reported_and_not_smoothed() -> None:
    legs = [leg(4, "ladder", 0.3), leg(8, "confirm"), leg(8, "confirm", replicate=1)]
    end = concluded(*legs)
    assert (end.safe, end.unsafe) == (None, 4)
    assert end.doubts == ["not monotone: 30 % were good at 4, and 100 % at 8"]


def test_one_bad_confirmation_counts_with_its_others() -> None:
    legs = [leg(8, "confirm", replicate=i) for i in range(3)]
    bad = leg(8, "confirm", 0.6, replicate=3)
    assert bad.load == "UNSAFE"
    assert evidence.status([*legs, bad], 8, CRITERIA) == "UNRESOLVED"
    assert evidence.status([*legs, msgspec.structs.replace(bad, distress=True)], 8,
                           CRITERIA) == "UNSAFE"


def test_a_level_near_its_limits_in_an_open_loop_is_not_safe_however_good_its_share() -> None:
    near, far = ([leg(8, "confirm", replicate=i, strain=s, open_loop=True) for i in range(3)]
                 for s in (0.95, 0.7))
    assert evidence.status(near, 8, CRITERIA) == "UNRESOLVED"
    assert evidence.status(far, 8, CRITERIA) == "SAFE"


def test_a_run_of_three_requests_proves_nothing_and_says_what_would() -> None:
    end = concluded(leg(8, "confirm", n=3))
    assert (end.load, end.safe) == ("UNRESOLVED", None)
    assert end.more_s is not None
    assert end.more_s > 10
    assert concluded(leg(8, "confirm", n=0)).load == "UNRESOLVED"


def test_what_was_not_tried_is_named() -> None:
    legs = [leg(8, "confirm", replicate=i) for i in range(3)]
    assert concluded(*legs).not_tried == ["reference", "soak", "poisson", "burst", "overload",
                                          "recover"]
    soaked = concluded(*legs, leg(8, "soak", n=600))
    assert "soak" not in soaked.not_tried
    assert [(c.kind, c.load) for c in soaked.checks] == [("soak", "SAFE")]
