"""Samples this host's GPUs through NVML. A process of its own (`python -m loadgen.telemetry.nvml`):
a call that hangs in the driver cannot be killed, and must hold up nobody else.

    stdout  a JSON line per sample: {"t_ns": …, "rows": [[name, value, labels], …]}, and one
            {"says": "…"} for each thing that cannot be watched, once

It ends with its stdin. What a GPU does not tell is left out, what it lost is not asked again.
"""

import json
import os
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

PERIOD_S, SLOWEST_S = 0.2, 0.5  # between samples: 5 Hz, or 2 where that would cost too much
COST_FRAC = 0.01  # of a core, that sampling may take
SLOW_S = 1.0  # between looks at what changes slowly
PATIENCE = 10  # errors in a row that may pass, before a field is left alone

Value = tuple[str, float, dict[str, str]]

# bits of nvmlDeviceGetCurrentClocksEventReasons that name why clocks are lower than they could be
IDLE, POWER_CAP = 0x1, 0x4


def _memory(nvml: Any, handle: Any) -> Iterator[Value]:
    m = nvml.nvmlDeviceGetMemoryInfo(handle)
    yield "memory_used_bytes", m.used, {}
    yield "memory_total_bytes", m.total, {}


def _busy(nvml: Any, handle: Any) -> Iterator[Value]:
    """Share of the last moments (1/6 s to 1 s) in which a kernel ran; and memory was accessed."""
    u = nvml.nvmlDeviceGetUtilizationRates(handle)
    yield "util_frac", u.gpu / 100, {}
    yield "memory_busy_frac", u.memory / 100, {}


def _power(nvml: Any, handle: Any) -> Iterator[Value]:
    yield "power_w", nvml.nvmlDeviceGetPowerUsage(handle) / 1000, {}


def _power_limit(nvml: Any, handle: Any) -> Iterator[Value]:
    yield "power_limit_w", nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000, {}


def _clock(kind: str) -> Callable[[Any, Any], Iterator[Value]]:
    def ask(nvml: Any, handle: Any) -> Iterator[Value]:
        code = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}[kind]
        yield f"{kind}_clock_mhz", nvml.nvmlDeviceGetClockInfo(handle, code), {}
    return ask


def _temperature(nvml: Any, handle: Any) -> Iterator[Value]:
    yield ("temperature_c",
           nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU), {})


def _throttle(nvml: Any, handle: Any) -> Iterator[Value]:
    ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or (
        nvml.nvmlDeviceGetCurrentClocksThrottleReasons)  # before driver 535
    yield "throttle_bits", ask(handle), {}


def _processes(nvml: Any, handle: Any) -> Iterator[Value]:
    """Inside a container there may be none, or without their memory."""
    for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
        if p.usedGpuMemory is not None:
            yield "process_memory_bytes", p.usedGpuMemory, {"pid": str(p.pid)}


FAST = {"memory": _memory, "utilisation": _busy, "power": _power}
SLOW = {"power limit": _power_limit, "SM clock": _clock("sm"), "memory clock": _clock("memory"),
        "temperature": _temperature, "throttle reasons": _throttle,
        "memory of each process": _processes}
OF_A_PART = ("memory", "memory of each process")  # what NVML tells of a MIG instance


@dataclass
class Device:
    """A GPU, or a MIG instance of one. `wanted`: what it is asked for still."""

    name: str  # in messages
    handle: Any
    labels: dict[str, str]
    info: dict[str, str]
    wanted: set[str] = field(default_factory=lambda: {*FAST, *SLOW})
    errors: dict[str, int] = field(default_factory=dict)  # in a row


class Gpus:
    """The GPUs that are to be watched. Raises the library's NVMLError where none can be."""

    def __init__(self, nvml: Any, visible: str | None) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self.says: list[str] = []
        self.devices = [d for index, handle in self._chosen(visible)
                        for d in self._parts(index, handle)]
        self._slow_ns = 0

    def info(self) -> list[Value]:
        """What they are, once."""
        return [("info", 1.0, {**d.labels, **d.info}) for d in self.devices]

    def sample(self, now_ns: int) -> list[Value]:
        slow = now_ns - self._slow_ns >= SLOW_S * 1e9
        if slow:
            self._slow_ns = now_ns
        found: list[Value] = []
        for device in list(self.devices):
            unable: list[str] = []
            for what, ask in (FAST | SLOW if slow else FAST).items():
                if what in device.wanted and device in self.devices:
                    found += self._ask(device, what, ask, unable)
            if unable:
                self.says.append(f"{device.name} does not tell: {', '.join(unable)}")
        return found

    # ---------------------------------------------------------------------------------- inside

    def _chosen(self, visible: str | None) -> Iterator[tuple[str, Any]]:
        """(index, handle) of each GPU that CUDA_VISIBLE_DEVICES lets a program see; of all where
        it is not set. As CUDA does: the first entry that names none ends the list."""
        nvml = self._nvml
        count = nvml.nvmlDeviceGetCount()
        if visible is None:
            words = [str(i) for i in range(count)]
        else:
            words = [w.strip() for w in visible.split(",")]
        for word in words:
            if word.startswith("MIG-"):
                yield word, nvml.nvmlDeviceGetHandleByUUID(word)
            elif word.isdecimal() and int(word) < count:
                yield word, nvml.nvmlDeviceGetHandleByIndex(int(word))
            elif word.startswith("GPU-") and (found := self._by_uuid(word, count)):
                yield found
            else:
                return

    def _by_uuid(self, start: str, count: int) -> tuple[str, Any] | None:
        for i in range(count):
            handle = self._nvml.nvmlDeviceGetHandleByIndex(i)
            if _text(self._nvml.nvmlDeviceGetUUID(handle)).startswith(start):
                return str(i), handle
        return None

    def _parts(self, index: str, handle: Any) -> Iterator[Device]:
        """The GPU; of one that MIG divides, its instances."""
        info = self._info(handle)
        name = f"GPU {index} ({info.get('name', '?')})"
        parts = list(self._instances(handle))
        if index.startswith("MIG-") or parts:
            self.says.append(f"{name} is divided by MIG: NVML tells the memory of a part, "
                             "not how busy it is")
        if not parts:
            device = Device(name, handle, {"index": index}, info)
            if index.startswith("MIG-"):
                device.wanted = set(OF_A_PART)
            yield device
        for i, part in parts:
            yield Device(f"{name}, instance {i}", part, {"index": f"{index}.{i}"},
                         self._info(part), set(OF_A_PART))

    def _instances(self, handle: Any) -> Iterator[tuple[int, Any]]:
        nvml = self._nvml
        try:
            if nvml.nvmlDeviceGetMigMode(handle)[0] != 1:
                return
            most = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
        except (nvml.NVMLError, AttributeError):
            return
        for i in range(most):
            try:
                yield i, nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i)
            except nvml.NVMLError:  # there is no such instance
                continue

    def _info(self, handle: Any) -> dict[str, str]:
        nvml, found = self._nvml, {}
        for key, ask in (("name", lambda: nvml.nvmlDeviceGetName(handle)),
                         ("uuid", lambda: nvml.nvmlDeviceGetUUID(handle)),
                         ("driver", nvml.nvmlSystemGetDriverVersion)):
            try:
                found[key] = _text(ask())
            except nvml.NVMLError:
                continue
        return found

    def _ask(self, device: Device, what: str, ask: Callable[[Any, Any], Iterator[Value]],
             unable: list[str]) -> list[Value]:
        nvml = self._nvml
        try:
            found = [(name, float(value), {**device.labels, **labels})
                     for name, value, labels in ask(nvml, device.handle)]
        except AttributeError:  # an older nvidia-ml-py
            device.wanted.discard(what)
            unable.append(f"{what} (not known to this nvidia-ml-py)")
            return []
        except nvml.NVMLError as e:
            self._failed(device, what, e, unable)
            return []
        device.errors.pop(what, None)
        return found

    def _failed(self, device: Device, what: str, error: Any, unable: list[str]) -> None:
        nvml = self._nvml
        if error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_GPU_NOT_FOUND,
                           nvml.NVML_ERROR_RESET_REQUIRED, nvml.NVML_ERROR_UNINITIALIZED):
            self.devices.remove(device)
            self.says.append(f"{device.name} is not watched any more: {error}")
            return
        device.errors[what] = device.errors.get(what, 0) + 1
        for_good = error.value in (
            nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_NO_PERMISSION,
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT)
        if for_good or device.errors[what] >= PATIENCE:
            device.wanted.discard(what)
            unable.append(f"{what} ({error})")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)  # bytes before release 12


def pause_s(took_s: float) -> float:
    """Until the next sample, after one that took so much CPU."""
    return min(SLOWEST_S, max(PERIOD_S, took_s / COST_FRAC))


def _tell(**what: Any) -> None:
    os.write(1, json.dumps(what, separators=(",", ":")).encode() + b"\n")


def _open(visible: str | None) -> Gpus | None:
    """Says why there is none."""
    try:
        import pynvml  # noqa: PLC0415  (it may not be there)
    except ImportError:
        _tell(says="no GPU is watched: nvidia-ml-py is not installed (pip install nvidia-ml-py)")
        return None
    try:
        gpus = Gpus(pynvml, visible)
    except pynvml.NVMLError as e:
        _tell(says=f"no GPU is watched: NVML says {e}")
        return None
    if not gpus.devices:
        none = ("there is none" if visible is None else
                f"CUDA_VISIBLE_DEVICES={visible!r} names none")
        _tell(says=f"no GPU is watched: {none}")
        return None
    return gpus


def main() -> None:
    gpus = _open(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if gpus is None:
        return
    _tell(t_ns=time.monotonic_ns(), rows=gpus.info())
    began_s, used_s, said_s = time.monotonic(), time.process_time(), 0.0
    wait_s = 0.0
    while not select.select([0], [], [], wait_s)[0]:  # its end is all that comes on stdin
        cpu_s, now_ns = time.process_time(), time.monotonic_ns()
        rows = gpus.sample(now_ns)
        if time.monotonic() - said_s > 10 * SLOW_S:  # its own cost, since the start
            said_s = time.monotonic()
            if said_s - began_s > SLOW_S:
                rows.append(("sampler_cpu_frac", (time.process_time() - used_s)
                             / (said_s - began_s), {}))
        if rows:
            _tell(t_ns=now_ns, rows=rows)
        for text in gpus.says:
            _tell(says=text)
        gpus.says.clear()
        if not gpus.devices:
            return
        wait_s = pause_s(time.process_time() - cpu_s)


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(0)
