"""Long legs against short ones, and starts that crowd themselves: neither may give a false edge."""

import asyncio
import functools
import tempfile
from pathlib import Path

import msgspec
import pytest

from loadgen import checks, evidence, pace, scenario, soaks
from loadgen.judge import Criteria, Judgement
from loadgen.leg import Phase
from loadgen.ramp import Conclusion, conclude, finest_of
from loadgen.scenario import Open
from loadgen.sweep import sweep
from loadgen.virtual import VirtualExecutor
from tests.test_evidence import concluded, leg
from tests.virtual import config

CRITERIA = Criteria()
ALIKE = """
name = "alike"
slo = {{ ttft = "{ttft}", tpot = "50ms" }}
[[classes]]
name = "only"
kind = "chat"
prompt_tokens = 1024
output_tokens = 512
sampling = {{ ignore_eos = true }}
"""
LARGE = ("--tensor-parallel-size", "4", "--model", "qwen2.5-7b", "--gpu-memory-utilization",
         "0.95", "--max-model-len", "131072", "--max-num-seqs", "256")
SMALL = ("--tensor-parallel-size", "2", "--model", "qwen2.5-0.5b")


@functools.cache
def searched(ttft: str, most: int, budget_s: float, *server: str) -> tuple[
        list[Judgement], Conclusion]:
    """A search with all its checks, of requests that are all alike."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "alike.toml"
        path.write_text(ALIKE.format(ttft=ttft))
        mix = scenario.load(str(path))
    executor = VirtualExecutor(mix, config("--gpu", "4090d", *server))
    plan = pace.SweepPlan(
        "concurrency", tuple(float(2**k) for k in range(most.bit_length())), budget_s, 1, CRITERIA,
        can_restart=False, finest=finest_of(budget_s), checks=True)
    found = asyncio.run(sweep(plan, mix, executor, lambda *_: None, lambda: executor.now_s))
    return found.judgements, conclude(found.judgements, "concurrency", CRITERIA)


# ----------------------------------------------------------------------------- whole searches


def test_a_start_that_crowded_itself_is_no_edge() -> None:
    """With a whole warm-up all are good at 64 and at 128 for minutes; with a short one 97 % miss
    at 64. In the mean an answer takes 49 ms for each token from 160 on."""
    legs, end = searched("500ms", 256, 2400.0, *LARGE)
    first, second = (j for j in legs if j.value == 64 and j.phase == "ladder")
    assert (first.crowded, first.load) == (True, "UNRESOLVED")
    assert (second.crowded, second.good) == (False, second.n)
    assert end.safe is not None
    assert 128 < end.safe < 170
    assert end.unsafe is not None
    assert end.unsafe > end.safe


def test_what_open_arrivals_may_come_at_is_looked_for() -> None:
    _, end = searched("500ms", 256, 2400.0, *LARGE)
    tried = [c for c in end.checks if c.kind == "poisson"]
    assert tried[0].value == end.safe
    assert not tried[0].held
    assert tried[-1].held
    assert [c.value for c in tried] == sorted((c.value for c in tried), reverse=True)


def test_a_level_is_safe_by_its_own_soak_where_that_of_a_higher_one_failed() -> None:
    """Prompts bunch up after some 40 s: in the long run 97 % are good at 160, 91 % at 190."""
    legs, end = searched("2s", 512, 1200.0, *SMALL)
    short = [j for j in legs if j.phase == "confirm" and j.value > 200 and j.good == j.n]
    assert short != []  # these would have been the answer
    assert end.safe is not None
    assert 128 <= end.safe <= 175
    assert any(j.phase == "soak" and j.value == end.safe and j.load == "SAFE" for j in legs)


def test_without_time_for_another_soak_it_is_unresolved_and_not_safe() -> None:
    _, end = searched("2s", 512, 720.0, *SMALL)
    assert (end.load, end.safe) == ("UNRESOLVED", None)
    assert end.soak_failed is not None
    assert end.more_s is None


# -------------------------------------------------------------------------------------------- legs


def proven(level: float) -> list[Judgement]:
    return [leg(level, "confirm", replicate=i) for i in range(4)]


def long_leg(level: float, good: float, phase: Phase = "soak") -> Judgement:
    """Of four minutes, in blocks of 8 s."""
    one = leg(level, phase, good, n=6000)
    return msgspec.structs.replace(one, blocks=[(round(200 * good), 200)] * 30,
                                   load="SAFE" if good > 0.98 else "UNRESOLVED")


@pytest.mark.parametrize("phase", ["soak", "recover"])
def test_a_long_leg_that_fails_takes_the_proof_of_lower_levels(phase: Phase) -> None:
    legs = [*proven(48), *proven(56)]
    assert concluded(*legs).safe == 56
    end = concluded(*legs, long_leg(56, 0.85, phase))
    assert (end.load, end.safe, end.soak_failed) == ("UNRESOLVED", None, 56)
    assert concluded(*legs, long_leg(56, 0.85, phase), long_leg(48, 1.0)).safe == 48


def test_a_soak_a_little_under_the_target_takes_only_its_own_level() -> None:
    near = [leg(56, "confirm", 0.98, n=200, replicate=i) for i in range(4)]
    assert concluded(*proven(48), *near).safe == 56
    end = concluded(*proven(48), *near, long_leg(56, 0.945))
    assert (end.safe, end.soak_failed, end.missed, end.at_least) == (48, None, 56, False)


def test_a_recovery_whose_start_crowded_itself_says_nothing_of_the_level() -> None:
    crowd = msgspec.structs.replace(long_leg(56, 0.1, "recover"), crowded=True)
    assert concluded(*proven(56), crowd).safe == 56
    assert not soaks.is_long(crowd)


def test_what_missed_above_the_safe_level_is_named_and_ends_the_at_least() -> None:
    short = msgspec.structs.replace(leg(64, "ladder", 0.8, n=90), load="UNRESOLVED")
    end = concluded(*proven(48), short)
    assert (end.safe, end.unsafe, end.missed, end.at_least) == (48, None, 64, False)


def plan(budget_s: float = 1800.0) -> pace.SweepPlan:
    return pace.SweepPlan("concurrency", (16.0, 32.0, 64.0), budget_s, 1, CRITERIA, False,
                          finest=1.05, checks=True)


def test_the_next_soak_lies_between_what_may_be_safe_and_what_failed() -> None:
    legs = [leg(32, "ladder"), *proven(56), long_leg(56, 0.85)]
    wanted = checks.next_soak(plan(), legs, 900.0)
    assert wanted is not None
    assert (wanted.phase, wanted.value) == ("soak", 42)
    assert checks.next_soak(plan(), legs, 5.0) is None
    done = [*legs, long_leg(42, 1.0), long_leg(46, 0.9)]
    assert evidence.proven(done, CRITERIA) == 42
    assert checks.next_soak(plan(), done, 900.0) is None  # near enough


def test_open_arrivals_that_missed_are_tried_at_a_lower_level_s_rate() -> None:
    legs = [leg(32, "ladder"), *proven(40), long_leg(40, 1.0), leg(40, "reference"),
            leg(40, "poisson", 0.7)]
    wanted = checks.next_check(plan(), legs, 40.0, 900.0)
    assert wanted is not None
    assert (wanted.phase, wanted.value) == ("poisson", 32)
    assert isinstance(wanted.load, Open)
    kept = checks.next_check(plan(), [*legs, leg(32, "poisson")], 40.0, 900.0)
    assert kept is not None
    assert kept.phase == "burst"


def test_answers_are_foreseen_on_a_line_of_the_levels_below() -> None:
    """A step takes a fixed time and some for each request: 4 s at 16, 6 s at 32: 10 s at 64."""
    legs = [leg(16, "ladder", answer_s=4.0), leg(32, "ladder", answer_s=6.0)]
    assert pace.answer_s(plan(), legs, 64) == pytest.approx(10.0)


def test_a_level_is_not_far_where_the_two_before_it_point_at_the_limits() -> None:
    near, far = ([leg(16, "ladder", strain=s), leg(32, "ladder", strain=0.5)] for s in (0.3, 0.48))
    assert not pace.is_far(near, 64)
    assert pace.is_far(far, 64)
