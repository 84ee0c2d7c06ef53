"""How much faster than real time the simulator's engine runs: plan, engine, prefix cache, front
end and records of the default profile, in virtual time on one core.

    python -m tests.benchmarks.engine [--concurrency 32] [--seconds 600] [--repeats 3]
"""

import argparse
import asyncio
import time

from loadgen import scenario
from loadgen.leg import Leg
from loadgen.scenario import Closed
from loadgen.virtual import VirtualExecutor
from servers.sim.__main__ import engine_config, parse


def ratio(concurrency: int, seconds: float) -> tuple[float, int, int]:
    """(virtual seconds per second of CPU, records, tokens)."""
    leg = Leg(id="bench", axis="concurrency", value=concurrency, phase="run", replicate=0, seed=1,
              load=Closed(concurrency=concurrency), warmup_s=0.0, measure_s=seconds)
    executor = VirtualExecutor(scenario.load("mixed"), engine_config(parse([])))
    began_s, before_s = time.process_time(), executor.now_s
    _, records, _ = asyncio.run(executor.run_leg(leg))
    spent_s = time.process_time() - began_s
    return ((executor.now_s - before_s) / spent_s, len(records),
            sum(r.output_tok or 0 for r in records))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--concurrency", type=int, default=32)
    p.add_argument("--seconds", type=float, default=600.0)
    p.add_argument("--repeats", type=int, default=3)
    options = p.parse_args()
    for _ in range(options.repeats):
        faster, records, tokens = ratio(options.concurrency, options.seconds)
        print(f"{faster:,.0f} x real time ({options.seconds:g} s at {options.concurrency} "
              f"concurrent requests: {records} records, {tokens} tokens)")


if __name__ == "__main__":
    main()
