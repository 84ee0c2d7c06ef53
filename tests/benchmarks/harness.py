"""Runs one client against a fresh null server and measures it: the server on core 0, the client's
whole process tree on core 1, CPU by wait4."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from servers.null import log as logs
from servers.null.log import Accuracy, Seen, Truth
from tests.benchmarks import truth
from tests.benchmarks.truth import Arrivals, Deviation, Reported
from tests.benchmarks.usage import Cpu, core_busy_s, wait

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SERVER_CORE = 0
CLIENT_CORE = 1 if (os.cpu_count() or 1) < 4 else 2  # 0 and 1 are often one core, twice
CLIENT_NICE = -10  # where allowed: what else runs here is not the subject
LATE_MS = 2.0  # p99 of the server's lateness beyond which its paced figures are doubtful
_BUSY = ("import time\nwhile True:\n a=time.monotonic()\n while time.monotonic()-a<.019: pass\n"
         " time.sleep(.001)")  # 95 %, unless its core is shared
_SCENARIO = """name = "bench"
slo = {{ ttft = "10s" }}
[[classes]]
name = "bench"
kind = "chat"
prompt_tokens = 64
output_tokens = {}
sampling = {{ ignore_eos = true }}
"""  # the same mix as in ours.py, for `loadgen run`


@dataclass(frozen=True)
class Mode:
    """What is asked of a client: `streams` slots with `each` requests of `tokens`, or, with a
    rate, streams × each requests. The pace is the server's; `busy`: beside a busy loop on the
    client's core."""

    name: str
    streams: int
    each: int
    tokens: int = 256
    ttft_ms: float = 100.0
    itl_ms: float = 20.0
    coalesce: int = 1
    rate_rps: float | None = None
    busy: bool = False
    is_paced: bool = True  # else only the cost is of interest


@dataclass(frozen=True)
class Run:
    """One client in one mode. `us_per_event`: CPU from the clock's start to the process's end, per
    SSE event; of a tool without marks (it may write a report) to the last answer, and the rest is
    `post_cpu_s`. `foreign_frac`: of the client's core, used by others meanwhile. `rss_mb` is of
    the largest of its `processes`."""

    client: str
    mode: str
    events: int
    us_per_event: float
    start_up_cpu_s: float
    post_cpu_s: float
    wall_s: float
    rss_mb: float
    foreign_frac: float
    server_late_p99_ms: float
    stalls: int
    accuracy: Accuracy | None = None
    arrivals: Arrivals | None = None
    deviation: Deviation | None = None
    processes: int | None = None  # at once, at most
    outcomes: dict[str, float] = field(default_factory=dict)

    @property
    def doubtful(self) -> bool:
        """The instrument, or the core, was not ours alone."""
        return self.server_late_p99_ms > LATE_MS or self.foreign_frac > 0.3


@dataclass(frozen=True)
class Tool:
    """How a client is started. `marks`: it says itself when its clock began and its CPU by then;
    else both are taken when the first request for the mode's tokens arrives. `pinned`: by us;
    ours pins its own child. `reads`: what it reports, from its files in {folder}; may raise
    OSError, LookupError, TypeError, ValueError."""

    name: str
    command: tuple[str, ...]  # {port}, {streams}, {each}, {n}, {tokens}, {out}, {rate}, {folder}
    marks: bool = True
    pinned: bool = True
    checkout: Path | None = None  # of loadgen, to run another than this one
    load: tuple[str, ...] = ()  # of a closed loop
    open_loop: tuple[str, ...] | None = ("--rate", "{rate}")  # of an open one; None: it has none
    env: Mapping[str, str] = field(default_factory=dict)
    codes: tuple[int, ...] = (0,)  # with which it ends well
    reads: Callable[[Path], Reported] | None = None


@contextlib.contextmanager
def on_core(core: int, niceness: int) -> Iterator[None]:
    """What is started within runs there. (A child inherits; a preexec_fn would not be safe.)"""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


@contextlib.contextmanager
def server(mode: Mode, log: Path | None, core: int = SERVER_CORE) -> Iterator[int]:
    """A null server for the mode; its port. The log is there when the context has ended."""
    words = [sys.executable, "-m", "servers.null",
             "--ttft-ms", str(mode.ttft_ms), "--itl-ms", str(mode.itl_ms),
             "--coalesce", str(mode.coalesce), "--realtime", *(("--log", str(log)) if log else ())]
    with on_core(core, 0):
        process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline().split()[1])
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


@contextlib.contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """A busy loop on the client's core, of the client's niceness."""
    if not wanted:
        yield
        return
    with on_core(CLIENT_CORE, CLIENT_NICE):
        process = subprocess.Popen([sys.executable, "-c", _BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(tool: Tool, mode: Mode) -> Run:
    """One run. Raises RuntimeError if the client fails."""
    with tempfile.TemporaryDirectory() as folder:
        log, out = Path(folder) / "truth.bin", Path(folder) / "seen.bin"
        with server(mode, log) as port, busy(mode.busy):
            said = _run(tool, mode, port, Path(folder), out)
        known = logs.load(log).of(mode.tokens)
        if not len(known.requests):
            raise RuntimeError(f"no request arrived:\n{said.text[-2000:]}")
        seen = truth.load_seen(out) if out.exists() else []
        reported = _reported(tool, Path(folder), seen)
    return _run_of(tool, mode, known, seen, said, reported)


def _reported(tool: Tool, folder: Path, seen: list[Seen]) -> Reported | None:
    if tool.reads is None:
        return truth.reported(seen)
    try:
        return tool.reads(folder)
    except (OSError, LookupError, TypeError, ValueError) as e:
        raise RuntimeError(f"its results cannot be read: {e!r}") from e


def _run_of(tool: Tool, mode: Mode, known: Truth, seen: list[Seen], said: "_Said",
            reported: Reported | None) -> Run:
    marks = truth.marks(said.text)
    usage = marks.get("usage", said.usage)
    end_s = usage["cpu_s"]
    if tool.marks:
        before_s = marks["begin"]["cpu_s"]
    else:
        before_s = said.cpu.at(int(known.requests[:, 1].min()))
        end_s = min(end_s, said.cpu.at(int(known.writes[:, 4].max()) + 50_000_000))
    paced = mode.is_paced and mode.rate_rps is None
    return Run(
        client=tool.name, mode=mode.name, events=known.events,
        us_per_event=(end_s - before_s) / max(1, known.events) * 1e6, start_up_cpu_s=before_s,
        post_cpu_s=usage["cpu_s"] - end_s, wall_s=float(np.ptp(known.writes[:, 4])) / 1e9,
        rss_mb=usage["rss_kb"] / 1024, foreign_frac=said.foreign_frac,
        server_late_p99_ms=(float(np.quantile(known.lateness_ms(), 0.99))
                            if mode.is_paced else 0.0),
        stalls=len(known.stalls),
        accuracy=logs.accuracy(known, seen) if seen and paced else None,
        arrivals=truth.arrivals(known, seen, mode.rate_rps) if mode.rate_rps else None,
        deviation=(truth.deviation(known, reported, mode.streams * mode.each)
                   if reported and mode.is_paced else None),
        processes=said.cpu.processes, outcomes=marks.get("outcomes", {}))


@dataclass(frozen=True)
class _Said:
    text: str
    usage: dict[str, float]
    cpu: Cpu
    foreign_frac: float


def _run(tool: Tool, mode: Mode, port: int, folder: Path, out: Path) -> _Said:
    """Starts the tool, waits for it, and keeps what it said and used."""
    words = {"port": port, "streams": mode.streams, "each": mode.each, "tokens": mode.tokens,
             "n": mode.streams * mode.each, "out": out, "rate": mode.rate_rps, "folder": folder}
    given = tool.command + ((tool.open_loop or ()) if mode.rate_rps else tool.load)
    command = [word.format(**words) for word in given]
    env, cwd = {**os.environ, **tool.env}, ROOT
    if tool.checkout is not None:
        env["PYTHONPATH"], cwd = str(tool.checkout), tool.checkout
    (folder / "bench.toml").write_text(_SCENARIO.format(mode.tokens))
    core_from, at = core_busy_s(CLIENT_CORE), time.monotonic()
    said = folder / "said.txt"
    with said.open("wb") as f, on_core(CLIENT_CORE if tool.pinned else SERVER_CORE, CLIENT_NICE):
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=f, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, process_group=0)
    cpu = Cpu(process.pid, not tool.marks)
    usage = wait(process)
    cpu.stop()
    text = said.read_text(errors="replace")
    if process.returncode not in tool.codes:
        raise RuntimeError(f"it ended with {process.returncode}:\n{text[-3000:]}")
    used = {"cpu_s": max(usage.ru_utime + usage.ru_stime, cpu.last_s),  # not all reap theirs
            "rss_kb": float(usage.ru_maxrss)}
    own_s = truth.marks(text).get("usage", used)["cpu_s"]
    wall_s = time.monotonic() - at
    foreign = 0.0 if mode.busy else max(0.0, core_busy_s(CLIENT_CORE) - core_from - own_s) / wall_s
    return _Said(text, used, cpu, foreign)
