"""What a process tree uses, and the end of it."""

import contextlib
import os
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import psutil

LIMIT_S = 600.0  # for one client in one mode; some tools can hang
_TICKS = os.sysconf("SC_CLK_TCK")


def wait(process: "subprocess.Popen[bytes]") -> resource.struct_rusage:
    """For its end, with its whole group: by itself, at the limit, or when we are interrupted."""
    timer = threading.Timer(LIMIT_S, _kill_group, (process.pid,))
    timer.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        timer.cancel()
        _kill_group(process.pid)
    return usage


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def core_busy_s(core: int) -> float:
    """All but idle and iowait."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith(f"cpu{core} "):
            ticks = [int(x) for x in line.split()[1:9]]
            return (sum(ticks) - ticks[3] - ticks[4]) / _TICKS
    return 0.0


class Cpu:
    """CPU of a process tree over time, looked up ten times a second; for tools that do not say
    when their clock began."""

    def __init__(self, pid: int, wanted: bool) -> None:
        self._pid, self._ended = pid, threading.Event()
        self.processes: int | None = None  # at once, at most
        self._seen: list[tuple[int, float]] = [(time.monotonic_ns(), 0.0)]
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if wanted:
            self._thread.start()

    def at(self, t_ns: int) -> float:
        times, used = zip(*self._seen, strict=True)
        return float(np.interp(t_ns, times, used))

    @property
    def last_s(self) -> float:
        return self._seen[-1][1]

    def stop(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self._seen.append((time.monotonic_ns(), max(self._seen[-1][1], self._used_s())))

    def _used_s(self) -> float:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._pid)
            used = [one.cpu_times() for one in (root, *root.children(recursive=True))]
            self.processes = max(self.processes or 0, len(used))
            return float(sum(sum(times[:4]) for times in used))  # with their ended children
        return 0.0
