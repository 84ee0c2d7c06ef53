"""A leg's requests once more, on the engine and its front end in virtual time: what its clients
would have seen of a server with other constants. The prompts' and answers' lengths are the run's;
a closed loop's slots go on as the simulated answers end, other requests come when they came."""

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from servers.sim.engine import Engine, EngineConfig, Request, Step
from servers.sim.front import Front, Turn

FAR_S = 1.0  # looked ahead at once


class Asked(NamedTuple):
    """`counts`: is to be waited for (others only load the server)."""

    sent_s: float
    prompt_tok: int
    output_tok: int
    counts: bool


class Answer(NamedTuple):
    """As a client sees it: `events` token events, which hold `tokens` tokens."""

    ttft_s: float
    tokens: int
    gaps_s: Sequence[float]


class _Flight:
    __slots__ = ("k", "sent_s", "spans")

    def __init__(self, k: int, sent_s: float) -> None:
        self.k, self.sent_s = k, sent_s
        self.spans: list[list[int]] = []  # from which step to which it had a token each


def replay(asked: Sequence[Asked], slots: int | None, config: EngineConfig) -> list[Answer | None]:
    """The answers to those that count, in the order of `asked` (sorted by `sent_s`); None for the
    others. `slots`: of a closed loop."""
    run = _Run(asked, slots, config)
    while run.left:
        run.advance()
    return run.answers()


class _Run:
    def __init__(self, asked: Sequence[Asked], slots: int | None, config: EngineConfig) -> None:
        self.left = sum(a.counts for a in asked)
        self._asked, self._closed = asked, slots is not None
        self._engine, self._front = Engine(config), Front(config.machine.constants)
        first = len(asked) if slots is None else min(slots, len(asked))
        self._due = [(a.sent_s, k) for k, a in enumerate(asked[:first])]
        self._next = first
        self._now_s = 0.0
        self._ready: deque[tuple[float, Request]] = deque()
        self._flying: dict[int, _Flight] = {}
        self._landing: deque[tuple[int, _Flight]] = deque()
        self._landed: dict[int, _Flight] = {}
        self._given_s: list[float] = []  # when each step's tokens were written
        self._steps = 0

    def advance(self) -> None:
        """To the end of the next step, or steps that are alike, or to what comes before."""
        engine, now_s = self._engine, self._now_s
        self._send(now_s)
        while self._ready and self._ready[0][0] <= now_s:
            engine.submit(self._ready.popleft()[1])
        turn_s = self._front.next_s if self._landing else None
        if turn_s is not None and turn_s <= now_s:
            self._write(self._front.begin(now_s))
            return
        comes = [q[0][0] for q in (self._due, self._ready) if q]
        comes += [] if turn_s is None else [turn_s]
        if ends := engine.coast(now_s, min([*comes, now_s + FAR_S])):
            self._coasted(ends, engine.running)
        elif (step := engine.step(now_s)) is not None:
            self._now_s = step.end_s
            self._send(step.end_s)
            self._give(step)
        elif self._front.next_s is not None:
            self._now_s = max(now_s, self._front.next_s)
            self._write(self._front.begin(self._now_s))
        elif comes:
            self._now_s = max(now_s, min(comes))
        else:
            raise ValueError("a prompt is larger than the KV cache")

    def answers(self) -> list[Answer | None]:
        given_s = np.array(self._given_s)
        found: list[Answer | None] = [None] * len(self._asked)
        for k, flight in self._landed.items():
            stamps = np.concatenate([given_s[a:b] for a, b in flight.spans])
            at = np.unique(stamps)  # tokens that are written at one time are one event
            found[k] = Answer(float(at[0] - flight.sent_s), len(stamps), np.diff(at).tolist())
        return found

    def _send(self, until_s: float) -> None:
        """Who comes by then is at the front end before the tokens that are ready then."""
        while self._due and self._due[0][0] <= until_s:
            sent_s, k = heapq.heappop(self._due)
            asked = self._asked[k % len(self._asked)]
            self._flying[k] = _Flight(k, sent_s)
            self._ready.append((self._front.take_in(sent_s), Request(
                k, asked.prompt_tok, asked.output_tok, ignore_eos=True)))

    def _coasted(self, ends: list[float], streams: int) -> None:
        self._now_s = last_s = ends.pop()
        self._steps += len(ends) + 1
        if written := self._front.steady(ends, streams):
            self._given_s += written
        else:
            for end_s in ends:
                self._write(self._front.give_out(end_s, streams, 0))
        self._send(last_s)
        self._write(self._front.give_out(last_s, streams, 0))

    def _give(self, step: Step) -> None:
        number, flying = self._steps, self._flying
        self._steps += 1
        for k in step.begun:
            flying[k].spans.append([number, number + 1])
        for k in step.preempted:
            if flying[k].spans:
                flying[k].spans[-1][1] = number
        for k in step.finished:
            flying[k].spans[-1][1] = number + 1
            self._landing.append((number, flying.pop(k)))
        self._write(self._front.give_out(step.end_s, step.events, step.fresh))

    def _write(self, turns: list[Turn]) -> None:
        for written_s, steps in turns:
            self._given_s += itertools.repeat(written_s, steps)
            while self._landing and self._landing[0][0] < len(self._given_s):
                self._land(self._landing.popleft()[1], written_s)

    def _land(self, flight: _Flight, end_s: float) -> None:
        if flight.k < len(self._asked) and self._asked[flight.k].counts:
            self._landed[flight.k] = flight
            self.left -= 1
        if self._closed:  # the load is kept up until the last one that counts has ended
            heapq.heappush(self._due, (end_s, self._next))
            self._next += 1
