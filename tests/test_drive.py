"""One leg in one process: starts on time, slots that stay full, ends that lose nothing."""

import asyncio
import errno
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from loadgen import metrics, net, plan, prompts, scenario
from loadgen.client import Client
from loadgen.connection import Connection
from loadgen.drive import LegRun, Work
from loadgen.errors import StoreError
from loadgen.leg import Leg
from loadgen.net import now_ns
from loadgen.record import Outcome, Recorder, RequestRecord
from loadgen.scenario import Closed, Load, Open, PerSecond, Scenario, Trace
from loadgen.store import Journal, RunFolder
from loadgen.target import Target
from tests.raw_server import DONE, HEAD, HOLD, LAST, RawServer, Script, good, token

S = 1_000_000_000
MIX = scenario.parse({
    "name": "t", "slo": {"ttft": "20s"},
    "timeouts": {"first_token": "15s", "stall": "15s", "total": "30s"},
    "classes": [{"name": n, "kind": "chat", "prompt_tokens": 32, "output_tokens": 3}
                for n in ("a", "b")]}, "test")


def leg(load: Load, warmup_s: float = 0.0, measure_s: float | None = None,
        n: int | None = None) -> Leg:
    return Leg(id="l", axis="concurrency", value=1.0, phase="ladder", replicate=0, seed=7,
               load=load, warmup_s=warmup_s, measure_s=measure_s, num_sessions=n)


def constant(rate: float, max_inflight: int = 4096) -> Open:
    return Open(rate_rps=PerSecond(rate), arrivals="constant", max_inflight=max_inflight)


@asynccontextmanager
async def working(tmp_path: Path, url: str, shard: int = 0, of: int = 1,
                  mix: Scenario = MIX) -> AsyncIterator[Work]:
    ratios = {c.name: prompts.guess(c) for c in mix.classes}
    async with Client(Target(url, "m"), mix) as client:
        journal = Journal(tmp_path / f"records-{shard}.jsonl")
        try:
            yield Work(mix, {c.name: mix.slo_of(c.name) for c in mix.classes}, ratios, client,
                       journal, shard, of, itertools.count())
        finally:
            journal.close()


def soon(after_s: float = 0.2) -> int:
    return now_ns() + round(after_s * S)


def kept(tmp_path: Path) -> list[RequestRecord]:
    """What the journals hold, in the order of due instants."""
    records = sorted(RunFolder(tmp_path).records(), key=lambda r: (r.due_ns, r.session))
    for shard in {r.shard for r in records}:
        seqs = sorted(r.seq for r in records if r.shard == shard)
        assert seqs == list(range(len(seqs))), "a number is missing: a record was lost"
    return records


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test, 40)

    with asyncio.Runner(loop_factory=net.new_loop) as runner:
        runner.run(limited())


def flown(tmp_path: Path, what: Leg, script: Callable[[int], Script],
          act: Callable[[LegRun, RawServer], Coroutine[Any, Any, None]] | None = None,
          get: Script | None = None,
          mix: Scenario = MIX) -> tuple[list[RequestRecord], LegRun, RawServer]:
    """Runs a leg to its end; `act` does something to it meanwhile."""
    found: list[tuple[LegRun, RawServer]] = []

    async def test() -> None:
        async with RawServer(script, get) as server, working(
                tmp_path, server.url, mix=mix) as work:
            running = LegRun(work, what, soon())
            found.append((running, server))
            acting = asyncio.create_task(act(running, server)) if act else None
            await running.run()
            if acting:
                await acting
            assert work.client.inflight == 0
    run(test())
    records = kept(tmp_path)
    assert found[0][0].done == len(records)
    assert sum(found[0][0].outcomes.values()) == len(records)
    return records, *found[0]


async def until(seen: Callable[[], bool]) -> None:
    while not seen():  # noqa: ASYNC110 (there is no event for a leg's state)
        await asyncio.sleep(0.005)


# ------------------------------------------------------------------------------- the closed loop


def test_a_closed_loop_holds_exactly_n_in_flight(tmp_path: Path) -> None:
    seen: list[int] = []

    async def look(running: LegRun, server: RawServer) -> None:
        await server.until(lambda: server.inflight == 8)
        for _ in range(40):
            seen.append(running.work.client.inflight)
            await asyncio.sleep(0.01)
        running.stop()

    records, _, server = flown(tmp_path, leg(Closed(concurrency=8)),
                               lambda _: [HEAD + token(), 0.03, *good()[1:]], look)
    assert server.most_inflight == 8
    # a slot is empty only from the end of an answer to the send of the next
    assert Counter(seen).most_common(1)[0][0] == 8
    assert max(seen) == 8
    assert max(r.inflight or 0 for r in records) == 8
    assert {r.outcome for r in records} == {Outcome.OK}
    assert [r.session for r in sorted(records, key=lambda r: r.session)] == list(
        range(len(records)))


def test_a_slots_next_request_is_due_when_the_last_one_has_ended(tmp_path: Path) -> None:
    records, _, _ = flown(tmp_path, leg(Closed(concurrency=1), n=6), lambda _: good())
    for before, after in itertools.pairwise(records):
        assert after.due_ns >= before.end_ns
        assert after.sent_ns is not None
        assert after.sent_ns >= after.due_ns
    assert len(records) == 6


def test_first_starts_are_spread_over_the_warm_up(tmp_path: Path) -> None:
    async def stop(running: LegRun, server: RawServer) -> None:
        await server.until(lambda: server.inflight == 4)
        running.cancel()

    records, running, _ = flown(tmp_path, leg(Closed(concurrency=4), warmup_s=1.0, measure_s=5),
                                lambda _: [HOLD], stop)
    dues = [(r.due_ns - running.t0_ns) / S for r in records]
    assert dues == pytest.approx([0, 0.25, 0.5, 0.75])


def test_a_failing_server_does_not_stop_the_slots(tmp_path: Path) -> None:
    records, running, _ = flown(tmp_path, leg(Closed(concurrency=3), n=12), lambda k: (
        [b"junk\r\n\r\n"] if k % 2 else good()))
    assert len(records) == 12
    assert running.outcomes[Outcome.OK] + running.outcomes[Outcome.BAD_STREAM] == 12
    assert running.outcomes[Outcome.BAD_STREAM] >= 1


@pytest.mark.parametrize("load", [Closed(concurrency=5), constant(200)])
@pytest.mark.parametrize("n", [1, 23])
def test_num_sessions_is_exact(tmp_path: Path, load: Load, n: int) -> None:
    records, running, server = flown(tmp_path, leg(load, n=n), lambda _: good())
    assert sorted(r.session for r in records) == list(range(n))
    assert len(server.requests) == n
    assert running.sampled == running.good == n
    assert not running.complete  # the plan's end ends it


def test_num_sessions_are_split_between_shards_without_a_rest(tmp_path: Path) -> None:
    """More shards than slots: a shard without a slot still holds sessions of the plan."""
    async def test() -> None:
        async with RawServer(lambda _: good()) as server:
            async with (working(tmp_path, server.url, 0, 3) as a,
                        working(tmp_path, server.url, 1, 3) as b,
                        working(tmp_path, server.url, 2, 3) as c):
                t0_ns = soon()
                legs = [LegRun(w, leg(Closed(concurrency=2), n=7), t0_ns) for w in (a, b, c)]
                await asyncio.gather(*(x.run() for x in legs))
            assert len(server.requests) == sum(x.done for x in legs)
    run(test())
    assert sorted(r.session for r in kept(tmp_path)) == list(range(7))


def test_two_shards_send_exactly_the_one_process_plan(tmp_path: Path) -> None:
    async def test(server: RawServer, of: int, folder: Path) -> None:
        async with server:
            works = [working(folder, server.url, i, of) for i in range(of)]
            entered = [await w.__aenter__() for w in works]
            t0_ns = soon()
            legs = [LegRun(w, leg(constant(100), n=30), t0_ns) for w in entered]
            await asyncio.gather(*(x.run() for x in legs))
            for w in works:
                await w.__aexit__(None, None, None)
            assert [x.t0_ns for x in legs] == [t0_ns] * of
    found = {}
    for of in (1, 2):
        server = RawServer(lambda _: good())
        (tmp_path / str(of)).mkdir()
        run(test(server, of, tmp_path / str(of)))
        records = kept(tmp_path / str(of))
        zero = records[0].due_ns
        found[of] = ([(r.session, r.cls, r.due_ns - zero) for r in records],
                     sorted(got.body for got in server.requests))
    assert found[1] == found[2]


# --------------------------------------------------------------------------------- the open loop


def test_an_open_loop_starts_at_the_planned_instants(tmp_path: Path) -> None:
    what = leg(Open(rate_rps=PerSecond(40)), n=40)
    records, running, _ = flown(tmp_path, what, lambda _: [0.4, *good()])
    planned = [s.due_s or 0.0 for s in plan.sessions(MIX, what)]
    assert [(r.due_ns - running.t0_ns) / S for r in records] == pytest.approx(planned, abs=1e-8)
    late = sorted(metrics.lateness_s(r) or 0.0 for r in records)
    assert late[0] >= 0
    assert late[len(late) // 2] < 0.1  # the server's slowness delays no start
    assert {r.outcome for r in records} == {Outcome.OK}


def test_a_trace_starts_at_its_instants(tmp_path: Path) -> None:
    due_s = (0.0, 0.1, 0.1, 0.35)
    records, running, server = flown(tmp_path, leg(Trace(due_s=due_s), measure_s=1.0),
                                     lambda _: good())
    assert [(r.due_ns - running.t0_ns) / S for r in records] == pytest.approx(due_s)
    assert [r.session for r in records] == [0, 1, 2, 3]
    assert len(server.requests) == 4
    assert running.sampled == 4


def test_late_start_counts_into_ttft(tmp_path: Path) -> None:
    """A generator that stands still makes lateness, and a TTFT from the due instant."""
    async def block(running: LegRun, _: RawServer) -> None:
        await asyncio.sleep(max(0.0, (running.t0_ns - now_ns()) / S + 0.25))
        time.sleep(0.6)  # noqa: ASYNC251 (the loop is to stand still)

    records, running, _ = flown(tmp_path, leg(constant(10), n=15), lambda _: good(), block)
    assert [(r.due_ns - running.t0_ns) / S for r in records] == pytest.approx(
        [k / 10 for k in range(15)], abs=1e-6)  # late starts move no due instant
    late = [r for r in records if 0.3 <= (r.due_ns - running.t0_ns) / S <= 0.5]
    assert len(late) >= 2
    for r in late:
        assert (metrics.lateness_s(r) or 0) > 0.2
        assert (metrics.ttft_s(r) or 0) > 0.2
        assert (metrics.ttft_s(r) or 0) == pytest.approx(
            (metrics.lateness_s(r) or 0) + (metrics.ttft_service_s(r) or 0))


def test_beyond_max_inflight_requests_are_dropped_not_queued(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def release(running: LegRun, _: RawServer) -> None:
        await until(lambda: running.outcomes[Outcome.DROPPED] == 16)
        go.set()

    records, running, server = flown(
        tmp_path, leg(constant(50, max_inflight=4), n=20),
        lambda _: [go, *good()], release)
    assert Counter(r.outcome for r in records) == {Outcome.OK: 4, Outcome.DROPPED: 16}
    assert len(server.requests) == server.most_inflight == 4
    assert sorted(r.session for r in records) == list(range(20))
    for r in records:
        if r.outcome is Outcome.DROPPED:
            assert (r.sent_ns, r.status, r.first_ns) == (None, None, None)
            assert "max_inflight of 4" in (r.error or "")
            assert r.end_ns >= r.due_ns
    assert running.sampled == 20
    assert running.good == 4


def test_a_burst_does_not_break_through_max_inflight(tmp_path: Path) -> None:
    """Instants that are due together must count each other."""
    records, _, server = flown(tmp_path, leg(Trace(due_s=(0.1,) * 10, max_inflight=4), n=10),
                               lambda _: [0.5, *good()])
    assert server.most_inflight == 4
    assert Counter(r.outcome for r in records) == {Outcome.OK: 4, Outcome.DROPPED: 6}


def test_starts_do_not_wait_for_connections_that_will_not_open(tmp_path: Path) -> None:
    """What the server does with GET /v1/models is no business of the load: starts stay on time."""
    records, _, _ = flown(tmp_path, leg(constant(10), n=5), lambda _: good(), get=[HOLD])
    late = sorted(metrics.lateness_s(r) or 0.0 for r in records)
    assert late[2] < 1.0
    assert {r.outcome for r in records} == {Outcome.OK}


# ------------------------------------------------------------------------------------- its end


@pytest.mark.parametrize("load", [Closed(concurrency=4), constant(20)])
def test_stop_ends_arrivals_and_awaits_what_is_in_flight(tmp_path: Path, load: Load) -> None:
    go = asyncio.Event()

    async def stop(running: LegRun, server: RawServer) -> None:
        await server.until(lambda: server.inflight >= 4)
        running.stop()
        running.stop()
        sent = len(server.requests)
        await asyncio.sleep(0.3)
        assert len(server.requests) == sent
        assert running.done == 0
        go.set()

    records, running, _ = flown(tmp_path, leg(load, measure_s=20),
                                lambda _: [HEAD + token(), go, *good()[1:]], stop)
    assert len(records) >= 4
    assert {r.outcome for r in records} == {Outcome.OK}
    assert running.stopped_ns is not None
    assert all(r.due_ns <= running.stopped_ns for r in records)


@pytest.mark.parametrize("load", [Closed(concurrency=4), constant(20)])
def test_cancel_ends_at_once_and_keeps_a_record_of_each_request(tmp_path: Path,
                                                                load: Load) -> None:
    async def cancel(running: LegRun, server: RawServer) -> None:
        await server.until(lambda: server.inflight >= 4)
        await asyncio.sleep(0.2)
        running.cancel()

    records, _, server = flown(tmp_path, leg(load, measure_s=20),
                               lambda _: [HEAD + token() * 2, HOLD], cancel)
    assert len(records) == len(server.requests) >= 4
    assert {r.outcome for r in records} == {Outcome.CANCELLED}
    assert sum(r.n_events == 2 for r in records) >= 4


def test_cancel_before_the_first_start_ends_the_leg(tmp_path: Path) -> None:
    async def cancel(running: LegRun, _: RawServer) -> None:
        running.cancel()

    for load in (Closed(concurrency=4), constant(20)):
        records, _, server = flown(tmp_path, leg(load, measure_s=20), lambda _: good(), cancel)
        assert (records, server.requests) == ([], [])


def test_load_is_held_until_the_last_measured_request_has_ended(tmp_path: Path) -> None:
    """One slow measured request: the other slots go on, so that it is not served by a server
    that empties."""
    go = asyncio.Event()
    window_s = 0.5
    seen: dict[str, Any] = {}

    async def watch(running: LegRun, server: RawServer) -> None:
        over_ns = running.t0_ns + round(window_s * S)
        await until(lambda: now_ns() > over_ns + S // 10)
        assert not running.complete
        before = len(server.requests)
        await server.until(lambda: len(server.requests) > before + 6)
        assert not running.complete
        seen["inflight"] = server.most_inflight
        go.set()
        await until(lambda: running.complete)
        running.cancel()

    records, running, _ = flown(
        tmp_path, leg(Closed(concurrency=3), measure_s=window_s),
        lambda k: [go, *good()] if k == 1 else [0.02, *good()], watch)
    after = [r for r in records if r.due_ns >= running.t0_ns + round(window_s * S)]
    assert len(after) > 6  # sent, but not counted
    assert running.sampled == len(records) - len(after)
    assert running.sampled == running.good
    assert seen["inflight"] == 3


def test_the_warm_up_is_not_in_the_sample(tmp_path: Path) -> None:
    async def end(running: LegRun, _: RawServer) -> None:
        await until(lambda: running.complete)
        running.cancel()

    records, running, _ = flown(tmp_path, leg(constant(20), warmup_s=0.5, measure_s=0.5),
                                lambda _: good(), end)
    inside = [r for r in records
              if running.t0_ns + S // 2 <= r.due_ns < running.t0_ns + S]
    assert len(inside) == running.sampled == 10
    assert len(records) >= 20


def test_all_that_is_due_in_the_window_is_sent_before_the_leg_is_complete(tmp_path: Path) -> None:
    """The loop stands still over the window's end: overdue starts are late, not lost."""
    async def end(running: LegRun, _: RawServer) -> None:
        await asyncio.sleep(max(0.0, (running.t0_ns - now_ns()) / S + 0.73))
        time.sleep(0.4)  # noqa: ASYNC251 (the loop is to stand still)
        await until(lambda: running.complete)
        running.cancel()

    records, running, _ = flown(tmp_path, leg(constant(20), measure_s=1.0), lambda _: good(), end)
    due = [r for r in records if r.due_ns < running.t0_ns + S]
    assert len(due) == running.sampled == 20
    assert {r.outcome for r in due} == {Outcome.OK}


def test_a_plan_that_is_behind_at_the_windows_end_is_walked_to_it(tmp_path: Path) -> None:
    """Its last start was due 0.1 s before the generator came to the first."""
    async def test() -> None:
        async with (RawServer(lambda _: good()) as server,
                    working(tmp_path, server.url) as work):
            running = LegRun(work, leg(constant(200), measure_s=0.5), now_ns() - 6 * S // 10)
            legs = asyncio.create_task(running.run())
            await until(lambda: running.complete)
            running.cancel()
            await legs
            assert running.sampled == 100
    run(test())


def test_a_slot_that_this_host_has_no_room_for_does_not_spin(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(_: Client) -> Connection:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(Client, "connection", full)

    async def test() -> None:
        async with working(tmp_path, "http://127.0.0.1:9") as work:
            running = LegRun(work, leg(Closed(concurrency=1)), now_ns())
            legs = asyncio.create_task(running.run())
            await asyncio.sleep(0.35)
            running.cancel()
            await legs
    run(test())
    records = kept(tmp_path)
    assert {r.outcome for r in records} == {Outcome.DROPPED}
    assert all(b.due_ns - a.end_ns >= S // 10 for a, b in itertools.pairwise(records))
    assert len(records) >= 2


def test_a_request_that_misses_its_limit_is_sampled_but_not_good(tmp_path: Path) -> None:
    records, running, _ = flown(tmp_path, leg(Closed(concurrency=1), n=4), lambda k: (
        good() if k % 2 else [HEAD + token() + DONE + LAST]))
    assert [r.outcome for r in records] == [Outcome.TRUNCATED, Outcome.OK] * 2
    assert (running.sampled, running.good) == (4, 2)


@pytest.mark.parametrize("load", [Closed(concurrency=3), constant(40), constant(40, 1)])
def test_a_journal_that_cannot_be_written_ends_the_leg_with_its_reason(
        tmp_path: Path, load: Load) -> None:
    async def test() -> None:
        async with RawServer(lambda k: good() if k < 3 else [HEAD + token(), 0.2, *good()[1:]]
                             ) as server, working(tmp_path, server.url) as work:
            class Full:
                """A disk with room for two records."""

                room = 2

                def append(self, record: RequestRecord) -> None:
                    if self.room == 0:
                        raise StoreError("records-0.jsonl: No space left on device")
                    self.room -= 1
                    work.journal.append(record)

            full = Work(work.scenario, work.slos, work.ratios, work.client,
                        Full(),  # type: ignore[arg-type]
                        0, 1, work.seq)
            running = LegRun(full, leg(load, measure_s=30), soon())
            await running.run()
            assert isinstance(running.error, StoreError)
            assert "No space left" in str(running.error)
    run(test())
    assert len(kept(tmp_path)) == 2


class NoRoom:
    """A journal on a full disk."""

    def append(self, record: RequestRecord) -> None:
        raise StoreError("records-0.jsonl: No space left on device")


def test_a_journal_that_cannot_be_written_ends_a_leg_with_hundreds_in_flight(
        tmp_path: Path) -> None:
    """Each that is given up then meets the same full disk, which gave up all others."""
    async def test() -> None:
        async with RawServer(lambda k: good() if k == 800 else [HEAD + token(), HOLD]
                             ) as server, working(tmp_path, server.url) as work:
            full = Work(work.scenario, work.slos, work.ratios, work.client,
                        NoRoom(),  # type: ignore[arg-type]
                        0, 1, work.seq)
            running = LegRun(full, leg(constant(1000), measure_s=30), soon())
            await running.run()
            assert str(running.error) == "records-0.jsonl: No space left on device"
            assert work.client.inflight == 0
            assert server.most_inflight > 700
    run(test())


@pytest.mark.parametrize("load", [Closed(concurrency=3), constant(40)])
def test_a_bug_in_the_making_of_a_record_ends_the_leg(
        tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> RequestRecord:
        raise RuntimeError("a bug")

    async def test() -> None:
        async with RawServer(lambda _: good()) as server, working(tmp_path, server.url) as work:
            monkeypatch.setattr(Recorder, "end", bug)
            running = LegRun(work, leg(load, measure_s=30), soon())
            await asyncio.wait_for(running.run(), 10)
            assert str(running.error) == "a bug"
            assert work.client.inflight == 0
    run(test())


def test_records_count_on_over_the_legs_of_a_process(tmp_path: Path) -> None:
    async def test() -> None:
        async with RawServer(lambda _: good()) as server, working(tmp_path, server.url) as work:
            for _ in range(2):
                await LegRun(work, leg(Closed(concurrency=2), n=5), soon()).run()
    run(test())
    assert len(kept(tmp_path)) == 10  # `kept` looks for numbers that are missing or double


def test_prompts_are_unlike_each_other_and_the_model_is_the_targets(tmp_path: Path) -> None:
    _, _, server = flown(tmp_path, leg(Closed(concurrency=3), n=30), lambda _: good())
    bodies = [got.json() for got in server.requests]
    assert len({got.body for got in server.requests}) == 30
    assert {b["model"] for b in bodies} == {"m"}
    assert {b["max_tokens"] for b in bodies} == {3}
    assert all(b["stream"] is True for b in bodies)
