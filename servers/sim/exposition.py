"""/metrics as vLLM writes it: its families in its order, with its labels; then the simulator's."""

from collections.abc import Iterator, Mapping, Sequence

from servers.sim.costs import BLOCK_TOK
from servers.sim.engine import Engine
from servers.sim.families import FAMILIES
from servers.sim.metrics import Histogram, Pacing, Tally

Samples = Sequence[tuple[Mapping[str, str], float]]
_REASONS = ("stop", "length", "abort", "error", "repetition")
_CACHE = {  # labels of cache_config_info that the simulator has no say in
    "_block_size_resolved": "True", "cache_dtype": "auto", "cache_hit_alignment_tokens": "None",
    "enable_mamba_shared_prefix_checkpoint": "False", "hash_block_size": "None",
    "is_attention_free": "False", "kv_cache_dtype_skip_layers": "[]", "kv_cache_layout": "None",
    "kv_cache_memory_bytes": "None", "kv_offloading_backend": "native",
    "kv_offloading_size": "None", "kv_sharing_fast_prefill": "False", "mamba_block_size": "None",
    "mamba_cache_dtype": "auto", "mamba_cache_mode": "none", "mamba_page_size_padded": "None",
    "mamba_ssm_cache_dtype": "float32", "num_cpu_blocks": "None",
    "num_gpu_blocks_override": "None", "prefix_cache_retention_interval": "0",
    "prefix_caching_hash_algo": "sha256", "prefix_match_unit": "None", "replayssm_buffer_len": "16",
    "skip_page_size_padded": "None", "sliding_window": "None", "swa_bounded_replay": "True",
    "use_kda_recoverssm": "False", "use_replayssm": "False", "user_specified_block_size": "False"}


def render(engine: Engine, model: str, tally: Tally, pacing: Pacing, utilization: float) -> str:
    return "\n".join([*_vllm(engine, model, tally, utilization), *_sim(engine, pacing)]) + "\n"


def of_simulator(engine: Engine, pacing: Pacing) -> str:
    """The last part of it alone."""
    return "\n".join(_sim(engine, pacing)) + "\n"


def _vllm(engine: Engine, model: str, tally: Tally, utilization: float) -> Iterator[str]:
    samples = _samples(engine, tally, utilization)
    for name, kind, told in FAMILIES:
        who = {"engine": "0", "model_name": model}
        if name.startswith(("admission", "tool_call")):  # of the API server, not of an engine
            del who["engine"]
        if name == "cache_config_info":
            del who["model_name"]
        yield f"# HELP vllm:{name} {told}"
        yield f"# TYPE vllm:{name} {kind}"
        found = samples[name]
        if isinstance(found, Histogram):
            yield from _histogram(f"vllm:{name}", who, found)
        else:
            for labels, value in found:
                yield _sample(f"vllm:{name}", {**who, **labels}, value)
        if kind != "gauge":
            created = f"vllm:{name.removesuffix('_total') if kind == 'counter' else name}_created"
            yield f"# HELP {created} {told}"
            yield f"# TYPE {created} gauge"
            for labels, _ in [({}, 0.0)] if isinstance(found, Histogram) else found:
                yield _sample(created, {**who, **labels}, tally.created)


def _samples(engine: Engine, tally: Tally, utilization: float) -> dict[str, Samples | Histogram]:
    stats = engine.stats
    none: Samples = [({}, 0.0)]
    computed = tally.prompt_tok - tally.cached_tok
    return {
        "estimated_flops_per_gpu_total": none, "estimated_read_bytes_per_gpu_total": none,
        "estimated_write_bytes_per_gpu_total": none,
        "num_requests_running": [({}, engine.running)],
        "num_requests_waiting": [({}, engine.waiting)],
        "num_requests_waiting_by_reason": _by("reason", capacity=engine.waiting, deferred=0),
        "engine_sleep_state": _by("sleep_state", awake=1, weights_offloaded=0, discard_all=0),
        "kv_cache_usage_perc": [({}, engine.kv_usage)],
        "prefix_cache_queries_total": [({}, stats.prefix_queries)],
        "prefix_cache_hits_total": [({}, stats.prefix_hits)],
        "external_prefix_cache_queries_total": none, "external_prefix_cache_hits_total": none,
        "mm_cache_queries_total": none, "mm_cache_hits_total": none,
        "num_preemptions_total": [({}, stats.preemptions)],
        "prompt_tokens_total": [({}, tally.prompt_tok)],
        "prompt_tokens_by_source_total": _by("source", local_compute=computed,
                                             local_cache_hit=tally.cached_tok,
                                             external_kv_transfer=0),
        "prompt_tokens_cached_total": [({}, tally.cached_tok)],
        "prompt_tokens_cached_by_source_total": _by("source", device=tally.cached_tok, host=0,
                                                    p2p=0, disk=0, external_unspecified=0),
        "generation_tokens_total": [({}, tally.generation_tok)],
        "request_success_total": [({"finished_reason": r}, tally.reasons[r]) for r in _REASONS],
        "admission_rejections_total": _by("reason", max_num_queued_reqs=tally.rejected,
                                          max_num_queued_tokens=0),
        "cache_config_info": [(_cache(engine, utilization), 1)],
        "tool_call_parser_invocations_total": [
            ({"mode": mode, "outcome": outcome, "request_type": kind},
             tally.calls[mode, outcome] if kind == "chat_completions" else 0)
            for mode in ("streaming", "non_streaming") for outcome in ("tool_call", "no_tool_call")
            for kind in ("chat_completions", "responses", "other")],
        **tally.histograms}


def _by(label: str, **values: float) -> Samples:
    return [({label: name}, value) for name, value in values.items()]


def _cache(engine: Engine, utilization: float) -> dict[str, str]:
    config = engine.config
    tokens = config.num_blocks * BLOCK_TOK
    return {**_CACHE, "block_size": str(BLOCK_TOK),
            "effective_attention_block_size": str(BLOCK_TOK),
            "enable_prefix_caching": str(config.prefix_caching),
            "gpu_memory_utilization": str(utilization),
            "kv_cache_max_concurrency": str(tokens / config.max_model_len),
            "kv_cache_size_tokens": str(tokens), "num_gpu_blocks": str(config.num_blocks)}


def _sim(engine: Engine, pacing: Pacing) -> Iterator[str]:
    machine = engine.config.machine
    for name, kind, labels, value in (
            ("sim:info", "gauge", {"gpu": machine.gpu.name, "model": machine.model.name,
                                   "tensor_parallel_size": str(machine.tp)}, 1.0),
            ("sim:lag_seconds", "gauge", {"kind": "worst"}, pacing.worst_s),
            ("sim:late_steps_frac", "gauge", {}, pacing.late_frac()),
            ("sim:steps_total", "counter", {}, pacing.steps),
            ("sim:late_steps_total", "counter", {}, pacing.late)):
        yield f"# TYPE {name} {kind}"
        yield _sample(name, labels, value)


def _histogram(name: str, labels: Mapping[str, str], h: Histogram) -> Iterator[str]:
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
