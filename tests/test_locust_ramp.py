"""Locust's ramp and shapes as a build server runs them: real processes, on the simulator."""

import itertools
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from loadgen.store import RunFolder

ROOT = Path(__file__).resolve().parent.parent
SHORT = """
name = "short"
slo = {{ ttft = "2s", tpot = "100ms" }}
{shape}
[[classes]]
name = "hello"
kind = "chat"
prompt_tokens = 32
output_tokens = 16
sampling = {{ ignore_eos = true }}
"""

pytestmark = pytest.mark.slow


def locust(tmp_path: Path, name: str, *options: str, timeout_s: float = 240
           ) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A headless test of locustfiles/NAME.py, to its end; and its run folder."""
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "locust", "-f", str(ROOT / "locustfiles" / f"{name}.py"),
         "--headless", "--only-summary", "--run-folder", str(folder), *options],
        cwd=tmp_path, text=True, capture_output=True, timeout=timeout_s, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)})
    return done, folder


def scenario(tmp_path: Path, shape: str = "") -> str:
    path = tmp_path / "short.toml"
    path.write_text(SHORT.format(shape=shape), encoding="utf-8")
    return str(path)


def summary(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def test_a_ramp_climbs_confirms_and_leaves_what_a_build_server_reads(tmp_path: Path) -> None:
    done, folder = locust(tmp_path, "ramp", "-u", "4", "-t", "45s",
                          "--scenario", scenario(tmp_path))
    legs = [leg for leg, _ in RunFolder(folder).legs()]
    assert [leg.value for leg in legs if leg.phase == "ladder"] in ([1, 2, 4], [1, 4]), done.stderr
    assert {leg.phase for leg in legs} == {"ladder", "confirm"}
    found = summary(folder)
    assert (done.returncode, found["conclusion"]["load"]) in {
        (0, "SAFE"), (5, "UNRESOLVED"), (3, "UNRESOLVED")}, done.stdout
    assert ET.parse(folder / "junit.xml").getroot().tag in ("testsuite", "testsuites")
    assert "concurrent requests" in (folder / "summary.md").read_text(encoding="utf-8")
    assert found["verdict"]["load"] in done.stdout


def test_what_is_due_in_a_window_of_a_ramp_has_ended_in_it_or_is_cancelled(tmp_path: Path) -> None:
    _, folder = locust(tmp_path, "ramp", "-u", "2", "-t", "20s", "--scenario", scenario(tmp_path))
    records = list(RunFolder(folder).records())
    for leg, window in RunFolder(folder).legs():
        assert window is not None
        due = [r for r in records if r.leg == leg.id and window.from_ns <= r.due_ns < window.to_ns]
        assert due
        assert all(r.outcome.value == "OK" for r in due)
        assert all(r.end_ns <= window.end_ns for r in due)
        of_leg = [r for r in records if r.leg == leg.id]
        assert len({r.session for r in of_leg}) == len(of_leg)


def test_a_server_that_dies_of_the_load_ends_the_climb_and_keeps_the_level_below(
        tmp_path: Path) -> None:
    done, folder = locust(tmp_path, "ramp", "-u", "8", "-t", "60s", "--scenario",
                          scenario(tmp_path), "--server-options", "--fault oom@6")
    windows = {leg.id: window for leg, window in RunFolder(folder).legs()}
    died = [x for x, window in windows.items() if window and window.ending == "server_died"]
    assert died == ["ladder-8-r0"], done.stderr
    assert "out of memory" in (windows[died[0]].note or "")  # type: ignore[union-attr]
    assert "restarting the server" in done.stderr
    assert summary(folder)["conclusion"]["unsafe"] == 8
    assert done.returncode in (0, 3, 5), done.stdout  # 4 was confirmed, or a stalled host kept it


def test_the_scenarios_shape_is_followed_and_each_stage_is_a_leg(tmp_path: Path) -> None:
    shape = 'shape = { kind = "spike", base = 2, peak = 6, spike = "6s", hold = "5s" }'
    done, folder = locust(tmp_path, "mixed", "--scenario", scenario(tmp_path, shape))
    legs = RunFolder(folder).legs()
    assert [leg.value for leg, _ in legs] == [2, 6, 2], done.stderr
    windows = [window for _, window in legs if window is not None]
    assert [w.ending for w in windows] == ["done"] * 3
    assert all(a.end_ns <= b.from_ns for a, b in itertools.pairwise(windows))
    most = max(r.inflight or 0 for r in RunFolder(folder).records() if r.leg == legs[1][0].id)
    assert most == 6


def test_without_a_shape_the_options_say_how_many_and_how_long(tmp_path: Path) -> None:
    done, folder = locust(tmp_path, "mixed", "--scenario", scenario(tmp_path), "-u", "3",
                          "-r", "3", "-t", "6s")
    [(leg, window)] = RunFolder(folder).legs()
    assert (leg.value, leg.phase) == (3, "run"), done.stderr
    assert window is not None
    assert 2e9 < window.to_ns - window.from_ns < 8e9


def test_a_ramp_by_rate_keeps_the_plans_instants(tmp_path: Path) -> None:
    from loadgen import plan
    from loadgen import scenario as scenarios

    mix = scenario(tmp_path)
    _, folder = locust(tmp_path, "ramp", "-u", "16", "-t", "15s", "--scenario", mix, "--rate", "8",
                       "--plan-seed", "7")
    (leg, window), *_ = RunFolder(folder).legs()
    assert leg.axis == "rate"
    assert window is not None
    records = sorted((r for r in RunFolder(folder).records() if r.leg == leg.id),
                     key=lambda r: r.session)
    planned = plan.sessions(scenarios.load(mix), leg)
    for r, session in zip(records, planned, strict=False):
        assert r.session == session.k
        assert session.due_s is not None
        assert r.due_ns == window.t0_ns + round(session.due_s * 1e9)
