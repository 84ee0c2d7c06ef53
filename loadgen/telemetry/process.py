"""The server's processes, once a second: memory, CPU, threads and descriptors of its whole tree;
and what the kernel says of having killed one for memory."""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from loadgen.store import Row

PERIOD_S = 1.0
FRONT = "APIServer"  # in the title of each where a vLLM has several, with the first one above them
_ROOT = Path("/sys/fs/cgroup")


class Tree:
    """A process and all below it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._cpu_s: dict[psutil.Process, float] = {}  # of each, at the last look
        self._looked_ns: int | None = None

    def look(self, now_ns: int) -> list[Row]:
        """None where it is gone. CPU is in cores, since the last look; it leaves out what began
        after that. Memory that processes share is counted in each of them. `front_cores`: of the
        busiest process that may answer HTTP, the first one or one that is titled so."""
        rss = threads = fds = used_s = front_s = 0.0
        cpu_s: dict[psutil.Process, float] = {}
        for p in self._processes():
            with contextlib.suppress(psutil.Error), p.oneshot():
                times = p.cpu_times()
                cpu_s[p] = times.user + times.system
                own_s = max(0.0, cpu_s[p] - self._cpu_s.get(p, cpu_s[p]))
                used_s += own_s
                if p.pid == self._pid or FRONT in p.name():
                    front_s = max(front_s, own_s)
                rss += p.memory_info().rss
                threads += p.num_threads()
                fds += p.num_fds()
        before_ns, self._looked_ns, self._cpu_s = self._looked_ns, now_ns, cpu_s
        if not cpu_s:
            return []
        found = {"processes": float(len(cpu_s)), "rss_bytes": rss, "threads": threads, "fds": fds}
        if before_ns is not None and now_ns > before_ns:
            found["cpu_cores"] = used_s / ((now_ns - before_ns) / 1e9)
            found["front_cores"] = front_s / ((now_ns - before_ns) / 1e9)
        return [Row("process", now_ns, name, value) for name, value in found.items()]

    def _processes(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._pid)
            return [root, *root.children(recursive=True)]
        except psutil.Error:
            return []


class Watch:
    """Looks in a thread of its own, which nobody waits for: /proc may hang where a process does."""

    def __init__(self, pid: int, keep: Callable[[list[Row]], None]) -> None:
        self._over = threading.Event()
        threading.Thread(target=self._run, args=(Tree(pid), keep), daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _run(self, tree: Tree, keep: Callable[[list[Row]], None]) -> None:
        while not self._over.wait(PERIOD_S):
            rows = tree.look(time.monotonic_ns())
            if not rows or self._over.is_set():
                return
            keep(rows)


class OomKills:
    """Processes that the kernel killed for memory since this was made: by the counter of our
    control group, which a server that we start shares; and by the kernel's log, where we may
    read it. A host that shows neither gives no evidence."""

    def __init__(self, events: Path | None = None, kmsg: str = "/dev/kmsg") -> None:
        self._events = events or _events_path()
        self._before = self._count()
        self._kmsg: int | None = None
        with contextlib.suppress(OSError):
            self._kmsg = os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self._kmsg, 0, os.SEEK_END)

    def says(self) -> str | None:
        """None: none, as far as can be seen."""
        now = self._count()
        if (line := self._line()) is not None:
            return f"the kernel says: {line}"
        if now is None or self._before is None or now <= self._before:
            return None
        n = now - self._before
        return (f"the kernel killed {n} process{'es' if n > 1 else ''} of this control group for "
                "memory")

    def close(self) -> None:
        if self._kmsg is not None:
            os.close(self._kmsg)
            self._kmsg = None

    def _count(self) -> int | None:
        if self._events is None:
            return None
        try:
            found = re.search(r"^oom_kill (\d+)", self._events.read_text(), re.MULTILINE)
        except OSError:
            return None
        return int(found[1]) if found else None

    def _line(self) -> str | None:
        found = None
        with contextlib.suppress(OSError):  # the last one was read; or it was overwritten
            while self._kmsg is not None:
                text = os.read(self._kmsg, 8192).decode(errors="replace")
                if not text:
                    break
                if "Killed process" in text and "emory" in text:
                    found = text.partition(";")[2].splitlines()[0][:200] or found
        return found


def _events_path() -> Path | None:
    """Of control groups in version 2 or 1, in a container or not."""
    try:
        own = Path("/proc/self/cgroup").read_text()
    except OSError:
        return None
    unified = re.search(r"^0::(.*)$", own, re.MULTILINE)
    older = re.search(r"^\d+:[^:]*\bmemory\b[^:]*:(.*)$", own, re.MULTILINE)
    candidates = []
    if unified:
        candidates += [_ROOT / unified[1].lstrip("/") / "memory.events", _ROOT / "memory.events"]
    if older:
        memory = _ROOT / "memory"
        candidates += [memory / older[1].lstrip("/") / "memory.oom_control",
                       memory / "memory.oom_control"]
    return next((path for path in candidates if path.exists()), None)
