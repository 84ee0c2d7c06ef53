"""A process that loadgen starts beside its own: lines come on stdin; it dies with its parent."""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Never

from loadgen.net import new_loop


def run(serve: Callable[[asyncio.StreamReader], Coroutine[Any, Any, None]]) -> None:
    """Runs `serve` on the lines of stdin, to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to translate
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_on_stdin(serve))


async def _on_stdin(serve: Callable[[asyncio.StreamReader], Coroutine[Any, Any, None]]) -> None:
    lines = asyncio.StreamReader(limit=2**26)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    await serve(lines)


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL for this process when its parent ends (Linux), even by SIGKILL."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the call above
        _gone()


def _gone() -> Never:
    os._exit(70)
