"""The generator's part in a run: its busiest second, beside what its host was calibrated for."""

from typing import Any

from analysis.frame import Run
from loadgen import headroom
from loadgen.headroom import Peak
from loadgen.validity import CPU_SUSPECT


def peak(run: Run) -> Peak:
    """Of all legs."""
    return Peak(max((p.events_per_s for p in run.peaks), default=0),
                max((p.starts_per_s for p in run.peaks), default=0))


def cpu_frac(run: Run) -> float | None:
    """Of a core: of the busiest process, in its busiest leg."""
    return max((w.cpu_frac for _, w in run.legs if w.cpu_frac is not None), default=None)


def sentence(run: Run) -> str | None:
    """None: nothing was sent, or in virtual time, or by Locust, for whose users no calibration
    holds."""
    found = peak(run)
    if not found.starts_per_s or run.manifest.command[:1] == ["locust"] or (
            run.manifest.server.get("virtual_time")):
        return None
    return headroom.says(found, run.manifest.calibration, cpu_frac(run), CPU_SUSPECT)


def figures(run: Run) -> dict[str, Any]:
    """For summary.json. `used_frac`: the larger share, of events or of starts; what is left of
    the whole is `headroom_frac`, below 0 beyond it."""
    found, c = peak(run), run.manifest.calibration
    used = None if c is None else headroom.share_of(found, c).used_frac
    return {"peak_events_per_s": found.events_per_s, "peak_starts_per_s": found.starts_per_s,
            "cpu_frac": cpu_frac(run), "calibrated_on": c and c.when,
            "calibrated_events_per_s": c and c.events_per_s,
            "calibrated_starts_per_s": c and c.starts_per_s,
            "used_frac": used, "headroom_frac": None if used is None else 1 - used}
