"""The generator is brought to its limits by force: each time the rule that is meant for it fires,
and nothing of it is told as the server's fault."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadgen import cli
from loadgen.judge import is_due, sample_of
from loadgen.leg import Health
from loadgen.pulse import waits
from loadgen.record import Outcome
from loadgen.store import RunFolder
from loadgen.validity import GC_PAUSE_S
from tests import real
from tests.real import Said, assert_is_suspect, loadgen, rules, start, verdict, wait

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nobody_is_left")]
S = 1_000_000_000
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({0}, {0}))
from loadgen.cli import entry
entry(sys.argv[1:])
"""
HOOKED = """
import asyncio, sys
real = asyncio.create_subprocess_exec
def hooked(program, *words, **how):
    if words[:2] == ("-m", "loadgen.shard"):
        words = ("-c", {0!r} + "from loadgen import shard; shard.main()")
    return real(program, *words, **how)
asyncio.create_subprocess_exec = hooked
from loadgen.cli import entry
entry(sys.argv[1:])
"""  # with something done to each generator process before it begins
SMALL_READS = """
from loadgen import connection
connection.READ_BYTES = 256
"""
KEEPS = """
import gc
from loadgen import record
gc.disable = gc.freeze = lambda: None  # as in a generator that leaves the collector on, and …
kept, end = [[] for _ in range(100_000)], record.Recorder.end
def keeping(self, *what):  # … keeps what it parsed
    kept.extend([] for _ in range(1000))
    return end(self, *what)
record.Recorder.end = keeping
"""
SMALL_BUFFERS = """
import socket
from loadgen import client
connect = client.connect
async def small(*where):
    sock, tls = await connect(*where)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return sock, tls
client.connect = small
"""


def scripted(script: str, *args: str, cwd: Path) -> Said:
    """`loadgen` with something done to it before."""
    done = subprocess.run([sys.executable, "-c", script, *args], cwd=cwd, text=True, timeout=60,
                          stdin=subprocess.DEVNULL, capture_output=True, process_group=0,
                          check=False, env={**os.environ, "COLUMNS": "300"})
    return Said(done.returncode, done.stdout, done.stderr)


def assert_the_generator_was_the_limit(said: Said, folder: Path) -> None:
    assert said.code == cli.INVALID, said.all
    assert "Traceback" not in said.all
    assert verdict(folder) == ("UNRESOLVED", "INVALID")
    assert "the load generator was the limit, not the server" in said.out
    assert "Not met" not in said.out


def health_of(folder: Path) -> Health:
    """What the one generator process measured of itself."""
    window = RunFolder(folder).legs()[0][1]
    assert window is not None
    [health] = window.shards
    return health


@contextlib.contextmanager
def busy(core: int, loops: int) -> Iterator[None]:
    """Processes that want this core for themselves."""
    script = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    with contextlib.ExitStack() as stack:
        for _ in range(loops):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", script]))
            stack.callback(process.kill)
        yield


def test_a_generator_that_was_stopped_for_a_while_voids_what_lived_through_it(
        tmp_path: Path) -> None:
    with start("run", "smoke", "--concurrency", "4", "--duration", "8s", "--warmup", "0.5s",
               "--out", "r", "--slo", "ttft=1500ms", "--no-report", *real.FAST,
               cwd=tmp_path) as process:
        wait(real.running(tmp_path / "r", 150))
        shard = real.pid_of(tmp_path, "loadgen.shard")
        os.kill(shard, signal.SIGSTOP)
        time.sleep(2)
        os.kill(shard, signal.SIGCONT)
        said = real.over(process)
    folder, found = tmp_path / "r", rules(tmp_path / "r")
    assert found["host-stall"] in ("SUSPECT", "INVALID")
    assert verdict(folder)[0] != "UNSAFE", said.all
    assert said.code == (cli.INVALID if "INVALID" in found.values() else cli.PASS), said.all
    window, records = RunFolder(folder).legs()[0][1], real.kept(folder)
    assert window is not None
    assert max(b - a for a, b in window.stalls) > 1.7 * S
    due = [r for r in records if is_due(window, r)]
    sample = sample_of(window, records)
    assert len(sample) > 50
    assert len(due) - len(sample) >= 4  # what was in flight in the four slots
    assert not any(r.due_ns < b and r.end_ns > a for r in sample for a, b in window.stalls)


@pytest.mark.skipif(waits() is None, reason="this kernel tells nobody who waits for a core")
def test_a_core_that_others_use_is_no_limit_of_the_servers(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    with start("run", "smoke", "--concurrency", "64", "--duration", "5s", "--out", "r",
               "--no-report", *real.FAST, cwd=tmp_path) as process:
        wait(lambda: any("loadgen.shard" in x for x in real.processes_in(tmp_path).values()))
        os.sched_setaffinity(real.pid_of(tmp_path, "loadgen.shard"), {core})
        with busy(core, 4):
            said = real.over(process, 60)
    assert "run-queue" in rules(tmp_path / "r"), said.all
    assert_the_generator_was_the_limit(said, tmp_path / "r")


def test_a_limit_of_64_descriptors_is_the_generators(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with real.a_simulator(tmp_path / "elsewhere", "--speed", "10") as (_, url):
        wait(lambda: real.reaches(url))
        said = scripted(LIMITED.format(64), "run", "smoke", "--concurrency", "128", "--duration",
                        "2s", "--out", "r", "--no-report", "--base-url", url, cwd=tmp_path)
    assert_the_generator_was_the_limit(said, tmp_path / "r")
    found = rules(tmp_path / "r")
    assert found["dropped"] == "INVALID"
    assert found["fd-limit"] == "SUSPECT"
    assert "Too many open files" in said.out
    records = real.kept(tmp_path / "r")
    window = RunFolder(tmp_path / "r").legs()[0][1]
    assert window is not None
    assert len(records) == window.records
    assert sum(r.outcome is Outcome.OK for r in records) > 50
    assert sum(r.outcome is Outcome.DROPPED for r in records) > 50
    assert sorted(r.seq for r in records) == list(range(len(records)))


def test_a_rate_that_one_core_cannot_send_is_no_limit_of_the_servers(tmp_path: Path) -> None:
    said = loadgen("run", "smoke", "--rate", "20000", "--duration", "2s", "--out", "r",
                   "--no-report", "--", "--speed", "50", cwd=tmp_path, timeout=60)
    assert_the_generator_was_the_limit(said, tmp_path / "r")
    assert rules(tmp_path / "r")["achieved-rate"] == "INVALID"
    assert len(real.kept(tmp_path / "r")) > 500


def test_a_read_buffer_that_is_too_small_is_told(tmp_path: Path) -> None:
    said = scripted(HOOKED.format(SMALL_READS), "run", "smoke", "--duration", "3s", "--out", "r",
                    "--no-report", *real.FAST, cwd=tmp_path)
    assert "read-behind" in rules(tmp_path / "r"), said.all
    assert_the_generator_was_the_limit(said, tmp_path / "r")


def test_a_collector_that_is_left_on_is_told(tmp_path: Path) -> None:
    said = scripted(HOOKED.format(KEEPS), "run", "smoke", "--concurrency", "4", "--duration", "4s",
                    "--out", "r", "--no-report", *real.FAST, cwd=tmp_path)
    says = assert_is_suspect(said, tmp_path / "r", "gc-pauses")
    health = health_of(tmp_path / "r")
    assert health.gc_pause_s > 0.04
    assert health.gc_pause_max_s > GC_PAUSE_S
    assert says == (
        f"Python's garbage collector held generator process 0 up for {health.gc_pause_s:.2f} s in "
        f"all, {1000 * health.gc_pause_max_s:.0f} ms at a time")


def test_a_small_receive_buffer_is_told(tmp_path: Path) -> None:
    said = scripted(HOOKED.format(SMALL_BUFFERS), "run", "smoke", "--duration", "3s", "--out", "r",
                    "--no-report", *real.FAST, cwd=tmp_path)
    says = assert_is_suspect(said, tmp_path / "r", "receive-buffer")
    size = health_of(tmp_path / "r").rcvbuf_bytes
    assert size is not None
    assert 4096 <= size < 16_384  # the kernel doubles what it is asked for
    assert f"a connection's receive buffer was {size} bytes" in says


def test_a_run_as_it_should_be_fires_neither(tmp_path: Path) -> None:
    """The test's test: what is done to the generator makes the difference."""
    said = loadgen("run", "smoke", "--concurrency", "8", "--duration", "3s", "--out", "r",
                   "--no-report", *real.FAST, cwd=tmp_path)
    assert said.code in (cli.PASS, cli.INVALID), said.all
    assert not {"gc-pauses", "receive-buffer"} & set(rules(tmp_path / "r"))
    assert health_of(tmp_path / "r").gc_pause_s == 0


def test_somebody_elses_load_is_told(tmp_path: Path) -> None:
    """Two runs on one server: each sees that it is not alone."""
    (tmp_path / "elsewhere").mkdir()

    async def both(url: str) -> list[Said]:
        return await asyncio.gather(*(asyncio.to_thread(
            loadgen, "run", "smoke", "--concurrency", "4", "--duration", "6s", "--out", name,
            "--no-report", "--base-url", url, cwd=tmp_path, timeout=60) for name in "ab"))

    with real.a_simulator(tmp_path / "elsewhere", "--speed", "10") as (_, url):
        wait(lambda: real.reaches(url))
        said = asyncio.run(both(url))
    for name, one in zip("ab", said, strict=True):
        assert rules(tmp_path / name)["foreign-load"] == "INVALID", one.all
        assert one.code == cli.INVALID
        assert verdict(tmp_path / name) == ("UNRESOLVED", "INVALID")
        assert "somebody else loads it" in one.out
