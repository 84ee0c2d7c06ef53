"""vLLM's v1 engine as a pure state machine: requests in, steps of tokens out, in virtual time.

Each step spends a budget of tokens: on running requests first, in order, then on waiting ones,
first come first served; a long prompt is cut into chunks of what is left. KV memory is handed out
in blocks of 16 tokens. When a running request finds no block, the last running one is preempted:
it loses its blocks, goes to the head of the queue and is computed anew.

Requests that decode get one token in every step, so they are not gone through one by one: how much
a step reads, how many of them need a block and which of them end is known from its number.
"""

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from servers.sim import costs
from servers.sim.blocks import BlockPool
from servers.sim.costs import BLOCK_TOK, Batch, Machine, StepTime


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`stream_interval`: a client gets an event for its first token, for every so many after it,
    and for its last one. `backend`: "transformers" is stepped by `turns.Turns`, which knows no
    blocks, batches and prefixes."""

    machine: Machine
    num_blocks: int
    max_model_len: int
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    prefix_caching: bool = True
    mean_output_tok: float = 256.0  # of answers that end by themselves (EOS), geometric
    seed: int = 0
    stream_interval: int = 1
    backend: Literal["vllm", "transformers"] = "vllm"

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:  # vLLM's words
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be greater than or "
                f"equal to max_num_seqs ({self.max_num_seqs}).")


@dataclass(frozen=True, slots=True)
class Request:
    """`blocks`: chained hashes of the full blocks of the prompt and, as far as it is foreseen, of
    the answer, so that equal hashes mean equal prefixes; empty for what shares nothing."""

    id: int
    prompt_tok: int
    max_tokens: int
    ignore_eos: bool = False
    min_tokens: int = 0
    blocks: Sequence[int] = ()


@dataclass(slots=True)
class Step:
    """One step: it ends at `end_s`, and every request of `tokens` then gets one token (an EOS,
    without text, where `finished` says "stop"). `begun`: those of `tokens` that had none in the
    step before; `preempted`: those that get none for a while. `admitted`: those that the engine
    began to compute, each with how many of its tokens were in the prefix cache. `events`: how many
    of the tokens make an event of a stream (all, but for `stream_interval`). `failed`: whose
    request ends with an error, and its words. `busy_frac`: the share in which the GPU works."""

    start_s: float
    duration_s: float
    tokens: list[int]
    begun: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    admitted: list[tuple[int, int]] = field(default_factory=list)
    finished: dict[int, str] = field(default_factory=dict)  # id -> finish_reason
    events: int = 0
    fresh: int = 0  # of them, to streams that had none in the step before
    failed: dict[int, str] = field(default_factory=dict)
    busy_frac: float = 1.0

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


class _Seq:
    """A request in the engine. `computed` of its `total` tokens are in the KV cache; while it
    decodes, that was so in step number `since`, and each step since has added one."""

    __slots__ = ("again", "computed", "ends", "findable", "given", "output", "reason", "request",
                 "room", "since", "total")

    def __init__(self, request: Request, output: int, reason: str) -> None:
        self.request = request
        self.output = output  # tokens until it ends, for `reason` …
        self.given = 0  # … of which it has these
        self.reason = reason
        self.total = request.prompt_tok  # and what a preemption threw away
        self.computed = self.since = 0
        self.ends = 0  # the number of its last step
        self.room = 0  # tokens that its blocks hold, until it decodes
        self.findable = 0  # of its leading blocks, those that have a hash in the pool
        self.again = False  # was preempted

    def at(self, number: int) -> int:
        """Tokens in the KV cache after that step."""
        return self.computed + number - self.since


class Engine:
    """Deterministic: equal configuration and equal calls give equal steps."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.stats = Stats()
        self._time = StepTime(config.machine)
        self._pool = BlockPool(config.num_blocks)
        self._rng = random.Random(config.seed)
        self._number = 0  # of the last step
        self._waiting: deque[_Seq] = deque()
        self._aborted: set[int] = set()
        self._partial: _Seq | None = None  # the last running one, if its prompt is not yet through
        self._decoding: dict[int, _Seq] = {}  # the others, in the order in which they run:
        self._context = 0  # tokens they have in the KV cache
        self._hungry = [0] * BLOCK_TOK  # how many of them need a block, by step mod 16 …
        self._telling = [0] * config.stream_interval  # … or make an event, mod the interval
        self._ends: dict[int, list[_Seq]] = {}  # by step; some may have been preempted since

    @property
    def running(self) -> int:
        return len(self._decoding) + (self._partial is not None)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that requests hold; idle cached ones are free to take."""
        return 1.0 - self._pool.available / self._pool.size

    def used_gib(self, utilization: float) -> float:
        """Memory in use on each GPU, as NVML shows it."""
        return costs.used_gib(self.config.machine, utilization)

    def submit(self, request: Request) -> None:
        """Queues the request. Its prompt must be shorter than `max_model_len`."""
        room = self.config.max_model_len - request.prompt_tok
        output, reason = min(request.max_tokens, room), "length"
        if not request.ignore_eos:
            drawn = 1 + int(self._rng.expovariate(1.0 / self.config.mean_output_tok))
            drawn = max(drawn, request.min_tokens + 1)
            if drawn <= output:
                output, reason = drawn, "stop"
        self._waiting.append(_Seq(request, output, reason))

    def abort(self, request_id: int) -> None:
        """Forgets the request at the next step, which is when its blocks become free. Unknown and
        finished ones are ignored."""
        self._aborted.add(request_id)

    def step(self, now_s: float) -> Step | None:
        """The step that starts now; None when there is nothing to do."""
        if self._aborted:
            self._drop_aborted()
        number = self._number = self._number + 1
        step = Step(now_s, 0.0, [])
        need = self._hungry[(number - 1) % BLOCK_TOK]
        if need <= self._pool.available:
            self._pool.take(need)
        else:
            self._take_in_turn(step, number)
        step.tokens = list(self._decoding)
        n = len(step.tokens)
        self._context += n
        batch = Batch(n, 0, self._context - n / 2, self._context)
        step.events = self._telling[number % len(self._telling)]
        if self._partial is not None:
            self._go_on(self._partial, batch, step)
        if self._waiting and not step.preempted:
            self._admit(batch, step)
        if not batch.new_tok:
            return None
        step.tokens += step.begun
        for seq in self._ends.pop(number, ()):
            if self._decoding.get(seq.request.id) is seq and seq.ends == number:
                self._finish(seq, step, number)
        batch.sampled = len(step.tokens)
        self.stats.steps += 1
        self.stats.generation_tok += batch.sampled
        step.fresh = len(step.begun) if len(self._telling) == 1 else step.events
        step.duration_s = self._time(batch)
        return step

    def coast(self, now_s: float, until_s: float) -> list[float]:
        """The ends of the steps from now on in which those that decode go on and nothing else
        happens, up to the first that ends after `until_s`. The same as `step` for each of them,
        but quick; empty: the next step is not such a one."""
        full = self.running >= self.config.max_num_seqs
        if (self._aborted or self._partial is not None or (self._waiting and not full)
                or not self._decoding or len(self._telling) > 1):
            return []
        ends: list[float] = []
        time_of = self._time.of
        n, number, context, pool = len(self._decoding), self._number, self._context, self._pool
        while now_s < until_s and number + 1 not in self._ends:
            if need := self._hungry[number % BLOCK_TOK]:
                if need > pool.available:
                    break
                pool.take(need)
            number += 1
            context += n
            now_s += time_of(n, n, context - n / 2, context)
            ends.append(now_s)
        self._number, self._context = number, context
        self.stats.steps += len(ends)
        self.stats.generation_tok += n * len(ends)
        return ends

    # ------------------------------------------------------------------------------- the running

    def _take_in_turn(self, step: Step, number: int) -> None:
        """A block for each of those that need one, in order; where there is none, the last running
        one is preempted. (Whoever has taken one stands before all that can be preempted.)"""
        for seq in list(self._decoding.values()):
            if seq.request.id not in self._decoding:
                return
            if seq.at(number - 1) % BLOCK_TOK:
                continue
            while not self._pool.available:
                if self._preempt_last(step, number - 1) is seq:
                    return
            self._pool.take(1)

    def _preempt_last(self, step: Step, number: int) -> _Seq:
        """`number`: of the last step that the victim took part in."""
        victim = self._partial
        if victim is not None:
            self._release(victim, victim.room)
            self._partial = None
        else:
            victim = next(reversed(self._decoding.values()))
            victim.given += number - victim.since
            victim.total = victim.at(number) + 1
            self._leave(victim, number)
        victim.computed, victim.again = 0, True
        self._waiting.appendleft(victim)
        self.stats.preemptions += 1
        step.preempted.append(victim.request.id)
        return victim

    def _leave(self, seq: _Seq, number: int) -> None:
        """It decodes no more after that step; its blocks are free."""
        computed = seq.at(number)
        del self._decoding[seq.request.id]
        self._context -= computed
        self._hungry[(seq.since - seq.computed) % BLOCK_TOK] -= 1
        self._telling[(seq.ends - seq.output + 1) % len(self._telling)] -= 1
        if self.config.prefix_caching:  # what it has said can be found, too
            seq.findable += self._pool.publish(
                seq.request.blocks[seq.findable:computed // BLOCK_TOK])
        self._release(seq, -(-computed // BLOCK_TOK) * BLOCK_TOK)

    def _finish(self, seq: _Seq, step: Step, number: int) -> None:
        """Its last token is an event, whatever the interval."""
        step.events += (seq.output - 1) % self.config.stream_interval != 0
        self._leave(seq, number)
        step.finished[seq.request.id] = seq.reason
        self.stats.finished[seq.reason] += 1

    def _release(self, seq: _Seq, room: int) -> None:
        self._pool.give_back(room // BLOCK_TOK - seq.findable,
                             seq.request.blocks[:seq.findable])
        seq.findable = seq.room = 0

    def _drop_aborted(self) -> None:
        """Many of them have ended meanwhile."""
        gone, self._aborted = self._aborted, set()
        for seq in [s for i, s in self._decoding.items() if i in gone]:
            self._leave(seq, self._number)
        if self._partial is not None and self._partial.request.id in gone:
            self._release(self._partial, self._partial.room)
            self._partial = None
        if any(s.request.id in gone for s in self._waiting):
            self._waiting = deque(s for s in self._waiting if s.request.id not in gone)

    # ------------------------------------------------------------------------------------ prompts

    def _go_on(self, seq: _Seq, batch: Batch, step: Step) -> None:
        """The next chunk of a long prompt."""
        new = min(seq.total - seq.computed, self.config.max_num_batched_tokens - batch.new_tok)
        need = -(-(seq.computed + new - seq.room) // BLOCK_TOK)
        if need > self._pool.available:
            self._preempt_last(step, self._number)
            return
        self._partial = None
        self._prefill(seq, new, need, batch, step)

    def _admit(self, batch: Batch, step: Step) -> None:
        """Starts waiting requests in order, until one does not fit (it blocks those behind it)."""
        config, pool = self.config, self._pool
        while self._waiting and self.running < config.max_num_seqs:
            budget = config.max_num_batched_tokens - batch.new_tok
            seq = self._waiting[0]
            hashes = seq.request.blocks if config.prefix_caching else ()
            found, idle = pool.match(hashes, (seq.total - 1) // BLOCK_TOK)  # one token is left
            cached = found * BLOCK_TOK
            new = min(seq.total - cached, budget)
            need = -(-(cached + new) // BLOCK_TOK) - found
            if budget <= 0 or need > pool.available - idle:
                return
            self._waiting.popleft()
            pool.claim(hashes[:found])
            seq.findable, seq.computed, seq.room = found, cached, cached
            step.admitted.append((seq.request.id, cached))
            if not seq.again and config.prefix_caching:
                self.stats.prefix_queries += seq.total
                self.stats.prefix_hits += cached
            self._prefill(seq, new, need, batch, step)

    def _prefill(self, seq: _Seq, new: int, blocks: int, batch: Batch, step: Step) -> None:
        """`new` more tokens go into the KV cache, in so many new blocks; after the last one it
        decodes, and has a token."""
        self._pool.take(blocks)
        seq.room += blocks * BLOCK_TOK
        end = seq.computed = seq.computed + new
        batch.new_tok += new
        batch.context_tok += end
        batch.attended += new * (end - new / 2)
        if self.config.prefix_caching:
            seq.findable += self._pool.publish(
                seq.request.blocks[seq.findable:end // BLOCK_TOK])
        if end < seq.total:
            self._partial = seq
            return
        if not seq.given:
            self.stats.prompt_tok += end
        seq.given += 1
        seq.since, seq.ends = self._number, self._number + seq.output - seq.given
        step.begun.append(seq.request.id)
        step.events += (seq.given - 1) % self.config.stream_interval == 0
        self._decoding[seq.request.id] = seq
        self._context += end
        self._hungry[(seq.since - end) % BLOCK_TOK] += 1
        self._telling[(seq.ends - seq.output + 1) % len(self._telling)] += 1
        self._ends.setdefault(seq.ends, []).append(seq)
