"""Runs a command so that nothing of it outlives whoever started it:

    python -m servers.guard FD COMMAND…

FD is the reading end of a pipe whose other end only the starter has: it closes when the starter
is gone, however it went and whichever of its threads had started us (a parent-death signal is
tied to that thread). Orphans of the command become the guard's children, whatever session they
are in. When the starter is gone, on SIGTERM, or when the command itself has ended (a vLLM whose
API server was killed leaves its EngineCore and Workers behind), everything below is ended: by
SIGTERM, then by SIGKILL. The guard ends with the command's exit status.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

import psutil

from servers.processes import POLL_S, alive, below, send

PR_SET_CHILD_SUBREAPER = 36
TICK_S = 0.1
STOP_S, REST_S = 6.0, 2.0  # from SIGTERM to SIGKILL; of what is left when the command has ended
SWEEP_S = 2.0  # in which Python's resource trackers remove the shared memory of the killed; all
# together is less than whoever stops the guard waits for it
NOT_STARTED = 127


class _Guard:
    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._told = False
        self._status: int | None = None  # of the command, as waitpid gives it
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(sig, self._tell)

    def _tell(self, _sig: int, _frame: FrameType | None) -> None:
        self._told = True

    def run(self, command: list[str]) -> int:
        """Until the command and all below it have ended; its status."""
        pid = os.posix_spawnp(  # the pipe is not inherited; what Python ignores is not ignored
            command[0], command, os.environ, setsigdef=(signal.SIGPIPE, signal.SIGXFSZ))
        while self._status is None and not self._told:
            if select.select([self._pipe], [], [], TICK_S)[0]:
                break
            self._reap(pid)
        self._end(pid, signal.SIGTERM, STOP_S if self._status is None else REST_S)
        self._end(pid, signal.SIGKILL, SWEEP_S, spare=is_tracker)
        self._end(pid, signal.SIGKILL, STOP_S)
        return self._status or 0

    def _end(self, pid: int, sig: int, wait_s: float,
             spare: Callable[[psutil.Process], bool] = lambda p: False) -> None:
        """Signals all below but those to spare, and waits until nobody is left."""
        until = time.monotonic() + wait_s
        send([p for p in alive(below(os.getpid())) if not spare(p)], sig)
        while alive(below(os.getpid())) and time.monotonic() < until:
            self._reap(pid)
            time.sleep(POLL_S)
        self._reap(pid)

    def _reap(self, pid: int) -> None:
        """Takes the exit statuses of the command and of orphans."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == pid:
                    self._status = ended[1]


def is_tracker(process: psutil.Process) -> bool:
    """Whether it is multiprocessing's janitor, which ends when those that it cleans up after
    have."""
    try:
        return any("resource_tracker" in x for x in process.cmdline())
    except psutil.Error:
        return False


def main(argv: list[str]) -> int:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    pipe, command = int(argv[0]), argv[1:]
    os.set_inheritable(pipe, False)
    try:
        status = _Guard(pipe).run(command)
    except OSError as e:
        print(f"error: cannot start {command[0]}: {e.strerror}", flush=True)
        return NOT_STARTED
    if os.WIFSIGNALED(status):  # ends as the command did
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if (sig := os.WTERMSIG(status)) in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(sig, signal.SIG_DFL)
        os.kill(os.getpid(), sig)
    return os.WEXITSTATUS(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
