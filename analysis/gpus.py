"""The server's GPUs over a whole run: memory after load, its peak and the increase; and how busy
they were where it counts."""

from typing import Any

from analysis.frame import Run
from analysis.steps import GIB, percent
from loadgen.evidence import PROVES
from loadgen.telemetry.signs import GpuSigns


def figures(run: Run) -> dict[str, Any] | None:
    """For summary.json; None: none were watched. Memory is of the fullest GPU."""
    told = [gpu for gpu in run.gpus if gpu.n]
    if not told:
        return None
    peak = max((g.memory_peak_bytes for g in told if g.memory_peak_bytes is not None), default=None)
    loaded, busiest, safe = run.gpu_loaded_bytes, _busiest(run), _at_safe(run)
    return {
        "gpus": max(g.n for g in told), "simulated": run.simulated,
        "memory_loaded_gib": _gib(loaded), "memory_peak_gib": _gib(peak),
        "memory_increase_gib": None if loaded is None or peak is None else _gib(peak - loaded),
        "memory_total_gib": _gib(told[0].memory_total_bytes),
        "busiest": None if busiest is None else {
            "value": busiest[0], "util_frac": busiest[1].util_frac, "power_w": busiest[1].power_w,
            "sm_clock_mhz": busiest[1].sm_clock_mhz},
        "safe": None if safe is None else {"value": safe[0], "util_frac": safe[1]},
        "slowed_by": sorted({reason for g in told for reason in g.slowed_by})}


def sentence(run: Run) -> str | None:
    """As "GPU: 14.2 GiB after load, peak 16.1 (+1.9) of 24 GiB; busy 62 % at the safe 32, 86 % at
    64"."""
    found = figures(run)
    if found is None or found["memory_peak_gib"] is None:
        return None
    n = f"{found['gpus']} GPUs, the fullest" if found["gpus"] > 1 else "GPU"
    total = found["memory_total_gib"]
    said = f"{n}{' (simulated)' if run.simulated else ''}: "
    if found["memory_loaded_gib"] is not None:
        said += f"{found['memory_loaded_gib']:.1f} GiB after load, "
    said += f"peak {found['memory_peak_gib']:.1f}"
    if found["memory_increase_gib"] is not None:
        said += f" ({found['memory_increase_gib']:+.1f})"
    said += f" of {total:.0f} GiB" if total else " GiB"
    busiest, safe = found["busiest"], found["safe"]
    told = [f"{percent(safe['util_frac'])} at the safe {safe['value']:g}"] if safe else []
    if busiest is not None and (safe is None or safe["value"] != busiest["value"]):
        told.append(f"{percent(busiest['util_frac'])} at {busiest['value']:g}")
    said += f"; busy {', '.join(told)}" if told else ""
    if found["slowed_by"]:
        said += f"; clocks were held down by {', '.join(found['slowed_by'])}"
    return said + "."


def _at_safe(run: Run) -> tuple[float, float] | None:
    """A search's safe level, and how busy the GPUs were in the legs that prove it, in the mean
    over their time."""
    value = None if run.is_run else run.conclusion.safe
    here = [(w.to_ns - w.from_ns, gpu.util_frac)
            for (leg, w), gpu in zip(run.legs, run.gpus, strict=True)
            if leg.value == value and leg.phase in PROVES and gpu.util_frac is not None]
    lasted = sum(ns for ns, _ in here)
    return (value, sum(util * ns for ns, util in here) / lasted) if value and lasted else None


def _busiest(run: Run) -> tuple[float, GpuSigns] | None:
    """The leg with the largest mean utilisation, by its level; of those that are the same to a
    hundredth, the most loaded."""
    told = [(leg.value, gpu) for (leg, _), gpu in zip(run.legs, run.gpus, strict=True)
            if gpu.util_frac is not None]
    return max(told, key=lambda x: (round(x[1].util_frac or 0.0, 2), x[0]), default=None)


def _gib(value: float | None) -> float | None:
    return None if value is None else value / GIB
