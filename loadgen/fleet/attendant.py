"""The attendant's process (`loadgen.attend`) as seen from Locust's."""

import os
import subprocess
import sys
from collections.abc import Callable

import gevent
import gevent.lock
import msgspec
from msgspec import Struct

from loadgen import scenario
from loadgen.attend import Answer, Ask, Setup
from loadgen.errors import GeneratorError, ServerError
from loadgen.scenario import Scenario
from loadgen.target import Target

_encode = msgspec.json.Encoder(enc_hook=scenario.enc_hook).encode
_decode = msgspec.json.Decoder(Answer).decode


class Attendant:
    """One child process; questions wait for each other."""

    def __init__(self, mix: Scenario, target: Target, seed: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadgen.attend"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, process_group=0)
        self._lock = gevent.lock.Semaphore()
        self._write(Setup(scenario.to_plain(mix), target, seed, os.getpid()))

    def ask(self, ask: Ask, alive: Callable[[], str | None] = lambda: None) -> Answer:
        """Waits for the answer, while `alive()` is None. Raises ServerError with its words."""
        with self._lock:
            asking = gevent.spawn(self._exchange, ask)
            while not asking.ready():
                asking.join(timeout=0.2)
                if (died := alive()) is not None:
                    asking.kill(block=False)
                    self.close()
                    raise ServerError(f"the server died before it could serve: {died}")
            answer: Answer = asking.get()
            return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _exchange(self, ask: Ask) -> Answer:
        assert self._process.stdout is not None
        self._write(ask)
        line = self._process.stdout.readline()
        if not line:
            raise GeneratorError(f"the attendant ended with code {self._process.wait()}")
        return _decode(line)

    def _write(self, message: Struct) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(_encode(message) + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as e:
            raise GeneratorError("the attendant's process is gone") from e
