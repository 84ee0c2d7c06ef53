"""A vLLM that is launched: `vllm serve MODEL`, or the same by other words."""

import os
import re
import shutil
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadgen.errors import ScenarioError, ServerError
from loadgen.target import HIDDEN, SECRET_FLAG, Target, without_secrets
from servers import vllm_log
from servers.base import ServerProcess, free_port, option

START_S = 1800.0  # weights come over networks, graphs are captured; a death is seen at once
_REFUSED = {
    "--uds": "it is loaded over TCP: give --host and --port",
    "--ssl-keyfile": "it is loaded over plain http; sweep a server with TLS by --base-url",
    "--ssl-certfile": "it is loaded over plain http; sweep a server with TLS by --base-url",
    "--headless": "a node without an API server answers nobody",
    "--grpc": "it is loaded over HTTP",
    "--model": "name the model once, by --model before `--`",
    "--help": "ask vLLM itself: vllm serve --help", "-h": "ask vLLM itself: vllm serve --help",
}


class VllmServer:
    """`model`: the folder or name that is served; `options`: what stands after `--`; `command`:
    words that stand in for `vllm serve`. Raises ScenarioError for what cannot work. Of several
    API keys the first is used."""

    patience_s = START_S

    def __init__(self, model: str | None, options: Sequence[str], log: Path,
                 command: Sequence[str] | None = None) -> None:
        if not model:
            raise ScenarioError("--server vllm: give --model, the folder or name that it serves")
        plain = _checked(options)
        host = option(plain, "--host") or "127.0.0.1"
        asked = option(plain, "--port")
        self._port = int(asked) if asked not in (None, "0") else free_port()  # kept over restarts
        self._host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        key = option(plain, "--api-key") or os.environ.get("VLLM_API_KEY")
        self.env = {"VLLM_API_KEY": key} if key else {}
        self.command = [*_words(command), model, "--host", host, "--port", str(self._port),
                        *_without(options, "--host", "--port", "--api-key", "--api_key")]
        at = f"[{self._host}]" if ":" in self._host else self._host
        self.target = Target(
            f"http://{at}:{self._port}", option(plain, "--served-model-name") or model,
            {"Authorization": f"Bearer {key}"} if key else {})
        self._model, self._log = model, log
        self._process: ServerProcess | None = None
        self._facts: dict[str, Any] = {}

    def start(self) -> Target:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        with socket.socket(family) as s:  # whoever has the port must not be taken for this vLLM
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((self._host, self._port))
            except OSError as e:
                raise ServerError(f"cannot listen on {self._host}:{self._port}: {e.strerror}; "
                                  "choose another port with -- --port N, or none") from e
        self._process = ServerProcess(self.command, self._log, self.env, guarded=True)
        self._facts = {}
        return self.target

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def alive(self) -> str | None:
        return self._process.died() if self._process else "it was not started"

    def facts(self) -> dict[str, Any]:
        """Of the log and /metrics: once, when it serves."""
        known = {"kind": "vllm", "simulated": False, "command": without_secrets(self.command)}
        if self._process is None:
            return known
        if not self._facts:
            log = self._process.head()
            if not any("Application startup complete" in x for x in log):
                return known
            self._facts = {**vllm_log.facts(log), **_cache_config(self.target.base_url),
                           "model": self._model, "env": _environment(),
                           "model_config": vllm_log.model_config(self._model)}
        return known | self._facts

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()


def _words(command: Sequence[str] | None) -> list[str]:
    """What stands in for `vllm serve`, with the program's path."""
    if not command:
        beside = Path(sys.executable).with_name("vllm")
        found = shutil.which("vllm") or (str(beside) if os.access(beside, os.X_OK) else None)
        if found is None:
            raise ScenarioError(
                f"there is no vllm on PATH, nor in {beside.parent}: pip install vllm, or say how "
                "it is started, as --server-cmd \"/path/to/vllm serve\"")
        return [found, "serve"]
    found = shutil.which(command[0])
    if found is None:
        raise ScenarioError(f"--server-cmd: there is no program {command[0]!r}")
    return [found, *command[1:]]


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
    port = option(plain, "--port")
    if port is not None and not (port.isdecimal() and int(port) < 65536):
        raise ScenarioError(f"vLLM's --port {port}: a number from 0 (any free one) to 65535")
    return plain


def _without(options: Sequence[str], *names: str) -> list[str]:
    """The options less these and their values. (A key goes by the environment: neither `ps` nor a
    log shows it there.)"""
    left, skip = [], False
    for word in options:
        if word.startswith("-"):
            flag, eq, _ = word.partition("=")
            skip = flag in names and not eq
            if flag in names:
                continue
        elif skip:
            continue
        left.append(word)
    return left


def _environment() -> dict[str, str]:
    """Variables that change what vLLM does; secrets hidden."""
    wanted = re.compile(r"(VLLM|CUDA|NCCL|OMP|TORCH|PYTORCH|HF_HUB)_\w+")
    return {k: HIDDEN if SECRET_FLAG.fullmatch(f"-{k}") else without_secrets([v])[0]
            for k, v in sorted(os.environ.items()) if wanted.fullmatch(k)}


def _cache_config(base_url: str) -> dict[str, Any]:
    """What only /metrics says: the block size that vLLM chose, and how many there are."""
    try:
        with urllib.request.urlopen(f"{base_url}/metrics", timeout=2) as answer:
            text = answer.read().decode(errors="replace")
    except (urllib.error.URLError, OSError, ValueError):
        return {}
    info = re.search(r"^vllm:cache_config_info\{(.*)\}", text, re.MULTILINE)
    said = dict(re.findall(r'(\w+)="([^"]*)"', info[1] if info else ""))
    return {name: int(said[key]) for key, name in (
        ("block_size", "block_size"), ("num_gpu_blocks", "kv_cache_blocks"))
        if said.get(key, "").isdecimal()}
