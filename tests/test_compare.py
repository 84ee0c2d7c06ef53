"""Comparison of runs: alike or refused, better or worse beyond noise."""

from pathlib import Path

import pytest
from rich.console import Console

from analysis import compare, frame
from loadgen.errors import FolderError
from loadgen.scenario import to_plain
from tests import synthetic


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("base") / "run")


def slower(path: Path, by: float) -> Path:
    """A copy of the run whose every first token came later by a factor."""
    import msgspec

    from loadgen.store import RunFolder

    folder = RunFolder(path)
    header = (path / "records-0.jsonl").read_bytes().split(b"\n")[0]
    lines = [header]
    for r in folder.records():
        if r.first_ns is not None:
            r.first_ns = r.due_ns + round(by * (r.first_ns - r.due_ns))
        lines.append(msgspec.json.encode(r))
    (path / "records-0.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_a_run_is_not_worse_than_itself(base: Path) -> None:
    run = frame.load(base)
    assert {d.change for d in compare.differences(run, run)} == {"no evidence"}
    assert compare.show(Console(quiet=True), base, base) == 0


def test_a_slower_first_token_is_worse_and_only_that(base: Path, tmp_path: Path) -> None:
    new = slower(synthetic.write(tmp_path / "run"), 1.6)
    found = compare.differences(frame.load(base), frame.load(new))
    at_32 = {d.name: d for d in found if d.level == 32}
    assert at_32["TTFT p50"].change == "worse"
    assert at_32["TTFT p50"].ratio == pytest.approx(1.6, rel=0.02)
    assert at_32["TTFT p50"].lo > 1
    assert at_32["E2E p50"].change == "no evidence"
    assert compare.show(Console(quiet=True), base, new) == 1
    back = {(d.level, d.name): d for d in compare.differences(frame.load(new), frame.load(base))}
    assert back[32, "TTFT p50"].change == "better"


def test_runs_that_are_not_alike_are_refused_with_the_fields(base: Path, tmp_path: Path) -> None:
    scenario = to_plain(synthetic.MIX) | {"slo": {"ttft": "1s"}}
    other = synthetic.write(tmp_path / "run", model="llama-3-8b", scenario=scenario)
    reasons = compare.unlike(frame.load(base), frame.load(other))
    assert any(x.startswith("model: qwen2.5-7b against llama-3-8b") for x in reasons)
    assert "scenario.slo differs" in reasons
    assert compare.show(Console(quiet=True), base, other) == 2


def test_what_is_no_run_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="no run folder"):
        compare.show(Console(quiet=True), base, tmp_path / "nothing")
