"""Hugging Face's generate behind a small web app, simulated: its memory, its turns, its errors."""

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from loadgen import plan, scenario
from loadgen.errors import ScenarioError
from loadgen.leg import Leg
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed
from loadgen.virtual import VirtualExecutor
from servers.sim.__main__ import engine_config, parse
from servers.sim.app import Server
from servers.sim.costs import CONTEXT_GIB, DRIVER_GIB, DoesNotFit
from servers.sim.engine import Engine, EngineConfig, Request, Step
from servers.sim.launch import VirtualSim
from servers.sim.turns import Turns, engine_of
from servers.transformers import APP
from tests.benchmarks.sim_against_published import ROWS, Published, simulated
from tests.test_sim_app import Reply, ask, chat, run, until

TRANSFORMERS = ("--backend", "transformers")
LINES = Path(__file__).parent.parent / "scenarios" / "campaigns" / "tasks" / "lines.toml"
BAICHUAN = ("--gpu", "4090d", "--model", "baichuan2-7b", *TRANSFORMERS)  # 512 KiB of KV per token


def config(*options: str) -> EngineConfig:
    return engine_config(parse(list(options)))


def request(i: int, prompt_tok: int = 100, output_tok: int = 50) -> Request:
    return Request(i, prompt_tok, output_tok, ignore_eos=True)


def steps_of(engine: Engine) -> list[Step]:
    found: list[Step] = []
    while (step := engine.step(found[-1].end_s if found else 0.0)) is not None:
        found.append(step)
        assert len(found) < 100_000
    return found


# ---------------------------------------------------------------------------------------- turns


def test_each_turn_is_one_token_of_one_request_and_all_have_theirs_in_order() -> None:
    engine = engine_of(config(*TRANSFORMERS))
    for i in range(3):
        engine.submit(request(i, output_tok=4 + i))
    steps = steps_of(engine)
    assert [s.tokens for s in steps] == [[i] for i in [0, 1, 2] * 4 + [1, 2, 2]]
    assert [s.finished for s in steps if s.finished] == [{0: "length"}, {1: "length"},
                                                        {2: "length"}]
    assert engine.stats.preemptions == 0
    assert (engine.running, engine.waiting, engine.kv_usage) == (0, 0, 0.0)


def test_a_turn_begins_where_the_one_before_was_anothers_and_pauses_that_one() -> None:
    engine = engine_of(config(*TRANSFORMERS))
    for i in range(2):
        engine.submit(request(i, output_tok=2 + i))
    assert [(s.begun, s.preempted) for s in steps_of(engine)] == [
        ([0], []), ([1], [0]), ([0], [1]), ([1], []), ([], [])]


@pytest.mark.parametrize("row", [r for r in ROWS if r.backend == "transformers"])
def test_speed_and_memory_are_those_that_were_published(row: Published) -> None:
    tok_s, gib = simulated(row)
    assert tok_s == pytest.approx(row.tok_s, rel=0.06 if row.prompt_tok == 1 else 0.15)
    assert gib == pytest.approx(row.gib, rel=0.04)


def test_vllm_is_not_much_quicker_alone_and_much_quicker_at_eight() -> None:
    def tok_s(n: int, *options: str) -> float:
        engine = engine_of(config("--gpu", "4090d", *options))
        for i in range(n):
            engine.submit(request(i, 500, 200))
        return n * 200 / steps_of(engine)[-1].end_s

    alone, eight = ((tok_s(n), tok_s(n, *TRANSFORMERS)) for n in (1, 8))
    assert 1 < alone[0] / alone[1] < 2
    assert eight[0] / eight[1] > 6
    assert eight[1] == pytest.approx(alone[1], rel=0.1)  # more in flight bring it nothing


def test_more_gpus_bring_memory_and_no_speed() -> None:
    one, two = (engine_of(config("--gpu", "4090d", *TRANSFORMERS, "-tp", n)) for n in "12")
    ended = []
    for engine in (one, two):
        engine.submit(request(0, 2000, 100))
        ended.append(steps_of(engine)[-1].end_s)
    assert ended[0] == ended[1]
    assert one.used_gib(0.9) - two.used_gib(0.9) > 7


# --------------------------------------------------------------------------------------- memory


def test_memory_after_load_is_that_of_the_weights_and_grows_with_what_lives() -> None:
    engine = engine_of(config("--gpu", "4090d", *TRANSFORMERS))
    loaded = engine.used_gib(0.9)
    assert loaded == pytest.approx(14.29 + CONTEXT_GIB + DRIVER_GIB, abs=0.01)
    for i in range(4):
        engine.submit(request(i, 1000, 1000))
    steps_of(engine)
    kv_gib = 4 * 2000 * engine.config.machine.kv_bytes_per_tok / 2**30
    assert engine.used_gib(0.9) - loaded == pytest.approx(kv_gib, rel=0.02)


def test_who_finds_no_memory_fails_in_pytorchs_words_and_the_others_go_on() -> None:
    engine = engine_of(config(*BAICHUAN))
    for i in range(8):
        engine.submit(request(i, 3000, 10))
    steps = steps_of(engine)
    failed = {i: words for s in steps for i, words in s.failed.items()}
    finished = {i for s in steps for i in s.finished}
    assert failed
    assert finished
    assert failed.keys() | finished == set(range(8))
    assert all(s.duration_s == 0 and not s.tokens for s in steps if s.failed)
    for words in failed.values():
        assert words.startswith("CUDA out of memory. Tried to allocate ")
        assert "GPU 0 has a total capacity of 23.60 GiB" in words
    engine.submit(request(9, 3000, 10))
    assert [s.finished for s in steps_of(engine)][-1] == {9: "length"}


def test_answers_that_grow_run_out_of_memory_in_the_middle() -> None:
    engine = engine_of(config(*BAICHUAN))
    for i in range(5):
        engine.submit(request(i, 2800, 1200))
    steps = steps_of(engine)
    failed = {i for s in steps for i in s.failed}
    told = {i: sum(s.tokens == [i] for s in steps) for i in range(5)}
    assert failed
    assert all(1 < told[i] < 1200 for i in failed)
    assert all(told[i] == 1200 for i in set(range(5)) - failed)
    assert engine.kv_usage == 0


def test_a_client_that_leaves_gives_its_memory_back() -> None:
    engine = engine_of(config(*BAICHUAN))
    for i in range(2):
        engine.submit(request(i, 3000, 10))
    engine.step(0.0)
    before = engine.kv_usage
    engine.step(1.0)
    engine.abort(0)
    engine.submit(request(2, 100, 1))
    engine.abort(2)  # before its first turn
    step = engine.step(2.0)
    assert step is not None
    assert step.tokens == [1]
    assert engine.kv_usage == pytest.approx(before, rel=0.001)
    assert {i for s in steps_of(engine) for i in s.tokens} == {1}


def test_weights_that_do_not_fit_are_refused_as_pytorch_does() -> None:
    with pytest.raises(DoesNotFit, match=r"CUDA out of memory.*weights take 27\.7"):
        config("--gpu", "4090d", "--model", "qwen2.5-14b", *TRANSFORMERS)
    assert config("--gpu", "4090d", "--model", "qwen2.5-14b", *TRANSFORMERS, "-tp", "2").num_blocks
    assert config("--gpu", "4090d", "--model", "qwen2.5-14b", *TRANSFORMERS, "-q", "awq").num_blocks


@pytest.mark.parametrize("option", [("--max-num-seqs", "8"), ("--max-num-batched-tokens", "2048"),
                                    ("--max-num-queued-reqs", "4"), ("--stream-interval", "2")])
def test_vllms_limits_are_refused(option: tuple[str, str],
                                  capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*TRANSFORMERS, *option])
    assert f"{option[0]} is vLLM's" in capsys.readouterr().err


# --------------------------------------------------------------------------------- virtual time


def virtual(*options: str, prompt_tok: int = 600, output_tok: int = 40, slots: int = 4,
            sessions: int = 12) -> list[RequestRecord]:
    mix = scenario.load(str(LINES))
    mix = mix.with_lengths(prompt_tok, output_tok)
    leg = Leg(id="l", axis="concurrency", value=1, phase="run", replicate=0, seed=3,
              load=Closed(concurrency=slots), warmup_s=0.0, measure_s=None, num_sessions=sessions)
    records = asyncio.run(VirtualExecutor(mix, config(*options)).run_leg(leg))[1]
    assert len(records) == len(list(itertools.islice(plan.sessions(mix, leg), sessions)))
    return records


def test_records_of_virtual_time_hold_each_token_at_its_turn() -> None:
    alone, four = (virtual("--gpu", "4090d", *TRANSFORMERS, slots=n) for n in (1, 4))
    for records in (alone, four):
        assert {(r.outcome, r.output_tok) for r in records} == {(Outcome.OK, 40)}
        assert all(len(r.gaps_us) == 39 and min(r.gaps_us) > 20_000 for r in records)

    def gap_ms(records: list[RequestRecord]) -> float:
        gaps = sorted(g for r in records for g in r.gaps_us)
        return gaps[len(gaps) // 2] / 1e3

    assert gap_ms(alone) == pytest.approx(28 * 0.88, abs=0.5)
    assert gap_ms(four) == pytest.approx(4 * gap_ms(alone), rel=0.1)


def test_records_of_virtual_time_say_who_found_no_memory() -> None:
    records = virtual(*BAICHUAN, prompt_tok=3000, slots=8, sessions=16)
    kinds = {r.outcome for r in records}
    assert kinds == {Outcome.OK, Outcome.HTTP_ERROR}
    for r in records:
        if r.outcome is Outcome.HTTP_ERROR:
            assert (r.status, r.output_tok) == (500, None)
            assert str(r.error).startswith("HTTP 500: CUDA out of memory.")
    grown = virtual(*BAICHUAN, prompt_tok=2800, output_tok=1200, slots=5, sessions=5)
    cut = [r for r in grown if r.outcome is not Outcome.OK]
    assert cut
    assert all(r.outcome is Outcome.SERVER_ERROR_EVENT and r.status == 200 and r.output_tok
               and str(r.error).startswith("CUDA out of memory.") for r in cut)


def test_an_answer_that_has_no_room_is_refused_and_not_cut() -> None:
    assert {(r.outcome, r.status) for r in virtual(*TRANSFORMERS, "--max-model-len", "620")} == {
        (Outcome.HTTP_ERROR, 400)}
    assert {r.outcome for r in virtual("--max-model-len", "620")} == {Outcome.OK}


def test_a_fault_that_counts_steps_has_no_virtual_time_here() -> None:
    with pytest.raises(ScenarioError, match="no fault stall with --backend transformers"):
        VirtualSim([*TRANSFORMERS, "--fault", "stall@5:0.1"])


# --------------------------------------------------------------------------------- over the wire


class Serving:
    """A server of this process at a port."""

    def __init__(self, *options: str, speed: float = 200.0) -> None:
        self.server = Server(Turns(config(*options)), ["tiny"], speed=speed)

    async def __aenter__(self) -> int:
        self._runner = self.server.runner()
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        port: int = self._runner.addresses[0][1]
        return port

    async def __aexit__(self, *_: object) -> None:
        self.server.abort_all()
        await self._runner.cleanup()


def body(prompt_tok: int, output_tok: int, **more: Any) -> dict[str, Any]:
    return {"prompt": [7] * prompt_tok, "max_tokens": output_tok, "ignore_eos": True,
            "stream": True, **more}


async def together(port: int, *bodies: dict[str, Any]) -> list[Reply]:
    return list(await asyncio.gather(*(ask(port, "/v1/completions", b) for b in bodies)))


def test_out_of_memory_is_a_500_of_the_apps_shape_and_the_server_goes_on(
        capfd: pytest.CaptureFixture[str]) -> None:
    async def go() -> None:
        async with Serving(*BAICHUAN) as port:
            for stream in (True, False):
                replies = await together(port, *[body(3000, 10, stream=stream)] * 8)
                statuses = sorted({r.status for r in replies})
                assert statuses == [200, 500]
                error = next(r for r in replies if r.status == 500)
                assert "content-type" in error.headers
                assert error.headers["content-type"].startswith("application/json")
                told = error.json()["error"]
                assert told.keys() == {"message", "type", "param", "code"}
                assert (told["type"], told["param"], told["code"]) == ("OutOfMemoryError", None,
                                                                       500)
                assert told["message"].startswith("CUDA out of memory.")
            after = await ask(port, "/v1/completions", body(3000, 3))
            assert after.finish_reasons() == ["length"]
            assert (await ask(port, "/health")).status == 200

    run(go())
    assert '{"message": message, "type": kind, "param": None, "code": status}' in APP.read_text()
    assert "[app.py] out of memory while " in capfd.readouterr().err


def test_out_of_memory_in_the_middle_is_an_event_and_then_done() -> None:
    async def go() -> None:
        async with Serving(*BAICHUAN, speed=1000.0) as port:
            replies = await together(port, *[body(2800, 1200)] * 5)
            assert {r.status for r in replies} == {200}
            cut = [r.events() for r in replies if "error" in json.dumps(r.events()[-2])]
            assert cut
            for events in cut:
                assert events[-2]["error"]["type"] == "OutOfMemoryError"
                assert events[-1] == "[DONE]"
                assert "choices" in events[0]

    run(go())


def test_a_streams_head_waits_for_its_first_token() -> None:
    async def go() -> None:
        async with Serving(*TRANSFORMERS, speed=1.0) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            data = json.dumps(body(4000, 2)).encode()  # a prompt of more than half a second
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                         b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
                             len(data), data))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.3)
            reply = Reply.of(await asyncio.wait_for(reader.read(), 10))
            writer.close()
            assert reply.finish_reasons() == ["length"]
            assert reply.events()[-1] == "[DONE]"

    run(go())


@pytest.mark.parametrize("more", [
    {"stop": ["x"]}, {"n": 2}, {"response_format": {"type": "json_object"}},
    {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"max_tokens": 40_000}])
def test_what_the_app_cannot_do_is_refused_in_its_words(more: dict[str, Any]) -> None:
    async def go() -> None:
        async with Serving(*TRANSFORMERS, "--max-model-len", "2048") as port:
            refused = await chat(port, {"messages": [{"role": "user", "content": "hi"}], **more})
            assert refused.status == 400
            assert next(iter(more)) in refused.json()["error"]["message"]

    run(go())
    for words in ("model.generate behind a small web app does not do that",
                  "one answer for each request", "must be from 1 to {room_tok}"):
        assert words in APP.read_text()


def test_it_has_no_metrics_of_a_vllm_and_says_who_it_is() -> None:
    async def go() -> None:
        async with Serving(*TRANSFORMERS) as port:
            metrics = (await ask(port, "/metrics")).body.decode()
            assert "vllm:" not in metrics
            assert "sim:steps_total" in metrics
            assert (await ask(port, "/version")).status == 404
            models = (await ask(port, "/v1/models")).json()
            assert models["data"][0]["owned_by"] == "transformers"
            default = await ask(port, "/v1/completions", {"prompt": "a", "ignore_eos": True})
            assert default.json()["usage"]["completion_tokens"] == 512

    run(go())


def test_several_prompts_are_refused() -> None:
    async def go() -> None:
        async with Serving(*TRANSFORMERS) as port:
            refused = await ask(port, "/v1/completions", {"prompt": ["a", "b"]})
            assert refused.status == 400
            assert refused.json()["error"]["message"] in APP.read_text()

    run(go())


def test_streams_are_cut_when_the_app_is_told_to_end() -> None:
    async def go() -> None:
        serving = Serving(*TRANSFORMERS, speed=1.0)
        async with serving as port:
            asked = asyncio.create_task(ask(port, "/v1/completions", body(10, 500)))
            await until(lambda: serving.server.pacing.steps > 2)
            serving.server.abort_all()
            reply = await asked
            assert reply.status == 200
            assert not reply.clean
            assert reply.finish_reasons() == []

    run(go())
