"""What each fault of the simulator is to loadgen's own client, and what its log tells of a
death."""

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import pytest

from loadgen.client import Client
from loadgen.net import new_loop
from loadgen.record import Outcome, RequestRecord
from loadgen.target import Target
from servers import death
from servers.sim import faults
from servers.sim.doors import Throttle
from tests.test_client import made, shot
from tests.test_sim_app import ROOT, STREAM, Reply, ask, chat, process, request_bytes, serving
from tests.test_sim_app import run as run_plainly

ASKED = {**STREAM, "max_tokens": 12}


def record(fault: str, timeouts: dict[str, str] | None = None, asked: Any = ASKED,
           **options: Any) -> RequestRecord:
    """Of one request whose header, if `fault` is not "", asks for it."""
    found: list[RequestRecord] = []

    async def test() -> None:
        async with serving(**options) as (_, port):
            headers = {"x-sim-fault": fault} if fault else {}
            target = Target(f"http://127.0.0.1:{port}", "tiny", headers)
            async with Client(target, made(timeouts)) as client:
                found.append(await client.send(shot(body=json.dumps(asked).encode())))

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(asyncio.wait_for(test(), 20))
    return found[0]


OUTCOMES = {
    "status-429": Outcome.THROTTLED, "status-429-date": Outcome.THROTTLED,
    "status-503": Outcome.THROTTLED, "status-503-retry": Outcome.THROTTLED,
    "status-503-date@60": Outcome.THROTTLED, "queue-event": Outcome.THROTTLED,
    "status-500": Outcome.HTTP_ERROR, "status-502": Outcome.HTTP_ERROR,
    "wrong-type": Outcome.BAD_STREAM, "html": Outcome.BAD_STREAM, "empty": Outcome.EMPTY,
    "refuse": Outcome.DISCONNECTED, "slow-first@0.1": Outcome.OK,
    "error-event": Outcome.SERVER_ERROR_EVENT, "bad-json": Outcome.BAD_STREAM,
    "cut-json": Outcome.BAD_STREAM, "big-line": Outcome.OK, "truncate": Outcome.DISCONNECTED,
    "fin": Outcome.TRUNCATED, "rst": Outcome.DISCONNECTED, "slice": Outcome.OK,
    "drip@0.01": Outcome.OK, "no-finish": Outcome.TRUNCATED, "no-done": Outcome.OK,
    "oom": Outcome.SERVER_ERROR_EVENT, "die@5": Outcome.SERVER_ERROR_EVENT,
}


@pytest.mark.parametrize("fault", list(OUTCOMES))
def test_a_fault_has_its_outcome(fault: str) -> None:
    assert record(fault).outcome is OUTCOMES[fault]


@pytest.mark.parametrize(("fault", "patience", "outcome"), [
    ("stall", {"stall": "300ms"}, Outcome.STALLED), ("hang", {"stall": "300ms"}, Outcome.STALLED),
    ("slow-first@30", {"first_token": "300ms"}, Outcome.TIMEOUT_FIRST_TOKEN),
    ("drip@0.2", {"total": "1s"}, Outcome.TIMEOUT_TOTAL)])
def test_a_fault_of_patience_has_its_outcome(fault: str, patience: dict[str, str],
                                             outcome: Outcome) -> None:
    assert record(fault, patience).outcome is outcome


def test_a_proxys_page_with_status_200_is_told_in_its_words() -> None:
    r = record("html")
    assert (r.status, r.n_events) == (200, 0)
    assert "Welcome to nginx!" in (r.error or "")


def test_every_fault_of_requests_is_in_these_tests() -> None:
    tried = {f.partition("@")[0] for f in [*OUTCOMES, "stall", "hang"]}
    assert tried == set(faults.REQUEST_KINDS) | set(faults.ENGINE_KINDS)


def test_what_came_before_the_fault_is_kept() -> None:
    assert record("truncate@4").n_events == 4
    assert record("fin@1").n_events == 1


@pytest.mark.parametrize("fault", ["cut-json", "status-500", "truncate", "error-event"])
def test_a_whole_answer_goes_wrong_as_well(fault: str) -> None:
    asked = {"model": "tiny", "messages": STREAM["messages"], "max_tokens": 12}
    assert record(fault, asked=asked).outcome in (
        Outcome.HTTP_ERROR, Outcome.DISCONNECTED, Outcome.BAD_STREAM)


# ------------------------------------------------------------------------------- all three ways


def test_a_profile_strikes_a_share_of_the_requests() -> None:
    async def test() -> None:
        async with serving(faults=[faults.parse_profile("status-500:0.5")]) as (_, port):
            statuses = [(await chat(port)).status for _ in range(40)]
            assert 8 < statuses.count(500) < 32
            assert set(statuses) == {200, 500}
    run_plainly(test())


async def order(port: int, *wanted: str) -> Reply:
    return await ask(port, "/sim/faults", {"faults": list(wanted)})


def test_faults_are_changed_while_the_server_runs() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            assert (await ask(port, "/sim/faults")).json()["faults"] == []
            said = (await order(port, "status-429@9", "oom@40")).json()["faults"]
            assert said == ["status-429@9", "oom@40"]
            limited = await chat(port)
            assert (limited.status, limited.headers["retry-after"]) == (429, "9")
            wrong = await order(port, "status-42")
            assert wrong.status == 400
            assert "did you mean" in wrong.json()["error"]["message"]
            assert (await ask(port, "/sim/faults", b"[")).status == 400
            assert (await order(port)).json()["faults"] == []
            assert (await chat(port)).status == 200
            await order(port, "die@1")
            assert b"EngineCore encountered an issue" in (await chat(port)).body
            assert (await ask(port, "/health")).status == 503
    run_plainly(test())


def test_retry_after_is_a_date_where_that_is_asked_for() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            told = (await chat(port, STREAM, **{"x-sim-fault": "status-503-date@60"})).headers
            then = time.mktime(time.strptime(told["retry-after"], "%a, %d %b %Y %H:%M:%S GMT"))
            assert 50 < then - time.mktime(time.gmtime()) < 70
    run_plainly(test())


# --------------------------------------------------------------------- proxy, warm-up, memory


def test_a_proxy_lets_a_burst_pass_and_then_its_rate() -> None:
    throttle = Throttle()
    assert [throttle.lets("a", 2.0, 0.0) for _ in range(8)] == [True] * 5 + [False] * 3
    assert throttle.lets("b", 2.0, 0.0)
    assert [throttle.lets("a", 2.0, 0.5), throttle.lets("a", 2.0, 0.5)] == [True, False]
    assert [throttle.lets("a", 2.0, 100.0) for _ in range(6)] == [True] * 5 + [False]


def test_a_throttling_proxy_answers_html_and_is_no_failure() -> None:
    async def test() -> None:
        async with serving(faults=[faults.parse_profile("throttle")]) as (_, port):
            replies = await asyncio.gather(*(chat(port) for _ in range(9)))
            statuses = [r.status for r in replies]
            assert (statuses.count(200), statuses.count(429)) == (5, 4)
            limited = next(r for r in replies if r.status == 429)
            assert limited.headers["content-type"] == "text/html"
            assert (await ask(port, "/health")).status == 200  # which is not the API
    run_plainly(test())


def test_a_server_that_warms_up_answers_503_to_all() -> None:
    async def test() -> None:
        async with serving(faults=[faults.parse_profile("warmup@0.3")]) as (_, port):
            assert [(await ask(port, "/health")).status, (await chat(port)).status] == [503, 503]
            await asyncio.sleep(0.3)
            assert [(await ask(port, "/health")).status, (await chat(port)).status] == [200, 200]
    run_plainly(test())


def test_memory_runs_out_where_the_slack_is_smaller_than_the_sampler_needs() -> None:
    async def load(port: int, n: int) -> list[bool]:
        replies = await asyncio.gather(*(chat(port, {**STREAM, "max_tokens": 50})
                                         for _ in range(n)))
        return [r.finish_reasons() == ["length"] for r in replies]

    async def test() -> None:
        # 152,064 words x 12 bytes = 1.74 MiB per running request
        async with serving(faults=[faults.parse_profile("oom-slack@0.02")]) as (server, port):
            assert all(await load(port, 8))
            assert not any(await load(port, 16))
            assert (await ask(port, "/health")).status == 503
            server.stopped.set()
    run_plainly(test())


# --------------------------------------------------------------------------------------- the log


@pytest.mark.parametrize(("kind", "cause"), [
    ("oom@1", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
    ("oom-slack@0.001", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
    ("die@1", "Worker proc VllmWorker-0 died unexpectedly (exit code: -9)"),
])
def test_the_log_of_a_death_names_its_cause_and_the_process_exits_0(kind: str, cause: str) -> None:
    with process("--fault", kind) as (p, port):
        assert not asyncio.run(chat(port)).finish_reasons()
        assert asyncio.run(chat(port)).status == 500
        assert p.wait(5) == 0
        assert p.stderr is not None
        assert (death.cause(p.stderr.read().splitlines()) or "").startswith(cause)


def test_a_hang_ends_as_vllms_does_when_its_timeout_is_over(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "0.3")
    with process("--fault", "hang@1") as (p, port):
        assert b"EngineCore encountered an issue" in asyncio.run(chat(port)).body
        assert asyncio.run(chat(port)).status == 500
        assert p.wait(5) == 0
        assert p.stderr is not None
        assert death.cause(p.stderr.read().splitlines()) == (
            "TimeoutError: RPC call to execute_model timed out.")


def test_out_of_memory_at_the_start_is_exit_1_with_vllms_lines() -> None:
    p = subprocess.run([sys.executable, "-m", "servers.sim", "--fault", "oom-start"], cwd=ROOT,
                       capture_output=True, text=True, timeout=20, check=False)
    assert p.returncode == 1
    assert "warming up sampler" in p.stderr
    assert (death.cause(p.stderr.splitlines()) or "").startswith(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 298.00 MiB.")


@pytest.mark.parametrize(("text", "said"), [
    ("oom", "write oom@N"), ("throttl", "did you mean 'throttle'"), ("oom@2:0.5", "only faults of"),
    ("truncate@5:2", "SHARE up to 1"), ("drip@-1", "write drip@N"), ("", "no fault ''")])
def test_a_bad_profile_says_what_to_write(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        faults.parse_profile(text)


def test_a_fault_is_read_as_it_is_written() -> None:
    for text in ("oom@32", "truncate@5:0.1", "throttle@2", "drip@0.5"):
        assert str(faults.parse_profile(text)) == text


def test_a_connection_that_closed_without_an_answer_sent_no_byte() -> None:
    async def test() -> None:
        async with serving() as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request_bytes("/v1/chat/completions", STREAM,
                                       **{"x-sim-fault": "refuse"}))
            assert await reader.read() == b""
            writer.close()
    run_plainly(test())
