"""What a Prometheus is shown, of hand-made records."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from loadgen import metrics
from loadgen.board import GAP_S, TTFT_S, Board, Judged, Running
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Scenario
from tests.synthetic import MIX, S

MS = 1_000_000
RUNNING = Running("ladder-4-r0", "ladder", "concurrency", 4.0, 3.5, 4, 30, 20, 19, 0.002, 0.25)


def board(mix: Scenario = MIX) -> Board:
    return Board(mix, {"run": "r", "model": 'a "model"'}, 0.95)


def shown(b: Board) -> dict[tuple[str, ...], float]:
    """All samples as (name, values of the labels in their names' order …) → value, as they come
    over the wire."""
    registry = CollectorRegistry()
    registry.register(b)  # type: ignore[arg-type, unused-ignore]
    return {(x.name, *(v for _, v in sorted(x.labels.items()))): x.value
            for family in text_string_to_metric_families(generate_latest(registry).decode())
            for x in family.samples}


def record(**changes: Any) -> RequestRecord:
    """Due at 0, sent after 1 ms, first after 100 ms, gaps of 20 and 40 ms, over at 161 ms."""
    base: dict[str, Any] = {
        "leg": "x", "shard": 0, "seq": 0, "session": 0, "turn": 0, "cls": "code", "due_ns": S,
        "sent_ns": S + MS, "first_ns": S + 100 * MS, "gaps_us": [20_000, 40_000],
        "end_ns": S + 161 * MS, "outcome": Outcome.OK, "output_tok": 3, "prompt_tok": 50}
    return RequestRecord(**{**base, **changes})


def test_each_class_is_there_with_zeros_before_anything_came() -> None:
    found = shown(board())
    for cls in ("summary", "code", "json"):
        assert found["loadgen_requests_total", cls, "OK"] == 0
        assert found["loadgen_ttft_seconds_count", cls] == 0
    assert found["loadgen_run_info", 'a "model"', "r"] == 1
    assert found["loadgen_requests_in_flight",] == 0
    assert not any(name == "loadgen_level" for name, *_ in found)  # nothing runs


def test_a_record_is_counted_in_every_way() -> None:
    b = board()
    b.add([record(), record(cls="json", outcome=Outcome.STALLED, error="no event")])
    found = shown(b)
    assert found["loadgen_requests_total", "code", "OK"] == 1
    assert found["loadgen_requests_total", "json", "STALLED"] == 1
    assert (found["loadgen_good_requests_total", "code"],
            found["loadgen_good_requests_total", "json"]) == (1, 0)
    assert found["loadgen_output_tokens_total", "code"] == 3
    assert found["loadgen_prompt_tokens_total", "code"] == 50
    for name, sum_s, n in (("ttft", 0.1, 1), ("ttft_service", 0.099, 1), ("tpot", 0.03, 1),
                           ("itl", 0.06, 2), ("e2e", 0.161, 1), ("lateness", 0.001, 1)):
        assert found[f"loadgen_{name}_seconds_sum", "code"] == pytest.approx(sum_s), name
        assert found[f"loadgen_{name}_seconds_count", "code"] == n, name
    # an answer that never became complete has no E2E, but what came of it counts
    assert found["loadgen_e2e_seconds_count", "json"] == 0
    assert found["loadgen_ttft_seconds_count", "json"] == 1


def test_good_is_what_metrics_says() -> None:
    b = board()
    late = record(first_ns=S + 3000 * MS, end_ns=S + 3061 * MS)
    assert metrics.misses(late, MIX.slo_of("code")) == ["ttft"]
    b.add([record(), late])
    assert shown(b)["loadgen_good_requests_total", "code"] == 1


def test_a_bucket_holds_its_upper_bound_and_all_below() -> None:
    b = board()
    b.add([record(gaps_us=[1000, 1001, 25_000, 25_001, 99_000_000])])
    found = shown(b)
    wanted = {"0.001": 1, "0.0025": 2, "0.01": 2, "0.025": 3, "0.05": 4, "80.0": 4, "+Inf": 5}
    assert {le: found["loadgen_itl_seconds_bucket", "code", le] for le in wanted} == wanted


@given(st.lists(st.lists(st.integers(0, 200_000_000), max_size=30), max_size=6))
def test_histograms_count_each_value_once_however_it_comes(batches: list[list[int]]) -> None:
    b = board()
    for gaps in batches:
        b.add([record(gaps_us=gaps)])
    every = [x for gaps in batches for x in gaps]
    found = shown(b)
    for bound in GAP_S:
        n = sum(x <= round(bound * 1e6) for x in every)
        assert found["loadgen_itl_seconds_bucket", "code", f"{bound:g}" + (
            "" if "." in f"{bound:g}" else ".0")] == n
    assert found["loadgen_itl_seconds_count", "code"] == len(every)
    assert found["loadgen_itl_seconds_sum", "code"] == pytest.approx(sum(every) / 1e6)


def test_buckets_ascend() -> None:
    for bounds in (TTFT_S, GAP_S):
        assert np.all(np.diff(bounds) > 0)


def test_a_request_of_no_class_of_the_scenario_is_passed_over() -> None:
    b = board()
    b.add([record(cls="a user's own")])
    assert shown(b)["loadgen_requests_total", "code", "OK"] == 0


# ------------------------------------------------------------------------------------ the leg


def test_the_leg_that_runs_is_shown_with_its_share_of_good_ones_so_far() -> None:
    b = board()
    b.tell(RUNNING)
    found = shown(b)
    for name, value in (("requests_in_flight", 4), ("leg_elapsed_seconds", 3.5),
                        ("leg_sampled_requests", 20), ("generator_lag_seconds", 0.002),
                        ("generator_cpu_ratio", 0.25), ("attainment_ratio", 0.95),
                        ("attainment_target_ratio", 0.95)):
        assert found[f"loadgen_{name}",] == pytest.approx(value), name
    assert not [name for name, *_ in found if "bound" in name]  # none of one leg would hold
    assert found["loadgen_level", "concurrency", "ladder"] == 4


def test_a_share_of_nothing_is_not_shown() -> None:
    b = board()
    b.tell(Running("a", "run", "rate", 2.0, 0.1, 0, 0, 0, 0))
    names = {name for name, *_ in shown(b)}
    assert not names & {"loadgen_attainment_ratio", "loadgen_generator_cpu_ratio"}


def test_a_leg_that_is_over_stands_with_its_verdict_and_runs_no_more() -> None:
    b = board()
    b.tell(RUNNING)
    b.tell(Judged("ladder-4-r0", "ladder", 4.0, 38, 40, "UNRESOLVED", "VALID"))
    b.tell(Judged("ladder-8-r0", "ladder", 8.0, 0, 0, "UNSAFE", "INVALID"))
    found = shown(b)
    assert found["loadgen_leg_verdict", "ladder-4-r0", "4", "UNRESOLVED", "VALID", "ladder"] == 1
    assert found["loadgen_leg_verdict", "ladder-8-r0", "8", "UNSAFE", "INVALID", "ladder"] == 1
    assert {k: v for k, v in found.items() if k[0] == "loadgen_leg_attainment_ratio"} == {
        ("loadgen_leg_attainment_ratio", "ladder-4-r0", "4", "ladder"): 0.95}
    assert "loadgen_level" not in {name for name, *_ in found}


def test_a_thousand_records_are_counted_at_once() -> None:
    b = board()
    b.add(record(seq=i, cls=("code", "json")[i % 2]) for i in range(1000))
    found = shown(b)
    assert found["loadgen_requests_total", "code", "OK"] == 500
    assert found["loadgen_itl_seconds_count", "json"] == 1000
