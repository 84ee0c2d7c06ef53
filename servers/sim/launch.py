"""The simulator as a server that is launched: a process of its own, so that it is loaded over
real sockets and does not share the generator's interpreter."""

import argparse
import contextlib
import io
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadgen.errors import ScenarioError, ServerError
from loadgen.target import Target, without_secrets
from servers.base import ServerProcess, free_port, option
from servers.sim.__main__ import engine_config, parse
from servers.sim.costs import BLOCK_TOK, DoesNotFit
from servers.sim.engine import EngineConfig
from servers.sim.faults import IN_VIRTUAL_TIME, Fault

DEFAULT_MODEL = "qwen2.5-7b"
NAMES = {"vllm": "vLLM", "transformers": "Transformers"}


def _check(options: Sequence[str]) -> argparse.Namespace:
    """Raises ScenarioError, in the simulator's own words, if it does not know an option."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(list(options))
    except SystemExit as e:
        if e.code != 0:
            words = said.getvalue().strip().rpartition("error: ")[2]
            raise ScenarioError(f"options of the simulator: {words}") from None
        raise  # --help


def _sizes(config: EngineConfig) -> dict[str, Any]:
    """The facts of an engine by which its limits are known, named as a vLLM's are."""
    bits = {"quantization": q.name} if (q := config.machine.quantization) else {}
    if config.backend == "transformers":
        return {"backend": "transformers", "max_model_len": config.max_model_len, **bits}
    return {**bits, "kv_cache_tok": config.num_blocks * BLOCK_TOK, "block_size": BLOCK_TOK,
            "max_num_seqs": config.max_num_seqs, "prefix_caching": config.prefix_caching,
            "max_num_batched_tokens": config.max_num_batched_tokens}


class SimServer:
    """`options`: what stands after `--`, as `--gpu 4090d --model qwen2.5-7b`."""

    patience_s = 60.0

    def __init__(self, options: Sequence[str], log: Path) -> None:
        self._sizes: dict[str, Any] = {}
        with contextlib.suppress(DoesNotFit, ValueError):  # then it says so itself, and ends
            self._sizes = _sizes(engine_config(_check(options)))
        host = option(options, "--host") or "127.0.0.1"
        asked = option(options, "--port")
        port = asked if asked not in (None, "0") else str(free_port())  # kept over restarts
        key = option(options, "--api-key")
        model = option(options, "--served-model-name") or option(options, "--model")
        self._command = [sys.executable, "-m", "servers.sim", *options, "--host", host,
                         "--port", port, "--parent-pid", str(os.getpid())]
        self.target = Target(f"http://{host}:{port}", model or DEFAULT_MODEL,
                              {"Authorization": f"Bearer {key}"} if key else {})
        self._log = log
        self._process: ServerProcess | None = None

    def start(self) -> Target:
        host, port = self.target.base_url.removeprefix("http://").rsplit(":", 1)
        with socket.socket() as s:  # whoever has the port must not be taken for the simulator
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((host, int(port)))
            except (OSError, ValueError, OverflowError) as e:
                raise ServerError(f"cannot listen on {host}:{port}: {e}; choose another port with "
                                  "-- --port N") from e
        self._process = ServerProcess(self._command, self._log)
        return self.target

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def alive(self) -> str | None:
        return self._process.died() if self._process else "it was not started"

    def facts(self) -> dict[str, Any]:
        tail = self._process.tail(50) if self._process else []
        said = [x for x in tail if "KV cache" in x or "concurrency" in x]
        return {"kind": "sim", "simulated": True, "command": without_secrets(self._command),
                **self._sizes, "log": [x.strip() for x in said][:4]}

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()


class VirtualSim:
    """The simulator without sockets: what it is, for whoever steps its engine in virtual time."""

    patience_s = 0.0

    def __init__(self, options: Sequence[str]) -> None:
        asked = _check(options)
        self.faults: tuple[Fault, ...] = tuple(asked.fault)
        if asked.backend == "transformers" and any(f.kind == "stall" for f in self.faults):
            raise ScenarioError("--virtual has no fault stall with --backend transformers; leave "
                                "out --virtual, or the fault")
        if wrong := [f for f in self.faults if f.kind not in IN_VIRTUAL_TIME]:
            raise ScenarioError(f"--virtual has no fault {wrong[0]}, which is told over a wire; it "
                                f"has {', '.join(IN_VIRTUAL_TIME)}")
        self._options = list(options)
        self.utilization: float = asked.gpu_memory_utilization
        try:
            self.config: EngineConfig = engine_config(asked)
        except (DoesNotFit, ValueError) as e:
            who = NAMES[asked.backend]
            raise ServerError(f"the simulated {who} refuses to start: {e}") from None
        names = asked.served_model_name or [asked.model]
        self.target = Target("virtual://simulator", names[0])

    def start(self) -> Target:
        return self.target

    def alive(self) -> str | None:
        return None

    def facts(self) -> dict[str, Any]:
        config = self.config
        machine = config.machine
        return {"kind": "sim", "simulated": True, "virtual_time": True,
                "command": ["servers.sim", *without_secrets(self._options)],
                "gpu": machine.gpu.name, "tensor_parallel_size": machine.tp,
                "model": machine.model.name, **_sizes(config),
                "constants": machine.constants.source}

    def stop(self) -> None:
        pass
