"""What clients saw, from the files that they write; and an open loop as the server saw it.

A client writes int64 rows, one per request: key, due, sent, number of token events, their stamps;
all ns of CLOCK_MONOTONIC, which the server's log has too. `due` is 0 in a closed loop.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from servers.null.log import Ints, Seen, Spread, Truth, spread


def load_seen(path: Path) -> list[Seen]:
    rows = np.fromfile(path, np.int64)
    found, at = [], 0
    while at < len(rows):
        key, due_ns, sent_ns, n = (int(x) for x in rows[at:at + 4])
        found.append(Seen(key, due_ns, sent_ns, rows[at + 4:at + 4 + n]))
        at += 4 + n
    return found


@dataclass(frozen=True)
class Arrivals:
    """An open loop as the server saw it. `ks_p`: gaps between arrivals against exponential ones
    of the asked rate (two-sided Kolmogorov–Smirnov); `plan_p`: the planned instants' own."""

    n: int
    asked_rps: float
    achieved_rps: float
    ks_p: float
    plan_p: float | None
    lateness: Spread | None  # arrival by the kernel − due


def arrivals(truth: Truth, seen: Iterable[Seen], rate_rps: float) -> Arrivals:
    came = np.sort(truth.requests[:, 1])
    due = {one.key: one.due_ns for one in seen if one.due_ns}
    late = np.array([(at - due[int(key)]) / 1e6 for key, at in truth.requests[:, :2]
                     if int(key) in due], dtype=np.float64)
    return Arrivals(len(came), rate_rps, (len(came) - 1) / float(np.ptp(came)) * 1e9,
                    poisson_p(came, rate_rps),
                    poisson_p(np.sort(np.array(list(due.values()))), rate_rps) if due else None,
                    spread(late))


def poisson_p(at_ns: Ints, rate_rps: float) -> float:
    return float(stats.kstest(np.diff(at_ns) / 1e9, "expon", args=(0, 1 / rate_rps)).pvalue)


def marks(said: str) -> dict[str, dict[str, float]]:
    """The lines {"mark": NAME, …} of a client's output."""
    found = {}
    for line in said.splitlines():
        if line.startswith('{"mark"'):
            value = json.loads(line)
            found[value.pop("mark")] = value
    return found
