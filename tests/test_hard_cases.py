"""Servers that behave badly while they are searched: each gets the verdict that is right, and no
percentile that is none. On the simulator's engine in virtual time, and on hand-made runs."""

import asyncio
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from analysis import ci, frame, gate, report, steps, summary, words
from analysis.frame import Run
from loadgen import cli, evidence, ramp, scenario, settle
from loadgen.evidence import Conclusion
from loadgen.judge import Criteria, ServerSigns
from loadgen.leg import Leg, Window
from loadgen.ramp import SweepPlan
from loadgen.record import RequestRecord
from loadgen.scenario import Closed, Scenario
from loadgen.sweep import SweepResult, run_one, sweep
from loadgen.validity import Finding
from loadgen.virtual import VirtualExecutor
from servers.sim.faults import parse_profile
from tests import synthetic
from tests.oracle.engine import scaled
from tests.synthetic import Plain, S
from tests.virtual import config

MIX = scenario.load("mixed")
LEVELS = (1.0, 4.0, 16.0, 32.0, 64.0)
TRUE_SAFE = 42  # of the server as it is


class Changing:
    """An executor whose server has another speed in each leg: of the time, and of the level."""

    def __init__(self, mix: Scenario, speed: Callable[[float, float], float]) -> None:
        self.now_s, self._mix, self._speed = 3.0, mix, speed

    async def run_leg(self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]:
        executor = VirtualExecutor(self._mix, scaled(config(), self._speed(self.now_s, leg.value)))
        executor.now_s = self.now_s
        found = await executor.run_leg(leg)
        self.now_s = executor.now_s
        return found

    async def restart(self, why: str) -> None:
        raise AssertionError(why)


def searched(executor: Any, seed: int, budget_s: float = 230.0,
             levels: Sequence[float] = LEVELS) -> tuple[Conclusion, SweepResult]:
    plan = SweepPlan("concurrency", tuple(levels), budget_s, seed, Criteria(), can_restart=True,
                     finest=ramp.finest_of(budget_s))
    result = asyncio.run(sweep(plan, MIX, executor, lambda *_: None, lambda: executor.now_s))
    return ramp.conclude(result.judgements, "concurrency", Criteria()), result


def slow_at(level: float, speed: float = 0.4) -> Callable[[float, float], float]:
    return lambda _, value: speed if value == level else 1.0


# ---------------------------------------------------------------------------- found in a search


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_server_that_gets_slower_while_it_is_searched_is_not_called_safe_beyond_what_it_became(
        seed: int) -> None:
    """From 100 s on at 0.72 of its speed, as a card that got hot: then 96 % are good at 20 and 94 %
    at 22; at full speed it would be 42. Only for searches whose proof came after that."""
    end, _ = searched(Changing(MIX, lambda t, _: 1.0 if t < 100 else 0.72), seed)
    assert end.safe is None or end.safe <= 23


def test_a_level_whose_confirmation_was_slower_than_the_last_one_shows_the_drift() -> None:
    """The slower one was lost, and left: that it was cut does not hide it."""
    end, result = searched(Changing(MIX, lambda t, _: 1.0 if t < 100 else 0.72), 2)
    at = [j for j in result.judgements if j.phase == "confirm" and j.value == 33]
    assert [j.cut for j in at] == [False, True]
    assert len(end.doubts) == 1
    assert end.doubts[0].startswith("drift: at 33 the median TPOT went from 37.6 to 47.5 ms, slow")


def test_a_cut_leg_that_seems_faster_is_no_drift() -> None:
    """Its slow answers are still under way."""
    _, result = searched(Changing(MIX, lambda t, _: 1.0 if t < 100 else 0.72), 2)
    whole, cut = [j for j in result.judgements if j.phase == "confirm" and j.value == 33]
    seems = msgspec.structs.replace(cut, tpot_p50_s=0.02, ttft_p50_s=whole.ttft_p50_s)
    assert evidence.drifts([whole, seems]) == []
    assert evidence.drifts([whole, msgspec.structs.replace(seems, cut=False)]) != []


class Knowing(VirtualExecutor):
    """Contamination: the k-th prompt of each leg is that of the leg before, which the cache has."""

    async def run_leg(self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]:
        self._ids = itertools.count(1)  # what nobody else has is named after its request
        return await super().run_leg(leg)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_server_that_knows_the_prompts_is_measured_by_nobody(seed: int) -> None:
    end, result = searched(Knowing(MIX, config()), seed)
    assert (end.load, end.safe) == ("UNRESOLVED", None)
    last = result.judgements[-1]
    assert last.measurement == "INVALID"
    assert [f.rule for f in last.findings] == ["prompts-reused"]


def test_prompts_that_were_known_are_not_called_the_generator_s_limit(tmp_path: Path) -> None:
    run = frame.load(synthetic.run_of(tmp_path / "run", (8, "INVALID")))
    known = Finding("prompts-reused", "INVALID", "the server had 60% of the prompts' tokens in its "
                    "prefix cache", "another --seed than the last run's")
    j = msgspec.structs.replace(run.judgements[0], findings=[known])
    said = words.verdict(msgspec.structs.replace(run, judgements=[j]))
    assert "the server's prefix cache knew the prompts" in said[0]
    assert not any("load generator" in x for x in said if not x.startswith("Generator: "))


def test_a_server_that_is_worse_at_a_lower_level_is_safe_only_below_it() -> None:
    end, result = searched(Changing(MIX, slow_at(16)), 2)
    assert next(j for j in result.judgements if j.value == 16).load == "UNSAFE"
    assert end.unsafe == 16
    assert end.safe is not None
    assert end.safe < 16


def test_a_higher_level_that_is_better_is_told_and_does_not_count() -> None:
    """All levels asked for, so that none is passed over."""
    executor = Changing(MIX, slow_at(16))
    found = []
    for i, value in enumerate((8, 16, 24)):
        leg = Leg(id=f"ladder-{value}", axis="concurrency", value=value, phase="ladder",
                  replicate=0, seed=i, load=Closed(value), warmup_s=8.0, measure_s=30.0)
        found.append(asyncio.run(run_one(leg, MIX, Criteria(), executor))[1])
    end = ramp.conclude(found, "concurrency", Criteria())
    assert (end.safe, end.unsafe) == (None, 16)
    assert [x.partition(",")[0] for x in end.doubts] == ["not monotone: 0 % were good at 16"]


def test_an_engine_that_dies_at_a_level_leaves_the_levels_below_it_safe() -> None:
    executor = VirtualExecutor(MIX, config(), faults=[parse_profile("oom@32")])
    end, result = searched(executor, 1)
    dead = next(j for j in result.judgements if j.died)
    assert dead.value == end.unsafe == 32
    assert end.load == "SAFE"
    assert end.safe is not None
    assert 16 <= end.safe < 32
    assert end.reasons[0] == "at 32: the server died: CUDA out of memory"


# ------------------------------------------------------------------------------------- stalls


@pytest.mark.parametrize("seed", [1, 2])
def test_one_stalled_answer_in_a_hundred_is_a_miss_and_no_trend(seed: int) -> None:
    """A failed request is infinitely far beyond its limits, which must not make a trend of two."""
    executor = VirtualExecutor(MIX, config(), faults=[parse_profile("stall@5:0.01")])
    end, result = searched(executor, seed)
    assert sum(j.misses.get("STALLED", 0) for j in result.judgements) >= 4
    assert all(j.rises is None for j in result.judgements)
    assert not any(word in reason for j in result.judgements for reason in j.reasons
                   for word in ("nan", "inf "))
    assert end.load in ("SAFE", "UNRESOLVED")  # 99 % of them are good: no level below is refuted
    assert end.unsafe is None or end.unsafe >= 32


def test_stalls_of_one_in_a_hundred_do_not_hide_a_safe_level_where_there_is_time() -> None:
    executor = VirtualExecutor(MIX, config(), faults=[parse_profile("stall@5:0.01")])
    end, _ = searched(executor, 2, budget_s=1800.0)
    assert end.load == "SAFE"
    assert end.safe is not None
    assert 16 <= end.safe <= TRUE_SAFE


@pytest.mark.parametrize(("values", "rising"), [
    ([0.5] * 30 + [math.inf] + [0.5] * 60 + [math.inf] + [0.5] * 8, False),
    ([math.inf] * 100, False),
    ([0.5] * 50 + [math.inf] * 50, True),
    ([0.5 + i / 100 for i in range(100)], True)])
def test_failures_make_a_trend_only_where_they_come_late(values: list[float],
                                                         rising: bool) -> None:
    found = settle.rises(values)
    assert (found is not None) == rising
    assert found is None or 1 < found < 10


# ------------------------------------------------------------------------------- hand-made runs


def bimodal(path: Path, slow: int) -> Run:
    """400 answers in 40 s; of each hundred so many wait 5 s for their first token, the others
    40 ms, and nothing lies between."""
    leg = synthetic.leg(10, "run", 40.0, 0.0, axis="rate")
    records = []
    for k in range(400):
        r = synthetic.answer_of(leg, 100 * S + k * S // 10, 0.4, seq=k)
        assert r.first_ns is not None
        late_ns = 4_960_000_000 if k * slow // 100 != (k + 1) * slow // 100 else 0
        r.first_ns, r.end_ns = r.first_ns + late_ns, r.end_ns + late_ns
        records.append(r)
    window = Window(leg.id, 100 * S, 100 * S, 140 * S, 150 * S, "done")
    return frame.load(synthetic.write_plain(path, Plain([(leg, window)], records)))


@pytest.mark.parametrize(("slow", "load", "p90_s"), [
    (0, "SAFE", 0.04), (1, "SAFE", 0.04), (5, "UNRESOLVED", 0.04), (12, "UNSAFE", 5.0),
    (50, "UNSAFE", 5.0)])
def test_of_two_modes_a_percentile_is_in_one_and_never_between(tmp_path: Path, slow: int,
                                                               load: str, p90_s: float) -> None:
    run = bimodal(tmp_path / "run", slow)
    assert run.judgements[0].load == load
    row = steps.table(run).to_dict("records")[0]
    for q in ("p50", "p90", "p99"):
        assert min(abs(row[f"ttft_{q}_s"] - x) for x in (0.04, 5.0)) < 1e-6
    assert row["ttft_p90_s"] == pytest.approx(p90_s)


NO_NUMBER = re.compile(r"\b(nan|inf|None|NaN)\b")


def test_a_level_in_which_no_request_was_due_proves_nothing_and_says_no_number(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The middle one of three: nothing was due in its window."""
    monkeypatch.setattr(report, "_library", str)
    path = synthetic.run_of(tmp_path / "whole", (2, "SAFE"), (4, "SAFE"), (8, "SAFE"))
    run = frame.load(path)
    empty = run.legs[1][0].id
    records = [r for r in run.folder.records() if r.leg != empty]
    run = frame.load(synthetic.write_plain(tmp_path / "run", Plain(run.legs, records)))
    j = run.judgements[1]
    assert (j.n, j.load, j.lower, j.upper) == (0, "UNRESOLVED", 0.0, 1.0)
    assert gate.exit_code(run) == cli.INCONCLUSIVE
    row = steps.table(run).to_dict("records")[1]
    assert not [k for k in row if re.search(r"_p\d\d_s$", str(k)) and row[k] == row[k]
                and row[k] is not None]
    text = "\n".join(words.verdict(run)) + ci.markdown(run) + ci.junit(run)
    assert not NO_NUMBER.search(text), NO_NUMBER.findall(text)
    assert "no request was due in the window" in text
    assert report.write(run).exists()
    assert summary.summarise(run)["verdict"]["load"] == "UNRESOLVED"
