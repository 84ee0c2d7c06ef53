"""What both clients (ours, and Locust's users) agree on. When a request is given up: first token,
silence between events, the whole; pure, as socket timeouts never fire on a server that drips. And
which failures are the generator's own, or a connection's that the server had closed."""

import errno

from loadgen.record import Outcome, Recorder
from loadgen.scenario import Timeouts

OUR_LIMITS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)
STALE_NS = 1_000_000_000  # a kept connection that breaks this soon was closed while it was idle
LINGER_S = 1.0  # from the stream's proper end to the end of the body


class Deadline:
    """The limit that is next, `when_s` (of the caller's clock), and which outcome it means."""

    def __init__(self, limits: Timeouts, abandon_after_s: float | None, now_s: float) -> None:
        self.stall_s = limits.stall_s
        self._always = [(now_s + limits.total_s, Outcome.TIMEOUT_TOTAL)]
        if abandon_after_s is not None:
            self._always.append((now_s + abandon_after_s, Outcome.ABANDONED))
        self._events = 0
        self._next(Outcome.TIMEOUT_FIRST_TOKEN, now_s + limits.first_token_s)

    def progress(self, recorder: Recorder, now_s: float) -> None:
        """To be called after each read: a token event moves the deadline, a ping does not."""
        if recorder.ended:
            self._next(Outcome.STALLED, now_s + LINGER_S)
        elif recorder.n_events > self._events:
            self._events = recorder.n_events
            self._next(Outcome.STALLED, now_s + self.stall_s)

    def passed(self, recorder: Recorder) -> tuple[Outcome, str | None]:
        """What it means that the deadline passed."""
        if self.outcome is Outcome.TIMEOUT_FIRST_TOKEN and recorder.sent_ns is None:
            return Outcome.CONNECT_FAILED, "no connection within the first-token time"
        return self.outcome, None

    def _next(self, outcome: Outcome, when_s: float) -> None:
        self.when_s, self.outcome = min([(when_s, outcome), *self._always])
