"""One request in flight: its tokens become bytes on its connection, or spoiled ones on demand."""

import asyncio
import socket
import struct
import time
from collections.abc import Iterable

from servers.sim import faults, text, wire
from servers.sim.metrics import Latencies


class Stream:
    """`done` is set when the answer is complete: to the body of a whole answer, to None after a
    stream's last event, to Refused when the engine died under a whole answer.

    Events are framed and written here, past aiohttp's writer: that one awaits a slow reader, and
    the engine's loop must wait for nobody. (vLLM's queues are unbounded, too.)
    """

    def __init__(self, answer: wire.Answer, due_s: float, transport: asyncio.Transport,
                 fault: faults.Fault | None, seed: int, interval: int = 1) -> None:
        self.answer = answer
        self.tokens = 0
        self.done: asyncio.Future[bytes | wire.Refused | None] = (
            asyncio.get_running_loop().create_future())
        self._transport = transport
        self._fault = fault or faults.Fault("none", 0)
        self._words = text.words(seed)
        self._said: list[str] = []
        self._silent = False
        self._interval = interval  # an event for the first token, and then for every so many
        self._held: list[int] = []  # words of the next event
        self.first_ns: int | None = None  # right before the first token's bytes were written …
        self.last_ns: int | None = None  # … and the last one's
        self._due_s, self._last_s = due_s, 0.0

    def token(self, now_s: float, reason: str | None, latencies: Latencies) -> None:
        """One more token; the last one has a finish `reason`. An EOS ("stop") has no text."""
        self._observe(now_s, reason, latencies)
        self.last_ns = time.monotonic_ns()
        self.first_ns = self.first_ns or self.last_ns
        self.tokens += 1
        word = None if reason == "stop" else next(self._words)
        if self._silent:
            return
        if not self.answer.ask.stream:
            self._said += [] if word is None else [text.WORDS[word]]
        elif reason or (self.tokens - 1) % self._interval == 0:
            self._send(self._events(self._text(word), reason))
        elif word is not None:
            self._held.append(word)
        if self.tokens == self._fault.at:
            self._strike()
        if reason and not self._silent:
            self._end(reason)

    def finish(self, reason: str) -> None:
        """Ends the answer between tokens: "abort"."""
        if self.answer.ask.stream:
            self._send(self._closing(None, reason))
        self._end(reason)

    def fail(self, error: wire.Refused) -> None:
        """The engine is dead."""
        if self.answer.ask.stream:
            self._send([error.event(), wire.DONE])
        self._resolve(None if self.answer.ask.stream else error)

    def _text(self, word: int | None) -> bytes | None:
        """What an event says: the word, after those that were held back."""
        if not self._held:
            return None if word is None else wire.WORDS_JSON[word]
        words = [*self._held, *([] if word is None else [word])]
        self._held.clear()
        return b'"%b"' % b"".join([wire.WORDS_JSON[w][1:-1] for w in words])

    def _events(self, word_json: bytes | None, reason: str | None) -> list[bytes]:
        first = self.tokens == 1 and self.answer.ask.chat
        events = [self.answer.role()] if first else []
        if reason:
            return events + self._closing(word_json, reason)
        return [*events, self.answer.token(word_json or b'""')]

    def _closing(self, word_json: bytes | None, reason: str) -> list[bytes]:
        if self._fault.kind == "no-finish":
            return [self.answer.token(word_json or b'""'), wire.DONE]
        events = [self.answer.finish(word_json, reason)]
        if self.answer.ask.include_usage:
            events.append(self.answer.usage(self.tokens))
        return events if self._fault.kind == "no-done" else [*events, wire.DONE]

    def _end(self, reason: str) -> None:
        whole = None if self.answer.ask.stream else self.answer.whole("".join(self._said),
                                                                      self.tokens, reason)
        self._resolve(whole)

    def _resolve(self, result: bytes | wire.Refused | None) -> None:
        if not self.done.done():
            self.done.set_result(result)

    def _send(self, events: Iterable[bytes]) -> None:
        """Each event is one HTTP chunk, as from uvicorn."""
        if self._transport.is_closing():
            return
        if self._fault.kind == "slice":
            n = faults.SLICE_BYTES
            for piece in [e[i:i + n] for e in events for i in range(0, len(e), n)]:
                self._transport.write(_chunk(piece))
            return
        self._transport.write(b"".join([_chunk(e) for e in events]))

    def _strike(self) -> None:
        """The fault that comes after the token just sent."""
        kind = self._fault.kind
        if kind == "error-event":
            self.fail(wire.engine_dead())
        elif kind == "bad-json":
            self._send([self.answer.token(b'"broken')])
        elif kind == "big-line":
            self._send([self.answer.token(b'"' + b"x" * faults.BIG_LINE_BYTES + b'"')])
        elif kind == "truncate":
            self._transport.close()
        elif kind == "rst":
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()
        self._silent = kind in ("error-event", "truncate", "rst", "stall")

    def _observe(self, now_s: float, reason: str | None, latencies: Latencies) -> None:
        if self.tokens == 0:
            latencies.ttft.observe(now_s - self._due_s)
        else:
            latencies.itl.observe(now_s - self._last_s)
        self._last_s = now_s
        if reason:
            latencies.e2e.observe(now_s - self._due_s)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
