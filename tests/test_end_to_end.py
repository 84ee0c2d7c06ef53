"""Whole runs of the `loadgen` command on the simulator: from a scenario to a verdict and an exit
code, and through everything that can end a run early."""

import contextlib
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from loadgen import cli
from loadgen.record import Outcome
from loadgen.store import RunFolder
from tests.real import (
    FAST,
    LOADGEN,
    a_simulator,
    endings,
    kept,
    loadgen,
    outcomes,
    over,
    pid_of,
    processes_in,
    reaches,
    running,
    start,
    summary,
    wait,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nobody_is_left")]
JOURNALS = ("manifest.json", "legs.jsonl", "records-0.jsonl", "telemetry-server.jsonl",
            "telemetry-gpu.jsonl", "server.log")
DERIVED = ("records.parquet", "summary.json", "report.html", "junit.xml", "summary.md")


# -------------------------------------------------------------------------------- to the verdict


def test_a_run_writes_a_whole_folder_and_passes(tmp_path: Path) -> None:
    said = loadgen("run", "smoke", "--duration", "4s", "--out", "r", "--seed", "5", *FAST,
                   cwd=tmp_path)
    assert said.code == cli.PASS, said.all
    folder = tmp_path / "r"
    assert {p.name for p in folder.iterdir()} >= {*JOURNALS, *DERIVED}
    assert not list(folder.glob(".*"))  # no temporary file is left
    assert said.out.count("SAFE, ") == 1
    assert "(simulated)" in said.out
    assert "met TTFT ≤ 2 s and TPOT ≤ 100 ms" in said.out
    manifest = RunFolder(folder).manifest()
    assert manifest.server["simulated"] is True
    assert manifest.seed == 5
    assert manifest.run == "r"
    assert endings(folder) == ["done"]
    assert set(outcomes(folder)) <= {Outcome.OK, Outcome.CANCELLED}
    assert summary(folder)["torn_lines"] == 0
    assert summary(folder)["simulated"] is True
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "simulated" in page.lower()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"http", page)  # needs no network


def test_a_report_is_remade_from_the_journals_alone(tmp_path: Path) -> None:
    loadgen("run", "smoke", "--num-prompts", "80", "--out", "r", *FAST, cwd=tmp_path)
    (tmp_path / "again").mkdir()
    for name in {*JOURNALS, *(p.name for p in (tmp_path / "r").glob("telemetry-*.jsonl"))}:
        shutil.copy(tmp_path / "r" / name, tmp_path / "again")
    said = loadgen("report", "again", cwd=tmp_path)
    assert said.code == cli.PASS, said.all
    assert {p.name for p in (tmp_path / "again").iterdir()} >= set(DERIVED)
    assert summary(tmp_path / "again") == summary(tmp_path / "r")
    strict = loadgen("report", "again", "--slo", "ttft=0.001ms", cwd=tmp_path)
    assert strict.code == cli.SLO_MISSED
    assert "Not met" in strict.out
    assert loadgen("report", "again", "--slo", "ttft=60s", "--no-html", cwd=tmp_path
                   ).code == cli.PASS
    compared = loadgen("compare", "r", "again", cwd=tmp_path)
    assert "Traceback" not in compared.all
    assert compared.code == cli.PASS, compared.all


def test_same_seed_gives_the_same_plan_on_any_number_of_processes(tmp_path: Path) -> None:
    found = []
    for processes in ("1", "2"):
        said = loadgen("run", "smoke", "--rate", "40", "--num-prompts", "80", "--seed", "3",
                       "--processes", processes, "--out", processes, "--no-report", *FAST,
                       cwd=tmp_path)
        assert said.code in (cli.PASS, cli.INVALID), said.all  # late starts on a busy host
        records = sorted(kept(tmp_path / processes), key=lambda r: r.session)
        found.append([(r.session, r.cls, r.due_ns - records[0].due_ns) for r in records])
    assert found[0] == found[1]
    assert len(found[0]) == 80


def test_an_slo_that_is_missed_is_exit_1(tmp_path: Path) -> None:
    said = loadgen("run", "smoke", "--num-prompts", "60", "--slo", "ttft=0.1ms", "--no-report",
                   *FAST, cwd=tmp_path)
    assert said.code == cli.SLO_MISSED, said.all
    assert "UNSAFE" in said.out


def test_few_requests_are_inconclusive(tmp_path: Path) -> None:
    said = loadgen("run", "smoke", "--num-prompts", "5", "--no-report", *FAST, cwd=tmp_path)
    assert said.code == cli.INCONCLUSIVE, said.all
    assert "more requests" in said.out


def test_a_sweep_finds_its_safe_level(tmp_path: Path) -> None:
    said = loadgen("sweep", "smoke", "--max-concurrency", "4", "--levels", "2,4", "--budget",
                   "40s", "--out", "r", *FAST, cwd=tmp_path, timeout=80)
    assert said.code == cli.PASS, said.all
    assert "Safe up to at least 4 concurrent requests" in said.out
    assert set(endings(tmp_path / "r")) == {"done"}
    phases = [leg.phase for leg, _ in RunFolder(tmp_path / "r").legs()]
    assert phases == ["ladder", "ladder", "confirm"]
    assert {p.name for p in (tmp_path / "r").iterdir()} >= {*JOURNALS, *DERIVED}
    again = loadgen("report", "r", "--no-html", cwd=tmp_path)
    assert again.code == cli.PASS, again.all
    verdicts = [x.splitlines()[-1] for x in re.findall(r"SAFE, [^\n]*", said.out + again.out)]
    assert len(set(verdicts)) == 1  # the sweep and its report say the same


# ------------------------------------------------------------------------------------ interrupts


def test_an_interrupt_awaits_what_is_in_flight_and_writes_everything(tmp_path: Path) -> None:
    with start("run", "smoke", "--concurrency", "4", "--duration", "60s", "--out", "r", "--",
               "--speed", "1", cwd=tmp_path) as process:
        wait(running(tmp_path / "r", 12))
        process.send_signal(signal.SIGINT)
        said = over(process)
    assert said.code == cli.INTERRUPTED, said.all
    assert endings(tmp_path / "r") == ["interrupted"]
    assert set(outcomes(tmp_path / "r")) == {Outcome.OK}
    assert {p.name for p in (tmp_path / "r").iterdir()} >= {*JOURNALS, *DERIVED}


def test_two_interrupts_end_at_once_and_keep_the_records(tmp_path: Path) -> None:
    with start("run", "mixed", "--concurrency", "8", "--duration", "60s", "--out", "r",
               "--no-report", "--", "--speed", "0.2", cwd=tmp_path) as process:
        wait((tmp_path / "r" / "telemetry-server.jsonl").exists)
        time.sleep(5)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        said = over(process, 8)
    assert said.code == cli.INTERRUPTED, said.all
    assert outcomes(tmp_path / "r")[Outcome.CANCELLED] >= 1
    assert endings(tmp_path / "r") == ["interrupted"]
    assert (tmp_path / "r" / "summary.json").exists()


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["servers.sim", "loadgen.shard"])
def test_an_interrupt_before_the_first_leg_leaves_nothing_behind(
        tmp_path: Path, sig: signal.Signals, moment: str) -> None:
    """The process of that name is there, the legs have not begun; `nobody_is_left` looks for
    what stays behind."""
    with start("run", "smoke", "--duration", "30s", "--out", "r", cwd=tmp_path) as process:
        wait(lambda: any(moment in x for x in processes_in(tmp_path).values()))
        process.send_signal(sig)
        said = over(process, 12)
    assert said.code == cli.INTERRUPTED, said.all


def test_on_a_terminal_a_live_table_is_shown_and_left_behind(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen([*LOADGEN, "run", "smoke", "--duration", "2s", "--no-report", *FAST],
                          cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
                          env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
                          process_group=0) as process:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while part := os.read(ours, 65536):
                seen += part
        process.wait(20)
    os.close(ours)
    text = seen.decode()
    assert process.returncode in (cli.PASS, cli.INCONCLUSIVE), text
    assert "Traceback" not in text
    assert "in flight" in text
    assert "TTFT p50" in text
    assert "\x1b[?25h" in text  # the cursor is shown again


def test_an_interrupt_ends_a_sweep_with_what_it_knows(tmp_path: Path) -> None:
    with start("sweep", "smoke", "--max-concurrency", "4", "--levels", "1,2,4", "--out", "r",
               "--no-report", *FAST, cwd=tmp_path) as process:
        wait(lambda: len(endings(tmp_path / "r")) == 2)
        process.send_signal(signal.SIGINT)
        said = over(process)
    assert said.code == cli.INTERRUPTED, said.all
    assert endings(tmp_path / "r") == ["done", "interrupted"]
    assert loadgen("report", "r", "--no-html", cwd=tmp_path).code == cli.INTERRUPTED


# ------------------------------------------------------------------------------- killed, starved


def test_a_killed_run_is_reported_from_its_journals(tmp_path: Path) -> None:
    with start("run", "smoke", "--duration", "60s", "--out", "r", *FAST,
               cwd=tmp_path) as process:
        wait(running(tmp_path / "r", 60))
        pids = processes_in(tmp_path)
        assert len(pids) == 3  # loadgen, the simulator, a generator process
        process.kill()
        process.communicate()
    wait(lambda: not processes_in(tmp_path), 5)
    folder = tmp_path / "r"
    assert not (folder / "summary.json").exists()
    before = len(kept(folder))
    assert before >= 60
    said = loadgen("report", "r", cwd=tmp_path)
    assert said.code == cli.INTERRUPTED, said.all
    assert "Traceback" not in said.all
    assert {p.name for p in folder.iterdir()} >= {*JOURNALS, *DERIVED}
    assert "SUSPECT" in said.out
    assert len(kept(folder)) == before


def test_a_killed_generator_process_is_exit_3_and_named(tmp_path: Path) -> None:
    with start("run", "smoke", "--duration", "60s", "--out", "r", "--no-report",
               "--processes", "2", *FAST, cwd=tmp_path) as process:
        wait(running(tmp_path / "r", 20))
        os.kill(pid_of(tmp_path, "loadgen.shard"), signal.SIGKILL)
        said = over(process)
    assert said.code == cli.INVALID, said.all
    assert "killed by signal 9" in said.out
    assert endings(tmp_path / "r") == ["failed"]
    assert len(kept(tmp_path / "r")) >= 20


def test_a_disk_that_fills_is_exit_3_in_the_stores_words(tmp_path: Path) -> None:
    with start("run", "smoke", "--duration", "60s", "--out", "r", "--no-report", *FAST,
               cwd=tmp_path) as process:
        wait(running(tmp_path / "r", 20))
        shard = pid_of(tmp_path, "loadgen.shard")
        size = (tmp_path / "r" / "records-0.jsonl").stat().st_size + 3000
        resource.prlimit(shard, resource.RLIMIT_FSIZE, (size, size))
        said = over(process)
    assert said.code == cli.INVALID, said.all
    assert "records so far are kept" in said.out
    assert len(kept(tmp_path / "r")) >= 20


def test_telemetry_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """Telemetry decides on distress: a level must not be called safe on samples that were lost
    without a word. (The disk is full for a while, for the file of telemetry only.)"""
    telemetry = tmp_path / "r" / "telemetry-server.jsonl"
    with start("run", "smoke", "--duration", "6s", "--out", "r", "--no-report", *FAST,
               cwd=tmp_path) as process:
        wait(running(tmp_path / "r", 20))
        size, none = telemetry.stat().st_size + 300, resource.RLIM_INFINITY
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, none))
        time.sleep(2)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (none, none))
        said = over(process)
    assert telemetry.stat().st_size <= size, "the limit did not bite"
    assert "telemetry-server.jsonl" in said.all, said.all
    assert said.code == cli.INVALID, said.all


# ---------------------------------------------------------------------------- servers that die


def test_a_server_that_dies_under_load_is_exit_4_with_its_cause(tmp_path: Path) -> None:
    said = loadgen("run", "smoke", "--concurrency", "8", "--duration", "30s", "--out", "r",
                   "--no-report", "--", "--fault", "oom@8", cwd=tmp_path)
    assert said.code == cli.DIED, said.all
    assert "Traceback" not in said.all
    assert "CUDA out of memory" in said.out
    assert endings(tmp_path / "r") == ["server_died"]
    assert kept(tmp_path / "r")


def test_a_sweep_whose_highest_level_kills_the_server_passes_below_it(tmp_path: Path) -> None:
    said = loadgen("sweep", "smoke", "--max-concurrency", "4", "--levels", "2,4", "--budget",
                   "60s", "--out", "r", "--no-report", *FAST, "--fault", "oom@4", cwd=tmp_path,
                   timeout=100)
    assert said.code == cli.PASS, said.all
    assert "restarting the server" in said.out
    assert "Safe up to 2 concurrent requests" in said.out
    assert "server_died" in endings(tmp_path / "r")
    assert (tmp_path / "r" / "server.log").read_text().count("Starting vLLM server") == 2


def test_a_sweep_whose_every_level_kills_the_server_has_no_safe_level(tmp_path: Path) -> None:
    said = loadgen("sweep", "smoke", "--max-concurrency", "4", "--levels", "2,4", "--budget",
                   "60s", "--out", "r", "--no-report", *FAST, "--fault", "die@2", cwd=tmp_path,
                   timeout=60)
    assert said.code in (cli.DIED, cli.SLO_MISSED), said.all
    assert "Traceback" not in said.all
    assert "Safe up to" not in said.out


def test_a_remote_server_that_is_killed_is_exit_4(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with a_simulator(tmp_path / "elsewhere", "--speed", "10") as (server, url):
        wait(lambda: reaches(url))
        with start("run", "smoke", "--concurrency", "4", "--duration", "60s", "--out", "r",
                   "--no-report", "--base-url", url, cwd=tmp_path) as process:
            wait(running(tmp_path / "r", 40))
            server.kill()
            said = over(process)
    assert said.code == cli.DIED, said.all
    assert endings(tmp_path / "r") == ["server_died"]
    assert len(kept(tmp_path / "r")) >= 40
    seen = outcomes(tmp_path / "r")
    assert seen[Outcome.DISCONNECTED] + seen[Outcome.CONNECT_FAILED] >= 1


def test_a_remote_server_is_not_stopped_by_the_run(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with a_simulator(tmp_path / "elsewhere", "--speed", "10") as (server, url):
        wait(lambda: reaches(url))
        said = loadgen("run", "smoke", "--num-prompts", "60", "--no-report", "--out", "r",
                       "--base-url", url, cwd=tmp_path)
        assert said.code == cli.PASS, said.all
        assert server.poll() is None
        assert RunFolder(tmp_path / "r").manifest().server["kind"] == "remote"
