"""Generator processes: real ones. They send one plan, outlive nothing, and say how they ended."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from loadgen import judge, plan, prompts, scenario, validity
from loadgen.errors import GeneratorError
from loadgen.judge import Criteria, ServerSigns
from loadgen.leg import Leg, Window
from loadgen.net import now_ns
from loadgen.pulse import waits
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Load, Open, PerSecond, Trace, to_plain
from loadgen.shard import LEASE_S, Command, Frame, Setup
from loadgen.store import SCHEMA, LegLine, Manifest, RunFolder
from loadgen.supervise import Progress, Shards
from loadgen.target import Target
from tests.raw_server import DONE, HEAD, LAST, RawServer, Script, finish, good, token, usage

S = 1_000_000_000
MIX = scenario.parse({
    "name": "t", "slo": {"ttft": "20s"},
    "timeouts": {"first_token": "15s", "stall": "15s", "total": "30s"},
    "classes": [{"name": "a", "kind": "chat", "prompt_tokens": 32, "output_tokens": 3}]}, "test")
RATIOS = {"a": prompts.guess(MIX.classes[0])}


def leg(load: Load, measure_s: float | None = None, n: int | None = None,
        name: str = "l") -> Leg:
    return Leg(id=name, axis="concurrency", value=2.0, phase="ladder", replicate=0, seed=7,
               load=load, warmup_s=0.0, measure_s=measure_s, num_sessions=n)


def slow(tokens: int = 3) -> Script:
    return [HEAD + token(), 0.02, token() * (tokens - 1) + finish() + usage(tokens) + DONE + LAST]


def manifest() -> Manifest:
    return Manifest(schema=SCHEMA, run="r", created="", command=[], scenario=to_plain(MIX), seed=7,
                    target_frac=0.95, confidence=0.95, base_url="", model="m", server={},
                    ratios={}, versions={}, host={})


def run(test: Coroutine[Any, Any, None], limit_s: float = 40) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test, limit_s)

    asyncio.run(limited())


def shards(folder: Path, server: RawServer, processes: int = 1) -> Shards:
    return Shards(RunFolder.create(folder, manifest()), "r", MIX, Target(server.url, "m"), RATIOS,
                  processes)


def kept(folder: Path) -> list[RequestRecord]:
    return list(RunFolder(folder).records())


async def nobody_died() -> str | None:
    return None


def unseen(_: Progress) -> None:
    pass


def children(pid: int | None = None) -> list[int]:
    """Generator processes that are children of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid or os.getpid()}/task").iterdir():
        with contextlib.suppress(OSError):  # threads and processes end while one looks at them
            found += [int(child) for child in (task / "children").read_text().split()
                      if b"loadgen.shard" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return sorted(found)


def lives(pid: int) -> bool:
    """A zombie lives no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pids: list[int], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not any(lives(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


# ------------------------------------------------------------------------------------- one plan


def test_two_shards_send_each_session_of_the_plan_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with RawServer(lambda _: slow()) as server:
            async with shards(tmp_path, server, 2) as both:
                window = await both.run(leg(Closed(concurrency=4), n=41), nobody_died, unseen)
            assert (window.ending, window.note) == ("done", None)
            assert len(server.requests) == 41
            assert len({got.body for got in server.requests}) == 41
            assert server.most_inflight == 4
    run(test())
    records = kept(tmp_path)
    assert sorted(r.session for r in records) == list(range(41))
    assert all(r.session % 2 == r.shard for r in records)
    assert {r.outcome for r in records} == {Outcome.OK}
    window = _the_window(tmp_path)
    assert window.from_ns <= min(r.due_ns for r in records)
    assert window.to_ns > max(r.due_ns for r in records)
    assert window.end_ns >= max(r.end_ns for r in records)
    assert [h.shard for h in RunFolder(tmp_path).headers()] == [0, 1]


def test_two_shards_keep_the_instants_of_one_open_plan(tmp_path: Path) -> None:
    what = leg(Open(rate_rps=PerSecond(50)), measure_s=1.0)

    async def test() -> None:
        async with (RawServer(lambda _: slow()) as server,
                    shards(tmp_path, server, 2) as both):
            window = await both.run(what, nobody_died, unseen)
            assert window.ending == "done"
            assert window.to_ns - window.from_ns == S
    run(test())
    window = _the_window(tmp_path)
    due = sorted(r.due_ns - window.t0_ns for r in kept(tmp_path) if r.due_ns < window.to_ns)
    planned = [round((s.due_s or 0.0) * S) for _, s in zip(range(200), plan.sessions(MIX, what),
                                                           strict=False)]
    assert due == [x for x in planned if x < S]


@pytest.mark.parametrize("load", [Closed(concurrency=4), Open(rate_rps=PerSecond(60))])
def test_two_shards_send_what_one_process_would_to_the_byte(tmp_path: Path, load: Load) -> None:
    sent: list[list[bytes]] = []

    async def test() -> None:
        for processes in (1, 2):
            async with (RawServer(lambda _: slow()) as server,
                        shards(tmp_path / str(processes), server, processes) as some):
                await some.run(leg(load, n=40), nobody_died, unseen)
                sent.append(sorted(got.body for got in server.requests))
    run(test())
    assert sent[0] == sent[1]
    assert len(set(sent[0])) == 40
    merged = kept(tmp_path / "2")
    assert sorted(r.session for r in merged) == [r.session for r in sorted(
        kept(tmp_path / "1"), key=lambda r: r.session)] == list(range(40))
    assert len({(r.shard, r.seq) for r in merged}) == 40
    assert {r.shard for r in merged} == {0, 1}


def test_the_slots_of_a_closed_loop_are_shared_out_without_rest(tmp_path: Path) -> None:
    """Each answer waits until all slots of all shards have sent: five of two are three and two."""
    async def test() -> None:
        go = asyncio.Event()
        async with (RawServer(lambda _: [HEAD + token(), go, *good()[1:]]) as server,
                    shards(tmp_path, server, 2) as both):
            running = asyncio.create_task(
                both.run(leg(Closed(concurrency=5), n=10), nobody_died, unseen))
            await server.until(lambda: server.inflight == 5, 20)
            await asyncio.sleep(0.3)
            go.set()
            await running
            assert server.most_inflight == 5
    run(test())
    most = {shard: max(r.inflight or 0 for r in kept(tmp_path) if r.shard == shard)
            for shard in (0, 1)}
    assert most == {0: 3, 1: 2}


def test_each_shard_tells_how_it_was(tmp_path: Path) -> None:
    async def test() -> None:
        async with (RawServer(lambda _: slow()) as server,
                    shards(tmp_path, server, 2) as both):
            await both.run(leg(Closed(concurrency=4), measure_s=1.5), nobody_died, unseen)
    run(test())
    window, records = _the_window(tmp_path), kept(tmp_path)
    assert window.alone
    assert [h.shard for h in window.shards] == [0, 1]
    for h in window.shards:
        assert h.cpu_frac is not None
        assert h.lag_p99_s is not None
        assert (h.run_queue_frac is None) == (waits() is None)
        assert h.gc_pause_s == 0.0  # it is switched off
        assert h.fds is not None
        assert h.fd_limit is not None
        assert 5 < h.fds < h.fd_limit
        assert h.full_reads == 0
        assert h.rcvbuf_bytes is not None
        assert h.rcvbuf_bytes > 0
    assert window.lag_p99_s == max(h.lag_p99_s or 0 for h in window.shards)
    assert window.cpu_frac == max(h.cpu_frac or 0 for h in window.shards)
    span_ns = window.to_ns - window.from_ns
    inside_s = sum(max(0, min(r.end_ns, window.to_ns) - max(r.sent_ns or r.due_ns, window.from_ns))
                   for r in records) / S
    counted_s = sum(h.inflight_s or 0 for h in window.shards)
    assert 0.5 * inside_s < counted_s <= 4 * span_ns / S + 1e-6


def test_what_is_told_of_a_leg_is_of_that_leg(tmp_path: Path) -> None:
    """A shard's reads and pauses of the leg before are not told again."""
    async def test() -> None:
        async with (RawServer(lambda _: slow()) as server,
                    shards(tmp_path, server) as one):
            for name in ("one", "two"):
                await one.run(leg(Closed(concurrency=2), measure_s=0.5, name=name),
                              nobody_died, unseen)
    run(test())
    for _, window in RunFolder(tmp_path).legs():
        assert window is not None
        [h] = window.shards
        assert h.inflight_s is not None
        assert 0 < h.inflight_s <= 2 * 0.5 + 1e-6


def test_a_shard_more_than_there_are_slots_loses_no_session(tmp_path: Path) -> None:
    async def test() -> None:
        async with (RawServer(lambda _: slow()) as server,
                    shards(tmp_path, server, 2) as both):
            await both.run(leg(Closed(concurrency=1), n=6), nobody_died, unseen)
    run(test())
    assert sorted(r.session for r in kept(tmp_path)) == list(range(6))


@pytest.mark.parametrize("load", [Closed(concurrency=1), Trace((0.0, 0.05, 20.0))])
def test_a_shard_that_has_nothing_more_to_do_does_not_hold_up_the_legs_end(
        tmp_path: Path, load: Load) -> None:
    async def test() -> None:
        async with (RawServer(lambda _: slow()) as server,
                    shards(tmp_path, server, 2) as both):
            window = await both.run(leg(load, measure_s=0.5), nobody_died, unseen)
            assert window.ending == "done"
            assert window.end_ns - window.t0_ns < 15 * S
    run(test())


def test_legs_follow_each_other_on_the_same_shards(tmp_path: Path) -> None:
    seen: list[Progress] = []

    async def test() -> None:
        async with (RawServer(lambda _: slow()) as server,
                    shards(tmp_path, server, 2) as both):
            for name in ("one", "two"):
                await both.run(leg(Closed(concurrency=2), measure_s=0.8, name=name),
                               nobody_died, seen.append)
            assert len(children()) == 2
    run(test())
    legs = RunFolder(tmp_path).legs()
    assert [(x.id, w.ending if w else None) for x, w in legs] == [("one", "done"), ("two", "done")]
    assert {p.leg.id for p in seen} == {"one", "two"}
    for x, w in legs:
        assert w is not None
        assert w.t0_ns == w.from_ns
        assert (w.to_ns - w.from_ns) / S == pytest.approx(0.8)
        last = [p for p in seen if p.leg.id == x.id][-1]
        assert last.done == sum(r.leg == x.id for r in kept(tmp_path))
    assert not children()


def _the_window(folder: Path) -> Window:
    window = RunFolder(folder).legs()[-1][1]
    assert window is not None
    return window


def test_the_cpu_of_the_first_leg_is_that_of_the_leg(tmp_path: Path) -> None:
    """What a generator process needs to come up is no load on its core: a short first leg must
    not be INVALID for it."""
    async def test() -> None:
        async with (RawServer(lambda _: slow()) as server,
                    shards(tmp_path, server) as one):
            before_s = _cpu_s(children()[0])
            window = await one.run(leg(Closed(concurrency=1), measure_s=1.3), nobody_died, unseen)
            used_s = _cpu_s(children()[0]) - before_s
            assert window.cpu_frac is not None
            said_s = window.cpu_frac * (window.end_ns - window.t0_ns) / S
            assert said_s <= used_s + 0.1  # the clock of /proc ticks every 10 ms
    run(test())


def _cpu_s(pid: int) -> float:
    """CPU time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------ interrupts


def test_one_interrupt_awaits_what_is_in_flight_and_the_window_ends_there(tmp_path: Path) -> None:
    async def test() -> None:
        go = asyncio.Event()
        async with (RawServer(lambda _: [HEAD + token(), go, *good()[1:]]) as server,
                    shards(tmp_path, server, 2) as both):
            running = asyncio.create_task(
                both.run(leg(Closed(concurrency=4), measure_s=30), nobody_died, unseen))
            await server.until(lambda: server.inflight == 4)
            at_ns = now_ns()
            both.interrupt()
            await asyncio.sleep(0.5)
            assert not running.done()
            go.set()
            window = await running
            assert window.ending == "interrupted"
            assert at_ns <= window.to_ns <= window.end_ns
            assert len(server.requests) == 4
    run(test())
    assert [r.outcome for r in kept(tmp_path)] == [Outcome.OK] * 4


def test_two_interrupts_end_the_leg_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with (RawServer(lambda _: [HEAD + token(), asyncio.Event()]) as server,
                    shards(tmp_path, server) as one):
            running = asyncio.create_task(
                one.run(leg(Closed(concurrency=4), measure_s=30), nobody_died, unseen))
            await server.until(lambda: server.inflight == 4)
            one.interrupt()
            one.interrupt()
            window = await asyncio.wait_for(running, 5)
            assert window.ending == "interrupted"
    run(test())
    records = kept(tmp_path)
    assert [r.outcome for r in records] == [Outcome.CANCELLED] * 4
    assert all(r.n_events == 1 for r in records)


# ------------------------------------------------------------------------------ a shard that dies


def test_a_shard_that_is_killed_makes_the_leg_invalid_and_keeps_the_records(
        tmp_path: Path) -> None:
    async def test() -> None:
        async with (RawServer(lambda _: slow()) as server,
                    shards(tmp_path, server, 2) as both):
            running = asyncio.create_task(
                both.run(leg(Closed(concurrency=4), measure_s=30), nobody_died, unseen))
            await server.until(lambda: len(server.requests) >= 40)
            os.kill(children()[1], signal.SIGKILL)
            window = await asyncio.wait_for(running, 10)
            assert window.ending == "failed"
            assert "killed by signal 9" in (window.note or "")
            assert "generator process" in (window.note or "")
            assert len(children()) == 1  # the other one lives, and is closed down now
    run(test())
    assert not children()
    records = kept(tmp_path)
    assert {r.shard for r in records} == {0, 1}
    assert len(records) >= 30
    verdict = judge.judge(leg(Closed(concurrency=4), measure_s=30), _the_window(tmp_path), records,
                          ServerSigns(), MIX, Criteria())
    assert verdict.measurement == "INVALID"
    failed = [f for f in verdict.findings if f.rule == "generator-failed"]
    assert len(failed) == 1
    assert "killed by signal 9" in failed[0].says
    assert validity.verdict(failed) == "INVALID"


def test_a_leg_on_a_shard_that_died_before_fails_instead_of_hanging(tmp_path: Path) -> None:
    async def test() -> None:
        async with (RawServer(lambda _: slow()) as server,
                    shards(tmp_path, server, 2) as both):
            await both.run(leg(Closed(concurrency=2), n=4), nobody_died, unseen)
            victim = children()[0]
            os.kill(victim, signal.SIGKILL)
            while lives(victim):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.3)
            try:
                window = await asyncio.wait_for(
                    both.run(leg(Closed(concurrency=2), n=4, name="two"), nobody_died, unseen), 8)
            except GeneratorError as e:
                assert "signal 9" in str(e)  # noqa: PT017
            else:
                assert window.ending == "failed"
                assert "signal 9" in (window.note or "")
    run(test())


def test_a_server_that_dies_ends_the_leg_with_its_cause(tmp_path: Path) -> None:
    async def test() -> None:
        dead: list[str] = []

        async def died() -> str | None:
            return dead[0] if dead else None

        async with (RawServer(lambda _: slow()) as server,
                    shards(tmp_path, server, 2) as both):
            running = asyncio.create_task(
                both.run(leg(Closed(concurrency=4), measure_s=30), died, unseen))
            await server.until(lambda: len(server.requests) >= 20)
            dead.append("CUDA out of memory")
            window = await asyncio.wait_for(running, 10)
            assert (window.ending, window.note) == ("server_died", "CUDA out of memory")
    run(test())
    assert kept(tmp_path)


# --------------------------------------------------------------------------------- a parent's end


@contextlib.contextmanager
def parent(folder: Path, url: str, processes: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own that runs a long leg on shards."""
    script = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from tests.test_shard import *

async def main():
    made = Shards(RunFolder.create(Path({str(folder)!r}), manifest()), "r", MIX,
                  Target({url!r}, "m"), RATIOS, {processes})
    async with made:
        window = await made.run(leg(Closed(concurrency=4), measure_s=120), nobody_died, unseen)
        print(window.ending, window.note, flush=True)

asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE,
                               process_group=0)
    watchdog = threading.Timer(35, process.kill)  # a read from it must come back
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if process.stdout is not None:
            process.stdout.close()
        process.wait()


def test_shards_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    async def test() -> None:
        async with RawServer(lambda _: slow()) as server:
            with parent(tmp_path, server.url, 2) as above:
                await server.until(lambda: len(server.requests) >= 40, 20)
                pids = children(above.pid)
                assert len(pids) == 2
                above.kill()
                assert await asyncio.to_thread(gone, pids, 5)
                sent = len(server.requests)
                await asyncio.sleep(0.3)
                assert len(server.requests) == sent
    run(test())
    assert len(kept(tmp_path)) >= 30


@pytest.mark.slow
def test_shards_of_a_stopped_parent_stop_their_load(tmp_path: Path) -> None:
    async def test() -> None:
        async with RawServer(lambda _: slow()) as server:
            with parent(tmp_path, server.url) as above:
                await server.until(lambda: len(server.requests) >= 40, 20)
                pids = children(above.pid)
                above.send_signal(signal.SIGSTOP)
                await asyncio.sleep(LEASE_S + 4)
                sent = len(server.requests)
                await asyncio.sleep(0.5)
                assert len(server.requests) == sent
                assert server.inflight == 0
                above.send_signal(signal.SIGCONT)
                assert above.stdout is not None
                said = (await asyncio.to_thread(above.stdout.read)).decode()
                assert said.startswith("failed")
                assert "lease" in said
                assert await asyncio.to_thread(gone, pids, 5)
    run(test())
    assert len(kept(tmp_path)) >= 40


@pytest.fixture
def shard_process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A shard that this test is the parent of, its lease cut to a second; it waits for Setup."""
    script = "from loadgen import shard; shard.LEASE_S = 1.0; shard.main()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          process_group=0) as process:
        watchdog = threading.Timer(20, process.kill)  # a read from it must come back
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def _tell(process: subprocess.Popen[bytes], message: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(to_plain(message)).encode() + b"\n")
    process.stdin.flush()


def _setup(tmp_path: Path, url: str) -> Setup:
    return Setup(run="r", journal=str(tmp_path / "records-0.jsonl"), shard=0, of=1,
                 scenario=to_plain(MIX), target=Target(url, "m"), ratios=RATIOS,
                 parent_pid=os.getpid())


def _frames(process: subprocess.Popen[bytes], last: str) -> list[Frame]:
    """Frames up to one of kind `last`."""
    assert process.stdout is not None
    found: list[Frame] = []
    while not found or found[-1].kind != last:
        line = process.stdout.readline()
        assert line, "the shard ended"
        raw = json.loads(line)
        found.append(Frame(**raw))
    return found


def test_a_shard_without_a_lease_gives_the_leg_up_and_says_so(
        tmp_path: Path, shard_process: subprocess.Popen[bytes]) -> None:
    async def test() -> None:
        async with RawServer(lambda _: slow()) as server:
            _tell(shard_process, _setup(tmp_path, server.url))
            await asyncio.to_thread(_frames, shard_process, "ready")
            _tell(shard_process, Command("leg", leg(Closed(concurrency=2), measure_s=60),
                                         now_ns()))
            frames = await asyncio.to_thread(_frames, shard_process, "ended")
            assert "lease" in (frames[-1].failed or "")
            await server.until(lambda: server.inflight == 0)
            assert frames[-1].done == len(server.requests) > 0
    run(test())
    records = kept(tmp_path)
    assert {r.outcome for r in records} <= {Outcome.OK, Outcome.CANCELLED}
    assert sum(r.outcome is Outcome.OK for r in records) > 10


def test_a_lease_in_time_keeps_the_leg_going(
        tmp_path: Path, shard_process: subprocess.Popen[bytes]) -> None:
    async def test() -> None:
        async with RawServer(lambda _: slow()) as server:
            _tell(shard_process, _setup(tmp_path, server.url))
            await asyncio.to_thread(_frames, shard_process, "ready")
            _tell(shard_process, Command("leg", leg(Closed(concurrency=2), measure_s=60),
                                         now_ns()))
            for _ in range(10):
                await asyncio.sleep(0.3)
                _tell(shard_process, Command("lease"))
            _tell(shard_process, Command("cancel"))
            frames = await asyncio.to_thread(_frames, shard_process, "ended")
            assert frames[-1].failed is None
            assert (frames[-1].t_ns - frames[0].t_ns) / S > 2
    run(test())


def test_a_shard_whose_stdin_closes_ends_and_keeps_its_records(
        tmp_path: Path, shard_process: subprocess.Popen[bytes]) -> None:
    async def test() -> None:
        async with RawServer(lambda _: [HEAD + token(), asyncio.Event()]) as server:
            _tell(shard_process, _setup(tmp_path, server.url))
            await asyncio.to_thread(_frames, shard_process, "ready")
            _tell(shard_process, Command("leg", leg(Closed(concurrency=3), measure_s=60),
                                         now_ns()))
            await server.until(lambda: server.inflight == 3)
            assert shard_process.stdin is not None
            shard_process.stdin.close()
            assert await asyncio.to_thread(shard_process.wait, 5) == 0
    run(test())
    assert [r.outcome for r in kept(tmp_path)] == [Outcome.CANCELLED] * 3


def test_a_shard_whose_parent_is_another_sends_nothing(
        tmp_path: Path, shard_process: subprocess.Popen[bytes]) -> None:
    setup = _setup(tmp_path, "http://127.0.0.1:9")
    plain = {**to_plain(setup), "parent_pid": 1}
    assert shard_process.stdin is not None
    shard_process.stdin.write(json.dumps(plain).encode() + b"\n")
    shard_process.stdin.flush()
    assert shard_process.wait(10) == 70
    assert not (tmp_path / "records-0.jsonl").exists()


# ----------------------------------------------------------------------------------- a full disk


def test_a_disk_that_fills_ends_the_leg_with_the_stores_words(tmp_path: Path) -> None:
    async def test() -> None:
        async with (RawServer(lambda _: slow()) as server,
                    shards(tmp_path, server) as one):
            resource.prlimit(children()[0], resource.RLIMIT_FSIZE, (5000, 5000))
            window = await asyncio.wait_for(
                one.run(leg(Closed(concurrency=3), measure_s=60), nobody_died, unseen), 15)
            assert window.ending == "failed"
            said = window.note or ""
            assert "records-0.jsonl" in said
            assert "disk full" in said or "File too large" in said
            assert "Traceback" not in said
            assert "Error" not in said
            assert "records so far are kept" in said
    run(test())
    folder = RunFolder(tmp_path)
    records = list(folder.records())
    assert len(records) >= 5
    assert {r.outcome for r in records} == {Outcome.OK}
    assert folder.torn <= 1
    verdict = judge.judge(leg(Closed(concurrency=3), measure_s=60), _the_window(tmp_path), records,
                          ServerSigns(), MIX, Criteria())
    assert verdict.measurement == "INVALID"


def test_a_disk_that_is_full_from_the_start_says_so_without_a_traceback(
        tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        (tmp_path / "records-0.jsonl").symlink_to("/dev/full")
        async with RawServer(lambda _: slow()) as server:
            with pytest.raises(Exception, match="No space left on device"):
                async with shards(tmp_path, server):
                    pass
    run(test())
    assert "Traceback" not in capfd.readouterr().err
    assert not children()


def test_a_full_disk_for_the_legs_journal_ends_without_a_shard_left(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "legs.jsonl").symlink_to("/dev/full")
        async with RawServer(lambda _: slow()) as server:
            with pytest.raises(Exception, match="No space left on device"):
                async with shards(tmp_path, server) as one:
                    await one.run(leg(Closed(concurrency=1), n=3), nobody_died, unseen)
    run(test())
    assert not children()


def test_a_torn_last_line_is_passed_over_and_the_next_record_is_whole(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, manifest())
    journal = folder.legs_journal()
    journal.append(LegLine(leg=leg(Closed(concurrency=1), n=1)))
    journal.close()
    with (tmp_path / "legs.jsonl").open("ab") as f:
        f.write(b'{"leg": {"id": "half')
    journal = folder.legs_journal()
    journal.append(LegLine(leg=leg(Closed(concurrency=1), n=1, name="two")))
    journal.close()
    assert [x.id for x, _ in folder.legs()] == ["l", "two"]
    assert folder.torn == 1
