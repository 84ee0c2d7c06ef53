"""What checks and long legs mean in words: for the advice, for the table of levels, on the
terminal."""


import msgspec
import pytest

from analysis import frame, gate, steps, three, words
from analysis.frame import Run
from analysis.phrases import daily
from loadgen import view
from loadgen.judge import Judgement
from tests import synthetic


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return frame.load(synthetic.write(tmp_path_factory.mktemp("checks") / "sweep"))


def with_legs(run: Run, *more: Judgement) -> Run:
    return msgspec.structs.replace(run, judgements=[*run.judgements, *more])


def like(run: Run, **changes: object) -> Judgement:
    """A leg as the confirmations of 32 were, but for that."""
    one = next(j for j in run.judgements if j.value == 32 and j.phase == "confirm")
    return msgspec.structs.replace(one, blocks=[], **changes)


def test_open_arrivals_that_missed_bound_the_advice(sweep: Run) -> None:
    fast = like(sweep, phase="poisson", good=70, n=100, load="UNSAFE", offered_rps=4.7)
    slow = like(sweep, phase="poisson", value=20.0, good=98, n=100, offered_rps=3.6)
    assert daily(sweep, 32) == 25
    found = with_legs(sweep, fast, slow)
    assert daily(found, 32) == 20
    assert three.of(found)[2] == (
        "Keep 20 (62 %) for daily use: arrivals that do not wait for answers (Poisson) kept the "
        "limits up to 3.6/s (98 % of 100), and not at 4.7/s (70 % of 100 met them).")
    assert "Poisson arrivals at the rate of 20 at once, 3.6/s: 98 of 100 met it" in " ".join(
        words.answer(found).verdict.sentences)


def test_open_arrivals_that_missed_everywhere_take_more_from_the_advice(sweep: Run) -> None:
    fast = like(sweep, phase="poisson", good=70, n=100, load="UNSAFE", offered_rps=4.7)
    less = like(sweep, phase="poisson", value=25.0, good=80, n=100, load="UNSAFE", offered_rps=4.0)
    found = with_legs(sweep, fast, less)
    assert daily(found, 32) == 20
    assert three.of(found)[2].endswith("and no rate was found that holds.")


def test_open_arrivals_that_kept_the_limits_change_nothing(sweep: Run) -> None:
    kept = like(sweep, phase="poisson", good=100, n=100, offered_rps=4.7)
    assert three.of(with_legs(sweep, kept))[2] == "Keep 25 (78 %) for daily use."


def test_a_soak_that_failed_is_said_first_and_leaves_it_unresolved(sweep: Run) -> None:
    soak = like(sweep, phase="soak", good=5200, n=6000, window_s=240.0, load="UNRESOLVED")
    found = with_legs(sweep, soak)
    first, second, third = three.of(found)
    assert first.startswith("Unresolved: short runs held up to 32 concurrent requests, but a long "
                            "one did not at 32")
    assert "in a long one of 240 s only 86.7 % of 6,000 met them" in second
    assert third.startswith("Rely on none of these levels")
    said = words.answer(found).verdict
    assert said.load == "UNRESOLVED"
    assert said.headline == ("Unresolved: a long run at 32 concurrent requests did not hold, and "
                             "no soak below it did")


def test_a_higher_level_that_only_looked_bad_is_not_passed_over(sweep: Run) -> None:
    legs = [j if j.value <= 32 else msgspec.structs.replace(j, load="UNRESOLVED", crowded=True)
            for j in sweep.judgements]
    found = msgspec.structs.replace(sweep, judgements=legs)
    first, second, _ = three.of(found)
    assert first.startswith("Safe up to 32 concurrent requests")
    assert second.startswith("At 64 ")
    assert second.endswith("which does not settle it: its prompts crowded each other at the start.")


def test_levels_leave_out_open_arrivals_and_crowded_starts(sweep: Run) -> None:
    ladder = sum(j.n for j in sweep.judgements if j.value == 32 and j.phase == "ladder")
    for change in ({"phase": "poisson"}, {"phase": "burst"}, {"crowded": True}):
        legs = [msgspec.structs.replace(j, **change) if j.phase == "confirm" else j
                for j in sweep.judgements]
        table = steps.levels(msgspec.structs.replace(sweep, judgements=legs))
        assert table[table["value"] == 32]["n"].tolist() == [ladder]


def test_a_leg_in_which_nothing_was_due_says_so(sweep: Run) -> None:
    leg = sweep.legs[0][0]
    empty = msgspec.structs.replace(sweep.judgements[0], n=0, good=0, load="UNRESOLVED")
    assert view.line(leg, empty).endswith("  nothing was due yet: answers take longer")
    crowded = msgspec.structs.replace(empty, n=20, crowded=True, excused=True)
    assert view.line(leg, crowded).endswith("  no evidence: prompts crowded each other at the "
                                            "start")


def test_a_soak_is_one_of_the_runs_that_prove(sweep: Run) -> None:
    last = [j for j in sweep.judgements if j.phase == "confirm"][-1]
    legs = [msgspec.structs.replace(j, phase="soak") if j is last else j for j in sweep.judgements]
    said = gate.of(msgspec.structs.replace(sweep, judgements=legs))
    assert (said.safe, said.says[0].count("not soak-tested")) == (32, 0)
    assert said.proof is not None
    assert said.proof.runs == 4
