"""The generator's event loop: asyncio, with sockets that are read right where they are polled,
and alarms that are exact to some microseconds."""

import asyncio
import contextlib
import ctypes
import os
import select
import selectors
import time
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeVarTuple, Unpack, cast

_GLANCE_NS = 500_000
_TFD = 0o4000 | 0o2000000  # non-blocking, close-on-exec

Ts = TypeVarTuple("Ts")

now_ns = time.monotonic_ns


def next_tick_ns(each_s: float) -> int:
    """The next multiple of `each_s` on the clock: what is done now and then is best done together,
    as waking up is what costs."""
    each_ns = round(each_s * 1e9)
    return (now_ns() // each_ns + 1) * each_ns


class Selector(selectors.BaseSelector):
    """epoll for asyncio, and beside it sockets whose readers are called at once: no Handle, no
    turn of the loop. Alarms are called at their instant, to a timer of the kernel (epoll's own
    timeouts are whole milliseconds), and between any two readers."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._direct: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        self._alarms: deque[tuple[int, Callable[[], None]]] = deque()
        self._timer = _timer_fd()
        if self._timer is not None:
            self._epoll.register(self._timer, select.EPOLLIN | select.EPOLLET)
        self.stir = False  # asyncio has something to do
        self._ringing = False
        self._looked_ns = 0  # when sockets were looked at last
        self.failed: Callable[[Exception], None] | None = None

    # -------------------------------------------------------------------------------- for clients

    def read_directly(self, fd: int, reader: Callable[[], None]) -> None:
        """Calls `reader` whenever `fd` can be read, or has broken."""
        self._direct[fd] = reader
        self._epoll.register(fd, select.EPOLLIN)

    def write_when_possible(self, fd: int, writer: Callable[[], None] | None) -> None:
        """Calls `writer`, too, whenever `fd` can be written; None: no more."""
        if writer is None:
            self._writers.pop(fd, None)
        else:
            self._writers[fd] = writer
        self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if writer else 0))

    def leave(self, fd: int) -> None:
        if self._direct.pop(fd, None) is not None:
            self._writers.pop(fd, None)
            self._epoll.unregister(fd)

    def alarm(self, due_ns: int, call: Callable[[], None]) -> None:
        """Calls at `due_ns`; alarms must be set in the order of their instants."""
        self._alarms.append((due_ns, call))
        self.stir = True

    def ring(self) -> None:
        """Calls every alarm whose instant has come; whoever works for long may do so in between."""
        if self._ringing:  # an alarm's own doing: whoever rings calls the next ones, too
            return
        alarms, self._ringing = self._alarms, True
        try:
            while alarms and now_ns() >= alarms[0][0]:
                try:
                    alarms.popleft()[1]()
                except Exception as e:  # noqa: BLE001  (one alarm's bug must not silence the others)
                    self._say(e)
        finally:
            self._ringing = False

    def glance(self) -> None:
        """Reads what has come, if nobody has looked for long: a read that is late finds several
        events, which then share a stamp. For whoever takes many short turns one after the other,
        outside of readers."""
        if now_ns() - self._looked_ns < _GLANCE_NS:
            return
        for fd, mask in self._epoll.poll(0, 1024):
            if fd == self._timer:
                self.stir = True  # it says so only once
            elif (reader := self._direct.get(fd)) is not None:
                self._read(fd, mask, reader)
        self._looked_ns = now_ns()
        self.ring()

    # -------------------------------------------------------------------------------- for asyncio

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} is registered already")
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        self._epoll.register(fd, _mask(events))
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        key = self._keys.pop(self._fd(fileobj))
        with contextlib.suppress(OSError):  # closed already
            self._epoll.unregister(key.fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = self._fd(fileobj)
        key = self._keys[fd]
        if events != key.events:
            self._epoll.modify(fd, _mask(events))
        key = self._keys[fd] = key._replace(events=events, data=data)
        return key

    def get_map(self) -> Any:
        return _Map(self._keys, self._fd)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys[self._fd(fileobj)]

    def close(self) -> None:
        self._epoll.close()
        if self._timer is not None:
            os.close(self._timer)
        self._keys.clear()
        self._direct.clear()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Returns when asyncio has something to do; direct sockets alone do not end it."""
        self.stir = False
        if self._alarms:
            self.ring()
        wait_s = 0.0 if self.stir else self._patience(timeout)
        found: list[tuple[selectors.SelectorKey, int]] = []
        readers, poll, timer, alarms = (
            self._direct.get, self._epoll.poll, self._timer, self._alarms)
        while True:
            for fd, mask in poll(wait_s, 1024):
                reader = readers(fd)
                if reader is not None:
                    self._read(fd, mask, reader)
                    if alarms and now_ns() >= alarms[0][0]:
                        self.ring()
                elif fd == timer:
                    self.stir = True
                elif (key := self._keys.get(fd)) is not None:
                    found.append((key, _events(mask) & key.events))
            if found or self.stir or wait_s >= 0:
                break
        if alarms:
            self.ring()
        self._looked_ns = now_ns()
        return found

    # ------------------------------------------------------------------------------------- inside

    def _read(self, fd: int, mask: int, reader: Callable[[], None]) -> None:
        try:
            if mask == 1:  # EPOLLIN
                reader()
            else:
                self._other(fd, mask)
        except Exception as e:  # noqa: BLE001  (one reader's bug must not stop the loop)
            self._say(e)

    def _other(self, fd: int, mask: int) -> None:
        """More than something to read: it can be written, or has broken."""
        if mask & ~select.EPOLLOUT:
            self._direct[fd]()
        if mask & select.EPOLLOUT and fd in self._writers:
            self._writers[fd]()

    def _patience(self, timeout: float | None) -> float:
        """What epoll is to wait, s. -1: until something happens, and be it that the timer that is
        set here runs out."""
        if timeout is not None and timeout <= 0:
            return 0
        wait_ns = None if timeout is None else round(timeout * 1e9)
        if self._alarms:
            left_ns = max(1, self._alarms[0][0] - now_ns())
            wait_ns = left_ns if wait_ns is None else min(wait_ns, left_ns)
        if wait_ns is None:
            return -1
        if self._timer is None:
            return max(0.0, wait_ns / 1e9 - 0.001)  # the rest is a turn of its own
        _set_timer(self._timer, wait_ns)
        return -1

    def _fd(self, fileobj: Any) -> int:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if fd in self._keys:
            return cast("int", fd)
        for key in self._keys.values():  # closed: it has no number any more
            if key.fileobj is fileobj:
                return key.fd
        raise KeyError(f"{fileobj!r} is not registered")

    def _say(self, error: Exception) -> None:
        if self.failed is not None:
            self.failed(error)


class _Map(dict[int, selectors.SelectorKey]):
    """What `selectors` promises of get_map(): keys by file object."""

    def __init__(self, keys: dict[int, selectors.SelectorKey], fd: Callable[[Any], int]) -> None:
        super().__init__(keys)
        self._fd_of = fd

    def __getitem__(self, fileobj: Any) -> selectors.SelectorKey:
        return super().__getitem__(self._fd_of(fileobj))

    def get(self, fileobj: Any, default: Any = None) -> Any:
        try:
            return self[fileobj]
        except KeyError:
            return default


def _events(mask: int) -> int:
    """epoll's words as `selectors`' (errors can be read and written)."""
    return ((mask & ~select.EPOLLIN and selectors.EVENT_WRITE)
            | (mask & ~select.EPOLLOUT and selectors.EVENT_READ))


def _mask(events: int) -> int:
    return ((select.EPOLLIN if events & selectors.EVENT_READ else 0)
            | (select.EPOLLOUT if events & selectors.EVENT_WRITE else 0))


class Loop(asyncio.SelectorEventLoop):
    """asyncio's own loop on our selector, which must hear of whatever is to be done."""

    def __init__(self) -> None:
        self.direct = Selector()
        super().__init__(self.direct)
        self.direct.failed = lambda e: self.call_exception_handler(
            {"message": "a reader or an alarm failed", "exception": e})

    def call_soon(self, callback: Callable[[Unpack[Ts]], object], *args: *Ts,
                  context: Context | None = None) -> asyncio.Handle:
        self.direct.stir = True
        return super().call_soon(callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts,
                context: Context | None = None) -> asyncio.TimerHandle:
        self.direct.stir = True
        return super().call_at(when, callback, *args, context=context)

    def stop(self) -> None:
        self.direct.stir = True
        super().stop()


class Plain:
    """The same for a loop that is not ours: its turns, its timers, stamps as good as it gets."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handles: deque[asyncio.TimerHandle] = deque()

    def read_directly(self, fd: int, reader: Callable[[], None]) -> None:
        self._loop.add_reader(fd, reader)

    def write_when_possible(self, fd: int, writer: Callable[[], None] | None) -> None:
        if writer is None:
            self._loop.remove_writer(fd)
        else:
            self._loop.add_writer(fd, writer)

    def leave(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)

    def alarm(self, due_ns: int, call: Callable[[], None]) -> None:
        self._handles.append(self._loop.call_later(max(0.0, (due_ns - now_ns()) / 1e9), call))
        while self._handles and self._handles[0].when() < self._loop.time() - 1:
            self._handles.popleft()

    def ring(self) -> None:
        """Its loop calls them."""

    def glance(self) -> None:
        """Its loop reads them."""


def direct_of(loop: asyncio.AbstractEventLoop) -> Selector | Plain:
    return loop.direct if isinstance(loop, Loop) else Plain(loop)


def new_loop() -> asyncio.AbstractEventLoop:
    """The one place that decides on the event loop."""
    return Loop() if hasattr(select, "epoll") else asyncio.new_event_loop()


# ------------------------------------------------------------------- timerfd (os has it from 3.13)


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval_s", ctypes.c_long), ("interval_ns", ctypes.c_long),
                ("s", ctypes.c_long), ("ns", ctypes.c_long))


def _timer_fd() -> int | None:
    try:
        fd = _libc().timerfd_create(time.CLOCK_MONOTONIC, _TFD)
    except (AttributeError, OSError):
        return None
    return fd if fd >= 0 else None


_spec = _Itimerspec()
_spec_ref = ctypes.byref(_spec)


def _set_timer(fd: int, wait_ns: int) -> None:
    _spec.s, _spec.ns = divmod(max(1, wait_ns), 1_000_000_000)
    _settime(fd, 0, _spec_ref, None)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


_settime: Any = getattr(_libc(), "timerfd_settime", None)  # no Linux: no timer to set, either
