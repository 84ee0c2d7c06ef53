"""Where most misses are answers that are not valid, the verdict says what failed, and speaks of
load only where validity falls with it."""

from pathlib import Path
from typing import Any

import pytest

from analysis import frame, not_valid, three, words
from analysis.frame import Run
from loadgen import answers, scenario
from tests.test_answers import mix, run_folder

JSON = {"check": "json", "schema": {"type": "object", "properties": {"a": {"type": "integer"}},
                                    "required": ["a"]}}
GOOD, BROKEN, WORDY = '{"a": 1}', "I think", 'Here: {"a": 1}'


def run_of(path: Path, *levels: list[str], of: scenario.Scenario | None = None) -> Run:
    answers.complete(run_folder(path / "r", of or mix(kind="json", validator=JSON), *levels))
    return frame.load(path / "r")


def told(good: int, broken: int, wordy: int = 0) -> list[str]:
    return [GOOD] * good + [BROKEN] * broken + [WORDY] * wordy


def test_the_check_its_kinds_and_their_share_are_named_and_no_lower_load_is_advised(
        tmp_path: Path) -> None:
    run = run_of(tmp_path, told(16, 60, 4))
    first, second, third = three.of(run)
    assert first.startswith("Not met at 1 concurrent request: too few answers are valid (95 % conf")
    assert "with a valid answer; 80 requests)" in first
    assert second == ("At 1 64 of 80 (80 %) were answered with what failed its check: json of "
                      "class c, invalid JSON 60, extra text 4; all came in time.")
    assert third.startswith("That is for the prompt, the model or its decoding: force its form")
    assert "`--quality 2 --num-prompts 100`" in third
    assert "lower load" not in " ".join(words.verdict(run))
    assert "What binds" not in " ".join(words.verdict(run))


@pytest.mark.parametrize(("more", "way"), [
    ({"kind": "json", "validator": JSON, "response_format": "json_schema"}, "is forced already"),
    ({"validator": {"check": "length", "min_chars": 50}}, "ask for the length"),
    ({"validator": {"check": "facts", "planted": 3}}, "ask for it otherwise"),
    ({"validator": {"check": "repetition", "min_tokens": 50}}, "`repetition_penalty`")])
def test_the_advice_is_for_the_check_that_failed(tmp_path: Path, more: Any, way: str) -> None:
    run = run_of(tmp_path, told(0, 80), of=mix(**more))
    assert way in three.of(run)[2]


def test_where_lower_loads_were_no_better_no_lower_load_is_advised(tmp_path: Path) -> None:
    run = run_of(tmp_path, told(30, 50), told(28, 52))
    second, third = not_valid.says(run, run.judgements[1]), not_valid.advice(run, run.judgements[1])
    assert second.endswith("at lower loads no more were valid than chance allows (37.5 % of 80).")
    assert third.startswith("A lower load does not mend that: ")
    assert three.of(run)[0].endswith("at 1 too few answers were valid.")


def test_where_validity_falls_with_load_a_lower_one_helps(tmp_path: Path) -> None:
    run = run_of(tmp_path, told(80, 0), told(20, 60))
    first, second, third = three.of(run)
    assert first.endswith("1 did not pass; at 2 too few answers were valid.")
    assert second.endswith("all came in time; at lower loads 100 % of 80 were valid.")
    assert third.startswith("A lower load helps, as validity falls with it")


def test_few_answers_that_are_not_valid_leave_it_open_and_no_lower_load_is_advised(
        tmp_path: Path) -> None:
    run = run_of(tmp_path, told(9, 2))
    assert three.of(run)[0].startswith("Unresolved")
    assert "were answered with what failed its check" in three.of(run)[1]
    assert "lower load" not in three.of(run)[2]


def test_late_answers_stay_a_matter_of_load_whether_they_are_valid_or_not(tmp_path: Path) -> None:
    late = {"e2e": "0.000001ms"}  # each takes 9 ns
    run = run_of(tmp_path, told(0, 80), of=mix(kind="json", validator=JSON, slo=late))
    assert run.judgements[0].misses["e2e"] == 80
    assert not not_valid.is_why(run, run.judgements[0])
    assert "Try a lower load" in three.of(run)[2]
