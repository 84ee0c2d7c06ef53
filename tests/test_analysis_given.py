"""What a report says of a trace's arrivals and of prompts from files."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from analysis import charts, frame, given, report
from loadgen import cli, scenario, traces
from loadgen.scenario import TraceFile


@pytest.fixture
def replayed(tmp_path: Path) -> Path:
    with pytest.raises(SystemExit):
        cli.entry(["run", "trace-azure-conv", "--server", "sim", "--virtual", "--seed", "3",
                   "--out", str(tmp_path / "r"), "--no-report", "--", "--gpu", "h200"])
    return tmp_path / "r"


def test_planned_are_the_file_s_instants_and_started_those_of_the_records(replayed: Path) -> None:
    run = frame.load(replayed)
    (found,) = given.arrivals(run)
    load = scenario.load("trace-azure-conv").load
    assert isinstance(load, TraceFile)
    assert list(found.planned_s) == list(traces.trace(load, 3).due_s)
    assert found.started_s == pytest.approx(found.planned_s, abs=1e-6)
    assert "191 requests were planned, 191 were started" in given.sentence(found)
    assert "from 0 s to 60 s" in (given.trace_file(run) or "")
    values = charts.spec(given.curve(found))["data"]["values"]
    for what in ("planned", "started"):
        rows = [v for v in values if v["what"] == what]
        width_s = rows[1]["s"] - rows[0]["s"]
        assert sum(v["rps"] * width_s for v in rows[:-1]) == pytest.approx(191)


def test_starts_that_are_missing_show(replayed: Path) -> None:
    run = frame.load(replayed)
    late = run.frame[run.frame["due_s"] % 2 < 1]
    (found,) = given.arrivals(msgspec.structs.replace(run, frame=late))
    assert len(found.started_s) == len(late) < len(found.planned_s)
    assert f"191 requests were planned, {len(late)} were started" in given.sentence(found)


def test_burstiness_of_a_clock_is_nothing_of_poisson_one_and_of_bursts_more() -> None:
    clock = given.burst([float(i) for i in range(100)], 99.0)
    assert (clock.n, clock.cv) == (100, 0.0)
    assert clock.peak == pytest.approx(2 * 99 / 100)  # the last one falls into the last second
    rng = np.random.default_rng(1)
    poisson = np.cumsum(rng.exponential(0.1, 20_000)).tolist()
    assert given.burst(poisson, poisson[-1]).cv == pytest.approx(1, abs=0.03)
    bursts = [10.0 * i + 0.001 * j for i in range(20) for j in range(10)]
    found = given.burst(bursts, 200.0)
    assert found.cv is not None
    assert found.cv > 2.5
    assert found.peak == pytest.approx(10.0)
    assert given.burst([1.0, 2.0], 2.0) == given.Burst(2, None, None)
    assert given.burst([1.0, 1.0, 1.0], 2.0).cv is None


def test_a_report_names_the_file_and_how_often_its_prompts_were_sent(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        cli.entry(["run", "sharegpt", "--concurrency", "2", "--num-prompts", "20", "--server",
                   "sim", "--virtual", "--out", str(tmp_path / "r"), "--no-report"])
    run = frame.load(tmp_path / "r")
    ((cls, name, sha256, *numbers),) = given.rows(run)
    assert (cls, name, numbers) == ("people", "sharegpt-sample.json", ["8", "0", "20", "12"])
    dataset = run.scenario.classes[0].dataset
    assert dataset is not None
    assert (dataset.sha256 or "").startswith(sha256)
    assert [f.rule for j in run.judgements for f in j.findings] == ["dataset-repeated"]
    drawn: list[charts.Chart] = []
    html = "".join(report._given(run, drawn))
    assert "Prompts from files" in html
    assert "sharegpt-sample.json" in html
    assert "Arrivals of the trace" not in html


def test_a_load_that_is_no_trace_has_no_such_chapter(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        cli.entry(["run", "smoke", "--concurrency", "2", "--num-prompts", "5", "--server", "sim",
                   "--virtual", "--out", str(tmp_path / "r"), "--no-report"])
    run = frame.load(tmp_path / "r")
    assert given.arrivals(run) == []
    assert given.rows(run) == []
    assert given.trace_file(run) is None
    assert "".join(report._given(run, [])) == ""
