"""The API server's one process as a queue: it takes requests in and gives token events out, one
thing after the other. Where it is the limit, the engine runs ahead of it, and clients see tokens,
and their answers' ends, later than the engine made them.

It gives out in turns. A turn takes all steps that have ended since the one before began, and a
stream's tokens of several steps become one event, as in vLLM, whose queue per request keeps the
output that nobody has fetched yet and adds the next one to it. So it lags by a turn or two, however
fast the engine is.
"""

import itertools
from typing import NamedTuple

from servers.sim.profiles import Constants


class Turn(NamedTuple):
    """When its events are written; of how many steps, in order, they tell."""

    written_s: float
    steps: int


class Front:
    """Calls come in the order of time. Token events wait for those before them. A new request does
    not wait for them (the process's loop comes round to its socket), but for those before it; its
    work makes the tokens later."""

    def __init__(self, constants: Constants) -> None:
        self._token_s, self._merged_s = constants.front_token_s, constants.front_merged_s
        self._request_s, self._latency_s = constants.front_request_s, constants.front_latency_s
        self._taken_s = self._given_s = 0.0  # the last request, and the last turn, is through
        self._steps = self._events = self._tokens = 0  # of the turn that has not begun

    @property
    def next_s(self) -> float | None:
        """When the next turn begins, if steps wait for it."""
        return self._given_s if self._steps else None

    def take_in(self, now_s: float) -> float:
        """A request came; when the engine has it."""
        self._taken_s = max(now_s, self._taken_s) + self._request_s
        self._given_s = max(now_s, self._given_s) + self._request_s
        return self._taken_s + self._latency_s

    def give_out(self, now_s: float, tokens: int, fresh: int) -> list[Turn]:
        """A step ended with so many tokens that are to be told, `fresh` of them to streams that had
        none in the step before. The turns that are known now: of earlier steps, or of this one."""
        known = self.begin(now_s) if self._steps else []
        self._events += fresh if self._steps else tokens
        self._tokens += tokens
        self._steps += 1
        if self._given_s <= now_s:
            self._given_s = now_s
            known += self.begin(now_s)
        return known

    def steady(self, ends_s: list[float], tokens: int) -> list[float]:
        """When the events of steps that end there are written, all streams having a token in each;
        nothing where a turn would take more than one of them."""
        each_s = self._token_s * tokens
        if (self._steps or not ends_s or self._given_s > ends_s[0] or each_s > min(
                [b - a for a, b in itertools.pairwise(ends_s)], default=each_s)):
            return []
        self._given_s = ends_s[-1] + each_s
        return [end_s + each_s for end_s in ends_s]

    def begin(self, now_s: float) -> list[Turn]:
        """The turn that has begun by now."""
        if not self._steps or self._given_s > now_s:
            return []
        self._given_s += (self._token_s * self._events
                          + self._merged_s * (self._tokens - self._events))
        turn = Turn(self._given_s, self._steps)
        self._steps = self._events = self._tokens = 0
        return [turn]
