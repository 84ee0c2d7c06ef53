"""What ended, as counts in buckets: a fleet's live figures cost the same for ten requests a second
and ten thousand, and add up exactly over workers. (Verdicts are made of records, not of these.)"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from loadgen import metrics
from loadgen.hosts.messages import Buckets, ClassDelta, Delta
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Slo

STEP = 1.04  # a bucket's width: 2 % off at most
_LOG = math.log(STEP)
NO_ERROR = frozenset({Outcome.OK, Outcome.ABANDONED, Outcome.CANCELLED})
WORDS = 200  # of an error


def bucket(value_s: float) -> int:
    """Buckets of µs: 0 holds 1 µs and less."""
    return max(0, math.ceil(math.log(max(value_s, 1e-6) * 1e6) / _LOG))


def middle_s(at: int) -> float:
    return float(STEP ** (at - 0.5)) / 1e6


def tally(records: Iterable[RequestRecord], slos: Mapping[str, Slo]) -> Delta:
    classes: dict[str, ClassDelta] = {}
    errors: dict[str, tuple[int, str | None]] = {}
    for r in records:
        if r.outcome not in NO_ERROR:
            n, words = errors.get(r.outcome.value, (0, None))
            errors[r.outcome.value] = n + 1, (r.error or "")[:WORDS] or words
        if r.outcome is Outcome.CANCELLED:
            continue
        c = classes.setdefault(r.cls, ClassDelta())
        c.n += 1
        c.good += not metrics.misses(r, slos[r.cls])
        c.output_tok += r.output_tok or 0
        for buckets, value_s in ((c.ttft, metrics.ttft_s(r)), (c.tpot, metrics.tpot_s(r))):
            if value_s is not None:
                at = bucket(value_s)
                buckets[at] = buckets.get(at, 0) + 1
        if r.gaps_us:
            _add(c.itl, _of_gaps(r.gaps_us))
    return Delta(classes, errors)


def _of_gaps(gaps_us: list[int]) -> Counter[int]:
    logs = np.log(np.maximum(np.array(gaps_us, np.float64), 1.0)) / _LOG
    return Counter(np.ceil(logs).astype(int).tolist())


def _add(into: Buckets, more: Mapping[int, int]) -> None:
    for at, n in more.items():
        into[at] = into.get(at, 0) + n


def total(deltas: Iterable[Delta], cls: str | None = None) -> ClassDelta:
    """All of a class, or of all classes, together."""
    found = ClassDelta()
    for delta in deltas:
        for name, c in delta.classes.items():
            if cls in (None, name):
                found.n += c.n
                found.good += c.good
                found.output_tok += c.output_tok
                for into, more in ((found.ttft, c.ttft), (found.tpot, c.tpot),
                                   (found.itl, c.itl)):
                    _add(into, more)
    return found


def merged(deltas: Sequence[Delta]) -> Delta | None:
    """Several as one; None of none."""
    if not deltas:
        return None
    names = {name for d in deltas for name in d.classes}
    errors: dict[str, tuple[int, str | None]] = {}
    for d in deltas:
        for name, (n, words) in d.errors.items():
            before, last = errors.get(name, (0, None))
            errors[name] = before + n, words or last
    return Delta({name: total(deltas, name) for name in names}, errors)


def quantile_s(buckets: Mapping[int, int], q: float) -> float | None:
    """None where too few are counted to have it."""
    n = sum(buckets.values())
    if not n or n < 1 / (1 - q):
        return None
    rank, seen = math.ceil(q * n), 0
    for at in sorted(buckets):
        seen += buckets[at]
        if seen >= rank:
            return round(middle_s(at), 6)
    raise AssertionError("the counts do not add up")
