"""Telemetry rows of a window → what the server said of itself there (`judge.ServerSigns`)."""

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from loadgen.balance import Counted
from loadgen.judge import KV_FULL, ServerSigns
from loadgen.leg import Window
from loadgen.store import Row

SETTLED_NS = 400_000_000  # after a leg: the next one's first request comes no sooner
FRESH_NS = 3_000_000_000  # a sample further from a leg than this may hold something else
SLOWED = {  # bits of NVML's reasons for lower clocks that slow a load down; idleness does not
    0x4: "power cap", 0x8: "hardware slowdown", 0x20: "temperature (driver)",
    0x40: "temperature (hardware)", 0x80: "power brake"}
HELD_DOWN = {bit: name for bit, name in SLOWED.items() if bit != 0x4}  # a full load meets its power
# cap; these are faults

Series = Sequence[tuple[int, float]]


class GpuSigns(Struct, frozen=True):
    """What the server's GPUs did over a leg. Memory is of the fullest one. None: not told."""

    n: int = 0  # GPUs that were watched
    memory_total_bytes: float | None = None
    memory_start_bytes: float | None = None  # when the leg began …
    memory_peak_bytes: float | None = None  # … and at most, until its last answer
    util_frac: float | None = None  # of the measured window, mean of all
    power_w: float | None = None  # likewise; of all together
    sm_clock_mhz: float | None = None
    temperature_max_c: float | None = None
    slowed_frac: float | None = None  # of the window's samples: clocks held down …
    slowed_by: list[str] = []  # … for these reasons


def series(rows: Iterable[Row], source: str) -> dict[str, list[tuple[int, float]]]:
    """Rows of one source by name, as (t_ns, value) in the order of time. Rows that differ only in
    labels (several engines, several GPUs) are added up where they share an instant; of shares
    (`*_frac`) the largest counts."""
    found: dict[str, dict[int, float]] = {}
    for r in rows:
        if r.source == source:
            at = found.setdefault(r.name, {})
            seen = at.get(r.t_ns, 0.0)
            at[r.t_ns] = max(seen, r.value) if r.name.endswith("_frac") else seen + r.value
    return {name: sorted(at.items()) for name, at in found.items()}


def signs_of(window: Window, server: Mapping[str, Sequence[tuple[int, float]]]) -> ServerSigns:
    """`server`: `series(rows, "server")`. Counters are differenced over the window; gauges are
    averaged over its samples."""
    def gauge(name: str) -> list[float]:
        return [v for t, v in server.get(name, ()) if window.from_ns <= t <= window.to_ns]

    def grown(name: str) -> float | None:
        """Increase from the last sample before the window to the first after it."""
        points = server.get(name, ())
        before = [v for t, v in points if t <= window.from_ns] or [v for _, v in points[:1]]
        after = [v for t, v in points if t >= window.to_ns] or [v for _, v in points[-1:]]
        return max(0.0, after[0] - before[-1]) if before and after else None

    def each(name: str) -> float | None:
        """Mean of a histogram of seconds, over the requests that ended in the window."""
        took, n = grown(f"{name}_s_sum"), grown(f"{name}_s_count")
        return took / n if n and took is not None else None

    kv = gauge("kv_frac")
    queries, hits = grown("prefix_queries"), grown("prefix_hits")
    steps, late = grown("sim_steps"), grown("sim_late_steps")
    return ServerSigns(
        preemptions=grown("preemptions"),
        kv_full_frac=sum(v > KV_FULL for v in kv) / len(kv) if kv else None,
        kv_max=max(kv, default=None),
        prefix_hit_frac=hits / queries if queries and hits is not None else None,
        queue_s=each("queue"), prefill_s=each("prefill"), decode_s=each("decode"),
        scrape_s=_mean(gauge("scrape_s")),
        running_mean=_mean(gauge("running")), waiting_mean=_mean(gauge("waiting")),
        late_step_frac=late / steps if steps and late is not None else None,
        blind=bool(server) and window.to_ns - window.from_ns > 4_000_000_000 and not any(
            gauge(name) for name in server),
        died=(window.note or "no reason found") if window.ending == "server_died" else None,
        counted=Counted(*(_over_life(window, server.get(name, ())) for name in (
            "finished", "prompt_tok", "output_tok"))))


def _over_life(window: Window, points: Sequence[tuple[int, float]]) -> float | None:
    """Increase of a counter over the leg's whole life. None unless there are samples right before
    it and right after, or where the server was started again in between."""
    before = [v for t, v in points if window.t0_ns - FRESH_NS <= t <= window.t0_ns]
    during = [v for t, v in points if window.t0_ns < t < window.end_ns]
    after = [(t, v) for t, v in points if window.end_ns <= t <= window.end_ns + FRESH_NS]
    if not before or not after:
        return None
    settled = [v for t, v in after if t <= window.end_ns + SETTLED_NS] or [after[0][1]]
    seen = [before[-1], *during, settled[-1]]
    return None if sorted(seen) != seen else seen[-1] - seen[0]


def gpus(rows: Iterable[Row]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """GPU → name → series, in the order of time."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for r in rows:
        if r.source == "gpu" and "index" in r.labels and "pid" not in r.labels:
            found.setdefault(r.labels["index"], {}).setdefault(r.name, []).append(
                (r.t_ns, r.value))
    return {index: {name: sorted(at) for name, at in own.items()} for index, own in found.items()}


def gpu_signs_of(window: Window, told: Mapping[str, Mapping[str, Series]]) -> GpuSigns:
    """`told`: `gpus(rows)`."""
    def life(own: Mapping[str, Series], name: str) -> list[float]:
        return [v for t, v in own.get(name, ()) if window.t0_ns <= t <= window.end_ns]

    def measured(name: str) -> list[list[float]]:
        """Of each GPU that told of it."""
        each = ([v for t, v in own.get(name, ()) if window.from_ns <= t < window.to_ns]
                for own in told.values())
        return [values for values in each if values]

    def means(name: str) -> list[float]:
        return [sum(values) / len(values) for values in measured(name)]

    fullest = max(told.values(), default={},
                  key=lambda own: max(life(own, "memory_used_bytes"), default=-1.0))
    used = life(fullest, "memory_used_bytes")
    total = fullest.get("memory_total_bytes", ())
    bits = [int(v) for values in measured("throttle_bits") for v in values]
    slow = [b for b in bits if any(b & bit for bit in SLOWED)]
    return GpuSigns(
        n=len(told), memory_total_bytes=total[-1][1] if total else None,
        memory_start_bytes=used[0] if used else None, memory_peak_bytes=max(used, default=None),
        util_frac=_mean(means("util_frac")), power_w=sum(means("power_w")) or None,
        sm_clock_mhz=_mean(means("sm_clock_mhz")),
        temperature_max_c=max((v for own in told.values() for v in life(own, "temperature_c")),
                              default=None),
        slowed_frac=len(slow) / len(bits) if bits else None,
        slowed_by=[name for bit, name in SLOWED.items() if any(b & bit for b in slow)])


def loaded_bytes(told: Mapping[str, Mapping[str, Series]], ready_ns: int | None) -> float | None:
    """Memory of the fullest GPU when the server was ready, before any load: the last sample until
    then; the first one where it is not known when that was."""
    found = []
    for own in told.values():
        used = own.get("memory_used_bytes", ())
        until = [v for t, v in used if ready_ns is not None and t <= ready_ns] or [
            v for _, v in used[:1]]
        found += until[-1:]
    return max(found, default=None)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
