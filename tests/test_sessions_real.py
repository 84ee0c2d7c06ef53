"""Sessions, recall and throttling as users meet them: commands, and servers on 127.0.0.1."""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadgen import cli, plan, scenario
from loadgen.record import Outcome
from loadgen.store import RunFolder
from tests.raw_server import (
    DONE,
    HEAD,
    LAST,
    ONE_MODEL,
    RawServer,
    Script,
    event,
    finish,
    role,
    token,
    usage,
)
from tests.real import kept, loadgen, outcomes, summary
from tests.test_locust_headless import locust

pytestmark = pytest.mark.slow

SESSIONS = """
[slo]
ttft = "5s"
[[classes]]
name = "talk"
kind = "chat"
turns = 3
think = "100ms"
abandon = { share = 0.2, after = "80ms" }
prompt_tokens = 40
output_tokens = 30
sampling = { ignore_eos = true }
"""
DIALOGUE = """
[slo]
ttft = "5s"
[[classes]]
name = "memory"
kind = "dialogue"
language = "mixed"
turns = 5
prompt_tokens = 200
output_tokens = 60
validator = { check = "recall", counts = COUNTS }
"""
SEED = 5


def against(script: Callable[[RawServer, int], Script], *args: str, cwd: Path) -> Any:
    """What `loadgen` says of a server whose answers depend on what it was asked."""
    async def test() -> Any:
        servers: list[RawServer] = []
        async with RawServer(lambda k: script(servers[0], k), get=ONE_MODEL) as server:
            servers.append(server)
            return await asyncio.to_thread(
                loadgen, "run", *args, "--out", "r", "--base-url", server.url, "--seed", str(SEED),
                cwd=cwd)
    return asyncio.run(test())


# ------------------------------------------------------------------------------------------ recall


def memory(server: RawServer, k: int) -> Script:
    """Dialogues of odd numbers are told the other person's facts, the first one's nothing."""
    said = json.loads(server.requests[k].body)["messages"]
    text = "Noted."
    for session in range(12):
        lines = plan.lines("mixed", session, 5, SEED)
        asks = next((x.asks for x in lines if x.asks and said[-1]["content"].endswith(x.closes)),
                    None)
        if asks is not None and lines[0].opens in said[0]["content"]:
            wrong = asks.others or asks.before
            text = "?" if session == 0 else (wrong if session % 2 else asks.right)[0]
    return [HEAD + role() + token(text), finish() + usage(1, 10) + DONE + LAST]


def test_retention_is_what_the_server_remembers_by_kind_of_error(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text(DIALOGUE.replace("COUNTS", "false"))
    said = against(memory, "d.toml", "--concurrency", "3", "--num-prompts", "6", cwd=tmp_path)
    assert said.code in (cli.PASS, cli.INCONCLUSIVE), said.all
    found: Any = summary(tmp_path / "r")["retention"]
    [row] = found
    assert (row["asked"], row["correct"]) == (12, 4), said.all  # 2 of 5 turns ask; of 6 dialogues 2
    assert sum(row["kinds"].values()) == 8
    assert row["kinds"]["forgot a fact"] == 2  # the first dialogue's
    assert row["kinds"]["mixed up roles"] + row["kinds"]["logic break"] == 6
    assert "memory (recall) 4 of 12 valid" in said.out
    html = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Context retention</h2>" in html
    assert ">mixed up roles<" in html
    assert {r.outcome for r in kept(tmp_path / "r")} == {Outcome.OK}
    judged: Any = summary(tmp_path / "r")["steps"]
    assert judged[0]["good"] == judged[0]["n"] == 30  # it does not count here


def test_an_answer_that_forgot_is_a_miss_where_it_counts(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text(DIALOGUE.replace("COUNTS", "true"))
    against(memory, "d.toml", "--concurrency", "3", "--num-prompts", "6", "--no-report",
            cwd=tmp_path)
    judged: Any = summary(tmp_path / "r")["steps"]
    assert (judged[0]["good"], judged[0]["n"]) == (22, 30)
    assert judged[0]["misses"] == "answer 8"


def test_a_turn_whose_dialogue_was_not_heard_is_not_judged(tmp_path: Path) -> None:
    """The second telling turn of each dialogue fails: who asks later asks for what was not told."""
    (tmp_path / "d.toml").write_text(DIALOGUE.replace("COUNTS", "true"))

    def broken(server: RawServer, k: int) -> Script:
        said = json.loads(server.requests[k].body)["messages"]
        return [HEAD + role() + DONE + LAST] if len(said) == 3 else memory(server, k)

    against(broken, "d.toml", "--concurrency", "2", "--num-prompts", "3", "--no-report",
            cwd=tmp_path)
    assert summary(tmp_path / "r")["retention"] == []
    assert outcomes(tmp_path / "r")[Outcome.EMPTY] == 12


# ---------------------------------------------------------------------------------------- sessions


def assert_sessions(folder: Path) -> None:
    """Turns in order, each due when its user has thought; some of them left."""
    records = [r for r in kept(folder) if r.outcome is not Outcome.CANCELLED]
    by: dict[tuple[str, int], list[Any]] = {}
    for r in sorted(records, key=lambda r: (r.leg, r.session, r.turn)):
        by.setdefault((r.leg, r.session), []).append(r)
    whole = [own for own in by.values() if len(own) == 3]
    assert len(whole) >= 4
    assert {r.outcome for r in records} == {Outcome.OK, Outcome.ABANDONED}
    for own in by.values():
        assert [r.turn for r in own] == list(range(len(own)))
        for a, b in itertools.pairwise(own):
            assert b.due_ns - a.end_ns == pytest.approx(100e6, abs=2e3)
            if a.outcome is b.outcome is Outcome.OK:  # the server saw all that was said
                assert b.prompt_tok > a.prompt_tok + 30
    assert len({r.seq for r in records if r.shard == 0}) == sum(r.shard == 0 for r in records)


@pytest.mark.parametrize("load", [("--concurrency", "4"), ("--rate", "4")])
def test_a_run_of_sessions_on_the_simulator(tmp_path: Path, load: Any) -> None:
    (tmp_path / "s.toml").write_text(SESSIONS)
    said = loadgen("run", "s.toml", *load, "--num-prompts", "12", "--out", "r", "--no-report",
                   "--", "--speed", "2", cwd=tmp_path)
    assert "Traceback" not in said.all
    assert len(kept(tmp_path / "r")) == 36, said.all  # sessions are what is counted
    assert_sessions(tmp_path / "r")
    hits: Any = summary(tmp_path / "r")["steps"]
    assert hits[0]["prefix_hit_frac"] > 0.3  # what was said before is in the server's cache


def test_a_run_of_sessions_in_virtual_time_is_the_same_plan(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SESSIONS)
    said = loadgen("run", "s.toml", "--concurrency", "4", "--duration", "60s", "--virtual",
                   "--out", "r", "--no-report", cwd=tmp_path)
    assert "Traceback" not in said.all
    assert_sessions(tmp_path / "r")
    assert "records-lost" not in said.all


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
def test_sessions_of_locusts_users_and_of_its_fleet(tmp_path: Path, processes: Any) -> None:
    (tmp_path / "s.toml").write_text(SESSIONS)
    said = locust("-u", "4", "-r", "4", "-t", "8s", *processes, "--server-options", "--speed 2",
                  cwd=tmp_path, scenario="s.toml")
    assert "Traceback" not in said.all, said.all
    assert_sessions(tmp_path / "r")


# -------------------------------------------------------------------------- throttled, and thinking


def test_a_proxy_that_limits_each_client_is_told_apart_from_failures(tmp_path: Path) -> None:
    """2 requests per second and client with a burst of 4, as of the third report."""
    said = loadgen("run", "smoke", "--rate", "10", "--duration", "6s", "--out", "r", "--",
                   "--fault", "throttle@2", cwd=tmp_path)
    seen = outcomes(tmp_path / "r")
    assert set(seen) - {Outcome.CANCELLED} == {Outcome.OK, Outcome.THROTTLED}
    assert seen[Outcome.THROTTLED] > seen[Outcome.OK]
    judged: Any = summary(tmp_path / "r")
    [row] = judged["throttled"]
    assert row["throttled"] + row["good"] <= row["n"]
    assert judged["steps"][0]["errors"] == 0  # none of them
    assert judged["verdict"]["load"] == "UNSAFE"
    assert f"Throttled: {row['throttled']} of {row['n']} requests" in said.out
    assert "<h2>Throttled</h2>" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")


def test_thoughts_before_the_first_visible_text_are_told_apart(tmp_path: Path) -> None:
    def thought(text: str) -> bytes:
        return event({"choices": [{"index": 0, "delta": {"reasoning_content": text}}]})

    def thinks(_: RawServer, __: int) -> Script:
        return [HEAD + role() + thought("Hm"), 0.3, thought(" so"), 0.1, token("Yes"),
                finish() + usage(3) + DONE + LAST]

    said = against(thinks, "smoke", "--num-prompts", "8", cwd=tmp_path)
    found: Any = summary(tmp_path / "r")["first_visible"]
    [row] = found
    assert row["thinks_p50_s"] == pytest.approx(0.4, abs=0.1)
    assert row["visible_p50_s"] > row["ttft_p50_s"] + 0.3
    assert "First visible text: hello" in said.out
    html = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert "<h2>First visible text</h2>" in html


def test_where_the_first_token_is_visible_nothing_is_said_of_it(tmp_path: Path) -> None:
    def plain(_: RawServer, __: int) -> Script:
        return [HEAD + role() + token(), 0.05, finish() + usage(1) + DONE + LAST]

    said = against(plain, "smoke", "--num-prompts", "8", cwd=tmp_path)
    assert summary(tmp_path / "r")["first_visible"] == summary(tmp_path / "r")["throttled"] == []
    assert "First visible" not in said.out
    assert "Throttled" not in said.out
    assert Counter(r.outcome for r in RunFolder(tmp_path / "r").records()) == {Outcome.OK: 8}


def test_the_shipped_scenarios_of_sessions_are_sound() -> None:
    for name in ("dialogue", "chat-sessions"):
        assert any(scenario.longest(c.turns) >= 5 for c in scenario.load(name).classes)
