"""What a vLLM says of itself when it starts: in its log, and in the model's config.json."""

import ast
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from servers.base import option
from servers.death import plain

_OLD_BLOCK_TOK = 16  # vLLM's default on a GPU

_CONFIG = {  # name in "Initializing a V1 LLM engine (v0.32.0) with config: …" → name of the fact
    "dtype": "dtype", "max_seq_len": "max_model_len", "quantization": "quantization",
    "kv_cache_dtype": "kv_cache_dtype", "tensor_parallel_size": "tensor_parallel",
    "pipeline_parallel_size": "pipeline_parallel", "data_parallel_size": "data_parallel",
    "enforce_eager": "enforce_eager", "device_config": "device",
    "enable_prefix_caching": "prefix_caching", "enable_chunked_prefill": "chunked_prefill"}
_ARGUMENTS = ("block_size", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization")
_KV = re.compile(r"KV cache size: ([\d,]+) tokens")
_MOST = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")
_BLOCKS = re.compile(r"# \w+ blocks: (\d+)")  # before 0.9: blocks, not tokens
_ENGINE = re.compile(r"^\((EngineCore\S* pid=\d+)\)")
_FLAGS = {  # flags whose value the facts name, as vLLM spells them long and short
    "tensor_parallel": ("--tensor-parallel-size", "-tp"),
    "pipeline_parallel": ("--pipeline-parallel-size", "-pp"),
    "data_parallel": ("--data-parallel-size", "-dp"),
    "quantization": ("--quantization", "-q"), "load_format": ("--load-format",)}
_MODEL = ("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
          "max_position_embeddings", "num_experts", "num_experts_per_tok", "n_routed_experts",
          "sliding_window", "dtype", "torch_dtype")


def asked(options: Sequence[str]) -> dict[str, Any]:
    """What the flags say; `options` with dashes."""
    found: dict[str, Any] = {}
    for name, flags in _FLAGS.items():
        if (value := option(options, *flags)) is not None:
            found[name] = int(value) if value.isdecimal() else value
    return found


def facts(log: Sequence[str]) -> dict[str, Any]:
    """What the log of a start says; facts it does not say are left out. `kv_cache_tok`, and
    `max_concurrency`, how many requests of max_model_len tokens it holds, are those of all
    data-parallel engines together."""
    found: dict[str, Any] = {}
    sizes = _Sizes()
    for raw in log:
        line = plain(raw)
        if match := re.search(r"█.*version (\d\S*)|LLM engine \(v(\d[^)]*)\)"
                              r"|API server version (\d\S*)", line):
            found.setdefault("version", match[1] or match[2] or match[3])
        if "LLM engine (v" in line:
            found |= _configured(line)
        elif line.startswith("non-default args: "):
            found |= _arguments(line.removeprefix("non-default args: "))
        elif "args: Namespace(" in line:
            found |= _namespace(line)
        elif match := re.search(r"max_num_batched_tokens=(\d+)", line):
            found["max_num_batched_tokens"] = int(match[1])
        if match := _MOST.search(line):
            found["max_model_len"] = _whole(match[1])
        sizes.look(raw, line)
    return found | sizes.facts(found)


class _Sizes:
    """KV caches by engine. One may be told several times, by each of an engine's workers; the
    smallest is what vLLM uses."""

    def __init__(self) -> None:
        self._tok: dict[str, list[float]] = {}
        self._blocks: dict[str, list[float]] = {}
        self._most: dict[str, list[float]] = {}

    def look(self, raw: str, line: str) -> None:
        engine = _ENGINE.match(raw)
        who = engine[1] if engine else ""
        for kept, match, group in ((self._tok, _KV.search(line), 1),
                                   (self._blocks, _BLOCKS.search(line), 1),
                                   (self._most, _MOST.search(line), 2)):
            if match:
                kept.setdefault(who, []).append(float(match[group].replace(",", "")))

    def facts(self, known: dict[str, Any]) -> dict[str, Any]:
        """Of all engines. Those of versions that do not name their engine are alike."""
        found: dict[str, Any] = {}
        copies = known.get("data_parallel", 1)
        tok, blocks, most = (sum(map(min, kept.values())) * (copies if set(kept) == {""} else 1)
                             for kept in (self._tok, self._blocks, self._most))
        if blocks:
            found["kv_cache_blocks"] = int(blocks)
            tok = tok or blocks * known.get("block_size", _OLD_BLOCK_TOK)
        if tok:
            found["kv_cache_tok"] = int(tok)
        if most:
            found["max_concurrency"] = round(most, 2)
        engines = len(set(self._tok) - {""})
        return found | ({"data_parallel": engines} if engines > 1 else {})


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


def _namespace(line: str) -> dict[str, Any]:
    """Facts of all arguments, which versions before 0.9 wrote into their log."""
    found: dict[str, Any] = {}
    for name in _ARGUMENTS:
        if match := re.search(rf"[(, ]{name}=([\d.]+)[,)]", line):
            found[name] = float(match[1]) if "." in match[1] else int(match[1])
    return found


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
