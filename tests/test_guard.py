"""Nothing of a server outlives a stop, its own death, or whoever started it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from servers.base import ServerProcess
from servers.processes import alive, below, gone, send

# A server with children: one beside it, one in a session of its own, one that was orphaned there
# at once, one that hears no SIGTERM. Each writes its pid; with "die", the server ends with 3.
SERVER = """
import os, signal, subprocess, sys, time
me = [sys.executable, __file__]
role = sys.argv[1]
open(f"{role}.pid.tmp", "w").write(str(os.getpid()))
if role == "server":
    subprocess.Popen([*me, "child"])
    subprocess.Popen([*me, "session"], start_new_session=True)
    subprocess.Popen([*me, "parent"], start_new_session=True)
    subprocess.Popen([*me, "deaf"])
if role == "parent":
    subprocess.Popen([*me, "orphan"])
if role == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.rename(f"{role}.pid.tmp", f"{role}.pid")
if role == "server" and "die" in sys.argv:
    while not all(os.path.exists(f"{x}.pid") for x in ("child", "session", "orphan", "deaf")):
        time.sleep(0.01)
    print("ValueError: no luck", flush=True)
    sys.exit(3)
if role != "parent":
    time.sleep(300)
"""
ROLES = ("server", "child", "session", "orphan", "deaf")


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Callable[[], dict[str, psutil.Process]]]:
    """Waits for the whole family of a server in `tmp_path`; nobody of it survives the test."""
    found: dict[str, psutil.Process] = {}

    def look() -> dict[str, psutil.Process]:
        until = time.monotonic() + 20
        while len(found) < len(ROLES):
            assert time.monotonic() < until, f"there are only {sorted(found)}"
            for role in ROLES:
                if role not in found and (tmp_path / f"{role}.pid").exists():
                    found[role] = psutil.Process(int((tmp_path / f"{role}.pid").read_text()))
            time.sleep(0.02)
        return found
    yield look
    send(alive(found.values()), signal.SIGKILL)


def launch(folder: Path, *words: str, guarded: bool = True) -> ServerProcess:
    return ServerProcess([sys.executable, str(folder / "server.py"), "server", *words],
                         folder / "server.log", guarded=guarded)


@pytest.fixture(autouse=True)
def a_folder_with_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    monkeypatch.chdir(tmp_path)
    root = str(Path(__file__).resolve().parent.parent)
    monkeypatch.setenv("PYTHONPATH", root)


def test_stop_ends_all_that_a_server_started(tmp_path: Path, family) -> None:
    process = launch(tmp_path)
    members = family()
    assert os.getsid(members["child"].pid) == os.getsid(0)  # a vLLM in another session starves us
    assert os.getsid(members["session"].pid) != os.getsid(0)
    assert process.died() is None
    process.stop()
    assert alive(members.values()) == []
    process.stop()  # again: nothing


def test_what_left_a_server_that_is_not_guarded_is_ended_too(tmp_path: Path, family,
                                                             monkeypatch) -> None:
    monkeypatch.setattr("servers.base.STOP_S", 1.0)
    process = launch(tmp_path, guarded=False)
    members = family()
    process.stop()
    assert alive(members[x] for x in ("server", "child", "session", "deaf")) == []


def test_what_a_killed_server_leaves_behind_is_ended_at_once(tmp_path: Path, family) -> None:
    """As when the API server of a vLLM is killed: EngineCore and Worker live on."""
    process = launch(tmp_path)
    members = family()
    os.kill(members["server"].pid, signal.SIGKILL)
    assert gone(members.values(), 10)
    wait(lambda: process.died() is not None, 5)
    assert "killed by signal 9" in (process.died() or "")
    process.stop()


def test_stop_finds_the_rest_also_right_after_the_server_was_killed(tmp_path: Path,
                                                                    family) -> None:
    process = launch(tmp_path)
    members = family()
    os.kill(members["server"].pid, signal.SIGKILL)
    process.stop()
    assert alive(members.values()) == []


def test_a_server_that_ends_by_itself_is_dead_with_its_code_and_words(tmp_path: Path) -> None:
    process = launch(tmp_path, "die")
    wait(lambda: process.died() is not None, 20)
    assert process.died() == "its process exited with code 3; log: ValueError: no luck"
    pids = {x.stem: int(x.read_text()) for x in tmp_path.glob("*.pid")}
    assert set(ROLES) <= set(pids)
    assert [role for role, pid in pids.items() if psutil.pid_exists(pid)] == []
    process.stop()


def test_nothing_outlives_a_starter_that_is_killed(tmp_path: Path, family) -> None:
    script = ("import sys, time; from pathlib import Path; from servers.base import ServerProcess;"
              "ServerProcess([sys.executable, 'server.py', 'server'], Path('server.log'),"
              " guarded=True); time.sleep(300)")
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path) as starter:
        try:
            members = family()
            time.sleep(0.5)
            assert len(alive(members.values())) == len(ROLES)
        finally:
            starter.kill()
    assert gone(members.values(), 15)


def test_a_guard_that_was_killed_is_no_way_out(tmp_path: Path, family, monkeypatch) -> None:
    """The kernel may pick the guard when memory is short: what was seen below it is ended."""
    monkeypatch.setattr("servers.base.LOOK_S", 0.0)
    monkeypatch.setattr("servers.base.STOP_S", 1.0)
    process = launch(tmp_path)
    members = family()
    assert process.died() is None  # looks
    os.kill(process.pid, signal.SIGKILL)
    wait(lambda: process.died() is not None, 5)
    process.stop()
    assert alive(members.values()) == []


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    process = ServerProcess([str(tmp_path / "nosuch")], tmp_path / "server.log", guarded=True)
    wait(lambda: process.died() is not None, 10)
    assert "cannot start" in (process.died() or "")
    process.stop()


def test_an_earlier_start_s_words_are_not_this_one_s(tmp_path: Path) -> None:
    """The log is one file over restarts."""
    said = []
    for script in ("raise ValueError('first')", "raise ValueError('second')", ""):
        process = ServerProcess([sys.executable, "-c", script], tmp_path / "server.log")
        wait(lambda p: p.died() is not None, 10, process)
        said.append(process.died())
        process.stop()
    assert said == ["its process exited with code 1; log: ValueError: first",
                    "its process exited with code 1; log: ValueError: second",
                    "its process exited with code 0; log: (empty)"]
    assert (tmp_path / "server.log").read_text().count("ValueError: ") == 2


def test_a_zombie_and_a_pid_that_was_reaped_are_not_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        handle = psutil.Process(process.pid)
        wait(lambda: handle.status() == psutil.STATUS_ZOMBIE, 10)
        assert alive([handle]) == []
    assert alive([handle]) == []
    assert below(process.pid) == set()
    send([handle], signal.SIGKILL)  # no error, and nobody else's end


def wait(for_: Callable[..., bool], within_s: float, *of: object) -> None:
    until = time.monotonic() + within_s
    while not for_(*of):
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.02)
