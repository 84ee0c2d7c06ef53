"""What a model costs on a GPU: memory for its KV cache, seconds for one step of a batch.

A roofline: a step takes as long as its arithmetic or its memory traffic, whichever is longer, plus
what the GPUs say to each other and what the host does between steps. The numbers are data, with
their sources (`hardware.toml`); what was measured stands against what is simulated in
`tests/benchmarks/sim_against_h200.py`.
"""

from dataclasses import dataclass

from servers.sim.profiles import (
    CONSTANTS,
    GPUS,
    MODELS,
    QUANTIZATIONS,
    Constants,
    Gpu,
    Model,
    Quantization,
)

__all__ = ["BLOCK_TOK", "GIB", "GPUS", "MODELS", "QUANTIZATIONS", "Batch", "DoesNotFit", "Machine",
           "StepTime"]

GIB = 2**30
BYTES = 2  # per weight and per KV element: bfloat16
LOADED = 1.0075  # of the weights' bytes, with buffers: 14.29 and 0.93 GiB measured for 7B and 0.5B
BLOCK_TOK = 16  # tokens per KV block, vLLM's default on GPUs


@dataclass(frozen=True, slots=True)
class Machine:
    """A model spread over `tp` GPUs of a kind. `quantization`: of its linear layers; None: 16 bits
    as all else."""

    gpu: Gpu
    model: Model
    tp: int = 1
    constants: Constants = CONSTANTS
    quantization: Quantization | None = None

    @property
    def weights_gib(self) -> float:
        """On each GPU."""
        stored, q, m = self.model.params * BYTES, self.quantization, self.model
        if q is not None:
            stored = m.body * q.weight_bytes + (m.params - m.body) * BYTES
        return stored * LOADED / GIB / self.tp

    @property
    def kv_bytes_per_tok(self) -> int:
        """On each GPU. With fewer KV heads than GPUs every GPU keeps one head whole."""
        m = self.model
        return 2 * m.layers * max(m.kv_heads // self.tp, 1) * m.head_dim * BYTES


# ---------------------------------------------------------------------------------------- memory

GRAPHS_LAYER_GIB = 0.89 / 28  # CUDA graphs of a layer: 0.89 GiB measured for 28 layers
CONTEXT_GIB = 0.22  # "non-torch memory": measured there …
CONTEXT_TP_GIB = 0.6  # … and, with NCCL's buffers, an estimate
DRIVER_GIB = 0.5  # taken before vLLM starts: 139.29 of 139.8 GiB were free
LAYER_BYTES = 12  # per hidden unit and token, at a layer's peak …
FFN_BYTES = 3 * BYTES  # … and per unit of its feed-forward part: gate, up, and their product
LOGIT_BYTES = 8  # per sequence and vocabulary entry: logits in bf16 and fp32, and the sampler's


class DoesNotFit(Exception):
    """vLLM would refuse to start; the text is its own."""


def batch_defaults(gpu: Gpu) -> tuple[int, int]:
    """(max_num_batched_tokens, max_num_seqs) that vLLM's API server takes when none are given."""
    return (8192, 1024) if gpu.big_batches else (2048, 256)


def activation_gib(machine: Machine, batched_tok: int, seqs: int) -> float:
    """Peak of the largest batch on each GPU: within a layer or while sampling, whichever is more.
    1.13 GiB measured for 8,192 tokens of Qwen2.5-7B."""
    m = machine.model
    layer = batched_tok * (FFN_BYTES * m.ffn / machine.tp + LAYER_BYTES * m.hidden)
    return max(layer, seqs * m.vocab * LOGIT_BYTES) / GIB


def context_gib(machine: Machine) -> float:
    return CONTEXT_GIB if machine.tp == 1 else CONTEXT_TP_GIB


def graphs_gib(machine: Machine) -> float:
    """CUDA graphs come on top of what `gpu_memory_utilization` allows: vLLM 0.26 captures them
    after it has sized the KV cache."""
    return GRAPHS_LAYER_GIB * machine.model.layers


def used_gib(machine: Machine, utilization: float) -> float:
    """Memory in use on each GPU once vLLM is up, as NVML shows it; it hardly changes with load."""
    gpu = machine.gpu
    return min(gpu.memory_gib, gpu.memory_gib * utilization + graphs_gib(machine))


def kv_blocks(machine: Machine, utilization: float, batched_tok: int, seqs: int,
              max_model_len: int) -> int:
    """KV blocks that vLLM would allocate. Raises DoesNotFit where it would refuse to start."""
    gpu, m = machine.gpu, machine.model
    asked_gib = gpu.memory_gib * utilization
    if m.heads % machine.tp:
        raise DoesNotFit(f"Total number of attention heads ({m.heads}) must be divisible by "
                         f"tensor parallel size ({machine.tp}).")
    if asked_gib > gpu.memory_gib - DRIVER_GIB:
        raise DoesNotFit(
            f"Free memory on device cuda:0 ({gpu.memory_gib - DRIVER_GIB:.2f}/{gpu.memory_gib:.2f} "
            f"GiB) on startup is less than desired GPU memory utilization ({utilization:g}, "
            f"{asked_gib:.2f} GiB). Decrease GPU memory utilization or reduce GPU memory used by "
            "other processes.")
    if machine.weights_gib > gpu.memory_gib - DRIVER_GIB:
        raise DoesNotFit(
            "Failed to load model - not enough GPU memory. torch.OutOfMemoryError: CUDA out of "
            f"memory. The weights take {machine.weights_gib:.2f} GiB; GPU 0 has a total capacity "
            f"of {gpu.memory_gib:.2f} GiB.")
    available_gib = (asked_gib - machine.weights_gib - context_gib(machine)
                     - activation_gib(machine, batched_tok, seqs))
    if available_gib <= 0:
        raise DoesNotFit("No available memory for the cache blocks. Try increasing "
                         "`gpu_memory_utilization` when initializing the engine.")
    blocks = int(available_gib * GIB // (machine.kv_bytes_per_tok * BLOCK_TOK))
    if blocks * BLOCK_TOK < max_model_len:
        needed_gib = max_model_len * machine.kv_bytes_per_tok / GIB
        raise DoesNotFit(
            f"To serve at least one request with the model's max seq len ({max_model_len}), "
            f"{needed_gib:.2f} GiB KV cache is needed, which is larger than the available KV cache "
            f"memory ({available_gib:.2f} GiB). Based on the available memory, the estimated "
            f"maximum model length is {blocks * BLOCK_TOK}. Try increasing "
            "`gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine.")
    return blocks


# ------------------------------------------------------------------------------------------ time

ACTIVATION_BYTES = 16  # per layer, hidden unit and token: what a layer reads and writes


@dataclass(slots=True)
class Batch:
    """What one step computes. `attended` = Σ new·(cached + new/2): query-key pairs;
    `context_tok` = Σ (cached + new): KV entries read."""

    new_tok: int = 0
    sampled: int = 0  # sequences that end the step with a token
    attended: float = 0.0
    context_tok: int = 0


class StepTime:
    """Seconds of one forward pass on all `tp` GPUs, and of the host around it; or those of the
    engine's own loop, which prepares the next step meanwhile, where a small model is quicker.
    Linear in the batch but for two bends, so its coefficients are worked out once.

    Quantised weights are read in fewer bytes, and unpacked to 16 bits before they are multiplied:
    a step of few tokens is quicker by its reading, one of many (a prompt, a large batch) slower by
    the unpacking. Both shares are unmeasured here, and worked out from Qwen's published speeds on
    an A100 with this arithmetic. Reading: from 16 to 4 bits a token of 7B took 5.4 ms less as GPTQ
    and 5.1 as AWQ, of 14B 11.4 and 10.8 ms; with 16-bit weights at 0.8 of the data sheet's
    bandwidth that leaves the 4-bit kernels 0.78, 0.72, 0.88 and 0.78 of that. Unpacking: with
    prompts of 6,144 to 30,720 tokens that gain shrank by 0.1 to 1.9 s, by which the linear layers
    of a prompt were at 0.66 to 0.87 of their 16-bit speed there: at 0.70, each multiplication
    takes 2.5e-15 s × 2 more, 0.048 of the A100's integer operations. That other cards unpack as
    fast as their integer units are is an assumption: it costs those most that multiply fastest."""

    def __init__(self, machine: Machine) -> None:
        m, gpu, tp, c = machine.model, machine.gpu, machine.tp, machine.constants
        flops = tp * gpu.flops * (c.mfu or gpu.mfu)
        q = machine.quantization
        self._flop_tok_s = 2 * m.body / flops
        if q is not None:
            self._flop_tok_s += m.body * q.unpack_ops / (tp * gpu.int_ops)
        self._flop_sample_s = 2 * m.hidden * m.vocab / flops
        self._flop_pair_s = 4 * m.layers * m.heads * m.head_dim / flops
        bandwidth = gpu.bandwidth * c.bandwidth_frac
        body = BYTES * m.body if q is None else m.body * q.weight_bytes / q.bandwidth_frac
        self._weights_s = (body + BYTES * (m.hidden * m.vocab)) / tp / bandwidth
        self._kv_s = machine.kv_bytes_per_tok / bandwidth
        self._move_tok_s = self._kv_s + ACTIVATION_BYTES * m.layers * m.hidden / bandwidth
        self._link_s = self._link_tok_s = 0.0
        if tp > 1:  # two all-reduces a layer
            sent = 2 * (tp - 1) / tp * m.hidden * BYTES
            self._link_s = 2 * m.layers * gpu.link_latency_s
            self._link_tok_s = 2 * m.layers * sent / gpu.link_bandwidth
        self._host_s = c.host_step_s + c.host_layer_s * m.layers
        self._seq_s = c.host_seq_s
        self._loop_s, self._loop_seq_s = c.loop_step_s, c.loop_seq_s

    def __call__(self, batch: Batch) -> float:
        return self.of(batch.new_tok, batch.sampled, batch.attended, batch.context_tok)

    def of(self, new_tok: int, sampled: int, attended: float, context_tok: int) -> float:
        """The same; the fields of a Batch."""
        compute_s = (self._flop_tok_s * new_tok + self._flop_sample_s * sampled
                     + self._flop_pair_s * attended)
        memory_s = self._weights_s + self._kv_s * context_tok + self._move_tok_s * new_tok
        return max(max(memory_s, compute_s) + self._link_s + self._link_tok_s * new_tok
                   + self._host_s + self._seq_s * sampled,
                   self._loop_s + self._loop_seq_s * sampled)
