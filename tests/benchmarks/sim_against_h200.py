"""What was measured on a real H200 (vLLM 0.26, Qwen2.5-7B, 1,024 in / 256 out, closed loop, no
prefix cache, clients that start at once) against the simulator, in virtual time; and `others`,
which loadgen measured on another day on two H200 of another host, mean time per token at the
ladder's levels: only their Qwen2.5-0.5B at 1 and 64 streams gave constants (the engine's own loop).

    python -m tests.benchmarks.sim_against_h200
"""

import asyncio
import itertools
import statistics
from collections.abc import Sequence

from msgspec import Struct

from loadgen import metrics
from loadgen.leg import Leg
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Fixed, RequestClass, Sampling, Scenario
from loadgen.virtual import VirtualExecutor
from servers.sim.__main__ import engine_config, parse
from servers.sim.costs import BLOCK_TOK
from servers.sim.engine import EngineConfig

OPTIONS = ("--gpu", "h200", "--model", "qwen2.5-7b", "--max-model-len", "32768",
           "--gpu-memory-utilization", "0.9", "--no-enable-prefix-caching")
ITL_MS = {1: 4.75, 8: 4.95, 64: 5.99, 256: 13.9}  # median gap, by concurrency
TPOT_MS = {  # (model, GPUs, tokens out) → median time per output token by concurrency, 1,024 in
    ("qwen2.5-7b", 1, 256): {1: 4.87, 4: 5.39, 16: 6.38, 32: 7.77, 64: 10.84, 128: 18.03,
                             256: 24.33},
    ("qwen2.5-7b", 2, 256): {1: 3.32, 4: 3.81, 16: 4.50, 32: 5.45, 64: 7.23, 128: 11.22},
    ("qwen2.5-0.5b", 1, 512): {1: 1.67, 4: 1.79, 16: 2.12, 32: 2.69, 64: 2.88, 128: 3.93,
                               256: 10.89},
}
WAVES = 3  # of so many prompts as there are clients: 1,536 for 512, as then


class Figure(Struct, frozen=True):
    name: str
    unit: str
    measured: float
    simulated: float

    @property
    def off_frac(self) -> float:
        return self.simulated / self.measured - 1


def _mix(prompt_tok: int, output_tok: int) -> Scenario:
    cls = RequestClass(name="fixed", kind="chat", prompt_tok=Fixed(prompt_tok),
                       output_tok=Fixed(output_tok), sampling=Sampling(ignore_eos=True))
    return Scenario(name="fixed", classes=(cls,))


def closed_loop(config: EngineConfig, concurrency: int, prompt_tok: int = 1024,
                output_tok: int = 256, prompts: int | None = None) -> list[RequestRecord]:
    """All clients start at once; so many prompts in all."""
    mix = _mix(prompt_tok, output_tok)
    leg = Leg(id="bench", axis="concurrency", value=concurrency, phase="run", replicate=0, seed=1,
              load=Closed(concurrency=concurrency), warmup_s=0.0, measure_s=None,
              num_sessions=prompts or WAVES * concurrency)
    _, records, _ = asyncio.run(VirtualExecutor(mix, config).run_leg(leg))
    assert all(r.outcome is Outcome.OK for r in records)
    return records


def itl_ms(records: Sequence[RequestRecord]) -> float:
    return statistics.median(itertools.chain.from_iterable(r.gaps_us for r in records)) / 1000


def rate_rps(records: Sequence[RequestRecord]) -> float:
    began, ended = min(r.due_ns for r in records), max(r.end_ns for r in records)
    return len(records) / (ended - began) * 1e9


def output_tps(records: Sequence[RequestRecord]) -> float:
    return rate_rps(records) * statistics.fmean(r.output_tok or 0 for r in records)


def ttft_s(records: Sequence[RequestRecord]) -> float:
    return statistics.median((r.first_ns or 0) - r.due_ns for r in records) / 1e9


def prefill_tps(records: Sequence[RequestRecord], first_s: float = 10.0) -> float:
    """Prompt tokens per second while nothing but prompts waits: vLLM's log has ten such seconds."""
    began = min(r.due_ns for r in records)
    through = [r for r in records if (r.first_ns or 0) <= began + first_s * 1e9]
    return sum(r.prompt_tok or 0 for r in through) / first_s


def figures() -> list[Figure]:
    config = engine_config(parse(list(OPTIONS)))
    by_c = {c: closed_loop(config, c, prompts=16 if c == 1 else None) for c in (*ITL_MS, 512)}
    one, many = by_c[1], by_c[512]
    return [
        Figure("KV cache", "tokens", 2_063_088, config.num_blocks * BLOCK_TOK),
        *(Figure(f"median ITL, c = {c}", "ms", ms, itl_ms(by_c[c])) for c, ms in ITL_MS.items()),
        Figure("TTFT, c = 1", "ms", 34, 1000 * ttft_s(one)),
        Figure("output, c = 1", "tok/s", 205, output_tps(one)),
        Figure("output, c = 8", "tok/s", 1465, output_tps(by_c[8])),
        Figure("prefill, sustained", "tok/s", 43_600, prefill_tps(many)),
        Figure("throughput, c = 512", "req/s", 27.5, rate_rps(many)),
        Figure("output, c = 512", "tok/s", 7032, output_tps(many)),
        Figure("median TTFT, c = 512", "s", 5.4, ttft_s(many)),
    ]


def others() -> list[Figure]:
    """Slots that start one after the other, as a leg's warm-up has them."""
    found = []
    for (model, gpus, output_tok), by_c in TPOT_MS.items():
        config = engine_config(parse([*OPTIONS[:2], "--model", model, "-tp", str(gpus),
                                      *OPTIONS[4:8]]))
        for c, measured in by_c.items():
            leg = Leg(id="leg", axis="concurrency", value=c, phase="run", replicate=0, seed=1,
                      load=Closed(concurrency=c), warmup_s=2.0, measure_s=7.0)
            executor = VirtualExecutor(_mix(1024, output_tok), config)
            _, records, _ = asyncio.run(executor.run_leg(leg))
            tpots = [x for r in records if (x := metrics.tpot_s(r)) is not None]
            name = f"{model}{f', {gpus} GPUs' if gpus > 1 else ''}, TPOT, c = {c}"
            found.append(Figure(name, "ms", measured, 1000 * statistics.median(tpots)))
    return found


def table(found: Sequence[Figure]) -> str:
    lines = ["| figure | unit | measured | simulated | off |", "|---|---|---|---|---|"]
    lines += [f"| {f.name} | {f.unit} | {f.measured:,.10g} | {_rounded(f.simulated)} | "
              f"{100 * f.off_frac:+.1f} % |" for f in found]
    return "\n".join(lines)


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    print(table(figures()))
    print()
    print(table(others()))
