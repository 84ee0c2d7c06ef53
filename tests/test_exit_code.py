"""The exit code of a run that is over, from its folder alone."""

from pathlib import Path

import pytest

from analysis import frame
from loadgen import cli, measure
from tests import synthetic
from tests.synthetic import Kind


@pytest.mark.parametrize(("kinds", "code"), [
    (["SAFE"], cli.PASS), (["UNSAFE"], cli.SLO_MISSED), (["UNRESOLVED"], cli.INCONCLUSIVE),
    (["died"], cli.DIED), (["INVALID"], cli.INVALID), (["interrupted"], cli.INTERRUPTED),
    (["SAFE", "SAFE"], cli.PASS),
    (["UNRESOLVED", "SAFE"], cli.INCONCLUSIVE),
    (["UNSAFE", "UNRESOLVED", "SAFE"], cli.SLO_MISSED),
    (["died", "UNSAFE", "UNRESOLVED", "SAFE"], cli.DIED),
    (["SAFE", "INVALID", "died", "UNSAFE", "UNRESOLVED"], cli.INVALID),
    (["INVALID", "died", "UNSAFE", "interrupted"], cli.INTERRUPTED)])
def test_a_run_ends_with_the_code_of_its_worst_load(tmp_path: Path, kinds: list[Kind],
                                                    code: int) -> None:
    path = synthetic.run_of(tmp_path / "run", *((2.0**i, k) for i, k in enumerate(kinds)))
    assert measure.exit_code(frame.load(path), None) == code


def test_a_load_that_was_held_twice_must_hold_twice(tmp_path: Path) -> None:
    path = synthetic.run_of(tmp_path / "run", (8, "UNRESOLVED"), (8, "SAFE"))
    assert measure.exit_code(frame.load(path), None) == cli.INCONCLUSIVE


def test_the_same_legs_of_a_search_are_judged_by_its_conclusion(tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / "run", levels=(32, 64), confirm=32)
    assert measure.exit_code(frame.load(path), None) == cli.PASS  # though 64 is UNSAFE
    path = synthetic.run_of(tmp_path / "ladder", (1, "SAFE"), (2, "UNSAFE"), phase="ladder")
    assert measure.exit_code(frame.load(path), None) == cli.INCONCLUSIVE  # nothing was confirmed
