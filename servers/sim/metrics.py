"""/metrics in vLLM's names, how well the simulator keeps its schedule, and nvidia-smi's view."""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from servers.sim.costs import BLOCK_TOK, GIB, used_gib
from servers.sim.engine import Engine

_REASONS = ("stop", "length", "abort", "error", "repetition")
_TTFT = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1., 2.5, 5., 7.5, 10., 20., 40.,
         80., 160., 640., 2560.)
_ITL = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1., 2.5, 5., 7.5, 10., 20., 40., 80.)
_E2E = (.3, .5, .8, 1., 1.5, 2., 2.5, 5., 10., 15., 20., 30., 40., 50., 60., 120., 240., 480.,
        960., 1920., 7680.)
LATE_S = 5e-3  # a step delivered later than this is late: a third of a short decode step
BUSY_WINDOW_S = 1.0


class Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass(slots=True)
class Latencies:
    """In seconds of the wall clock, as a client sees them."""

    ttft: Histogram = field(default_factory=lambda: Histogram(_TTFT))
    itl: Histogram = field(default_factory=lambda: Histogram(_ITL))
    e2e: Histogram = field(default_factory=lambda: Histogram(_E2E))


@dataclass(slots=True)
class Pacing:
    """Whether steps are delivered when they are due. If not, the simulator's own CPU, not the
    GPU that it simulates, is what a client measures."""

    steps: int = 0
    late: int = 0
    worst_s: float = 0.0
    _busy: deque[tuple[float, float]] = field(default_factory=deque)

    def ran(self, start_s: float, end_s: float) -> None:
        """The GPU, by its schedule."""
        self._busy.append((start_s, end_s))
        while self._busy[0][1] < end_s - BUSY_WINDOW_S:
            self._busy.popleft()

    def delivered(self, due_s: float, delivered_s: float) -> None:
        lag_s = delivered_s - due_s
        self.steps += 1
        self.late += lag_s > LATE_S
        self.worst_s = max(self.worst_s, lag_s)

    def late_frac(self) -> float:
        return self.late / self.steps if self.steps else 0.0

    def busy_frac(self, now_s: float) -> float:
        """Share of the last second in which a step ran."""
        since = now_s - BUSY_WINDOW_S
        busy = sum(max(0.0, min(end, now_s) - max(start, since)) for start, end in self._busy)
        return min(1.0, busy / BUSY_WINDOW_S)


def render(engine: Engine, model: str, latencies: Latencies, pacing: Pacing) -> str:
    return "\n".join(_lines(engine, model, latencies, pacing)) + "\n"


def _lines(engine: Engine, model: str, latencies: Latencies, pacing: Pacing) -> Iterator[str]:
    stats, config = engine.stats, engine.config
    who = {"engine": "0", "model_name": model}
    yield from _family("vllm:num_requests_running", "gauge", who, engine.running)
    yield from _family("vllm:num_requests_waiting", "gauge", who, engine.waiting)
    yield from _family("vllm:kv_cache_usage_perc", "gauge", who, engine.kv_usage)
    yield from _family("vllm:num_preemptions_total", "counter", who, stats.preemptions)
    yield from _family("vllm:prompt_tokens_total", "counter", who, stats.prompt_tok)
    yield from _family("vllm:generation_tokens_total", "counter", who, stats.generation_tok)
    yield from _family("vllm:prefix_cache_queries_total", "counter", who, stats.prefix_queries)
    yield from _family("vllm:prefix_cache_hits_total", "counter", who, stats.prefix_hits)
    yield "# TYPE vllm:request_success_total counter"
    for reason in _REASONS:
        yield _sample("vllm:request_success_total", {**who, "finished_reason": reason},
                      stats.finished[reason])
    yield from _family("vllm:cache_config_info", "gauge", {
        **who, "block_size": str(BLOCK_TOK), "num_gpu_blocks": str(config.num_blocks),
        "enable_prefix_caching": str(config.prefix_caching),
        "kv_cache_size_tokens": str(config.num_blocks * BLOCK_TOK)}, 1)
    for name, histogram in (("time_to_first_token", latencies.ttft),
                            ("inter_token_latency", latencies.itl),
                            ("e2e_request_latency", latencies.e2e)):
        yield from _histogram(f"vllm:{name}_seconds", who, histogram)
    machine = config.machine
    yield from _family("sim:info", "gauge", {"gpu": machine.gpu.name, "model": machine.model.name,
                                             "tensor_parallel_size": str(machine.tp)}, 1)
    yield from _family("sim:lag_seconds", "gauge", {"kind": "worst"}, pacing.worst_s)
    yield from _family("sim:late_steps_frac", "gauge", {}, pacing.late_frac())
    yield from _family("sim:steps_total", "counter", {}, pacing.steps)
    yield from _family("sim:late_steps_total", "counter", {}, pacing.late)


def _family(name: str, kind: str, labels: Mapping[str, str], value: float) -> Iterator[str]:
    yield f"# TYPE {name} {kind}"
    yield _sample(name, labels, value)


def _histogram(name: str, labels: Mapping[str, str], h: Histogram) -> Iterator[str]:
    yield f"# TYPE {name} histogram"
    total = 0
    for bound, count in zip((*map(str, h.bounds), "+Inf"), h.counts, strict=True):
        total += count
        yield _sample(f"{name}_bucket", {**labels, "le": bound}, total)
    yield _sample(f"{name}_count", labels, total)
    yield _sample(f"{name}_sum", labels, h.sum)


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    text = ",".join(f'{k}="{_escaped(v)}"' for k, v in sorted(labels.items()))
    return f"{name}{{{text}}} {float(value)}" if text else f"{name} {float(value)}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def gpus(engine: Engine, utilization: float, busy_frac: float) -> list[dict[str, object]]:
    """One entry per card, as NVML would fill it. vLLM takes its memory at the start and keeps it,
    so that memory says nothing about load."""
    machine = engine.config.machine
    gpu = machine.gpu
    return [{"index": i, "name": gpu.name, "simulated": True,
             "memory_used_bytes": int(used_gib(machine, utilization) * GIB),
             "memory_total_bytes": int(gpu.memory_gib * GIB),
             "utilization_gpu": round(100 * busy_frac),
             "power_w": round(gpu.idle_w + busy_frac * 0.85 * (gpu.max_w - gpu.idle_w), 1)}
            for i in range(machine.tp)]
