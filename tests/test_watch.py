"""What is watched beside a load: a log as it grows, a server's processes, the kernel's word, and
that nothing is left running from one level to the next."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadgen import validity
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Fixed, RequestClass, Scenario, SharedPrefix
from loadgen.shard import Hush
from loadgen.store import Row, RunFolder
from loadgen.target import Target
from loadgen.telemetry.log import MOST_BYTES, Tail, kind_of, rows_of
from loadgen.telemetry.process import OomKills, Tree
from loadgen.watch import Watcher
from servers.base import free_port
from tests.raw_server import HOLD, RawServer, whole
from tests.synthetic import manifest

S = 1_000_000_000


# ------------------------------------------------------------------------------------------- log


def test_only_what_comes_from_now_on_is_read_and_a_torn_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"before\n")
    tail = Tail(path, 7)
    with path.open("ab", buffering=0) as f:
        f.write(b"one\ntw")
        assert tail.new() == ["one"]
        assert tail.new() == []
        f.write("o ü\n".encode())
        assert tail.new() == ["two ü"]


def test_a_log_that_is_not_there_yet_is_read_from_its_beginning(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "log", 0)
    assert tail.new() == []
    (tmp_path / "log").write_bytes(b"first\n")
    assert tail.new() == ["first"]


def test_a_log_that_grows_faster_than_it_is_read_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    tail = Tail(path, 0)
    path.write_bytes(b"x" * 99 + b"\n" + b"y\n" * (5 * MOST_BYTES))
    assert sum(len(x) + 1 for x in tail.new()) <= MOST_BYTES


@pytest.mark.parametrize(("line", "kind"), [
    ("(Worker pid=5) ERROR 11-20 [m.py:3] torch.OutOfMemoryError: CUDA out of memory.", "oom"),
    ("ERROR 11-20 [app.py] out of memory while 3 requests were generating", "oom"),
    ("INFO 11-20 [x.py:3] free of what may run out of memory", None),
    ("WARNING 11-20 [scheduler.py:1] Sequence group 0 is preempted by RECOMPUTE", "preemption"),
    ("WARNING: GPU 0 throttled", "throttle"), ("ERROR 11-20 [x.py:3] boom", "error"),
    ("WARNING 11-20 [x.py:3] hm", "warning"), ("INFO 11-20 fine", None), ("", None)])
def test_lines_that_matter_are_known_by_what_they_say(line: str, kind: str | None) -> None:
    assert kind_of(line) == kind


def test_many_lines_of_a_kind_are_one_row_with_the_first_of_them() -> None:
    [row] = rows_of(["ERROR one", "fine", "ERROR two"], 7)
    assert (row.source, row.name, row.value, row.labels) == ("log", "error", 2, {
        "line": "ERROR one"})


# ------------------------------------------------------------------------------------- processes


def test_a_tree_s_memory_threads_and_cpu_are_added_up() -> None:
    busy = "import time\nuntil = time.monotonic() + 30\nwhile time.monotonic() < until: pass"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    with subprocess.Popen([sys.executable, "-c", child], process_group=0) as process:
        try:
            tree = Tree(process.pid)
            until = time.monotonic() + 10
            while len(tree._processes()) < 2 and time.monotonic() < until:
                time.sleep(0.05)
            tree.look(time.monotonic_ns())
            time.sleep(0.5)
            found = {r.name: r.value for r in tree.look(time.monotonic_ns())}
        finally:
            os.killpg(process.pid, 9)
    assert found["processes"] == 2
    assert found["threads"] >= 2
    assert found["fds"] >= 4
    assert found["rss_bytes"] > 5e6
    assert 0.05 < found["cpu_cores"] < 1.2
    assert found["front_cores"] < 0.1  # the first one waits; the child works


def test_of_several_that_answer_http_the_busiest_is_the_front() -> None:
    """A vLLM with several API servers titles them; above them stands one that only waits."""
    busy = ("import ctypes, time; ctypes.CDLL(None).prctl(15, b'VLLM::APIServer_1', 0, 0, 0)\n"
            "until = time.monotonic() + 30\nwhile time.monotonic() < until: pass")
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    with subprocess.Popen([sys.executable, "-c", child], process_group=0) as process:
        try:
            tree = Tree(process.pid)
            until = time.monotonic() + 10
            while time.monotonic() < until and not any(
                    "APIServer" in p.name() for p in tree._processes()):
                time.sleep(0.05)
            tree.look(time.monotonic_ns())
            time.sleep(0.5)
            found = {r.name: r.value for r in tree.look(time.monotonic_ns())}
        finally:
            os.killpg(process.pid, 9)
    assert 0.05 < found["front_cores"] == pytest.approx(found["cpu_cores"], abs=0.05)


def test_a_tree_that_is_gone_has_no_rows() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert Tree(process.pid).look(S) == []


def test_the_kernel_s_count_of_what_it_killed_is_evidence_only_if_it_grew(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 3\noom_group_kill 0\n")
    kills = OomKills(events, kmsg=str(tmp_path / "none"))
    assert kills.says() is None
    events.write_text("low 0\noom 4\noom_kill 5\n")
    assert kills.says() == "the kernel killed 2 processes of this control group for memory"
    events.unlink()
    assert kills.says() is None


def test_the_kernel_s_own_words_are_shown_where_they_may_be_read(tmp_path: Path) -> None:
    kmsg = tmp_path / "kmsg"
    kmsg.write_text("4,1,1,-;Out of memory: Killed process 1 (old)\n")
    kills = OomKills(tmp_path / "none", kmsg=str(kmsg))
    assert kills.says() is None
    with kmsg.open("a") as f:
        f.write("3,2,9,-;Memory cgroup out of memory: Killed process 4242 (VLLM::Worker)\n")
    assert kills.says() == ("the kernel says: Memory cgroup out of memory: Killed process 4242 "
                            "(VLLM::Worker)")
    kills.close()


# --------------------------------------------------------------------------------------- silence


def test_silence_is_counted_while_something_is_in_flight() -> None:
    hush = Hush()
    looks = [(0, 1, "a"), (1, 1, "b"), (2, 1, "b"), (4, 1, "b"), (5, 1, "c"), (6, 0, "c"),
             (60, 0, "c"), (61, 2, "c"), (62, 2, "c")]
    assert [hush.look(t * S, n, seen) for t, n, seen in looks] == [
        0.0, 0.0, 1.0, 3.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert hush.usual_s == 4.0  # from 1 s to 5 s; an idle server is not silent


# ------------------------------------------------------------------------------------- cool-down


def cooled(get: bytes, tmp_path: Path, limit_s: float = 0.6) -> tuple[list[str], list[Row], float]:
    """What was said, the rows, and how long two cool-downs took."""
    said: list[str] = []

    async def test() -> tuple[list[Row], float]:
        async with RawServer(lambda _: [HOLD], get=[get]) as server:
            watcher = Watcher(said.append)
            watcher.opened(RunFolder.create(tmp_path / "r", manifest()))
            watcher._target, watcher._cool_s = Target(server.url, "m"), limit_s
            began = time.monotonic()
            await watcher.cool_down()
            took_s = time.monotonic() - began
            await watcher.close()
            return watcher.rows, took_s
    rows, took_s = asyncio.run(test())
    return said, rows, took_s


def test_a_server_that_is_idle_is_loaded_at_once(tmp_path: Path) -> None:
    idle = whole("200 OK", b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n")
    _, rows, took_s = cooled(idle, tmp_path)
    assert took_s < 0.5
    assert [r.name for r in rows] == ["running", "waiting", "scrape_s"]


def test_a_server_that_does_not_come_to_rest_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    busy = whole("200 OK", b"vllm:num_requests_running 3\nvllm:num_requests_waiting 2\n")
    _, rows, took_s = cooled(busy, tmp_path)
    assert 0.5 < took_s < 3
    assert sum(r.name == "running" for r in rows) > 1


def test_a_server_without_metrics_is_not_waited_for(tmp_path: Path) -> None:
    _, _, took_s = cooled(whole("404 Not Found", b""), tmp_path)
    assert took_s < 0.5


def test_a_server_that_is_gone_is_not_waited_for() -> None:
    async def test() -> float:
        watcher = Watcher(print)
        watcher._target = Target(f"http://127.0.0.1:{free_port()}", "m")
        began = time.monotonic()
        await watcher.cool_down()
        await watcher.close()
        return time.monotonic() - began
    assert asyncio.run(test()) < 0.5


@pytest.mark.parametrize(("status", "ours", "asked"), [
    ("200 OK", True, 2), ("404 Not Found", True, 1), ("200 OK", False, 0)])
def test_a_prefix_cache_is_emptied_before_each_level_where_the_server_is_ours_and_offers_it(
        tmp_path: Path, status: str, ours: bool, asked: int) -> None:
    heads: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n")).decode())
        post = heads[-1].startswith("POST")
        writer.write(whole(status if post else "404 Not Found", b""))
        writer.close()

    async def test() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        watcher = Watcher(print)
        watcher._target = Target(f"http://127.0.0.1:{port}", "m")
        watcher.started(None, tmp_path / "log", 0, forgets=ours)
        for _ in range(2):
            await watcher.cool_down()
        await watcher.close()
        server.close()
        await server.wait_closed()
    asyncio.run(test())
    assert heads.count("POST /reset_prefix_cache HTTP/1.1\r\n") == asked


# ------------------------------------------------------------------------- prompts and the cache


def mix(shared_tok: int | None = None) -> Scenario:
    shared = None if shared_tok is None else SharedPrefix(tokens=shared_tok, groups=1)
    return Scenario(name="m", classes=(RequestClass(
        name="a", kind="chat", prompt_tok=Fixed(1000), output_tok=Fixed(10),
        shared_prefix=shared),))


def sent(turn: int = 0) -> RequestRecord:
    return RequestRecord(leg="l", shard=0, seq=0, session=0, turn=turn, cls="a", due_ns=0,
                         end_ns=9, outcome=Outcome.OK, first_ns=5, prompt_tok=1000)


@pytest.mark.parametrize(("shared_tok", "hit_frac", "found"), [
    (None, 0.0, []), (None, 0.06, []),  # a template's words
    (None, 0.13, [("prompts-reused", "SUSPECT")]), (None, 0.9, [("prompts-reused", "INVALID")]),
    (800, 0.8, []), (800, 0.85, []), (800, 1.0, [("prompts-reused", "INVALID")]),
    (800, 0.45, []), (800, 0.3, [("prefix-not-reused", "SUSPECT")]), (None, None, [])])
def test_the_cache_s_hits_are_held_against_what_the_scenario_shares(
        shared_tok: int | None, hit_frac: float | None, found: list[tuple[str, str]]) -> None:
    findings = validity.reuse(mix(shared_tok), [sent()] * 50, hit_frac, 0.0)
    assert [(f.rule, f.verdict) for f in findings] == found


def test_later_turns_and_preempted_requests_find_their_own_tokens_again() -> None:
    assert validity.reuse(mix(), [sent(), sent(turn=1)], 0.9, 0.0) == []
    assert validity.reuse(mix(), [sent()], 0.9, 3.0) == []
