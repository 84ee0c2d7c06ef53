"""The ramp, driven by a scripted server: what it tries, when it stops, what it concludes."""

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen import metrics, pace, ramp, sequential
from loadgen.judge import Criteria, Judgement, LoadVerdict
from loadgen.leg import Axis, Leg
from loadgen.ramp import Begin, Restart, RunLeg, Stop, SweepPlan
from loadgen.scenario import Closed, Open
from loadgen.validity import Finding

LEVELS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
BUSY = Finding("generator-cpu", "INVALID", "a generator process used 99% of its core", "wait")
LAGS = Finding("loop-lag", "SUSPECT", "the event loop was 30 ms behind", "a quieter host")
RESTART_S = 30.0


@dataclass(frozen=True)
class Level:
    """How the scripted server does at a level. `good`: share of good requests, in the ladder and,
    where it differs, in confirmations; `dies`, `invalid`: in how many of the first legs;
    `refuted`: a class is surely missed in each leg of this phase."""

    good: float = 1.0
    rps: float = 5.0
    confirm: float | None = None
    errors: float = 0.0
    preempts: bool = False
    dies: int = 0
    invalid: int = 0
    refuted: str = ""
    suspect: bool = False
    answer_s: float | None = None  # else concurrency / rps


class Changing(dict[float, Level]):
    """A server that is as `later` says from the second leg at a level on."""

    def __init__(self, at_first: dict[float, Level], later: dict[float, Level]) -> None:
        super().__init__(at_first)
        self.later = later
        self.seen: set[float] = set()

    def __getitem__(self, x: float) -> Level:
        if x in self.seen and x in self.later:
            return self.later[x]
        self.seen.add(x)
        return super().__getitem__(x)


@dataclass
class Played:
    """A sweep that was played to its stop. The clock is simulated."""

    plan: SweepPlan
    legs: list[Leg] = field(default_factory=list)
    began_s: list[float] = field(default_factory=list)
    judged: list[Judgement] = field(default_factory=list)
    restarts: int = 0
    spent_s: float = 0.0
    stop: Stop = field(default_factory=lambda: Stop("BUDGET", "not yet"))

    def tried(self, phase: str) -> list[float]:
        return [leg.value for leg in self.legs if leg.phase == phase]

    def confirmed(self) -> list[float]:
        """Levels in the order of their confirmations, replicates taken together."""
        return [x for x, _ in itertools.groupby(self.tried("confirm"))]

    def concluded(self) -> ramp.Conclusion:
        return ramp.conclude(self.judged, self.plan.axis, self.plan.criteria)


def judgement(leg: Leg, at: Level, n: int, died: bool = False, invalid: bool = False,
              answer_s: float = 1.0) -> Judgement:
    """What the judge would say of n requests of this level, rounded against us."""
    share = at.confirm if leg.phase == "confirm" and at.confirm is not None else at.good
    good = int(n * share + 1e-9)
    criteria = Criteria()
    upper = metrics.upper_bound(
        good, n, criteria.confidence if leg.phase == "confirm" else criteria.refute)
    lower = metrics.lower_bound(good, n, criteria.confidence)
    refuted = ["json"] if at.refuted == leg.phase else []
    load: LoadVerdict = "UNRESOLVED"
    if died or at.preempts or refuted or upper < criteria.target:
        load = "UNSAFE"
    elif lower >= criteria.target:
        load = "SAFE"
    errors = round(n * at.errors)
    reasons = ["the server died: OOM"] if died else []
    return Judgement(
        leg=leg.id, value=leg.value, phase=leg.phase, n=n, good=good, void=0, lower=lower,
        upper=upper, measurement="INVALID" if invalid else "SUSPECT" if at.suspect else "VALID",
        load=load, reasons=[*reasons, f"{good} of {n}"],
        findings=[LAGS, BUSY] if invalid else [LAGS] if at.suspect else [], misses={},
        outcomes={}, errors=errors, error_lower=metrics.lower_bound(errors, n), classes={},
        refuted_classes=refuted, cut=False, died=died, window_s=leg.measure_s or 0.0,
        offered_rps=at.rps, achieved_rps=at.rps, goodput_rps=at.rps * share,
        ttft_p50_s=0.1, tpot_p50_s=0.01, e2e_p50_s=answer_s, answer_s=answer_s)


def play(server: dict[float, Level] | Level, budget_s: float = 600.0, can_restart: bool = True,
         levels: tuple[float, ...] = LEVELS, seed: int = 7, axis: Axis = "concurrency",
         ) -> Played:
    """Asks the ramp and answers it until it stops. In the closed loop an answer takes
    concurrency / rps; a leg its warm-up, its window and the last answers."""
    played = Played(SweepPlan(axis, levels, budget_s, seed, Criteria(), can_restart))
    state, action = ramp.step(ramp.State(played.plan), Begin(), 0.0)
    runs: dict[float, int] = {}
    for _ in range(1000):
        if isinstance(action, Stop):
            played.stop = action
            return played
        event: ramp.Event = Begin()
        if isinstance(action, Restart):
            played.restarts += 1
            played.spent_s += RESTART_S
        else:
            leg = action.leg
            at = server if isinstance(server, Level) else server[leg.value]
            runs[leg.value] = run = runs.get(leg.value, 0) + 1
            answer_s = at.answer_s or (leg.value / at.rps if axis == "concurrency" else 1.0)
            assert leg.measure_s is not None
            played.legs.append(leg)
            played.began_s.append(played.spent_s)
            event = judgement(leg, at, int(at.rps * leg.measure_s), died=run <= at.dies,
                              invalid=run <= at.invalid, answer_s=answer_s)
            played.judged.append(event)
            played.spent_s += leg.warmup_s + leg.measure_s + answer_s
        state, action = ramp.step(state, event, played.spent_s)
    raise AssertionError(f"no stop after {len(played.legs)} legs, {played.spent_s:.0f} s")


def scales(safe: float, levels: tuple[float, ...] = LEVELS, **beyond: Any) -> dict[float, Level]:
    """A server that is good up to `safe`; its throughput grows to twice that level."""
    return {x: Level(rps=min(x, 2 * safe)) if x <= safe
            else Level(good=0.3, rps=min(x, 2 * safe), **beyond) for x in levels}


# --------------------------------------------------------------------------------------- ladder


def test_the_ladder_goes_up_level_by_level() -> None:
    p = play(Level())
    assert p.tried("ladder") == list(LEVELS)
    assert [leg.load for leg in p.legs if leg.phase == "ladder"] == [
        Closed(int(x)) for x in LEVELS]


def test_on_the_axis_of_rates_arrivals_are_open() -> None:
    p = play(Level(), axis="rate", levels=(0.5, 1.0))
    load = p.legs[0].load
    assert isinstance(load, Open)
    assert (load.rate_rps, load.arrivals, p.legs[0].axis) == (0.5, "poisson", "rate")
    assert p.tried("ladder") == [0.5, 1.0]


def test_an_unsafe_level_without_more_throughput_ends_the_ladder() -> None:
    server = scales(8) | {16: Level(good=0.3, rps=8.3)}
    assert play(server).tried("ladder") == [1, 2, 4, 8, 16]


def test_one_level_past_is_tried_for_the_knee_while_throughput_grows() -> None:
    assert play(scales(8)).tried("ladder") == [1, 2, 4, 8, 16, 32]


def test_five_percent_more_throughput_is_growth() -> None:
    server = scales(8) | {16: Level(good=0.3, rps=8.5), 32: Level(good=0.3, rps=8.5)}
    assert play(server).tried("ladder") == [1, 2, 4, 8, 16, 32]


def test_errors_end_the_ladder_even_while_throughput_grows() -> None:
    server = scales(8) | {16: Level(good=0.5, rps=16, errors=0.2)}
    p = play(server)
    assert (p.tried("ladder"), p.concluded().safe) == ([1, 2, 4, 8, 16], 8)


def test_few_errors_do_not_end_it() -> None:
    server = scales(64) | {8: Level(good=0.97, rps=8, errors=0.03)}
    assert play(server).tried("ladder") == list(LEVELS)


def test_distress_is_unsafe_whatever_the_latencies() -> None:
    p = play(scales(16) | {16: Level(rps=16, preempts=True), 32: Level(preempts=True, rps=16)})
    assert (p.concluded().safe, p.concluded().unsafe) == (8, 16)


def test_low_levels_need_not_prove() -> None:
    server = {x: Level(rps=x / 10) for x in LEVELS}
    p = play(server)
    assert p.judged[0].load == "UNRESOLVED"
    assert p.tried("ladder") == list(LEVELS)


def test_a_level_is_held_for_more_than_one_answer() -> None:
    p = play({x: Level(rps=x / 10) for x in LEVELS})
    assert all(j.answer_s == 10 and j.window_s > 10 for j in p.judged[1:])


# --------------------------------------------------------------------------------- confirmation


def test_the_largest_good_level_is_confirmed() -> None:
    p = play(scales(8))
    end = p.concluded()
    assert p.confirmed() == [8]
    assert p.stop.reason == "CONFIRMED"
    assert (end.load, end.safe, end.unsafe, end.at_least, end.suspect) == (
        "SAFE", 8, 16, False, False)
    assert end.proof is not None
    confirmed = [j.n for j in p.judged if j.phase == "confirm"]
    assert (end.proof.value, end.proof.n, end.proof.load, end.proof.legs) == (
        8, sum(confirmed), "SAFE", len(confirmed))
    assert end.reasons[0].startswith("at 16: ")


def test_ladder_requests_never_prove() -> None:
    p = play({x: Level(rps=200) for x in LEVELS})
    assert all(j.load == "SAFE" for j in p.judged if j.phase == "ladder")
    only_ladder = [j for j in p.judged if j.phase == "ladder"]
    end = ramp.conclude(only_ladder, "concurrency", Criteria())
    assert (end.load, end.safe, end.proof, end.at_least) == ("UNRESOLVED", None, None, False)
    assert ramp.pooled(only_ladder, 64, Criteria()) is None
    assert p.confirmed() == [64]


def test_a_confirmation_has_its_own_seed_and_every_leg_its_own_name() -> None:
    p = play({**scales(8), 8: Level(rps=8, confirm=0.945)})
    seeds = [leg.seed for leg in p.legs]
    assert len(set(seeds)) == len(seeds)
    assert len({leg.id for leg in p.legs}) == len(p.legs)
    assert all(leg.seed == p.plan.seed * 10_000 + i for i, leg in enumerate(p.legs))


def test_other_seeds_give_other_seeds() -> None:
    one, two = (play(scales(8), seed=s) for s in (1, 2))
    assert not {leg.seed for leg in one.legs} & {leg.seed for leg in two.legs}


def test_all_levels_safe_is_safe_up_to_at_least_the_last() -> None:
    p = play({x: Level(rps=x) for x in LEVELS})
    end = p.concluded()
    assert (end.load, end.safe, end.unsafe, end.at_least) == ("SAFE", 64, None, True)
    assert p.stop.reason == "CONFIRMED"


def test_a_lost_confirmation_is_followed_by_the_next_lower_level() -> None:
    p = play(scales(8) | {8: Level(rps=8, confirm=0.5)})
    end = p.concluded()
    assert p.confirmed() == [8, 4]
    assert (p.stop.reason, end.safe, end.unsafe) == ("CONFIRMED", 4, 8)


def test_each_lower_level_is_tried_until_one_holds() -> None:
    p = play(scales(16) | {x: Level(rps=x, confirm=0.7) for x in (4.0, 8.0, 16.0)},
             budget_s=3600)
    assert p.confirmed() == [16, 8, 4, 2]
    assert (p.concluded().safe, p.concluded().unsafe) == (2, 4)


def test_no_confirmation_holds_is_no_safe_level() -> None:
    p = play({x: Level(rps=max(x, 4), confirm=0.5) for x in LEVELS}, budget_s=3600)
    end = p.concluded()
    assert p.confirmed() == list(LEVELS[::-1])
    assert (p.stop.reason, end.load, end.safe) == ("NO_SAFE_LEVEL", "UNSAFE", None)


def test_a_suspect_confirmation_is_a_suspect_answer() -> None:
    assert play(scales(8) | {8: Level(rps=8, suspect=True)}).concluded().suspect
    assert not play(scales(8) | {4: Level(rps=4, suspect=True)}).concluded().suspect


def test_confirmations_of_a_level_count_together() -> None:
    p = play({**scales(8), 8: Level(rps=8, confirm=0.97)}, budget_s=3600)
    legs = [j for j in p.judged if j.phase == "confirm"]
    proof = p.concluded().proof
    assert len(legs) > 1
    assert legs[0].load == "UNRESOLVED"
    assert proof is not None
    assert (proof.n, proof.good) == (sum(j.n for j in legs), sum(j.good for j in legs))
    assert (p.stop.reason, proof.load) == ("CONFIRMED", "SAFE")


def test_a_level_whose_confirmations_together_refute_it_is_left() -> None:
    """Each of them alone is UNRESOLVED, and the ladder's many good requests must not hide it."""
    server = {x: Level(rps=30, confirm=0.93 if x == 8 else 1.0) for x in (1.0, 2.0, 4.0, 8.0)}
    p = play(server, levels=(1.0, 2.0, 4.0, 8.0))
    assert p.confirmed() == [8, 4]
    once = next(j for j in p.judged if j.value == 8 and j.phase == "confirm")
    assert once.load == "UNRESOLVED"
    often = [*p.judged, *[once] * 200]
    assert ramp.status(p.judged, 8, Criteria()) == "UNRESOLVED"
    assert ramp.status(often, 8, Criteria()) == "UNSAFE"
    end = ramp.conclude(often, "concurrency", Criteria())
    assert (p.stop.reason, end.safe, end.unsafe) == ("CONFIRMED", 4, 8)


def test_a_level_at_which_a_class_is_refuted_is_left() -> None:
    """It can never be SAFE, so that confirming it again but burns the budget."""
    p = play(scales(8) | {8: Level(rps=8, refuted="confirm")})
    assert p.confirmed() == [8, 4]
    assert (p.stop.reason, p.concluded().safe) == ("CONFIRMED", 4)


@pytest.mark.parametrize("rps", [0.05, 0.15])
def test_a_level_that_answered_nothing_good_is_not_chosen(rps: Any) -> None:
    """No request, or one that missed, is no reason to prefer a level to the good one below."""
    p = play(scales(64) | {64: Level(good=0.0, rps=rps, answer_s=60)})
    top = next(j for j in p.judged if j.value == 64)
    assert (top.n, top.good, top.load) == (int(7 * rps), 0, "UNRESOLVED")
    assert (p.confirmed(), p.stop.reason, p.concluded().safe) == ([32], "CONFIRMED", 32)


def test_a_confirmation_is_not_shorter_than_the_leg_that_chose_it() -> None:
    """A level is measured for more than one answer, or only its start is seen: a proof as well."""
    p = play({x: Level(rps=min(2 * x, 100)) for x in (*LEVELS, 128.0, 256.0)},
             levels=(*LEVELS, 128.0, 256.0))
    assert p.confirmed() == [256]
    proof = p.legs[-1]
    assert proof.measure_s is not None
    assert proof.measure_s >= pace.LEG_OF_E2E * 256 / 100


# --------------------------------------------------------------------------------------- deaths


def test_after_a_death_the_server_is_restarted_and_a_lower_level_confirmed() -> None:
    p = play(scales(64) | {16: Level(rps=16, dies=9)})
    end = p.concluded()
    assert p.tried("ladder") == [1, 2, 4, 8, 16]
    assert (p.restarts, p.confirmed(), p.stop.reason) == (1, [8], "CONFIRMED")
    assert (end.load, end.safe, end.unsafe) == ("SAFE", 8, 16)
    assert end.reasons[0] == "at 16: the server died: OOM"


def test_a_death_while_confirming_moves_one_level_down() -> None:
    p = play(Changing(scales(8), {8: Level(dies=9)}))
    assert (p.confirmed(), p.restarts) == ([8, 4], 1)
    assert (p.stop.reason, p.concluded().safe, p.concluded().unsafe) == ("CONFIRMED", 4, 8)


def test_a_death_without_restart_ends_the_sweep() -> None:
    p = play(scales(64) | {16: Level(rps=16, dies=9)}, can_restart=False)
    assert (p.stop.reason, p.restarts, p.confirmed()) == ("SERVER_DIED", 0, [])
    assert "the server died: OOM" in p.stop.says
    assert "ladder-16-r0" in p.stop.says
    assert (p.concluded().safe, p.concluded().unsafe) == (None, 16)


def test_a_server_that_dies_again_and_again_ends_the_sweep() -> None:
    p = play(Changing({x: Level(rps=8) for x in LEVELS}, {x: Level(dies=9) for x in LEVELS}))
    assert (p.stop.reason, p.restarts) == ("SERVER_DIED", ramp.MAX_RESTARTS)
    assert p.confirmed() == [64, 32, 16]


def test_after_a_death_at_the_first_level_nothing_is_restarted() -> None:
    p = play(Level(dies=9))
    assert (p.stop.reason, p.restarts) == ("SERVER_DIED", 0)
    assert (p.concluded().load, p.concluded().unsafe) == ("UNSAFE", 1)


# -------------------------------------------------------------------------------------- invalid


def test_an_invalid_leg_is_repeated_once_and_the_sweep_goes_on() -> None:
    p = play(scales(8) | {4: Level(rps=4, invalid=1)})
    assert p.tried("ladder") == [1, 2, 4, 4, 8, 16, 32]
    again = [leg for leg in p.legs if leg.value == 4]
    assert [leg.id for leg in again] == ["ladder-4-r0", "ladder-4-r1"]
    assert again[0].seed != again[1].seed
    assert (p.stop.reason, p.concluded().safe) == ("CONFIRMED", 8)


def test_an_invalid_leg_tells_nothing_of_the_server() -> None:
    p = play(scales(8) | {4: Level(rps=4, good=0.0, invalid=1)}
             | {16: Level(rps=1, good=0.0, invalid=1), 32: Level(rps=16, good=0.3)})
    invalid = [j for j in p.judged if j.measurement == "INVALID"]
    assert {j.load for j in invalid} == {"UNSAFE"}
    assert ramp.conclude(invalid, "concurrency", Criteria()).unsafe is None


def test_twice_invalid_means_that_the_generator_was_the_limit() -> None:
    p = play(scales(64) | {16: Level(rps=16, invalid=2)})
    assert p.tried("ladder") == [1, 2, 4, 8, 16, 16]
    assert p.stop.reason == "GENERATOR_LIMIT"
    assert p.stop.says.startswith("16 could not be measured")


def test_the_generator_s_limit_is_named_by_what_made_the_leg_invalid() -> None:
    p = play(scales(64) | {16: Level(rps=16, invalid=2)})
    assert BUSY.says in p.stop.says
    assert BUSY.remedy in p.stop.says


def test_an_invalid_confirmation_is_repeated_as_a_confirmation() -> None:
    p = play(Changing(scales(8), {8: Level(rps=8, invalid=9)}))
    assert (p.tried("confirm"), p.stop.reason) == ([8, 8], "GENERATOR_LIMIT")
    assert p.concluded().safe is None


# ------------------------------------------------------------------------------------- verdicts


def test_the_first_level_unsafe_is_no_safe_level() -> None:
    p = play(Level(good=0.2, rps=20))
    assert (p.stop.reason, p.confirmed()) == ("NO_SAFE_LEVEL", [])
    end = p.concluded()
    assert (end.load, end.safe, end.unsafe) == ("UNSAFE", None, 1)


def test_what_contradicts_a_level_contradicts_those_above_it() -> None:
    p = play({**scales(64), 4: Level(rps=4, preempts=True)})
    assert p.concluded().unsafe == 4
    assert (p.concluded().safe, p.confirmed()) == (2, [2])


def test_a_budget_too_small_for_a_proof_is_said() -> None:
    p = play({x: Level(rps=x / 4) for x in LEVELS}, budget_s=60)
    assert p.stop.reason == "BUDGET"
    assert "60 s" in p.stop.says
    assert "--budget" in p.stop.says
    assert (p.concluded().load, p.concluded().safe) == ("UNRESOLVED", None)


def test_a_short_budget_that_can_hold_a_proof_is_used_for_one() -> None:
    """Answers of 0.25 s: after two levels 11 s of 30 are left, of which a proof takes 8."""
    p = play({x: Level(rps=4.1 * x, answer_s=0.25) for x in (1.0, 2.0, 4.0)}, budget_s=30.0,
             levels=(1.0, 2.0, 4.0))
    assert (p.tried("ladder"), p.confirmed()) == ([1, 2], [2])
    assert (p.stop.reason, p.concluded().safe) == ("CONFIRMED", 2)
    assert p.spent_s <= 30.0


@pytest.mark.parametrize(("left_s", "holds"), [(14.2, True), (13.2, False), (100.0, True)])
def test_a_confirmation_is_tried_if_what_is_left_holds_a_proof_without_misses(
        left_s: Any, holds: Any) -> None:
    """107 requests of one leg at 8.2/s: 13 s; warm-up and the last answers: 1.2 s."""
    p = play({2.0: Level(rps=8.2, answer_s=0.15)}, levels=(2.0,))
    ladder = [j for j in p.judged if j.phase == "ladder"]
    proof_s = pace.proof_s(p.plan, ladder, 2.0, left_s)
    assert (proof_s is not None) is holds
    n = pace.least_proof_n(Criteria())
    assert proof_s is None or int(8.2 * proof_s) >= n - 1
    assert sequential.share([[(n, n)]], 0.95, 0.95).lower >= 0.95
    assert sequential.share([[(n - 6, n - 6)]], 0.95, 0.95).lower < 0.95


def test_a_proof_that_does_not_come_is_given_up_for_a_lower_level() -> None:
    p = play(scales(8) | {8: Level(rps=8, confirm=0.951)})
    assert p.confirmed()[:2] == [8, 4]
    assert (p.stop.reason, p.concluded().safe) == ("CONFIRMED", 4)
    assert p.spent_s <= 1.1 * p.plan.budget_s


@pytest.mark.parametrize("budget_s", [120.0, 600.0])
@pytest.mark.parametrize("answer_s", [1.0, 20.0, 60.0])
def test_no_leg_is_begun_when_the_budget_is_spent(budget_s: Any, answer_s: Any) -> None:
    p = play({x: Level(rps=x / answer_s) for x in LEVELS}, budget_s=budget_s)
    assert p.began_s[-1] < budget_s


@pytest.mark.parametrize(("budget_s", "top"), [(60.0, 128), (120.0, 128), (600.0, 1024)])
def test_a_ladder_of_safe_levels_leaves_time_for_a_confirmation(budget_s: Any, top: Any) -> None:
    """Answers of 1 s: two minutes, or one, are enough to confirm some level."""
    levels = tuple(float(2**i) for i in range(top.bit_length()))
    p = play({x: Level(rps=x) for x in levels}, budget_s=budget_s, levels=levels)
    assert p.confirmed() != []
    assert p.spent_s <= 1.2 * budget_s


def test_nothing_tested_concludes_nothing() -> None:
    end = ramp.conclude([], "rate", Criteria())
    assert (end.load, end.safe, end.unsafe, end.at_least, end.proof, end.reasons) == (
        "UNRESOLVED", None, None, False, None, [])


def test_target_and_confidence_stand_in_the_conclusion() -> None:
    end = ramp.conclude([], "rate", Criteria(target=0.9, confidence=0.99))
    assert (end.target, end.confidence) == (0.9, 0.99)


def test_a_safe_level_above_an_unsafe_one_is_not_safe() -> None:
    p = play({x: Level(rps=x) for x in LEVELS})
    low = play({1.0: Level(rps=5, good=0.1)}, levels=(1.0,))
    end = ramp.conclude([*p.judged, *low.judged], "concurrency", Criteria())
    assert (end.load, end.safe, end.unsafe) == ("UNSAFE", None, 1)


# -------------------------------------------------------------------------------- any server


def test_the_same_answers_give_the_same_sweep() -> None:
    server = scales(8) | {8: Level(rps=8, confirm=0.9)}
    one, two = play(server), play(server)
    assert (one.legs, one.stop, one.judged) == (two.legs, two.stop, two.judged)


def test_the_reducer_does_not_change_the_state_it_is_given() -> None:
    plan = SweepPlan("concurrency", LEVELS, 600, 7, Criteria(), True)
    before = ramp.State(plan)
    after, action = ramp.step(before, Begin(), 0.0)
    assert before == ramp.State(plan)
    assert isinstance(action, RunLeg)
    assert after.legs == 1


SHARES = st.sampled_from([0.0, 0.3, 0.9, 0.94, 0.95, 0.955, 0.97, 0.99, 1.0])
ANY_LEVEL = st.builds(
    Level, good=SHARES, rps=st.sampled_from([0.0, 0.02, 0.5, 4.0, 30.0, 400.0]),
    confirm=st.none() | SHARES, errors=st.sampled_from([0.0, 0.0, 0.02, 0.5]),
    preempts=st.sampled_from([False, False, True]), dies=st.sampled_from([0, 0, 0, 1, 2, 9]),
    invalid=st.sampled_from([0, 0, 0, 1, 2]),
    refuted=st.sampled_from(["", "", "ladder", "confirm"]))


def unhurried(server: dict[float, Level], **how: Any) -> Played:
    """`play` of levels whose throughput may be nothing: answers then take very long."""
    return play({x: at if at.rps else Level(good=0.0, rps=1e-3, errors=1.0)
                 for x, at in server.items()}, **how)


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(st.lists(ANY_LEVEL, min_size=1, max_size=9), st.sampled_from([60.0, 600.0]),
       st.booleans(), st.sampled_from(["concurrency", "rate"]))
def test_every_sweep_ends_and_never_calls_safe_what_it_calls_unsafe(
        drawn: list[Level], budget_s: float, can_restart: bool, axis: Axis) -> None:
    server = {float(2**i): at for i, at in enumerate(drawn)}
    p = unhurried(server, budget_s=budget_s, can_restart=can_restart, levels=tuple(server),
                  axis=axis)
    assert len(p.legs) <= 3 * len(drawn) + budget_s
    assert p.restarts <= ramp.MAX_RESTARTS * can_restart
    assert len({leg.id for leg in p.legs}) == len({leg.seed for leg in p.legs}) == len(p.legs)
    assert all(leg.value in server and leg.measure_s is not None and leg.measure_s > 0
               and leg.warmup_s >= 0 for leg in p.legs)
    end = p.concluded()
    assert end.safe is None or end.unsafe is None or end.safe < end.unsafe
    assert (end.load == "SAFE") == (end.safe is not None)
    assert (p.stop.reason == "CONFIRMED") == (end.load == "SAFE")
    if end.safe is not None:
        proof = [j for j in p.judged if j.value == end.safe and j.phase == "confirm"
                 and j.measurement != "INVALID"]
        assert metrics.lower_bound(sum(j.good for j in proof), sum(j.n for j in proof)) >= 0.95
        assert not any(j.load == "UNSAFE" or j.refuted_classes for j in proof)
        below = [j for j in p.judged if j.value <= end.safe
                 and (j.measurement != "INVALID" or j.died)]
        assert not any(j.load == "UNSAFE" for j in below)


def test_random_servers_give_the_same_sweep_from_the_journal() -> None:
    """What conclude() says does not hang on the order of the legs."""
    p = play(scales(8) | {8: Level(rps=8, confirm=0.8)})
    mixed = list(p.judged)
    random.Random(1).shuffle(mixed)
    again = ramp.conclude(mixed, "concurrency", Criteria())
    assert (again.load, again.safe, again.unsafe, again.proof) == (
        p.concluded().load, p.concluded().safe, p.concluded().unsafe, p.concluded().proof)
