"""The null server as a child process, which never outlives whoever started it."""

import asyncio
import os
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from loadgen.errors import GeneratorError
from loadgen.target import Target
from servers.null import log
from servers.null.log import Truth

ANSWER_S = 30.0  # to start, or to write a log; then it is dead or the host is


class NullServer:
    """Use as `async with NullServer(…) as server`. Raises GeneratorError if it does not serve."""

    def __init__(self, ttft_s: float, itl_s: float) -> None:
        self._words = ["--ttft-ms", f"{1000 * ttft_s:g}", "--itl-ms", f"{1000 * itl_s:g}"]

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "servers.null", *self._words, "--keep-log", "--parent-pid",
            str(os.getpid()), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            process_group=0)
        try:
            self._port = int((await self._says("PORT")).split()[1])
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None,
                        tb: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(2):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def target(self) -> Target:
        return Target(f"http://127.0.0.1:{self._port}", "tiny")

    async def log(self) -> Truth:
        """What was logged since the last call. Answers under way break off."""
        with tempfile.TemporaryDirectory(prefix="loadgen-") as folder:
            path = Path(folder) / "null.bin"
            assert self._process.stdin is not None
            self._process.stdin.write(f"{path}\n".encode())
            await self._says("SAVED")
            return log.load(path)

    async def _says(self, word: str) -> str:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(ANSWER_S):
                line = (await self._process.stdout.readline()).decode()
        except TimeoutError:
            line = ""
        if not line.startswith(word):
            ended = self._process.returncode
            how = "does not answer" if ended is None else f"ended with code {ended}"
            raise GeneratorError(f"the null server {how}: it said {line.strip()!r} where {word} "
                                 "was expected; try `python -m servers.null`")
        return line
