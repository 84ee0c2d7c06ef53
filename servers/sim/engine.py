"""vLLM's v1 engine as a pure state machine: requests in, steps of tokens out, in virtual time.

Each step spends a budget of tokens: on running requests first, in order, then on waiting ones,
first come first served; a long prompt is cut into chunks of what is left. KV memory is handed out
in blocks of 16 tokens. When a running request finds no block, the last running one is preempted:
it loses its blocks, goes to the head of the queue and is computed anew.
"""

import random
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from servers.sim.costs import BLOCK_TOK, Batch, Machine, step_time_s


@dataclass(frozen=True, slots=True)
class EngineConfig:
    machine: Machine
    num_blocks: int
    max_model_len: int
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    prefix_caching: bool = True
    mean_output_tok: float = 256.0  # of answers that end by themselves (EOS), geometric
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """`prompt_blocks`: chained hashes of the prompt's full blocks, so that equal hashes mean equal
    prefixes; empty for a prompt that shares nothing."""

    id: int
    prompt_tok: int
    max_tokens: int
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_blocks: Sequence[int] = ()


@dataclass(slots=True)
class Step:
    """One step: it ends at `end_s`, and every request of `tokens` then gets one token (an EOS,
    without text, where `finished` says "stop")."""

    start_s: float
    duration_s: float
    tokens: list[int]
    finished: dict[int, str] = field(default_factory=dict)  # id -> finish_reason

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s


@dataclass(slots=True)
class Stats:
    """Counters since the start, in vLLM's sense; the prefix cache's are in tokens."""

    preemptions: int = 0
    prompt_tok: int = 0
    generation_tok: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    steps: int = 0
    finished: Counter[str] = field(default_factory=Counter)


class BlockPool:
    """KV blocks: `free` ones, those of requests, and idle ones whose content is still findable by
    hash and which are given away least recently used first."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self._refs: dict[int, int] = {}  # findable and in use
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable, nobody's

    @property
    def available(self) -> int:
        return self.free + len(self._idle)

    def take(self, n: int) -> None:
        """`n` blocks for new content; the caller has seen that so many are available."""
        fresh = min(n, self.free)
        self.free -= fresh
        for _ in range(n - fresh):
            self._idle.popitem(last=False)

    def match(self, hashes: Sequence[int], most: int) -> tuple[int, int]:
        """(leading blocks of `hashes` that are here, `most` at most; how many of them are idle)."""
        found = idle = 0
        for h in hashes[:most]:
            if h in self._idle:
                idle += 1
            elif h not in self._refs:
                break
            found += 1
        return found, idle

    def claim(self, hashes: Sequence[int]) -> None:
        for h in hashes:
            self._idle.pop(h, None)
            self._refs[h] = self._refs.get(h, 0) + 1

    def publish(self, h: int) -> bool:
        """Makes a block of the caller's findable; False if there is one of the same content."""
        if h in self._refs or h in self._idle:
            return False
        self._refs[h] = 1
        return True

    def give_back(self, anonymous: int, hashes: Sequence[int]) -> None:
        self.free += anonymous
        for h in reversed(hashes):  # a prefix's tail goes first when memory is short
            self._refs[h] -= 1
            if not self._refs[h]:
                del self._refs[h]
                self._idle[h] = None


class _Seq:
    """A request in the engine. Its blocks hold `room` tokens."""

    __slots__ = ("computed", "findable", "preempted", "reason", "request", "room", "stop_at",
                 "total")

    def __init__(self, request: Request, stop_at: int, reason: str) -> None:
        self.request = request
        self.total = request.prompt_tok  # prompt and generated
        self.computed = 0  # of these, in the KV cache
        self.stop_at = stop_at  # `total` at which it ends, for `reason`
        self.reason = reason
        self.room = 0
        self.findable: list[int] = []  # hashes of its leading blocks
        self.preempted = False


class Engine:
    """Deterministic: equal configuration and equal calls give equal steps."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.stats = Stats()
        self._pool = BlockPool(config.num_blocks)
        self._rng = random.Random(config.seed)
        self._running: list[_Seq] = []
        self._waiting: deque[_Seq] = deque()
        self._aborted: set[int] = set()
        self.admitted: list[tuple[int, int]] = []  # by the last step: (id, tokens from the cache)
        self.evicted: list[int] = []  # by the last step: ids of preempted requests

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that requests hold; idle cached ones are free to take."""
        return 1.0 - self._pool.available / self._pool.size

    def submit(self, request: Request) -> None:
        """Queues the request. Its prompt must be shorter than `max_model_len`."""
        room = self.config.max_model_len - request.prompt_tok
        output, reason = min(request.max_tokens, room), "length"
        if not request.ignore_eos:
            drawn = 1 + int(self._rng.expovariate(1.0 / self.config.mean_output_tok))
            drawn = max(drawn, request.min_tokens + 1)
            if drawn <= output:
                output, reason = drawn, "stop"
        self._waiting.append(_Seq(request, request.prompt_tok + output, reason))

    def abort(self, request_id: int) -> None:
        """Forgets the request at the next step, which is when its blocks become free. Unknown and
        finished ones are ignored."""
        self._aborted.add(request_id)

    def step(self, now_s: float) -> Step | None:
        """The step that starts now; None when there is nothing to do."""
        self._drop_aborted()
        self.admitted, self.evicted = [], []
        batch, step = Batch(), Step(now_s, 0.0, [])
        done: list[_Seq] = []
        calm = self._advance_running(batch, step.tokens, done)
        if calm:
            self._admit(batch, step.tokens, done)
        if not batch.new_tok:
            return None
        for seq in done:
            self._running.remove(seq)
            self._release(seq)
            step.finished[seq.request.id] = seq.reason
            self.stats.finished[seq.reason] += 1
        batch.sampled = len(step.tokens)
        self.stats.generation_tok += batch.sampled
        self.stats.steps += 1
        step.duration_s = step_time_s(self.config.machine, batch)
        return step

    def _drop_aborted(self) -> None:
        if not self._aborted:
            return
        for seq in [s for s in self._running if s.request.id in self._aborted]:
            self._running.remove(seq)
            self._release(seq)
        self._waiting = deque(s for s in self._waiting if s.request.id not in self._aborted)
        self._aborted.clear()

    def _advance_running(self, batch: Batch, tokens: list[int], done: list[_Seq]) -> bool:
        """Gives the running requests their share of the step; False if one had to be preempted."""
        running, budget = self._running, self.config.max_num_batched_tokens
        preemptions = self.stats.preemptions
        i = 0
        while i < len(running) and batch.new_tok < budget:
            seq = running[i]
            new = min(seq.total - seq.computed, budget - batch.new_tok)
            if seq.computed + new > seq.room and not self._make_room(seq, seq.computed + new):
                break
            self._compute(seq, new, batch, tokens, done)
            i += 1
        return self.stats.preemptions == preemptions

    def _make_room(self, seq: _Seq, upto_tok: int) -> bool:
        """Blocks for `seq`, if need be those of later ones; False if it was preempted itself."""
        need = -(-(upto_tok - seq.room) // BLOCK_TOK)
        while self._pool.available < need:
            victim = self._running.pop()
            self._release(victim)
            victim.preempted = True
            self.evicted.append(victim.request.id)
            self._waiting.appendleft(victim)
            self.stats.preemptions += 1
            if victim is seq:
                return False
        self._pool.take(need)
        seq.room += need * BLOCK_TOK
        return True

    def _admit(self, batch: Batch, tokens: list[int], done: list[_Seq]) -> None:
        """Starts waiting requests in order, until one does not fit (it blocks those behind it)."""
        config, pool = self.config, self._pool
        while self._waiting and len(self._running) < config.max_num_seqs:
            budget = config.max_num_batched_tokens - batch.new_tok
            seq = self._waiting[0]
            hashes = seq.request.prompt_blocks if config.prefix_caching else ()
            found, idle = pool.match(hashes, (seq.total - 1) // BLOCK_TOK)  # one token is left
            cached = found * BLOCK_TOK
            new = min(seq.total - cached, budget)
            need = -(-(cached + new) // BLOCK_TOK) - found
            if budget <= 0 or need > pool.available - idle:
                return
            self._running.append(self._waiting.popleft())
            pool.claim(hashes[:found])
            pool.take(need)
            seq.findable, seq.computed = list(hashes[:found]), cached
            seq.room = (found + need) * BLOCK_TOK
            self.admitted.append((seq.request.id, cached))
            if not seq.preempted and config.prefix_caching:
                self.stats.prefix_queries += seq.total
                self.stats.prefix_hits += cached
            self._compute(seq, new, batch, tokens, done)

    def _compute(self, seq: _Seq, new: int, batch: Batch, tokens: list[int],
                 done: list[_Seq]) -> None:
        """`new` more tokens of `seq` go into the KV cache; with the last one comes a token."""
        end = seq.computed = seq.computed + new
        batch.new_tok += new
        batch.context_tok += end
        batch.attended += new * (end - new / 2)
        if new > 1:
            self._publish(seq)
        if end < seq.total:
            return
        if end == seq.request.prompt_tok:
            self.stats.prompt_tok += end
        tokens.append(seq.request.id)
        seq.total += 1
        if seq.total == seq.stop_at:
            done.append(seq)

    def _publish(self, seq: _Seq) -> None:
        """Full blocks of the prompt become findable. Those of the answer do not: their content is
        made by who writes it, not here."""
        if not self.config.prefix_caching:
            return
        for h in seq.request.prompt_blocks[len(seq.findable):seq.computed // BLOCK_TOK]:
            if not self._pool.publish(h):
                return  # a twin was quicker; what follows stays this request's own
            seq.findable.append(h)

    def _release(self, seq: _Seq) -> None:
        self._pool.give_back(seq.room // BLOCK_TOK - len(seq.findable), seq.findable)
        seq.findable, seq.room, seq.computed = [], 0, 0
