"""The API server's one process as a queue: it takes requests in and gives token events out, one
thing after the other. Where it is the limit, the engine runs ahead of it, and clients see tokens,
and their answers' ends, later than the engine made them.

It gives out in turns, one step after the other. Of steps with few tokens a turn takes all that
wait, and a stream's tokens of several steps become one event: vLLM's queue per request adds an
output to one that nobody has fetched yet. More than CHUNK_TOK tokens of a step it hands over in
parts, and whoever waits for one fetches it in between: those are told one by one. (Real ones, at
concurrency 64, 128 and 256 of Qwen2.5-0.5B on an H200: 1.1, 1.9 and 1.2 tokens in an event.)
"""

import itertools
from collections import deque
from typing import NamedTuple

from servers.sim.profiles import Constants

CHUNK_TOK = 128  # vLLM's VLLM_V1_OUTPUT_PROC_CHUNK_SIZE


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
        self._work_s = 0.0  # of all that has begun
        self._waiting: deque[tuple[int, int]] = deque()  # steps: tokens, and how many are fresh

    @property
    def next_s(self) -> float | None:
        """When the next turn begins, if steps wait for it."""
        return self._given_s if self._waiting else None

    def worked_s(self, now_s: float) -> float:
        """Its CPU time until now; it is one process, and so on one core."""
        return self._work_s - max(0.0, self._given_s - now_s)

    def take_in(self, now_s: float) -> float:
        """A request came; when the engine has it."""
        self._taken_s = max(now_s, self._taken_s) + self._request_s
        self._given_s = max(now_s, self._given_s) + self._request_s
        self._work_s += self._request_s
        return self._taken_s + self._latency_s

    def give_out(self, now_s: float, tokens: int, fresh: int) -> list[Turn]:
        """A step ended with so many tokens that are to be told, `fresh` of them to streams that had
        none in the step before. The turns that are known now: of earlier steps, or of this one."""
        known = self.begin(now_s)
        self._waiting.append((tokens, fresh))
        if self._given_s <= now_s:
            self._given_s = now_s
            known += self.begin(now_s)
        return known

    def steady(self, ends_s: list[float], tokens: int) -> list[float]:
        """When the events of steps that end there are written, all streams having a token in each;
        nothing where a turn would take more than one of them."""
        each_s = self._token_s * tokens
        if (self._waiting or not ends_s or self._given_s > ends_s[0] or each_s > min(
                [b - a for a, b in itertools.pairwise(ends_s)], default=each_s)):
            return []
        self._given_s = ends_s[-1] + each_s
        self._work_s += each_s * len(ends_s)
        return [end_s + each_s for end_s in ends_s]

    def begin(self, now_s: float) -> list[Turn]:
        """The turns that have begun by now."""
        begun = []
        while self._waiting and self._given_s <= now_s:
            tokens, _ = self._waiting.popleft()
            self._work(self._token_s * tokens)
            steps = 1
            while tokens <= CHUNK_TOK and self._waiting and self._waiting[0][0] <= CHUNK_TOK:
                more, fresh = self._waiting.popleft()
                self._work(self._token_s * fresh + self._merged_s * (more - fresh))
                steps += 1
            begun.append(Turn(self._given_s, steps))
        return begun

    def _work(self, seconds: float) -> None:
        self._given_s += seconds
        self._work_s += seconds
