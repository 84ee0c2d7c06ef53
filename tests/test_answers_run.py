"""Validators in whole runs against the simulator: shards, sweep, Locust, virtual time."""

from collections import Counter
from pathlib import Path

import pytest

from analysis import checked, frame
from loadgen import cli
from loadgen.store import RunFolder
from tests.real import kept, loadgen, summary
from tests.test_locust_headless import locust

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nobody_is_left")]

KINDS = {"invalid JSON", "extra text", "missing field", "wrong field name", "array as string",
         "wrong data type"}  # of S3's table, and those that its errors are near to
MISSED = (cli.SLO_MISSED, cli.INVALID)  # on two cores that others use as well
SPOILED = ["--", "--speed", "20", "--invalid-json-frac", "0.4"]


def verdicts_of(folder: Path) -> Counter[str | None]:
    return Counter(v.kind for v in RunFolder(folder).verdicts().values())


def test_each_kind_of_error_that_the_simulator_makes_is_named_and_counts(tmp_path: Path) -> None:
    said = loadgen("run", "json-forced", "--concurrency", "8", "--num-prompts", "240",
                   "--processes", "2", "--out", "r", "--seed", "5", *SPOILED, cwd=tmp_path)
    assert said.code in MISSED, said.all
    kinds = verdicts_of(tmp_path / "r")
    assert set(kinds) == {None, *KINDS}
    assert 100 < kinds[None] < 190  # 240, less a share of 0.4
    assert kinds.total() == 240
    run = frame.load(tmp_path / "r")
    wrong = 240 - kinds[None]
    assert run.judgements[0].misses["answer"] == wrong
    assert int(run.frame["good"].sum()) <= 240 - wrong
    assert checked.unchecked(run) == 0
    assert f"of {sum(r['checked'] for r in checked.of(run) if r['class'] == 'log')} valid" in (
        said.out)
    assert {r.output_ref is None for r in kept(tmp_path / "r")} == {False}
    assert len(list((tmp_path / "r").glob("outputs-*.jsonl"))) == 2
    report = loadgen("report", "r", "--no-html", cwd=tmp_path)
    assert report.code == said.code
    assert verdicts_of(tmp_path / "r") == kinds  # nothing was checked twice


def test_a_good_server_passes_and_keeps_no_text_where_none_is_checked(tmp_path: Path) -> None:
    said = loadgen("run", "json-forced", "--concurrency", "8", "--num-prompts", "120", "--slo",
                   "e2e=60s", "--out", "r", "--seed", "5", "--", "--speed", "5", cwd=tmp_path)
    assert said.code in (cli.PASS, cli.INVALID), said.all
    [judgement] = frame.load(tmp_path / "r").judgements
    assert (judgement.good, judgement.n) == (120, 120)
    assert set(verdicts_of(tmp_path / "r")) == {None}
    said = loadgen("run", "smoke", "--num-prompts", "20", "--out", "s", "--", "--speed", "20",
                   cwd=tmp_path)
    assert len(kept(tmp_path / "s")) == 20, said.all
    assert not list((tmp_path / "s").glob("outputs-*"))
    assert not (tmp_path / "s/verdicts.jsonl").exists()


def test_a_sweep_judges_each_level_by_its_answers_too(tmp_path: Path) -> None:
    said = loadgen("sweep", "json-forced", "--levels", "1,2", "--max-concurrency", "2",
                   "--budget", "25s", "--slo", "e2e=60s", "--out", "r", "--no-report", *SPOILED,
                   cwd=tmp_path)
    assert said.code in MISSED, said.all
    judged = frame.load(tmp_path / "r").judgements
    assert sum(j.misses.get("answer", 0) for j in judged) > 10
    assert all(j.good <= j.n - j.misses.get("answer", 0) for j in judged)
    assert said.code == cli.INVALID or "an answer that is not valid" in said.out


def test_locusts_users_answers_are_checked_when_the_report_is_made(tmp_path: Path) -> None:
    said = locust("--users", "4", "-r", "4", "-t", "8s", "--server-options",
                  "--speed 20 --invalid-json-frac 0.4", scenario="json-forced", cwd=tmp_path)
    kinds = verdicts_of(tmp_path / "r")
    assert kinds[None] > 10, said.all
    assert {*kinds} <= {None, *KINDS}
    assert len(kinds) > 3
    assert kinds.total() == sum(r.output_ref is not None for r in kept(tmp_path / "r"))
    assert summary(tmp_path / "r")["answers"]["unchecked"] == 0  # type: ignore[index]


def test_the_same_prompts_at_several_levels_are_compared(tmp_path: Path) -> None:
    said = loadgen("run", "json-forced", "--quality", "2,4", "--num-prompts", "30", "--out", "r",
                   "--seed", "5", *SPOILED, cwd=tmp_path)
    run = frame.load(tmp_path / "r")
    found = checked.quality(run)
    assert [(q["value"], q["n"], q["same"]) for q in found] == [(1, 30, 30), (2, 30, 30),
                                                                (4, 30, 30)], said.all
    assert len({q["valid"] for q in found}) == 1  # the simulator's words depend on nothing else
    assert {c.sampling.temperature for c in run.scenario.classes} == {0.0}


@pytest.mark.parametrize("words", [
    ["json-forced", "--quality", "2"], ["mixed", "--quality", "2", "--num-prompts", "9"],
    ["json-forced", "--quality", "2", "--num-prompts", "9", "--rate", "2"],
    ["json-forced", "--quality", "x", "--num-prompts", "9"]])
def test_quality_that_cannot_be_compared_is_exit_2(tmp_path: Path, words: list[str]) -> None:
    assert loadgen("run", *words, cwd=tmp_path).code == cli.USAGE
    assert not [*tmp_path.iterdir()]


def test_virtual_time_makes_no_answers_and_says_so(tmp_path: Path) -> None:
    said = loadgen("run", "json-forced", "--concurrency", "4", "--num-prompts", "100", "--virtual",
                   "--out", "r", cwd=tmp_path)
    assert "virtual time makes no answers: validators are not run" in said.out
    assert "the validators of log, profile were not run" in said.out
    assert summary(tmp_path / "r")["answers"]["made"] is False  # type: ignore[index]
    assert verdicts_of(tmp_path / "r") == Counter()
