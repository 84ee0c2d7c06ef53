"""Runs as `vllm bench serve` would have written them: each formula on a hand-made run, and all of
them against the file that a real one (vLLM 0.32) wrote."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from analysis import frame, vllm_bench
from analysis.vllm_bench import DETAILS, Options, Seen, figures, seen
from loadgen import cli
from loadgen.leg import Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Load, Open, PerSecond, Seconds, Slo, to_plain
from tests import synthetic
from tests.real import loadgen
from tests.synthetic import MIX, Plain, S

RECORDED = Path(__file__).parent / "data" / "vllm" / "bench_serve_chat_detailed.json"
ASKED = {"date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts",
         "request_rate", "burstiness", "max_concurrency"}
MS = 1_000_000
ALL = Options(("ttft", "tpot", "itl", "e2el", "client_queue_time"), (50.0, 99.0, 99.9), True)
T0 = 100 * S


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORDED.read_bytes())
    return found


def request(due_ms: float, **changes: Any) -> RequestRecord:
    """Due then, sent 10 ms later; events at 100, 120 and 160 ms after the send, over at 170."""
    sent = T0 + round((due_ms + 10) * MS)
    base = RequestRecord(
        leg="run-2-r0", shard=0, seq=round(due_ms), session=round(due_ms), turn=0, cls="code",
        due_ns=sent - 10 * MS, sent_ns=sent, first_ns=sent + 100 * MS, gaps_us=[20_000, 40_000],
        end_ns=sent + 170 * MS, outcome=Outcome.OK, output_tok=3, prompt_tok=50,
        want_prompt_tok=48, tok_source="usage", status=200, finish_reason="length")
    return msgspec.structs.replace(base, **changes)


def run_of(path: Path, *records: RequestRecord, load: Load | None = None,
           **changes: Any) -> frame.Run:
    leg = synthetic.leg(2, "run", 40.0, 0.0)
    if load is not None:
        leg = msgspec.structs.replace(leg, load=load, axis="rate")
    window = Window(leg.id, T0, T0, T0 + 40 * S, T0 + 70 * S, "done")
    synthetic.write_plain(path, Plain([(leg, window)], records), **changes)
    return frame.load(path)


def result(path: Path, *records: RequestRecord, options: Options = ALL,
           **more: Any) -> dict[str, Any]:
    exported, = vllm_bench.export(run_of(path, *records, **more), None, options)
    found: dict[str, Any] = json.loads(exported.path.read_bytes())
    return found


# -------------------------------------------------------------------------------- a real one's


def test_a_real_one_s_requests_give_its_own_figures_to_the_bit() -> None:
    was = recorded()
    columns = zip(*(was[x] for x in (
        "start_times", "ttfts", "itls", "latencies", "queue_times", "input_lens", "output_lens")),
        strict=True)
    outputs = [Seen(True, start, ttft, itl, latency, queue, asked, written, "")
               for start, ttft, itl, latency, queue, asked, written in columns]
    found = figures(outputs, was["duration"], Options(), closed=True)
    assert {**was, **found, "generated_texts": was["generated_texts"]} == was
    assert set(was) - set(found) == ASKED


def test_the_file_has_a_real_one_s_keys_in_its_order_and_types(tmp_path: Path) -> None:
    was = recorded()
    found = result(tmp_path / "r", request(0), request(30), options=Options(save_detailed=True))
    assert list(found) == list(was)
    for key, value in was.items():
        if key != "request_goodput":  # null there, as no limit was given
            assert type(found[key]) is type(value), key
    assert {x: type(found[x][0]) for x in DETAILS} == {x: type(was[x][0]) for x in DETAILS}


# ------------------------------------------------------------------------------ each formula


def test_each_figure_of_a_hand_made_run(tmp_path: Path) -> None:
    """Two requests that overlap, one of one token, and one that the server refused."""
    found = result(
        tmp_path / "r", request(0), request(50, gaps_us=[30_000, 50_000]),
        request(2000, gaps_us=[], output_tok=1),
        request(2100, outcome=Outcome.HTTP_ERROR, first_ns=None, gaps_us=[], output_tok=None,
                prompt_tok=None, status=503, error="HTTP 503: busy", finish_reason=None))
    seconds = 2100 / 1e3 + 0.170  # from the first send to the last end
    assert found["duration"] == pytest.approx(seconds)
    assert (found["num_prompts"], found["completed"], found["failed"]) == (4, 3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (150, 7)
    for name, many in {"request_throughput": 3, "output_throughput": 7,
                       "total_token_throughput": 157}.items():
        assert found[name] == pytest.approx(many / seconds), name
    expected = {
        # of the three that came: from the send, not from when due
        "mean_ttft_ms": 100, "median_ttft_ms": 100, "std_ttft_ms": 0, "p99_ttft_ms": 100,
        # 60/2 and 80/2 ms; the answer of one token has none
        "mean_tpot_ms": 35, "median_tpot_ms": 35, "std_tpot_ms": 5, "p50_tpot_ms": 35,
        "p99_tpot_ms": 39.9, "p99.9_tpot_ms": 39.99,
        # 20, 40, 30, 50
        "mean_itl_ms": 35, "median_itl_ms": 35, "std_itl_ms": math.sqrt(125), "p99_itl_ms": 49.7,
        # to the last event: 160, 180, 100
        "mean_e2el_ms": 440 / 3, "median_e2el_ms": 160, "p50_e2el_ms": 160, "p99_e2el_ms": 179.6,
        # in a closed loop all were asked for at the start: 0, 50, 2000
        "mean_client_queue_time_ms": 2050 / 3, "median_client_queue_time_ms": 50}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert found["ttfts"] == pytest.approx([0.1, 0.1, 0.1, 0.0])
    assert found["itls"] == [pytest.approx(x) for x in ([0.02, 0.04], [0.03, 0.05], [], [])]
    assert found["latencies"] == pytest.approx([0.16, 0.18, 0.1, 0.0])
    assert found["start_times"] == pytest.approx([100.01, 100.06, 102.01, 102.11])
    assert found["queue_times"] == pytest.approx([0, 0.05, 2, 2.1])
    assert found["input_lens"] == [50, 50, 50, 48]  # what was asked for, where nothing was told
    assert found["output_lens"] == [3, 3, 1, 0]
    assert found["errors"] == ["", "", "", "HTTP 503: busy"]
    assert (found["max_output_tokens_per_s"], found["max_concurrent_requests"]) == (6.0, 2)


def test_its_seconds_begin_with_the_first_send() -> None:
    """Events at 0.5, 0.9 and 1.1 s; and a request that lives from 0.9 to 2.1 s."""
    first = Seen(True, 7.25, 0.5, [0.4, 0.2], 1.1, 0.0, 1, 3, "")
    other = Seen(True, 8.15, 0.2, [1.0], 1.2, 0.0, 1, 2, "")
    found = figures([first, other], 3.0, Options(), closed=False)
    assert found["max_output_tokens_per_s"] == 2.0  # in second 0, and again in second 1
    assert found["max_concurrent_requests"] == 2


def test_the_role_ends_its_ttft_and_a_finish_is_a_gap_of_its_own() -> None:
    sent = T0 + 10 * MS
    o = seen(request(0, role_ns=sent + 90 * MS, finish_ns=sent + 165 * MS), Slo())
    assert o.ttft_s == pytest.approx(0.09)
    assert o.itl_s == pytest.approx([0.01, 0.02, 0.04, 0.005])
    assert o.latency_s == pytest.approx(0.165)


def test_opening_a_connection_is_in_its_ttft() -> None:
    o = seen(request(0, connect_wait_ns=8 * MS), Slo())
    assert o.ttft_s == pytest.approx(0.108)
    assert o.queue_s == pytest.approx(0.002)


@pytest.mark.parametrize(("outcome", "events", "ok"), [
    (Outcome.OK, 3, True), (Outcome.ABORTED, 3, True), (Outcome.TRUNCATED, 3, True),
    (Outcome.SERVER_ERROR_EVENT, 3, True), (Outcome.SERVER_ERROR_EVENT, 0, False),
    (Outcome.EMPTY, 0, False), (Outcome.THROTTLED, 0, False), (Outcome.HTTP_ERROR, 0, False),
    (Outcome.DISCONNECTED, 3, False), (Outcome.BAD_STREAM, 3, False), (Outcome.STALLED, 3, False),
    (Outcome.TIMEOUT_TOTAL, 3, False), (Outcome.CANCELLED, 3, False), (Outcome.DROPPED, 0, False),
    (Outcome.ABANDONED, 3, False)])
def test_a_success_is_what_it_takes_for_one(outcome: Outcome, events: int, ok: bool) -> None:
    """Streams that were cut short, too; what its client would have met an exception in is none.
    Of a failure after the first event it keeps TTFT and gaps, and no latency."""
    r = request(0, outcome=outcome, error=None if outcome is Outcome.OK else "why")
    if not events:
        r.first_ns, r.gaps_us = None, []
    o = seen(r, Slo())
    assert o.ok == ok
    assert (o.latency_s, o.output_tok, o.error) == ((0.16, 3, "") if ok else (0.0, 0, "why"))
    assert (o.ttft_s, len(o.itl_s)) == ((0.1, 2) if events else (0.0, 0))


def test_an_empty_answer_with_a_role_is_a_success_there() -> None:
    r = request(0, outcome=Outcome.EMPTY, first_ns=None, gaps_us=[], output_tok=None,
                role_ns=T0 + 20 * MS)
    assert (seen(r, Slo()).ok, seen(r, Slo()).output_tok) == (True, 0)


@pytest.mark.parametrize(("slo", "good"), [
    (Slo(ttft_s=Seconds(0.105)), 3),  # 110 ms from when due, 100 ms from the send
    (Slo(tpot_s=Seconds(0.030)), 2),  # 30 ms, at the limit; and one token, whose TPOT is 0
    (Slo(e2e_s=Seconds(0.17)), 2), (Slo(ttft_s=Seconds(0.09)), 0),
    (Slo(itl_s=Seconds(0.01)), None)])
def test_goodput_is_of_its_three_limits_by_its_formula(tmp_path: Path, slo: Slo,
                                                       good: int | None) -> None:
    found = result(tmp_path / "r", request(0), request(50, gaps_us=[30_000, 50_000]),
                   request(2000, gaps_us=[], output_tok=1),
                   scenario=to_plain(msgspec.structs.replace(MIX, slo=slo)))
    expected = None if good is None else pytest.approx(good / found["duration"])
    assert found["request_goodput"] == expected


def test_where_nothing_came_its_figures_are_0(tmp_path: Path) -> None:
    found = result(tmp_path / "r", request(0, outcome=Outcome.CONNECT_FAILED, first_ns=None,
                                           gaps_us=[], output_tok=None, error="refused"))
    assert (found["completed"], found["failed"], found["mean_ttft_ms"], found["p99_itl_ms"],
            found["request_throughput"], found["max_concurrent_requests"]) == (0, 1, 0, 0, 0, 0)


def test_only_what_was_due_in_the_window_is_in_the_file(tmp_path: Path) -> None:
    found = result(tmp_path / "r", request(-500), request(0), request(50_000))
    assert found["num_prompts"] == 1


# ---------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(("load", "rate", "burstiness", "name"), [
    (Open(PerSecond(4)), 4.0, 1.0, "openai-chat-4.0qps-qwen2.5-7b-"),
    (Open(PerSecond(4), "constant"), 4.0, math.inf, "openai-chat-4.0qps-qwen2.5-7b-"),
    (Open(PerSecond(4), "gamma", 2.0), 4.0, 0.25, "openai-chat-4.0qps-qwen2.5-7b-"),
    (None, "inf", 1.0, "openai-chat-infqps-concurrency2-qwen2.5-7b-")])
def test_the_load_is_said_in_its_words(tmp_path: Path, load: Load | None, rate: object,
                                       burstiness: float, name: str) -> None:
    run = run_of(tmp_path / "r", request(0), load=load, model="models/qwen2.5-7b")
    exported, = vllm_bench.export(run, None, ALL)
    found = json.loads(exported.path.read_bytes())
    assert (found["request_rate"], found["burstiness"]) == (rate, burstiness)
    assert found["max_concurrency"] == (None if load else 2)
    assert ("mean_client_queue_time_ms" in found) == (load is None)  # it knows none without a cap
    assert exported.path.name == f"{name}{found['date']}.json"


def test_the_date_is_the_leg_s_end_on_the_wall_clock(tmp_path: Path) -> None:
    # the clock reads 0 at 1763000000 s; the leg ends 170 s later
    assert result(tmp_path / "r", request(0))["date"] == "20251113-021610"


def test_a_sweep_has_a_file_for_each_level_and_all_in_summary_json(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "r", levels=(1, 2, 4), confirm=4)
    said = loadgen("report", "r", "--as", "vllm-bench", "--metadata", "tensor_parallel_size=2",
                   "--percentile-metrics", "ttft,e2el", "--metric-percentiles", "90,99",
                   cwd=tmp_path)
    assert said.code == cli.PASS, said.all
    folder = tmp_path / "r" / "vllm-bench"
    files = [json.loads(x.read_bytes()) for x in folder.glob("*-*.json")]
    assert len(files) == 7
    assert sorted(x["label"] for x in files) == [
        *(f"confirm-4-r{i}" for i in range(4)), *(f"ladder-{c}-r0" for c in (1, 2, 4))]
    assert all(x["tensor_parallel_size"] == "2" and not set(DETAILS) & set(x) for x in files)
    assert {x for x in files[0] if x.startswith(("p9", "mean"))} == {
        "mean_ttft_ms", "p90_ttft_ms", "p99_ttft_ms", "mean_e2el_ms", "p90_e2el_ms", "p99_e2el_ms"}
    several = json.loads((folder / "summary.json").read_bytes())
    assert sorted(x["run_number"] for x in several) == [0, 0, 0, 0, 1, 2, 3]
    assert said.out.count("ms from when due)") == 7
    assert "not ours: latencies count from the send" in said.out
    assert not (tmp_path / "r" / "summary.json").exists()  # nothing else is made


def test_a_run_of_one_level_may_name_its_file(tmp_path: Path) -> None:
    run_of(tmp_path / "r", request(0))
    said = loadgen("report", "r", "--as", "vllm-bench", "--out", "to/one.json", cwd=tmp_path)
    assert said.code == cli.PASS, said.all
    found = json.loads((tmp_path / "to" / "one.json").read_bytes())
    assert (found["label"], found["completed"]) == (None, 1)
    assert "median TTFT 100.0 ms (110.0 ms from when due)" in said.out


@pytest.mark.parametrize(("words", "says"), [
    (("--as", "vllm-bench", "--out", "x.json"), "this run has 2 levels, each of which is a file"),
    (("--as", "vllm-bench", "--percentile-metrics", "ttft,e2e"), "no e2e: there are ttft, tpot"),
    (("--as", "vllm-bench", "--metric-percentiles", "much"), "--metric-percentiles 50,99"),
    (("--as", "vllm-bench", "--metric-percentiles", "101"), "from 0 to 100"),
    (("--as", "vllm-bench", "--metadata", "plain"), "--metadata K=V"),
    (("--as", "guidellm"), "is not 'vllm-bench'"),
    (("--save-detailed",), "go with --as vllm-bench"), (("--out", "x"), "go with --as vllm-bench")])
def test_what_cannot_be_exported_is_refused(tmp_path: Path, words: tuple[str, ...],
                                            says: str) -> None:
    synthetic.run_of(tmp_path / "r", (8, "SAFE"), (16, "SAFE"))
    said = loadgen("report", "r", *words, cwd=tmp_path)
    assert said.code == cli.USAGE, said.all
    assert says in said.err
    assert not (tmp_path / "x.json").exists()


def test_a_level_without_requests_has_no_file(tmp_path: Path) -> None:
    run_of(tmp_path / "r")
    said = loadgen("report", "r", "--as", "vllm-bench", cwd=tmp_path)
    assert said.code == cli.PASS, said.all
    assert "No level of this run has a request: nothing was written." in said.out
