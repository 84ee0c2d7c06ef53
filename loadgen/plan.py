"""What is to be sent: sessions of turns, and when. The same scenario, leg and seed give the same
plan; `sessions(…, shard=i, of=n)` takes k ≡ i (mod n), so that n shards are exactly one plan.

Randomness is counter-based (Philox keyed by seed and stream, counted by k): what session k is
does not depend on which shard asks, or in which order.
"""

import bisect
import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Struct

from loadgen import datasets, dialogue, tasks
from loadgen.leg import Leg
from loadgen.prompts import GUESS_OVERHEAD_TOK, Ratio, build, recorded
from loadgen.scenario import (
    Closed,
    Fixed,
    Length,
    Lognormal,
    Open,
    RequestClass,
    Scenario,
    Trace,
    Uniform,
)
from loadgen.sessions import leaves_after_s, think_s
from loadgen.sources import Asked, Dataset
from loadgen.tasks import Task

# streams of randomness: a new one goes to the end, and plans of before stay what they were
(ARRIVALS, MIX, LENGTHS, PROMPTS, CALIBRATION, TURNS, THINK, ABANDON, FACTS, TASKS,
 TRACE) = range(11)
_BLOCK: Final = 1024  # gaps drawn at once
_GOLDEN: Final = 0x9E3779B97F4A7C15  # 2⁶⁴ times the golden ratio's fraction


class Turn(Struct, frozen=True):
    """One request of a session. `prompt_tok`: what it adds to what was said before (of a given
    prompt, a guess of all that is sent); `think_s`: pause before it, after the answer before (the
    first turn's: what a closed loop's slot rests after the whole session); `text`: a given prompt
    instead of a made one, `before`: roles and texts of the messages that come before it;
    `abandon_after_s`: the client leaves."""

    prompt_tok: int
    output_tok: int
    think_s: float = 0.0
    abandon_after_s: float | None = None
    text: str | None = None
    before: tuple[tuple[str, str], ...] = ()


class Session(Struct, frozen=True):
    """What one user does. `due_s` counts from the leg's start; None: when a slot is free.
    Sessions with equal `prefix` ids begin with the same text; so do those with equal `blocks`,
    each id of which stands for BLOCK_TOK tokens of a recorded prompt."""

    k: int
    cls: str
    due_s: float | None
    turns: tuple[Turn, ...]
    prefix: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()


@functools.cache
def _reel(name: int) -> tuple[Any, np.random.Generator, dict[str, Any]]:
    """For a stream's name only: a philox, its generator, and a state for it."""
    philox = np.random.Philox(0)
    state: dict[str, Any] = {**philox.state}
    state["state"] = {"counter": np.zeros(4, np.uint64), "key": np.zeros(2, np.uint64)}
    state["state"]["key"][1] = name
    return philox, np.random.Generator(philox), state


def stream(seed: int, name: int, k: int) -> np.random.Generator:
    """The generator for event k of a stream; equal arguments, equal numbers. There is one for
    each stream, wound to where it is wanted (a fresh one costs 15 times as much): the next call
    for the same stream takes it away."""
    philox, generator, state = _reel(name)
    state["state"]["counter"][2], state["state"]["key"][0] = k, seed
    philox.state = state
    return generator


def sessions(scenario: Scenario, leg: Leg, shard: int = 0, of: int = 1) -> Iterator[Session]:
    """This shard's stripe of the leg's plan, in the order of `due_s`; endless but for a trace and
    `num_sessions`, because a leg's load is held until its last measured request has ended."""
    limit = leg.num_sessions
    if isinstance(leg.load, Closed):
        of = min(of, leg.load.concurrency)  # a shard without a slot has no stripe either
        if shard >= of:
            return
        ks = itertools.count(shard, of) if limit is None else range(shard, limit, of)
        for k, nth in _numbered(scenario, leg.seed, ks):
            yield session(scenario, leg.seed, k, None, nth)
        return
    asked = leg.load.asked if isinstance(leg.load, Trace) else ()
    instants = itertools.islice(arrivals(leg.load, leg.seed), shard, limit, of)
    numbers = _numbered(scenario, leg.seed, itertools.count(shard, of))
    for due_s, (k, nth) in zip(instants, numbers, strict=False):
        planned = session(scenario, leg.seed, k, due_s, nth)
        yield _as_recorded(planned, asked[k]) if asked else planned


def _numbered(scenario: Scenario, seed: int,
              ks: Iterable[int]) -> Iterator[tuple[int, int | None]]:
    """Each k with how many sessions of its class come before it; None, where nobody asks: only a
    dataset's entries are counted off."""
    asks = len(scenario.classes) > 1 and any(c.dataset is not None for c in scenario.classes)
    seen: Counter[str] = Counter()
    passed = 0
    for k in ks:
        if not asks:
            yield k, None
            continue
        for before in range(passed, k):
            seen[_class(scenario, stream(seed, MIX, before)).name] += 1
        passed = k
        yield k, seen[_class(scenario, stream(seed, MIX, k)).name]


def arrivals(load: Open | Trace, seed: int) -> Iterator[float]:
    """Due instants in s from the leg's start, ascending; endless for Open.

    Gamma gaps of mean 1/rate: shape 1/cv², scale cv²/rate; Poisson is cv = 1.
    """
    if isinstance(load, Trace):
        yield from load.due_s
        return
    if load.arrivals == "constant":
        for k in itertools.count():
            yield k / load.rate_rps
    cv2 = load.cv**2 if load.arrivals == "gamma" else 1.0
    now_s = 0.0
    for block in itertools.count():
        gaps = stream(seed, ARRIVALS, block).gamma(1 / cv2, cv2 / load.rate_rps, _BLOCK)
        for due_s in now_s + np.cumsum(gaps):
            yield float(due_s)
        now_s += float(gaps.sum())


def session(scenario: Scenario, seed: int, k: int, due_s: float | None,
            nth: int | None = None) -> Session:
    """Session k of the plan: its class by weight, its turns, their lengths, its shared prefix.
    `nth`: how many of its class come before it; None: all do."""
    mix, lengths = stream(seed, MIX, k), stream(seed, LENGTHS, k)
    cls = _class(scenario, mix)
    prefix = (int(mix.integers(cls.shared_prefix.groups)),) if cls.shared_prefix else ()
    if cls.dataset is not None:
        return Session(k=k, cls=cls.name, due_s=due_s,
                       turns=_given(cls, cls.dataset, k if nth is None else nth, seed, lengths))
    assert cls.prompt_tok is not None
    assert cls.output_tok is not None
    n = draw(cls.turns, stream(seed, TURNS, k)) if cls.turns != 1 else 1
    pauses, leaves = _pauses(cls, seed, k, n), _leaves(cls, seed, k, n)
    turns = tuple(Turn(
        prompt_tok=draw(cls.prompt_tok, lengths), output_tok=draw(cls.output_tok, lengths),
        think_s=pauses[i], abandon_after_s=leaves[i]) for i in range(n))
    return Session(k=k, cls=cls.name, due_s=due_s, turns=turns, prefix=prefix)


def _pauses(cls: RequestClass, seed: int, k: int, n: int) -> list[float]:
    if cls.think_s is None:
        return [0.0] * n
    rng = stream(seed, THINK, k)
    return [think_s(cls.think_s, rng) for _ in range(n)]


def _leaves(cls: RequestClass, seed: int, k: int, n: int) -> list[float | None]:
    if cls.abandon is None:
        return [None] * n
    rng = stream(seed, ABANDON, k)
    return [leaves_after_s(cls.abandon, rng) for _ in range(n)]


def _class(scenario: Scenario, mix: np.random.Generator) -> RequestClass:
    shares = _shares(tuple(c.weight for c in scenario.classes))
    return scenario.classes[min(bisect.bisect_right(shares, mix.random()), len(shares) - 1)]


def _given(cls: RequestClass, source: Dataset, nth: int, seed: int,
           lengths: np.random.Generator) -> tuple[Turn, ...]:
    """The requests of a dataset's entry."""
    entries = datasets.read(source).entries
    return tuple(Turn(
        prompt_tok=sum(datasets.guess_tok(text) for _, text in [*g.before, ("user", g.text)]),
        output_tok=(g.output_tok or 1) if cls.output_tok is None else draw(cls.output_tok, lengths),
        text=g.text, before=g.before) for g in entries[pick(nth, seed, len(entries))])


def pick(nth: int, seed: int, n: int) -> int:
    """Which of n entries the nth request of a class has: each once before any comes again. All
    seeds go through one shuffled row; neighbouring seeds, as the legs of a search have, begin far
    from each other there (steps of the golden ratio), so that they share no entry for as long as
    the file allows."""
    begins = (seed * _GOLDEN % 2**64) * n >> 64
    return int(_order(n)[(begins + nth) % n])


@functools.lru_cache(maxsize=8)
def _order(n: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.random.Generator(np.random.Philox(n)).permutation(n)


@functools.cache
def _shares(weights: tuple[float, ...]) -> list[float]:
    """Cumulated, up to 1."""
    shares: list[float] = np.cumsum(np.array(weights) / sum(weights)).tolist()
    return shares


def _as_recorded(planned: Session, asked: Asked) -> Session:
    """With the lengths and the shared blocks of a trace's request."""
    turn = Turn(prompt_tok=asked.prompt_tok, output_tok=asked.output_tok)
    return msgspec.structs.replace(planned, turns=(turn,), prefix=(), blocks=tuple(asked.blocks))


def draw(length: Length, rng: np.random.Generator) -> int:
    """A number of tokens."""
    match length:
        case Uniform(min=low, max=high):
            return int(rng.integers(low, high + 1))
        case Lognormal(median=median, sigma=sigma, min=low, max=high):
            return min(max(round(rng.lognormal(math.log(median), sigma)), low), high)
        case Fixed(tokens=tokens):
            return tokens
        case _:
            return length


def prompt(cls: RequestClass, planned: Session, turn: int, seed: int, ratio: Ratio) -> str:
    """What the user says in a turn: given, or made to measure and unlike every other (but for a
    prefix that its class shares)."""
    what = planned.turns[turn]
    if what.text is not None:
        return what.text
    asked = task(cls, what.prompt_tok, seed, planned.k, turn)
    rng = stream(seed, PROMPTS, planned.k * 64 + turn)
    if planned.blocks:
        return recorded(cls, what.prompt_tok, ratio, planned.blocks, seed)
    mark = nonce(seed, planned.k, turn)
    line = (lines(cls.language, planned.k, len(planned.turns), seed)[turn]
            if cls.kind == "dialogue" else None)
    if turn == 0:
        return build(cls, what.prompt_tok, ratio, rng, mark, planned.prefix or None, asked, line)
    # the prefix and the template's system prompt were there before
    later = msgspec.structs.replace(ratio, overhead_tok=min(ratio.overhead_tok, GUESS_OVERHEAD_TOK))
    return build(cls, what.prompt_tok, later, rng, mark, None, asked, line)


def question(cls: RequestClass, k: int, turns: int, turn: int,
             seed: int) -> dialogue.Question | None:
    """What turn number `turn` of a dialogue of so many asks for; None: it asks for nothing."""
    return lines(cls.language, k, turns, seed)[turn].asks if cls.kind == "dialogue" else None


@functools.lru_cache(maxsize=256)
def lines(language: Literal["en", "zh", "mixed"], k: int, turns: int,
          seed: int) -> tuple[dialogue.Line, ...]:
    """The user's part of dialogue k."""
    return dialogue.write(language, turns, stream(seed, FACTS, k))


def task(cls: RequestClass, prompt_tok: int, seed: int, k: int, turn: int) -> Task | None:
    """What turn `turn` of session k asks for, where that can be checked; drawn from a stream of
    its own, so that who checks an answer draws the same again."""
    return tasks.draw(cls, prompt_tok, stream(seed, TASKS, k * 64 + turn))


def wire(cls: RequestClass, planned: Session, turn: int, seed: int) -> dict[str, Any]:
    """What the body of a turn says beside its prompt: tools, a forced form."""
    if cls.kind != "tools" and cls.response_format is None:
        return {}
    return tasks.wire(cls, task(cls, planned.turns[turn].prompt_tok, seed, planned.k, turn))


def nonce(seed: int, k: int, turn: int) -> str:
    """Eight letters and digits, of 40 bits: another request hardly ever has them, and a prompt's
    text differs besides."""
    digest = hashlib.blake2b(f"{seed}/{k}/{turn}".encode(), digest_size=5).digest()
    return np.base_repr(int.from_bytes(digest, "big"), 36).lower().rjust(8, "0")
