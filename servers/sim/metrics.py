"""What the simulator counts: of requests as their clients see them, of its own schedule, and of
the GPU that it plays."""

import time
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Protocol

from servers.sim.costs import GIB
from servers.sim.engine import Engine

_TTFT = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1., 2.5, 5., 7.5, 10., 20., 40.,
         80., 160., 640., 2560.)
_ITL = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1., 2.5, 5., 7.5, 10., 20., 40., 80.)
_REQUEST = (.3, .5, .8, 1., 1.5, 2., 2.5, 5., 10., 15., 20., 30., 40., 50., 60., 120., 240., 480.,
            960., 1920., 7680.)
_STEP_TOK = tuple(float(2**k) for k in (0, *range(3, 15)))
_N = (1., 2., 5., 10., 20.)
_PREEMPTIONS = (1., 2., 3., 4., 5., 10., 20.)
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


class Lived(Protocol):
    """What is known of one answer when it ends. Stamps are of the loop's clock."""

    prompt_tok: int
    cached_tok: int
    tokens: int
    preemptions: int
    due_s: float
    admitted_s: float | None
    first_s: float
    last_s: float


class Tally:
    """Counters of vLLM's API server: of tokens that clients were sent, in seconds of the wall
    clock. (The engine counts what it computed: more, where a client has left.)"""

    def __init__(self, max_model_len: int) -> None:
        sizes = tuple(float(m * 10**k) for k in range(8) for m in (1, 2, 5)
                      if m * 10**k <= max_model_len)
        self.created = time.time()
        self.prompt_tok = self.cached_tok = self.generation_tok = 0
        self.reasons: Counter[str] = Counter()
        self.rejected = 0
        self.calls: Counter[tuple[str, str]] = Counter()  # (mode, outcome) of the tool parser
        self.itl = Histogram(_ITL)
        self._ttft = Histogram(_TTFT)
        self.histograms = {
            "request_prompt_tokens": Histogram(sizes),
            "request_generation_tokens": Histogram(sizes),
            "iteration_tokens_total": Histogram(_STEP_TOK),
            "request_max_num_generation_tokens": Histogram(sizes),
            "request_params_n": Histogram(_N),
            "request_params_max_tokens": Histogram(sizes),
            "time_to_first_token_seconds": self._ttft, "inter_token_latency_seconds": self.itl,
            "request_time_per_output_token_seconds": Histogram(_ITL),
            **{f"{name}_seconds": Histogram(_REQUEST) for name in (
                "e2e_request_latency", "request_queue_time", "request_inference_time",
                "request_prefill_time", "request_decode_time")},
            "request_num_preemptions": Histogram(_PREEMPTIONS),
            "request_prefill_kv_computed_tokens": Histogram(sizes)}
        self._step_tok = self._given_tok = 0

    def asked(self, n: int, max_tokens: int) -> None:
        self.histograms["request_params_n"].observe(n)
        self.histograms["request_params_max_tokens"].observe(max_tokens)

    def first_token(self, lived: Lived) -> None:
        self.prompt_tok += lived.prompt_tok
        self.cached_tok += lived.cached_tok
        self._step_tok += lived.prompt_tok
        self._ttft.observe(lived.first_s - lived.due_s)

    def stepped(self) -> None:
        """A step's tokens have been handed out."""
        given, self._given_tok = self.generation_tok - self._given_tok, self.generation_tok
        self.histograms["iteration_tokens_total"].observe(self._step_tok + given)
        self._step_tok = 0

    def finished(self, lived: Lived, reason: str) -> None:
        self.reasons[reason] += 1
        if not lived.tokens:  # cut before its first one
            return
        begun_s = lived.due_s if lived.admitted_s is None else lived.admitted_s
        decode_s = lived.last_s - lived.first_s
        for name, value in (
                ("request_prompt_tokens", lived.prompt_tok),
                ("request_generation_tokens", lived.tokens),
                ("request_max_num_generation_tokens", lived.tokens),
                ("request_time_per_output_token_seconds", decode_s / max(1, lived.tokens - 1)),
                ("e2e_request_latency_seconds", lived.last_s - lived.due_s),
                ("request_queue_time_seconds", max(0.0, begun_s - lived.due_s)),
                ("request_inference_time_seconds", lived.last_s - begun_s),
                ("request_prefill_time_seconds", lived.first_s - begun_s),
                ("request_decode_time_seconds", decode_s),
                ("request_num_preemptions", lived.preemptions),
                ("request_prefill_kv_computed_tokens", lived.prompt_tok - lived.cached_tok)):
            self.histograms[name].observe(value)


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
        """A step's last write is done."""
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


def gpus(engine: Engine, utilization: float, busy_frac: float) -> list[dict[str, object]]:
    """One entry per card, as NVML would fill it. vLLM takes its memory at the start and keeps it,
    so that memory says nothing about load."""
    machine = engine.config.machine
    gpu = machine.gpu
    return [{"index": i, "name": gpu.name, "simulated": True,
             "memory_used_bytes": int(engine.used_gib(utilization) * GIB),
             "memory_total_bytes": int(gpu.memory_gib * GIB),
             "utilization_gpu": round(100 * busy_frac),
             "power_w": round(gpu.idle_w + busy_frac * 0.85 * (gpu.max_w - gpu.idle_w), 1)}
            for i in range(machine.tp)]
