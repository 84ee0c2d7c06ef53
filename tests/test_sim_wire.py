"""The simulator answers what vLLM 0.32 was recorded to answer, values aside."""

import asyncio
import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from servers.sim.scripts import Habits
from tests.captures import DATA
from tests.test_sim_app import STREAM, Reply, ask, chat, metrics, run, serving, until

OWN = {"x-simulated", "connection", "date"}  # of the headers
EXACT = {"object", "role", "type", "finish_reason", "index", "param", "code"}  # values that count
NAMED_BY_VALUES = {"top_logprobs", "prompt_logprobs"}  # of completions: dicts of tokens
GLITCH = {"48_tools_required_strict_nonstream"}  # the model spoke no JSON
BY_CHANCE = {"32_chat_json_object_nonstream"}  # how long the answer is
PIECES = {  # where our tokens are larger than the tiny model's, and what then has equal ones
    "17_chat_stream_stop_string": (b"world", b"-----"), "27_cmpl_echo_logprobs": (b"hello", b"a 1")}
FILES = {p.stem: p for p in (*DATA.glob("*.http"), *DATA.glob("wire/*.http"))}
ASKED = sorted(n for n in FILES if n[0] in "012345" and n not in GLITCH)


def sent(name: str) -> tuple[str, bytes | None, dict[str, str]]:
    """(path, body, headers) of the request of a capture; no body: a GET."""
    raw = FILES[name].read_bytes().partition(b"### RESPONSE")[0]
    raw = raw.replace(*PIECES.get(name, (b"", b"")))
    head, _, body = raw.partition(b"### REQUEST\n")[2].replace(b"\r\n", b"\n").partition(b"\n\n")
    first, *lines = head.decode().split("\n")
    headers = dict(line.split(": ", 1) for line in lines if ": " in line)
    own = ("Host", "User-Agent", "Accept", "Connection", "Content-Length")
    return (first.split()[1], body.rstrip(b"\n") if first.startswith("POST") else None,
            {k: v for k, v in headers.items() if k not in own})


def shape(value: Any, key: str = "") -> Any:
    """Keys in their order and kinds of values; of EXACT keys the value itself."""
    if isinstance(value, dict):
        if key in NAMED_BY_VALUES:
            return sorted({str(shape(v)) for v in value.values()})
        return [(k, shape(v, k)) for k, v in value.items()]
    if isinstance(value, list):
        kinds = [shape(v, key if key in NAMED_BY_VALUES else "") for v in value]
        return [k for k, _ in groupby(kinds)]
    if key == "stop_reason" and not isinstance(value, str):
        return "none or an EOS"  # which of two the model drew
    if value is None or key in EXACT or value == "[DONE]":
        return value
    return type(value).__name__


def events(reply: Reply) -> Iterator[Any]:
    """Payloads of a stream, each with how it was written: vLLM has two serializers."""
    for chunk in reply.chunks:
        assert chunk.startswith(b"data: ")
        assert chunk.endswith(b"\n\n")
        payload = chunk.decode()[6:-2]
        if payload == "[DONE]":
            yield payload
            continue
        value = json.loads(payload)
        tight = json.dumps(value, ensure_ascii=False, separators=(",", ":")) == payload
        yield {**value, "written": "tight" if tight else "loose"}


def told(reply: Reply) -> dict[Any, list[Any]]:
    """Of each choice its kinds of events in their order; None: of the rest of the stream."""
    found: dict[Any, list[Any]] = {}
    for event in events(reply):
        choices = event.get("choices") if isinstance(event, dict) else None
        kinds = found.setdefault(choices[0]["index"] if choices else None, [])
        kind = shape(event)
        if not kinds or kinds[-1] != kind:
            kinds.append(kind)
    return found


def recorded(name: str) -> Reply:
    raw = FILES[name].read_bytes().rpartition(b"### RESPONSE (raw bytes, chunk framing kept)\n")[2]
    return Reply.of(raw.rpartition(b"\n### END")[0] or raw)


@pytest.mark.parametrize("name", ASKED)
def test_an_answer_has_the_shape_of_vllms(name: str) -> None:
    async def test() -> None:
        habits = Habits(auto_call_frac=0.0)
        async with serving(engine={"mean_output_tok": 1e7}, habits=habits) as (_, port):
            path, body, headers = sent(name)
            ours, theirs = await ask(port, path, body, **headers), recorded(name)
            assert ours.status == theirs.status
            assert set(ours.headers) - OWN == set(theirs.headers) - OWN
            for key in ("content-type", "server", "vary", "allow", "transfer-encoding"):
                assert ours.headers.get(key) == theirs.headers.get(key)
            if theirs.chunks:
                assert told(ours) == told(theirs)
                assert ours.clean
            elif theirs.body:
                a, b = ours.json(), theirs.json()
                if name in BY_CHANCE:
                    a["choices"][0]["finish_reason"] = b["choices"][0]["finish_reason"]
                assert shape(a) == shape(b)
            else:
                assert not ours.body
            if theirs.status != 200 and "50_" not in name:
                assert ours.body == theirs.body
    run(test())


# ----------------------------------------------------------------------------------- the queue


def test_a_full_queue_is_told_by_status_or_by_event_as_from_vllm() -> None:
    """The API server counts what the last step left; the engine counts exactly, and later."""
    async def test() -> None:
        async with serving(queue_limit=2, speed=1.0) as (server, port):
            body = {"model": "tiny", "prompt": "a", "max_tokens": 60, "stream": True,
                    "ignore_eos": True}
            burst = await asyncio.gather(*(ask(port, "/v1/completions", body) for _ in range(6)))
            bodies = [r.body for r in burst]
            raced = recorded("77_queue_overflow_raced_200_with_error_event")
            refused = recorded("77_queue_overflow_rejected")
            assert bodies.count(raced.body) + bodies.count(refused.body) == 4
            assert {r.status for r in burst if r.body == raced.body} <= {200}
            assert {r.status for r in burst if r.body == refused.body} <= {503}
            assert raced.body in bodies
            assert server.tally.rejected == 4
            tasks = [asyncio.create_task(ask(port, "/v1/completions", {**body, "max_tokens": 300}))
                     for _ in range(2)]
            steps = server.pacing.steps
            await until(lambda: server.engine.running == 2 and server.pacing.steps > steps + 3)
            late = await ask(port, "/v1/completions", body)
            assert (late.status, late.body) == (503, refused.body)
            for task in tasks:
                task.cancel()
    run(test())


# -------------------------------------------------------------------------------------- /metrics


def families(text: str) -> dict[str, Any]:
    """Of vLLM's families: type, help, labels and buckets."""
    found = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("vllm:"):
            samples = [(s.name, sorted((k, v) for k, v in s.labels.items()
                                       if k in ("le", "reason", "finished_reason", "source", "mode",
                                                "outcome", "request_type", "sleep_state")),
                        sorted(s.labels)) for s in family.samples]
            found[family.name] = (family.type, family.documentation, samples)
    return found


def test_metrics_have_vllms_families_types_helps_labels_and_buckets_in_order() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            ours = await ask(port, "/metrics")
            theirs = recorded("60_metrics_after")
            assert ours.headers["content-type"] == theirs.headers["content-type"]
            a, b = families(ours.body.decode()), families(theirs.body.decode())
            assert list(a) == list(b)
            assert a == b
    run(test())


def heads(text: str) -> list[tuple[str, str, str, list[str]]]:
    """Families that are not vLLM's own: name, type, help, buckets."""
    return [(f.name, f.type, f.documentation, sorted({
        s.labels["le"] for s in f.samples if "le" in s.labels}))
        for f in text_string_to_metric_families(text)
        if not f.name.startswith(("vllm:", "sim:"))]


def test_metrics_tell_of_process_and_http_as_vllms_do() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            for path, body in (("/v1/models", None), ("/v1/chat/completions", {}), ("/x", None)):
                await ask(port, path, body)
            said = (await ask(port, "/metrics")).body.decode()
        assert heads(said) == heads(recorded("60_metrics_after").body.decode())
        (requests,) = [f for f in text_string_to_metric_families(said)
                       if f.name == "http_requests"]
        assert {tuple(s.labels.values()): s.value for s in requests.samples
                if s.name.endswith("_total")} == {
            ("/v1/models", "GET", "2xx"): 1, ("/v1/chat/completions", "POST", "4xx"): 1,
            ("none", "GET", "4xx"): 1}
    run(test())


def test_counters_agree_with_what_clients_saw_to_the_token() -> None:
    async def test() -> None:
        async with serving(engine={"mean_output_tok": 20.0}) as (_, port):
            asked: list[dict[str, Any]] = [
                {"max_tokens": 30}, {"max_tokens": 30, "n": 3}, {"max_tokens": 200, "stop": ["e"]},
                {"max_tokens": 90, "response_format": {"type": "json_object"}},
                {"max_tokens": 5, "logprobs": True}]
            said = [{"role": "user", "content": "x " * 40}]
            replies = [await chat(port, {"model": "tiny", "messages": said, **a}) for a in asked]
            answers = [r.json() for r in replies]
            seen = await metrics(port)
            usages = [a["usage"] for a in answers]
            assert seen["vllm:generation_tokens_total"] == sum(
                u["completion_tokens"] for u in usages)
            assert seen["vllm:prompt_tokens_total"] == sum(
                u["prompt_tokens"] * len(a["choices"]) for u, a in zip(usages, answers,
                                                                      strict=True))
            reasons = [c["finish_reason"] for a in answers for c in a["choices"]]
            for reason in ("stop", "length"):
                assert seen[f"vllm:request_success_total|{reason}"] == reasons.count(reason)
            for name in ("request_generation_tokens", "e2e_request_latency_seconds",
                         "request_queue_time_seconds", "time_to_first_token_seconds"):
                assert seen[f"vllm:{name}_count"] == len(reasons)
            assert seen["vllm:request_generation_tokens_sum"] == seen[
                "vllm:generation_tokens_total"]
            assert seen["vllm:inter_token_latency_seconds_count"] == seen[
                "vllm:generation_tokens_total"] - len(reasons)
            assert seen["vllm:iteration_tokens_total_sum"] == seen[
                "vllm:generation_tokens_total"] + seen["vllm:prompt_tokens_total"]
            assert 0 < seen["vllm:prompt_tokens_cached_total"] == seen[
                "vllm:prefix_cache_hits_total"]
    run(test())


# ---------------------------------------------------------------------------------------- deaths


@pytest.mark.parametrize(("name", "fault"), [
    ("72_sigkill_api_server_midstream", "truncate@9"), ("76_sigkill_worker_midstream", "die@9"),
    ("75_cuda_oom_injected_midstream", "oom@9"), ("78_sigterm_api_midstream", "")])
def test_a_stream_that_a_death_cuts_ends_as_vllms_did(name: str, fault: str) -> None:
    async def test() -> None:
        async with serving(engine={"mean_output_tok": 1e7}) as (server, port):
            asked = json.loads(sent(name)[1] or b"{}") or STREAM
            task = asyncio.create_task(chat(port, {**asked, "max_tokens": 1500},
                                            **({"x-sim-fault": fault} if fault else {})))
            await until(lambda: server.tally.generation_tok > 8)
            if not fault:
                server.abort_all()  # what SIGTERM does
            ours, theirs = await task, recorded(name)
            assert told(ours) == told(theirs)
            assert ours.clean == theirs.clean
            assert ours.chunks[-1][-20:] == theirs.chunks[-1][-20:]
    run(test())
