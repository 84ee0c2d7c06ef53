"""Knee and verdict: the fit against known laws, and a sentence for every verdict."""

import re
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from analysis import frame, knee, phrases, words
from analysis.knee import Fit, Level
from loadgen.leg import Phase, Window
from loadgen.scenario import parse_slo
from tests import synthetic
from tests.synthetic import Plain, S

LADDER = (1, 2, 4, 8, 16, 32, 64, 128)


def levels(law: Fit, window_s: float, seed: int | None = None) -> list[Level]:
    rng = np.random.default_rng(seed)
    return [Level(c, float(rng.poisson(law.rps(c) * window_s)) if seed is not None
                  else law.rps(c) * window_s, window_s) for c in LADDER]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("words") / "sweep")


# ---------------------------------------------------------------------------------------- knee


@pytest.mark.parametrize("law", [Fit(0.3, 1 / 24, 0.0), Fit(1.0, 0.03, 0.0002), Fit(5.0, 0.1, 0.0)])
def test_fit_recovers_a_law_without_noise(law: Fit) -> None:
    found = knee.fit(levels(law, 60.0))
    assert found.lam == pytest.approx(law.lam, rel=1e-4)
    assert found.knee == pytest.approx(law.knee, rel=1e-3)


def test_interval_holds_the_true_knee_about_as_often_as_it_says() -> None:
    law = Fit(0.3, 1 / 24, 0.0)
    found = [knee.find(levels(law, 60.0, seed), seed) for seed in range(20)]
    held = [k.lo <= 24 <= k.hi for k in found if k.lo is not None and k.hi is not None]
    assert len(held) >= 18
    assert sum(held) >= 17  # of 20; by chance once in a thousand fewer


def test_knee_without_pairwise_cost_is_one_over_sigma() -> None:
    assert Fit(0.3, 1 / 24, 0.0).knee == pytest.approx(24)
    assert Fit(0.3, 0.0, 0.0).knee == np.inf


@pytest.mark.parametrize(("found", "why"), [
    (knee.find(levels(Fit(0.3, 0.0, 0.0), 60.0), 1), "still grows"),
    (knee.find(levels(Fit(0.3, 1 / 24, 0.0), 60.0)[:5], 1), "5 levels"),
    (knee.find(levels(Fit(0.3, 1 / 100, 0.0), 60.0), 1), "only 1 level past"),
    (knee.find(levels(Fit(0.01, 1 / 24, 0.0), 10.0), 1), "could be anything"),
    (knee.find([], 1), "0 levels"),
])
def test_knee_is_not_identified_and_says_why(found: knee.Knee, why: str) -> None:
    assert found.value is None
    assert why in found.reason
    assert knee.says(found).startswith("Knee not identified")


def test_rate_axis_has_no_knee_but_a_largest_rate_achieved(tmp_path: Path) -> None:
    legs, records = [], []
    for i, (rate, takes_s) in enumerate(((2.0, 0.5), (8.0, 30.0))):  # the second does not keep up
        leg, t0 = synthetic.leg(rate, "ladder", 10.0, 0.0, axis="rate"), (100 + 100 * i) * S
        legs.append((leg, Window(leg.id, t0, t0, t0 + 10 * S, t0 + 60 * S, "done")))
        for k in range(round(10 * rate)):
            due = t0 + round(k * S / rate)
            records.append(synthetic.answer_of(leg, due, takes_s if k > 4 else 0.5, seq=k))
    run = frame.load(synthetic.write_plain(tmp_path / "run", Plain(legs, records)))
    found = knee.of(run)
    assert "largest rate of which 95 % was achieved is 2/s" in found.reason
    assert "requests per second" in phrases.load_of(run, 2.0)


# --------------------------------------------------------------------------------------- words


def headline(path: Path) -> str:
    return words.answer(frame.load(path)).verdict.headline


def said(path: Path, slo: str | None = None) -> str:
    return "\n".join(words.verdict(frame.load(path, parse_slo(slo) if slo else None)))


def test_safe_stands_with_its_n_and_its_confidence(sweep: Path) -> None:
    text = said(sweep)
    assert text.startswith("SAFE, VALID (simulated): Safe up to 32 concurrent requests")
    assert "; not soak-tested)" in text
    run = frame.load(sweep)
    proof = run.conclusion.proof
    assert proof is not None
    assert (f"{proof.good} of {proof.n} met TTFT ≤ 2 s and TPOT ≤ 50 ms; with 95 % confidence 95 % "
            "or more do") in text
    assert "At 64, only" in text
    assert "Knee near" in text


def test_no_word_of_a_simulator_for_a_real_server(tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / "run", levels=(8,), confirm=None, server={"kind": "vllm"})
    assert "simulated" not in said(path)


def test_unsafe_names_the_level_and_what_broke(sweep: Path) -> None:
    text = said(sweep, "ttft=1ms")
    assert text.startswith("UNSAFE, VALID (simulated): Not safe at any tested level, from 1 conc")
    assert "missed" in text


def test_safe_without_an_unsafe_level_is_at_least(tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / "run", levels=(8, 16), confirm=16)
    assert "Safe up to at least 16 concurrent requests" in said(path)


def test_unresolved_says_what_would_settle_it(tmp_path: Path) -> None:
    few = said(synthetic.write(tmp_path / "few", levels=(4, 8), confirm=None))
    assert few.startswith("UNRESOLVED, VALID")
    assert "more requests at this share would show 95 %" in few
    bare = said(synthetic.write(tmp_path / "bare", levels=(8, 16), confirm=None))
    assert "a confirmation with fresh requests would settle it" in bare


def test_killed_confirmation_does_not_prove(tmp_path: Path) -> None:
    text = said(synthetic.write(tmp_path / "run", levels=(8, 16), confirm=16, crash=True,
                                proof_s=15.0))
    assert text.startswith("UNRESOLVED, SUSPECT")
    assert "The measurement is suspect" in text


@pytest.mark.parametrize("phase", ["ladder", "run"])
def test_invalid_says_that_the_generator_was_the_limit(tmp_path: Path, phase: Phase) -> None:
    text = said(synthetic.run_of(tmp_path / "run", (4, "INVALID"), phase=phase))
    assert text.startswith("UNRESOLVED, INVALID")
    assert "the load generator was the limit, not the server" in text
    assert "Remedy: " in text


@pytest.mark.parametrize(("slo", "starts"), [
    (None, "SAFE, VALID (simulated): Met at 16 concurrent requests (95 % confident that ≥ 95 % "
     "meet TTFT ≤ 2 s and TPOT ≤ 50 ms; "),
    ("ttft=1ms", "UNSAFE, VALID (simulated): Not met at 16 concurrent requests (95 % confident "
     "that < 95 % meet ")])
def test_single_leg_is_met_or_not_met(tmp_path: Path, slo: str | None, starts: str) -> None:
    path = synthetic.write(tmp_path / "run", levels=(16,), confirm=None, phase="run")
    text = said(path, slo)
    assert text.startswith(starts)
    assert " of " in text
    assert "confidence" in text or "Asked for: 95 %" in text


def test_several_loads_that_were_asked_for_are_judged_each_for_itself(tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / "run", levels=(64, 32, 16, 8), confirm=None, phase="run",
                           measure_s=80.0)
    _, *each, binds, generator = said(path).splitlines()
    assert binds.startswith("What binds at 64: compute")
    assert generator.startswith("Generator: ")
    assert re.fullmatch(
        r"8, 16, 32 concurrent requests SAFE; 64 UNSAFE "
        r"\(\d+ of \d+ requests met the SLO: surely less than 95 %\)", headline(path))
    assert [x.split(",")[0] for x in each] == ["At 8", "At 16", "At 32", "At 64"]
    assert "with 95 % confidence 95 % or more do" in each[0]  # SAFE stands with its confidence
    assert "TTFT ≤ 2 s" in each[0]
    assert "TTFT ≤ 2 s" not in each[1]
    assert "confirm" not in said(path)
    assert "Knee" not in said(path)


def test_a_load_that_was_held_several_times_is_as_bad_as_its_worst_leg(tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / "run", levels=(8, 8), confirm=None, phase="run",
                           measure_s=60.0)
    assert said(path).startswith("SAFE, VALID (simulated): Met at each of 2 loads ")
    assert headline(path) == "8 concurrent requests SAFE"
    again = synthetic.run_of(tmp_path / "again", (8, "SAFE"), (8, "INVALID"), (2, "SAFE"))
    assert said(again).startswith("UNRESOLVED, INVALID (simulated): Of 3 loads (240 requests) 1 ")
    assert headline(again) == (
        "2 concurrent requests SAFE; 8 INVALID (the generator could not start 80 requests "
        "(EMFILE))")
    worse = synthetic.run_of(tmp_path / "worse", (8, "UNSAFE"), (8, "UNRESOLVED"))
    assert headline(worse).startswith("8 concurrent requests UNSAFE (0 of 80 ")


def test_of_several_loads_those_that_are_not_safe_say_why(tmp_path: Path) -> None:
    path = synthetic.run_of(tmp_path / "run", (1, "UNRESOLVED"), (2, "SAFE"), (4, "UNSAFE"),
                            (8, "died"))
    _, *each = said(path).splitlines()
    assert headline(path) == (
        "1 concurrent request UNRESOLVED (10 of 10); 2 SAFE; 4, 8 UNSAFE (at 4: 0 of 80 "
        "requests met the SLO: surely less than 95 %)")
    assert "49 more requests at this share would show 95 %" in each[0]
    assert "missed 80 by TTFT" in each[2]
    assert "the server died: CUDA out of memory" in each[3]


def test_legs_of_a_search_are_no_run_whatever_the_command_was(tmp_path: Path) -> None:
    command = ["locust", "-f", "locustfiles/chat.py"]
    asked = synthetic.run_of(tmp_path / "asked", (2, "SAFE"), (4, "SAFE"), command=command)
    assert frame.load(asked).is_run
    searched = synthetic.write(tmp_path / "sweep", levels=(2, 4), confirm=None, command=command)
    assert not frame.load(searched).is_run
    assert not frame.load(synthetic.write(tmp_path / "none", levels=(), confirm=None)).is_run


def test_dead_server_is_named(tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / "run", levels=(8,), confirm=None)
    run = frame.load(path)
    leg, window = run.legs[0]
    died = structs.replace(window, ending="server_died", note="CUDA out of memory")
    records = list(run.folder.records())
    text = said(synthetic.write_plain(tmp_path / "died", Plain([(leg, died)], records)))
    assert text.startswith("UNSAFE")
    assert "the server died: CUDA out of memory" in text


def test_empty_run_says_so(tmp_path: Path) -> None:
    assert "No leg was run" in said(synthetic.write(tmp_path / "run", levels=(), confirm=None))
