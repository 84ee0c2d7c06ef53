"""What a fleet's plan asked for against what has a record: which arrivals are missing, and whose
they were. Pure."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from loadgen import plan, scenario
from loadgen.leg import Leg
from loadgen.prompts import Ratio
from loadgen.record import RequestRecord
from loadgen.scenario import Closed, Open, PerSecond, Scenario, Trace

SHOWN = 6  # of missing arrivals, in a sentence
STOP_EDGE_NS = 100_000_000
_ASKED = 32  # sessions that a digest is made of …
_READ = 4  # … and prompts


class Entry(Struct, frozen=True):
    """One shard's arrivals of one leg that were due before the window's end. `missing`: first and
    last of a row of arrivals without a record, where `every` is from one to the next. Of a closed
    loop's plan only what lies before the last one known can be missing. `twice`: arrivals with
    more than one record."""

    leg: str
    shard: int
    worker: str
    planned: int
    received: int
    every: int
    missing: list[tuple[int, int]]
    twice: list[int]

    @property
    def n_missing(self) -> int:
        return sum((b - a) // self.every + 1 for a, b in self.missing)

    @property
    def is_exact(self) -> bool:
        return not self.missing and not self.twice


def entries(leg: Leg, t0_ns: int, until_ns: int, records: Iterable[RequestRecord],
            owners: Sequence[str]) -> list[Entry]:
    """What was due before `until_ns`. `owners`: the worker of each shard; instants are of one
    clock."""
    due: list[Counter[int]] = [Counter() for _ in owners]
    for r in records:
        if r.leg == leg.id and r.turn == 0 and r.due_ns < until_ns and r.shard < len(owners):
            due[r.shard][r.session] += 1
    of = len(owners)
    every = min(of, leg.load.concurrency) if isinstance(leg.load, Closed) else of
    asked = (_stripes(leg, t0_ns, until_ns, of) if not isinstance(leg.load, Closed) else
             [list(range(i, max(due[i], default=-1) + 1, every)) for i in range(of)])
    found = []
    for i, planned in enumerate(asked):
        gone = [k for k in planned if k not in due[i]]
        found.append(Entry(
            leg=leg.id, shard=i, worker=owners[i], planned=len(planned),
            received=len(planned) - len(gone), every=every, missing=list(rows(gone, every)),
            twice=sorted(k for k, n in due[i].items() if n > 1)))
    return found


def until_ns(leg: Leg, t0_ns: int, stops_ns: Iterable[int]) -> int:
    """Before when arrivals must have records: the end of the leg's window; where a shard was
    stopped before that, a little before the first one: a start that was due right then may have
    been called off."""
    stop_ns = min((x - STOP_EDGE_NS for x in stops_ns), default=t0_ns)
    if leg.measure_s is None:
        return stop_ns
    return min(stop_ns, t0_ns + round((leg.warmup_s + leg.measure_s) * 1e9))


def _stripes(leg: Leg, t0_ns: int, until_ns: int, of: int) -> list[list[int]]:
    """Each shard's arrivals that were due before `until_ns`."""
    assert isinstance(leg.load, Open | Trace)
    stripes: list[list[int]] = [[] for _ in range(of)]
    for k, due_s in enumerate(plan.arrivals(leg.load, leg.seed)):
        if t0_ns + round(due_s * 1e9) >= until_ns:
            break
        if leg.num_sessions is None or k < leg.num_sessions:
            stripes[k % of].append(k)
    return stripes


def rows(ks: Sequence[int], every: int) -> Iterator[tuple[int, int]]:
    """Ascending numbers as rows of equal steps: (first, last)."""
    for _, row in itertools.groupby(enumerate(ks), lambda x: x[1] - x[0] * every):
        row_ks = [k for _, k in row]
        yield row_ks[0], row_ks[-1]


def says(found: Sequence[Entry]) -> str | None:
    """Whose arrivals have no record, in a sentence; None: each has one."""
    words = []
    for worker in dict.fromkeys(e.worker for e in found):
        mine = [e for e in found if e.worker == worker]
        gone = sorted(k for e in mine for a, b in e.missing for k in range(a, b + 1, e.every))
        if gone:
            shown = ", ".join(map(str, gone[:SHOWN])) + (", …" if len(gone) > SHOWN else "")
            words.append(f"{len(gone)} of {sum(e.planned for e in mine)} arrivals of {worker} have "
                         f"no record ({shown})")
    return "; ".join(words) or None


def digest(mix: Scenario, seed: int, ratios: Mapping[str, Ratio]) -> str:
    """What the plan's first sessions, their instants and prompts hash to. Two hosts that agree on
    it make the same plan; another numpy might not."""
    leg = Leg(id="", axis="rate", value=1.0, phase="run", replicate=0, seed=seed, warmup_s=0.0,
              load=Open(rate_rps=PerSecond(1.0), arrivals="gamma", cv=2.0), measure_s=None)
    sessions = list(itertools.islice(plan.sessions(mix, leg), _ASKED))
    texts = [plan.prompt(mix.of(s.cls), s, 0, seed, ratios[s.cls]) for s in sessions[:_READ]]
    return _hash([scenario_hash(mix), msgspec.to_builtins(sessions), texts])


def scenario_hash(mix: Scenario) -> str:
    """Of its files what is in them, not where they are."""
    return _hash(scenario.placeless(scenario.to_plain(mix)))


def _hash(plain: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(
        plain, enc_hook=scenario.enc_hook, order="sorted")).hexdigest()[:32]
