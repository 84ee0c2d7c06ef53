"""A server under test, behind four methods; and the process that most kinds of it are."""

import collections
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from loadgen.errors import ServerError
from loadgen.target import Target

STOP_S = 10.0
_CAUSES = (  # what names the cause of a death, best first; EngineDeadError names none
    r"out of memory", r"address already in use", r"^(?!.*(EngineDead|stack trace)).*error",
    r"refused|cannot|invalid")


class Server(Protocol):
    """A system under test. `start` returns when it is started, not when it can serve: only a
    streamed answer proves that, and whoever started it asks for one while `alive()` is None."""

    def start(self) -> Target: ...

    def alive(self) -> str | None:
        """None; or, in words, how it died. Cheap: asked twice a second."""

    def facts(self) -> dict[str, Any]:
        """What the manifest should say of it; without secrets."""

    def stop(self) -> None:
        """Idempotent; leaves no process behind."""


class ServerProcess:
    """A child in a process group of its own (never a session: a vLLM in its own session starves
    its client on few cores), stdin closed, output in a log file."""

    def __init__(self, command: Sequence[str], log: Path,
                 env: dict[str, str] | None = None) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                    process_group=0, env={**os.environ, **(env or {})})
            except OSError as e:
                raise ServerError(f"cannot start {command[0]}: {e.strerror}") from e

    @property
    def pid(self) -> int:
        return self._process.pid

    def died(self) -> str | None:
        """None while it runs; else its exit and the last meaningful line of its log."""
        code = self._process.poll()
        if code is None:
            return None
        how = f"killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return f"its process {how}; log: {self.last_words()}"

    def last_words(self) -> str:
        """The line of the log that most likely names the cause."""
        lines = self.tail(200)
        for pattern in _CAUSES:
            if found := [x for x in lines if re.search(pattern, x, re.IGNORECASE)]:
                return found[-1].strip()[:300]
        return (lines or ["(empty)"])[-1].strip()[:300]

    def tail(self, n: int) -> list[str]:
        with self._log.open(encoding="utf-8", errors="replace") as f:
            return [x.rstrip("\n") for x in collections.deque(f, maxlen=n) if x.strip()]

    def stop(self) -> None:
        """SIGTERM to the group, SIGKILL to what is left of it after ten seconds."""
        for sig, wait_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            try:
                os.killpg(self._process.pid, sig)
            except ProcessLookupError:
                break
            if self._gone(wait_s):
                break
        self._process.wait()

    def _gone(self, wait_s: float) -> bool:
        """Waits until nobody of the group is left."""
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            self._process.poll()
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.02)
        return False


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
