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


def test_one_unlucky_request_of_few_does_not_send_the_search_below_where_more_did_well() -> None:
    """A search whose answers take long: 11 of 12 at 8, 23 of 24 at 16, all of 46 at 32."""
    legs = [leg(4, "ladder", n=8, strain=0.3), leg(8, "ladder", 11 / 12, n=12, strain=1.3),
            leg(16, "ladder", 23 / 24, n=24, strain=0.8), leg(32, "ladder", n=46, strain=0.7),
            leg(64, "ladder", 0.4, n=80, strain=2.0)]
    found = evidence.crossing(legs, 64, 0.89)
    assert found is not None
    assert 32 < found < 45
    more = msgspec.structs.replace(legs[1], n=200, good=184)  # so many do tell
    found = evidence.crossing([legs[0], more, *legs[2:]], 64, 0.89)
    assert found is not None
    assert 4 < found < 8


def test_an_open_leg_that_got_less_than_its_rate_says_is_not_taken_for_a_fast_one() -> None:
    def one(i: int, strain: float, share: float) -> Judgement:
        tok = round(8 * 20 * 600 * share)
        return leg(8, "confirm", replicate=i, n=round(160 * share), strain=strain, open_loop=True,
                   prompt_tok=tok, window_s=20.0)

    light, heavy = one(0, 0.7, 0.75), one(1, 0.9, 1.25)
    mean = [one(i, 0.8, 1.0) for i in range(4)]
    a, b, *_ = evidence.evened([light, heavy, *mean])
    assert a.strain is not None
    assert b.strain is not None
    assert 0.8 < a.strain < 0.9 > b.strain > 0.75
    closed = msgspec.structs.replace(light, open_loop=False)
    assert evidence.evened([closed, *mean])[0] == closed
    assert evidence.evened([leg(8, "confirm", strain=0.7, open_loop=True)])[0].strain == 0.7
