"""Servers that die, hang and come again: on the simulator, through the command line."""

import itertools
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadgen import cli
from loadgen.store import RunFolder
from tests.real import FAST, endings, kept, loadgen, over, running, start, wait

pytestmark = pytest.mark.slow


def states(folder: Path) -> list[str]:
    return [r.name for r in sorted((r for r in RunFolder(folder).rows() if r.source == "state"),
                                   key=lambda r: r.t_ns)]


def summary(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def simulator(folder: Path) -> psutil.Process:
    """The one whose log is in the folder."""
    [found] = [p for p in psutil.process_iter(["cmdline", "cwd"])
               if "servers.sim" in (p.info["cmdline"] or ()) and p.info["cwd"] == str(folder)]
    return found


def test_a_sweep_whose_level_32_kills_the_engine_is_safe_below_it(tmp_path: Path) -> None:
    said = loadgen("sweep", "smoke", "--max-concurrency", "32", "--levels", "8,16,32", "--budget",
                   "90s", "--slo", "ttft=20s,tpot=1s", "--out", "r", *FAST, "--fault", "oom@32",
                   cwd=tmp_path, timeout=150)
    assert said.code == cli.PASS, said.all
    assert "Safe up to 16 concurrent requests" in said.out
    assert "the server died at 32: OOM_RUNTIME: its process exited with code 0; log: " in said.out
    assert "it said before:" in said.out
    assert "and 32 kill it" not in said.out  # 17 to 31 were not tried
    assert "It survives 16 concurrent requests, 32 kill it, and between them nothing" in said.out
    found = summary(tmp_path / "r")
    assert (found["conclusion"]["safe"], found["conclusion"]["unsafe"]) == (16, 32)
    assert found["server"]["survives"] == {"survived": 16, "fatal": 32, "exact": False}
    seen = [x for x in states(tmp_path / "r") if x not in ("SERVING", "DEGRADED")]
    assert [x for x, _ in itertools.groupby(seen)] == [
        "STARTING", "READY", "OOM_RUNTIME", "STARTING", "READY", "STOPPED"]
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert "OOM_RUNTIME" in page
    assert kept(tmp_path / "r")[-1].leg != "ladder-32-r0"
    assert any(r.leg == "ladder-32-r0" for r in kept(tmp_path / "r"))


def test_a_server_whose_cache_is_full_is_degraded_and_serves_on(tmp_path: Path) -> None:
    said = loadgen("run", "mixed", "--concurrency", "32", "--duration", "6s", "--slo",
                   "ttft=20s,tpot=2s", "--out", "r", "--no-report", *FAST,
                   "--gpu-memory-utilization", "0.66", "--max-model-len", "4096", cwd=tmp_path,
                   timeout=100)
    assert said.code != cli.DIED, said.all
    seen = [x for x, _ in itertools.groupby(states(tmp_path / "r"))]
    assert (seen[:2], seen[-1]) == (["STARTING", "READY"], "STOPPED")
    assert "DEGRADED" in seen
    why = next(x["why"] for x in summary(tmp_path / "r")["server"]["states"]
               if x["state"] == "DEGRADED")
    assert "preemptions in" in why or "KV cache" in why


def test_a_server_that_must_not_be_restarted_is_not(tmp_path: Path) -> None:
    said = loadgen("sweep", "smoke", "--max-concurrency", "4", "--levels", "2,4", "--budget",
                   "60s", "--out", "r", "--no-report", "--no-restart", *FAST, "--fault", "oom@4",
                   cwd=tmp_path, timeout=100)
    assert said.code == cli.DIED, said.all
    assert "restarting" not in said.out
    assert (tmp_path / "r" / "server.log").read_text().count("Starting vLLM server") == 1


def test_the_largest_concurrency_before_oom_is_found_to_the_unit(tmp_path: Path) -> None:
    said = loadgen("sweep", "smoke", "--max-concurrency", "8", "--levels", "2,4,8", "--budget",
                   "40s", "--slo", "ttft=20s,tpot=1s", "--unit-step", "--out", "r", "--no-report",
                   *FAST, "--fault", "oom@6", cwd=tmp_path, timeout=250)
    assert said.code == cli.PASS, said.all
    assert "Safe up to 4 concurrent requests" in said.out
    assert "It survives 5 concurrent requests, and 6 kill it" in said.out
    assert summary(tmp_path / "r")["server"]["survives"] == {
        "survived": 5, "fatal": 6, "exact": True}


def test_a_server_that_hangs_is_known_by_the_silence_on_all_streams(tmp_path: Path) -> None:
    said = loadgen("run", "smoke", "--concurrency", "4", "--duration", "60s", "--out", "r",
                   "--no-report", "--", "--fault", "hang@4", cwd=tmp_path, timeout=100)
    assert said.code == cli.DIED, said.all
    assert re.search(r"HUNG: no token on any of 4 streams for 1\d s", said.out), said.out
    assert "/health says 200" in said.out
    assert endings(tmp_path / "r") == ["server_died"]
    assert states(tmp_path / "r")[-1] == "HUNG"


def test_a_process_that_is_killed_is_told_from_one_that_died(tmp_path: Path) -> None:
    with start("run", "smoke", "--concurrency", "2", "--duration", "60s", "--out", "r",
               "--no-report", *FAST, cwd=tmp_path) as process:
        wait(running(tmp_path / "r", 20))
        os.kill(simulator(tmp_path).pid, signal.SIGKILL)
        said = over(process)
    assert said.code == cli.DIED, said.all
    assert "KILLED: its process killed by signal 9" in said.out
    rows = {r.name for r in RunFolder(tmp_path / "r").rows() if r.source == "process"}
    assert {"rss_bytes", "threads", "fds", "processes"} <= rows
