"""Keeps what `loadgen.telemetry.nvml` samples: rows of source "gpu". Nothing here waits for a
driver: the sampler is another process, which is killed at the end and not waited for."""

import asyncio
import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from loadgen.store import Row

SILENT_S = 5.0  # without a sample: the driver hangs, or the host does
COMMAND = (sys.executable, "-m", "loadgen.telemetry.nvml")


class _Line(Struct):
    """What the sampler prints."""

    t_ns: int = 0
    rows: list[tuple[str, float, dict[str, str]]] = []
    says: str | None = None


_decode = msgspec.json.Decoder(_Line).decode


def is_here(base_url: str) -> bool:
    """Whether a server at this address runs on this host, as far as an address can tell: behind
    127.0.0.1 there may be a tunnel."""
    host = urlsplit(base_url).hostname or ""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host) is not None


async def watch(keep: Callable[[list[Row]], None], say: Callable[[str], None],
                command: Sequence[str] = COMMAND, silent_s: float = SILENT_S) -> None:
    """Until cancelled, or until the sampler ends: `keep` gets each sample's rows, `say` what
    cannot be watched, once each."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL, limit=2**22, process_group=0)
    except OSError as e:
        say(f"no GPU is watched: its sampler cannot be started: {e}")
        return
    assert process.stdout is not None
    hung = False
    try:
        while True:
            try:
                async with asyncio.timeout(silent_s):
                    line = await process.stdout.readline()
            except TimeoutError:
                if not hung:
                    say(f"the GPUs are not watched: NVML has not answered for {silent_s:g} s")
                hung = True
                continue
            if not line:
                await _ended(process)  # to signal it now would be to reap it behind asyncio's back
                return
            found = _decode(line)
            if found.says is not None:
                say(found.says)
            if found.rows:
                keep([Row("gpu", found.t_ns, *row) for row in found.rows])
    except msgspec.DecodeError as e:
        say(f"the GPUs are not watched any more: their sampler said what nobody reads ({e})")
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await _ended(process)


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Or not: who hangs in the driver ends when the driver lets it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            await process.wait()
