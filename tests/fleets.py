"""A fleet of real processes on 127.0.0.1 for tests: Locust's master, workers beside it or behind a
TCP proxy that delays, stands still or is cut, and a server that notes when each request came."""

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec

from loadgen import plan
from loadgen.leg import Leg, Window
from loadgen.record import RequestRecord
from loadgen.store import RunFolder
from servers.base import free_port
from tests.raw_server import DONE, HEAD, LAST, ONE_MODEL, RawServer, Script, finish, token, usage
from tests.real import Said, kept, over

ROOT = Path(__file__).resolve().parent.parent
OPEN_LOOP = ROOT / "locustfiles" / "open_loop.py"
RAMP = ROOT / "locustfiles" / "ramp.py"
TOKEN = secrets.token_hex(16)
RATE = 40.0
ANSWER_S = 0.15
LIMIT_S = 100.0


def answer(tokens: int = 16) -> Script:
    """Takes ANSWER_S."""
    return [HEAD, 0.6 * ANSWER_S, token(), 0.4 * ANSWER_S,
            token() * (tokens - 1) + finish("length") + usage(tokens, 32) + DONE + LAST]


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[RawServer]:
    async with RawServer(lambda _: answer(), get=ONE_MODEL) as raw:
        yield raw


class Proxy:
    """Passes TCP on to a port, each chunk `delay_s` later. `freeze`: nothing passes, and nobody is
    told. `cut`: all connections break, and none can be made until `mend`."""

    def __init__(self, to_port: int, delay_s: float = 0.0) -> None:
        self._to, self._delay_s = to_port, delay_s
        self.port = free_port()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        await self.mend()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def mend(self) -> None:
        self._flowing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port)

    def freeze(self) -> None:
        self._flowing.clear()

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _connection(self, reader: asyncio.StreamReader,
                          writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
            self._writers.add(back)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass_on(reader, back))
                both.create_task(self._pass_on(there, writer))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                at_s, data = await late.get()
                await asyncio.sleep(at_s - time.monotonic())
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        delivering = asyncio.create_task(deliver())
        try:
            while data := await reader.read(2**16):
                late.put_nowait((time.monotonic() + self._delay_s, data))
            raise ConnectionResetError
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)


@dataclass
class Fleet:
    """Its processes; the run folder is `r` in `cwd`."""

    cwd: Path
    master: subprocess.Popen[str]
    workers: list[subprocess.Popen[str]]
    port: int
    started_s: float
    said: list[Said] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.cwd / "r"

    def n(self) -> int:
        """Records that the master has by now."""
        if not (self.folder / "legs.jsonl").exists():
            return 0
        return len(kept(self.folder))

    def over(self, within_s: float = LIMIT_S) -> Said:
        """The master's last words."""
        return over(self.master, within_s)

    def worker_over(self, i: int, within_s: float = 60) -> Said:
        return over(self.workers[i], within_s)

    def shards_of(self, i: int) -> list[int]:
        """Pids of a worker's shards."""
        children = Path(f"/proc/{self.workers[i].pid}/task/{self.workers[i].pid}/children")
        return [int(x) for x in children.read_text().split()]

    @property
    def outcome(self) -> dict[str, Any]:
        value: dict[str, Any] = msgspec.json.decode((self.folder / "fleet.json").read_bytes())
        return value


def start(role: list[str], *options: str, cwd: Path, file: Path = OPEN_LOOP,
          root: Path = ROOT, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    (cwd / "t").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "locust", "-f", str(file), "--headless", "--only-summary", *role,
         *options], cwd=cwd, text=True, process_group=0, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root), "LOADGEN_FLEET_TOKEN": TOKEN,
             "COLUMNS": "300", "TMPDIR": str(cwd / "t"), **(env or {})})


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
        process.kill()
    process.communicate()


def worker_of(port: int, *options: str, cwd: Path, **how: Any) -> subprocess.Popen[str]:
    return start(["--worker", "--master-host", "127.0.0.1", "--master-port", str(port)],
                 *options, cwd=cwd, **how)


@contextlib.contextmanager
def fleet(cwd: Path, url: str, *options: str, workers: int = 3, ports: Mapping[int, int] = {},
          time_s: float = 8.0, rate: float | None = RATE, file: Path = OPEN_LOOP,
          port: int | None = None, expect: int | None = None,
          worker_options: Mapping[int, tuple[str, ...]] = {}) -> Iterator[Fleet]:
    """`ports`: of proxies, by worker; `worker_options` likewise."""
    port = free_port() if port is None else port
    asked = [] if rate is None else ["--rate", str(rate)]
    master = start(
        ["--master", "--master-bind-port", str(port), "--expect-workers",
         str(workers if expect is None else expect)],
        "--host", url, "--scenario", "smoke", "--model", "m", "--plan-seed", "7", "--run-folder",
        "r", "-t", f"{time_s:g}s", "--no-report", *asked, *options, cwd=cwd, file=file)
    started = Fleet(cwd, master, [], port, time.monotonic())
    try:
        for i in range(workers):
            started.workers.append(worker_of(
                ports.get(i, port), *worker_options.get(i, ()), cwd=cwd, file=file))
        yield started
    finally:
        for process in (*started.workers, master):
            end(process)


async def until(seen: Callable[[], object], within_s: float = 60.0) -> None:
    by = time.monotonic() + within_s
    while not seen():
        assert time.monotonic() < by, "it did not come to that"
        await asyncio.sleep(0.05)


async def stops_within(raw: RawServer, limit_s: float, quiet_s: float = 1.5) -> float:
    """Seconds from now to the last request that came; none comes later than `limit_s`."""
    now_s = asyncio.get_running_loop().time()
    await asyncio.sleep(limit_s + quiet_s)
    last_s = max((got.at_s for got in raw.requests), default=now_s) - now_s
    assert last_s < limit_s, f"requests came until {last_s:.1f} s later"
    return last_s


def leg_of(folder: Path) -> tuple[Leg, Window]:
    (leg, window), = RunFolder(folder).legs()
    assert window is not None
    return leg, window


def planned(leg: Leg, window: Window) -> dict[int, int]:
    """Due instants of the arrivals before the window's end, by k; ns after the leg's start."""
    found: dict[int, int] = {}
    for k, due_s in enumerate(plan.arrivals(leg.load, leg.seed)):  # type: ignore[arg-type]
        if window.t0_ns + round(due_s * 1e9) >= window.to_ns:
            return found
        found[k] = round(due_s * 1e9)
    return found


def sent(folder: Path, window: Window) -> dict[int, list[RequestRecord]]:
    """Records of arrivals before the window's end, by k."""
    found: dict[int, list[RequestRecord]] = {}
    for r in kept(folder):
        if r.due_ns < window.to_ns:
            found.setdefault(r.session, []).append(r)
    return found


def missing(folder: Path) -> set[int]:
    """Arrivals that fleet.json says have no record."""
    value = msgspec.json.decode((folder / "fleet.json").read_bytes())
    return {k for e in value["entries"] for a, b in e["missing"]
            for k in range(a, b + 1, e["every"])}


def assert_is_exact(folder: Path) -> None:
    """The records are the plan: each arrival once, at its instant, by the shard whose it is."""
    leg, window = leg_of(folder)
    asked, came = planned(leg, window), sent(folder, window)
    of = RunFolder(folder).manifest().processes
    assert set(came) == set(asked)
    for k, records in came.items():
        (r,) = records
        assert r.due_ns - window.t0_ns == asked[k]
        assert r.shard == k % of


def assert_says_what_is_missing(folder: Path) -> None:
    """fleet.json names exactly the arrivals without a record (but for the last instant of a leg
    that was stopped), and what came is kept once."""
    leg, window = leg_of(folder)
    asked, came = planned(leg, window), sent(folder, window)
    assert all(len(records) == 1 for records in came.values())
    gone = {k for k in asked if k not in came}
    sure_ns = window.to_ns - 150_000_000
    if window.to_ns > window.end_ns:  # it ended in its warm-up, and collecting took a while
        sure_ns = window.end_ns - 2_000_000_000
    edge = {k for k, due_ns in asked.items() if window.t0_ns + due_ns > sure_ns}
    assert missing(folder) - edge == gone - edge
    assert missing(folder) <= gone
