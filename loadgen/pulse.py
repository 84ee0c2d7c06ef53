"""The generator's own health: how late its loop comes round to anything, whether its host stood
still, and the CPU it takes. Whoever has the loop beats; nothing here waits."""

import time

from loadgen import metrics

PROBE_S = 0.02  # how often a loop should beat
STALL_S = 0.25  # a beat this late did not merely wait its turn: the host or process stood still
_KEEP = 20_000  # lags that are looked at: the last ~7 minutes


class Pulse:
    """The beats of one leg. Instants are ns of the monotonic clock."""

    def __init__(self, t0_ns: int) -> None:
        self.stalls: list[tuple[int, int]] = []
        self._t0_ns = t0_ns
        self._lags: list[float] = []
        self._cpu_from: tuple[int, float] | None = None  # (ns, CPU s) when the leg's clock began

    def beat(self, slept_ns: int, now_ns: int) -> None:
        """The loop went to sleep for PROBE_S at `slept_ns` and woke up now."""
        if now_ns >= self._t0_ns and self._cpu_from is None:
            self._cpu_from = (now_ns, time.process_time())
        late_s = (now_ns - slept_ns) / 1e9 - PROBE_S
        self._lags.append(late_s)
        if late_s > STALL_S:
            self.stalls.append((slept_ns, now_ns))

    def lag_p99_s(self) -> float:
        lag = metrics.quantile(self._lags[-_KEEP:], 0.99)
        return max(0.0, lag.value) if lag else 0.0

    def cpu_frac(self, now_ns: int) -> float | None:
        """Of one core, since the leg's clock began; None for less than a second: that would be
        the start-up's."""
        if self._cpu_from is None or now_ns - self._cpu_from[0] < 1_000_000_000:
            return None
        since_ns, cpu_s = self._cpu_from
        return (time.process_time() - cpu_s) / ((now_ns - since_ns) / 1e9)
