"""How loads, limits and shares are said, everywhere the same."""

import math

from analysis.frame import Run
from loadgen.ramp import Check
from loadgen.scenario import Slo

NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "event gap", "e2e": "E2E"}
MISSES = {**NAMES, "answer": "an answer that is not valid"}
NOT_OURS = {  # rules of a measurement that is INVALID, and no fault of the generator's
    "foreign-load": "somebody else loaded the server",
    "prompts-reused": "the server's prefix cache knew the prompts"}
NO_BOUND = ("No interval stands beside the share of one leg: near the limits it cannot show how "
            "unlike it the next would be.")
DAILY = 0.8  # of the safe load: what is proven holds at its edge, and days differ


def load_of(run: Run, value: float) -> str:
    if run.axis == "rate":
        return f"{value:g} request{'s' if value != 1 else ''} per second"
    return f"{value:g} concurrent request{'s' if value != 1 else ''}"


def unit(run: Run) -> str:
    return "Concurrent requests" if run.axis == "concurrency" else "Offered requests per second"


def slo_of(run: Run) -> str:
    """What makes an answer good, in words: "TTFT ≤ 2 s and TPOT ≤ 50 ms with a valid answer"."""
    own = {run.scenario.slo_of(c.name) for c in run.scenario.classes}
    said = limits(own.pop()) if len(own) == 1 else "the limits of their class"
    checked = run.scenario.judges_answers and not run.manifest.server.get("virtual_time")
    return said + " with a valid answer" * checked


def limits(slo: Slo) -> str:
    parts = [f"{NAMES[x]} ≤ {limit(v)}" for x in NAMES if (v := getattr(slo, f"{x}_s"))]
    return " and ".join(parts) or "no limit at all (complete answers)"


def limit(value_s: float) -> str:
    return f"{1000 * value_s:g} ms" if value_s < 1 else f"{value_s:g} s"


def count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' if n != 1 else ''}"


def daily(run: Run, safe: float) -> float:
    """What to keep to from day to day, so that the safe load is an edge that is not lived on; and
    where requests that do not wait for answers (Poisson) missed the limits at its throughput, no
    more than they kept them at, or well under the least that was tried."""
    if run.axis == "rate":
        return float(f"{DAILY * safe:.3g}")
    missed, kept = open_arrivals(run)
    most = DAILY * safe
    if missed is not None:
        most = min(most, kept.value if kept is not None else DAILY * missed.value)
    return max(1.0, float(math.floor(most)))


def open_arrivals(run: Run) -> tuple[Check | None, Check | None]:
    """Poisson arrivals at the safe level's throughput and below: the slowest that missed the
    target, and the fastest under it that kept it."""
    tried = [c for c in run.conclusion.checks if c.kind == "poisson"]
    missed = min((c for c in tried if not c.held), key=lambda c: c.value, default=None)
    kept = max((c for c in tried if c.held and (missed is None or c.value < missed.value)),
               key=lambda c: c.value, default=None)
    return missed, kept
