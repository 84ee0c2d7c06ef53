"""What the server said of itself in a window, from the rows of its /metrics."""

import asyncio
from typing import Any

import pytest

from loadgen.leg import Ending, Window
from loadgen.store import Row
from loadgen.target import Target
from loadgen.telemetry.server import MOST_BYTES, NAMES, gpu_rows_of, once, rows_of
from loadgen.telemetry.signs import series, signs_of
from servers.base import free_port
from tests import captures
from tests.raw_server import FIN, HOLD, RawServer, Script, whole

S = 1_000_000_000


def window(ending: Ending = "done", note: str | None = None) -> Window:
    """From 10 s to 20 s."""
    return Window("l", 0, 10 * S, 20 * S, 25 * S, ending, note=note)


def rows(name: str, points: dict[float, float], source: str = "server",
         **labels: str) -> list[Row]:
    return [Row(source, round(t * S), name, v, labels) for t, v in points.items()]


def signs(*series_of_rows: list[Row]) -> Any:
    return signs_of(window(), series([r for one in series_of_rows for r in one], "server"))


# --------------------------------------------------------------------------------------- series


def test_a_series_is_in_the_order_of_time_and_of_one_source() -> None:
    mixed = rows("running", {3: 1, 1: 2, 2: 3}) + rows("running", {1: 9}, source="gpu")
    assert series(mixed, "server") == {"running": [(S, 2.0), (2 * S, 3.0), (3 * S, 1.0)]}
    assert series(mixed, "nvml") == {}


@pytest.mark.parametrize("name", ["running", "waiting", "preemptions", "output_tok"])
def test_several_engines_add_up_in_what_is_counted(name: Any) -> None:
    both = rows(name, {1: 3, 2: 4}, engine="0") + rows(name, {1: 5, 2: 6}, engine="1")
    assert series(both, "server") == {name: [(S, 8.0), (2 * S, 10.0)]}


def test_two_engines_that_are_half_full_are_not_one_that_is_full() -> None:
    both = rows("kv_frac", {12: 0.5, 15: 0.5}, engine="0") + rows(
        "kv_frac", {12: 0.5, 15: 0.5}, engine="1")
    s = signs(both)
    assert s.kv_full_frac == 0.0
    assert s.kv_max == 0.5


def test_an_engine_that_is_full_is_full_beside_one_that_is_not() -> None:
    s = signs(rows("kv_frac", {12: 0.97, 15: 0.97}, engine="0")
              + rows("kv_frac", {12: 0.1, 15: 0.1}, engine="1"))
    assert (s.kv_full_frac, s.kv_max) == (1.0, 0.97)


# ---------------------------------------------------------------------------------------- signs


def test_a_server_that_says_nothing_has_no_signs() -> None:
    s = signs()
    assert (s.preemptions, s.kv_full_frac, s.kv_max, s.prefix_hit_frac, s.running_mean,
            s.waiting_mean, s.late_step_frac, s.died) == (None,) * 8


def test_gauges_are_of_the_window_alone() -> None:
    s = signs(rows("running", {9.9: 100, 10: 2, 15: 4, 20: 6, 20.1: 100}),
              rows("waiting", {9: 7, 21: 7}))
    assert (s.running_mean, s.waiting_mean) == (4.0, None)


@pytest.mark.parametrize(("values", "full"), [
    ([0.95, 0.95], 0.0), ([0.951, 0.95], 0.5), ([0.2, 0.2, 0.2, 1.0], 0.25)])
def test_kv_is_full_above_95_percent(values: Any, full: Any) -> None:
    s = signs(rows("kv_frac", {10 + i: v for i, v in enumerate(values)}))
    assert (s.kv_full_frac, s.kv_max) == (full, max(values))


@pytest.mark.parametrize(("points", "grew"), [
    ({5: 1, 9.5: 3, 10.5: 4, 19.5: 9, 20.5: 11, 30: 99}, 8),  # from just before to just after
    ({5: 1, 10: 3, 15: 4, 20: 9, 21: 50}, 6),  # on the edges
    ({12: 3, 15: 4, 18: 9}, 6),  # only inside: what is known
    ({15: 4}, 0), ({5: 4, 30: 4}, 0), ({5: 90, 30: 4}, 0)])  # the last: it was started again
def test_counters_are_differenced_over_the_window(points: Any, grew: Any) -> None:
    assert signs(rows("preemptions", points)).preemptions == grew


# from 0 s (t0) to 25 s (end)
LIVES = [
    ({-0.2: 100, 5: 120, 25.1: 140}, 40),
    ({-0.4: 90, -0.1: 100, 25.1: 139, 25.3: 140, 25.5: 150}, 40),  # 25.5 s: the next leg's, perhaps
    ({-0.2: 100, 26: 140}, 40),  # the sample after it took a while
    ({-4: 100, 25.1: 140}, None), ({-0.2: 100, 29: 140}, None),  # too far from it
    ({5: 120, 25.1: 140}, None), ({-0.2: 100, 24.9: 140}, None), ({}, None),
    ({-0.2: 100, 5: 3, 25.1: 140}, None), ({-0.2: 100, 25.1: 40}, None)]  # started again


@pytest.mark.parametrize(("points", "grew"), LIVES)
def test_what_a_leg_was_counted_for_is_known_from_right_before_it_to_right_after(
        points: Any, grew: Any) -> None:
    for name, of in (("finished", "requests"), ("prompt_tok", "prompt_tok"),
                     ("output_tok", "output_tok")):
        assert getattr(signs(rows(name, points)).counted, of) == grew


def test_finished_requests_of_all_reasons_are_added_up_but_aborted_ones() -> None:
    text = "".join(f'vllm:request_success_total{{finished_reason="{why}"}} {n}\n'
                   for why, n in (("stop", 1), ("length", 20), ("abort", 300)))
    assert series(rows_of(text, 5), "server")["finished"] == [(5, 21.0)]


def test_shares_are_of_what_grew() -> None:
    s = signs(rows("prefix_queries", {9: 1000, 21: 1400}), rows("prefix_hits", {9: 900, 21: 1000}),
              rows("sim_steps", {9: 0, 21: 200}), rows("sim_late_steps", {9: 0, 21: 5}))
    assert (s.prefix_hit_frac, s.late_step_frac) == (0.25, 0.025)


def test_no_queries_have_no_share() -> None:
    s = signs(rows("prefix_queries", {9: 7, 21: 7}), rows("prefix_hits", {9: 3, 21: 3}))
    assert s.prefix_hit_frac is None


@pytest.mark.parametrize("ending", ["done", "cut", "interrupted", "failed"])
def test_only_a_dead_server_died(ending: Any) -> None:
    assert signs_of(window(ending, "words"), {}).died is None
    assert signs_of(window("server_died", "exit code -9"), {}).died == "exit code -9"
    assert signs_of(window("server_died"), {}).died == "no reason found"


# -------------------------------------------------------------------------------------- /metrics


@pytest.mark.parametrize(("get", "names"), [
    ([whole("200 OK", b"vllm:num_requests_running 3\n")], ["running", "scrape_s"]),
    ([whole("404 Not Found", b"vllm:num_requests_running 3\n")], []), ([HOLD], []), ([FIN], []),
    ([b"no HTTP at all\n\n", FIN], []), ([whole("200 OK", b"\xff\x00{{{ 1 2 3\n")], [])])
def test_one_sample_is_taken_and_a_server_that_hangs_holds_nobody_up(
        get: Script, names: list[str]) -> None:
    keep: list[Row] = []

    async def test() -> None:
        async with RawServer(lambda _: [HOLD], get=get) as server:
            keep.extend(await asyncio.wait_for(once(Target(server.url, "m")), 15))
            assert server.gets
    asyncio.run(test())
    assert [r.name for r in keep] == names


def test_a_server_that_is_gone_gives_no_sample() -> None:
    assert asyncio.run(once(Target(f"http://127.0.0.1:{free_port()}", "m"))) == []


def test_recorded_metrics_of_a_full_server_are_read() -> None:
    text = captures.load("73_metrics_small_kv_preempting").body.decode()
    found = {r.name: r for r in rows_of(text, 5)}
    assert set(found) == {"running", "waiting", "kv_frac", "preemptions", "prompt_tok",
                          "output_tok", "finished", "prefix_queries", "prefix_hits",
                          "kv_cache_tok", *(f"{x}_s_{part}" for x in ("queue", "prefill", "decode")
                            for part in ("sum", "count"))}
    assert {n: found[n].value for n in ("running", "waiting", "preemptions", "kv_cache_tok")} == {
        "running": 3.0, "waiting": 21.0, "preemptions": 0.0, "kv_cache_tok": 768.0}
    assert found["running"].labels == {"engine": "0", "model_name": "tiny"}
    assert all((r.source, r.t_ns) == ("server", 5) for r in found.values())


def test_names_of_older_servers_are_brought_to_ours() -> None:
    text = "vllm:gpu_cache_usage_perc 0.5\nvllm:num_requests_running{a=\"b\"} 3\n"
    assert [(r.name, r.value) for r in rows_of(text, 0)] == [("kv_frac", 0.5), ("running", 3.0)]


def test_a_server_that_says_it_under_both_names_is_counted_once() -> None:
    text = "vllm:gpu_cache_usage_perc 0.5\nvllm:kv_cache_usage_perc 0.5\n"
    s = signs_of(window(), series(rows_of(text, 15 * S), "server"))
    assert s.kv_max == 0.5


@pytest.mark.parametrize("text", [
    "", "\n", "<html></html>", "vllm:num_requests_running_total 3\n", "other 3\n",
    "# HELP vllm:num_requests_running x\n# TYPE vllm:num_requests_running gauge\n"])
def test_what_is_not_asked_for_is_passed_over(text: Any) -> None:
    assert rows_of(text, 0) == []


def test_every_name_is_read() -> None:
    text = "".join(f"{name}{{engine=\"0\"}} {i}\n" for i, name in enumerate(NAMES))
    assert [r.name for r in rows_of(text, 0)] == list(NAMES.values())


def test_the_simulator_s_gpu_has_nvml_s_names() -> None:
    said = [{"index": 1.0, "memory_used_bytes": 7.0, "memory_total_bytes": 9.0,
             "utilization_gpu": 50.0}]
    assert [(r.source, r.name, r.value, r.labels) for r in gpu_rows_of(said, 3)] == [
        ("gpu", "memory_used_bytes", 7.0, {"index": "1"}),
        ("gpu", "memory_total_bytes", 9.0, {"index": "1"}), ("gpu", "util_frac", 0.5,
                                                             {"index": "1"})]


@pytest.mark.parametrize(("text", "found"), [  # after their documentation, not recorded
    ("sglang:num_running_reqs{model_name=\"m\"} 10.0\nsglang:num_queue_reqs{model_name=\"m\"} 4\n"
     "sglang:token_usage{model_name=\"m\"} 0.28\n",
     {"running": 10, "waiting": 4, "kv_frac": 0.28}),
    ("tgi_batch_current_size 7\ntgi_queue_size 3\ntgi_request_queue_duration_sum 12\n"
     "tgi_request_queue_duration_count 4\ntgi_request_queue_duration_bucket{le=\"1\"} 4\n",
     {"running": 7, "waiting": 3, "queue_s_sum": 12, "queue_s_count": 4}),
    ("llamacpp:requests_processing 2\nllamacpp:requests_deferred 1\n",
     {"running": 2, "waiting": 1})])
def test_other_servers_names_are_brought_to_ours(text: str, found: dict[str, float]) -> None:
    assert {r.name: r.value for r in rows_of(text, 0)} == found


def test_times_in_the_server_are_means_of_what_ended_in_the_window() -> None:
    s = signs(rows("queue_s_sum", {9: 100, 21: 130}), rows("queue_s_count", {9: 50, 21: 60}),
              rows("decode_s_sum", {9: 5, 21: 5}), rows("decode_s_count", {9: 5, 21: 5}))
    assert (s.queue_s, s.prefill_s, s.decode_s) == (3.0, None, None)


def test_an_answer_that_has_no_end_is_given_up() -> None:
    huge = b"HTTP/1.1 200 OK\r\n\r\n" + b"# HELP x y\n" * (MOST_BYTES // 10)

    async def test() -> list[Row]:
        async with RawServer(lambda _: [HOLD], get=[huge, FIN]) as server:
            return await asyncio.wait_for(once(Target(server.url, "m")), 15)
    assert asyncio.run(test()) == []


def test_a_sample_says_how_long_it_took() -> None:
    async def test() -> list[Row]:
        async with RawServer(lambda _: [HOLD], get=[
                whole("200 OK", b"vllm:num_requests_running 3\n")]) as server:
            return await asyncio.wait_for(once(Target(server.url, "m")), 15)
    [took] = [r for r in asyncio.run(test()) if r.name == "scrape_s"]
    assert 0 < took.value < 1
