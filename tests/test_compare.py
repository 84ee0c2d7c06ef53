"""Comparison of runs: alike or refused, better or worse beyond noise."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from markdown_it import MarkdownIt

from analysis import compare, comparison, frame
from analysis.compare import Difference
from loadgen import cli
from loadgen.leg import Leg, Window
from loadgen.scenario import to_plain
from tests import synthetic
from tests.real import loadgen
from tests.synthetic import Plain, S


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("base") / "run")


def slower(path: Path, by: float) -> Path:
    """A copy of the run whose every first token came later by a factor."""
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


def differences(base: Path, new: Path) -> list[Difference]:
    return compare.compare(frame.load(base), frame.load(new)).differences


def test_a_run_is_not_worse_than_itself(base: Path) -> None:
    found = compare.compare(frame.load(base), frame.load(base))
    assert {d.change for d in found.differences} == {"no evidence"}
    assert {d.change_frac for d in found.differences} == {0.0}
    assert found.exit_code == cli.PASS


def test_a_slower_first_token_is_worse_and_only_that(base: Path, tmp_path: Path) -> None:
    new = slower(synthetic.write(tmp_path / "run"), 1.6)
    at_32 = {d.name: d for d in differences(base, new) if d.level == 32}
    assert at_32["ttft_p50"].change == "worse"
    assert at_32["ttft_p50"].change_frac == pytest.approx(0.6, rel=0.02)
    assert at_32["ttft_p50"].lo > 0
    assert at_32["e2e_p50"].change == "no evidence"
    back = {(d.level, d.name): d for d in differences(new, base)}
    assert back[32, "ttft_p50"].change == "better"
    assert back[32, "ttft_p50"].lo < back[32, "ttft_p50"].change_frac < back[32, "ttft_p50"].hi < 0


def test_more_good_answers_are_better_and_fewer_are_worse(tmp_path: Path) -> None:
    good = synthetic.run_of(tmp_path / "good", (8, "SAFE"))
    bad = synthetic.run_of(tmp_path / "bad", (8, "UNSAFE"))
    assert {d.name: d.change for d in differences(good, bad)}["attainment"] == "worse"
    assert {d.name: d.change for d in differences(bad, good)}["attainment"] == "better"


def test_noise_is_no_evidence_in_nineteen_of_twenty_comparisons(tmp_path: Path) -> None:
    """Two runs of one server, again and again: only chance differs. Its requests come in clumps
    (a slow or a quick second for all of them), which a bootstrap of single requests would take for
    as many witnesses."""
    alarms = 0
    for k in range(60):
        runs = [clumped(tmp_path / f"{k}-{i}", np.random.default_rng([k, i])) for i in range(2)]
        alarms += any(d.change != "no evidence" for d in differences(*runs))
    assert alarms <= 7  # 3 are due; 8 or more have a chance of 1 %


def clumped(path: Path, rng: np.random.Generator) -> Path:
    leg = synthetic.leg(4, "run", 60.0, 0.0)
    records = []
    slow = np.exp(rng.normal(0, 0.3, 61))
    for k in range(300):
        due = 100 * S + k * S // 5
        takes_s = 1.5 * float(slow[k // 5]) * float(np.exp(rng.normal(0, 0.1)))
        records.append(synthetic.answer_of(leg, due, takes_s, seq=k))
    window = Window(leg.id, 100 * S, 100 * S, 160 * S, 170 * S, "done")
    return synthetic.write_plain(path, Plain([(leg, window)], records))


def even(path: Path, *speeds: float, seed: int = 0) -> Path:
    """A leg of a minute at each speed, one after the other, of answers that are much alike."""
    rng = np.random.default_rng(seed)
    legs: list[tuple[Leg, Window | None]] = []
    records = []
    for i, speed in enumerate(speeds):
        leg = synthetic.leg(4, "run", 60.0, 0.0)
        leg = msgspec.structs.replace(leg, id=f"{leg.id}-{i}")
        from_s = 100 * (i + 1)
        legs.append((leg, Window(leg.id, from_s * S, from_s * S, (from_s + 60) * S,
                                 (from_s + 70) * S, "done")))
        records += [synthetic.answer_of(leg, from_s * S + k * S // 5,
                                        1.5 / speed * float(np.exp(rng.normal(0, 0.02))), seq=k)
                    for k in range(300)]
    return synthetic.write_plain(path, Plain(legs, records))


def test_a_server_that_runs_two_percent_faster_today_is_no_evidence(tmp_path: Path) -> None:
    """As it may from run to run: its blocks alone would tell the two apart."""
    base = even(tmp_path / "base", 1.0)
    found = differences(base, even(tmp_path / "new", 1.02, seed=1))
    assert {d.change for d in found} == {"no evidence"}
    e2e = next(d for d in found if d.name == "e2e_p50")
    assert -0.1 < e2e.lo < -0.06 < 0.03 < e2e.hi < 0.07
    slow = {d.name: d.change for d in differences(base, even(tmp_path / "slow", 0.85, seed=2))}
    assert slow["e2e_p50"] == "worse"


def test_legs_of_one_level_that_differ_more_widen_the_interval(tmp_path: Path) -> None:
    """And as many that do not leave it as wide as it was: they share their server's start."""
    widths = []
    for i, speeds in enumerate(((1.0,), (1.0, 1.0, 1.0), (0.9, 1.0, 1.1))):
        found = differences(even(tmp_path / f"a{i}", *speeds), even(tmp_path / f"b{i}", 1.0))
        widths.append(next(d.hi - d.lo for d in found if d.name == "e2e_p50"))
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert widths[2] > 2 * widths[0]


def test_what_is_assumed_between_runs_is_said(base: Path) -> None:
    said = [*comparison.sentences(compare.compare(frame.load(base), frame.load(base)))]
    assert "their latencies differ by 2% (standard deviation; in an open loop by 4%)" in said[-1]


def test_a_percentile_is_compared_only_where_both_have_one(base: Path) -> None:
    names = {(d.level, d.name): d.n for d in differences(base, base)}
    assert (1, "ttft_p50") in names
    assert (1, "ttft_p90") not in names
    for (_, name), n in names.items():
        if "_p9" in name:
            assert min(n) >= {"90": 36, "99": 368}[name[-2:]]


# ------------------------------------------------------------------------------------------ alike


def test_runs_that_are_not_alike_are_refused_with_the_fields(base: Path, tmp_path: Path) -> None:
    scenario = to_plain(synthetic.MIX) | {"slo": {"ttft": "1s"}}
    other = synthetic.write(tmp_path / "run", model="llama-3-8b", scenario=scenario)
    found = compare.unlike(frame.load(base), frame.load(other))
    assert set(found) == {"model", "scenario.slo"}
    assert found["model"] == "qwen2.5-7b against llama-3-8b"
    said = loadgen("compare", str(base), str(other), cwd=tmp_path)
    assert said.code == cli.USAGE
    assert "model: qwen2.5-7b against llama-3-8b" in said.err
    assert "--allow model --allow scenario.slo" in said.err
    said = loadgen("compare", str(base), str(other), "--allow", "model", cwd=tmp_path)
    assert said.code == cli.USAGE
    assert "model" not in said.err
    said = loadgen("compare", str(base), str(other), "--allow", "model", "--allow",
                   "scenario.slo", cwd=tmp_path)
    assert said.code != cli.USAGE, said.all
    assert "Allowed to differ: model: qwen2.5-7b against llama-3-8b" in said.out


def test_what_is_no_run_is_refused(base: Path, tmp_path: Path) -> None:
    said = loadgen("compare", str(base), "nothing", cwd=tmp_path)
    assert said.code == cli.USAGE
    assert "no run folder" in said.err


# -------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize(("by", "limits", "code"), [
    (1.0, ["ttft_p50=25%"], cli.PASS), (1.6, ["ttft_p50=25%"], cli.SLO_MISSED),
    (1.0, ["ttft_p50=0.1%"], cli.INCONCLUSIVE), (1.0, ["ttft_p99=5%"], cli.INCONCLUSIVE),
    (1.6, ["ttft_p50=80%"], cli.PASS), (1.6, ["e2e_p50=30%", "ttft_p50=25%"], cli.SLO_MISSED),
    (1.0, ["attainment=5%", "goodput=60%"], cli.PASS)])
def test_a_limit_holds_is_broken_or_cannot_be_told(base: Path, tmp_path: Path, by: float,
                                                   limits: list[str], code: int) -> None:
    new = slower(synthetic.write(tmp_path / "run"), by)
    wanted = [compare.limit_of(x) for x in limits]
    found = compare.compare(frame.load(base), frame.load(new), wanted, levels=[32])
    assert found.exit_code == code, found.regressions


def test_a_gate_is_a_command_with_files_for_machines_and_people(base: Path, tmp_path: Path) -> None:
    new = slower(synthetic.write(tmp_path / "run"), 1.6)
    said = loadgen("compare", str(base), str(new), "--level", "32", "--max-regression",
                   "ttft_p50=25%", "--json", "c.json", "--markdown", "c.md", cwd=tmp_path)
    assert said.code == cli.SLO_MISSED, said.all
    assert "ttft_p50 at 32: worse by more than 25 %" in said.out
    found = json.loads((tmp_path / "c.json").read_bytes())
    assert found["exit_code"] == 1
    assert {d["level"] for d in found["differences"]} == {32}
    assert found["regressions"][0]["held"] == "regressed"
    html = MarkdownIt("commonmark").enable("table").render(
        (tmp_path / "c.md").read_text(encoding="utf-8"))
    assert html.count("<tr>") == 1 + len(found["differences"])
    assert "block bootstrap" in said.out


@pytest.mark.parametrize("text", ["ttft_p99", "ttft_p99=", "ttft_p99=x%", "p99=10%", "ttft_p99=-1%",
                                  "ttft_p99=nan"])
def test_a_limit_that_means_nothing_is_refused(base: Path, tmp_path: Path, text: str) -> None:
    said = loadgen("compare", str(base), str(base), "--max-regression", text, cwd=tmp_path)
    assert said.code == cli.USAGE
    assert "write FIGURE=SHARE" in said.err


def test_runs_without_a_level_in_common_tell_nothing(base: Path, tmp_path: Path) -> None:
    other = synthetic.run_of(tmp_path / "run", (3, "SAFE"), phase="ladder")
    said = loadgen("compare", str(base), str(other), cwd=tmp_path)
    assert said.code == cli.INCONCLUSIVE
    assert "No level has enough requests in both runs" in said.out
