"""Samples the server's /metrics (and the simulator's GPU) twice a second while legs run.

Names of several servers and versions are brought to ours; a server without /metrics is asked a
few times and then left alone. A hung endpoint holds nothing up: each scrape has its deadline.
"""

import asyncio
import json
import math
import re
import time
from collections.abc import Callable, Mapping

import aiohttp

from loadgen.dial import context_of, why_not
from loadgen.store import Row
from loadgen.target import Target

PERIOD_S = 0.5
ONCE_S = 1.0
MOST_BYTES = 4 * 2**20  # of one answer: a vLLM's are 54 KB
TRIES = 3  # without an answer, before a source that never gave one is left alone

NAMES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_frac",
    "vllm:gpu_cache_usage_perc": "kv_frac",  # before 0.11
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prompt_tokens_total": "prompt_tok",
    "vllm:generation_tokens_total": "output_tok",
    "vllm:request_success_total": "finished",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:gpu_prefix_cache_queries_total": "prefix_queries",
    "vllm:gpu_prefix_cache_hits_total": "prefix_hits",
    # the following are after their documentation, not recorded: as it is not said what exactly they
    # count, tokens have other names, and are not held against the records
    "sglang:num_running_reqs": "running",
    "sglang:num_queue_reqs": "waiting",
    "sglang:token_usage": "kv_frac",
    "sglang:num_retracted_requests_total": "preemptions",
    "sglang:prompt_tokens_total": "told_prompt_tok",
    "sglang:generation_tokens_total": "told_output_tok",
    "tgi_batch_current_size": "running",
    "tgi_queue_size": "waiting",
    "tgi_request_input_length_sum": "told_prompt_tok",
    "tgi_request_generated_tokens_sum": "told_output_tok",
    "llamacpp:requests_processing": "running",
    "llamacpp:requests_deferred": "waiting",
    "llamacpp:kv_cache_usage_ratio": "kv_frac",
    "llamacpp:prompt_tokens_total": "told_prompt_tok",
    "llamacpp:tokens_predicted_total": "told_output_tok",
    "sim:steps_total": "sim_steps",
    "sim:late_steps_total": "sim_late_steps",
}
HISTOGRAMS = {  # of seconds per request: their sum and count give a mean over any time
    "vllm:request_queue_time_seconds": "queue",
    "vllm:request_prefill_time_seconds": "prefill",
    "vllm:request_decode_time_seconds": "decode",
    "sglang:queue_time_seconds": "queue",
    "tgi_request_queue_duration": "queue",
}
NAMES |= {f"{theirs}_{part}": f"{ours}_s_{part}" for theirs, ours in HISTOGRAMS.items()
          for part in ("sum", "count")}
CACHE = "vllm:cache_config_info"  # its labels say how large the KV cache is
_WANTED = re.compile("^(?:" + "|".join(map(re.escape, [*NAMES, CACHE])) + r")[ {].*$",
                     re.MULTILINE)


def rows_of(text: str, t_ns: int) -> list[Row]:
    """The rows that a Prometheus text holds of what a sweep reads. Requests that were aborted are
    no finished ones: whether a server counts those differs."""
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415 (0.1 s)

    wanted = "\n".join(_WANTED.findall(text)) + "\n"
    samples = [s for family in text_string_to_metric_families(wanted) for s in family.samples]
    rows = [Row("server", t_ns, NAMES[s.name], float(s.value), dict(s.labels))
            for s in samples if s.name in NAMES and s.labels.get("finished_reason") != "abort"]
    return rows + [Row("server", t_ns, "kv_cache_tok", tok, {"engine": s.labels.get("engine", "")})
                   for s in samples if s.name == CACHE and (tok := _cache_tok(s.labels))]


def _cache_tok(labels: Mapping[str, str]) -> float | None:
    """Tokens that an engine's KV cache holds: as it says, or blocks by their size."""
    told = [labels.get(x, "") for x in ("kv_cache_size_tokens", "num_gpu_blocks", "block_size")]
    tok, blocks, size = (int(x) if x.isdecimal() else 0 for x in told)
    return float(tok or blocks * size) or None


def gpu_rows_of(answer: list[dict[str, float]], t_ns: int) -> list[Row]:
    """Rows of the simulator's /sim/gpu, named as NVML's are."""
    return [Row("gpu", t_ns, name, float(gpu[key]) * scale, {"index": str(int(gpu["index"]))})
            for gpu in answer for key, name, scale in (
                ("memory_used_bytes", "memory_used_bytes", 1),
                ("memory_total_bytes", "memory_total_bytes", 1),
                ("utilization_gpu", "util_frac", 0.01), ("power_w", "power_w", 1)) if key in gpu]


async def once(target: Target) -> list[Row]:
    """One sample of /metrics, now; none if it does not come within `ONCE_S`."""
    try:
        async with asyncio.timeout(ONCE_S), _session(target, ONCE_S) as session:
            return await _scrape(session, target.base_url + "/metrics")
    except TimeoutError:
        return []


def _session(target: Target, total_s: float) -> aiohttp.ClientSession:
    headers = {k: v for k, v in target.headers.items() if k.lower() == "authorization"}
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=total_s), headers=headers,
                                 proxy=target.proxy, connector=_connector(target))


def _connector(target: Target) -> aiohttp.TCPConnector:
    return aiohttp.TCPConnector(ssl=context_of(target.trust))


async def watch(target: Target, keep: Callable[[list[Row]], None], simulated: bool) -> None:
    """Until cancelled: `keep` gets each sample's rows."""
    left = {"/metrics": float(TRIES), "/sim/gpu": TRIES if simulated else 0.0}
    async with _session(target, 2.0) as session:
        while any(left.values()):
            began = time.monotonic()
            for path in [p for p, tries in left.items() if tries]:
                rows = await _scrape(session, target.base_url + path)
                left[path] = math.inf if rows else left[path] - 1
                keep(rows)
            await asyncio.sleep(max(0.05, PERIOD_S - (time.monotonic() - began)))


async def _scrape(session: aiohttp.ClientSession, url: str) -> list[Row]:
    began_ns = time.monotonic_ns()
    try:
        async with session.get(url) as answer:
            if answer.status != 200:
                return []
            now_ns = time.monotonic_ns()
            text = await _text(answer)
            if url.endswith("/sim/gpu"):
                said = json.loads(text)
                return gpu_rows_of(said["gpus"] if isinstance(said, dict) else said, now_ns)
            rows = rows_of(text, now_ns)
            took_s = (time.monotonic_ns() - began_ns) / 1e9
            return [*rows, Row("server", now_ns, "scrape_s", took_s)] if rows else []
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError):
        return []


async def _text(answer: aiohttp.ClientResponse) -> str:
    """Raises ValueError where it is larger than anything that is worth its reading."""
    data = bytearray()
    async for piece in answer.content.iter_chunked(2**16):
        data += piece
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
    return data.decode(errors="replace")


async def answers(target: Target) -> bool | None:
    """Whether /health says that all is well; None: it does not answer, or there is none."""
    try:
        async with (_session(target, ONCE_S) as session,
                    session.get(target.base_url + "/health") as answer):
            return None if answer.status == 404 else answer.status < 500
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


async def forget_prefixes(target: Target) -> bool:
    """Empties the server's prefix cache. False: it does not offer that (a vLLM does in its
    development mode only)."""
    try:
        async with (_session(target, 2.0) as session,
                    session.post(target.base_url + "/reset_prefix_cache") as answer):
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


async def is_healthy(target: Target) -> str | None:
    """None if the server answers; else what is wrong. A server without /health (404) is judged
    by answering at all."""
    try:
        async with (aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=5.0), proxy=target.proxy,
                connector=_connector(target)) as session,
                    session.get(target.base_url + "/health") as answer):
            return f"/health says {answer.status}" if answer.status >= 500 else None
    except TimeoutError:
        return None  # slow is not dead: the requests' own deadlines decide
    except (aiohttp.ClientError, OSError) as e:
        return f"it cannot be reached any more: {why_not(e)}"
