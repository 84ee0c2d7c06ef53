"""What a fleet costs beside its load, and whether its records are the plan.

    python -m tests.benchmarks.fleet                          200 req/s from 1 worker, and from 8
    python -m tests.benchmarks.fleet --fleets 3 --rate 60     60 req/s from 3

Master, workers and the null server are on this host. "worker" is the CPU of Locust's worker process
itself, in shares of one core over the load: what coordinating costs; "its shards" that of the
processes which send. "start": from the test's start to the first request's.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from loadgen.store import RunFolder
from tests.benchmarks.harness import Mode, server
from tests.fleets import Fleet, assert_is_exact, fleet, leg_of, planned, sent
from tests.real import wait

TOKENS = 16
LOAD_S = 12.0


@dataclass(frozen=True)
class Result:
    """CPU in shares of a core."""

    workers: int
    rate: float
    planned: int
    received: int
    missing: int
    exact: bool
    start_s: float
    worker_cpu: float
    shards_cpu: float
    master_cpu: float
    clock_error_ms: float


def measure(workers: int, rate: float) -> Result:
    with tempfile.TemporaryDirectory() as place, server(
            Mode("fleet", 0, 0, TOKENS, 50.0, 10.0), None) as port:
        with fleet(Path(place), f"http://127.0.0.1:{port}", workers=workers, rate=rate,
                   time_s=LOAD_S) as running:
            wait(lambda: running.n() > 0, 60)
            used, over_s = _cpu(running, LOAD_S - 4)
            said = running.over()
        if said.code not in (0, 1, 5):
            print(said.all)
        outcome = running.outcome
        leg, window = leg_of(running.folder)
        asked, came = planned(leg, window), sent(running.folder, window)
        exact = outcome["exact"] and window.ending == "done"
        if exact:
            assert_is_exact(running.folder)
        if RunFolder(running.folder).manifest().processes != workers:
            raise RuntimeError("not all workers had a part in it")
        return Result(
            workers, rate, len(asked), len(came), len(asked.keys() - came.keys()), exact,
            outcome["start_s"], used[0] / over_s, used[1] / over_s, used[2] / over_s,
            max(c["error_ns"] for c in outcome["clocks"]) / 1e6)


def _cpu(running: Fleet, over_s: float) -> tuple[tuple[float, float, float], float]:
    """CPU seconds of a worker and of a worker's shards (means), and of the master."""
    workers = [psutil.Process(w.pid) for w in running.workers]
    groups = [workers, [c for w in workers for c in w.children()],
              [psutil.Process(running.master.pid)]]
    began_s, before = time.monotonic(), [_used(g) for g in groups]
    time.sleep(over_s)
    after = [_used(g) for g in groups]
    took_s = time.monotonic() - began_s
    n = len(workers)
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return (spent[0] / n, spent[1] / n, spent[2]), took_s


def _used(processes: Sequence[psutil.Process]) -> float:
    times = [p.cpu_times() for p in processes]
    return float(sum(t.user + t.system for t in times))


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("--fleets", type=lambda s: [int(x) for x in s.split(",")], default=[1, 8],
                         help="numbers of workers")
    options.add_argument("--rate", type=float, default=200.0, help="of the whole fleet, per second")
    options.add_argument("--repeats", type=int, default=1)
    args = options.parse_args()
    print("| workers | req/s | planned | received | missing | exact | start | worker's CPU | its "
          f"shards' CPU | master's CPU | clock error |\n{'|---' * 11}|")
    for workers in args.fleets:
        found = [measure(workers, args.rate) for _ in range(args.repeats)]
        start_s, worker, shards, master = (
            statistics.median(getattr(x, name) for x in found)
            for name in ("start_s", "worker_cpu", "shards_cpu", "master_cpu"))
        print(f"| {workers} | {args.rate:g} | {sum(x.planned for x in found)} | "
              f"{sum(x.received for x in found)} | {sum(x.missing for x in found)} | "
              f"{'yes' if all(x.exact for x in found) else 'NO'} | {start_s:.1f} s | "
              f"{worker:.1%} | {shards:.1%} | {master:.1%} | "
              f"{max(x.clock_error_ms for x in found):.2f} ms |", flush=True)
    print(f"{len(os.sched_getaffinity(0))} cores; medians of {args.repeats}")


if __name__ == "__main__":
    main()
