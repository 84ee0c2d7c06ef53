"""Legs in virtual time: the same plan, records and counters as with sockets."""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadgen import cli, metrics, plan, scenario
from loadgen.judge import Criteria, ServerSigns, judge
from loadgen.leg import Leg, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Load, Open, PerSecond, Scenario, Trace
from loadgen.store import RunFolder
from loadgen.virtual import VirtualExecutor
from servers.sim.engine import Engine, Request, Step
from servers.sim.faults import parse_profile
from tests.virtual import config

MIXED = scenario.load("mixed")


def leg(load: Load, seconds: float | None = 60.0, sessions: int | None = None) -> Leg:
    return Leg(id="l", axis="concurrency", value=1, phase="run", replicate=0, seed=3, load=load,
               warmup_s=5.0, measure_s=seconds, num_sessions=sessions)


def ran(load: Load, *options: str, mix: Scenario = MIXED, seconds: float | None = 60.0,
        sessions: int | None = None) -> tuple[Window, list[RequestRecord], ServerSigns]:
    executor = VirtualExecutor(mix, config(*options))
    return asyncio.run(executor.run_leg(leg(load, seconds, sessions)))


def test_the_same_seed_gives_the_same_records_to_the_byte() -> None:
    one, two = (msgspec.json.encode(ran(Closed(concurrency=16))[1]) for _ in range(2))
    assert one == two


def test_each_request_of_the_plan_gets_the_tokens_it_asks_for() -> None:
    window, records, signs = ran(Closed(concurrency=8), seconds=None, sessions=60)
    planned = {s.k: s.turns[0] for s in plan.sessions(MIXED, leg(Closed(concurrency=8), None, 60))}
    assert {r.session: (r.prompt_tok, r.output_tok) for r in records} == {
        k: (t.prompt_tok, t.output_tok) for k, t in planned.items()}
    assert {r.outcome for r in records} == {Outcome.OK}
    assert window.records == len(records) == signs.counted.requests == 60
    assert signs.counted.output_tok == sum(r.output_tok or 0 for r in records)
    assert signs.counted.prompt_tok == sum(r.prompt_tok or 0 for r in records)


def test_a_closed_loop_has_no_more_in_flight_than_its_slots() -> None:
    _, records, _ = ran(Closed(concurrency=5))
    assert max(r.inflight or 0 for r in records) == 5
    assert all(r.gaps_us == [] or min(r.gaps_us) > 0 for r in records)
    assert all((r.last_ns or 0) <= r.end_ns + 1000 for r in records)


def test_an_open_loop_sends_when_the_plan_says() -> None:
    load = Open(rate_rps=PerSecond(2.0))
    window, records, _ = ran(load)
    due_s = sorted((r.due_ns - window.t0_ns) / 1e9 for r in records)
    wanted = [s.due_s for s, _ in zip(plan.sessions(MIXED, leg(load)), due_s, strict=False)]
    assert due_s == pytest.approx(wanted, abs=1e-6)


def test_the_window_of_an_open_leg_that_is_left_ends_with_its_arrivals() -> None:
    """Not where the front end, seconds behind, would have written its last token."""
    one = Leg(id="l", axis="rate", value=70, phase="poisson", replicate=0, seed=3,
              load=Open(PerSecond(70.0)), warmup_s=10, measure_s=60, cut_below=0.95)
    executor = VirtualExecutor(MIXED, config("--gpu", "h200"))
    window, records, signs = asyncio.run(executor.run_leg(one))
    assert window.ending == "cut"
    assert window.end_ns - window.to_ns > 1e9
    assert 0 < window.to_ns - max(r.due_ns for r in records) < 0.2e9
    judged = judge(one, window, records, signs, MIXED, Criteria())
    assert judged.measurement == "VALID", judged.findings


def test_a_trace_ends_with_its_last_request() -> None:
    _, records, _ = ran(Trace(due_s=(0.0, 0.5, 20.0)), seconds=30.0)
    assert [r.outcome for r in records] == [Outcome.OK] * 3


def test_what_exceeds_max_inflight_is_dropped() -> None:
    _, records, _ = ran(Open(rate_rps=PerSecond(20.0), max_inflight=8), seconds=10.0)
    assert {Outcome.OK, Outcome.DROPPED} <= {r.outcome for r in records}
    assert max(r.inflight or 0 for r in records) == 8


def test_a_shared_prefix_is_found_in_the_cache_and_a_unique_prompt_is_not() -> None:
    alone = ran(Closed(concurrency=4))[2].prefix_hit_frac
    shared = msgspec.structs.replace(MIXED, classes=tuple(
        msgspec.structs.replace(c, shared_prefix=scenario.SharedPrefix(tokens=64))
        for c in MIXED.classes))
    together = ran(Closed(concurrency=4), mix=shared)[2].prefix_hit_frac
    assert alone is not None
    assert together is not None
    assert alone < 0.1 < together
    assert ran(Closed(concurrency=4), "--no-enable-prefix-caching")[2].prefix_hit_frac is None


def test_short_memory_shows_as_preemptions_and_all_still_get_their_tokens() -> None:
    _, records, signs = ran(Closed(concurrency=96), "--max-model-len", "4096",
                            "--gpu-memory-utilization", "0.66", seconds=None, sessions=300)
    assert signs.preemptions
    assert all(r.output_tok == r.max_tokens for r in records)
    assert metrics.quantile((max(r.gaps_us) for r in records), 0.99) is not None


def test_coasting_is_the_same_as_stepping() -> None:
    rng = random.Random(2)
    requests = [Request(i, rng.randint(1, 900), rng.randint(1, 300), ignore_eos=True)
                for i in range(80)]

    def ends(coasts: bool) -> list[float]:
        engine, now_s = Engine(config("--max-num-seqs", "16")), 0.0
        seen: list[float] = []
        for r in requests:
            engine.submit(r)
        while True:
            quick = engine.coast(now_s, now_s + 1.0) if coasts else []
            step: Step | None = None if quick else engine.step(now_s)
            if not quick and step is None:
                assert engine.stats.generation_tok == sum(r.max_tokens for r in requests)
                return seen
            seen += quick or [step.end_s if step else 0.0]
            now_s = seen[-1]

    assert ends(coasts=True) == ends(coasts=False)


# ---------------------------------------------------------------------------------- the command


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as said:
        cli.entry(list(words))
    assert isinstance(said.value.code, int)
    return said.value.code


def test_a_virtual_sweep_leaves_a_run_folder_that_says_simulated(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert command("sweep", "--max-concurrency", "64", "--virtual", "--seed", "1", "--no-report",
                   f"--out={out}", "--", "--gpu", "4090d") == 0
    said = capsys.readouterr().out
    assert "simulated" in said
    assert "Generator" not in said  # there is none
    manifest = RunFolder(out).manifest()
    assert (manifest.server["simulated"], manifest.server["virtual_time"]) == (True, True)
    assert json.loads((out / "summary.json").read_bytes())["simulated"] is True
    assert len(list(RunFolder(out).records())) > 100
    sampled = [(r.source, r.name, r.t_ns, str(r.labels)) for r in RunFolder(out).rows()]
    assert len(set(sampled)) == len(sampled)
    assert json.loads((out / "summary.json").read_bytes())["findings"] == []
    again = tmp_path / "second"
    command("sweep", "--max-concurrency", "64", "--virtual", "--seed", "1", "--no-report",
            f"--out={again}", "--", "--gpu", "4090d")
    for name in ("records-0.jsonl", "legs.jsonl", "telemetry-server.jsonl"):
        assert (out / name).read_text().replace("run", "x") == (
            again / name).read_text().replace("second", "x").replace("run", "x"), name


def faulty(*faults: str, load: Load, seconds: float = 60.0) -> tuple[
        VirtualExecutor, Window, list[RequestRecord], ServerSigns]:
    executor = VirtualExecutor(MIXED, config(), faults=[parse_profile(f) for f in faults])
    return executor, *asyncio.run(executor.run_leg(leg(load, seconds)))


@pytest.mark.parametrize(("fault", "says"), [("oom@6", "CUDA out of memory"),
                                             ("die@6", "a worker was killed")])
def test_an_engine_dies_at_its_load_and_is_another_one_after_a_restart(
        fault: str, says: str) -> None:
    executor, window, records, signs = faulty(fault, load=Closed(8))
    assert (window.ending, signs.died) == ("server_died", says)
    last = [r for r in records if r.outcome is Outcome.SERVER_ERROR_EVENT]
    assert 6 <= len(last) <= 8
    assert all(abs(r.end_ns - window.end_ns) < 1e6 for r in last)
    assert all(r.outcome is Outcome.OK for r in records if r not in last)
    died_s = executor.now_s
    asyncio.run(executor.restart("it died"))
    assert executor.now_s > died_s
    again, records, signs = asyncio.run(executor.run_leg(leg(Closed(4))))
    assert (again.ending, signs.died) == ("done", None)
    assert records


def test_a_silent_stream_is_stalled_after_its_clients_patience() -> None:
    _, _, records, _ = faulty("stall@5:0.5", load=Closed(4))
    silent = [r for r in records if r.outcome is Outcome.STALLED]
    assert len(silent) > 3
    assert any(r.outcome is Outcome.OK for r in records)
    patience_s = MIXED.timeouts_of(silent[0].cls).stall_s
    for r in silent:
        assert r.output_tok == 5
        last_ns = (r.first_ns or 0) + 1000 * sum(r.gaps_us)
        assert r.end_ns - last_ns == pytest.approx(patience_s * 1e9, rel=1e-3)


def test_a_client_that_leaves_by_plan_is_abandoned_and_frees_its_blocks(
        monkeypatch: pytest.MonkeyPatch) -> None:
    def leaving(*args: Any) -> Iterator[plan.Session]:
        for s in real(*args):
            turns = tuple(msgspec.structs.replace(t, abandon_after_s=0.5) for t in s.turns)
            yield msgspec.structs.replace(s, turns=turns)
    real = plan.sessions
    monkeypatch.setattr(plan, "sessions", leaving)
    window, records, _ = ran(Closed(4))
    assert {r.outcome for r in records} <= {Outcome.ABANDONED, Outcome.OK, Outcome.CANCELLED}
    left = [r for r in records if r.outcome is Outcome.ABANDONED]
    assert len(left) > 100
    assert all(r.end_ns - (r.sent_ns or 0) == pytest.approx(0.5e9, rel=1e-6) for r in left)
    assert window.ending == "done"


@pytest.mark.parametrize(("words", "code"), [
    (["--base-url", "http://127.0.0.1:1"], 2), (["--server", "vllm"], 2),
    (["--", "--fault", "rst@4"], 2), (["--", "--gpu", "h2"], 2),
    (["--", "--gpu-memory-utilization", "0.3"], 4)])
def test_what_has_no_virtual_time_is_refused(words: list[str], code: int, tmp_path: Path) -> None:
    assert command("sweep", "--max-concurrency", "4", "--virtual", f"--out={tmp_path / 'r'}",
                   *words) == code
