"""Telemetry rows of a window → what the server said of itself there (`judge.ServerSigns`)."""

from collections.abc import Iterable, Mapping, Sequence

from loadgen.balance import Counted
from loadgen.judge import KV_FULL, ServerSigns
from loadgen.leg import Window
from loadgen.store import Row

SETTLED_NS = 400_000_000  # after a leg: the next one's first request comes no sooner
FRESH_NS = 3_000_000_000  # a sample further from a leg than this may hold something else


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

    kv = gauge("kv_frac")
    queries, hits = grown("prefix_queries"), grown("prefix_hits")
    steps, late = grown("sim_steps"), grown("sim_late_steps")
    return ServerSigns(
        preemptions=grown("preemptions"),
        kv_full_frac=sum(v > KV_FULL for v in kv) / len(kv) if kv else None,
        kv_max=max(kv, default=None),
        prefix_hit_frac=hits / queries if queries and hits is not None else None,
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


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
