"""Requests through `loadgen.fleet.stream.Stream`, in a process of its own: importing locust makes
the whole interpreter gevent's, which pytest's must not become.

    stdin   Case, a JSON line each
    stdout  the records of its requests, one JSON list in a line each; "ready" comes first
"""

import contextlib
import gc
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import gevent
import msgspec
from locust import HttpUser
from locust.env import Environment
from msgspec import Struct

from loadgen import scenario
from loadgen.fleet.stream import Stream, pool_manager
from loadgen.record import Outcome, Recorder, RequestRecord, Shot


class Case(Struct, omit_defaults=True):
    """`n` requests of one user, one after the other, or each of a user of its own. `kill_at`: its
    greenlet is killed once so many token events came (0: once the request was sent)."""

    url: str
    mix: dict[str, Any]
    path: str = "/v1/chat/completions"
    headers: dict[str, str] = {}
    bodies: tuple[str, ...] = ("{}",)
    classes: tuple[str, ...] = ("c",)
    n: int = 1
    together: bool = False
    abandon_after_s: float | None = None
    kill_at: int | None = None
    without_descriptors: bool = False  # for the first request


class _Asked:
    """A case while it runs."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.mix = scenario.parse(case.mix, "case")
        self.records: list[RequestRecord] = []

    def run(self) -> list[RequestRecord]:
        case = self.case
        numbers = [[k] for k in range(case.n)] if case.together else [list(range(case.n))]
        users = [gevent.spawn(self._user, self._stream(), ks) for ks in numbers]
        gevent.joinall(users, raise_error=True)
        return sorted(self.records, key=lambda r: r.seq)

    def _stream(self) -> Stream:
        class User(HttpUser):
            host = "http://127.0.0.1"  # requests go to whole URLs

            def __init__(self, environment: Environment) -> None:
                self.pool_manager = pool_manager()
                super().__init__(environment)

        session = User(Environment(user_classes=[User])).client
        return Stream(session, self.case.url + self.case.path, self.case.headers)

    def _user(self, stream: Stream, numbers: list[int]) -> None:
        for k in numbers:
            with _no_descriptors(self.case.without_descriptors and k == 0):
                sending = gevent.spawn(self._send, stream, k)
                if self.case.kill_at is not None:
                    gevent.spawn(self._kill, sending)
                sending.join()
                if not isinstance(sending.value, gevent.GreenletExit):
                    sending.get()

    def _send(self, stream: Stream, k: int) -> None:
        """As LLMUser.ask does."""
        case = self.case
        self.recorder = recorder = Recorder(Shot(
            leg="l", shard=0, seq=k, session=k, turn=0, cls=case.classes[k % len(case.classes)],
            due_ns=time.monotonic_ns(), body=case.bodies[k % len(case.bodies)].encode(),
            max_tokens=8, abandon_after_s=case.abandon_after_s), self.mix.throttle_status)
        recorder.inflight = 1
        failure: Outcome | None = Outcome.CANCELLED
        error: str | None = None
        try:
            failure, error = stream.send(recorder, self.mix.timeouts_of(recorder.shot.cls))
        finally:
            self.records.append(recorder.end(time.monotonic_ns(), failure, error))

    def _kill(self, sending: gevent.Greenlet) -> None:
        while self.recorder.sent_ns is None or self.recorder.n_events < (self.case.kill_at or 0):
            gevent.sleep(0.02)
        gevent.sleep(0.1)
        sending.kill()


@contextlib.contextmanager
def _no_descriptors(wanted: bool) -> Iterator[None]:
    """All file descriptors that this process may have are taken."""
    if not wanted:
        yield
        return
    gc.collect()  # sockets of earlier cases are closed now, not while their descriptors are wanted
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def main() -> None:
    print("ready", flush=True)
    decode, encode = msgspec.json.Decoder(Case).decode, msgspec.json.Encoder().encode
    for line in sys.stdin:
        print(encode(_Asked(decode(line)).run()).decode(), flush=True)


if __name__ == "__main__":
    main()
