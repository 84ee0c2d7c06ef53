"""One request in flight: tokens become bytes on its connection, or spoiled ones on demand."""

import asyncio
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from servers.sim import faults
from servers.sim.answers import DONE, Answer
from servers.sim.choice import Choice
from servers.sim.errors import Refused, engine_dead
from servers.sim.metrics import Tally
from servers.sim.scripts import Script

_NO_FAULT = faults.Fault("none", 0)


class Stream:
    """The answer to one request: its choices, and the connection they are told on. `done` is set
    when the answer is complete: to the body of a whole answer, to None after a stream's last
    event, to Refused when the engine died under a whole answer.

    Events are framed and written here, past aiohttp's writer: that one awaits a slow reader, and
    the engine's loop must wait for nobody. (vLLM's queues are unbounded, too.)

    `leave` is called with a choice that ended before the engine knew; `fell` when a fault is to
    strike the engine itself. `late_head`: the response's head waits for the first event; events
    wait from `has_begun` until it was sent and they are let go by `begin`.
    """

    def __init__(self, answer: Answer, scripts: Sequence[Script], due_s: float,
                 transport: asyncio.Transport, fault: faults.Fault | None, tally: Tally,
                 leave: Callable[[Choice], None], fell: Callable[[str], None],
                 interval: int = 1, late_head: bool = False) -> None:
        self.answer = answer
        self.done: asyncio.Future[bytes | Refused | None] = (
            asyncio.get_running_loop().create_future())
        self.choices = [Choice(answer, index, script, due_s, tally, interval)
                        for index, script in enumerate(scripts)]
        self.first_ns: int | None = None  # right before the first token's bytes were written …
        self.last_ns: int | None = None  # … and the last one's
        self._shape = answer.ask.shape
        self._open = len(self.choices)
        self._transport = transport
        self._fault = fault or _NO_FAULT
        self._leave, self._fell = leave, fell
        self._silent = False
        self._late: deque[bytes] = deque()  # events that drip
        self._result: bytes | Refused | None = None
        self._held: list[bytes] | None = [] if late_head and self._shape.stream else None
        self.has_begun = asyncio.Event()

    @property
    def tokens(self) -> int:
        return sum(c.tokens for c in self.choices)

    def token(self, choice: Choice, now_s: float, reason: str | None, tell: bool = True) -> None:
        """One more token of `choice`; the last one has a finish `reason`. Not to `tell` it: its
        event is the next one's."""
        if choice.reason is not None:
            return
        self.last_ns = time.monotonic_ns()
        self.first_ns = self.first_ns or self.last_ns
        events = choice.token(now_s, reason, tell)
        if self._silent:
            return
        if choice.reason is not None:
            if reason is None:
                self._leave(choice)
            self._closed(choice, events)
        elif self._shape.stream and events:
            self._send(events)
        if choice.tokens == self._fault.at and choice.index == 0:
            self._strike(choice)

    def finish(self, reason: str) -> None:
        """Ends the answer between tokens: "abort"."""
        for choice in self.choices:
            if choice.reason is None and not self._silent:
                self._closed(choice, choice.cut(reason))

    def cut(self) -> None:
        """Ends the connection in the middle."""
        self._transport.close()

    def fail(self, error: Refused) -> None:
        """The engine is dead, or full."""
        told = self._shape.stream and self._held != []  # else it is an answer without a stream
        if told:
            self._send([error.event(), DONE])
        self._resolve(None if told else error)
        self.has_begun.set()

    @property
    def head_waits(self) -> bool:
        return self._held is not None

    def begin(self) -> None:
        """The head was sent."""
        held, self._held = self._held, None
        if held:
            self._send(held)

    def _closed(self, choice: Choice, events: list[bytes]) -> None:
        """The last events of a choice, and after the last choice those of the stream."""
        self._open -= 1
        no_finish = self._fault.kind == "no-finish"
        if no_finish:
            events = [*events[:-1], choice.unfinished()]
        if not self._open:
            if self._shape.include_usage and not no_finish:
                events = [*events, self.answer.usage(self.tokens)]
            if self._fault.kind != "no-done":
                events = [*events, DONE]
        if self._shape.stream:
            self._send(events)
        if not self._open:
            self._resolve(None if self._shape.stream else self._whole())

    def _whole(self) -> bytes:
        body = self.answer.whole([c.told() for c in self.choices], self.tokens)
        return body[:len(body) // 2] if self._fault.kind == "cut-json" else body

    def _resolve(self, result: bytes | Refused | None) -> None:
        self._result = result
        if not self._late and not self.done.done():
            self.done.set_result(result)

    # ------------------------------------------------------------------------------ the connection

    def _send(self, events: Iterable[bytes]) -> None:
        """Each event is one HTTP chunk, as from uvicorn."""
        if self._transport.is_closing():
            return
        if self._held is not None:
            self._held += events
            self.has_begun.set()
            return
        if self._fault.kind == "slice":
            n = faults.SLICE_BYTES
            events = [e[i:i + n] for e in events for i in range(0, len(e), n)]
        if self._fault.kind == "drip":
            if not self._late:
                asyncio.get_running_loop().call_later(self._fault.at, self._drip)
            self._late.extend(events)
            return
        self._transport.write(b"".join([_chunk(e) for e in events]))

    def _drip(self) -> None:
        if self._transport.is_closing() or not self._late:
            return
        self._transport.write(_chunk(self._late.popleft()))
        if self._late:
            asyncio.get_running_loop().call_later(self._fault.at, self._drip)
        elif not self._open:
            self._resolve(self._result)

    def _strike(self, choice: Choice) -> None:
        """The fault that comes after the token just sent."""
        kind = self._fault.kind
        if kind in faults.ENGINE_KINDS:
            self._fell(kind)
        elif kind == "error-event":
            self.fail(engine_dead())
        elif kind == "bad-json":
            self._send([choice.event(b'"broken')])
        elif kind == "big-line":
            self._send([choice.event(b'"' + b"x" * faults.BIG_LINE_BYTES + b'"')])
        elif kind == "cut-json" and self._shape.stream:
            event = choice.event(b'"cut"')
            self._send([event[:len(event) // 2] + b"\n\n"])
            self._resolve(None)
        elif kind == "fin":
            self._resolve(None if self._shape.stream else b"")
        elif kind == "truncate":
            self._transport.close()
        elif kind == "rst":
            reset(self._transport)
        self._silent |= kind in faults.SILENCING and (kind != "cut-json" or self._shape.stream)


def reset(transport: asyncio.Transport) -> None:
    """Closes with a RST."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
