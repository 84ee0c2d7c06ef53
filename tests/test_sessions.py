"""Sessions: several turns, time to think, clients that leave; planned, sent over sockets, and in
virtual time."""

import asyncio
import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy import stats

from loadgen import openai, plan, prompts, scenario
from loadgen import turns as depths
from loadgen.errors import ScenarioError
from loadgen.judge import Criteria, ServerSigns, judge
from loadgen.leg import Leg, Window
from loadgen.ramp import SweepPlan
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Load, Open, PerSecond, Scenario
from loadgen.sessions import Abandon, Exponential, LognormalPause, Pause, leaves_after_s, think_s
from loadgen.sweep import sweep
from loadgen.virtual import VirtualExecutor
from tests.raw_server import (
    DONE,
    HEAD,
    HOLD,
    LAST,
    Script,
    finish,
    role,
    token,
    usage,
    whole,
)
from tests.test_drive import flown
from tests.virtual import config

S = 1_000_000_000


def mix(**fields: Any) -> Scenario:
    cls = {"name": "a", "kind": "chat", "prompt_tokens": 60, "output_tokens": 20,
           "sampling": {"ignore_eos": True}, **fields}
    return scenario.parse({
        "name": "t", "slo": {"ttft": "20s"}, "classes": [cls],
        "timeouts": {"first_token": "15s", "stall": "15s", "total": "30s"}}, "test")


def leg(load: Load, warmup_s: float = 0.0, measure_s: float | None = None,
        n: int | None = None) -> Leg:
    return Leg(id="l", axis="concurrency", value=1.0, phase="run", replicate=0, seed=7,
               load=load, warmup_s=warmup_s, measure_s=measure_s, num_sessions=n)


# --------------------------------------------------------------------------------------- the plan

BEFORE = {  # of commit aa98594, which knew no sessions
    "chat": "744748046d002e43", "code": "7b55157f18a519a2", "json": "d5c61075a769a8e1",
    "mixed": "a09bebff746c934d", "smoke": "2f587c8f905f8bb3", "summary": "47e1453572a1adf5"}


@pytest.mark.parametrize("name", BEFORE)
def test_plans_and_bodies_of_scenarios_without_sessions_are_what_they_were(name: Any) -> None:
    of, told = scenario.load(name), hashlib.sha256()
    for load in (Closed(8), Open(PerSecond(5))):
        what = msgspec.structs.replace(leg(load, 1, 7), value=8)
        for s in itertools.islice(plan.sessions(of, what), 12):
            cls = of.of(s.cls)
            told.update(repr((s.k, s.cls, s.due_s, s.prefix, [
                (t.prompt_tok, t.output_tok, t.think_s, t.abandon_after_s)
                for t in s.turns])).encode())
            told.update(openai.body(of.endpoint, "m", plan.prompt(
                cls, s, 0, 7, prompts.guess(cls)), s.turns[0].output_tok, cls))
    assert told.hexdigest()[:16] == BEFORE[name]


def first(of: Scenario, n: int = 400) -> list[plan.Session]:
    return list(itertools.islice(plan.sessions(of, leg(Closed(8))), n))


def test_turns_thoughts_and_leavings_change_nothing_else_of_a_plan() -> None:
    lengths = {"prompt_tokens": {"dist": "uniform", "min": 10, "max": 900}}
    plain = [s.turns[0] for s in first(mix(**lengths))]
    for more in ({"turns": 4}, {"think": "2s"}, {"abandon": {"share": 0.5, "after": "1s"}}):
        other = [s.turns[0] for s in first(mix(**lengths, **more))]
        assert [(t.prompt_tok, t.output_tok) for t in other] == [
            (t.prompt_tok, t.output_tok) for t in plain]


def test_a_session_has_its_turns_and_each_a_length_of_its_own() -> None:
    planned = first(mix(turns={"dist": "uniform", "min": 2, "max": 5},
                        prompt_tokens={"dist": "uniform", "min": 10, "max": 900}))
    assert set(Counter(len(s.turns) for s in planned)) == {2, 3, 4, 5}
    assert len({s.turns[1].prompt_tok for s in planned}) > 200
    pairs = np.array([(s.turns[0].prompt_tok, s.turns[1].prompt_tok) for s in planned])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.2


def test_thinking_takes_the_time_of_its_distribution() -> None:
    rng = np.random.default_rng(1)
    s = scenario.Seconds
    assert {think_s(Pause(s(2)), rng) for _ in range(9)} == {2.0}
    drawn = [think_s(Exponential(s(3)), rng) for _ in range(4000)]
    assert stats.kstest(drawn, stats.expon(scale=3).cdf).pvalue > 0.001
    drawn = [think_s(LognormalPause(s(3), 0.5), rng) for _ in range(4000)]
    assert stats.kstest(np.log(drawn), stats.norm(np.log(3), 0.5).cdf).pvalue > 0.001
    assert max(think_s(Exponential(s(3), s(4)), rng) for _ in range(400)) == 4.0
    assert max(think_s(LognormalPause(s(3), 2.0, s(4)), rng) for _ in range(400)) == 4.0


def test_of_so_many_requests_the_client_leaves() -> None:
    abandon = Abandon(0.25, scenario.Seconds(3))
    rng = np.random.default_rng(1)
    drawn = Counter(leaves_after_s(abandon, rng) for _ in range(4000))
    assert set(drawn) == {None, 3.0}
    assert stats.binomtest(drawn[3.0], 4000, 0.25).pvalue > 0.001
    planned = [t.abandon_after_s for s in first(mix(turns=5, abandon={
        "share": 0.25, "after": "3s"})) for t in s.turns]
    assert stats.binomtest(planned.count(3.0), len(planned), 0.25).pvalue > 0.001


def test_a_resolved_scenario_with_sessions_is_read_back_as_it_was() -> None:
    for name in ("dialogue", "chat-sessions"):
        of = scenario.load(name)
        assert scenario.parse(scenario.to_plain(of), "manifest") == of


@pytest.mark.parametrize(("key", "value", "says"), [
    ("think", 2, "2 is not a duration"), ("think", {"dist": "expo"}, "exponential"),
    ("think", {"dist": "exponential", "mean": "2s", "most": "3s"}, "max"),
    ("turns", 0, ">= 1"), ("turns", 61, "at most 60"), ("turns", "x", "number of turns"),
    ("turns", {"dist": "uniform", "min": 3, "max": 2}, "exchange them"),
    ("abandon", {"share": 1.5, "after": "2s"}, "<= 1"), ("abandon", {"share": 0.1}, "after"),
    ("kind", "dialogue", "turns = 5"), ("validator", {"check": "recall"}, "for kind dialogue")])
def test_a_scenario_that_makes_no_sense_is_refused_in_words(key: Any, value: Any,
                                                            says: Any) -> None:
    with pytest.raises(ScenarioError, match=says):
        mix(**{key: value})


# ----------------------------------------------------------------------------------- over sockets


def says(*words: str, prompt_tok: int = 10) -> Script:
    """A whole answer, a token a word."""
    return [HEAD + role() + b"".join(map(token, words)),
            finish() + usage(len(words), prompt_tok) + DONE + LAST]


def messages(body: bytes) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in json.loads(body)["messages"]]


def test_a_later_turn_holds_what_was_said_before_in_the_servers_own_words(tmp_path: Path) -> None:
    answers = [says("one", " and", ' "quoted"\\n', " 数", prompt_tok=100),
               says("two", prompt_tok=160), says("three", prompt_tok=230)]
    records, _, server = flown(tmp_path, leg(Closed(1), n=1), lambda k: answers[k],
                               mix=mix(turns=3))
    assert [(r.session, r.turn, r.outcome) for r in records] == [
        (0, i, Outcome.OK) for i in range(3)]
    sent = [messages(got.body) for got in server.requests]
    assert [[who for who, _ in turn] for turn in sent] == [
        ["user"], ["user", "assistant", "user"], ["user", "assistant"] * 2 + ["user"]]
    assert sent[1][:1] == sent[0]
    assert sent[2][:3] == sent[1]
    assert sent[1][1] == ("assistant", 'one and "quoted"\\n 数')
    assert sent[2][3] == ("assistant", "two")
    assert len({text for _, text in sent[2]}) == 5
    # all that the server counted before, what it answered, and 60 more
    assert [r.want_prompt_tok for r in records] == [60, 100 + 4 + 60, 160 + 1 + 60]


def test_completions_are_sent_the_history_in_one_piece(tmp_path: Path) -> None:
    of = msgspec.structs.replace(mix(turns=2), endpoint="completions")
    event = b'data: {"choices":[{"index":0,"text":"%b","finish_reason":%b}]}\n\n'
    answer = HEAD + _chunk(event % (b"fine", b"null")) + _chunk(event % (b"", b'"stop"')) + usage(
        1) + DONE + LAST
    _, _, server = flown(tmp_path, leg(Closed(1), n=1), lambda _: [answer], mix=of)
    one, two = (json.loads(got.body)["prompt"] for got in server.requests)
    assert two.startswith(f"{one}\nfine\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.mark.parametrize("load", [Closed(1), Open(PerSecond(50), "constant")])
def test_a_later_turn_is_due_when_its_user_has_thought(tmp_path: Path, load: Any) -> None:
    records, _, _ = flown(tmp_path, leg(load, n=2), lambda _: says("x"),
                          mix=mix(turns=3, think="150ms"))
    assert len(records) == 6
    by_session = {k: sorted((r for r in records if r.session == k), key=lambda r: r.turn)
                  for k in (0, 1)}
    for own in by_session.values():
        for before, after in itertools.pairwise(own):
            assert after.due_ns == before.end_ns + 150_000_000
            assert after.sent_ns is not None
            assert after.due_ns <= after.sent_ns < after.due_ns + S
    if isinstance(load, Closed):  # a slot's user thinks before his next session, too
        assert by_session[1][0].due_ns == by_session[0][-1].end_ns + 150_000_000
    else:
        assert by_session[1][0].due_ns - by_session[0][0].due_ns == 20_000_000


def test_without_time_to_think_a_slot_is_never_empty_for_long(tmp_path: Path) -> None:
    records, _, server = flown(tmp_path, leg(Closed(3), n=6), lambda _: says("x"),
                               mix=mix(turns=4))
    assert Counter(r.session for r in records) == dict.fromkeys(range(6), 4)
    assert server.most_inflight <= 3
    for k in range(6):
        own = sorted((r for r in records if r.session == k), key=lambda r: r.turn)
        assert all(b.due_ns >= a.end_ns for a, b in itertools.pairwise(own))


def test_a_client_that_leaves_is_abandoned_and_goes_on_with_what_it_saw(tmp_path: Path) -> None:
    def script(k: int) -> Script:
        return [HEAD + role() + token("half") + token(" a"), HOLD] if k == 0 else says("end")

    records, _, server = flown(tmp_path, leg(Closed(1), n=1), script,
                               mix=mix(turns=2, abandon={"share": 1.0, "after": "200ms"}))
    left, whole_one = records
    assert (left.outcome, whole_one.outcome) == (Outcome.ABANDONED, Outcome.OK)
    assert left.n_events == 2
    assert 0.2 <= (left.end_ns - left.due_ns) / S < 1.5
    assert messages(server.requests[1].body)[1] == ("assistant", "half a")


def test_an_exchange_that_failed_leaves_no_trace_and_the_user_goes_on(tmp_path: Path) -> None:
    answers: list[Script] = [says("one", prompt_tok=100), [whole("500 Oh", b"{}")], says("three")]
    records, _, server = flown(tmp_path, leg(Closed(1), n=1), lambda k: answers[k],
                               mix=mix(turns=3))
    assert [r.outcome for r in records] == [Outcome.OK, Outcome.HTTP_ERROR, Outcome.OK]
    sent = [messages(got.body) for got in server.requests]
    assert sent[2][:2] == sent[1][:2]
    assert [who for who, _ in sent[2]] == ["user", "assistant", "user"]
    assert sent[2][2] != sent[1][2]
    assert records[2].want_prompt_tok == 100 + 1 + 60


def test_what_exceeds_max_inflight_is_dropped_in_any_turn_and_ends_its_session(
        tmp_path: Path) -> None:
    """Three sessions at once; two may be in flight, and thinking is not."""
    load = Open(PerSecond(1000), "constant", max_inflight=2)
    records, _, server = flown(
        tmp_path, leg(load, n=3), lambda _: [
            HEAD + role() + token(), 0.1, finish() + usage(1) + DONE + LAST],
        mix=mix(turns=2, think="50ms"))
    assert server.most_inflight == 2
    assert Counter((r.turn, r.outcome) for r in records) == {
        (0, Outcome.OK): 2, (0, Outcome.DROPPED): 1, (1, Outcome.OK): 2}


# --------------------------------------------------------------------------------- in virtual time


def ran(of: Scenario, load: Load, *options: str, seconds: float | None = None, n: int | None = None,
        warmup_s: float = 0.0) -> tuple[Window, list[RequestRecord], ServerSigns]:
    executor = VirtualExecutor(of, config(*options))
    return asyncio.run(executor.run_leg(leg(load, warmup_s, seconds, n)))


def by_session(records: list[RequestRecord]) -> list[list[RequestRecord]]:
    found: dict[int, list[RequestRecord]] = {}
    for r in sorted(records, key=lambda r: (r.session, r.turn)):
        found.setdefault(r.session, []).append(r)
    return list(found.values())


TALK = {"turns": 4, "think": {"dist": "exponential", "mean": "2s"}}


@pytest.mark.parametrize("load", [Closed(5), Open(PerSecond(2.0))])
def test_virtual_sessions_have_their_turns_their_pauses_and_their_history(load: Any) -> None:
    of = mix(**TALK)
    _, records, _ = ran(of, load, n=20)
    assert {r.outcome for r in records} == {Outcome.OK}
    planned = {s.k: s for s in plan.sessions(of, leg(load, n=20))}
    for own in by_session(records):
        turns = planned[own[0].session].turns
        assert [r.turn for r in own] == [0, 1, 2, 3]
        assert [r.prompt_tok for r in own] == [60, 140, 220, 300]  # 60 more and 20 answered
        for a, b in itertools.pairwise(own):
            assert (b.due_ns - a.end_ns) / S == pytest.approx(turns[b.turn].think_s, abs=1e-6)


def test_a_virtual_closed_loop_has_so_many_users_of_whom_some_think() -> None:
    of = mix(turns=3, think="4s", output_tokens=100)
    window, records, _ = ran(of, Closed(6), seconds=120.0, warmup_s=20.0)
    busy = [(r.due_ns, 1) for r in records] + [(r.end_ns, -1) for r in records]
    assert max(itertools.accumulate(x for _, x in sorted(busy))) <= 6
    sessions = by_session(records)
    assert len(sessions) > 30
    judged = judge(leg(Closed(6), 20.0, 120.0), window, records, ServerSigns(), of, Criteria())
    mean_s = np.mean([(r.end_ns - r.due_ns) / S for r in records])
    assert judged.balance.slots_frac is None  # they rest by plan …
    assert judged.measurement == "VALID", judged.findings
    assert judged.balance.inflight_mean == pytest.approx(6 * mean_s / (mean_s + 4), rel=0.15)


@pytest.mark.parametrize(("seconds", "warmup_s", "told"), [
    (6.0, 0.0, True), (4.0, 1.0, True), (90.0, 0.0, False), (90.0, 30.0, False)])
@pytest.mark.parametrize("load", [Closed(8), Open(PerSecond(3.0))])
def test_a_virtual_window_shorter_than_a_session_is_told_to_see_mostly_first_turns(
        load: Any, seconds: float, warmup_s: float, told: bool) -> None:
    of = mix(turns=6, think="2s")  # a session takes some 15 s
    window, records, signs = ran(of, load, seconds=seconds, warmup_s=warmup_s)
    judged = judge(leg(load, warmup_s, seconds), window, records, signs, of, Criteria())
    assert [f.rule for f in judged.findings] == ["first-turns"] * told
    if told:
        says = judged.findings[0].says
        assert "and of whole sessions it is no. 3.5" in says
        [took] = re.findall(r"a session takes about (\d+) s", says)
        whole = [s for s in by_session(ran(of, load, n=20)[1]) if len(s) == 6]
        real_s = np.mean([(s[-1].end_ns - s[0].due_ns) / S for s in whole])
        assert float(took) == pytest.approx(real_s + 2, rel=0.2)
        assert judged.measurement == "SUSPECT"


def test_so_many_virtual_sessions_are_whole_and_nothing_is_said_of_their_turns() -> None:
    of = mix(turns=6, think="2s")
    window, records, signs = ran(of, Closed(8), n=8)
    judged = judge(leg(Closed(8), n=8), window, records, signs, of, Criteria())
    assert judged.findings == []


@pytest.mark.parametrize(("turns", "whole"), [
    (1, None), (5, 3.0), ({"dist": "uniform", "min": 2, "max": 4}, 19 / 9),
    ({"dist": "lognormal", "median": 4, "sigma": 0.5, "min": 2, "max": 12}, None)])
def test_the_mean_turn_of_whole_sessions_is_that_of_the_plan(turns: Any, whole: Any) -> None:
    of = mix(turns=turns)
    planned = itertools.islice(plan.sessions(of, leg(Closed(1))), 4000)
    drawn = [k for s in planned for k in range(1, len(s.turns) + 1)]
    records = [RequestRecord(leg="l", shard=0, seq=0, session=0, turn=0, cls="a", due_ns=0,
                             end_ns=1, outcome=Outcome.OK)]
    found = depths.of(of, records, records)
    assert bool(found) == (turns != 1)
    for depth in found:
        assert depth.whole == pytest.approx(np.mean(drawn), rel=0.02)
        assert depth.chance == pytest.approx(2 * np.std(drawn), rel=0.02)
        assert whole is None or depth.whole == pytest.approx(whole)
        assert depth.session_s is None


def test_a_virtual_session_finds_its_history_in_the_prefix_cache() -> None:
    of = mix(turns=5, prompt_tokens=160, output_tokens=80)
    hits = ran(of, Closed(4), n=40)[2].prefix_hit_frac
    none = ran(mix(prompt_tokens=160, output_tokens=80), Closed(4), n=40)[2].prefix_hit_frac
    # turn k holds k times 240 tokens of the past, in blocks of 16, of 160 + k · 240
    past = sum(240 * k for k in range(5)) / sum(160 + 240 * k for k in range(5))
    assert hits == pytest.approx(past, abs=0.03)
    assert none is not None
    assert none < 0.12


def test_virtual_clients_leave_at_their_instant_and_keep_what_they_saw() -> None:
    of = mix(turns=3, output_tokens=200, abandon={"share": 0.5, "after": "700ms"})
    _, records, _ = ran(of, Closed(3), n=40)
    left = [r for r in records if r.outcome is Outcome.ABANDONED]
    assert {r.outcome for r in records} == {Outcome.OK, Outcome.ABANDONED}
    assert stats.binomtest(len(left), len(records), 0.5).pvalue > 0.001
    for r in left:
        assert (r.end_ns - r.due_ns) / S == pytest.approx(0.7, abs=1e-6)
        assert r.output_tok is not None
        assert 0 < r.output_tok < 200
    for own in by_session(records):
        for a, b in itertools.pairwise(own):
            assert b.prompt_tok == (a.prompt_tok or 0) + (a.output_tok or 0) + 60


def test_a_virtual_session_with_a_turn_that_does_not_fit_goes_on_without_it() -> None:
    of = mix(turns=3, prompt_tokens=700, output_tokens=100)
    _, records, _ = ran(of, Closed(1), "--max-model-len", "1200", n=2)
    assert [r.outcome for r in records] == [Outcome.OK, Outcome.HTTP_ERROR, Outcome.HTTP_ERROR] * 2


def test_virtual_sessions_are_the_same_for_a_seed_to_the_byte() -> None:
    of = mix(**TALK, abandon={"share": 0.3, "after": "500ms"})
    one, two = (msgspec.json.encode(ran(of, Closed(8), seconds=30.0)[1]) for _ in range(2))
    assert one == two


def test_the_check_with_arrivals_by_chance_sends_as_many_requests_as_the_level_did() -> None:
    """Its rate is of sessions, of which each has its turns."""
    of = mix(turns=5, think="100ms")
    executor = VirtualExecutor(of, config())
    seen: list[Any] = []
    asyncio.run(sweep(
        SweepPlan("concurrency", (4.0, 8.0), 900.0, 3, Criteria(), can_restart=False, checks=True),
        of, executor, lambda _, j: seen.append(j), lambda: executor.now_s))
    by_phase = {j.phase: j for j in seen}
    assert by_phase["soak"].each_session == pytest.approx(5, rel=0.1)
    assert by_phase["poisson"].offered_rps == pytest.approx(by_phase["soak"].offered_rps, rel=0.25)


def test_a_fixed_pause_makes_the_throughput_that_littles_law_foretells() -> None:
    of = mix(think="3s", output_tokens=50)
    window, records, _ = ran(of, Closed(10), seconds=200.0, warmup_s=10.0)
    inside = [r for r in records if window.from_ns <= r.due_ns < window.to_ns]
    answer_s = np.mean([(r.end_ns - r.due_ns) / S for r in inside])
    assert len(inside) / 200 == pytest.approx(10 / (3 + answer_s), rel=0.03)
