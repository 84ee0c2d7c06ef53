"""A server under test, behind four methods; and the process that most kinds of it are."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from loadgen.errors import ServerError
from loadgen.target import Target
from servers import death
from servers.processes import alive, below, gone, send

STOP_S = 10.0
LOOK_S = 3.0  # between looks at what is below a server: a look costs milliseconds
TAIL_BYTES = 4 * 2**20  # of a log: after an engine's death each request in flight adds 5 KB
HEAD_BYTES = 2**20


class Server(Protocol):
    """A system under test. `start` returns when it is started, not when it can serve: only a
    streamed answer proves that, and whoever started it asks for one while `alive()` is None, for
    `patience_s` at most."""

    patience_s: float

    def start(self) -> Target: ...

    def alive(self) -> str | None:
        """None; or, in words, how it died. Cheap: asked twice a second."""

    def facts(self) -> dict[str, Any]:
        """What the manifest should say of it; without secrets."""

    def stop(self) -> None:
        """Idempotent; leaves no process behind."""


class ServerProcess:
    """A child in a process group of its own (never a session: a vLLM in its own session starves
    its client on few cores), stdin closed, output appended to a log file. `guarded`: it runs below
    `servers.guard`, which ends all of it when we are gone, even by SIGKILL."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str] | None = None,
                 guarded: bool = False) -> None:
        self._log = log
        self._pipe: int | None = None  # the guard's; closed by the kernel if we are killed
        self._seen: set[psutil.Process] = set()
        self._looked = time.monotonic()
        self._words: str | None = None
        self._stopped = False
        log.parent.mkdir(parents=True, exist_ok=True)
        ends = os.pipe() if guarded else None
        if ends is not None:
            self._pipe = ends[1]
            command = [sys.executable, "-m", "servers.guard", str(ends[0]), *command]
        with log.open("ab") as out:
            self._from = out.tell()  # what an earlier start said is not this one's
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                    process_group=0, env={**os.environ, **(env or {})},
                    pass_fds=ends[:1] if ends else ())
            except OSError as e:
                self._close_pipe()
                raise ServerError(f"cannot start {command[0]}: {e.strerror}") from e
            finally:
                if ends is not None:
                    os.close(ends[0])

    @property
    def pid(self) -> int:
        return self._process.pid

    def died(self) -> str | None:
        """None while it runs; else its exit and what its log says of the cause. vLLM's code is 0
        after an engine's death, too."""
        if (code := self._code()) is None:
            if time.monotonic() - self._looked > LOOK_S:
                self._look()
            return None
        if self._words is None:
            self._words = self.last_words()
        how = f"killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return f"its process {how}; log: {self._words}"

    def last_words(self) -> str:
        """The line of the log that names the cause of a death; else the last that says anything."""
        log = self.tail()
        return death.cause(log) or (death.context(log, most=1) or ["(empty)"])[-1]

    def tail(self, n: int | None = None) -> list[str]:
        """The last lines (`n` of them) that this process wrote."""
        with self._log.open("rb") as f:
            f.seek(max(self._from, f.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = f.read().decode(errors="replace").splitlines()
        return [x for x in lines if x.strip()][-(n or len(lines)):]

    def head(self) -> list[str]:
        """What it wrote first: how it is set up."""
        with self._log.open("rb") as f:
            f.seek(self._from)
            return f.read(HEAD_BYTES).decode(errors="replace").splitlines()

    def stop(self) -> None:
        """SIGTERM to the group, SIGKILL to what is left of it after ten seconds; and to what has
        left it. Again: nothing."""
        if self._stopped:
            return
        self._stopped = True
        self._look()
        for sig in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, sig)
            except ProcessLookupError:
                if not alive(self._seen):
                    break
            send(alive(self._seen), sig)
            if self._gone(STOP_S):
                break
        self._process.wait()
        self._close_pipe()

    def _code(self) -> int | None:
        """Its exit code, as Popen gives it. It stays a zombie until `stop`, so that its pid and
        its group's are nobody else's."""
        if self._process.returncode is not None:
            return self._process.returncode
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def _look(self) -> None:
        """Remembers what is below it now: later it may be an orphan in another group."""
        self._looked = time.monotonic()
        self._seen = set(alive(self._seen | below(self._process.pid)))

    def _gone(self, wait_s: float) -> bool:
        """Waits until nobody of the group is left, nor of those seen below it."""
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            self._process.poll()
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                return gone(self._seen, max(0.0, until - time.monotonic()))
            time.sleep(0.02)
        return False

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def option(options: Sequence[str], *names: str) -> str | None:
    """The value of `--name X` or `--name=X` among a server's options; the last one wins."""
    found = None
    for at, word in enumerate(options):
        flag, eq, value = word.partition("=")
        if flag in names:
            found = value if eq else options[at + 1] if at + 1 < len(options) else None
    return found
