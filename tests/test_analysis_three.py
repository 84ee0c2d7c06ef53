"""The verdict in three sentences: what was found and how sure it is, what stands in the way of
more, what to do. Each kind of verdict has its own."""

from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from analysis import frame, report, summary, three, words
from analysis.frame import Run
from loadgen.judge import ServerSigns
from loadgen.leg import Phase, Window
from loadgen.scenario import parse_slo
from tests import synthetic
from tests.synthetic import Kind, Plain, S

LIMITS = "TTFT ≤ 2 s and TPOT ≤ 50 ms"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return frame.load(synthetic.write(tmp_path_factory.mktemp("three") / "sweep"))


def proven(run: Run) -> int:
    assert run.conclusion.proof is not None
    return run.conclusion.proof.n


def test_safe_says_how_sure_it_is_on_how_much_it_rests_and_what_to_keep(sweep: Run) -> None:
    first, second, third = three.of(sweep)
    assert first == (f"Safe up to 32 concurrent requests of this mix (95 % confident that ≥ 95 % "
                     f"meet {LIMITS}; 4 runs, {proven(sweep):,} requests; not soak-tested).")
    j = next(j for j in sweep.judgements if j.value == 64)
    assert second.startswith("At 64 only ")
    assert second.endswith(f" of {j.n} met them: most misses are by TPOT.")
    assert third == "Keep 25 (78 %) for daily use."


@pytest.mark.parametrize(("signs", "says"), [
    (ServerSigns(kv_full_frac=0.4, preemptions=30.0),
     "At 64 the KV cache is full and requests are preempted."),
    (ServerSigns(kv_full_frac=0.4, preemptions=0.0), "At 64 the KV cache is full."),
    (ServerSigns(preemptions=30.0), "At 64 requests are preempted."),
    (ServerSigns(waiting_mean=12.34), ", and 12.3 requests wait in the server's queue."),
    (ServerSigns(), "most misses are by TPOT.")])
def test_the_deepest_cause_that_is_known_is_named(sweep: Run, signs: ServerSigns,
                                                  says: str) -> None:
    told = [signs if leg.value == 64 else x
            for (leg, _), x in zip(sweep.legs, sweep.signs, strict=True)]
    assert three.of(structs.replace(sweep, signs=told))[1].endswith(says)


def test_the_largest_level_that_was_tested_is_at_least_safe(tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run", levels=(8, 16), confirm=16))
    assert three.of(run) == [
        f"Safe up to at least 16 concurrent requests of this mix (95 % confident that ≥ 95 % meet "
        f"{LIMITS}; 4 runs, {proven(run):,} requests; not soak-tested).",
        "No higher level was tested: it may take more.",
        "Keep 12 (75 %) for daily use, or look further up with --max-concurrency 32."]


def test_one_request_at_a_time_leaves_nothing_to_keep_to(tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run", levels=(1,), confirm=1, proof_s=400.0))
    assert three.of(run)[2].startswith("There is nothing below 1 to keep to")


def test_unsafe_from_the_lowest_level_on(sweep: Run) -> None:
    run = frame.load(sweep.folder.path, parse_slo("ttft=1ms"))
    n = run.judgements[0].n
    assert three.of(run) == [
        f"Not safe at any tested level, from 1 concurrent request up (95 % confident that < 95 % "
        f"meet TTFT ≤ 1 ms and TPOT ≤ 50 ms; {n} requests).",
        f"At 1 none of {n} met them: most misses are by TTFT.",
        "No load is left to keep: loosen the limits, or use a faster server."]


def test_a_run_that_came_near_its_limits_is_told_so(tmp_path: Path) -> None:
    """All were good, and none was far enough from 50 ms per token to say so of the next run."""
    leg = synthetic.leg(8, "run", 40.0, 0.0)
    records = [synthetic.answer_of(leg, 100 * S + k * S // 4, 0.54, seq=k) for k in range(160)]
    window = Window(leg.id, 100 * S, 100 * S, 140 * S, 170 * S, "done")
    run = frame.load(synthetic.write_plain(tmp_path / "run", Plain([(leg, window)], records)))
    assert three.of(run) == [
        f"Unresolved at 8 concurrent requests: 160 of 160 met {LIMITS}, but 5 % came to 97 % of a "
        "limit or more.",
        "So near the limits runs of one server differ, and another may well miss them.",
        "`loadgen sweep` makes several and tells; or try a lower load."]
    assert words.answer(run).verdict.sentences[0] == (
        f"160 of 160 met {LIMITS}; but 5 % came to 97 % of a limit or more: another run may well "
        "miss it.")


@pytest.mark.parametrize(("kind", "phase", "says"), [
    ("SAFE", "run", [
        f"Met at 8 concurrent requests (95 % confident that ≥ 95 % meet {LIMITS}; 80 requests).",
        "80 of 80 did.",
        "Of higher loads it says nothing: `loadgen sweep` finds the largest safe one."]),
    ("UNSAFE", "run", [
        f"Not met at 8 concurrent requests (95 % confident that < 95 % meet {LIMITS}; 80 "
        "requests).", "At 8 none of 80 met them: most misses are by TTFT.",
        "Try a lower load: `loadgen sweep` finds the largest safe one."]),
    ("UNSAFE", "ladder", [
        f"Not safe at any tested level, from 8 concurrent requests up (95 % confident that < 95 % "
        f"meet {LIMITS}; 80 requests).", "At 8 none of 80 met them: most misses are by TTFT.",
        "Look for a safe load below it, with --levels."]),
    ("UNRESOLVED", "run", [
        f"Unresolved at 8 concurrent requests: 10 of 10 met {LIMITS}.",
        "Asked for is 95 % with 95 % confidence.",
        "49 more requests like these would settle it, about 4 more minutes: --duration."]),
    ("UNRESOLVED", "ladder", [
        f"Unresolved: no level was shown to be safe (at 8, 10 of 10 met {LIMITS}).",
        "No tested level was shown to be unsafe.",
        "59 more requests like these would settle it, about 4 more minutes: --budget."]),
    ("INVALID", "run", [
        "No verdict at 8 concurrent requests: the load generator was the limit, not the server.",
        "The generator could not start 80 requests (EMFILE).",
        "Raise max_inflight or `ulimit -n`, or use more generator processes."]),
    ("INVALID", "ladder", [
        "No verdict: the load generator was the limit, not the server.",
        "The generator could not start 80 requests (EMFILE).",
        "Raise max_inflight or `ulimit -n`, or use more generator processes."]),
    ("died", "run", [
        "The server died at 8 concurrent requests.", "At 8 the server died: CUDA out of memory.",
        "Mend that first: server.log in the run folder has its last words."]),
    ("died", "ladder", [
        "Not safe at any tested level, from 8 concurrent requests up.",
        "At 8 the server died: CUDA out of memory.",
        "Mend that first: server.log in the run folder has its last words."])])
def test_each_verdict_has_its_sentences(tmp_path: Path, kind: Kind, phase: Phase,
                                        says: list[str]) -> None:
    assert three.of(frame.load(synthetic.run_of(tmp_path / "r", (8, kind), phase=phase))) == says


@pytest.mark.parametrize(("legs", "first", "second"), [
    ([(1, "SAFE"), (2, "SAFE")], f"Met at each of 2 loads (95 % confident that ≥ 95 % meet "
     f"{LIMITS}, at each; 160 requests).", "None was refuted."),
    ([(1, "SAFE"), (2, "UNSAFE"), (4, "UNRESOLVED")],
     "Of 3 loads (170 requests) 2 did not pass; at 2 the limits were not met.",
     "At 2 none of 80 met them: most misses are by TTFT."),
    ([(1, "SAFE"), (2, "INVALID")],
     "Of 2 loads (160 requests) 1 did not pass; at 2 it was not measured.",
     "The generator could not start 80 requests (EMFILE)."),
    ([(1, "SAFE"), (2, "died")], "Of 2 loads (90 requests) 1 did not pass; at 2 the server died.",
     "At 2 the server died: CUDA out of memory.")])
def test_several_loads_are_told_together_with_the_first_that_did_not_pass(
        tmp_path: Path, legs: Any, first: str, second: str) -> None:
    assert three.of(frame.load(synthetic.run_of(tmp_path / "r", *legs)))[:2] == [first, second]


def test_a_run_without_a_leg_has_nothing_to_judge(tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run", levels=(), confirm=None))
    assert three.of(run)[0] == "No leg was run: there is nothing to judge."


def test_terminal_report_and_markdown_say_the_same_three(sweep: Run,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    from html import unescape

    monkeypatch.setattr(report, "_library", str)
    said = " ".join(three.of(sweep))
    assert words.verdict(sweep)[0] == f"SAFE, VALID (simulated): {said}"
    run = summary.finish(sweep.folder.path)
    page = unescape((run.folder.path / "report.html").read_text(encoding="utf-8"))
    assert said in page.replace("\u00a0", " ")
    assert said in unescape((run.folder.path / "summary.md").read_text(encoding="utf-8"))
