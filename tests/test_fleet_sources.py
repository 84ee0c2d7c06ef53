"""Traces and prompt files over Locust's master and workers: real processes on 127.0.0.1."""

import asyncio
import json
from pathlib import Path

import pytest

from loadgen import cli, scenario, traces
from loadgen.scenario import Trace, TraceFile
from tests import fleets
from tests.fleets import fleet, leg_of, server, until, worker_of
from tests.real import kept, over

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nobody_is_left")]

TRACE = f"""
[load]
mode = "trace"
format = "mooncake"
path = "{scenario.SHIPPED}/traces/mooncake-conversation-300.jsonl"
scale = 4.0
to = "30s"
too_long = "skip"
[[classes]]
name = "c"
kind = "chat"
prompt_tokens = 100
output_tokens = 16
"""
DATA = """
[[classes]]
name = "c"
kind = "chat"
[classes.dataset]
format = "openai"
path = "prompts.jsonl"
"""


def test_workers_replay_one_trace_each_request_once_and_as_long_as_recorded(
        tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(TRACE)

    async def test() -> None:
        async with server() as raw:
            with fleet(tmp_path, raw.url, "--scenario", str(path), workers=2, rate=None,
                       time_s=30.0) as running:
                said = await asyncio.to_thread(running.over)
                assert running.outcome["exact"] is True, said.all
    asyncio.run(test())
    fleets.assert_is_exact(tmp_path / "r")
    mix = scenario.load(str(path))
    assert isinstance(mix.load, TraceFile)
    whole = traces.trace(mix.load, 7)
    leg, window = leg_of(tmp_path / "r")
    assert isinstance(leg.load, Trace)
    assert leg.load == whole
    records = sorted(kept(tmp_path / "r"), key=lambda r: r.session)
    assert [r.max_tokens for r in records] == [a.output_tok for a in whole.asked]
    assert [r.want_prompt_tok for r in records] == [a.prompt_tok for a in whole.asked]
    assert window.ending == "done"


def prompts(name: str) -> str:
    return "".join(json.dumps({"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{name} {i}"}],
        "output_tokens": 16}) + "\n" for i in range(500))


def test_workers_send_each_prompt_of_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(prompts("question"))
    path = tmp_path / "s.toml"
    path.write_text(DATA)

    async def test() -> list[bytes]:
        async with server() as raw:
            with fleet(tmp_path, raw.url, "--scenario", str(path), workers=2,
                       time_s=6.0) as running:
                said = await asyncio.to_thread(running.over)
                assert running.outcome["exact"] is True, said.all
            return [got.body for got in raw.requests]
    bodies = asyncio.run(test())
    sent = [json.loads(b)["messages"] for b in bodies]
    asked = [m[1]["content"] for m in sent if len(m) == 2]
    assert {m[0]["content"] for m in sent if len(m) == 2} == {"Be brief."}
    assert len(asked) == len(set(asked)) > 100


def test_a_worker_with_another_file_of_that_name_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text(prompts("question"))
    path = tmp_path / "s.toml"
    path.write_text(DATA)

    async def test() -> None:
        async with server() as raw:
            with fleet(tmp_path, raw.url, "--scenario", str(path), workers=0, expect=1,
                       time_s=6.0) as running:
                await until(lambda: raw.requests)  # the master has read it
                data.write_text(prompts("another"))
                worker = worker_of(running.port, cwd=tmp_path)
                try:
                    said = await asyncio.to_thread(running.over)
                finally:
                    fleets.end(worker)
                assert said.code in (cli.USAGE, cli.INVALID), said.all
                assert "this is another file than the one that is asked for" in said.all
                assert "prompts.jsonl" in said.all
    asyncio.run(test())


def test_the_master_says_which_file_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(DATA)
    process = fleets.start(["--processes", "2"], "-t", "5s", "--host", "http://127.0.0.1:1",
                           "--model", "m", "--rate", "4", "--scenario", str(path), cwd=tmp_path)
    try:
        said = over(process, 60)
    finally:
        fleets.end(process)
    assert said.code == cli.USAGE, said.all
    assert f"{tmp_path}/prompts.jsonl: cannot be read" in said.all
