"""What launched kinds of servers have in common. A kind is a command, made of the model and of
what stands after `--`, and what is known of the server once it serves; the rest is here."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from loadgen.errors import ScenarioError, ServerError
from loadgen.target import Target, without_secrets
from servers.base import ServerProcess, free_port, option

START_S = 1800.0  # weights come over networks, graphs are captured; a death is seen at once


class LaunchedServer:
    """`model`: the folder or name that is served; `options`: what stands after `--`; `instead`:
    the words of --server-cmd. Raises ScenarioError for what cannot work."""

    kind: ClassVar[str]
    patience_s = START_S

    def __init__(self, model: str | None, options: Sequence[str], log: Path,
                 instead: Sequence[str] = ()) -> None:
        if not model:
            raise ScenarioError(f"--server {self.kind}: give --model, the folder or name that it "
                                "serves")
        self.model, self._log = model, log
        self.options = without(options, "--host", "--port")
        self.env: dict[str, str] = {}
        self.host = option(options, "--host") or "127.0.0.1"
        self.port = self._port(option(options, "--port"))  # kept over restarts
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        at = f"[{reached}]" if ":" in reached else reached
        self.target = Target(f"http://{at}:{self.port}", model)
        self.command = self.words(list(instead))
        self._reached = reached
        self._process: ServerProcess | None = None
        self._facts: dict[str, Any] = {}

    def words(self, instead: list[str]) -> list[str]:
        """The command; may also set `target` and `env`. Raises ScenarioError."""
        raise NotImplementedError

    def learned(self, log: list[str]) -> dict[str, Any]:
        """What its log so far, and the server itself, tell of it; {} if it does not serve yet.
        Asked until it says something."""
        return {"log": log[-1]} if log else {}

    def start(self) -> Target:
        family = socket.AF_INET6 if ":" in self._reached else socket.AF_INET
        with socket.socket(family) as s:  # whoever has the port must not be taken for this one
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((self._reached, self.port))
            except OSError as e:
                raise ServerError(f"cannot listen on {self._reached}:{self.port}: {e.strerror}; "
                                  "choose another port with -- --port N, or none") from e
        self._process = ServerProcess(self.command, self._log, self.env, guarded=True)
        self._facts = {}
        return self.target

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def alive(self) -> str | None:
        return self._process.died() if self._process else "it was not started"

    def facts(self) -> dict[str, Any]:
        """What is not known before it serves is asked for once."""
        if self._process is not None and not self._facts:
            self._facts = self.learned(self._process.head())
        return {"kind": self.kind, "simulated": False, "model": self.model,
                "command": without_secrets(self.command)} | self._facts

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()

    def _port(self, asked: str | None) -> int:
        if asked in (None, "0"):
            return free_port()
        if not (asked.isdecimal() and int(asked) < 65536):
            raise ScenarioError(f"--server {self.kind}: --port {asked}: a number from 0 (any free "
                                "one) to 65535")
        return int(asked)


def program(name: str) -> str:
    """Its path. Raises ScenarioError."""
    found = shutil.which(name)
    if found is None:
        raise ScenarioError(f"there is no program {name!r} on PATH: install it, or say how it is "
                            "started, as --server-cmd \"/path/to/it\"")
    return found


def without(options: Sequence[str], *names: str) -> list[str]:
    """The options less these and their values."""
    left, skip = [], False
    for word in options:
        if word.startswith("-"):
            flag, eq, _ = word.partition("=")
            skip = flag in names and not eq
            if flag in names:
                continue
        elif skip:
            continue
        left.append(word)
    return left


def foreground(command: Sequence[str], env: dict[str, str]) -> int:
    """Runs a server with its output on ours until it ends, or a signal ends us: its exit code, 0
    if it was asked to end. Nothing of it outlives us, even if we are killed."""
    ours, guards = os.pipe()[::-1]
    told = False
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "servers.guard", str(guards), *command],
            stdin=subprocess.DEVNULL, env={**os.environ, **env}, process_group=0,
            pass_fds=(guards,))
    finally:
        os.close(guards)

    def end(_sig: int, _frame: object) -> None:
        nonlocal told
        told = True
        process.terminate()

    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, end)
    code = process.wait()
    os.close(ours)
    if told:
        return 0
    return code if code >= 0 else 128 - code
