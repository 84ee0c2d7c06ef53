"""How far another host's monotonic clock is ahead of ours: pings, of which the one with the least
round trip tells most. Pure."""

from msgspec import Struct


class Ping(Struct, frozen=True):
    """Four stamps: sent and got are ours, heard and said are theirs."""

    sent_ns: int
    heard_ns: int
    said_ns: int
    got_ns: int

    @property
    def round_ns(self) -> int:
        """On the way, there and back."""
        return (self.got_ns - self.sent_ns) - (self.said_ns - self.heard_ns)

    @property
    def ahead_ns(self) -> int:
        """Were both ways equally long; they may be as unlike as the whole round trip."""
        return ((self.heard_ns - self.sent_ns) + (self.said_ns - self.got_ns)) // 2

    @property
    def error_ns(self) -> int:
        return max(0, self.round_ns + 1) // 2


class Offset(Struct, frozen=True):
    ahead_ns: int
    error_ns: int
    pings: int


class Clock:
    """The best of all pings, and the best of the last ones, to see whether it drifted."""

    def __init__(self, recent: int = 60) -> None:
        self._best: Ping | None = None
        self._recent: list[Ping] = []
        self._keep, self._n = recent, 0

    def add(self, ping: Ping) -> None:
        self._n += 1
        if self._best is None or ping.round_ns < self._best.round_ns:
            self._best = ping
        self._recent = [*self._recent[1 - self._keep:], ping]

    def offset(self) -> Offset | None:
        """None before the first ping."""
        if self._best is None:
            return None
        return Offset(self._best.ahead_ns, self._best.error_ns, self._n)

    def forget(self) -> None:
        """A new test: what was measured an hour ago has drifted."""
        if self._recent:
            self._best, self._n = min(self._recent, key=lambda p: p.round_ns), len(self._recent)

    def drift_ns(self, from_ns: int) -> int:
        """How far the best of the last pings lies beyond its own error from an offset that was
        given out before."""
        if not self._recent:
            return 0
        best = min(self._recent, key=lambda p: p.round_ns)
        return max(0, abs(best.ahead_ns - from_ns) - best.error_ns)
