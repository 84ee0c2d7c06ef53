"""The simulated server on its wire, against what vLLM 0.32 was recorded to say."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from loadgen.telemetry.server import NAMES
from servers.sim import faults, text
from servers.sim.__main__ import main
from servers.sim.app import Server
from servers.sim.costs import GPUS, MODELS, Machine
from servers.sim.engine import Engine, EngineConfig

ROOT = Path(__file__).resolve().parent.parent
CAPTURES = ROOT / "tests" / "data" / "vllm"
SPEED = 20.0
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8,
         "ignore_eos": True}
STREAM = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}


# ---------------------------------------------------------------------------- server and client


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[Server, int]]:
    """A server of this process, and its port."""
    given = {"machine": Machine(GPUS["4090d"], MODELS["qwen2.5-7b"]), "num_blocks": 4000,
             "max_model_len": 2048}
    config = EngineConfig(**{**given, **options.pop("engine", {})})
    server = Server(Engine(config), ["tiny"], **{"speed": SPEED, **options})
    runner = server.runner()
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield server, runner.addresses[0][1]
    finally:
        server.abort_all()
        await runner.cleanup()


def slow_front(token_s: float) -> Machine:
    machine = Machine(GPUS["4090d"], MODELS["qwen2.5-7b"])
    return replace(machine, constants=replace(machine.constants, front_token_s=token_s,
                                              front_merged_s=1e-3))


@dataclass
class Reply:
    """A response as its bytes say. `chunks`: HTTP chunks; `clean`: it ended as HTTP wants it."""

    status: int
    headers: dict[str, str]
    body: bytes
    chunks: list[bytes] = field(default_factory=list)
    clean: bool = True

    @classmethod
    def of(cls, raw: bytes) -> "Reply":
        head, _, body = raw.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        reply = cls(int(status.split()[1]), headers, body)
        if headers.get("transfer-encoding") == "chunked":
            reply.chunks, reply.clean = _dechunked(body)
            reply.body = b"".join(reply.chunks)
        return reply

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        lines = [e.removeprefix(b"data: ") for e in self.body.split(b"\n\n") if e]
        return [e.decode() if e == b"[DONE]" else json.loads(e) for e in lines]

    def finish_reasons(self) -> list[str]:
        return [c["finish_reason"] for e in self.events() if isinstance(e, dict)
                for c in e.get("choices", []) if c["finish_reason"]]


def _dechunked(body: bytes) -> tuple[list[bytes], bool]:
    chunks: list[bytes] = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        n = int(size, 16)
        if n == 0:
            return chunks, True
        chunks.append(rest[:n])
        body = rest[n + 2:]
    return chunks, False


def request_bytes(path: str, body: object = None, **headers: str) -> bytes:
    """GET without a body, POST with one (bytes go as they are)."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Host": "x", "Connection": "close", "Content-Type": "application/json",
             "Content-Length": str(len(data)), **headers}
    if body is None:
        lines.pop("Content-Length")
        lines.pop("Content-Type")
        data = b""
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\n"
    return (head + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n").encode() + data


async def ask(port: int, path: str, body: object = None, **headers: str) -> Reply:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes(path, body, **headers))
        raw = await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return Reply.of(raw)


async def chat(port: int, body: object = STREAM, **headers: str) -> Reply:
    return await ask(port, "/v1/chat/completions", body, **headers)


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test, 30)

    asyncio.run(limited())


async def metrics(port: int) -> dict[str, float]:
    """Samples of /metrics; labels other than finished_reason and le are left out."""
    reply = await ask(port, "/metrics")
    out = {}
    for family in text_string_to_metric_families(reply.body.decode()):
        for s in family.samples:
            kept = [v for k, v in s.labels.items() if k in ("finished_reason", "le")]
            out["|".join([s.name, *kept])] = s.value
    return out


async def until(seen: Any) -> None:
    """Waits until `seen()` holds."""
    while not seen():  # noqa: ASYNC110 (there is no event for the other side's state)
        await asyncio.sleep(0.002)


# ------------------------------------------------------------------------------------- captures


def captured(name: str) -> tuple[bytes, Reply]:
    """(request bytes, response) of a capture."""
    raw = (CAPTURES / f"{name}.http").read_bytes()
    before, _, after = raw.partition(b"### RESPONSE (raw bytes, chunk framing kept)\n")
    if not after:  # some hold only the response
        before, after = b"", raw
    sent = before.partition(b"### REQUEST\n")[2].replace(b"\r\n", b"\n").rstrip(b"\n")
    return sent, Reply.of(after.rpartition(b"\n### END")[0])


def captured_request(name: str) -> tuple[str, bytes | None, str]:
    """(path, body, content type) of a capture's request."""
    head, _, body = captured(name)[0].partition(b"\n\n")
    lines = head.decode().split("\n")
    kind = next((v for k, v in (line.split(": ", 1) for line in lines[1:])
                 if k == "Content-Type"), "")
    return lines[0].split()[1], body if lines[0].startswith("POST") else None, kind


def shape(value: Any) -> Any:
    """Keys in their order, and kinds of values."""
    if isinstance(value, dict):
        return [(k, shape(v)) for k, v in value.items()]
    if isinstance(value, list):
        return [shape(v) for v in value]
    return value if value is None or value in ("[DONE]", "assistant") else type(value).__name__


def shapes_without_repeats(events: list[Any]) -> list[Any]:
    out: list[Any] = []
    for s in map(shape, events):
        if not out or s != out[-1]:
            out.append(s)
    return out


@pytest.mark.parametrize("name", ["10_chat_stream_usage", "11_chat_stream_nousage",
                                  "20_cmpl_stream_usage", "21_cmpl_stream_nousage"])
def test_streams_have_vllms_chunks_in_vllms_order(name: str) -> None:
    async def test() -> None:
        async with serving() as (_, port):
            path, body, _ = captured_request(name)
            ours = await ask(port, path, {**json.loads(body or b""), "ignore_eos": True})
            theirs = captured(name)[1]
            assert shapes_without_repeats(ours.events()) == shapes_without_repeats(
                theirs.events())
            assert len(ours.events()) == len(theirs.events())
            assert all(c.startswith(b"data: ") and c.endswith(b"\n\n") for c in ours.chunks)
            assert ours.clean
            for key in ("server", "content-type", "transfer-encoding", "vary"):
                assert ours.headers[key] == theirs.headers[key]
            assert ours.headers["x-simulated"] == "true"
    run(test())


def test_an_answer_that_ends_by_itself_closes_as_vllms_does() -> None:
    async def test() -> None:
        async with serving(engine={"mean_output_tok": 3.0}) as (_, port):
            body = {**STREAM, "ignore_eos": False, "max_tokens": 500}
            ours = await chat(port, body)
            theirs = captured("18_chat_stream_eos")[1]
            assert [shape(e) for e in ours.events()[-3:]] == [shape(e) for e
                                                              in theirs.events()[-3:]]
            assert ours.finish_reasons() == theirs.finish_reasons() == ["stop"]
            usage = ours.events()[-2]["usage"]
            assert usage["completion_tokens"] == len(ours.events()) - 3  # EOS counts
    run(test())


@pytest.mark.parametrize("name", ["13_chat_nonstream", "22_cmpl_nonstream"])
def test_whole_answers_have_vllms_keys(name: str) -> None:
    async def test() -> None:
        async with serving() as (_, port):
            path, body, _ = captured_request(name)
            ours = await ask(port, path, {**json.loads(body or b""), "ignore_eos": True})
            theirs = captured(name)[1].json()
            answer = ours.json()
            assert list(answer) == list(theirs)[:len(answer)]
            assert shape(answer["usage"]) == shape(theirs["usage"])
            assert set(answer["choices"][0]) <= set(theirs["choices"][0])
            assert answer["usage"]["completion_tokens"] == 8
            assert ours.headers["content-type"] == "application/json"
    run(test())


@pytest.mark.parametrize("name", [
    "51_err_max_tokens_too_large_chat", "52_err_bad_model", "53_err_empty_body",
    "53_err_invalid_json", "53_err_wrong_content_type", "54_err_empty_prompt",
    "54_err_max_tokens_zero", "54_err_messages_empty", "54_err_messages_missing",
    "54_err_stream_options_without_stream", "54_err_temperature_negative", "55_err_404",
    "55_err_405"])
def test_errors_are_vllms_to_the_byte(name: str) -> None:
    async def test() -> None:
        async with serving() as (_, port):
            path, body, content_type = captured_request(name)
            ours = await ask(port, path, body, **{"Content-Type": content_type} if body else {})
            theirs = captured(name)[1]
            assert ours.status == theirs.status
            assert ours.body == theirs.body
    run(test())


def test_a_prompt_that_is_too_long_is_refused_before_the_stream_starts() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            long = {**STREAM, "messages": [{"role": "user", "content": " word" * 2100}]}
            ours = await chat(port, long)
            theirs = captured("50_err_prompt_too_long_chat_stream")[1]
            assert ours.status == theirs.status == 400
            assert ours.json()["error"]["param"] == "input_tokens"
            number = re.compile(r"\d+(?= input|\)$)")
            assert (number.sub("N", ours.json()["error"]["message"])
                    == number.sub("N", theirs.json()["error"]["message"]))
    run(test())


# ------------------------------------------------------------------------------------ behaviour


def test_headers_come_before_the_first_token() -> None:
    async def test() -> None:
        async with serving(speed=1.0) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request_bytes("/v1/chat/completions", {
                **STREAM, "messages": [{"role": "user", "content": " word" * 1500}]}))
            loop = asyncio.get_running_loop()
            start_s = loop.time()
            await reader.readuntil(b"\r\n\r\n")
            headers_s = loop.time() - start_s
            await reader.readuntil(b"\n\n")
            first_s = loop.time() - start_s
            writer.close()
            await writer.wait_closed()
            assert first_s > 0.25  # 1,500 tokens of prefill on a 4090D
            assert headers_s < first_s / 2
    run(test())


def test_a_client_that_leaves_frees_its_blocks() -> None:
    async def test() -> None:
        async with serving() as (server, port):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request_bytes("/v1/chat/completions", {**STREAM, "max_tokens": 2000}))
            await until(lambda: server.engine.running == 1)
            writer.close()
            await writer.wait_closed()
            await until(lambda: server.engine.running == 0 and server.engine.kv_usage == 0)
            assert server.engine.stats.finished == {}
    run(test())


def test_metrics_agree_with_the_usage_that_clients_saw() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            replies = await asyncio.gather(*(chat(port, {**STREAM, "max_tokens": 5 + i})
                                             for i in range(6)))
            seen = await metrics(port)
            usages = [r.events()[-2]["usage"] for r in replies]
            for name, key in (("prompt", "prompt_tokens"), ("generation", "completion_tokens")):
                assert seen[f"vllm:{name}_tokens_total"] == sum(u[key] for u in usages)
            assert seen["vllm:request_success_total|length"] == 6
            assert seen["vllm:time_to_first_token_seconds_count"] == 6
            assert seen["vllm:inter_token_latency_seconds_count"] == sum(
                u["completion_tokens"] - 1 for u in usages)
            assert seen["vllm:e2e_request_latency_seconds_bucket|+Inf"] == 6
            assert seen["vllm:prefix_cache_hits_total"] > 0
            assert seen["vllm:num_requests_running"] == seen["vllm:num_requests_waiting"] == 0
            assert seen["sim:steps_total"] > 0
            assert seen["sim:late_steps_total"] >= 0
            said = {name.partition("|")[0] for name in seen}
            assert {x for x in NAMES if x.startswith("sim:")} <= said  # what a sweep looks for
            assert seen["sim:lag_seconds"] >= 0
    run(test())


def test_tokenize_counts_what_usage_counts() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            for path, prompt in (
                    ("/v1/chat/completions", {"messages": HELLO["messages"]}),
                    ("/v1/completions", {"prompt": "internationalization costs 12345 元"})):
                counted = (await ask(port, "/tokenize", {"model": "tiny", **prompt})).json()
                answer = (await ask(port, path, {**prompt, "max_tokens": 2})).json()
                assert counted["count"] == len(counted["tokens"])
                assert counted["count"] == answer["usage"]["prompt_tokens"]
                assert counted["max_model_len"] == 2048
    run(test())


def test_an_answers_text_has_as_many_tokens_as_usage_says() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            answer = (await chat(port, {**HELLO, "max_tokens": 200})).json()
            assert len(text.pieces(answer["choices"][0]["message"]["content"])) == 200
    run(test())


@pytest.mark.parametrize("more", [{}, {"return_token_ids": True}, {"logprobs": True}])
def test_a_front_end_that_lags_tells_a_streams_waiting_tokens_in_one_event(
        more: dict[str, bool]) -> None:
    async def test() -> None:
        async with serving(engine={"machine": slow_front(0.4)}) as (_, port):
            reply = await chat(port, {**STREAM, "max_tokens": 30, **more})
        role, *told, usage = [e for e in reply.events() if isinstance(e, dict)]
        choices = [e["choices"][0] for e in told]
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert usage["usage"]["completion_tokens"] == 30
        assert len(text.pieces("".join(c["delta"]["content"] for c in choices))) == 30
        assert 1 < len(choices) < 25
        for c in choices:
            n = len(text.pieces(c["delta"]["content"]))
            assert len(c["token_ids"] or [0] * n) == n
            assert len((c["logprobs"] or {"content": [0] * n})["content"]) == n
    run(test())


def test_a_stream_interval_makes_an_event_of_so_many_tokens() -> None:
    async def test() -> None:
        async with serving(engine={"stream_interval": 4}) as (_, port):
            reply = await ask(port, "/v1/completions", {
                "model": "tiny", "prompt": "x", "stream": True, "max_tokens": 10,
                "ignore_eos": True, "return_token_ids": True})
        choices = [e["choices"][0] for e in reply.events() if isinstance(e, dict)]
        assert [len(c["token_ids"]) for c in choices] == [1, 4, 4, 1]
        assert [c["prompt_token_ids"] is None for c in choices] == [False, True, True, True]
    run(test())


def test_the_next_turn_of_a_conversation_finds_the_answer_before_it_in_the_cache() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            first = (await chat(port, {**HELLO, "max_tokens": 200})).json()
            cached = (await metrics(port))["vllm:prefix_cache_hits_total"]
            said = first["choices"][0]["message"]["content"]
            await chat(port, {**HELLO, "messages": [
                {"role": "user", "content": "Hello"}, {"role": "assistant", "content": said},
                {"role": "user", "content": "And then?"}]})
            hits = (await metrics(port))["vllm:prefix_cache_hits_total"] - cached
        known = first["usage"]["total_tokens"] - 1
        assert hits == known // 16 * 16
    run(test())


def test_tokenizing_a_long_prompt_takes_about_a_millisecond() -> None:
    prompt = "lorem ipsum dolor sit amet 推理服务 " * 300
    start_s = time.process_time()
    for _ in range(20):
        text.block_hashes(text.pieces(prompt))
    assert len(text.pieces(prompt)) > 2000
    assert (time.process_time() - start_s) / 20 < 5e-3


def test_the_small_endpoints_answer() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            assert (await ask(port, "/health")).status == 200
            assert (await ask(port, "/version")).json()["version"] == "0.32.0"
            model = (await ask(port, "/v1/models")).json()["data"][0]
            assert (model["id"], model["max_model_len"]) == ("tiny", 2048)
            await chat(port)
            gpu, = (await ask(port, "/sim/gpu")).json()
            assert 0 < gpu["memory_used_bytes"] < gpu["memory_total_bytes"]
            assert 0 < gpu["utilization_gpu"] <= 100
            assert gpu["simulated"] is True
    run(test())


def test_a_wrong_api_key_is_401_and_health_needs_none() -> None:
    async def test() -> None:
        async with serving(api_key="secret") as (_, port):
            assert (await chat(port)).status == 401
            assert (await chat(port, Authorization="Bearer nope")).json() == {
                "error": "Unauthorized"}
            assert (await chat(port, Authorization="Bearer secret")).status == 200
            assert (await ask(port, "/health")).status == 200
    run(test())


def test_a_given_request_id_comes_back() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            reply = await chat(port, HELLO, **{"X-Request-Id": "my-req-1"})
            assert reply.json()["id"] == "chatcmpl-my-req-1"
    run(test())


# --------------------------------------------------------------------------------------- faults


async def spoiled(port: int, fault: str) -> Reply:
    return await chat(port, {**STREAM, "max_tokens": 20}, **{"x-sim-fault": fault})


def test_faults_of_the_status_line() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            throttled = await spoiled(port, "status-429")
            assert (throttled.status, throttled.headers["retry-after"]) == (429, "1")
            full = await spoiled(port, "status-503")
            assert full.body == captured("77_queue_overflow_rejected")[1].body
            assert (await spoiled(port, "status-500")).status == 500
            wrong = await spoiled(port, "wrong-type")
            assert (wrong.status, wrong.headers["content-type"]) == (200, "application/json")
            unknown = await spoiled(port, "truncat")
            assert unknown.status == 400
            assert "did you mean 'truncate'" in unknown.json()["error"]["message"]
            assert (await spoiled(port, "rst@x")).status == 400
    run(test())


def test_faults_that_end_a_stream_early() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            error = await spoiled(port, "error-event@4")
            assert error.body.endswith(captured("75b_oom_chat_stream")[1].body[-180:])
            assert error.clean
            assert len(error.events()) == 1 + 4 + 2
            cut = await spoiled(port, "truncate@4")
            assert not cut.clean
            assert len(cut.events()) == 1 + 4
            with pytest.raises(ConnectionResetError):
                await spoiled(port, "rst@2")
            empty = await spoiled(port, "empty")
            assert (empty.status, empty.body, empty.clean) == (200, b"", True)
    run(test())


def test_faults_of_a_streams_end() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            unfinished = await spoiled(port, "no-finish")
            assert unfinished.finish_reasons() == []
            assert unfinished.events()[-1] == "[DONE]"
            assert len(unfinished.events()) == 1 + 20 + 1
            undone = await spoiled(port, "no-done")
            assert undone.finish_reasons() == ["length"]
            assert "usage" in undone.events()[-1]
    run(test())


def test_faults_inside_a_stream_that_goes_on() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            bad = await spoiled(port, "bad-json@4")
            with pytest.raises(json.JSONDecodeError):
                bad.events()
            assert bad.body.endswith(b"data: [DONE]\n\n")
            big = await spoiled(port, "big-line@4")
            assert max(map(len, big.chunks)) > 700_000
            assert big.finish_reasons() == ["length"]
            sliced = await spoiled(port, "slice")
            assert max(map(len, sliced.chunks)) == 7
            assert len(sliced.events()) == 1 + 20 + 2
    run(test())


def test_a_stalled_stream_is_silent_and_stays_open() -> None:
    async def test() -> None:
        async with serving() as (server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request_bytes("/v1/chat/completions", STREAM,
                                       **{"x-sim-fault": "stall@2"}))
            for _ in range(1 + 1 + 2):  # headers, role, two tokens
                await reader.readuntil(b"\n\r\n")
            await until(lambda: server.engine.stats.finished["length"] == 1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.1)
            writer.close()
            await writer.wait_closed()
    run(test())


def test_a_slow_first_token_is_late_by_what_was_asked() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            start_s = time.monotonic()
            assert (await spoiled(port, "slow-first@0.3")).finish_reasons() == ["length"]
            assert time.monotonic() - start_s > 0.3
    run(test())


@pytest.mark.parametrize("kind", ["oom", "die"])
def test_a_dying_engine_says_so_in_streams_health_and_new_requests(
        kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with serving(faults=[faults.Fault(kind, 3)]) as (server, port):
            body = {**STREAM, "max_tokens": 1000}
            replies = await asyncio.gather(*(chat(port, body) for _ in range(2)), chat(
                port, {**body, "stream": False, "stream_options": None}))
            ending = captured("75b_oom_chat_stream")[1].body[-180:]
            assert [r.body[-180:] == ending for r in replies] == [True, True, False]
            assert replies[2].status == 500
            assert (await ask(port, "/health")).status == 503
            refused = await chat(port)
            assert (refused.status, refused.json()["error"]["type"]) == (500,
                                                                         "InternalServerError")
            await server.stopped.wait()
    run(test())
    log = capfd.readouterr().err
    assert ("torch.OutOfMemoryError: CUDA out of memory" in log) == (kind == "oom")
    assert "EngineCore encountered a fatal error." in log


def test_a_hanging_engine_is_silent_and_healthy() -> None:
    async def test() -> None:
        async with serving(faults=[faults.Fault("hang", 1)]) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request_bytes("/v1/chat/completions", STREAM))
            await reader.readuntil(b"\r\n\r\n")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.1)
            assert (await ask(port, "/health")).status == 200
            writer.close()
            await writer.wait_closed()
    run(test())


# -------------------------------------------------------------------------------------- process


@contextlib.contextmanager
def process(*options: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """`python -m servers.sim` on a free port, and that port."""
    with subprocess.Popen([sys.executable, "-m", "servers.sim", "--port", "0",
                           "--served-model-name", "tiny", *options],
                          cwd=ROOT, stderr=subprocess.PIPE, text=True) as p:
        try:
            assert p.stderr is not None
            for line in p.stderr:
                if found := re.search(r"Starting vLLM server .*:(\d+)$", line):
                    break
            else:
                raise AssertionError("it did not start")
            yield p, int(found[1])
        finally:
            p.kill()


def test_sigterm_ends_streams_with_abort_and_exits_0() -> None:
    async def talk(p: "subprocess.Popen[str]", port: int) -> Reply:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes("/v1/chat/completions", {**STREAM, "max_tokens": 2000}))
        raw = await reader.readuntil(b"\n\n")
        p.send_signal(signal.SIGTERM)
        raw += await asyncio.wait_for(reader.read(), 5)
        writer.close()
        await writer.wait_closed()
        return Reply.of(raw)

    with process() as (p, port):
        reply = asyncio.run(talk(p, port))
        assert p.wait(5) == 0
    assert reply.finish_reasons() == ["abort"]
    assert reply.events()[-2]["usage"]["completion_tokens"] == len(reply.events()) - 4
    assert reply.events()[-1] == "[DONE]"


def test_a_dead_engine_ends_the_process_with_0() -> None:
    with process("--fault", "oom@1") as (p, port):
        reply = asyncio.run(chat(port))
        assert (reply.status, reply.finish_reasons()) == (200, [])
        assert asyncio.run(chat(port)).status == 500  # which stops it at once, not after 3.5 s
        assert p.wait(2) == 0


def test_it_dies_with_its_parent() -> None:
    script = ("import os, subprocess, sys; p = subprocess.Popen([sys.executable, '-m', "
              "'servers.sim', '--port', '0', '--parent-pid', str(os.getpid())], "
              "stderr=subprocess.PIPE, text=True); print(p.pid, flush=True); "
              "any('Starting' in line for line in p.stderr); os._exit(0)")
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                         timeout=10, check=True).stdout
    deadline_s = time.monotonic() + 5
    while _alive(int(out)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not _alive(int(out))


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_parent_that_is_not_ones_own_is_refused() -> None:
    p = subprocess.run([sys.executable, "-m", "servers.sim", "--parent-pid", "1"], cwd=ROOT,
                       capture_output=True, text=True, timeout=10, check=False)
    assert p.returncode == (0 if os.getpid() == 1 else 1)
    assert "--parent-pid 1 is not" in p.stderr


def test_a_port_in_use_is_one_clear_line_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 1
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert f"cannot listen on 127.0.0.1:{port}" in last
    assert "--port" in last


@pytest.mark.parametrize(("options", "said"), [
    (["--gpu", "4090"], "did you mean 4090d"),
    (["--model", "qwen2.5-8b"], "did you mean qwen2.5"),
    (["--max-num-seq", "4"], "did you mean --max-num-seqs"),
    (["--fault", "ooom@4"], "did you mean 'oom'"),
    (["--fault", "oom"], "write oom@N"),
    (["--fault", "die@3", "--fault", "stal@2"], "did you mean 'stall'"),
    (["--invalid-json-frac", "2"], "not a number from 0 to 1"),
    (["--max-num-queued-reqs", "0"], "not a number from 1"),
    (["--gpu-memory-utilization", "92"], "not a number from 0.01 to 1"),
])
def test_a_bad_option_is_exit_2_with_the_nearest_name(
        options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(options)
    assert e.value.code == 2
    assert said in capsys.readouterr().err


def test_what_does_not_fit_is_vllms_refusal_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu", "3090", "--max-model-len", "131072"]) == 1
    said = capsys.readouterr().err
    assert "To serve at least one request with the model's max seq len (131072)" in said
    assert "Engine core initialization failed" in said
