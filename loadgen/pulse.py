"""The generator's own health: how late its loop comes round to anything, whether its host stood
still, the CPU it takes and the CPU it waits for, the collector's pauses, its descriptors. Whoever
has the loop beats; nothing here waits."""

import contextlib
import gc
import os
import resource
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from loadgen import metrics
from loadgen.leg import Health

PROBE_S = 0.1  # how often a loop should beat: waking a core that sleeps may cost it 1 ms
STALL_S = 0.25  # a beat this late did not merely wait its turn: the host or process stood still
_KEEP = 20_000  # lags that are looked at: the last ~7 minutes
_SCHEDSTAT = Path("/proc/self/schedstat")  # of the main thread, whose loop it is


class Pulse:
    """The beats of one leg. Instants are ns of the monotonic clock."""

    def __init__(self, t0_ns: int) -> None:
        self.stalls: list[tuple[int, int]] = []
        self._t0_ns = t0_ns
        self._lags: list[float] = []
        self._from: tuple[int, float, tuple[int, int] | None] | None = None  # t0: ns, CPU s, waits
        self._beats_ns, self._flown_ns = array("q"), array("q")
        self._pauses_ns: list[int] = []
        self._pause_from_ns = 0
        self._fds: int | None = None

    def begin(self) -> None:
        """Counts the collector's pauses from here on, until `end`."""
        gc.callbacks.append(self._collects)

    def end(self) -> None:
        with contextlib.suppress(ValueError):
            gc.callbacks.remove(self._collects)

    def beat(self, slept_ns: int, now_ns: int, flown_ns: int | None = None) -> None:
        """The loop went to sleep for PROBE_S at `slept_ns` and woke up now. `flown_ns`: the
        requests in flight, integrated so far (None: nobody counts them)."""
        if now_ns >= self._t0_ns and self._from is None:
            self._from = (now_ns, time.process_time(), waits())
        late_s = (now_ns - slept_ns) / 1e9 - PROBE_S
        self._lags.append(late_s)
        if flown_ns is not None:
            self._beats_ns.append(now_ns)
            self._flown_ns.append(flown_ns)
        if late_s > STALL_S:
            self.stalls.append((slept_ns, now_ns))

    def look(self) -> None:
        """At what changes slowly; to be called now and then."""
        self._fds = max(self._fds or 0, open_fds())

    def health(self, shard: int, now_ns: int, from_ns: int, to_ns: int) -> Health:
        """Of the leg so far, whose window is from_ns … to_ns."""
        self.look()
        run_queue_frac, each_s = self._run_queue(now_ns)
        return Health(
            shard=shard, lag_p99_s=self.lag_p99_s(), cpu_frac=self.cpu_frac(now_ns),
            run_queue_frac=run_queue_frac, run_queue_each_s=each_s,
            gc_pause_s=sum(self._pauses_ns) / 1e9,
            gc_pause_max_s=max(self._pauses_ns, default=0) / 1e9, fds=self._fds,
            fd_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            inflight_s=self._inflight_s(from_ns, to_ns))

    def lag_recent_s(self) -> float:
        """The latest of the last second."""
        return max(0.0, *self._lags[-round(1 / PROBE_S):], 0.0)

    def lag_p99_s(self) -> float:
        lag = metrics.quantile(self._lags[-_KEEP:], 0.99)
        return max(0.0, lag.value) if lag else 0.0

    def cpu_frac(self, now_ns: int) -> float | None:
        """Of one core, since the leg's clock began; None for less than a second: that would be
        the start-up's."""
        if self._from is None or now_ns - self._from[0] < 1_000_000_000:
            return None
        since_ns, cpu_s, _ = self._from
        return (time.process_time() - cpu_s) / ((now_ns - since_ns) / 1e9)

    def _run_queue(self, now_ns: int) -> tuple[float | None, float | None]:
        """Share of the time, likewise, and seconds each time."""
        now = waits()
        if self._from is None or now_ns - self._from[0] < 1_000_000_000:
            return None, None
        since_ns, _, before = self._from
        if now is None or before is None:
            return None, None
        waited_ns, times = now[0] - before[0], now[1] - before[1]
        return waited_ns / (now_ns - since_ns), waited_ns / max(times, 1) / 1e9

    def _inflight_s(self, from_ns: int, to_ns: int) -> float | None:
        """Requests in flight, integrated over the window; straight lines between beats."""
        at, flown = (np.frombuffer(x, np.int64) for x in (self._beats_ns, self._flown_ns))
        if not len(at) or to_ns <= from_ns:
            return None
        before, after = np.interp([from_ns - at[0], to_ns - at[0]], at - at[0], flown - flown[0])
        return float(after - before) / 1e9

    def _collects(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._pause_from_ns = time.monotonic_ns()
        elif self._pause_from_ns:
            self._pauses_ns.append(time.monotonic_ns() - self._pause_from_ns)


def waits() -> tuple[int, int] | None:
    """How long this process has been ready to run while it had no core, so far, ns; and how often
    it ran."""
    try:
        _, waited_ns, times = map(int, _SCHEDSTAT.read_text().split())
    except (OSError, ValueError):
        return None
    return waited_ns, times


def open_fds() -> int:
    """The lowest number that is free: all below are taken, and it is this one that meets the
    limit. (Listing /proc/self/fd would cost ms of a loop with ten thousand connections.)"""
    try:
        free = os.open(os.devnull, os.O_RDONLY)
    except OSError:  # the limit is reached
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.close(free)
    return free
