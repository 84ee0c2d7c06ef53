"""One request through Locust's HttpUser: the same sans-I/O core as `loadgen.client`, fed by
requests and gevent. Bytes are taken as they come (`read1`): `iter_lines` of FastHttpUser waits
for whole kilobytes and shows every TTFT as the end of the answer.
"""

import http.client
import os
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.local
import gevent.monkey
import requests
import urllib3
import urllib3.connection
import urllib3.exceptions
from locust.clients import HttpSession

from loadgen.deadline import OUR_LIMITS, STALE_NS, Deadline
from loadgen.record import Outcome, Recorder
from loadgen.scenario import Timeouts

_READ = 2**18  # at most so many bytes at once; with a limit urllib3 also sees a body that is short
_TURN_NS = 5_000_000  # whoever has always more to read lets the others have theirs after this time

now_ns = time.monotonic_ns


class Expired(BaseException):
    """A deadline passed. No Exception: nothing between here and the socket may swallow it."""


def pool_manager() -> urllib3.PoolManager:
    """For `HttpUser.pool_manager`: connections that say how long they took, and are looked at
    without waiting. urllib3 polls a kept-alive one before it is used again, which under gevent
    costs a timer's millisecond, and the request would be sent that much too late."""
    manager = urllib3.PoolManager(num_pools=2, maxsize=1)
    manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
    return manager


_unpatched_poll = gevent.monkey.get_original("select", "poll")


def _is_quiet(sock: socket.socket | None) -> bool:
    """Open, with nothing to read: a server that closed it would show."""
    if sock is None:
        return False
    poll = _unpatched_poll()
    poll.register(sock.fileno(), select.POLLIN)
    return not poll.poll(0)


class _Here(gevent.local.local):  # type: ignore[misc]
    """Of this greenlet's request: how long it waited for a connection, and who is to be told when
    its head goes out."""

    connect_ns: int | None = None
    unsent: Recorder | None = None


_here = _Here()


class _Told(urllib3.connection.HTTPConnection):
    def connect(self) -> None:
        began_ns = now_ns()
        super().connect()
        _here.connect_ns = now_ns() - began_ns

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        if _here.unsent is not None:  # before: a quick server has the head when `send` returns
            _here.unsent.sent(now_ns())
            _here.unsent = None
        super().send(data)

    @property
    def is_connected(self) -> bool:
        return _is_quiet(self.sock)


class _TlsTold(_Told, urllib3.connection.HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Told


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsTold


class Stream:
    """One user's connection to the server."""

    def __init__(self, session: HttpSession, url: str, headers: dict[str, str]) -> None:
        session.trust_env = False  # as the generator's own client: no proxy, no .netrc by chance
        self._session, self._url = session, url
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream",
                         "Accept-Encoding": "identity", **headers}
        self.n_bytes = 0  # of the last answer

    def send(self, recorder: Recorder, limits: Timeouts) -> tuple[Outcome | None, str | None]:
        """Sends one request and feeds what comes to the recorder. What ended it early, if
        anything, as an outcome and in words. GreenletExit (Locust stops the user) goes through."""
        deadline = Deadline(limits, recorder.shot.abandon_after_s, time.monotonic())
        try:
            try:
                self._exchange(recorder, deadline)
            except (requests.RequestException, OSError) as e:
                if not _was_stale(recorder, e):
                    raise
                recorder.stale_retries += 1
                self._session.close()
                self._exchange(recorder, deadline)
        except Expired:
            return deadline.passed(recorder)
        except Exception as e:  # noqa: BLE001  (all of requests' and urllib3's: an outcome)
            return outcome_of(e)
        return None, None

    def _exchange(self, recorder: Recorder, deadline: Deadline) -> None:
        _here.connect_ns, _here.unsent, self.n_bytes = None, recorder, 0
        try:
            with _until(deadline):
                answer = self._session.post(
                    self._url, data=recorder.shot.body, headers=self._headers, stream=True,
                    catch_response=True, allow_redirects=False, name=recorder.shot.cls)
        finally:
            recorder.connect_wait_ns = _here.connect_ns
        if answer.error is not None:  # none came: there is nothing to close
            raise answer.error
        try:
            recorder.response(now_ns(), answer.status_code,
                              answer.headers.get("Content-Type", ""),
                              "Retry-After" in answer.headers)
            self._read(answer, recorder, deadline)
        finally:
            answer.close()

    def _read(self, answer: requests.Response, recorder: Recorder, deadline: Deadline) -> None:
        turn_ns = now_ns()
        while True:
            with _until(deadline):
                if now_ns() - turn_ns > _TURN_NS:
                    gevent.sleep(0)  # a read that finds bytes does not go through the loop
                    turn_ns = now_ns()
                data = answer.raw.read1(_READ, decode_content=True)
            if not data:
                return
            recorder.feed(now_ns(), data)
            self.n_bytes += len(data)
            if recorder.fatal is Outcome.BAD_STREAM:
                return
            deadline.progress(recorder, time.monotonic())


def _was_stale(recorder: Recorder, error: Exception) -> bool:
    """The connection was kept alive, and broke right when it was used again: the server had
    closed it while it was idle and has not seen this request."""
    broke = any(isinstance(e, http.client.RemoteDisconnected | ConnectionResetError
                           | BrokenPipeError) for e in _chain(error))
    reused = recorder.connect_wait_ns is None and recorder.status is None
    return broke and reused and (
        recorder.sent_ns is None or now_ns() - recorder.sent_ns < STALE_NS)


def _until(deadline: Deadline) -> gevent.Timeout:
    return gevent.Timeout(max(0.0, deadline.when_s - time.monotonic()), Expired)


def outcome_of(error: Exception) -> tuple[Outcome, str]:
    """What an exception of requests, urllib3 or the socket means for the request."""
    chain = list(_chain(error))
    root = chain[-1]
    if any(isinstance(e, OSError) and e.errno in OUR_LIMITS for e in chain):
        return Outcome.DROPPED, str(root)
    if any(isinstance(e, socket.gaierror) for e in chain) and _no_descriptor_left():
        return Outcome.DROPPED, f"no file descriptor left to look up a name with: {root}"
    if any(isinstance(e, urllib3.exceptions.NewConnectionError | urllib3.exceptions.SSLError
                      | requests.exceptions.SSLError | requests.ConnectTimeout) for e in chain):
        said = next((str(e) for e in chain if isinstance(
            e, urllib3.exceptions.NewConnectionError)), f": {root}")
        return Outcome.CONNECT_FAILED, said.partition(": ")[2]  # without an object's address
    if any(_is_not_http(e) for e in chain):
        return Outcome.BAD_STREAM, f"{type(root).__name__}: {root}"
    network = requests.RequestException | urllib3.exceptions.HTTPError | OSError
    if isinstance(error, network) and not isinstance(error, ValueError):
        return Outcome.DISCONNECTED, f"{type(root).__name__}: {root}"
    return Outcome.DROPPED, f"{type(error).__name__}: {error}"  # a header that cannot be sent


def _no_descriptor_left() -> bool:
    """The resolver that cannot open its files says that there is no such name."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return True
    return False


def _is_not_http(error: BaseException) -> bool:
    """The head or a chunk is none. (A chunk's size that is missing because the connection ended is
    reported by http.client like one that is no number.)"""
    if isinstance(error, ValueError):
        return "base 16" in str(error) and not str(error).endswith("b''")
    cut = http.client.RemoteDisconnected | http.client.IncompleteRead
    return isinstance(error, http.client.HTTPException) and not isinstance(error, cut)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was made of, from the outside in."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        inside = [x for x in (getattr(at, "reason", None), *at.args)
                  if isinstance(x, BaseException)]
        at = next(iter(inside), None) or at.__cause__ or at.__context__
