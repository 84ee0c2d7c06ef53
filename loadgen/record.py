"""The record of one request, and the sans-I/O recorder that makes it of stamps and bytes.

    due ──lateness──▶ sent ─────▶ headers ─▶ first ─·─·─·─▶ last ─▶ end
     └───────────────── ttft ─────────────────┘ └ (n−1)·tpot ┘       │
     └──────────────────────────── e2e ──────────────────────────────┘

Whoever owns the socket (aiohttp, Locust's HttpUser, a test) tells the recorder what came when;
the same bytes and stamps give the same record.
"""

import bisect
import itertools
from array import array
from collections.abc import Sequence
from enum import StrEnum
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct

from loadgen import bulk, openai
from loadgen.sse import LineTooLong, SseParser, is_other


class Outcome(StrEnum):
    """How a request ended. Only OK (and an ABANDONED that the plan asked for) can be good."""

    OK = "OK"  # finish_reason stop, length, tool_calls or content_filter, and the stream ended
    ABORTED = "ABORTED"  # finish_reason abort: the server was shutting down
    ABANDONED = "ABANDONED"  # the plan had the client leave
    THROTTLED = "THROTTLED"  # 429, 503 with Retry-After or a queue limit, throttle_status
    HTTP_ERROR = "HTTP_ERROR"  # another status than 200
    SERVER_ERROR_EVENT = "SERVER_ERROR_EVENT"  # 200, then an error object
    CONNECT_FAILED = "CONNECT_FAILED"
    TIMEOUT_FIRST_TOKEN = "TIMEOUT_FIRST_TOKEN"
    STALLED = "STALLED"  # no event for the scenario's stall time
    TIMEOUT_TOTAL = "TIMEOUT_TOTAL"
    DISCONNECTED = "DISCONNECTED"
    TRUNCATED = "TRUNCATED"  # ended without finish_reason
    BAD_STREAM = "BAD_STREAM"
    EMPTY = "EMPTY"  # ended without one token
    DROPPED = "DROPPED"  # the generator could not start it
    CANCELLED = "CANCELLED"  # by us: interrupt, or a leg that was cut


TROUBLE = frozenset({  # after these the server may be dead, and its health is asked
    Outcome.SERVER_ERROR_EVENT, Outcome.DISCONNECTED, Outcome.CONNECT_FAILED,
    Outcome.HTTP_ERROR, Outcome.ABORTED})


class RequestRecord(Struct, omit_defaults=True):
    """One request, as it is written into the journal. Stamps are ns of the shard's monotonic
    clock; absent is None.

    `gaps_us[i]` is the time from token event i to i+1. `reads` holds the number of token events
    of each read that carried one (events of one read share a stamp); None: one event per read.
    `event_tok` holds the tokens per event where the server says.
    """

    leg: str
    shard: int
    seq: int  # running number in its shard: a gap is a lost record
    session: int  # number k in the plan of its leg, the same whatever the sharding
    turn: int
    cls: str
    due_ns: int
    end_ns: int  # the stream's proper end, or the instant the request failed
    outcome: Outcome
    sent_ns: int | None = None
    headers_ns: int | None = None
    first_ns: int | None = None
    first_visible_ns: int | None = None
    role_ns: int | None = None  # an event with choices and no token: before the first one …
    finish_ns: int | None = None  # … or the last after it; other tools time these, too
    gaps_us: list[int] = []
    reads: list[int] | None = None
    event_tok: list[int] | None = None
    stamp_kind: Literal["kernel", "user"] = "user"
    connect_wait_ns: int | None = None
    stale_retries: int = 0
    inflight: int | None = None  # this shard's requests in flight when this one was sent, with it
    want_prompt_tok: int | None = None
    max_tokens: int | None = None
    prompt_tok: int | None = None
    output_tok: int | None = None
    cached_tok: int | None = None
    tok_source: Literal["usage", "events"] | None = None
    status: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    output_ref: str | None = None  # where its text is kept: file of the run folder, and byte
    wrong: str | None = None  # kind of error, if its check failed and counts; of verdicts.jsonl

    def shift(self, ns: int) -> None:
        """Brings all stamps to another clock."""
        if ns:
            self.due_ns += ns
            self.end_ns += ns
            for name in ("sent_ns", "headers_ns", "first_ns", "first_visible_ns", "role_ns",
                         "finish_ns"):
                if (stamp := getattr(self, name)) is not None:
                    setattr(self, name, stamp + ns)

    @property
    def last_ns(self) -> int | None:
        """Stamp of the last token event (to 1 µs)."""
        return None if self.first_ns is None else self.first_ns + 1000 * self.stream_us

    @property
    def n_events(self) -> int:
        return 0 if self.first_ns is None else 1 + len(self.gaps_us)

    @property
    def stream_us(self) -> int:
        """From the first token event to the last."""
        return sum(self.gaps_us)

    @property
    def gap_max_us(self) -> int | None:
        return max(self.gaps_us, default=None)

    @property
    def n_reads(self) -> int:
        """Reads that brought a token event."""
        return self.n_events if self.reads is None else len(self.reads)

    def by_second(self) -> tuple[list[int], list[int]]:
        """Seconds of the shard's clock in which token events came, and how many in each."""
        if self.first_ns is None:
            return [], []
        stamps_ns = self.first_ns + 1000 * np.cumsum([0, *self.gaps_us])
        seconds, counts = np.unique(stamps_ns // 1_000_000_000, return_counts=True)
        return seconds.tolist(), counts.tolist()


class Shot(Struct, frozen=True):
    """One request that is to be sent: who it is, when it is due, what goes over the wire."""

    leg: str
    shard: int
    seq: int
    session: int
    turn: int
    cls: str
    due_ns: int
    body: bytes
    want_prompt_tok: int | None = None
    max_tokens: int | None = None
    abandon_after_s: float | None = None
    keeps: bool = False  # what follows needs the answer's text


def _gaps_us(stamps_ns: "array[int]") -> list[int]:
    """From each stamp to the next; cut to µs in a way that sums up."""
    stamps_us = np.frombuffer(stamps_ns, np.int64) // 1000
    gaps: list[int] = (stamps_us[1:] - stamps_us[:-1]).tolist()
    return gaps


class Recorder:
    """Turns stamps and bytes of one request into its record.

    Order of calls: `sent`, `response`, `feed` …, then `end` once, at any point. A retry on a
    stale connection calls `sent` again.
    """

    def __init__(self, shot: Shot, throttle_status: Sequence[int] = (),
                 keeps: bool = False) -> None:
        self.shot = shot
        self.keeps = keeps  # the answer itself, too
        self.status: int | None = None
        self.sent_ns: int | None = None
        self.first_ns: int | None = None
        self.connect_wait_ns: int | None = None
        self.stale_retries = 0
        self.inflight: int | None = None
        self.stamp_kind: Literal["kernel", "user"] = "user"
        self.ended = False  # the stream's proper end was seen
        self.fatal: Outcome | None = None  # nothing that follows can change the outcome
        self._throttle_status = throttle_status
        self._headers_ns: int | None = None
        self._first_visible_ns: int | None = None
        self._role_ns: int | None = None
        self._finish_ns: int | None = None
        self._stamps_ns = array("q")
        self._event_tok: list[int] = []
        self._finish: str | None = None
        self._usage: openai.Usage | None = None
        self._error: str | None = None
        self._end_ns: int | None = None
        self._is_stream = True
        self._is_told = False  # an event has come
        self._retry_after = False
        self._body = b""
        self._sse = SseParser()
        self._seen_choices = False
        self._garbled = False
        self._template: bulk.Template | None = None
        self._said: list[str] = []
        self._calls: list[msgspec.Raw] = []
        self._plain: bytes | None = None  # the last token event that says nothing else

    def sent(self, now_ns: int) -> None:
        """The request's head went to the transport."""
        self.sent_ns = now_ns

    def response(self, now_ns: int, status: int, content_type: str, retry_after: bool) -> None:
        """Status line and headers arrived."""
        self._headers_ns = now_ns
        self.status = status
        self._retry_after = retry_after
        self._is_stream = status == 200 and "json" not in content_type.lower()

    def feed(self, now_ns: int, data: bytes) -> None:
        """Body bytes arrived in one read."""
        if not self._is_stream:
            self._body = (self._body + data)[:65536]
            return
        if self._garbled:  # what follows garbage means nothing
            return
        try:
            payloads = self._sse.feed(data)
        except LineTooLong as e:
            self._bad(str(e))
            return
        if not self._is_told:
            self._is_told = bool(payloads)
            self._body = b"" if payloads else (self._body + data)[:65536]
        for payload in payloads:
            if not payload.strip():  # some proxies keep a stream alive with these
                continue
            try:
                event = openai.read(payload, first=not self._seen_choices)
            except openai.BadEvent as e:
                self._bad(str(e))
                return
            self._event(now_ns, event)
            self._plain = payload if event.is_plain_token else self._plain

    def end(self, now_ns: int, failure: Outcome | None = None,
            error: str | None = None) -> RequestRecord:
        """The record. `failure` is what the owner of the socket saw; None: a clean end of the
        body. A failure after the stream's proper end is none."""
        if self.status is not None and failure in (None, Outcome.DISCONNECTED) and (
                not self._is_stream or is_other(self._body)):
            self._http_answer()
        outcome = self._outcome(failure)
        shot, stamps, usage = self.shot, self._stamps_ns, self._usage
        counted = usage.completion_tokens if usage else None
        reads = None  # one event per read, mostly
        if len(set(stamps)) < len(stamps):
            reads = [len(list(same)) for _, same in itertools.groupby(stamps)]
        by_event = sum(self._event_tok) if self._event_tok else len(stamps) or None
        return RequestRecord(
            leg=shot.leg, shard=shot.shard, seq=shot.seq, session=shot.session, turn=shot.turn,
            cls=shot.cls, due_ns=shot.due_ns,
            end_ns=self._end_ns if self.ended and self._end_ns else now_ns,
            outcome=outcome, sent_ns=self.sent_ns, headers_ns=self._headers_ns,
            first_ns=self.first_ns, first_visible_ns=self._first_visible_ns,
            role_ns=self._role_ns, finish_ns=self._finish_ns,
            gaps_us=_gaps_us(stamps),
            reads=reads,
            stamp_kind=self.stamp_kind,
            event_tok=self._event_tok if len(self._event_tok) == len(stamps) > 0 else None,
            connect_wait_ns=self.connect_wait_ns,
            stale_retries=self.stale_retries, inflight=self.inflight,
            want_prompt_tok=shot.want_prompt_tok, max_tokens=shot.max_tokens,
            prompt_tok=usage.prompt_tokens if usage else None,
            output_tok=counted if counted is not None else by_event,
            cached_tok=usage.cached_tokens if usage else None,
            tok_source="usage" if counted is not None else "events" if by_event else None,
            status=self.status, finish_reason=self._finish,
            error=None if outcome is Outcome.OK else self._error or error)

    def feed_reads(self, stamps_ns: Sequence[int], parts: Sequence[bytes]) -> None:
        """Body bytes of several reads, each with its stamp: the same as `feed` for one after the
        other, but quick where events are alike."""
        nth = 0
        while nth < len(parts):
            n, visible = self._alike_parts(parts, nth)
            if n:
                self._stamps_ns.extend(stamps_ns[nth:nth + n])
                self._see(None if visible is None else stamps_ns[visible])
                nth += n
            elif parts[nth].find(b"\n\n") == len(parts[nth]) - 2:  # mostly: an event
                self.feed(stamps_ns[nth], parts[nth])
                self._learn()
                nth += 1
            else:
                self._feed_torn(stamps_ns[nth:], parts[nth:])
                return

    def _feed_torn(self, stamps_ns: Sequence[int], parts: Sequence[bytes]) -> None:
        """The same where parts are not events: proxies cut and join as they like."""
        data, ends = b"".join(parts), list(itertools.accumulate(map(len, parts)))
        at = 0
        for stamp_ns, end in zip(stamps_ns, ends, strict=True):
            while at < end:
                if alike := self._alike(data, at, stamps_ns, ends):
                    at = alike[-1]
                    continue
                cut = data.find(b"\n\n", at, end)
                upto = end if cut < 0 else cut + 2
                self.feed(stamp_ns, data[at:upto])
                self._learn()
                at = upto

    def answer(self) -> openai.Answer:
        """What came so far, if it is kept."""
        return openai.Answer("".join(self._said), openai.calls_of(self._calls))

    @property
    def n_events(self) -> int:
        """Token events so far."""
        return len(self._stamps_ns)

    @property
    def last_ns(self) -> int | None:
        """Stamp of the last token event so far, or of the stream's proper end."""
        return self._end_ns or (self._stamps_ns[-1] if self._stamps_ns else None)

    # ---------------------------------------------------------------------------------- inside

    def _event(self, now_ns: int, event: openai.Event) -> None:
        if event.error is not None:
            self._say(f"{event.error.type or 'error'}: {event.error.message}")
            full = event.error.is_queue_limit and not self._stamps_ns
            self.fatal = Outcome.THROTTLED if full else Outcome.SERVER_ERROR_EVENT
            return
        if event.token:
            self._token(now_ns, event)
        elif event.choices and not self._stamps_ns:
            self._role_ns = self._role_ns or now_ns
        elif event.choices:
            self._finish_ns = now_ns
        if self.keeps:
            self._said.append(event.text)
            self._calls += event.calls or ()
        self._seen_choices |= event.choices
        self._finish = event.finish_reason or self._finish
        self._usage = event.usage or self._usage
        if self._finish and (event.done or event.usage) and not self.ended:
            self.ended = True
            self._end_ns = now_ns

    def _learn(self) -> None:
        """What follows is most likely like the last token event."""
        if self._plain is not None:
            self._template, self._plain = bulk.template_of(self._plain), None

    @property
    def _ready_template(self) -> bulk.Template | None:
        usable = self._is_stream and self.fatal is None and self._sse.is_between
        return self._template if usable else None

    def _alike_parts(self, parts: Sequence[bytes], start: int) -> tuple[int, int | None]:
        """How many parts from `start` on are each an event like one before, but for its text; and
        which is the first with a visible one."""
        template = self._ready_template
        if template is None:
            return 0, None
        n, visible = template.whole(parts, start)
        if self.keeps and n:
            self._said.append(template.said(parts[start:start + n]))
        return n, visible

    def _alike(self, data: bytes, start: int, stamps_ns: Sequence[int],
               ends: Sequence[int]) -> list[int]:
        """Takes the events from `start` on that are like one before, but for their text, each with
        the stamp of the read that ended it. Their ends."""
        template = self._ready_template
        events, visible = ([], None) if template is None else template.run(data, start)
        if not events:
            return []
        if self.keeps and template is not None:
            self._said.append(template.said(
                data[a:b] for a, b in itertools.pairwise([start, *events])))
        read = bisect.bisect_left(ends, events[0])
        for at in events:
            while ends[read] < at:
                read += 1
            self._stamps_ns.append(stamps_ns[read])
        self._see(None if visible is None else stamps_ns[bisect.bisect_left(ends, visible)])
        return events

    def _see(self, stamp_ns: int | None) -> None:
        if self._first_visible_ns is None:
            self._first_visible_ns = stamp_ns

    def _token(self, now_ns: int, event: openai.Event) -> None:
        if self.first_ns is None:
            self.first_ns = now_ns
        if event.visible:
            self._see(now_ns)
        self._stamps_ns.append(now_ns)
        n_tok = event.n_tok
        if n_tok is None and event.usage is not None and event.usage.completion_tokens is not None:
            n_tok = event.usage.completion_tokens - sum(self._event_tok)
        if n_tok is not None:
            self._event_tok.append(n_tok)

    def _bad(self, why: str) -> None:
        self._garbled = True
        self._say(why)
        self.fatal = self.fatal or Outcome.BAD_STREAM

    def _say(self, why: str) -> None:
        self._error = self._error or why[:500]

    def _http_answer(self) -> None:
        """A whole answer instead of a stream: an HTTP error, or JSON or a page with status 200."""
        assert self.status is not None
        error = openai.error_body(self._body, self.status)
        self._say(f"HTTP {self.status}: {error.message}")
        if self.status == 200:
            said = self._body.lstrip()[:2000]
            said_error = b'"error"' in said and not said.startswith(b"<")  # a page may have a class
            self.fatal = Outcome.SERVER_ERROR_EVENT if said_error else Outcome.BAD_STREAM
        elif not error.is_death and (
                self.status == 429 or self.status in self._throttle_status
                or (self.status == 503 and (self._retry_after or error.is_queue_limit))):
            self.fatal = Outcome.THROTTLED
        else:
            self.fatal = Outcome.HTTP_ERROR

    def _outcome(self, failure: Outcome | None) -> Outcome:
        if self.fatal is not None:
            return self.fatal
        if failure is not None and not self.ended:
            return failure
        if self._finish == "abort":
            return Outcome.ABORTED
        if not self._stamps_ns:
            self._say("the stream ended without one token")
            return Outcome.EMPTY
        if self._finish is None:
            self._say("the stream ended without a finish_reason")
            return Outcome.TRUNCATED
        if self._finish not in openai.GOOD_FINISH:
            self._say(f"finish_reason {self._finish!r}")
            return Outcome.SERVER_ERROR_EVENT
        return Outcome.OK
