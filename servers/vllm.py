"""A vLLM that is launched: `vllm serve MODEL`, or the same by other words."""

import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadgen.errors import ScenarioError
from loadgen.target import HIDDEN, SECRET_FLAG, Target, without_secrets
from servers import gpus, vllm_log
from servers.base import option
from servers.launched import LaunchedServer, program, without

_HERE = ("127.0.0.1", "::1", "localhost")
_REFUSED = {
    "--uds": "it is loaded over TCP: give --host and --port",
    "--ssl-keyfile": "it is loaded over plain http; sweep a server with TLS by --base-url",
    "--ssl-certfile": "it is loaded over plain http; sweep a server with TLS by --base-url",
    "--headless": "a node without an API server answers nobody",
    "--grpc": "it is loaded over HTTP",
    "--model": "name the model once, by --model before `--`",
    "--help": "ask vLLM itself: vllm serve --help", "-h": "ask vLLM itself: vllm serve --help",
}


class VllmServer(LaunchedServer):
    """`instead`: words that stand in for `vllm serve`. Of several API keys the first is used."""

    kind = "vllm"

    def __init__(self, model: str | None, options: Sequence[str], log: Path,
                 instead: Sequence[str] = ()) -> None:
        self._given = list(options)
        super().__init__(model, _checked(options), log, instead)

    def words(self, instead: list[str]) -> list[str]:
        plain = self.options
        key = option(plain, "--api-key") or os.environ.get("VLLM_API_KEY")
        self.env = {"VLLM_API_KEY": key} if key else {}  # neither `ps` nor a log shows it there
        if self.host in _HERE:  # its prefix cache may then be reset
            self.env["VLLM_SERVER_DEV_MODE"] = os.environ.get("VLLM_SERVER_DEV_MODE", "1")
        self.target = Target(self.target.base_url,
                             option(plain, "--served-model-name") or self.model,
                             {"Authorization": f"Bearer {key}"} if key else {})
        return [*_words(instead), self.model, "--host", self.host, "--port", str(self.port),
                *without(self._given, "--host", "--port", "--api-key", "--api_key")]

    def learned(self, log: list[str]) -> dict[str, Any]:
        """Of the log and /metrics."""
        if not any("Application startup complete" in x for x in log):
            return {}
        config = vllm_log.model_config(self.model)
        quantized = {"quantization": config["quant_method"]} if "quant_method" in config else {}
        told = {**vllm_log.asked(self.options), **vllm_log.facts(log)}
        return {**quantized, **told, **_cache_config(self.target.base_url), **gpus.facts(),
                "env": _environment(), "model_config": config}


def _words(command: Sequence[str]) -> list[str]:
    """What stands in for `vllm serve`, with the program's path."""
    if not command:
        beside = Path(sys.executable).with_name("vllm")
        found = shutil.which("vllm") or (str(beside) if os.access(beside, os.X_OK) else None)
        if found is None:
            raise ScenarioError(
                f"there is no vllm on PATH, nor in {beside.parent}: pip install vllm, or say how "
                "it is started, as --server-cmd \"/path/to/vllm serve\"")
        return [found, "serve"]
    return [program(command[0]), *command[1:]]


def _checked(options: Sequence[str]) -> list[str]:
    """The options with vLLM's `--like_this` as `--like-this`. Raises ScenarioError."""
    plain = []
    for word in options:
        flag, eq, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        if flag in _REFUSED:
            raise ScenarioError(f"vLLM's {flag}: {_REFUSED[flag]}")
        plain.append(flag + eq + value)
    if plain and not plain[0].startswith("-"):
        raise ScenarioError(f"options of vLLM begin with {plain[0]!r}: {_REFUSED['--model']}")
    return plain


def _environment() -> dict[str, str]:
    """Variables that change what vLLM does; secrets hidden."""
    wanted = re.compile(r"(VLLM|CUDA|NCCL|OMP|TORCH|PYTORCH|HF_HUB)_\w+")
    return {k: HIDDEN if SECRET_FLAG.fullmatch(f"-{k}") else without_secrets([v])[0]
            for k, v in sorted(os.environ.items()) if wanted.fullmatch(k)}


def _cache_config(base_url: str) -> dict[str, Any]:
    """What only /metrics says: the block size that vLLM chose, and how many there are, in all
    engines together: of several, each one's line says the sum (as recorded of 0.32 with -dp 2)."""
    try:
        with urllib.request.urlopen(f"{base_url}/metrics", timeout=2) as answer:
            text = answer.read().decode(errors="replace")
    except (urllib.error.URLError, OSError, ValueError):
        return {}
    engines = [dict(re.findall(r'(\w+)="([^"]*)"', line)) for line in re.findall(
        r"^vllm:cache_config_info\{(.*)\}", text, re.MULTILINE)]
    found = {}
    for key, name in (("block_size", "block_size"), ("num_gpu_blocks", "kv_cache_blocks")):
        said = [int(x[key]) for x in engines if x.get(key, "").isdecimal()]
        if said:
            found[name] = max(said)
    return found
