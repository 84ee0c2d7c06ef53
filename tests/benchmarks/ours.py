"""loadgen's own generator, on the path that real runs use: a `python -m loadgen.shard` process,
driven here by the commands that `loadgen run` sends it (connections opened, bodies built ahead,
gc off, every record in its journal). Only that process is pinned and measured.

    python tests/benchmarks/ours.py --port 8000 --streams 64 --each 2 --core 1 --out seen.bin

Imports nothing but loadgen and the standard library, so that PYTHONPATH may name another checkout
of loadgen, to measure that one. Prints what `harness` reads: marks, then the process's usage.
"""

import argparse
import hashlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

import msgspec

from loadgen import openai, plan, scenario
from loadgen.leg import Leg
from loadgen.prompts import Ratio
from loadgen.record import RequestRecord
from loadgen.scenario import Closed, Open, PerSecond, Scenario
from loadgen.shard import Command, Setup
from loadgen.target import Target

PROMPT_TOK, SEED = 64, 7
LEAD_S = 1.0  # from the leg's command to its clock: connections are opened in it
RATIOS = {"bench": Ratio(4.0, 10.0, "guess")}


def mix(tokens: int) -> dict[str, Any]:
    """The scenario: one class, answers of `tokens`."""
    return {"name": "bench", "slo": {"ttft": "10s"}, "classes": [{
        "name": "bench", "kind": "chat", "prompt_tokens": PROMPT_TOK, "output_tokens": tokens,
        "sampling": {"ignore_eos": True}}]}


def leg_of(streams: int, each: int, rate_rps: float | None, seed: int) -> Leg:
    load = Closed(streams) if rate_rps is None else Open(PerSecond(rate_rps))
    return Leg(id="bench", axis="rate" if rate_rps else "concurrency", value=rate_rps or streams,
               phase="run", replicate=0, seed=seed, load=load, warmup_s=0.0, measure_s=None,
               num_sessions=streams * each)


class ShardProcess:
    """The generator process. `usage` is known when it has ended."""

    def __init__(self, core: int | None, setup: Setup) -> None:
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core} if core is not None else mine)  # for the child to inherit
        self._began_ns = time.monotonic_ns()
        self._process = subprocess.Popen([sys.executable, "-m", "loadgen.shard"], process_group=0,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        os.sched_setaffinity(0, mine)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._rest = b""
        self._tell(setup)
        ready = self.next_frame(30)
        if ready is None or ready.get("failed"):
            raise RuntimeError(f"the shard did not get ready: {ready}")
        self.start_up_s = (time.monotonic_ns() - self._began_ns) / 1e9

    def run(self, leg: Leg) -> float:
        """The whole leg; its CPU before the clock began, s. Raises RuntimeError if it fails."""
        t0_ns = time.monotonic_ns() + round(LEAD_S * 1e9)
        self._tell(Command("leg", leg, t0_ns))
        before_s: float | None = None
        while True:
            left_s = (t0_ns - 20_000_000 - time.monotonic_ns()) / 1e9
            frame = self.next_frame(max(0.0, left_s) if before_s is None else 1.0)
            if before_s is None and time.monotonic_ns() >= t0_ns - 20_000_000:
                before_s = self.cpu_s()
            self._tell(Command("lease"))
            if frame is not None and frame["kind"] == "ended":
                if frame.get("failed"):
                    raise RuntimeError(f"the shard gave up: {frame['failed']}")
                return before_s or 0.0

    def next_frame(self, patience_s: float) -> dict[str, Any] | None:
        while b"\n" not in self._rest:
            if not select.select([self._out], (), (), patience_s)[0]:
                return None
            data = os.read(self._out.fileno(), 65536)
            if not data:
                raise RuntimeError("the shard has ended before its time")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        frame: dict[str, Any] = json.loads(line)
        return frame

    def cpu_s(self) -> float:
        """Of all its threads, from the scheduler's own account (ns; stat has only 10 ms)."""
        tasks = Path(f"/proc/{self._process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def end(self) -> dict[str, float]:
        """CPU of all its life, s; largest resident set, KiB."""
        self._in.close()
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return {"cpu_s": usage.ru_utime + usage.ru_stime, "rss_kb": usage.ru_maxrss}

    def _tell(self, what: Setup | Command) -> None:
        self._in.write(msgspec.json.encode(what, enc_hook=scenario.enc_hook) + b"\n")


def save(records: list[RequestRecord], mixed: Scenario, leg: Leg, out: Path) -> None:
    """What was seen, as `truth.load_seen` reads it; keys are the bodies' hashes, as the server
    makes them of requests without a "user"."""
    rows = array("q")
    for record in records:
        planned = plan.session(mixed, leg.seed, record.session, None)
        text = plan.prompt(mixed.of("bench"), planned, 0, leg.seed, RATIOS["bench"])
        body = openai.body("chat", "tiny", text, planned.turns[0].output_tok, mixed.of("bench"))
        key = int.from_bytes(hashlib.blake2b(body, digest_size=8).digest(), "big") >> 1
        stamps = [] if record.first_ns is None else [record.first_ns]
        for gap_us in record.gaps_us:
            stamps.append(stamps[-1] + 1000 * gap_us)
        rows.extend((key, record.due_ns if isinstance(leg.load, Open) else 0,
                     record.sent_ns or 0, len(stamps)))
        rows.extend(stamps)
    with out.open("wb") as f:
        rows.tofile(f)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--streams", type=int, default=64)
    options.add_argument("--each", type=int, default=2, help="requests per stream")
    options.add_argument("--tokens", type=int, default=256)
    options.add_argument("--rate", type=float, help="open loop: streams × each requests")
    options.add_argument("--core", type=int, help="for the generator process")
    options.add_argument("--seed", type=int, default=SEED)
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    leg = leg_of(args.streams, args.each, args.rate, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "records-0.jsonl"
        shard = ShardProcess(args.core, Setup(
            run="bench", journal=str(journal), shard=0, of=1, scenario=mix(args.tokens),
            target=Target(f"http://127.0.0.1:{args.port}", "tiny"), ratios=RATIOS,
            parent_pid=os.getpid()))
        begin_s = shard.run(leg)
        usage = shard.end()
        lines = journal.read_bytes().splitlines()[1:]
        records = [msgspec.json.decode(line, type=RequestRecord) for line in lines]
    outcomes: dict[str, int] = {}
    for record in records:
        outcomes[record.outcome] = outcomes.get(record.outcome, 0) + 1
    print(json.dumps({"mark": "begin", "cpu_s": begin_s, "start_up_s": shard.start_up_s}))
    print(json.dumps({"mark": "usage", **usage}))
    print(json.dumps({"mark": "outcomes", **outcomes}))
    if args.out:
        save(records, scenario.parse(mix(args.tokens), "bench"), leg, args.out)


if __name__ == "__main__":
    main()
