"""Is this host fit to generate load? Each check says what it saw, and what to do if it is bad."""

import asyncio
import importlib.util
import os
import resource
import time
from collections.abc import Iterator
from typing import Literal

import aiohttp
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadgen import calibration, headroom, metrics, rungs, selftest
from loadgen.calibration import PORTS
from loadgen.dial import why_not
from loadgen.rungs import Rung
from loadgen.selftest import Ladder

State = Literal["good", "fair", "bad"]
_COLOURS = {"good": "green", "fair": "yellow", "bad": "red"}


class Check(Struct, frozen=True):
    """One look at the host."""

    what: str
    state: State
    saw: str
    remedy: str = ""


def show(console: Console, base_url: str | None) -> int:
    """Prints all checks; exit code 0, or 3 if a measurement from here could not be valid."""
    checks = [*host_checks(), *timer_checks(), calibration_check(), *gpu_checks()]
    if base_url:
        checks += asyncio.run(server_checks(base_url))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "check", "saw", "try"):
        table.add_column(name)
    for c in checks:
        table.add_row(Text(c.state, style=_COLOURS[c.state]), c.what, c.saw, c.remedy)
    console.print(table)
    return 3 if any(c.state == "bad" for c in checks) else 0


def host_checks() -> Iterator[Check]:
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    yield Check("cores", "fair" if cores < 4 else "good", f"{cores}, load {load:.1f}",
                "a server on the same host will share them" if cores < 4 else "")
    if load > 0.7 * cores:
        yield Check("load", "fair", f"{load:.1f} on {cores} cores", "wait until the host is idle")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    yield Check("open files", "good" if hard >= 8192 else "bad" if hard < 256 else "fair",
                f"at most {hard}: as many connections, less a few",
                "" if hard >= 8192 else "ulimit -Hn 65536")
    if PORTS.exists():
        low, high = map(int, PORTS.read_text(encoding="ascii").split())
        room = high - low
        yield Check("ports", "good" if room > 20_000 else "fair", f"{room} to one server",
                    "" if room > 20_000 else "sysctl net.ipv4.ip_local_port_range='10240 65535'")


def timer_checks(n: int = 200) -> Iterator[Check]:
    """How late this process comes round to a sleep of 5 ms."""
    late = []
    for _ in range(n):
        before = time.monotonic()
        time.sleep(0.005)
        late.append(time.monotonic() - before - 0.005)
    p90 = metrics.quantile(late, 0.9)
    assert p90 is not None
    worst = max(late)
    state: State = "good" if p90.value < 0.002 and worst < 0.05 else "fair"
    yield Check("timer", state, f"{1000 * p90.value:.2f} ms late at p90, {1000 * worst:.1f} ms at "
                f"worst of {n}", "" if state == "good" else "a quieter host: its stalls are in "
                "each stamp")


def calibration_check() -> Check:
    found, remedy = calibration.load(), "loadgen doctor --calibrate"
    if (c := found.calibration) is not None:
        return Check("calibration", "good", f"{c.when}: {headroom.figures(c)}")
    return Check("calibration", "fair", found.ignored or "none yet", remedy)


def calibrate(console: Console, ladder: Ladder | None = None) -> None:
    """Measures what one generator process of this host can do, shows it, and keeps it. Raises
    GeneratorError if that was not possible, StoreError if it cannot be kept."""
    with console.status("calibrating") as status:
        found = asyncio.run(selftest.measure(ladder or Ladder(), lambda what: status.update(
            f"calibrating: {what}")))
    kept = calibration.save(found.calibration)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("load", no_wrap=True)
    for name in ("per second", "core", "µs/event", "error p99", "server late p99"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("limit", no_wrap=True)
    for rung in found.rungs:
        table.add_row(*_cells(rung))
    for line in (table, "", rungs.sentence(found.calibration)):
        console.print(line, highlight=False, soft_wrap=isinstance(line, str))
    console.print(f"Kept in {kept}; runs on this host are held against it.", style="dim",
                  highlight=False, soft_wrap=True)


def _cells(rung: Rung) -> list[str]:
    def number(value: float | None, unit: str, spec: str = ".2f") -> str:
        return "–" if value is None else f"{value:{spec}}{unit}"
    core = None if rung.core_frac is None else 100 * rung.core_frac
    return [f"{rung.asked} {'streams' if rung.kind == 'streams' else 'starts/s'}",
            f"{rung.rate_per_s:,.0f}", number(core, " %", ".0f"),
            number(rung.us_per_event, "", ".1f"), number(rung.error_p99_ms, " ms"),
            number(rung.server_late_p99_ms, " ms"), rungs.limit_of(rung) or ""]


def gpu_checks() -> Iterator[Check]:
    """GPUs of this host, as far as NVML tells. None is no fault: the simulator needs none."""
    if importlib.util.find_spec("pynvml") is None:
        yield Check("GPU", "fair", "nvidia-ml-py is not installed", "pip install nvidia-ml-py")
        return
    import pynvml  # noqa: PLC0415  (a host without a driver must not pay for it)

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as e:
        yield Check("GPU", "good", f"none here ({e}); the simulator needs none")
        return
    for i in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(i)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        used = memory.used / memory.total
        yield Check(f"GPU {i}", "good" if used < 0.05 else "fair",
                    f"{pynvml.nvmlDeviceGetName(handle)}, {used:.0%} of "
                    f"{memory.total / 2**30:.0f} GiB used",
                    "" if used < 0.05 else "somebody else may be using it")
    pynvml.nvmlShutdown()


async def server_checks(base_url: str) -> list[Check]:
    """What a running server answers to."""
    found = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        for path, use in (("/v1/models", "names its models"), ("/health", "says when it died"),
                          ("/metrics", "shows queue, KV cache, preemptions"),
                          ("/tokenize", "prompts of exact length")):
            began = time.monotonic()
            try:
                async with session.get(base_url + path) as answer:
                    there = answer.status in (200, 401, 405)
                    saw = f"{answer.status} in {1000 * (time.monotonic() - began):.1f} ms"
            except (aiohttp.ClientError, TimeoutError, OSError) as e:
                there, saw = False, why_not(e)
            bad: State = "bad" if path == "/v1/models" else "fair"
            found.append(Check(path, "good" if there else bad, saw,
                               use if there else f"missing: {use}"))
    return found
