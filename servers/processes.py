"""Processes below another one: found also when they left its group or its session."""

import time
from collections.abc import Iterable

import psutil

POLL_S = 0.05


def below(pid: int) -> set[psutil.Process]:
    """All descendants of a process; a psutil.Process knows when its process began, so that a pid
    that was used again is never taken for it."""
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that run still. A zombie does not: nothing is left of it but its exit status."""
    found = []
    for p in processes:
        try:
            if p.is_running() and p.status() != psutil.STATUS_ZOMBIE:
                found.append(p)
        except psutil.NoSuchProcess:
            continue
    return found


def send(processes: Iterable[psutil.Process], sig: int) -> None:
    for p in processes:
        try:
            p.send_signal(sig)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def gone(processes: Iterable[psutil.Process], within_s: float) -> bool:
    """Waits until none of them is alive, at most so long."""
    until = time.monotonic() + within_s
    while alive(processes):
        if time.monotonic() > until:
            return False
        time.sleep(POLL_S)
    return True
