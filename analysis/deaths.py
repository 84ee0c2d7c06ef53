"""What the server went through, with the evidence that names each state; how it died, and the
largest load that it survived."""

from typing import Any

import msgspec

from analysis.frame import Run
from loadgen import unit


def states(run: Run) -> list[dict[str, Any]]:
    """In the order of time; `leg`: None between legs. Instants from the first leg's start."""
    def leg_at(t_ns: int) -> str | None:
        return next((leg.id for leg, w in run.legs if w.t0_ns <= t_ns <= w.end_ns), None)
    return [{"t_s": (r.t_ns - run.t0_ns) / 1e9, "leg": leg_at(r.t_ns), "state": r.name,
             "why": r.labels.get("why")} for r in run.states]


def figures(run: Run) -> dict[str, Any]:
    """For summary.json. `exact`: to the unit."""
    b = unit.boundary(run.judgements)
    return {"survives": None if b.fatal is None else {
                **msgspec.to_builtins(b), "exact": b.exact}, "states": states(run)}


def sentence(run: Run) -> str | None:
    """None: it never died. Else what killed it, and what it survived."""
    b = unit.boundary(run.judgements)
    if b.fatal is None or run.axis != "concurrency":
        return None
    how = next((w.note for leg, w in run.legs
                if leg.value == b.fatal and w.ending == "server_died"), None)
    head = unit.says(b)
    return f"{head[0].upper()}{head[1:]}" + (f" ({how})" if how else "") + "."


