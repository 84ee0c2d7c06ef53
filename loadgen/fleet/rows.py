"""A record as Locust shows it: a request of its own table and CSV, its failure under our name for
it, and rows of TTFT, TPOT and ITL that the Aggregated row does not count again."""

from collections import Counter

from locust.env import Environment
from locust.stats import StatsEntry, bucket_response_time

from loadgen import metrics
from loadgen.record import Outcome, RequestRecord


class Failed(Exception):
    """A request that was no success, by its outcome; Locust groups failures by these words."""

    def __init__(self, record: RequestRecord) -> None:
        words = f": {record.error[:160]}" if record.error else ""
        super().__init__(f"{record.outcome.value}{words}")

    def __repr__(self) -> str:
        return str(self)


def show(environment: Environment, record: RequestRecord, n_bytes: int) -> None:
    """Fires Locust's `request` event with E2E as its response time (of a failure: the time until
    it failed), and adds to the rows of TTFT, TPOT and ITL, in ms."""
    fine = record.outcome in (Outcome.OK, Outcome.ABANDONED)
    environment.events.request.fire(
        request_type="POST", name=record.cls,
        response_time=(record.end_ns - record.due_ns) / 1e6,
        response_length=n_bytes, context={}, url=None, response=None,
        start_time=None, exception=None if fine else Failed(record), record=record)
    ttft_s, tpot_s = metrics.ttft_s(record), metrics.tpot_s(record)
    if ttft_s is not None:
        _log(environment.stats.get(record.cls, "TTFT"), Counter([ttft_s * 1e3]))
    if tpot_s is not None:
        _log(environment.stats.get(record.cls, "TPOT"), Counter([tpot_s * 1e3]))
    if record.gaps_us:
        _log(environment.stats.get(record.cls, "ITL"),
             Counter(round(gap / 1000, 1) for gap in record.gaps_us))


def _log(entry: StatsEntry, values_ms: Counter[float]) -> None:
    """Adds many values to a row at once. `StatsEntry.log` takes one at a time: an answer's
    hundreds of gaps would hold up everybody's stamps for a millisecond."""
    n = values_ms.total()
    least, most = min(values_ms), max(values_ms)
    entry.num_requests += n
    entry.total_response_time += sum(v * k for v, k in values_ms.items())  # type: ignore[assignment]
    before = entry.min_response_time
    entry.min_response_time = least if before is None else min(before, least)  # type: ignore[assignment]
    entry.max_response_time = max(entry.max_response_time, most)  # type: ignore[assignment]
    for value, k in values_ms.items():
        entry.response_times[bucket_response_time(value)] += k
