"""The leg: one load held for a while, the unit of a sweep. Records, windows and resume are keyed
by it."""

from typing import Literal

from msgspec import Struct

from loadgen.scenario import Load

Axis = Literal["concurrency", "rate"]
Phase = Literal["run", "ladder", "refine", "reference", "confirm", "soak", "overload"]
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


class Window(Struct, frozen=True):
    """What was run: requests with from_ns ≤ due_ns < to_ns are the sample; all of them were
    awaited until end_ns. Of a leg that was cut, what was in flight counts as missed.
    `stalls`: intervals in which the generator's host stood still; requests that lived through
    one are void (no fault of the server's)."""

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

    def is_void(self, due_ns: int, end_ns: int) -> bool:
        return any(due_ns < b and end_ns > a for a, b in self.stalls)
