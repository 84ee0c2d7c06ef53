"""What clients saw, from the files that they write; what they say of it, held against the server's
log; and an open loop as the server saw it.

A client writes int64 rows, one per request: key, due, sent, number of token events, their stamps;
all ns of CLOCK_MONOTONIC, which the server's log has too. `due` is 0 in a closed loop.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from servers.null import answers
from servers.null.log import Ints, Seen, Spread, Truth, spread

Floats = NDArray[np.float64]
Gap = Literal["events", "texts", "means"]
_NO_TEXT = b'"content":""'


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


@dataclass(frozen=True)
class Reported:
    """What a client says of its own run. Its inter-token figure may be of gaps between all token
    `events`, of gaps between those with `texts`, or of each request's mean gap: there a late read
    does not show."""

    requests: int
    ttft_p50_ms: float
    ttft_p99_ms: float | None
    gap_p99_ms: float | None
    gap: Gap = "events"


@dataclass(frozen=True)
class Deviation:
    """What a client reported / the same by the server's log − 1, in %."""

    asked: int  # requests
    arrived: int
    reported: int
    ttft_p50_pct: float | None
    ttft_p99_pct: float | None
    gap_p99_pct: float | None
    gap: Gap


def reported(seen: Sequence[Seen]) -> Reported | None:
    """What follows from what a client saw; None: it saw no answer."""
    answered = [one for one in seen if len(one.stamps_ns)]
    if not answered:
        return None
    ttft = [(int(one.stamps_ns[0]) - one.sent_ns) / 1e6 for one in answered]
    gaps = np.concatenate([np.diff(one.stamps_ns) for one in answered]) / 1e6
    p50, p99 = np.quantile(ttft, (0.5, 0.99))
    return Reported(len(answered), float(p50), float(p99),
                    float(np.quantile(gaps, 0.99)) if len(gaps) else None)


def deviation(truth: Truth, said: Reported, asked: int) -> Deviation:
    ttft = served_ttft_ms(truth)
    return Deviation(asked, len(truth.requests), said.requests,
                     _off_pct(said.ttft_p50_ms, ttft, 0.5), _off_pct(said.ttft_p99_ms, ttft, 0.99),
                     _off_pct(said.gap_p99_ms, served_gaps_ms(truth, said.gap), 0.99), said.gap)


def _off_pct(said_ms: float | None, served_ms: Floats, q: float) -> float | None:
    if said_ms is None or not len(served_ms):
        return None
    return 100 * (said_ms / float(np.quantile(served_ms, q)) - 1)


def served_ttft_ms(truth: Truth) -> Floats:
    first = truth.writes[truth.writes[:, 1] == 1]
    return np.asarray((first[:, 4] - truth.requests[first[:, 0], 1]) / 1e6, dtype=np.float64)


def served_gaps_ms(truth: Truth, of: Gap) -> Floats:
    """By the log of a server that writes each token event alone."""
    writes = truth.writes
    tokens = truth.requests[writes[:, 0], 3]
    wanted = (writes[:, 1] >= 1) & (writes[:, 1] <= tokens)
    if of == "texts":
        wanted &= ~_without_text(writes[:, 1], tokens)
    rows = writes[wanted]
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    one_request = np.diff(rows[:, 0]) == 0
    gaps = np.asarray(np.diff(rows[:, 4])[one_request] / 1e6, dtype=np.float64)
    if of != "means":
        return gaps
    _, which, n = np.unique(rows[1:, 0][one_request], return_inverse=True, return_counts=True)
    return np.asarray(np.bincount(which, gaps) / n, dtype=np.float64)


def _without_text(event: Ints, tokens: Ints) -> NDArray[np.bool_]:
    """Which token events have an empty text; an answer's last one never has."""
    most = int(tokens.max(initial=1))
    texts = answers.Chunks("", most, usage=False).texts
    empty = np.array([_NO_TEXT in text for text in texts])
    return np.asarray(empty[event % len(texts)] & (event < tokens), dtype=np.bool_)


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
