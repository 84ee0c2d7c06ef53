"""One plan over Locust's master and workers: real processes on 127.0.0.1, and nothing is missing,
sent twice or off its instant."""

import asyncio
import csv
import os
import pickle
import resource
import shutil
import signal
from collections import Counter
from pathlib import Path

import msgspec
import pytest
import zmq

from loadgen import cli
from loadgen.record import Outcome
from loadgen.store import RunFolder
from servers.base import free_port
from tests import fleets
from tests.fleets import (
    RAMP,
    RATE,
    Proxy,
    assert_says_what_is_missing,
    fleet,
    leg_of,
    missing,
    server,
    stops_within,
    until,
    worker_of,
)
from tests.real import Said, endings, kept, over, processes_in

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nobody_is_left")]

STOP_S = 5.0  # a load whose owner died has ended


# ---------------------------------------------------------------------------------------- exactness


def assert_is_exact(folder: Path, said: Said) -> None:
    """The records are the plan, the journals are the workers', and there is a verdict (where this
    shared host was not too slow for one)."""
    value = msgspec.json.decode((folder / "fleet.json").read_bytes())
    assert value["exact"] is True
    assert value["says"] == []
    fleets.assert_is_exact(folder)
    late = said.code == cli.INVALID and "by the generator's fault" in said.all
    assert late or said.code in {cli.PASS, cli.SLO_MISSED, cli.INCONCLUSIVE}, said.all


def test_three_workers_send_one_plan_each_arrival_once(tmp_path: Path) -> None:
    """One of them has two shards, and one is behind 20 ms each way."""
    async def test() -> None:
        port = free_port()
        async with server() as raw, Proxy(port, 0.02) as slow:
            with fleet(tmp_path, raw.url, port=port, ports={2: slow.port},
                       worker_options={0: ("--shards", "2")}) as running:
                said = await asyncio.to_thread(running.over)
                assert_is_exact(tmp_path / "r", said)
                for i in range(3):
                    ended = await asyncio.to_thread(running.worker_over, i)
                    assert ended.code == 0, ended.all
            n = len(raw.requests)
        folder = tmp_path / "r"
        outcome = running.outcome
        records = kept(folder)
        assert abs(sum(r.outcome is not Outcome.DROPPED for r in records) - n) <= 40  # + probes
        assert Counter(r.shard for r in records).keys() == {0, 1, 2, 3}
        leg, window = leg_of(folder)
        assert window.ending == "done"
        assert window.to_ns - window.from_ns == round((leg.measure_s or 0) * 1e9)
        clocks = {c["worker"]: c for c in outcome["clocks"]}
        manifest = RunFolder(folder).manifest()
        assert [w.shards for w in sorted(manifest.workers, key=lambda w: w.shards)] == sorted(
            (w.shards for w in manifest.workers), key=lambda s: s)
        for clock in clocks.values():  # one host: the clocks are one
            assert abs(clock["offset_ns"]) <= clock["error_ns"]
            assert clock["pings"] >= 10
        errors = sorted(c["error_ns"] for c in clocks.values())
        assert errors[1] < 10e6
        assert 20e6 <= errors[2] < 60e6
        assert "clock is known to" in (folder / "summary.json").read_text(encoding="utf-8")
    asyncio.run(test())
    assert not list((tmp_path / "t").iterdir()), "workers keep what the master has"


def test_processes_on_one_host_need_one_command_and_no_token(tmp_path: Path) -> None:
    async def test() -> Said:
        async with server() as raw:
            process = fleets.start(
                ["--processes", "2"], "-t", "6s", "--host", raw.url, "--model", "m", "--rate",
                "40", "--scenario", "smoke", "--run-folder", "r", "--csv", "c", cwd=tmp_path,
                env={"LOADGEN_FLEET_TOKEN": ""})
            try:
                return await asyncio.to_thread(over, process, 60)
            finally:
                fleets.end(process)

    said = asyncio.run(test())
    assert_is_exact(tmp_path / "r", said)
    assert (tmp_path / "r" / "report.html").exists()
    rows = fleets_table(tmp_path / "c_stats.csv")
    shown = [r for r in kept(tmp_path / "r") if r.outcome is not Outcome.CANCELLED]
    assert rows["POST", "hello"] == rows["TTFT", "hello"] == len(shown)
    assert rows["", "Aggregated"] == len(shown)


def test_ctrl_c_in_a_terminal_is_the_master_s_to_translate(tmp_path: Path) -> None:
    """It reaches the workers, too; they go on until the master says so, and all is delivered."""
    async def test() -> Said:
        async with server() as raw:
            process = fleets.start(
                ["--processes", "2"], "-t", "60s", "--host", raw.url, "--model", "m", "--rate",
                "40", "--scenario", "smoke", "--run-folder", "r", "--no-report", cwd=tmp_path)
            try:
                folder = tmp_path / "r"
                await until(lambda: (folder / "legs.jsonl").exists() and len(kept(folder)) > 60)
                os.killpg(process.pid, signal.SIGINT)
                return await asyncio.to_thread(over, process, 60)
            finally:
                fleets.end(process)

    said = asyncio.run(test())
    assert said.code == cli.INTERRUPTED, said.all
    assert endings(tmp_path / "r") == ["interrupted"]
    value = msgspec.json.decode((tmp_path / "r" / "fleet.json").read_bytes())
    assert value["exact"] is True, value["says"]
    assert_says_what_is_missing(tmp_path / "r")


def fleets_table(path: Path) -> dict[tuple[str, str], int]:
    with path.open(encoding="utf-8", newline="") as lines:
        return {(row["Type"], row["Name"]): int(row["Request Count"])
                for row in csv.DictReader(lines)}


def test_a_ladder_s_levels_are_of_the_whole_fleet(tmp_path: Path) -> None:
    async def test() -> Said:
        async with server() as raw:
            with fleet(tmp_path, raw.url, "-u", "4", workers=2, time_s=45, rate=None,
                       file=RAMP) as running:
                said = await asyncio.to_thread(running.over)
            assert max(r.inflight or 0 for r in kept(tmp_path / "r")) <= 2  # of each shard
            assert raw.most_inflight <= 4 + 1  # + a look at the server's health
            return said

    said = asyncio.run(test())
    legs = RunFolder(tmp_path / "r").legs()
    assert [leg.value for leg, _ in legs][:3] == [1, 2, 4]
    assert all(w is not None and w.ending == "done" for _, w in legs), said.all
    assert said.code == cli.PASS, said.all
    assert "Safe up to at least 4 concurrent requests" in said.out
    assert legs[-1][0].phase == "confirm"


def test_a_worker_that_comes_late_has_no_part_in_the_test(tmp_path: Path) -> None:
    async def test() -> None:
        async with server() as raw:
            with fleet(tmp_path, raw.url, workers=2) as running:
                await until(lambda: running.n() > 20)
                late = worker_of(running.port, cwd=tmp_path)
                try:
                    said = await asyncio.to_thread(running.over)
                finally:
                    fleets.end(late)
                assert_is_exact(tmp_path / "r", said)
                assert "takes part from the next one on" in said.all
                assert len(running.outcome["spare"]) == 1
            asyncio.run(test())


# ----------------------------------------------------------------------------------------- failures


def assert_is_invalid(said: Said, folder: Path, *words: str) -> None:
    """Exit code 3; the run's note says why, the records that came are there."""
    assert said.code == cli.INVALID, said.all
    assert endings(folder) == ["failed"]
    _, window = leg_of(folder)
    assert window.note is not None
    for word in words:
        assert word in window.note, window.note
        assert word in said.all
    assert_says_what_is_missing(folder)
    assert len(kept(folder)) > 20


def test_a_killed_worker_makes_the_run_invalid_and_its_arrivals_are_named(tmp_path: Path) -> None:
    async def test() -> None:
        async with server() as raw:
            with fleet(tmp_path, raw.url, time_s=30) as running:
                await until(lambda: running.n() > 60)
                gone = running.workers[1]
                shards = running.shards_of(1)
                gone.kill()
                await until(lambda: not any(Path(f"/proc/{x}/cwd").exists() for x in shards), 2)
                await stops_within(raw, STOP_S)
                said = await asyncio.to_thread(running.over, 60)
        assert_is_invalid(said, tmp_path / "r", f":{gone.pid} has been silent", "have no record")
        mine = next(w.shards for w in RunFolder(tmp_path / "r").manifest().workers
                    if w.name.endswith(f":{gone.pid}"))
        assert missing(tmp_path / "r")
        assert {k % 3 for k in missing(tmp_path / "r")} == set(mine)
    asyncio.run(test())


def test_a_stopped_worker_s_shards_end_by_their_lease(tmp_path: Path) -> None:
    async def test() -> None:
        async with server() as raw:
            with fleet(tmp_path, raw.url, time_s=30) as running:
                await until(lambda: running.n() > 60)
                gone = running.workers[1]
                gone.send_signal(signal.SIGSTOP)
                await stops_within(raw, STOP_S)
                said = await asyncio.to_thread(running.over, 60)
                gone.send_signal(signal.SIGCONT)
                ended = await asyncio.to_thread(running.worker_over, 1, 40)
                assert ended.code == cli.INVALID, ended.all
                assert "records that were not delivered are kept in" in ended.all
        assert_is_invalid(said, tmp_path / "r", f":{gone.pid} has been silent", "have no record")
    asyncio.run(test())


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
def test_without_its_master_the_load_ends_and_the_workers_say_so(
        tmp_path: Path, sig: signal.Signals) -> None:
    async def test() -> None:
        async with server() as raw:
            with fleet(tmp_path, raw.url, time_s=40, workers=2) as running:
                await until(lambda: running.n() > 60)
                running.master.send_signal(sig)
                await stops_within(raw, STOP_S)
                for i in range(2):
                    said = await asyncio.to_thread(running.worker_over, i, 60)
                    assert said.code == cli.INVALID, said.all
                    assert "no word from the master" in said.all
                    kept_in = Path(said.all.rpartition("are kept in ")[2].split()[0])
                    assert len(kept(kept_in)) > 20
                    shutil.rmtree(kept_in)
        assert len(kept(tmp_path / "r")) > 60
    asyncio.run(test())


def test_forked_workers_end_with_their_master(tmp_path: Path) -> None:
    async def test() -> None:
        async with server() as raw:
            process = fleets.start(
                ["--processes", "2"], "-t", "60s", "--host", raw.url, "--model", "m", "--rate",
                "40", "--scenario", "smoke", "--run-folder", "r", "--no-report", cwd=tmp_path)
            try:
                folder = tmp_path / "r"
                await until(lambda: (folder / "legs.jsonl").exists() and len(kept(folder)) > 60)
                process.kill()
                await stops_within(raw, STOP_S)
                await until(lambda: not processes_in(tmp_path), 10)
            finally:
                fleets.end(process)
    asyncio.run(test())


def test_a_killed_shard_makes_the_run_invalid(tmp_path: Path) -> None:
    async def test() -> None:
        async with server() as raw:
            with fleet(tmp_path, raw.url, time_s=30) as running:
                await until(lambda: running.n() > 60)
                worker = running.workers[2]
                (shard,) = running.shards_of(2)
                os.kill(shard, signal.SIGKILL)
                await stops_within(raw, STOP_S)
                said = await asyncio.to_thread(running.over, 60)
        assert_is_invalid(said, tmp_path / "r", f":{worker.pid}", "was killed by signal 9")
    asyncio.run(test())


@pytest.mark.parametrize("way", ["frozen", "cut"])
def test_a_network_that_is_gone_for_a_moment_costs_nothing(tmp_path: Path, way: str) -> None:
    """Shorter than the leases: the load goes on meanwhile, its records come later."""
    async def test() -> None:
        port = free_port()
        async with server() as raw, Proxy(port, 0.0) as proxy:
            with fleet(tmp_path, raw.url, port=port, ports={1: proxy.port}) as running:
                await until(lambda: running.n() > 40)
                before = len(raw.requests)
                if way == "frozen":
                    proxy.freeze()
                else:
                    await proxy.cut()
                await asyncio.sleep(1.2)
                assert len(raw.requests) > before + 0.7 * RATE
                await proxy.mend()
                said = await asyncio.to_thread(running.over)
        assert_is_exact(tmp_path / "r", said)
    asyncio.run(test())


@pytest.mark.parametrize("way", ["frozen", "cut"])
def test_a_worker_that_is_cut_off_ends_its_load_and_delivers_when_it_is_back(
        tmp_path: Path, way: str) -> None:
    async def test() -> None:
        port = free_port()
        async with server() as raw, Proxy(port, 0.0) as proxy:
            with fleet(tmp_path, raw.url, port=port, ports={1: proxy.port},
                       time_s=30) as running:
                await until(lambda: running.n() > 60)
                if way == "frozen":
                    proxy.freeze()
                else:
                    await proxy.cut()
                await stops_within(raw, STOP_S, 0.5)
                await proxy.mend()
                said = await asyncio.to_thread(running.over, 60)
                ended = await asyncio.to_thread(running.worker_over, 1)
        pid = running.workers[1].pid
        assert_is_invalid(said, tmp_path / "r", f":{pid} has been silent")
        assert ended.code == cli.INVALID
        mine = next(w.shards for w in RunFolder(tmp_path / "r").manifest().workers
                    if w.name.endswith(f":{pid}"))
        assert not missing(tmp_path / "r"), "it delivered what it had sent"
        late = [r for r in kept(tmp_path / "r") if r.shard in mine]
        assert len(late) > 20
    asyncio.run(test())


def test_a_worker_s_full_disk_makes_the_run_invalid(tmp_path: Path) -> None:
    async def test() -> None:
        async with server() as raw:
            with fleet(tmp_path, raw.url, time_s=30, workers=2) as running:
                await until(lambda: running.n() > 20)
                (shard,) = running.shards_of(1)
                resource.prlimit(shard, resource.RLIMIT_FSIZE, (20_000, 20_000))
                said = await asyncio.to_thread(running.over, 60)
            assert len(raw.requests) < 30 * RATE * 0.7, "the load ended early"
        assert_is_invalid(said, tmp_path / "r", f":{running.workers[1].pid}", "(disk full?)")
    asyncio.run(test())


def test_a_server_that_dies_is_exit_4_and_no_arrival_is_missing(tmp_path: Path) -> None:
    said = over(fleets.start(
        ["--processes", "2"], "-t", "20s", "--rate", "10", "--scenario", "smoke", "--run-folder",
        "r", "--no-report", "--server-options", "--fault oom@4", cwd=tmp_path), 60)
    assert said.code == cli.DIED, said.all
    assert "CUDA out of memory" in said.all
    assert endings(tmp_path / "r") == ["server_died"]
    assert not missing(tmp_path / "r")


# ------------------------------------------------------------------------------ who may take part


def test_a_worker_of_another_version_is_refused_and_nothing_is_sent(tmp_path: Path) -> None:
    async def test() -> None:
        other = tmp_path / "other"
        shutil.copytree(fleets.ROOT / "loadgen", other / "loadgen")
        for name in ("servers", "analysis", "scenarios"):
            (other / name).symlink_to(fleets.ROOT / name)
        init = other / "loadgen" / "__init__.py"
        init.write_text(init.read_text().replace('"0.1.0"', '"0.0.9"'))
        async with server() as raw:
            with fleet(tmp_path, raw.url, workers=1, expect=2) as running:
                running.workers.append(worker_of(running.port, cwd=tmp_path, root=other))
                said = await asyncio.to_thread(running.over, 60)
                ended = await asyncio.to_thread(running.worker_over, 1)
            assert said.code == cli.INVALID, said.all
            assert "runs loadgen 0.0.9, this is 0.1.0" in said.all
            assert f":{running.workers[1].pid} is refused" in said.all
            assert ended.code == cli.INVALID, ended.all
            assert "refuses this worker" in ended.all
            probes = len(raw.requests)
            assert probes < 30, "only the master's own look at the server"
    asyncio.run(test())


def test_a_worker_of_other_sources_or_another_scenario_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        other = tmp_path / "other"
        shutil.copytree(fleets.ROOT / "loadgen", other / "loadgen")
        for name in ("servers", "analysis", "scenarios"):
            (other / name).symlink_to(fleets.ROOT / name)
        with (other / "loadgen" / "plan.py").open("a") as f:
            f.write("\n")
        async with server() as raw:
            with fleet(tmp_path, raw.url, workers=1, expect=3, worker_options={
                    0: ("--scenario", "mixed")}) as running:
                running.workers.append(worker_of(running.port, cwd=tmp_path, root=other))
                running.workers.append(worker_of(
                    running.port, "--scenario", "smoke", cwd=tmp_path))
                said = await asyncio.to_thread(running.over, 60)
        assert said.code == cli.INVALID, said.all
        assert "has other sources than this one" in said.all
        assert "its --scenario is not the master's" in said.all
        assert f":{running.workers[2].pid} is refused" not in said.all
    asyncio.run(test())


def test_without_the_token_a_worker_has_no_part_and_gets_no_plan(tmp_path: Path) -> None:
    async def test() -> None:
        async with server() as raw:
            with fleet(tmp_path, raw.url, workers=1, expect=2) as running:
                running.workers.append(fleets.start(
                    ["--worker", "--master-host", "127.0.0.1", "--master-port",
                     str(running.port)], cwd=tmp_path, env={"LOADGEN_FLEET_TOKEN": "f" * 32}))
                said = await asyncio.to_thread(running.over, 60)
                ended = await asyncio.to_thread(running.worker_over, 1)
            assert said.code == cli.INVALID, said.all
            assert "1 of 2 workers answer" in said.all
            assert "passed over" in said.all
            assert len(raw.requests) < 30
            assert not [x for x in processes_in(tmp_path).values() if "loadgen.shard" in x]
            assert ended.code == 0
    asyncio.run(test())


def test_who_can_reach_the_port_disturbs_nothing(tmp_path: Path) -> None:
    """Junk, a pickle, messages without a seal or under another worker's name, and one that is
    larger than any may be."""
    async def test() -> None:
        async with server() as raw:
            with fleet(tmp_path, raw.url, workers=2) as running:
                await until(lambda: running.n() > 20)
                await asyncio.to_thread(disturb, running.port)
                said = await asyncio.to_thread(running.over)
                assert_is_exact(tmp_path / "r", said)
                assert "are passed over" in said.all
                assert not (tmp_path / "hacked").exists()
    asyncio.run(test())


def disturb(port: int) -> None:
    class Hack:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("touch hacked",)

    pickled, encode = pickle.dumps(Hack()), msgspec.msgpack.encode
    with zmq.Context() as context:
        for nth, parts in enumerate(([b"\xc1"], [b"\xff\xfe"], [b""], [b"\x93"], [pickled],
                      [encode(("loadgen", pickled, "x"))],
                      [encode(("loadgen", {"a": 1}, "x"))],
                      [encode(("loadgen", b"x" * 2**21, "x"))],
                      [b"x" * (2**24 + 1)])):
            with context.socket(zmq.DEALER) as socket:
                socket.identity = b"stranger-%d" % nth  # Locust passes over one without a name
                socket.connect(f"tcp://127.0.0.1:{port}")
                socket.send_multipart(parts)
                socket.linger = 500


@pytest.mark.parametrize("role", ["--master", "--worker"])
def test_no_fleet_without_a_token(tmp_path: Path, role: str) -> None:
    port = "--master-bind-port" if role == "--master" else "--master-port"
    said = over(fleets.start([role, port, str(free_port())], "--rate", "1", cwd=tmp_path,
                             env={"LOADGEN_FLEET_TOKEN": ""}), 30)
    assert said.code == cli.USAGE, said.all
    assert "LOADGEN_FLEET_TOKEN" in said.all


def test_the_master_listens_on_this_host_only_unless_told(tmp_path: Path) -> None:
    async def test() -> None:
        async with server() as raw:
            with fleet(tmp_path, raw.url, workers=0, expect=1) as running:
                await until(lambda: f":{running.port:04X} " in listening())
                assert f"0100007F:{running.port:04X} " in listening()
                assert f"00000000:{running.port:04X} " not in listening()
    asyncio.run(test())


def listening() -> str:
    return Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()


def test_an_open_loop_asks_for_a_fleet_and_a_rate(tmp_path: Path) -> None:
    for options, words in (
            (["--processes", "1"], "--rate"), (["--rate", "5"], "--processes N")):
        said = over(fleets.start([], *options, "--host", "http://127.0.0.1:9",
                                        cwd=tmp_path), 60)
        assert said.code == cli.USAGE, said.all
        assert words in said.all


def test_users_with_tasks_of_their_own_are_not_sent_to_workers(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from locust import task\nfrom loadgen.fleet import LLMUser\n"
        "class Own(LLMUser):\n    @task\n    def one(self): self.ask('why?')\n")
    said = over(fleets.start(["--master", "--master-bind-port", str(free_port())],
                                    cwd=tmp_path, file=tmp_path / "own.py"), 60)
    assert said.code == cli.USAGE, said.all
    assert "tasks of their own" in said.all


def test_a_key_does_not_travel_and_must_be_the_same_on_all_hosts(tmp_path: Path) -> None:
    async def test() -> None:
        async with server() as raw:
            with fleet(tmp_path, raw.url, "--api-key", "sk-master", workers=1, worker_options={
                    0: ("--api-key", "sk-worker")}) as running:
                said = await asyncio.to_thread(running.over, 60)
            assert said.code == cli.INVALID, said.all
            assert "its API key is not the master's" in said.all
            (tmp_path / "two").mkdir()
            with fleet(tmp_path / "two", raw.url, "--api-key", "sk-same", workers=1, time_s=3,
                       worker_options={0: ("--api-key", "sk-same")}) as running:
                said = await asyncio.to_thread(running.over, 60)
                worker = await asyncio.to_thread(running.worker_over, 0)
            sent = [got for got in raw.requests if "Bearer sk-same" in got.head]
            assert len(sent) > 50
            assert "sk-same" not in said.all + worker.all
            for path in (tmp_path / "two" / "r").iterdir():
                assert b"sk-same" not in path.read_bytes(), path
    asyncio.run(test())
