"""What a report says of the server itself: its GPUs, its states, what it survived."""

from pathlib import Path

import msgspec
import pytest

from analysis import deaths, frame, gpus, report, steps, summary
from analysis.frame import Run
from loadgen.store import LegLine, Row, RunFolder
from tests import synthetic

S = 1_000_000_000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder whose last level killed the server."""
    folder = synthetic.write(tmp_path_factory.mktemp("runs") / "r", levels=(1, 2, 4), confirm=None)
    run = RunFolder(folder)
    legs = run.legs()
    journal = run.legs_journal()
    last = legs[-1][1]
    assert last is not None
    journal.append(LegLine(window=msgspec.structs.replace(
        last, ending="server_died", note="OOM_RUNTIME: log: CUDA out of memory")))
    states = run.telemetry("state")
    first = legs[0][1]
    assert first is not None
    for t_ns, name, why in ((first.t0_ns - 9 * S, "STARTING", ""), (first.t0_ns - S, "READY", ""),
                            (last.end_ns, "OOM_RUNTIME", "log: CUDA out of memory")):
        states.append(Row("state", t_ns, name, 1.0, {"why": why} if why else {}))
    tree = run.telemetry("process")
    for t_ns, name, value in ((first.from_ns + S, "rss_bytes", 3 * synthetic.GIB),
                              (first.from_ns + S, "cpu_cores", 1.5),
                              (first.from_ns + 2 * S, "rss_bytes", 2 * synthetic.GIB),
                              (first.from_ns + 2 * S, "cpu_cores", 0.5)):
        tree.append(Row("process", t_ns, name, value))
    early = run.telemetry("gpu")
    early.append(Row("gpu", first.t0_ns - 8 * S, "memory_used_bytes", 0.5 * synthetic.GIB,
                     {"index": "0"}))
    early.append(Row("gpu", first.t0_ns - 2 * S, "memory_used_bytes", 14.0 * synthetic.GIB,
                     {"index": "0"}))
    return folder


@pytest.fixture(scope="module")
def run(path: Path) -> Run:
    return frame.load(path)


def test_memory_after_load_peak_and_increase_are_in_the_summary(run: Run) -> None:
    found = summary.summarise(run)["gpu"]
    assert found["memory_loaded_gib"] == 14.0  # not what it was before the model was loaded
    assert found["memory_peak_gib"] > 14.2
    assert found["memory_increase_gib"] == pytest.approx(found["memory_peak_gib"] - 14.0)
    assert found["memory_total_gib"] == 24.0
    assert 0 < found["busiest"]["util_frac"] <= 1


def test_a_sentence_says_it(run: Run) -> None:
    said = gpus.sentence(run)
    assert said is not None
    assert said.startswith("GPU (simulated): 14.0 GiB after load, peak ")
    assert " of 24 GiB; busy " in said


def test_what_the_server_survived_and_what_killed_it_is_said(run: Run) -> None:
    assert deaths.sentence(run) == (
        "It survives 2 concurrent requests, 4 kill it, and between them nothing was tried "
        "(OOM_RUNTIME: log: CUDA out of memory).")
    found = summary.summarise(run)["server"]
    assert found["survives"] == {"survived": 2, "fatal": 4, "exact": False}
    assert [s["state"] for s in found["states"]] == ["STARTING", "READY", "OOM_RUNTIME"]
    assert [s["leg"] for s in found["states"]] == [None, None, "ladder-4-r0"]
    assert found["states"][0]["t_s"] == -9.0


def test_memory_and_cores_of_the_server_s_processes_are_in_the_table(run: Run) -> None:
    row = steps.table(run).iloc[0].to_dict()
    assert (row["server_rss_gib"], row["server_cpu_cores"]) == (3.0, 1.0)


def test_the_report_has_tables_of_states_and_gpus(path: Path, run: Run) -> None:
    page = report.write(run).read_text(encoding="utf-8")
    assert "The server’s states" in page
    assert "CUDA out of memory" in page
    assert "The server’s GPUs" in page
    assert "over after load" in page


def test_a_leg_that_was_over_before_the_first_sample_has_no_figures(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path / "r", levels=(1,), confirm=None)
    (folder / "telemetry-gpu.jsonl").write_bytes(b"")
    RunFolder(folder).telemetry("gpu").append(
        Row("gpu", 1, "memory_used_bytes", 2.0, {"index": "0"}))
    short = frame.load(folder)
    assert gpus.sentence(short) is None
    assert "The server’s GPUs" in report.write(short).read_text(encoding="utf-8")


def test_a_run_without_any_of_it_says_nothing(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path / "r", levels=(1,), confirm=None)
    (folder / "telemetry-gpu.jsonl").unlink()
    bare = frame.load(folder)
    assert (gpus.figures(bare), gpus.sentence(bare), deaths.sentence(bare)) == (None, None, None)
    assert deaths.figures(bare) == {"survives": None, "states": []}
