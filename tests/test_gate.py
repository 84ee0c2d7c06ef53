"""`loadgen report` as a gate: exit code, JUnit, Markdown and JSON say the same, and the JSON is
what the published schema says."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from analysis import frame, gate
from loadgen import cli
from tests import synthetic
from tests.real import loadgen
from tests.synthetic import Kind


def schema() -> Any:
    return json.loads(gate.SCHEMA_FILE.read_bytes())


def valid(path: Path) -> Any:
    """The verdict in `path`, once the published schema has accepted it."""
    said = json.loads(path.read_bytes())
    jsonschema.Draft202012Validator(schema()).validate(said)
    return said


def test_the_published_schema_is_that_of_the_types() -> None:
    assert gate.SCHEMA_FILE.read_bytes() == gate.schema(), "python -m analysis.gate writes it"
    jsonschema.Draft202012Validator.check_schema(schema())


def test_the_schema_refuses_what_is_no_verdict(tmp_path: Path) -> None:
    said = json.loads(gate.encoded(frame.load(synthetic.run_of(tmp_path / "r", (8, "SAFE")))))
    check = jsonschema.Draft202012Validator(schema())
    assert check.is_valid(said)
    changes: list[dict[str, Any]] = [{"load": "FINE"}, {"exit_code": "0"}, {"safe": "32"},
                                     {"levels": [{}]}]
    for change in changes:
        assert not check.is_valid({**said, **change})
    assert not check.is_valid({k: v for k, v in said.items() if k != "says"})


@pytest.mark.parametrize(("kind", "code", "result"), [
    ("SAFE", cli.PASS, "system-out"), ("UNSAFE", cli.SLO_MISSED, "failure"),
    ("UNRESOLVED", cli.INCONCLUSIVE, "skipped"), ("INVALID", cli.INVALID, "error"),
    ("died", cli.DIED, "error"), ("interrupted", cli.INTERRUPTED, "error")])
def test_all_files_say_what_the_exit_code_says(tmp_path: Path, kind: Kind, code: int,
                                               result: str) -> None:
    synthetic.run_of(tmp_path / "r", (8, kind))
    page = tmp_path / "page.md"
    page.write_text("before\n", encoding="utf-8")
    said = loadgen("report", "r", "--no-html", "--junit", "out/j.xml", "--markdown", "out/s.md",
                   "--json", "out/v.json", "--step-summary", cwd=tmp_path,
                   env={"GITHUB_STEP_SUMMARY": str(page)})
    assert said.code == code, said.all
    verdict = valid(tmp_path / "out" / "v.json")
    assert verdict["exit_code"] == code
    assert verdict["passed"] == (code == 0)
    assert valid(tmp_path / "r" / "verdict.json") == verdict
    case = next(x for x in ElementTree.parse(tmp_path / "out" / "j.xml").iter("testcase")
                if x.attrib["name"] == "verdict")
    assert case[-1].tag == result
    three = " ".join(verdict["says"])
    assert three in said.out
    assert three in "".join(case.itertext())
    text = (tmp_path / "out" / "s.md").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == "before\n" + text


def test_other_limits_gate_the_same_run_anew(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "r")
    assert loadgen("report", "r", "--no-html", cwd=tmp_path).code == cli.PASS
    assert valid(tmp_path / "r" / "verdict.json")["safe"] == 32
    said = loadgen("report", "r", "--no-html", "--slo", "ttft=1ms", cwd=tmp_path)
    assert said.code == cli.SLO_MISSED
    verdict = valid(tmp_path / "r" / "verdict.json")
    assert (verdict["safe"], verdict["unsafe"], verdict["load"]) == (None, 1, "UNSAFE")
    assert verdict["slo"]["code"]["ttft_s"] == 0.001


def test_a_safe_level_stands_with_its_proof_and_what_to_keep_to(tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "r"))
    said = gate.of(run)
    assert said.proof is not None
    assert (said.safe, said.unsafe, said.daily, said.proof.runs) == (32, 64, 25, 4)
    confirmed = [j for j in run.judgements if j.phase == "confirm"]
    assert (said.proof.good, said.proof.n) == (
        sum(j.good for j in confirmed), sum(j.n for j in confirmed))


def test_no_step_summary_is_written_where_none_is_asked_for(tmp_path: Path) -> None:
    synthetic.run_of(tmp_path / "r", (8, "SAFE"))
    page = tmp_path / "page.md"
    loadgen("report", "r", "--no-html", cwd=tmp_path, env={"GITHUB_STEP_SUMMARY": str(page)})
    assert not page.exists()
    said = loadgen("report", "r", "--no-html", "--step-summary", cwd=tmp_path)  # and no page there
    assert said.code == cli.PASS


def test_a_file_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    synthetic.run_of(tmp_path / "r", (8, "SAFE"))
    (tmp_path / "file").write_text("")
    said = loadgen("report", "r", "--no-html", "--json", "file/v.json", cwd=tmp_path)
    assert said.code == cli.INVALID
    assert "cannot be written" in said.err
    assert "Traceback" not in said.all


def test_the_schema_is_printed(tmp_path: Path) -> None:
    said = loadgen("report", "--schema", cwd=tmp_path)
    assert said.code == 0
    assert json.loads(said.out) == schema()


@pytest.mark.parametrize("n", [0, 3])
def test_a_percentile_that_n_cannot_bear_is_null(tmp_path: Path, n: int) -> None:
    """A leg of three requests, and one of none."""
    run = frame.load(synthetic.write_plain(tmp_path / "r", synthetic.few(n)))
    for level in gate.of(run).levels:
        assert level.n == n
        assert {getattr(level, f"{x}_{q}_s") for x in ("ttft", "tpot", "e2e")
                for q in ("p90", "p99")} == {None}


def test_a_run_without_a_leg_has_a_verdict_as_well(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "r", levels=(), confirm=None)
    said = loadgen("report", "r", "--no-html", cwd=tmp_path)
    assert said.code == cli.INVALID, said.all
    verdict = valid(tmp_path / "r" / "verdict.json")
    assert (verdict["exit_code"], verdict["levels"], verdict["safe"]) == (cli.INVALID, [], None)
