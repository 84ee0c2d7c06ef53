"""Samples the server's /metrics (and the simulator's GPU) twice a second while legs run.

Names of several servers and versions are brought to ours; a server without /metrics is asked a
few times and then left alone. A hung endpoint holds nothing up: each scrape has its deadline.
"""

import asyncio
import math
import re
import time
from collections.abc import Callable

import aiohttp

from loadgen.dial import context_of
from loadgen.store import Row
from loadgen.target import Target

PERIOD_S = 0.5
ONCE_S = 1.0
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
    "sim:steps_total": "sim_steps",
    "sim:late_steps_total": "sim_late_steps",
}
_WANTED = re.compile("^(?:" + "|".join(map(re.escape, NAMES)) + r")[ {].*$", re.MULTILINE)


def rows_of(text: str, t_ns: int) -> list[Row]:
    """The rows that a Prometheus text holds of what a sweep reads. Requests that were aborted are
    no finished ones: whether a server counts those differs."""
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415 (0.1 s)

    wanted = "\n".join(_WANTED.findall(text)) + "\n"
    return [Row("server", t_ns, NAMES[s.name], float(s.value), dict(s.labels))
            for family in text_string_to_metric_families(wanted) for s in family.samples
            if s.name in NAMES and s.labels.get("finished_reason") != "abort"]


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
    try:
        async with session.get(url) as answer:
            if answer.status != 200:
                return []
            now_ns = time.monotonic_ns()
            if url.endswith("/sim/gpu"):
                said = await answer.json()
                return gpu_rows_of(said["gpus"] if isinstance(said, dict) else said, now_ns)
            return rows_of(await answer.text(), now_ns)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError):
        return []


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
        return f"it cannot be reached any more: {e}"
