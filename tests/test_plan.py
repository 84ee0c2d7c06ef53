"""What is to be sent, and when: the same for a seed, the same however it is shared out."""

import hashlib
import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy import stats

from loadgen import openai, plan, prompts
from loadgen.leg import Leg
from loadgen.plan import Session
from loadgen.scenario import (
    Closed,
    Fixed,
    Load,
    Lognormal,
    Open,
    PerSecond,
    RequestClass,
    Scenario,
    SharedPrefix,
    Trace,
    Uniform,
)

ROOT = Path(__file__).resolve().parent.parent
MIX = Scenario(name="mix", classes=(
    RequestClass(name="sum", kind="summary", weight=20, prompt_tok=Uniform(300, 500),
                 output_tok=Fixed(160)),
    RequestClass(name="code", kind="code", weight=50, prompt_tok=200,
                 output_tok=Lognormal(median=200, sigma=0.5, min=50, max=400)),
    RequestClass(name="json", kind="json", weight=30, prompt_tok=Fixed(300), output_tok=110,
                 shared_prefix=SharedPrefix(tokens=100, groups=3)),
    RequestClass(name="never", kind="chat", weight=0, prompt_tok=9, output_tok=9)))
LOADS: dict[str, Load] = {
    "closed": Closed(8), "constant": Open(PerSecond(5), "constant"),
    "poisson": Open(PerSecond(5)), "gamma": Open(PerSecond(5), "gamma", cv=3.0),
    "trace": Trace(tuple(i * i / 10 for i in range(2500)))}


def leg(load: Load, seed: int = 7, num_sessions: int | None = None) -> Leg:
    return Leg(id="l", axis="concurrency", value=8, phase="ladder", replicate=0, seed=seed,
               load=load, warmup_s=1, measure_s=7, num_sessions=num_sessions)


def first(n: int, load: Load, scenario: Scenario = MIX, shard: int = 0, of: int = 1,
          **how: Any) -> list[Session]:
    """The first n sessions of a stripe, or all there are."""
    return list(itertools.islice(plan.sessions(scenario, leg(load, **how), shard, of), n))


def text(session: Session, seed: int = 7) -> str:
    cls = MIX.of(session.cls)
    return plan.prompt(cls, session, 0, seed, prompts.guess(cls))


# ---------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_the_same_seed_gives_the_same_plan_and_another_another(load: Any) -> None:
    assert first(300, load) == first(300, load)
    assert first(300, load) != first(300, load, seed=8)


SCRIPT = """
import hashlib, sys
sys.path[:0] = [{tests!r}]
import test_plan
print(test_plan.digest())
"""


def digest() -> str:
    """Of the plans and bodies of every load, to the byte."""
    told = hashlib.sha256()
    for load in LOADS.values():
        for session in first(40, load):
            cls = MIX.of(session.cls)
            told.update(msgspec.json.encode(session))
            told.update(openai.body("chat", "m", text(session), session.turns[0].output_tok, cls))
    return told.hexdigest()


def test_another_process_makes_the_same_plan_byte_for_byte() -> None:
    hashseed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(tests=str(ROOT / "tests"))], cwd=ROOT, text=True,
        capture_output=True, check=True, timeout=60,
        env={**os.environ, "PYTHONHASHSEED": hashseed})
    assert done.stdout.strip() == digest()


def test_a_session_does_not_hang_on_who_asks_or_in_which_order() -> None:
    planned = [plan.session(MIX, 7, k, None) for k in (5, 900, 3)]
    again = [plan.session(MIX, 7, k, None) for k in (3, 5, 900)]
    assert planned == [again[1], again[2], again[0]]


@pytest.mark.parametrize("name", range(5))
def test_streams_differ_by_name_by_seed_and_by_number(name: Any) -> None:
    def draws(*key: int) -> tuple[float, ...]:
        return tuple(plan.stream(*key).random(4))
    here = [draws(s, n, k) for s in (0, 1, 2**63) for n in (name, 5 + name) for k in (0, 1, 9999)]
    assert len(set(here)) == len(here)
    assert draws(1, name, 3) == draws(1, name, 3)


def test_sessions_of_one_stream_do_not_overlap() -> None:
    """Each has 2^128 numbers to itself: drawing many of one does not reach the next one's."""
    many = set(plan.stream(7, plan.LENGTHS, 0).random(100_000))
    assert not many & set(plan.stream(7, plan.LENGTHS, 1).random(100_000))


# ---------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("of", [1, 2, 3, 8])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("num_sessions", [None, 0, 1, 7, 100])
def test_shards_together_are_the_plan_of_one_process(load: Any, of: Any, num_sessions: Any) -> None:
    n = 120
    one = first(n, load, num_sessions=num_sessions)
    assert len(one) == (n if num_sessions is None else num_sessions)
    stripes = [first(n, load, shard=i, of=of, num_sessions=num_sessions) for i in range(of)]
    for i, stripe in enumerate(stripes):
        assert all(s.k % of == i for s in stripe)
    together = sorted((s for stripe in stripes for s in stripe), key=lambda s: s.k)
    assert together[: len(one)] == one
    if num_sessions is not None:
        assert together == one


@pytest.mark.parametrize("of", [1, 2, 3, 8])
def test_a_trace_ends_in_every_shard(of: Any) -> None:
    load = Trace((0.0, 0.5, 0.5, 2.0, 9.0))
    due = sorted((s.k, s.due_s) for i in range(of) for s in first(99, load, shard=i, of=of))
    assert due == [(0, 0.0), (1, 0.5), (2, 0.5), (3, 2.0), (4, 9.0)]


def test_a_closed_loop_has_no_instants_and_no_end() -> None:
    planned = first(5000, LOADS["closed"])
    assert [s.k for s in planned] == list(range(5000))
    assert all(s.due_s is None for s in planned)


# --------------------------------------------------------------------------------- mix, lengths


def test_classes_come_by_their_weights() -> None:
    n = 6000
    seen = Counter(s.cls for s in first(n, LOADS["closed"]))
    assert set(seen) == {"sum", "code", "json"}
    chi2 = stats.chisquare([seen["sum"], seen["code"], seen["json"]],
                           [0.2 * n, 0.5 * n, 0.3 * n])
    assert chi2.pvalue > 0.001


def test_the_mix_is_the_same_whatever_the_load() -> None:
    classes = {tuple(s.cls for s in first(200, load)) for load in LOADS.values()}
    assert len(classes) == 1


def test_lengths_stay_within_their_limits_and_reach_them() -> None:
    planned = first(6000, LOADS["closed"])
    asked = {c: [s.turns[0].prompt_tok for s in planned if s.cls == c] for c in MIX_NAMES}
    given = {c: [s.turns[0].output_tok for s in planned if s.cls == c] for c in MIX_NAMES}
    assert (min(asked["sum"]), max(asked["sum"])) == (300, 500)
    assert (set(asked["code"]), set(asked["json"])) == ({200}, {300})
    assert (set(given["sum"]), set(given["json"])) == ({160}, {110})
    assert (min(given["code"]), max(given["code"])) == (50, 400)
    assert np.mean(asked["sum"]) == pytest.approx(400, abs=6)
    assert np.median(given["code"]) == pytest.approx(200, rel=0.03)
    assert stats.kstest(np.log([x for x in given["code"] if x < 400]) - np.log(200),
                        stats.truncnorm(-np.inf, np.log(2) / 0.5, 0, 0.5).cdf).pvalue > 0.001


MIX_NAMES = [c.name for c in MIX.classes]


@pytest.mark.parametrize(("length", "low", "high"), [
    (9, 9, 9), (Fixed(9), 9, 9), (Uniform(3, 3), 3, 3), (Uniform(1, 4), 1, 4),
    (Lognormal(median=100, sigma=5.0, min=90, max=110), 90, 110)])
def test_a_length_is_a_whole_number_within_its_limits(length: Any, low: Any, high: Any) -> None:
    drawn = [plan.draw(length, np.random.default_rng(i)) for i in range(300)]
    assert {type(x) for x in drawn} == {int}
    assert (min(drawn), max(drawn)) == (low, high)


def test_only_classes_with_a_shared_prefix_have_one() -> None:
    planned = first(2000, LOADS["closed"])
    assert {s.prefix for s in planned if s.cls != "json"} == {()}
    assert {s.prefix for s in planned if s.cls == "json"} == {(0,), (1,), (2,)}


# -------------------------------------------------------------------------------------- arrivals


def gaps(load: Load, n: int = 20_000, seed: int = 7) -> Any:
    assert not isinstance(load, Closed)
    return np.diff([0.0, *itertools.islice(plan.arrivals(load, seed), n)])


def test_constant_arrivals_are_evenly_spaced_from_the_start() -> None:
    due = list(itertools.islice(plan.arrivals(Open(PerSecond(4), "constant"), 7), 9))
    assert due == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert due[8] == 2.0


def test_constant_arrivals_do_not_drift() -> None:
    due = next(itertools.islice(plan.arrivals(Open(PerSecond(3), "constant"), 7), 300_000, None))
    assert due == 100_000


ARRIVALS = {"poisson": (Open(PerSecond(20)), 1.0),
            "gamma 3": (Open(PerSecond(20), "gamma", cv=3.0), 3.0),
            "gamma 1": (Open(PerSecond(20), "gamma"), 1.0),
            "gamma 0.5": (Open(PerSecond(20), "gamma", cv=0.5), 0.5)}


@pytest.mark.parametrize(("load", "cv"), ARRIVALS.values(), ids=ARRIVALS)
def test_gaps_have_the_mean_and_the_variation_asked_for(load: Any, cv: Any) -> None:
    g = gaps(load)
    assert (g >= 0).all()
    assert g.mean() == pytest.approx(0.05, rel=5 * cv / np.sqrt(len(g)))
    assert g.std() / g.mean() == pytest.approx(cv, rel=0.06)


@pytest.mark.parametrize(("load", "cv"), ARRIVALS.values(), ids=ARRIVALS)
def test_gaps_have_the_distribution_asked_for(load: Any, cv: Any) -> None:
    g = gaps(load, 20_007)
    nines = g.reshape(-1, 9).sum(axis=1)  # single gaps of cv 3 are often below a float's step
    assert stats.kstest(nines, stats.gamma(9 / cv**2, scale=cv**2 * 0.05).cdf).pvalue > 0.001
    assert abs(np.corrcoef(g[:-1], g[1:])[0, 1]) < 0.03


def test_poisson_gaps_are_exponential() -> None:
    g = gaps(Open(PerSecond(20)))
    assert stats.kstest(g, stats.expon(scale=0.05).cdf).pvalue > 0.001


def test_cv_is_for_gamma_gaps_only() -> None:
    assert (gaps(Open(PerSecond(20), cv=3.0), 100) == gaps(Open(PerSecond(20)), 100)).all()


def test_arrivals_ascend_across_blocks() -> None:
    """Gaps are drawn in blocks; a seam must not show."""
    load = Open(PerSecond(20))
    g = gaps(load, 5 * 1024)
    assert (g > 0).all()
    assert stats.kstest(g[np.arange(1, 5) * 1024], stats.expon(scale=0.05).cdf).pvalue > 0.001
    assert len(set(g.round(9))) > 5000


def test_a_rate_only_stretches_time() -> None:
    slow = np.cumsum(gaps(Open(PerSecond(1)), 2000))
    assert np.cumsum(gaps(Open(PerSecond(10)), 2000)) == pytest.approx(slow / 10)


def test_a_trace_is_followed_to_the_instant() -> None:
    assert [s.due_s for s in first(9999, LOADS["trace"])] == list(LOADS["trace"].due_s)  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------- prompts


def test_no_two_prompts_share_a_nonce() -> None:
    nonces = {plan.nonce(seed, k, turn) for seed in (0, 7, 70_001) for k in range(5000)
              for turn in (0, 1)}
    assert len(nonces) == 30_000
    assert {len(n) for n in nonces} == {8}
    assert max(map(len, nonces)) <= prompts.NONCE_MAX_CHARS


def test_no_two_prompts_of_a_leg_begin_alike() -> None:
    starts = [text(s)[:16] for s in first(600, LOADS["closed"]) if not s.prefix]
    assert len(starts) > 300
    assert len(set(starts)) == len(starts)


def test_prompts_of_different_legs_differ_within_the_first_16_characters() -> None:
    """The ladder's requests must not warm the prefix cache for the confirmation."""
    legs = [{text(s, seed)[:16] for s in first(300, LOADS["closed"], seed=seed) if not s.prefix}
            for seed in (70_000, 70_001, 80_000)]
    assert all(not a & b for a, b in itertools.combinations(legs, 2))


def test_prompts_with_a_shared_prefix_begin_alike_and_end_differently() -> None:
    shared = [(s.prefix, text(s)) for s in first(600, LOADS["closed"]) if s.prefix]
    for prefix in {p for p, _ in shared}:
        alike = [t for p, t in shared if p == prefix]
        common = itertools.takewhile(lambda c: len(set(c)) == 1, zip(*alike, strict=False))
        assert len(list(common)) > 150
        assert len(set(alike)) == len(alike)


def test_a_given_text_is_sent_as_it_is() -> None:
    given = Session(3, "code", None, (plan.Turn(9, 9, text="as it is"),))
    assert text(given) == "as it is"


def test_turns_of_a_session_have_prompts_of_their_own() -> None:
    two = Session(3, "code", None, (plan.Turn(200, 9), plan.Turn(200, 9)))
    cls = MIX.of("code")
    texts = [plan.prompt(cls, two, turn, 7, prompts.guess(cls)) for turn in (0, 1)]
    assert texts[0][:16] != texts[1][:16]
