"""What a model costs on a GPU: memory for its KV cache, seconds for one step of a batch.

A roofline: a step takes as long as its arithmetic or its memory traffic, whichever is longer, plus
what the GPUs say to each other and what the host does between steps. Checked against vLLM 0.26 on
an H200 with Qwen2.5-7B (ITL 4.75 / 4.95 / 5.99 ms at 1 / 8 / 64 streams, prefill 43,600 tok/s).
"""

from dataclasses import dataclass

GIB = 2**30
BYTES = 2  # per weight and per KV element: bfloat16
BLOCK_TOK = 16  # tokens per KV block, vLLM's default on GPUs


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. `memory_gib` is what CUDA reports; `link_*` is an all-reduce with its peers."""

    name: str
    bandwidth: float  # bytes/s
    flops: float  # dense bf16 with fp32 accumulation, per second
    mfu: float  # share of it that a prefill reaches
    memory_gib: float
    link_bandwidth: float  # bytes/s on the bus
    link_latency_s: float
    idle_w: float
    max_w: float
    big_batches: bool = False  # vLLM's larger defaults: ≥ 70 GiB and not an A100


# Bandwidth, FLOPs and power: the makers' data sheets (4090D: 14,592 of the 4090's 16,384 cores).
# Memory: cudaMemGetInfo as vLLM logs it. Links: PCIe 4 without peer-to-peer (host bounce, ~12 GB/s
# and 30 µs) or NVLink (~300 GB/s of all-reduce bandwidth, 8 µs); both are estimates.
# MFU: 0.58 is 43,600 tok/s measured on the H200; 0.55 and, for cards that throttle, 0.50 are
# estimates (published ones lie between 0.45 and 0.6).
GPUS = {
    "3090": Gpu("NVIDIA GeForce RTX 3090", 0.936e12, 71.2e12, 0.50, 23.6, 12e9, 30e-6, 25, 350),
    "4090d": Gpu("NVIDIA GeForce RTX 4090 D", 1.008e12, 147.1e12, 0.50, 23.6, 12e9, 30e-6, 20, 425),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", 2.039e12, 312e12, 0.55, 79.2, 300e9, 8e-6, 60, 400),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 3.35e12, 989.5e12, 0.58, 79.2, 300e9, 8e-6, 70, 700, True),
    "h200": Gpu("NVIDIA H200", 4.8e12, 989.5e12, 0.58, 139.8, 300e9, 8e-6, 75, 700, True),
}


@dataclass(frozen=True, slots=True)
class Model:
    """A dense decoder's shape, as its config.json has it."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    params: float  # all weights; the embedding counts once where it is tied to the output layer
    tied: bool
    max_len: int

    @property
    def body(self) -> float:
        """Weights that every token passes: all but the embedding and the output layer."""
        return self.params - self.vocab * self.hidden * (1 if self.tied else 2)


MODELS = {
    "qwen2.5-0.5b": Model("Qwen/Qwen2.5-0.5B-Instruct", 24, 896, 14, 2, 64, 4864, 151936,
                          0.494e9, True, 32768),
    "qwen2.5-1.5b": Model("Qwen/Qwen2.5-1.5B-Instruct", 28, 1536, 12, 2, 128, 8960, 151936,
                          1.544e9, True, 32768),
    "qwen2.5-3b": Model("Qwen/Qwen2.5-3B-Instruct", 36, 2048, 16, 2, 128, 11008, 151936,
                        3.086e9, True, 32768),
    "qwen2.5-7b": Model("Qwen/Qwen2.5-7B-Instruct", 28, 3584, 28, 4, 128, 18944, 152064,
                        7.615e9, False, 32768),
    "qwen2.5-14b": Model("Qwen/Qwen2.5-14B-Instruct", 48, 5120, 40, 8, 128, 13824, 152064,
                         14.77e9, False, 32768),
    "llama-3-8b": Model("meta-llama/Meta-Llama-3-8B-Instruct", 32, 4096, 32, 8, 128, 14336, 128256,
                        8.030e9, False, 8192),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """A model spread over `tp` GPUs of a kind."""

    gpu: Gpu
    model: Model
    tp: int = 1

    @property
    def weights_gib(self) -> float:
        """On each GPU."""
        return self.model.params * BYTES / GIB / self.tp

    @property
    def kv_bytes_per_tok(self) -> int:
        """On each GPU. With fewer KV heads than GPUs every GPU keeps one head whole."""
        m = self.model
        return 2 * m.layers * max(m.kv_heads // self.tp, 1) * m.head_dim * BYTES


# ---------------------------------------------------------------------------------------- memory

GRAPHS_GIB = 0.5  # captured CUDA graphs (0.89 measured on an H200 with its larger batches)
CONTEXT_GIB = 0.15  # what CUDA itself takes (0.22 measured there) ...
CONTEXT_TP_GIB = 0.6  # ... and with NCCL's buffers
LOGIT_BYTES = 10  # per sequence and vocabulary entry: logits in bf16 and fp32, and the sampler's


class DoesNotFit(Exception):
    """vLLM would refuse to start; the text is its own."""


def batch_defaults(gpu: Gpu) -> tuple[int, int]:
    """(max_num_batched_tokens, max_num_seqs) that vLLM's API server takes when none are given."""
    return (8192, 1024) if gpu.big_batches else (2048, 256)


def overhead_gib(machine: Machine, batched_tok: int, seqs: int) -> float:
    """Memory of each GPU that is neither weights nor KV cache: activations at the largest batch,
    CUDA graphs and context."""
    m = machine.model
    activation = batched_tok * (3 * m.ffn * BYTES + 12 * m.hidden) + seqs * m.vocab * LOGIT_BYTES
    context = CONTEXT_GIB if machine.tp == 1 else CONTEXT_TP_GIB
    return activation / GIB + GRAPHS_GIB + context


def kv_blocks(machine: Machine, utilization: float, batched_tok: int, seqs: int,
              max_model_len: int) -> int:
    """KV blocks that vLLM would allocate. Raises DoesNotFit where it would refuse to start."""
    gpu, m = machine.gpu, machine.model
    if m.heads % machine.tp:
        raise DoesNotFit(f"Total number of attention heads ({m.heads}) must be divisible by "
                         f"tensor parallel size ({machine.tp}).")
    if machine.weights_gib > gpu.memory_gib - CONTEXT_GIB:
        raise DoesNotFit(
            "Failed to load model - not enough GPU memory. torch.OutOfMemoryError: CUDA out of "
            f"memory. The weights take {machine.weights_gib:.2f} GiB; GPU 0 has a total capacity "
            f"of {gpu.memory_gib:.2f} GiB.")
    available_gib = (gpu.memory_gib * utilization - machine.weights_gib
                     - overhead_gib(machine, batched_tok, seqs))
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

BANDWIDTH_SHARE = 0.80  # of the data sheet's: 4.75 ms for the H200's 14.1 GB of weights
ACTIVATION_BYTES = 16  # per layer, hidden unit and token: what a layer reads and writes
HOST_STEP_S = 0.6e-3  # schedule, build the batch, sample, hand over
HOST_LAYER_S = 12e-6  # launches of a layer's kernels that CUDA graphs do not hide
HOST_SEQ_S = 5e-6  # per sampled sequence
FRONT_TOKEN_S = 52e-6  # per token in the one API process (detokenise, JSON, SSE): its ceiling
FRONT_REQUEST_S = 8e-3  # per request before the engine sees it (HTTP, tokenise): latency only


@dataclass(slots=True)
class Batch:
    """What one step computes. `attended` = Σ new·(cached + new/2): query-key pairs;
    `context_tok` = Σ (cached + new): KV entries read."""

    new_tok: int = 0
    sampled: int = 0  # sequences that end the step with a token
    attended: float = 0.0
    context_tok: int = 0


def step_time_s(machine: Machine, batch: Batch) -> float:
    """One forward pass of the batch on all `tp` GPUs, and the host's time around it."""
    m, gpu, tp = machine.model, machine.gpu, machine.tp
    flops = (2 * m.body * batch.new_tok + 2 * m.hidden * m.vocab * batch.sampled
             + 4 * m.layers * m.heads * m.head_dim * batch.attended)
    moved = (BYTES * (m.body + m.hidden * m.vocab) / tp
             + machine.kv_bytes_per_tok * (batch.context_tok + batch.new_tok)
             + ACTIVATION_BYTES * m.layers * m.hidden * batch.new_tok)
    device_s = max(flops / (tp * gpu.flops * gpu.mfu), moved / (gpu.bandwidth * BANDWIDTH_SHARE))
    if tp > 1:  # two all-reduces a layer
        sent = 2 * (tp - 1) / tp * batch.new_tok * m.hidden * BYTES
        device_s += 2 * m.layers * (sent / gpu.link_bandwidth + gpu.link_latency_s)
    host_s = HOST_STEP_S + HOST_LAYER_S * m.layers + HOST_SEQ_S * batch.sampled
    return max(device_s + host_s, FRONT_TOKEN_S * batch.sampled)
