"""What a vLLM says of itself when it starts: in its log, and in the model's config.json."""

import ast
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from servers.death import plain

_CONFIG = {  # name in "Initializing a V1 LLM engine (v0.32.0) with config: …" → name of the fact
    "dtype": "dtype", "max_seq_len": "max_model_len", "quantization": "quantization",
    "kv_cache_dtype": "kv_cache_dtype", "tensor_parallel_size": "tensor_parallel",
    "pipeline_parallel_size": "pipeline_parallel", "data_parallel_size": "data_parallel",
    "enforce_eager": "enforce_eager", "device_config": "device",
    "enable_prefix_caching": "prefix_caching", "enable_chunked_prefill": "chunked_prefill"}
_ARGUMENTS = ("block_size", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization")
_KV = re.compile(r"KV cache size: ([\d,]+) tokens(?:, Maximum concurrency for ([\d,]+) tokens per "
                 r"request: ([\d.]+)x)?")
_KV_OLD = re.compile(r"^Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")
_MODEL = ("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
          "max_position_embeddings", "num_experts", "num_experts_per_tok", "n_routed_experts",
          "sliding_window", "dtype", "torch_dtype")


def facts(log: Sequence[str]) -> dict[str, Any]:
    """What the log of a start says; facts it does not say are left out. `max_concurrency`: how
    many requests of max_model_len tokens the KV cache holds."""
    found: dict[str, Any] = {}
    for line in map(plain, log):
        if match := re.search(r"█.*version (\d\S*)|LLM engine \(v(\d[^)]*)\)", line):
            found.setdefault("version", match[1] or match[2])
        if "LLM engine (v" in line:
            found |= _configured(line)
        elif line.startswith("non-default args: "):
            found |= _arguments(line.removeprefix("non-default args: "))
        elif match := re.search(r"max_num_batched_tokens=(\d+)", line):
            found["max_num_batched_tokens"] = int(match[1])
        elif match := _KV.search(line):
            found["kv_cache_tok"] = _whole(match[1])
            if match[2]:
                found |= {"max_model_len": _whole(match[2]), "max_concurrency": float(match[3])}
        elif match := _KV_OLD.match(line):
            found |= {"max_model_len": _whole(match[1]), "max_concurrency": float(match[2])}
    return found


def _whole(text: str) -> int:
    return int(text.replace(",", ""))


def _configured(line: str) -> dict[str, Any]:
    """Facts of `…, dtype=torch.bfloat16, max_seq_len=2048, …`."""
    found: dict[str, Any] = {}
    for key, name in _CONFIG.items():
        if (match := re.search(rf"[ (]{key}=([^\s,()]+)", line)) and match[1] != "None":
            text = match[1].removeprefix("torch.")
            found[name] = (text == "True" if text in ("True", "False")
                           else int(text) if text.isdigit() else text)
    return found


def _arguments(text: str) -> dict[str, Any]:
    """Facts of the arguments that differ from vLLM's defaults; none if they are cut or hold what
    is no literal."""
    try:
        given = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {}
    return {name: given[name] for name in _ARGUMENTS if name in given}


def model_config(model: str) -> dict[str, Any]:
    """The shape of a model from its config.json: of its folder, or of the hub's cache where it
    lies already; {} if there is none."""
    folders = [Path(model), *_cached(model)]
    for path in (f / "config.json" for f in folders):
        try:
            given = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        found = {key: given[key] for key in _MODEL if given.get(key) is not None}
        quantized = given.get("quantization_config")
        if isinstance(quantized, dict) and "quant_method" in quantized:
            found["quant_method"] = quantized["quant_method"]
        return found
    return {}


def _cached(model: str) -> list[Path]:
    """Folders of a hub's model in the local cache, the newest first."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    found = (hub / f"models--{model.replace('/', '--')}" / "snapshots").glob("*")
    return sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)
