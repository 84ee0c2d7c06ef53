"""Real processes of a test, and the run folders that they leave."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loadgen import cli
from loadgen.record import Outcome, RequestRecord
from loadgen.store import RunFolder
from servers.base import free_port

LOADGEN = [sys.executable, "-m", "loadgen.cli"]
FAST = ["--", "--speed", "10"]  # of a simulator that a run starts

Popen = subprocess.Popen[str]


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def all(self) -> str:
        return self.out + self.err


def loadgen(*args: str, cwd: Path, timeout: float = 120, env: dict[str, str] | None = None) -> Said:
    """The command as users start it; kills what takes longer than `timeout`."""
    with start(*args, cwd=cwd, env=env) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"not over after {timeout} s: {out}{err}") from None
    return Said(process.returncode, out, err)


def start(*args: str, cwd: Path,
          env: dict[str, str] | None = None) -> contextlib.AbstractContextManager[Popen]:
    """The command, under way."""
    return started([*LOADGEN, *args], cwd, {"COLUMNS": "300", **(env or {})})


@contextlib.contextmanager
def started(words: list[str], cwd: Path, env: dict[str, str]) -> Iterator[Popen]:
    """A process with `env` beside this one's own; at the end it is killed, if it lives."""
    process = subprocess.Popen(
        words, cwd=cwd, env={**os.environ, **env}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def processes_in(folder: Path) -> dict[int, str]:
    """Processes whose working directory is `folder`, with their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            zombie = (path / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            if not zombie and (path / "cwd").resolve() == folder.resolve():
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(
                    b"\0", b" ").decode()
    return found


def pid_of(folder: Path, word: str) -> int:
    return next(pid for pid, line in processes_in(folder).items() if word in line)


def wait(for_: Callable[[], object], within_s: float = 25) -> None:
    until = time.monotonic() + within_s
    while not for_():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.05)


def over(process: Popen, within_s: float = 25) -> Said:
    try:
        out, err = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"not over after {within_s} s: {out}{err}") from None
    assert "Traceback" not in out + err, out + err
    assert "never retrieved" not in out + err
    return Said(process.returncode, out, err)


def kept(folder: Path) -> list[RequestRecord]:
    return list(RunFolder(folder).records())


def outcomes(folder: Path) -> Counter[Outcome]:
    return Counter(r.outcome for r in kept(folder))


def endings(folder: Path) -> list[str | None]:
    return [window.ending if window else None for _, window in RunFolder(folder).legs()]


def summary(folder: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads((folder / "summary.json").read_bytes())
    return value


def findings(folder: Path) -> list[dict[str, str]]:
    found: Any = summary(folder)["findings"]
    return list(found)


def rules(folder: Path) -> dict[str, str]:
    """Of `validity` that fired, with their verdicts."""
    return {f["rule"]: f["verdict"] for f in findings(folder)}


def verdict(folder: Path) -> tuple[str, str]:
    """Of the load, and of the measurement."""
    found: Any = summary(folder)["verdict"]
    return found["load"], found["measurement"]


def assert_is_suspect(said: Said, folder: Path, rule: str) -> str:
    """`rule` fired as SUSPECT, and the verdict says so; the exit code stays the load's, unless this
    host stalled and something else made the measurement INVALID. What the finding says."""
    found = rules(folder)
    assert found.get(rule) == "SUSPECT", said.all
    assert "Traceback" not in said.all
    if "INVALID" in found.values():
        assert said.code == cli.INVALID, said.all
    else:
        assert said.code == cli.PASS, said.all
        assert verdict(folder) == ("SAFE", "SUSPECT")
        assert "SAFE, SUSPECT" in said.out
        assert re.search(rf"SUSPECT \(.*{rule}", said.out), said.out
    [says] = [f["says"] for f in findings(folder) if f["rule"] == rule]
    return says


def running(folder: Path, n: int) -> Callable[[], bool]:
    """Whether the run in `folder` has n records by now."""
    return lambda: (folder / "records-0.jsonl").exists() and len(kept(folder)) >= n


@contextlib.contextmanager
def a_simulator(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    with subprocess.Popen([sys.executable, "-m", "servers.sim", "--port", str(port), *options],
                          cwd=folder, stderr=subprocess.DEVNULL) as process:
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def reaches(url: str) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0
