"""The simulator's engine in virtual time as an oracle: each leg runs on a server that is a little
faster or slower than the profile (runs differ), and whose speed wanders while it runs (clumps).

A speed f multiplies the card's bandwidth and arithmetic and divides the host's times; ln f is
normal with standard deviation RUN_SD for each leg. Within a leg the engine makes its own clumps:
requests of one batch share its steps.

The true attainment at a load is that of long legs over many speeds; `python -m tests.oracle.engine`
remakes the constants TRUE_SAFE.
"""

import asyncio
import dataclasses
import functools
import math
import random
from dataclasses import dataclass
from statistics import NormalDist

from loadgen import metrics, ramp, scenario
from loadgen.judge import Criteria, ServerSigns
from loadgen.leg import Axis, Leg, Window
from loadgen.pace import load_of
from loadgen.ramp import SweepPlan
from loadgen.record import RequestRecord
from loadgen.scenario import Scenario
from loadgen.sweep import SweepResult, sweep
from loadgen.virtual import VirtualExecutor
from servers.sim.__main__ import engine_config, parse
from servers.sim.engine import EngineConfig
from tests.oracle.world import Found, ladder_of

RUN_SD = 0.02  # of ln speed, from leg to leg
MOST = {"concurrency": 128.0, "rate": 16.0}

# (axis, limits) → c*: the largest load at which the mean over runs is ≥ 0.95. Limits on TPOT move
# the edge over the ladder, so that it is not luck where its levels lie.
LIMITS = (None, "tpot=38ms", "tpot=44ms", "tpot=60ms")
TRUE_SAFE: dict[tuple[Axis, str | None], float] = {
    ("concurrency", None): 42, ("concurrency", "tpot=38ms"): 24,
    ("concurrency", "tpot=44ms"): 33, ("concurrency", "tpot=60ms"): 56,
    ("rate", None): 3.969, ("rate", "tpot=38ms"): 3.031,
    ("rate", "tpot=44ms"): 3.594, ("rate", "tpot=60ms"): 4.531}


def scaled(config: EngineConfig, speed: float) -> EngineConfig:
    """The same server on a card and host that are `speed` times as fast."""
    machine = config.machine
    gpu = dataclasses.replace(machine.gpu, bandwidth=machine.gpu.bandwidth * speed,
                              flops=machine.gpu.flops * speed)
    c = machine.constants
    constants = dataclasses.replace(c, host_step_s=c.host_step_s / speed,
                                    host_layer_s=c.host_layer_s / speed,
                                    host_seq_s=c.host_seq_s / speed,
                                    loop_step_s=c.loop_step_s / speed,
                                    loop_seq_s=c.loop_seq_s / speed)
    return dataclasses.replace(config, machine=dataclasses.replace(
        machine, gpu=gpu, constants=constants))


class Varying:
    """An executor of the sweep whose server is another one in each leg."""

    def __init__(self, mix: Scenario, seed: int, run_sd: float = RUN_SD) -> None:
        self.now_s, self.load_s = 3.0, 0.0
        self._mix, self._config = mix, engine_config(parse([]))
        self._rng, self._run_sd = random.Random(seed), run_sd

    async def run_leg(self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]:
        speed = math.exp(self._rng.gauss(0, self._run_sd))
        executor = VirtualExecutor(self._mix, scaled(self._config, speed))
        executor.now_s = self.now_s
        found = await executor.run_leg(leg)
        self.load_s += executor.now_s - self.now_s
        self.now_s = executor.now_s
        return found

    async def restart(self, why: str) -> None:
        raise AssertionError(why)


@functools.cache
def mix_of(limits: str | None) -> Scenario:
    mix = scenario.load("mixed")
    return mix.with_slo(scenario.parse_slo(limits)) if limits else mix


def search(axis: Axis, limits: str | None, seed: int, budget_s: float) -> Found:
    """The sweep of `loadgen sweep --virtual` on such a server."""
    result, executor = sweep_of(axis, limits, seed, budget_s)
    end = ramp.conclude(result.judgements, axis, Criteria())
    return Found(end.safe, executor.load_s, executor.now_s, len(result.judgements), end)


def sweep_of(axis: Axis, limits: str | None, seed: int,
             budget_s: float) -> tuple[SweepResult, Varying]:
    executor = Varying(mix_of(limits), seed)
    plan = SweepPlan(axis, ladder_of(axis, MOST[axis]), budget_s, seed, Criteria(),
                     can_restart=False, finest=ramp.finest_of(budget_s), checks=True)
    result = asyncio.run(sweep(plan, mix_of(limits), executor, lambda *_: None,
                               lambda: executor.now_s))
    return result, executor


# ----------------------------------------------------------------------------------------- truth


@dataclass(frozen=True)
class Truth:
    """Attainment in the mean over runs, and its standard error."""

    load: float
    mean: float
    error: float


def truth(axis: Axis, limits: str | None, load: float, runs: int = 40,
          seconds: float = 120.0) -> Truth:
    """Of `runs` legs at quantiles of the speed, so that few of them do."""
    shares = []
    mix = mix_of(limits)
    for i in range(runs):
        speed = math.exp(RUN_SD * NormalDist().inv_cdf((i + 0.5) / runs))
        executor = VirtualExecutor(mix, scaled(engine_config(parse([])), speed))
        leg = Leg(id="truth", axis=axis, value=load, phase="run", replicate=0, seed=10_000 + i,
                  load=load_of(axis, load), warmup_s=10.0, measure_s=seconds)
        window, records, _ = asyncio.run(executor.run_leg(leg))
        due = [r for r in records if window.from_ns <= r.due_ns < window.to_ns]
        good = sum(not metrics.misses(r, mix.slo_of(r.cls)) for r in due)
        shares.append(good / len(due))
    mean = sum(shares) / runs
    return Truth(load, mean, math.sqrt(sum((x - mean) ** 2 for x in shares)) / runs)


def true_safe(axis: Axis, limits: str | None) -> float:
    """By bisection; concurrency in whole numbers, rates to 1 %."""
    low, high = (1.0, 2.0) if axis == "concurrency" else (0.25, 0.5)
    while truth(axis, limits, high, 8).mean >= 0.95:
        low, high = high, 2 * high
    while high - low > (1 if axis == "concurrency" else 0.01 * low):
        middle = float(round((low + high) / 2)) if axis == "concurrency" else (low + high) / 2
        low, high = (middle, high) if truth(axis, limits, middle).mean >= 0.95 else (low, middle)
    return round(low, 3)


def main() -> None:
    for axis in ("concurrency", "rate"):
        for limits in LIMITS:
            print(f"    ({axis!r}, {limits!r}): {true_safe(axis, limits):g},", flush=True)


if __name__ == "__main__":
    main()
