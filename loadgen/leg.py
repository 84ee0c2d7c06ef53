"""The leg: one load held for a while, the unit of a sweep. Records, windows and resume are keyed
by it."""

from typing import Literal

import msgspec
from msgspec import Struct

from loadgen.scenario import Load

Axis = Literal["concurrency", "rate"]
Phase = Literal["run", "ladder", "refine", "reference", "confirm", "soak", "poisson", "burst",
                "overload", "recover", "unit"]
Ending = Literal["done", "cut", "interrupted", "server_died", "failed"]


class Leg(Struct, frozen=True):
    """What is to be run. `warmup_s` of load come first and are not measured; then requests due
    within `measure_s` are the leg's sample (with `num_sessions`, at most so many sessions)."""

    id: str
    axis: Axis
    value: float
    phase: Phase
    replicate: int
    seed: int
    load: Load
    warmup_s: float
    measure_s: float | None
    num_sessions: int | None = None
    cut_below: float | None = None  # leave the leg once its attainment is surely below this
    again: bool = False  # by plan its prompts were sent before


class Health(Struct, frozen=True, omit_defaults=True):
    """How one generator process was over one leg. None: the kernel does not tell, or whoever ran
    the leg does not know."""

    shard: int
    lag_p99_s: float | None = None  # how late its event loop came round to a probe
    cpu_frac: float | None = None  # of one core
    run_queue_frac: float | None = None  # of the time: ready to run, and no core was free …
    run_queue_each_s: float | None = None  # … and how long each time, in the mean
    gc_pause_s: float = 0.0  # all pauses of Python's garbage collector …
    gc_pause_max_s: float = 0.0  # … and the longest
    fds: int | None = None  # descriptors that were open at once, as far as was looked
    fd_limit: int | None = None
    full_reads: int = 0  # reads that filled the whole read buffer: more was waiting
    rcvbuf_bytes: int | None = None  # smallest receive buffer of its connections
    inflight_s: float | None = None  # its count of what is in flight, integrated over the window
    lingered: int = 0  # answers that had ended, and whose body the server kept open
    clock_error_s: float | None = None  # of its host's clock against the run's; None: the same


class Window(Struct, frozen=True):
    """What was run: requests with from_ns ≤ due_ns < to_ns are the sample; all of them were
    awaited until end_ns. Of a leg that was cut, what was in flight counts as missed.
    `stalls`: intervals in which the generator's host stood still; requests that lived through
    one are void (no fault of the server's). `alone`: from t0_ns to end_ns nothing but this leg was
    in flight, and its slots never rested by plan; so the server's counters can be held against
    its records, and its slots against its requests."""

    leg: str
    t0_ns: int
    from_ns: int
    to_ns: int
    end_ns: int
    ending: Ending
    stalls: list[tuple[int, int]] = []
    lag_p99_s: float | None = None  # event-loop lag of the shards, worst shard
    cpu_frac: float | None = None  # CPU of the busiest shard, of one core
    records: int | None = None  # that the shards wrote; fewer in the journals are lost ones
    note: str | None = None
    shards: list[Health] = []
    alone: bool = False

    def shifted(self, ns: int) -> "Window":
        """With all stamps brought to another clock."""
        if not ns:
            return self
        return msgspec.structs.replace(
            self, t0_ns=self.t0_ns + ns, from_ns=self.from_ns + ns, to_ns=self.to_ns + ns,
            end_ns=self.end_ns + ns, stalls=[(a + ns, b + ns) for a, b in self.stalls])

    def is_void(self, due_ns: int, end_ns: int) -> bool:
        return any(due_ns < b and end_ns > a for a, b in self.stalls)
