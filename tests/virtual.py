"""The default sweep on the simulator's engine in virtual time."""

import asyncio

from loadgen.judge import Criteria, Judgement
from loadgen.ramp import SweepPlan, finest_of
from loadgen.scenario import Scenario
from loadgen.sweep import SweepResult, sweep
from loadgen.virtual import VirtualExecutor
from servers.sim.__main__ import engine_config, parse
from servers.sim.engine import EngineConfig


def config(*options: str) -> EngineConfig:
    """The simulator's, of its command line."""
    return engine_config(parse(list(options)))


def virtual_sweep(scenario: Scenario, seed: int, budget_s: float = 230.0,
                  most: int = 128) -> tuple[SweepResult, float]:
    """The default sweep, and the virtual seconds it took."""
    executor = VirtualExecutor(scenario, config())
    levels = tuple(float(2**k) for k in range(most.bit_length()))
    seen: list[Judgement] = []
    result = asyncio.run(sweep(
        SweepPlan("concurrency", levels, budget_s, seed, Criteria(), can_restart=False,
                  finest=finest_of(budget_s)),
        scenario, executor, lambda _, j: seen.append(j), lambda: executor.now_s))
    return result, executor.now_s
