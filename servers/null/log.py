"""Reads the null server's log and holds what a client saw against it."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from servers.null.server import MAGIC, REQUEST, STALL, WRITE

Ints = NDArray[np.int64]
UNSURE_NS = 100_000  # a send() that took longer: when its bytes arrived is not known well enough
AROUND_NS = 20_000_000  # what came this close after a stall may still suffer from it


class Truth(Struct, frozen=True, eq=False):
    """The server's log. Columns as in servers.null.server."""

    requests: Ints
    writes: Ints
    stalls: Ints

    @property
    def events(self) -> int:
        """SSE events sent: role, tokens, usage, [DONE]."""
        return int(self.writes[self.writes[:, 1] >= 0, 2].sum())

    def of(self, tokens: int) -> "Truth":
        """Only the requests for so many tokens: what a tool asks before its run falls out."""
        rows = np.flatnonzero(self.requests[:, 3] == tokens)
        new = np.full(len(self.requests), -1)
        new[rows] = np.arange(len(rows))
        writes = self.writes[np.isin(self.writes[:, 0], rows)].copy()
        writes[:, 0] = new[writes[:, 0]]
        return Truth(self.requests[rows], writes, self.stalls)

    def lateness_ms(self, but_stalls: bool = False) -> NDArray[np.float64]:
        """How late the server came to each instant: first write of it − due. `but_stalls`: those
        in a stall of its host are left out."""
        tokens = self.writes[self.writes[:, 1] >= 1]
        due, first = np.unique(tokens[:, 3], return_index=True)
        if but_stalls:
            calm = ~_stalled(self.stalls, due)
            due, first = due[calm], first[calm]
        return np.asarray((tokens[first, 4] - due) / 1e6, dtype=np.float64)


class Seen(Struct, frozen=True, eq=False):
    """One request as its client saw it: stamps of its token events; ns of CLOCK_MONOTONIC, as in
    the log. `due_ns` is 0 in a closed loop."""

    key: int
    due_ns: int
    sent_ns: int
    stamps_ns: Ints


class Spread(Struct, frozen=True):
    """Of absolute values, ms."""

    n: int
    p50: float
    p99: float
    max: float


class Accuracy(Struct, frozen=True):
    """Errors against the log. `wrong`: requests with another number of token events than were
    sent, or unknown to the server; `aside`: token events not judged because of the server."""

    ttft: Spread | None
    gap: Spread | None
    stamp: Spread | None
    requests: int
    wrong: int
    aside: int


def load(path: Path) -> Truth:
    raw = path.read_bytes()
    if not raw.startswith(MAGIC):
        raise ValueError(f"{path} is no log of this null server")
    sizes, at = np.frombuffer(raw, np.int64, 3, len(MAGIC)), len(MAGIC) + 24
    tables = []
    for rows, columns in zip(sizes, (REQUEST, WRITE, STALL), strict=True):
        n = int(rows) * columns
        tables.append(np.frombuffer(raw, np.int64, n, at).reshape(-1, columns))
        at += 8 * n
    return Truth(*tables)


def spread(values: Sequence[NDArray[np.float64]] | NDArray[np.float64]) -> Spread | None:
    flat = np.abs(np.concatenate([np.atleast_1d(v) for v in values]) if len(values) else [])
    if not len(flat):
        return None
    p50, p99 = np.quantile(flat, (0.5, 0.99))
    return Spread(len(flat), float(p50), float(p99), float(flat.max()))


def accuracy(truth: Truth, seen: Iterable[Seen]) -> Accuracy:
    """TTFT (first − sent against first − arrived), gaps and stamps of all requests, in ms."""
    by_key = {int(key): row for row, key in enumerate(truth.requests[:, 0])}
    writes = _tokens_by_request(truth)
    ttft, gaps, stamps = [], [], []
    n = wrong = aside = 0
    for one in seen:
        n += 1
        row = by_key.get(one.key)
        if row is None or not one.sent_ns:
            wrong += 1
            continue
        sent, took = writes[row]
        if len(sent) != len(one.stamps_ns) or not len(sent):
            wrong += 1
            continue
        good = (took >= 0) & (took < UNSURE_NS) & ~_stalled(truth.stalls, sent)
        aside += int((~good).sum())
        error = (one.stamps_ns - sent) / 1e6
        request = (one.sent_ns - truth.requests[row, 1]) / 1e6
        stamps.append(error[good])
        gaps.append(np.diff(error)[good[1:] & good[:-1]])
        if good[0] and not _stalled(truth.stalls, truth.requests[row:row + 1, 1])[0]:
            ttft.append(error[:1] - request)
    return Accuracy(spread(ttft), spread(gaps), spread(stamps), n, wrong, aside)


def _tokens_by_request(truth: Truth) -> list[tuple[Ints, Ints]]:
    """For each request: when its token events were sent, and how long each send() took (-1: the
    socket was full)."""
    tokens = truth.requests[truth.writes[:, 0], 3] if len(truth.writes) else np.array([], int)
    rows = truth.writes[(truth.writes[:, 1] >= 1) & (truth.writes[:, 1] <= tokens)]
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    cuts = np.searchsorted(rows[:, 0], np.arange(1, len(truth.requests)))
    found = []
    for part in np.split(rows, cuts):
        took = np.where(part[:, 5] < 0, -1, part[:, 5] - part[:, 4])
        found.append((np.repeat(part[:, 4], part[:, 2]), np.repeat(took, part[:, 2])))
    return found


def _stalled(stalls: Ints, at_ns: Ints) -> NDArray[np.bool_]:
    hit = np.zeros(len(at_ns), dtype=bool)
    for a, b in stalls:
        hit |= (at_ns >= a - AROUND_NS) & (at_ns <= b + AROUND_NS)
    return hit
