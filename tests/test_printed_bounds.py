"""A run folder prints no bound of a share beyond what SAFE and UNSAFE say, as none holds about as
often as it says (docs/method.md)."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from analysis import charts, steps, summary, words
from analysis.frame import Run
from tests import synthetic
from tests.synthetic import Kind

BOUND = re.compile(r"true share|may be anything|(lower|upper) bound|(lower|upper)_frac"
                   r"|at least [\d.]+.?%")
WRITTEN = ("report.html", "summary.md", "junit.xml", "verdict.json", "summary.json")


def printed(run: Run, what: str) -> str:
    """Without the scripts of the charts' library."""
    text = (run.folder.path / what).read_text(encoding="utf-8")
    return text.partition("<script>")[0]


@pytest.fixture(autouse=True)
def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.report._library", str)


@pytest.mark.parametrize("phase", ["run", "ladder"])
@pytest.mark.parametrize("kind", ["SAFE", "UNSAFE", "UNRESOLVED"])
def test_of_single_legs_no_bound_is_printed(tmp_path: Path, kind: Kind, phase: Any) -> None:
    run = summary.finish(synthetic.run_of(tmp_path / "run", (4, kind), (8, kind), phase=phase))
    for what in WRITTEN:
        assert (found := BOUND.search(printed(run, what))) is None, (what, found)
    assert not [x for x in steps.table(run) if BOUND.search(str(x))]
    drawn = json.dumps(charts.spec(charts.attainment(run, words.answer(run))))
    assert not re.search(r'"(lo|hi)"', drawn)
    assert '"share"' in drawn


def test_a_proof_says_its_target_and_no_bound_beyond_it(tmp_path: Path) -> None:
    run = summary.finish(synthetic.write(tmp_path / "run"))
    assert run.conclusion.safe is not None
    assert "with 95 % confidence 95 % or more do" in printed(run, "summary.md")
    assert "95 % or more, with 95 % confidence" in printed(run, "report.html")
    for what in WRITTEN:
        assert BOUND.search(printed(run, what)) is None, what


def test_a_proof_that_failed_has_none(tmp_path: Path) -> None:
    run = summary.finish(synthetic.write(tmp_path / "run", proof_s=2.0))
    proof = run.conclusion.proof
    assert proof is not None
    assert (proof.load, run.conclusion.safe) == ("UNRESOLVED", None)
    for what in WRITTEN:
        assert BOUND.search(printed(run, what)) is None, what
    said = json.loads(printed(run, "summary.json"))["conclusion"]["proof"]
    assert (said["n"], said["lower"], said["upper"]) == (proof.n, None, None)
