"""Pure: the state of a server under test, and the evidence that names it.

    STARTING ─▶ READY ⇄ SERVING ⇄ DEGRADED
        │          └────────┴─────────┴──▶ HUNG, ENGINE_DEAD, OOM_RUNTIME, KILLED, UNREACHABLE
        └──▶ START_FAILED, OOM_START, KILLED                       (STOPPED: by us, from anywhere)

What a death is called hangs on words: how the process ended and what its log says of the cause, as
`servers` tell it. An exit code alone says nothing (a vLLM whose engine died exits with 0), nor does
a client's error ("EngineCore encountered an issue"), nor /health (200 while a worker hangs).
"""

import re
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

State = Literal[
    "STARTING", "READY", "SERVING", "DEGRADED", "HUNG", "ENGINE_DEAD", "OOM_START", "OOM_RUNTIME",
    "KILLED", "UNREACHABLE", "START_FAILED", "STOPPED"]
DEAD: frozenset[State] = frozenset({
    "HUNG", "ENGINE_DEAD", "OOM_START", "OOM_RUNTIME", "KILLED", "UNREACHABLE", "START_FAILED",
    "STOPPED"})

KV_STRAINED = 0.95
STRAIN_NS = 5_000_000_000  # looks back so far for a queue that grows, for preemptions
QUEUE_GREW = 1.2  # … by this factor, and a few requests
QUEUE_FEW = 3
HANGS_K = 10  # times the longest silence so far: nobody is silent so long by chance
HANGS_LEAST_S, HANGS_MOST_S = 10.0, 25.0  # streams that have begun; a stall is 30 s
WAITS_K = 3  # likewise, where all streams wait for their first token
WAITS_LEAST_S, WAITS_MOST_S = 30.0, 55.0  # a first token's own limit is 60 s

_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|MemoryError|bad_alloc|ALLOC_FAILED|Cannot allocate memory"
    r"|No available memory for the cache blocks|larger than the available KV cache memory"
    r"|[Ff]ree memory on device .* less than desired|Available memory on node|"
    r"not enough (?:GPU )?memory|memory.{0,40}insufficient", re.IGNORECASE)
_KILLED = re.compile(  # a process that ends by itself says why, and has an exit code
    r"killed by signal|ended without a word|died unexpectedly(?!.*exit code: \d)")
_EXITED = re.compile(r"killed by signal|exited with code")
_REFUSED = re.compile(r"cannot be reached")


class Named(Struct, frozen=True):
    """A state and what names it, in words."""

    state: State
    why: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.why}" if self.why else self.state


def death(why: str, ready: bool, oom_kill: str | None = None, stopped: bool = False) -> Named:
    """What a death is called. `why`: the words of `Server.alive()` or of /health, the log's cause
    in them; `ready`: it has served; `oom_kill`: what the kernel says of having killed for memory
    meanwhile; `stopped`: it was we who ended it."""
    if stopped:
        return Named("STOPPED", why)
    if oom_kill is not None:
        return Named("OOM_RUNTIME" if ready else "OOM_START", f"{why}; {oom_kill}")
    if _MEMORY.search(why):
        return Named("OOM_RUNTIME" if ready else "OOM_START", why)
    if _KILLED.search(why):
        return Named("KILLED", why)
    if not ready:
        return Named("START_FAILED", why)
    if _REFUSED.search(why) and not _EXITED.search(why):
        return Named("UNREACHABLE", why)
    return Named("ENGINE_DEAD", why)


def speaks_of_memory(line: str) -> bool:
    return _MEMORY.search(line) is not None


class Silence(Struct, frozen=True):
    """Of all streams together: how many have begun and not ended, how many wait for their first
    token; how long nothing has come on any of them, and the longest that was before."""

    streams: int = 0
    waiting: int = 0
    silent_s: float = 0.0
    usual_s: float = 0.0


def suspicious(s: Silence) -> bool:
    """Nothing has come for so long that the server is to be asked for its health. Streams that
    have begun owe a token soon; a first one may take as long as a prompt does."""
    if s.streams:
        limit_s = min(HANGS_MOST_S, max(HANGS_LEAST_S, HANGS_K * s.usual_s))
    else:
        limit_s = min(WAITS_MOST_S, max(WAITS_LEAST_S, WAITS_K * s.usual_s))
    return s.streams + s.waiting > 0 and s.silent_s > limit_s


def hung(s: Silence, answers: bool | None) -> Named:
    """`answers`: whether /health says 200; None: nothing, in time."""
    n = s.streams + s.waiting
    of = f"any of {n} streams" if n > 1 else "its one stream"
    health = {True: "/health says 200", False: "/health says it is not well",
              None: "/health tells nothing"}[answers]
    return Named("HUNG", f"no token on {of} for {s.silent_s:.0f} s (the longest pause before was "
                 f"{s.usual_s:.1f} s), while its process runs and {health}")


Series = Sequence[tuple[int, float]]


class Gauges(Struct, frozen=True):
    """What the server said of itself lately, (t_ns, value) in the order of time; and NVML's
    reasons why clocks are held down."""

    running: Series = ()
    waiting: Series = ()
    kv_frac: Series = ()
    preemptions: Series = ()
    slowed_by: tuple[str, ...] = ()


def strain(g: Gauges) -> list[str]:
    """Signs that it serves under strain; none of them is a death."""
    found = []
    preempted = g.preemptions[-1][1] - g.preemptions[0][1] if g.preemptions else 0.0
    if preempted > 0:
        found.append(f"{preempted:.0f} preemptions in {_span_s(g.preemptions):.0f} s")
    if g.kv_frac and g.kv_frac[-1][1] > KV_STRAINED:
        found.append(f"KV cache {100 * g.kv_frac[-1][1]:.0f} % full")
    if g.waiting and _span_s(g.waiting) > 0.6 * STRAIN_NS / 1e9:
        first, last = g.waiting[0][1], g.waiting[-1][1]
        if last > QUEUE_GREW * first and last >= first + QUEUE_FEW:
            found.append(f"its queue grew from {first:.0f} to {last:.0f} in "
                         f"{_span_s(g.waiting):.0f} s")
    found += [f"GPU clocks held down: {reason}" for reason in g.slowed_by]
    return found


def _span_s(points: Series) -> float:
    return (points[-1][0] - points[0][0]) / 1e9


class Health(Struct, frozen=True):
    """The machine's memory."""

    named: Named = Named("STOPPED", "not started")
    strained_ns: int | None = None  # when strain was last seen


def started(_: Health) -> Health:
    return Health(Named("STARTING"))


def ready(_: Health) -> Health:
    return Health(Named("READY", "a whole streamed answer came"))


def died(_: Health, named: Named) -> Health:
    return Health(named)


def look(h: Health, t_ns: int, inflight: int, strained: Sequence[str]) -> Health:
    """One look at a server that lives. DEGRADED lasts until strain was not seen for a while."""
    if h.named.state in DEAD or h.named.state == "STARTING":
        return h
    if strained:
        why = h.named.why if h.named.state == "DEGRADED" else "; ".join(strained)
        return Health(Named("DEGRADED", why), t_ns)
    if h.strained_ns is not None and t_ns - h.strained_ns < STRAIN_NS:
        return h
    return Health(Named("SERVING" if inflight else "READY"))
