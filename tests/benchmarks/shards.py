"""Do several generator processes do the work of several? One plan is split over N shards, each with
a null server of its own (else the server would be the limit).

    python -m tests.benchmarks.shards --shards 1,2 --paced        CPU per event of two against one
    python -m tests.benchmarks.shards --shards 1,8                 events/s of eight against one

With 2 × N cores or more, each process has a core of its own; with fewer, servers share the first
core and shards the last: then only the CPU per event means anything.
"""

import argparse
import os
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadgen.leg import Leg
from loadgen.record import Outcome, RequestRecord
from loadgen.shard import Setup
from loadgen.target import Target
from tests.benchmarks.harness import Mode, server
from tests.benchmarks.ours import RATIOS, ShardProcess, leg_of, mix

TOKENS = 256


@dataclass(frozen=True)
class Result:
    """`events_per_s`: of all together, from the first request's start to the last one's end, as
    long as the slowest shard takes; `sum_per_s`: each shard's own rate, added up."""

    shards: int
    events: int
    events_per_s: float
    sum_per_s: float
    us_per_event: float


def measure(shards: int, streams: int, each: int, mode: Mode) -> Result:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= 4 * shards:
        cores = cores[::2]  # neighbours are often one core, twice
    own = len(cores) >= 2 * shards
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ports = [stack.enter_context(server(mode, None, cores[2 * i] if own else cores[0]))
                 for i in range(shards)]
        journals = [Path(folder) / f"records-{i}.jsonl" for i in range(shards)]
        processes = [ShardProcess(cores[2 * i + 1] if own else cores[-1], Setup(
            run="bench", journal=str(journals[i]), shard=i, of=shards, scenario=mix(TOKENS),
            target=Target(f"http://127.0.0.1:{ports[i]}", "tiny"), ratios=RATIOS,
            parent_pid=os.getpid())) for i in range(shards)]
        begun = _all(processes, leg_of(streams, each, None, 7))
        used_s = sum(process.end()["cpu_s"] for process in processes) - sum(begun)
        by_shard = [list(_records(journal)) for journal in journals]
    records = [record for mine in by_shard for record in mine]
    _check(records, streams * each)
    events = sum(record.n_events for record in records)
    return Result(shards, events, _rate(records), sum(map(_rate, by_shard)), used_s / events * 1e6)


def _rate(records: list[RequestRecord]) -> float:
    wall_s = (max(r.end_ns for r in records) - min(r.sent_ns or r.due_ns for r in records)) / 1e9
    return sum(record.n_events for record in records) / wall_s


def _all(processes: list[ShardProcess], leg: Leg) -> list[float]:
    """Runs the leg on all of them at once; the CPU of each before its clock began, s."""
    begun: list[float | None] = [None] * len(processes)

    def run(i: int) -> None:
        begun[i] = processes[i].run(leg)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if None in begun:
        raise RuntimeError("a shard failed: see above")
    return [s for s in begun if s is not None]


def _records(journal: Path) -> Iterator[RequestRecord]:
    for line in journal.read_bytes().splitlines()[1:]:
        yield msgspec.json.decode(line, type=RequestRecord)


def _check(records: list[RequestRecord], planned: int) -> None:
    """The union is the plan, and all of it was answered. Raises RuntimeError."""
    if sorted(r.session for r in records) != list(range(planned)):
        raise RuntimeError(f"{len(records)} records of {planned} planned requests")
    if any(r.outcome is not Outcome.OK for r in records):
        raise RuntimeError("not every answer was OK")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("--shards", type=lambda s: [int(x) for x in s.split(",")], default=[1, 2])
    options.add_argument("--paced", action="store_true", help="20 ms per token, not as fast as "
                         "it goes; as many streams in all, however many shards")
    options.add_argument("--coalesce", type=int, default=1, help="token events per write")
    options.add_argument("--streams", type=int, help="default: 256 in all, or 64 per shard")
    options.add_argument("--each", type=int, help="requests per stream; default: 2, or 26")
    options.add_argument("--repeats", type=int, default=3)
    args = options.parse_args()
    mode = Mode("shards", 0, 0, TOKENS, *((100.0, 20.0) if args.paced else (0.0, 0.0)),
                coalesce=args.coalesce)
    results: list[Result] = []
    for k in range(args.repeats):
        for shards in args.shards:
            streams = args.streams or (256 if args.paced else 64 * shards)
            result = measure(shards, streams, args.each or (2 if args.paced else 26), mode)
            results.append(result)
            print(f"[{k + 1}/{args.repeats}] {result}", flush=True)
    base = _middle(results, args.shards[0])
    print("| shards | events/s | × | sum of each one's own | × | CPU µs/event | × |\n"
          "|---|---|---|---|---|---|---|")
    for shards in args.shards:
        cells = [f"{x:,.2f} | {x / x0:.2f}"
                 for x, x0 in zip(_middle(results, shards), base, strict=True)]
        print(f"| {shards} | {' | '.join(cells)} |")
    print(f"{len(os.sched_getaffinity(0))} cores")


def _middle(results: list[Result], shards: int) -> list[float]:
    mine = [r for r in results if r.shards == shards]
    return [statistics.median(getattr(r, name) for r in mine)
            for name in ("events_per_s", "sum_per_s", "us_per_event")]


if __name__ == "__main__":
    main()
