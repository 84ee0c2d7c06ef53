"""What a manifest says: the plan, and the circumstances of the measurement."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from loadgen import scenario
from loadgen.judge import Criteria
from loadgen.prompts import Ratio
from loadgen.scenario import Scenario
from loadgen.store import SCHEMA, Manifest, Worker
from loadgen.target import Target, without_secrets

_VERSIONS = ("loadgen", "aiohttp", "numpy", "msgspec", "locust", "requests", "gevent", "vllm")


def manifest(out: Path, command: Sequence[str], mix: Scenario, seed: int, criteria: Criteria,
             target: Target, server: dict[str, Any], ratios: dict[str, Ratio],
             processes: int = 1, workers: Sequence[Worker] = ()) -> Manifest:
    """`command`: all words that were typed; secrets in it are hidden here. `server`: its facts."""
    return Manifest(
        schema=SCHEMA, run=out.name,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=without_secrets(command), scenario=scenario.to_plain(mix), seed=seed,
        target_frac=criteria.target, confidence=criteria.confidence,
        base_url=target.base_url, model=target.model, server=server,
        ratios=msgspec.to_builtins(ratios), versions=_versions(), host=_host(),
        processes=processes, calibration=criteria.calibration, workers=list(workers))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _host() -> dict[str, object]:
    return {"cores": os.cpu_count(), "machine": platform.machine(), "system": platform.platform(),
            "load": os.getloadavg()[0], "clock_ns": time.get_clock_info("monotonic").resolution}
