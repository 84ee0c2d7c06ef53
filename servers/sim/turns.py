"""Hugging Face's `generate` behind a small web app, as `servers/hf/app.py` is one: with the calls
of the engine, in virtual time.

Each request generates in a thread of its own, with a KV cache of its own that grows. Nothing is
batched: the threads share one Python, whose launches of a token's kernels take longer than most
tokens take the GPU, so that they go on turn by turn, a token each (a whole prompt in the first).
Nobody waits in a queue, nothing is preempted, no prefix is found again. Memory is the only limit:
a turn that finds no room ends its request with PyTorch's error, and the others go on.

How long a turn takes is an assumption, from published figures (`hardware.toml`, table [generate]).
Left out: what threads lose to each other, what PyTorch's allocator cannot use of what is free, and
that `device_map="auto"` would put layers on the CPU that no GPU has room for.
"""

from collections import deque
from dataclasses import replace

from servers.sim.costs import (
    CONTEXT_GIB,
    DRIVER_GIB,
    GIB,
    DoesNotFit,
    Machine,
    StepTime,
    activation_gib,
)
from servers.sim.engine import Engine, EngineConfig, Step, _Seq
from servers.sim.profiles import GENERATE

MIB = 2**20


def engine_of(config: EngineConfig) -> Engine:
    return Turns(config) if config.backend == "transformers" else Engine(config)


def room_gib(machine: Machine) -> float:
    """On each GPU, for KV caches and activations. Raises DoesNotFit in PyTorch's words."""
    gpu = machine.gpu
    free_gib = gpu.memory_gib - DRIVER_GIB - CONTEXT_GIB
    if machine.weights_gib >= free_gib:
        raise DoesNotFit(
            f"torch.OutOfMemoryError: CUDA out of memory. The weights take "
            f"{machine.weights_gib:.2f} GiB; GPU 0 has a total capacity of {gpu.memory_gib:.2f} "
            f"GiB of which {free_gib:.2f} GiB is free.")
    return free_gib - machine.weights_gib


class Turns(Engine):
    """With several GPUs each has a share of the layers, and one works at a time: they bring
    memory, and no speed."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        machine, own = config.machine, config.machine.quantization
        self._alone = replace(machine, tp=1, constants=replace(
            machine.constants, host_step_s=0.0, host_seq_s=0.0, loop_step_s=0.0,
            loop_seq_s=0.0, host_layer_s=GENERATE.gpu_layer_s))  # the GPU's part alone
        self._time = StepTime(self._alone)
        self._host_s = machine.model.layers * (own.generate_layer_s if own else GENERATE.layer_s)
        self._tok_bytes = self._alone.kv_bytes_per_tok / machine.tp
        self._room = room_gib(machine) * GIB
        self._held_tok = 0  # KV of all that live
        self._reserved = 0.0  # bytes that PyTorch has taken, and keeps
        self._live: deque[_Seq] = deque()  # the next one's turn is first
        self._last: _Seq | None = None  # whose turn it was, if it lives

    @property
    def running(self) -> int:
        return len(self._live) + len(self._waiting)

    @property
    def waiting(self) -> int:
        return 0

    @property
    def kv_usage(self) -> float:
        return self._held_tok * self._tok_bytes / self._room

    def used_gib(self, utilization: float) -> float:
        """It grows with the load, whatever utilization vLLM would be allowed."""
        machine = self.config.machine
        return DRIVER_GIB + CONTEXT_GIB + machine.weights_gib + self._reserved / GIB

    def coast(self, now_s: float, until_s: float) -> list[float]:
        return []

    def step(self, now_s: float) -> Step | None:
        """One turn. One whose request fails takes no time."""
        self._forget()
        self._live += self._waiting
        self._waiting.clear()
        if not self._live:
            return None
        step, seq = Step(now_s, 0.0, []), self._live.popleft()
        new = 1 if seq.computed else seq.total
        if (why := self._take(new)) is not None:
            step.failed[seq.request.id] = why
            self._end(seq)
            self._reserved = self._held_tok * self._tok_bytes  # the app empties the cache
            return step
        if not seq.computed:
            step.admitted.append((seq.request.id, 0))
            self.stats.prompt_tok += new
        seq.computed += new
        seq.given += 1
        self._tell(seq, step)
        self.stats.steps += 1
        self.stats.generation_tok += 1
        moved = seq.computed * (GENERATE.kv_moves if seq.given > 1 else 1)
        gpu_s = self._time.of(new, 1, new * (seq.computed - new / 2), round(moved))
        step.duration_s = max(self._host_s, gpu_s)
        step.busy_frac = gpu_s / step.duration_s
        return step

    def _tell(self, seq: _Seq, step: Step) -> None:
        """Its token; and how that looks in the engine's words."""
        step.tokens, step.events = [seq.request.id], 1
        if self._last is not seq:
            step.begun, step.fresh = [seq.request.id], 1
            step.preempted = [] if self._last is None else [self._last.request.id]
        self._last = seq
        if seq.given < seq.output:
            self._live.append(seq)
            return
        step.finished[seq.request.id] = seq.reason
        self.stats.finished[seq.reason] += 1
        self._end(seq)

    def _take(self, new: int) -> str | None:
        """Memory for so many tokens more; PyTorch's words if there is none."""
        held = self._held_tok * self._tok_bytes
        wanted = new * self._tok_bytes + activation_gib(self._alone, new, 1) * GIB
        if held + wanted > self._room:
            total_gib = self.config.machine.gpu.memory_gib
            free_mib = (self._room - held) / MIB
            return (f"CUDA out of memory. Tried to allocate {wanted / MIB:.2f} MiB. GPU 0 has a "
                    f"total capacity of {total_gib:.2f} GiB of which {free_mib:.2f} MiB is free. "
                    f"Including non-PyTorch memory, this process has "
                    f"{total_gib - free_mib / 1024 - DRIVER_GIB:.2f} GiB memory in use.")
        self._held_tok += new
        self._reserved = max(self._reserved, held + wanted)
        return None

    def _end(self, seq: _Seq) -> None:
        self._held_tok -= seq.computed
        if self._last is seq:
            self._last = None

    def _forget(self) -> None:
        """Those whose clients have left."""
        gone, self._aborted = self._aborted, set()
        if gone:
            for seq in [s for s in self._live if s.request.id in gone]:
                self._live.remove(seq)
                self._end(seq)
            self._waiting = deque(s for s in self._waiting if s.request.id not in gone)
