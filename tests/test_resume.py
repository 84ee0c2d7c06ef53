"""A search that was stopped goes on: by Ctrl-C, by SIGKILL, by a power cut that tore journals."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from analysis import frame, summary
from loadgen import cli, resume
from loadgen.errors import FolderError
from loadgen.store import Apart, LegLine, Resumed, RunFolder
from tests import synthetic
from tests.real import (
    FAST,
    Said,
    endings,
    kept,
    loadgen,
    over,
    pid_of,
    running,
    start,
    wait,
)
from tests.synthetic import S

VIRTUAL = ("sweep", "--max-concurrency", "16", "--virtual", "--seed", "3", "--no-report")


def decision(folder: Path) -> bytes:
    """summary.json without what names the folder and counts its torn lines."""
    said = json.loads((folder / "summary.json").read_bytes())
    return json.dumps({k: v for k, v in said.items() if k not in ("run", "torn_lines")}).encode()


def begun(folder: Path) -> list[str]:
    """The legs that were started, in order."""
    return [x.leg.id for x in RunFolder(folder).leg_lines() if x.leg]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual sweep that nobody stopped."""
    cwd = tmp_path_factory.mktemp("whole")
    assert loadgen(*VIRTUAL, "--out", "r", cwd=cwd).code == cli.PASS
    return cwd / "r"


def cut(whole: Path, folder: Path, line: int, torn: int = 30) -> Path:
    """The run as a power cut leaves it: legs.jsonl ends in the middle of that line, the journals
    somewhere in the leg that ran."""
    shutil.copytree(whole, folder)
    legs = (folder / "legs.jsonl").read_bytes().splitlines(keepends=True)
    begun = [i for i, x in enumerate(legs) if x.startswith(b'{"leg"')]
    at, share = begun[line], (2 * range(len(begun))[line] + 1) / (2 * len(begun))
    (folder / "legs.jsonl").write_bytes(b"".join(legs[:at + 1]) + legs[at + 1][:torn])
    for name in ("records-0.jsonl", "telemetry-server.jsonl"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:int(len(data) * share)])
    for made in ("summary.json", "records.parquet", "junit.xml", "summary.md"):
        (folder / made).unlink()
    return folder


@pytest.mark.parametrize("line", [0, 2, -1])
def test_a_virtual_search_that_was_cut_ends_as_one_that_was_not(whole: Path, tmp_path: Path,
                                                                line: int) -> None:
    folder = cut(whole, tmp_path / "r", line)
    records = (folder / "records-0.jsonl").read_bytes()
    said = loadgen("sweep", "--resume", "r", "--no-report", cwd=tmp_path)
    assert said.code == cli.PASS, said.all
    assert decision(folder) == decision(whole)
    assert (folder / "records-0.jsonl").read_bytes().startswith(records)  # only appended to
    assert [leg.id for leg, _ in RunFolder(folder).legs()] == begun(whole)
    legs = begun(whole)
    at = range(len(legs))[line]
    assert begun(folder) == [*legs[:at + 1], *legs[at:]]  # one leg twice


def test_a_search_may_be_cut_twice(whole: Path, tmp_path: Path) -> None:
    folder = cut(whole, tmp_path / "r", 1)
    again = loadgen("sweep", "--resume", "r", "--no-report", cwd=tmp_path)
    assert again.code == cli.PASS, again.all
    lines = (folder / "legs.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "legs.jsonl").write_bytes(b"".join(lines[:-3]))  # the last two legs' ends are lost
    again = loadgen("sweep", "--resume", "r", "--no-report", cwd=tmp_path)
    assert again.code == cli.PASS, again.all
    assert decision(folder) == decision(whole)


@pytest.fixture(scope="module")
def to_the_unit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual sweep that went on to the largest concurrency that the server survives."""
    cwd = tmp_path_factory.mktemp("unit")
    said = loadgen("sweep", "smoke", "--max-concurrency", "16", "--levels", "2,4,16", "--budget",
                   "40s", "--slo", "ttft=20s,tpot=1s", "--unit-step", "--virtual", "--seed", "3",
                   "--no-report", "--out", "r", "--", "--fault", "oom@12", cwd=cwd)
    assert said.code == cli.PASS, said.all
    assert "It survives 11 concurrent requests, and 12 kill it" in said.out
    return cwd / "r"


def cut_in(whole: Path, folder: Path, at: int) -> Path:
    """The run as a power cut leaves it in its leg number `at`, whose first record is torn. (`cut`
    goes by bytes, and a leg whose first requests kill the server has none.)"""
    shutil.copytree(whole, folder)
    legs = (folder / "legs.jsonl").read_bytes().splitlines(keepends=True)
    starts = [i for i, x in enumerate(legs) if x.startswith(b'{"leg"')]
    (folder / "legs.jsonl").write_bytes(b"".join(legs[:starts[at] + 1]))
    windows = [window for _, window in RunFolder(whole).legs() if window is not None]
    done = [window.leg for window in windows[:at]]
    head, *lines = (folder / "records-0.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "records-0.jsonl").write_bytes(head + b"".join(
        x for x in lines if json.loads(x)["leg"] in done) + lines[-1][:30])
    rows = (folder / "telemetry-server.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "telemetry-server.jsonl").write_bytes(b"".join(
        x for x in rows if json.loads(x)["t_ns"] <= windows[at].t0_ns))
    (folder / "summary.json").unlink()
    return folder


@pytest.mark.parametrize("at", [1, 3, 4, 5, 7])
def test_a_search_to_the_unit_that_was_cut_goes_on_to_the_unit(
        to_the_unit: Path, tmp_path: Path, at: int) -> None:
    """In its ladder, in its confirmation, in its bisection; what killed the server is not tried
    again."""
    phases = [x.partition("-")[0] for x in begun(to_the_unit)]
    assert phases == [*["ladder"] * 3, "confirm", *["unit"] * 4]
    folder = cut_in(to_the_unit, tmp_path / "r", at)
    said = loadgen("sweep", "--resume", "r", "--no-report", cwd=tmp_path)
    assert said.code == cli.PASS, said.all
    assert "It survives 11 concurrent requests, and 12 kill it" in said.out
    assert [leg.id for leg, _ in RunFolder(folder).legs()] == begun(to_the_unit)
    assert decision(folder) == decision(to_the_unit)


def test_a_search_to_the_unit_that_is_over_runs_nothing_more(
        to_the_unit: Path, tmp_path: Path) -> None:
    shutil.copytree(to_the_unit, tmp_path / "r")
    said = loadgen("sweep", "--resume", "r", "--no-report", cwd=tmp_path)
    assert said.code == cli.PASS, said.all
    assert begun(tmp_path / "r") == begun(to_the_unit)
    assert decision(tmp_path / "r") == decision(to_the_unit)


@pytest.mark.parametrize("asked", ["--unit-step", "--no-restart"])
def test_a_search_that_goes_on_cannot_become_another_one(
        whole: Path, tmp_path: Path, asked: str) -> None:
    shutil.copytree(whole, tmp_path / "r")
    said = loadgen("sweep", "--resume", "r", asked, cwd=tmp_path)
    assert said.code == cli.USAGE
    assert f"leave out {asked.replace('no-', '')}" in said.err


def test_what_is_made_of_journals_is_the_same_bytes_each_time(whole: Path, tmp_path: Path) -> None:
    folder = cut(whole, tmp_path / "r", 3)
    loadgen("sweep", "--resume", "r", "--no-report", cwd=tmp_path)
    made = [(summary.finish(folder, report=False), {
        x: (folder / x).read_bytes() for x in ("summary.json", "summary.md", "junit.xml",
                                               "records.parquet")})[1] for _ in range(2)]
    assert made[0] == made[1]


def test_a_search_that_is_over_is_judged_and_nothing_is_run(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "r")
    before = (tmp_path / "r" / "legs.jsonl").read_bytes()
    said = loadgen("sweep", "--resume", "r", "--no-report", cwd=tmp_path)
    assert said.code == cli.PASS, said.all
    assert "was over already" in said.out
    assert (tmp_path / "r" / "legs.jsonl").read_bytes() == before


# -------------------------------------------------------------------------------- for the operator


@pytest.mark.parametrize(("args", "says"), [
    (["--max-concurrency", "8"], "leave out --max-concurrency"),
    (["--seed", "1"], "leave out --seed"), (["--server", "sim"], "leave out --server"),
    (["--slo", "ttft=1s"], "leave out --slo")])
def test_what_the_folder_says_already_is_refused(whole: Path, tmp_path: Path, args: list[str],
                                                 says: str) -> None:
    said = loadgen("sweep", "--resume", str(whole), *args, cwd=tmp_path)
    assert said.code == cli.USAGE
    assert says in said.err


def test_a_folder_without_a_search_is_refused(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "old", levels=(2,), confirm=None)
    for folder, says in (("old", "holds no search with a plan"), ("none", "is no run folder")):
        said = loadgen("sweep", "--resume", folder, cwd=tmp_path)
        assert said.code == cli.USAGE
        assert says in said.err
        assert "Traceback" not in said.all


def test_another_server_is_refused_with_what_differs(whole: Path, tmp_path: Path) -> None:
    folder = cut(whole, tmp_path / "r", 2)
    legs = (folder / "legs.jsonl").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["server"]["kv_cache_tok"] = 999
    (folder / "manifest.json").write_bytes(json.dumps(manifest).encode())
    said = loadgen("sweep", "--resume", "r", cwd=tmp_path)
    assert said.code == cli.USAGE
    assert "kv_cache_tok: 999 before" in said.err
    assert (folder / "legs.jsonl").read_bytes() == legs


def test_secrets_that_are_not_written_down_are_asked_for(whole: Path, tmp_path: Path) -> None:
    folder = cut(whole, tmp_path / "r", 2)
    manifest: Any = json.loads((folder / "manifest.json").read_bytes())
    words = manifest["command"]
    for more, asked in ((["--api-key", "***"], "--api-key"), (["--header", "***"], "each --header"),
                        (["--", "--api-key", "***"], "the server's options")):
        manifest["command"] = [*words, *more]
        (folder / "manifest.json").write_bytes(json.dumps(manifest).encode())
        said = loadgen("sweep", "--resume", "r", cwd=tmp_path)
        assert said.code == cli.USAGE
        assert f"give {asked}" in said.err, said.err


def test_facts_that_differ_at_each_start_are_no_difference() -> None:
    was = {"kind": "sim", "command": ["x", "--gpu", "h200", "--port", "41", "--parent-pid", "7"],
           "log": ["a"], "blocks": 10_000, "args": {"a": True}}
    now = {"kind": "sim", "command": ["x", "--gpu", "h200", "--port", "42", "--parent-pid", "8"],
           "log": ["b"], "blocks": 10_050, "args": {"a": True}}
    assert resume.unlike(was, now) == []
    assert resume.unlike(was, {**now, "blocks": 12_000}) == ["blocks: 10000 before, 12000 now"]
    assert len(resume.unlike(was, {**now, "args": {"a": False}, "version": "2"})) == 2


# --------------------------------------------------------------------------------- on the clock


def test_stamps_of_another_boot_come_to_the_first_ones_clock(tmp_path: Path) -> None:
    """The host's monotonic clock began anew: stamps are small again. All that was measured after
    lies after what was measured before."""
    run = frame.load(synthetic.write(tmp_path / "run", levels=(2, 4, 8), confirm=None))
    folder, out = run.folder, tmp_path / "again"
    shutil.copytree(folder.path, out)
    at = next(w.t0_ns for leg, w in run.legs if leg.value == 8)
    back = 900 * S  # the second boot's clock is so much behind
    sizes: dict[str, int] = {}
    for name in ("records-0.jsonl", "telemetry-server.jsonl", "telemetry-gpu.jsonl"):
        lines = (out / name).read_bytes().splitlines(keepends=True)
        new: list[bytes] = []
        for line in lines:
            row = json.loads(line)
            if row.get("due_ns", row.get("t_ns", 0)) >= at:
                for key in ("due_ns", "sent_ns", "headers_ns", "first_ns", "first_visible_ns",
                            "role_ns", "finish_ns", "end_ns", "t_ns"):
                    if key in row:
                        row[key] -= back
                sizes.setdefault(name, sum(len(x) for x in new))
            new.append(json.dumps(row, separators=(",", ":")).encode() + b"\n")
        (out / name).write_bytes(b"".join(new))
    (out / "legs.jsonl").unlink()
    journal = RunFolder(out).legs_journal()
    for leg, window in run.legs:
        if leg.value == 8:
            journal.append(LegLine(resumed=Resumed("", 0.0, [x.id for x, _ in run.legs[:2]], 0,
                                                   sizes, shift_ns=back)))
        journal.append(LegLine(leg=leg))
        journal.append(LegLine(window=window.shifted(-back if leg.value == 8 else 0)))
    again = frame.load(out)
    assert again.legs == run.legs
    assert again.judgements == run.judgements
    assert again.signs == run.signs
    assert again.frame.equals(run.frame)


def test_records_of_a_leg_that_was_cut_stand_apart() -> None:
    apart = Apart([Resumed("", 1.0, ["a"], 0, {"f": 100}),
                   Resumed("", 2.0, ["a", "b"], 0, {"f": 200}, shift_ns=5)])
    assert apart.of("f", 50, "a") == ("a", 0)
    assert apart.of("f", 50, "b") == ("b~cut1", 0)
    assert apart.of("f", 150, "b") == ("b", 0)
    assert apart.of("f", 150, "c") == ("c~cut2", 0)
    assert apart.of("f", 250, "c") == ("c", 5)
    assert apart.of("a new file", 0, "c") == ("c", 5)


def test_two_cannot_write_into_one_folder(tmp_path: Path) -> None:
    folder = RunFolder(synthetic.write(tmp_path / "run", levels=(2,), confirm=None))
    fd = folder.held()
    with pytest.raises(FolderError, match="still writes there"):
        RunFolder(folder.path).held()
    os.close(fd)
    os.close(folder.held())


# --------------------------------------------------------------------------- with a real server


def sweep(tmp_path: Path) -> Any:
    return start("sweep", "smoke", "--max-concurrency", "4", "--levels", "1,2,4", "--budget", "90s",
                 "--out", "r", "--no-report", *FAST, cwd=tmp_path)


def goes_on(tmp_path: Path) -> Said:
    return loadgen("sweep", "--resume", "r", "--no-report", cwd=tmp_path, timeout=120)


@pytest.mark.slow
@pytest.mark.usefixtures("nobody_is_left")
def test_a_sweep_that_was_killed_goes_on_to_its_verdict(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    with sweep(tmp_path) as process:
        wait(lambda: len(endings(folder)) == 2 and running(folder, 30)())
        time.sleep(2)
        process.kill()
        process.communicate()
    wait(lambda: not [1 for x in ("servers.sim", "loadgen.shard") if _lives(tmp_path, x)], 10)
    before = RunFolder(folder)
    (first, window), (second, none) = before.legs()
    assert (window is not None, none) == (True, None)
    records = len(kept(folder))
    said = goes_on(tmp_path)
    assert said.code == cli.PASS, said.all
    after = RunFolder(folder)
    legs = after.legs()
    assert legs[0] == (first, window)
    assert [leg.id for leg, _ in legs][:2] == [first.id, second.id]
    assert legs[1][0].seed != second.seed  # its prompts may lie in a cache
    apart = [r for r in after.records() if r.leg == f"{second.id}~cut1"]
    own = [r for r in after.records() if r.leg == second.id]
    assert apart
    assert own
    assert max(r.end_ns for r in apart) < min(r.due_ns for r in own)
    assert len(kept(folder)) > records
    note = next(x.resumed for x in after.leg_lines() if x.resumed)
    spent = [x.spent_s for x in after.leg_lines() if x.spent_s is not None]
    assert note.spent_s > 7  # the first leg, and what ran of the second
    assert spent[2] >= note.spent_s - 1e-6  # counted on
    assert json.loads((folder / "summary.json").read_bytes())["verdict"]["load"] == "SAFE"


def _lives(folder: Path, word: str) -> bool:
    try:
        return bool(pid_of(folder, word))
    except StopIteration:
        return False


@pytest.mark.slow
@pytest.mark.usefixtures("nobody_is_left")
def test_a_sweep_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    with sweep(tmp_path) as process:
        wait(lambda: len(endings(folder)) == 2)
        process.send_signal(signal.SIGINT)
        said = over(process)
        assert said.code == cli.INTERRUPTED
        assert "Go on with: loadgen sweep --resume r" in said.out
    assert endings(folder) == ["done", "interrupted"]
    said = goes_on(tmp_path)
    assert said.code == cli.PASS, said.all
    assert "interrupted" not in endings(folder)
