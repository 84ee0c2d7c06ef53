"""Whatever a client sends, the simulator answers, goes on, and keeps its memory."""

import asyncio
import json
import random
import resource
import socket
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servers.sim import scripts, wire
from servers.sim.answers import Answer
from servers.sim.choice import Choice
from servers.sim.errors import Refused
from servers.sim.metrics import Tally
from tests.test_sim_app import HELLO, STREAM, Reply, ask, chat, process, request_bytes, run, serving

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
        ["auto", "required", "json_schema", "object", "function", "x", "\ud800", 10**30, 1e300]),
    lambda deeper: st.lists(deeper, max_size=3) | st.dictionaries(st.sampled_from(
        ["type", "function", "name", "parameters", "json_schema", "schema", "properties", "regex",
         "choice", "json", "content", "role", "text", "enum", "items", "anyOf", "$ref", "pattern",
         "required", "minItems", "maxLength", "include_usage", "continuous_usage_stats"]), deeper,
        max_size=4), max_leaves=8)
FIELDS = ["model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n", "stop",
          "stream", "stream_options", "temperature", "top_p", "logprobs", "top_logprobs", "tools",
          "tool_choice", "response_format", "structured_outputs", "return_token_ids", "echo",
          "min_tokens", "ignore_eos"]


def answered(raw: bytes, chat_path: bool) -> None:
    """The whole way of a request without sockets: an answer of six tokens, or Refused."""
    ask = wire.parse_ask(wire.parse_body(raw, "application/json"), chat_path, ["tiny"], 2048, 4096)
    if ask.sampling.n > 8:
        return
    answer, tally = Answer(ask, "x", 4096), Tally(2048)
    for index in range(len(ask.prompts) * ask.sampling.n):
        script = scripts.write(ask.constraint, scripts.Habits(), random.Random(0))
        choice = Choice(answer, index, script, 0.0, tally)
        for k in range(6):
            if choice.reason is None:
                for event in choice.token(float(k), "length" if k == 5 else None):
                    json.loads(event.removeprefix(b"data: "))
        json.loads(answer.whole([choice.told()], choice.tokens))


@settings(max_examples=600, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6), st.booleans(), st.booleans())
def test_any_json_is_answered_or_refused(body: dict[str, Any], chat_path: bool,
                                         usable: bool) -> None:
    if usable:  # so that it gets further than the prompt
        body = {**body, "model": "tiny", "prompt": "a", "messages": HELLO["messages"]}
    try:
        answered(json.dumps(body).encode(), chat_path)
    except Refused as e:
        said = json.loads(e.body())
        if said["error"]["code"] not in (400, 404):
            raise


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_answered_or_refused(raw: bytes) -> None:
    with pytest.raises(Refused):
        answered(raw, True)


@pytest.mark.parametrize("body", [
    b'{"messages":' + b"[" * 100_000, b'{"model":' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"model":"tiny","prompt":"a","max_tokens":1e999}', b"\xff\xfe", b'"text"', b"[1]", b"null",
    b'{"model":"tiny","prompt":"a","max_tokens":NaN}', b'{"model":"tiny","prompt":[[]]}',
    b'{"model":"tiny","prompt":"a","n":' + b"9" * 5000 + b"}"])
def test_odd_json_is_a_400_with_vllms_body(body: bytes) -> None:
    async def test() -> None:
        async with serving() as (_, port):
            reply = await ask(port, "/v1/completions", body)
            assert reply.status == 400
            assert reply.json()["error"]["code"] == 400
            assert (await chat(port)).status == 200
    run(test())


async def raw(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(65536), 5)
    finally:
        writer.close()


@pytest.mark.parametrize("data", [
    b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n",
    b"GET /health HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
    b"GET /%zz%00 HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_what_is_not_http_is_a_400_and_no_traceback(
        data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with serving() as (_, port):
            said = await raw(port, data)
            assert int(said.split()[1]) in (400, 404)
            assert (await chat(port)).status == 200
    run(test())
    assert "Traceback" not in capfd.readouterr().err


def test_a_body_that_never_comes_leaves_nothing_behind() -> None:
    async def test() -> None:
        async with serving() as (server, port):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request_bytes("/v1/chat/completions", STREAM)[:-10])
            await asyncio.sleep(0.05)
            writer.close()
            assert (await chat(port)).status == 200
            assert server.engine.running == 0
    run(test())


# --------------------------------------------------------------------------------------- bounds


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def test_bodies_of_50_mb_are_refused_in_words_and_the_memory_stays_bounded() -> None:
    text = "word " * 10_000_000  # 50 MB

    async def flood(port: int) -> list[Reply]:
        body = json.dumps({**STREAM, "messages": [{"role": "user", "content": text}]}).encode()
        return await asyncio.gather(*(chat(port, body) for _ in range(8)))

    with process("--max-model-len", "2048") as (p, port):
        replies = asyncio.run(flood(port))
        assert {r.status for r in replies} == {400}
        assert replies[0].json()["error"]["param"] == "input_tokens"
        assert rss_bytes(p.pid) < 1.5e9
        too_big = asyncio.run(ask(port, "/v1/completions", b"[" + b" " * (65 * 2**20)))
        assert (too_big.status, too_big.json()) == (
            413, {"detail": HTTPStatus(413).phrase})  # other Pythons have other words
        assert asyncio.run(chat(port)).status == 200


def test_thousands_of_idle_connections_cost_no_request_and_little_memory() -> None:
    """As many of 10,000 as the descriptors of both sides allow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    n = min(10_000, hard - 500)
    with process() as (p, port):
        before = rss_bytes(p.pid)
        idle: list[socket.socket] = []
        try:
            idle.extend(socket.create_connection(("127.0.0.1", port), 10) for _ in range(n))
            assert asyncio.run(chat(port)).finish_reasons() == ["length"]
            assert rss_bytes(p.pid) - before < n * 30_000
        finally:
            for s in idle:
                s.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert asyncio.run(chat(port)).finish_reasons() == ["length"]


def test_with_more_connections_than_descriptors_the_open_ones_are_served() -> None:
    async def test(port: int, idle: list[socket.socket]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        idle.extend(socket.create_connection(("127.0.0.1", port), 5) for _ in range(150))
        assert idle[-1].recv(100).startswith(b"HTTP/1.1 503 Service Unavailable")
        writer.write(request_bytes("/v1/chat/completions", STREAM))
        said = await asyncio.wait_for(reader.read(), 10)
        assert Reply.of(said).finish_reasons() == ["length"]
        writer.close()

    with process() as (p, port):
        resource.prlimit(p.pid, resource.RLIMIT_NOFILE, (200, 200))
        idle: list[socket.socket] = []
        asyncio.run(test(port, idle))
        for s in idle:
            s.close()
        assert p.poll() is None
