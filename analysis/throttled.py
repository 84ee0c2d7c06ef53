"""Requests that the server, or a proxy before it, turned away for their number: misses, but no
errors."""

from collections.abc import Iterator
from typing import Any

from analysis.frame import Run
from analysis.steps import percent
from loadgen.record import Outcome

TITLE = "Throttled"
HEADS = ("leg", "n", "throttled", "share", "let through", "of these good")
NOTE = ("429, 503 with Retry-After or a queue’s limit, and what the scenario names. They are "
        "misses in goodput, and no errors that would stop a search.")


def of(run: Run) -> list[dict[str, Any]]:
    """A row for each leg that had any."""
    return [{"leg": j.leg, "n": j.n, "throttled": n, "good": j.good}
            for j in run.judgements if (n := j.outcomes.get(Outcome.THROTTLED.value, 0))]


def cells(run: Run) -> Iterator[list[str]]:
    for r in of(run):
        through = r["n"] - r["throttled"]
        yield [r["leg"], str(r["n"]), str(r["throttled"]), percent(r["throttled"] / r["n"]),
               str(through), percent(r["good"] / through) if through else "–"]


def sentence(run: Run) -> str | None:
    """None: nobody was turned away."""
    rows = of(run)
    if not rows:
        return None
    n, throttled = sum(r["n"] for r in rows), sum(r["throttled"] for r in rows)
    good = sum(r["good"] for r in rows)
    return (f"Throttled: {throttled} of {n} requests ({percent(throttled / n)}) were turned away "
            f"(429/503): misses, not errors; of the {n - throttled} that were let through, {good} "
            "were good.")
