"""Recorded traces: the instants, lengths and shared blocks of the files, to the last digit; and
what a server's prefix cache makes of them."""

import asyncio
import csv
import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from loadgen import balance, cli, judge, plan, scenario, traces, validity
from loadgen.errors import ScenarioError
from loadgen.leg import Leg
from loadgen.prompts import Ratio
from loadgen.record import Outcome
from loadgen.scenario import RequestClass, Scenario, Seconds, Trace
from loadgen.sources import Asked, TraceFile, shared_tok
from loadgen.store import RunFolder
from loadgen.virtual import VirtualExecutor
from tests.virtual import config

FILES = scenario.SHIPPED / "traces"
CONV = FILES / "azure-2023-conv-1000.csv"
CODE = FILES / "azure-2023-code-1000.csv"
MOONCAKE = FILES / "mooncake-conversation-300.jsonl"
SYNTHETIC = FILES / "mooncake-synthetic-300.jsonl"
RATIO = Ratio(4.3, 10.0, "guess")
MIX = scenario.load("trace-mooncake")
CALLS = [json.loads(line) for line in MOONCAKE.read_text().splitlines()]


def azure(path: Path = CONV, **more: Any) -> TraceFile:
    return TraceFile(format="azure", path=str(path), **more)


def mooncake(path: Path = MOONCAKE, **more: Any) -> TraceFile:
    return TraceFile(format="mooncake", path=str(path), **more)


def leg(load: Trace, seed: int = 3) -> Leg:
    return Leg(id="l", axis="rate", value=1, phase="run", replicate=0, seed=seed, load=load,
               warmup_s=0.0, measure_s=load.due_s[-1] + 1)


def ticks(text: str) -> int:
    """Azure's time of day in 100 ns, by hand."""
    hours, minutes, seconds = text.split(" ")[1].split(":")
    whole, _, part = seconds.partition(".")
    return ((int(hours) * 60 + int(minutes)) * 60 + int(whole)) * 10**7 + int(part.ljust(7, "0"))


# -------------------------------------------------------------------------------------- readers


@pytest.mark.parametrize("path", [CONV, CODE])
def test_azure_s_instants_and_lengths_are_those_of_the_file(path: Path) -> None:
    with path.open(newline="") as f:
        rows = list(csv.DictReader(f))
    load = traces.trace(azure(path), 3)
    begun = ticks(rows[0]["TIMESTAMP"])
    assert load.due_s == tuple((ticks(r["TIMESTAMP"]) - begun) / 1e7 for r in rows)
    assert load.asked == tuple(
        Asked(int(r["ContextTokens"]), int(r["GeneratedTokens"])) for r in rows)
    assert len(rows) == 1000
    assert traces.trace(azure(path), 4) == load  # there is nothing to draw


def test_a_trace_over_midnight_and_with_a_time_zone_goes_on(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n"
                                "2024-05-10 23:59:59.999999+00:00,5,6\n2024-05-11 00:00:01,7,8\n")
    assert traces.trace(azure(tmp_path / "t"), 1).due_s == (0.0, 1.000001)


def test_burstgpt_s_columns_are_read_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45.25,GPT-4,1087,230,1317,API log\n"
        "118,ChatGPT,417,276,693,Conversation log\n")
    load = traces.trace(TraceFile(format="burstgpt", path=str(tmp_path / "t")), 1)
    assert load.due_s == (0.0, 40.25, 113.0)
    assert load.asked == (Asked(472, 18), Asked(1087, 230), Asked(417, 276))


def test_mooncake_s_blocks_are_those_of_the_file() -> None:
    for path in (MOONCAKE, SYNTHETIC):
        calls = [json.loads(line) for line in path.read_text().splitlines()]
        load = traces.trace(mooncake(path), 3)
        assert [a.blocks for a in load.asked] == [c["hash_ids"] for c in calls]
        assert [(a.prompt_tok, a.output_tok) for a in load.asked] == [
            (c["input_length"], c["output_length"]) for c in calls]


def test_steps_of_three_seconds_are_spread_evenly_inside_the_step() -> None:
    recorded = traces.read(mooncake())
    assert recorded.step_s == 3.0
    inside = []
    for seed in range(20):
        due_s = traces.trace(mooncake(), seed).due_s
        assert list(due_s) == sorted(due_s)
        inside += [d - c["timestamp"] / 1000 for d, c in zip(due_s, CALLS, strict=True)]
    assert min(inside) >= 0
    assert max(inside) <= 3.0 + 0.0011  # stamps are rounded to 1 ms: a step begins that late
    share = np.histogram(inside, bins=6, range=(0, 3))[0] / len(inside)
    assert np.all(abs(share - 1 / 6) < 0.02)
    assert traces.trace(mooncake(), 1).due_s == traces.trace(mooncake(), 1).due_s
    assert traces.trace(mooncake(), 1).due_s != traces.trace(mooncake(), 2).due_s


def test_instants_that_are_fine_enough_stay_as_they_are() -> None:
    calls = [json.loads(line) for line in SYNTHETIC.read_text().splitlines()]
    assert traces.trace(mooncake(SYNTHETIC), 1).due_s == tuple(
        c["timestamp"] / 1000 for c in calls)
    assert traces.step_of([0.0, 1.0, 2.0, 3.0]) is None  # one in each: a clock, not a grid
    assert traces.step_of([0.0, 0.0, 1.0, 1.0, 3.0, 3.0]) == 1.0
    assert traces.step_of([0.0, 0.0, 0.7, 0.7, 2.0, 2.0]) is None
    assert traces.step_of([0.0]) is None


def test_scale_is_of_the_rate_and_a_window_is_of_the_trace_s_own_time() -> None:
    whole = traces.trace(azure(), 1)
    twice = traces.trace(azure(scale=2.0), 1)
    assert twice.due_s == tuple(t / 2.0 for t in whole.due_s)
    assert twice.asked == whole.asked
    part = traces.trace(azure(scale=2.0, from_s=Seconds(10), to_s=Seconds(70)), 1)
    inside = [i for i, t in enumerate(whole.due_s) if 10 <= t < 70]
    assert part.due_s == tuple((whole.due_s[i] - 10) / 2.0 for i in inside)
    assert part.asked == tuple(whole.asked[i] for i in inside)
    assert len(inside) > 100
    with pytest.raises(ScenarioError, match=r"no request came from 500 s.*its last came after 216"):
        traces.trace(azure(from_s=Seconds(500)), 1)


# -------------------------------------------------------------------------------- broken files

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = "2023-11-16 18:15:46.6805900,374,44\n"
CALL = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,C,3,4,7,x\n"
BROKEN = {
    "no instant": ("azure", HEAD + GOOD + "yesterday,1,1\n", 3, "TIMESTAMP: 'yesterday'"),
    "no tokens": ("azure", HEAD + GOOD + GOOD.replace("374", "-1"), 3, "ContextTokens: '-1'"),
    "an empty field": ("azure", HEAD + GOOD.replace("374", "") + GOOD, 2, "ContextTokens: ''"),
    "back in time": ("azure", HEAD + GOOD + GOOD.replace("46", "45"), 3, "sort the file by time"),
    "a torn line": ("azure", HEAD + GOOD + "2023-11-16 18:1", 3, "1 fields where"),
    "a failed request": ("burstgpt", BURST + "6,C,3,0,3,x\n", 3, "a request that failed"),
    "no second": ("burstgpt", BURST + "soon,C,3,4,7,x\n", 3, "'soon' is no number of seconds"),
    "no JSON": ("mooncake", CALL + "{\n", 2, "not JSON"),
    "a missing length": ("mooncake", CALL + '{"timestamp": 1}\n', 2, "required field"),
    "too few blocks": ("mooncake", CALL + CALL.replace("[1, 2]", "[1]"), 2,
                       "1 hash_ids for 600 tokens, which are 2 blocks"),
    "a negative id": ("mooncake", CALL + CALL.replace("[1, 2]", "[1, -2]"), 2, "hash_ids"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named_and_the_others_are_used_only_if_asked_for(
        tmp_path: Path, name: str) -> None:
    kind, data, line, says = BROKEN[name]
    (tmp_path / "t").write_text(data)
    source = msgspec.convert({"mode": "replay", "format": kind, "path": str(tmp_path / "t")},
                             TraceFile)
    with pytest.raises(ScenarioError, match=f"t:{line}: .*{says}") as error:
        traces.read(source)
    assert "1 of 2 requests cannot be used" in str(error.value)
    found = traces.read(msgspec.structs.replace(source, skip_broken=True))
    assert (len(found.asked), len(found.broken)) == (1, 1)


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("time,in,out\n1,2,3\n")
    with pytest.raises(ScenarioError, match="no column 'TIMESTAMP'; the file has: time, in, out"):
        traces.read(azure(tmp_path / "t"))


def test_another_file_than_the_run_s_is_refused() -> None:
    with pytest.raises(ScenarioError, match="another file than the one that is asked for"):
        traces.read(azure(CODE, sha256=traces.read(azure()).sha256))


# ------------------------------------------------------------------------------- in a scenario


def test_a_load_of_mode_trace_that_names_a_file_replays_it(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(CONV.read_bytes())
    (tmp_path / "s.toml").write_text(
        '[load]\nmode = "trace"\nformat = "azure"\npath = "t.csv"\nfrom = "1s"\nto = "9s"\n'
        '[[classes]]\nname = "c"\nkind = "chat"\nprompt_tokens = 9\noutput_tokens = 9\n')
    mix = scenario.load(str(tmp_path / "s.toml"))
    assert isinstance(mix.load, TraceFile)
    assert mix.load.path == str((tmp_path / "t.csv").resolve())
    assert mix.load.sha256 == traces.read(azure()).sha256
    assert scenario.parse(scenario.to_plain(mix), "manifest") == mix


@pytest.mark.parametrize(("load", "says"), [
    ({"mode": "trace", "format": "nginx", "path": "x"}, "azure, mooncake, burstgpt"),
    ({"mode": "trace", "path": "x"}, "format"),
    ({"mode": "trace", "format": "azure", "path": "x", "too_long": "drop"}, "cut, skip"),
    ({"mode": "trace", "format": "azure", "path": "x", "speed": 2.0}, "unknown key 'speed'"),
    ({"mode": "trace", "due": [0.0, 1.0], "asked": [[1, 1]]}, "1 requests for 2 instants")])
def test_a_trace_that_cannot_be_meant_is_refused(load: Any, says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        scenario.parse({"name": "s", "load": load, "classes": [
            {"name": "c", "kind": "chat", "prompt_tokens": 9, "output_tokens": 9}]}, "s.toml")


def test_what_prompts_share_is_said_once() -> None:
    with pytest.raises(ScenarioError, match="what the prompts of a trace share, its file says"):
        scenario.parse({"name": "s", "load": {"mode": "trace", "format": "azure", "path": "x"},
                        "classes": [{"name": "c", "kind": "chat", "prompt_tokens": 9,
                                     "output_tokens": 9, "shared_prefix": {"tokens": 4}}]}, "s")


# ----------------------------------------------------------------------------------- its plan


@pytest.mark.parametrize("load", [traces.trace(azure(), 3), traces.trace(mooncake(), 3)])
def test_shards_together_are_the_trace(load: Trace) -> None:
    whole = list(plan.sessions(MIX, leg(load)))
    parts = [s for i in range(3) for s in plan.sessions(MIX, leg(load), i, 3)]
    assert sorted(parts, key=lambda s: s.k) == whole
    assert [s.due_s for s in whole] == list(load.due_s)
    assert [(s.turns[0].prompt_tok, s.turns[0].output_tok, list(s.blocks)) for s in whole] == [
        (a.prompt_tok, a.output_tok, a.blocks) for a in load.asked]


def common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                min(len(a), len(b)))


def test_prompts_begin_alike_for_exactly_the_blocks_that_they_share() -> None:
    load = traces.trace(mooncake(), 3)
    cls: RequestClass = MIX.classes[0]
    planned = list(plan.sessions(MIX, leg(load)))[:40]
    texts = [plan.prompt(cls, s, 0, 3, RATIO) for s in planned]
    block = round(512 * RATIO.chars_per_tok)
    shared = 0
    for (a, x), (b, y) in itertools.combinations(zip(planned, texts, strict=True), 2):
        n = next((i for i, (p, q) in enumerate(zip(a.blocks, b.blocks, strict=False)) if p != q),
                 min(len(a.blocks), len(b.blocks)))
        shared += n > 0
        least = min(n * block, len(x), len(y))
        assert least <= common(x, y) <= least + 12  # the mark of the next block begins alike
    assert shared > 20
    for s, text in zip(planned, texts, strict=True):
        wanted = (s.turns[0].prompt_tok - RATIO.overhead_tok) * RATIO.chars_per_tok
        assert abs(len(text) - wanted) <= 1
    other = [plan.prompt(cls, s, 0, 4, RATIO) for s in planned]
    assert all(common(x, y) < 8 for x, y in zip(texts, other, strict=True))  # another run's


def test_tokens_that_were_there_before_are_counted_by_leading_blocks() -> None:
    asked = [Asked(1100, 1, ((0, 3),)), Asked(1100, 1, ((0, 2), (7, 1))),
             Asked(1536, 1, ((9, 1), (1, 2))), Asked(1100, 1, ((0, 3),)), Asked(50, 1)]
    assert shared_tok(asked) == [0, 1024, 0, 1100, 0]
    by_hand, seen = [], set[int]()
    for c in CALLS:
        lead = list(itertools.takewhile(seen.__contains__, c["hash_ids"]))
        by_hand.append(min(512 * len(lead), c["input_length"]))
        seen.update(c["hash_ids"])
    assert shared_tok(traces.trace(mooncake(), 3).asked) == by_hand


# ------------------------------------------------------------------------ on the simulator


def talks(path: Path) -> Path:
    """Ten users whose every prompt holds all that they said before, after one system prompt."""
    calls = [{"timestamp": 1000 * (10 * turn + user), "input_length": 512 * (2 + turn) + 300,
              "output_length": 20, "hash_ids": [0, *range(100 * user + 1, 100 * user + 2 + turn),
                                                10_000 + 100 * user + turn]}
             for turn in range(8) for user in range(10)]
    path.write_text("".join(json.dumps(c) + "\n" for c in calls))
    return path


@pytest.mark.parametrize(("name", "least"), [("extract", 0.08), ("talks", 0.65)])
def test_the_simulator_s_prefix_cache_hits_what_the_hash_ids_imply(
        tmp_path: Path, name: str, least: float) -> None:
    """Slowly, so that each prompt is computed before the next one comes, and with room for all."""
    load = traces.trace(mooncake(scale=0.1) if name == "extract"
                        else mooncake(talks(tmp_path / "t")), 3)
    load, cut = traces.fitted(load, 131_072, None)
    assert cut == 0
    executor = VirtualExecutor(MIX, dataclasses.replace(config(
        "--gpu", "h200", "--max-model-len", "131072"), num_blocks=300_000))
    window, records, signs = asyncio.run(executor.run_leg(leg(load)))
    assert {r.outcome for r in records} == {Outcome.OK}
    prompt_tok = sum(a.prompt_tok for a in load.asked)
    implied = sum(shared_tok(load.asked)) / prompt_tok
    assert implied > least
    assert signs.prefix_hit_frac is not None
    # each prompt's first 16 tokens are the chat template's
    assert signs.prefix_hit_frac == pytest.approx(implied, abs=1.1 * 16 * len(records) / prompt_tok)
    judged = judge.judge(leg(load), window, records, signs, MIX, judge.Criteria())
    assert not [f for f in judged.findings if f.rule.startswith("prompts-") or "prefix" in f.rule]
    books = balance.of(leg(load), window, records, records, signs.counted)
    assert books.asked == len(load.due_s)


def test_a_cache_that_holds_more_than_the_trace_shares_is_found() -> None:
    load = traces.trace(mooncake(), 3)
    executor = VirtualExecutor(MIX, config("--gpu", "h200", "--max-model-len", "131072"))
    _, records, _ = asyncio.run(executor.run_leg(leg(msgspec.structs.replace(
        load, due_s=load.due_s[:20], asked=load.asked[:20]))))
    asked = Trace(due_s=load.due_s, asked=load.asked)
    implied = sum(shared_tok(load.asked)[:20]) / sum(a.prompt_tok for a in load.asked[:20])
    assert validity.reuse(MIX, records, implied, 0.0, asked) == []
    (found,) = validity.reuse(MIX, records, implied + 0.3, 0.0, asked)
    assert (found.rule, found.verdict) == ("prompts-reused", "INVALID")


def test_what_the_server_cannot_hold_is_refused_cut_or_left_out() -> None:
    load = traces.trace(mooncake(), 3)
    room = math.floor(32_768 * (1 - traces.SLACK))
    over = [i for i, a in enumerate(load.asked) if a.prompt_tok + a.output_tok > room]
    assert len(over) > 20
    with pytest.raises(ScenarioError, match=f"{len(over)} of the trace's 300 requests are longer"):
        traces.fitted(load, 32_768, None)
    cut, n = traces.fitted(load, 32_768, "cut")
    assert n == len(over)
    assert cut.due_s == load.due_s
    assert max(a.prompt_tok + a.output_tok for a in cut.asked) == room
    assert [a for i, a in enumerate(cut.asked) if i not in over] == [
        a for i, a in enumerate(load.asked) if i not in over]
    short, n = traces.fitted(load, 32_768, "skip")
    assert n == len(over)
    assert short.asked == tuple(a for i, a in enumerate(load.asked) if i not in over)
    assert short.due_s == tuple(t for i, t in enumerate(load.due_s) if i not in over)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as done:
        cli.entry(list(words))
    out, err = capsys.readouterr()
    return int(done.value.code or 0), out + err


@pytest.mark.parametrize("name", ["trace-azure-conv", "trace-azure-code", "trace-mooncake"])
def test_the_shipped_traces_run_in_virtual_time(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, text = said(capsys, "run", name, "--server", "sim", "--virtual", "--seed", "3", "--out",
                      str(tmp_path / "r"), "--no-report", "--", "--gpu", "h200")
    assert code in (0, 1, 5), text  # the code trace's bursts are too much for one card
    folder = RunFolder(tmp_path / "r")
    (ran, window), = folder.legs()
    assert isinstance(ran.load, Trace)
    assert window is not None
    records = sorted(folder.records(), key=lambda r: r.session)
    mix: Scenario = scenario.load(name)
    assert isinstance(mix.load, TraceFile)
    whole = traces.trace(mix.load, 3)
    assert [r.due_ns - window.t0_ns for r in records] == pytest.approx(
        [round(t * 1e9) for t in whole.due_s], abs=2)
    assert [r.output_tok for r in records] == [a.output_tok for a in ran.load.asked]
    assert [r.prompt_tok for r in records] == [a.prompt_tok for a in ran.load.asked]
    if name == "trace-mooncake":
        assert "longer than the server's context of 32768 tokens: their prompts are cut" in (
            " ".join(text.split()))


def test_a_trace_that_does_not_fit_is_refused_before_it_runs(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = (scenario.SHIPPED / "trace-mooncake.toml").read_text()
    (tmp_path / "s.toml").write_text(given.replace('too_long = "cut"', "").replace(
        "traces/", f"{FILES}/"))
    code, text = said(capsys, "run", str(tmp_path / "s.toml"), "--server", "sim", "--virtual",
                      "--out", str(tmp_path / "r"), "--", "--gpu", "h200")
    assert code == 2
    assert "requests are longer than the server takes" in text
    assert not (tmp_path / "r").exists()


Maker = Callable[[], TraceFile]


@pytest.mark.parametrize("make", [azure, mooncake])
def test_what_a_leg_holds_of_a_trace_is_small(make: Maker) -> None:
    """It goes to every shard and into the journal of legs."""
    size = len(msgspec.json.encode(traces.trace(make(), 3)))
    assert size < 60 * 1000
