"""Traces and prompt files over sockets: what real generator processes send is the plan, to the
byte; and what a real server's prefix cache makes of a trace's shared blocks."""

import asyncio
import json
from pathlib import Path

import msgspec
import pytest

from loadgen import plan, prompts, scenario, traces
from loadgen.errors import StoreError
from loadgen.leg import Leg
from loadgen.prompts import Ratio
from loadgen.record import Outcome
from loadgen.scenario import Closed, Load, Scenario
from loadgen.sources import TraceFile
from loadgen.store import RunFolder
from loadgen.supervise import Shards
from loadgen.talk import Talk
from loadgen.target import Target
from tests.raw_server import DONE, HEAD, LAST, RawServer, Script, finish, token, usage
from tests.test_shard import manifest, nobody_died, unseen

FILES = scenario.SHIPPED / "traces"
pytestmark = pytest.mark.slow


def answer() -> Script:
    return [HEAD + token(), 0.02, token() * 2 + finish() + usage(3) + DONE + LAST]


def leg(load: Load, n: int | None = None) -> Leg:
    return Leg(id="l", axis="rate", value=20.0, phase="run", replicate=0, seed=7, load=load,
               warmup_s=0.0, measure_s=None, num_sessions=n)


def sent_by(folder: Path, mix: Scenario, what: Leg, ratios: dict[str, Ratio],
            processes: int) -> list[bytes]:
    """Bodies that the server got, of as many generator processes."""
    async def test() -> list[bytes]:
        async with RawServer(lambda _: answer()) as server:
            async with Shards(RunFolder.create(folder, manifest()), "r", mix,
                              Target(server.url, "m"), ratios, processes) as both:
                window = await both.run(what, nobody_died, unseen)
            assert (window.ending, window.note) == ("done", None)
            return [got.body for got in server.requests]
    return asyncio.run(asyncio.wait_for(test(), 60))


def planned(mix: Scenario, what: Leg, ratios: dict[str, Ratio]) -> list[bytes]:
    return [Talk(mix, "m", s, what.seed, ratios[s.cls]).body() for s in plan.sessions(mix, what)]


def test_two_processes_send_a_trace_s_requests_once_each_to_the_byte(tmp_path: Path) -> None:
    mix = scenario.load("trace-mooncake")
    ratios = {"chat": prompts.guess(mix.classes[0])}
    load = traces.trace(TraceFile(format="mooncake", scale=20.0, path=str(
        FILES / "mooncake-conversation-300.jsonl")), 7)
    load = msgspec.structs.replace(load, due_s=load.due_s[:40], asked=load.asked[:40])
    bodies = sent_by(tmp_path / "r", mix, leg(load), ratios, 2)
    assert sorted(bodies) == sorted(planned(mix, leg(load), ratios))
    assert len(set(bodies)) == 40
    records = sorted(RunFolder(tmp_path / "r").records(), key=lambda r: r.session)
    assert [r.want_prompt_tok for r in records] == [a.prompt_tok for a in load.asked]
    assert {r.outcome for r in records} == {Outcome.OK}
    assert all(r.shard == r.session % 2 for r in records)


def data(folder: Path, name: str) -> Path:
    (folder / "p.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{name} {i}"}],
        "output_tokens": 3}) + "\n" for i in range(60)))
    path = folder / "s.toml"
    path.write_text('[[classes]]\nname = "c"\nkind = "chat"\n'
                    'dataset = { format = "openai", path = "p.jsonl" }\n')
    return path


def test_two_processes_send_each_prompt_of_a_file_once(tmp_path: Path) -> None:
    mix = scenario.load(str(data(tmp_path, "question")))
    ratios = {"c": prompts.guess(mix.classes[0])}
    what = leg(Closed(concurrency=4), 60)
    bodies = sent_by(tmp_path / "r", mix, what, ratios, 2)
    assert sorted(bodies) == sorted(planned(mix, what, ratios))
    assert {json.loads(b)["messages"][1]["content"] for b in bodies} == {
        f"question {i}" for i in range(60)}
    assert {r.want_prompt_tok for r in RunFolder(tmp_path / "r").records()} == {None}


def test_a_process_that_finds_another_file_sends_nothing(tmp_path: Path) -> None:
    mix = scenario.load(str(data(tmp_path, "question")))
    data(tmp_path, "another")
    with pytest.raises(StoreError, match="this is another file than the one that is asked for"):
        sent_by(tmp_path / "r", mix, leg(Closed(concurrency=4), 60),
                {"c": prompts.guess(mix.classes[0])}, 2)
