"""A pynvml that answers from a file of tests/data/nvml/record.py, sample after sample; with ways to
go wrong: `broken` (function → NVML's error code), `lose` (a GPU at a sample)."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml

DATA = Path(__file__).parent / "data" / "nvml"


class Struct:
    def __init__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)


class Nvml:
    """`gpus`: how many of the recorded one."""

    NVMLError = pynvml.NVMLError

    def __init__(self, name: str = "h200.json", gpus: int | None = None,
                 broken: dict[str, int] | None = None, lose: tuple[int, int] | None = None) -> None:
        self.data = json.loads((DATA / name).read_text(encoding="utf-8"))
        self.gpus = self.data["gpus"] if gpus is None else self.data["gpus"][:1] * gpus
        self.broken, self.lose = broken or {}, lose
        self.asked: list[str] = []
        self.at = [0] * len(self.gpus)  # sample

    def __getattr__(self, name: str) -> Any:
        if name.startswith("NVML_"):
            return getattr(pynvml, name)
        if not name.startswith("nvml"):
            raise AttributeError(name)
        answer: Callable[..., Any] = lambda *a: self._answer(name, *a)  # noqa: E731
        if name in self.broken and self.broken[name] < 0:  # not in this release
            raise AttributeError(name)
        return answer

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        uuid: str = self.gpus[handle]["once"]["nvmlDeviceGetUUID"]["ok"]
        return uuid.replace("GPU-", f"GPU-{handle}")

    def _answer(self, name: str, handle: int | None = None, *more: Any) -> Any:
        self.asked.append(name)
        if name in self.broken:
            raise pynvml.NVMLError(self.broken[name])
        if handle is None:
            return self._value(self.data["system"][name])
        if name == "nvmlDeviceGetMemoryInfo":  # each sample begins with it
            self.at[handle] += 1
        if self.lose and handle == self.lose[0] and self.at[handle] >= self.lose[1]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        if name == "nvmlDeviceGetClockInfo":
            name += ":sm" if more == (pynvml.NVML_CLOCK_SM,) else ":memory"
        gpu = self.gpus[handle]
        samples = gpu["samples"]
        sample = samples[min(max(self.at[handle] - 1, 0), len(samples) - 1)]
        return self._value(sample[name] if name in sample else gpu["once"][name])

    def _value(self, answer: dict[str, Any]) -> Any:
        if "error" in answer:
            raise pynvml.NVMLError(answer["error"])
        if "missing" in answer:
            raise AttributeError(answer["missing"])
        value = answer["ok"]
        if isinstance(value, list):
            return [Struct(x) if isinstance(x, dict) else x for x in value]
        return Struct(value) if isinstance(value, dict) else value


if __name__ == "__main__":  # the sampler, on a recorded GPU: python -m tests.nvml
    from loadgen.telemetry import nvml as sampler

    sys.modules["pynvml"] = Nvml()  # type: ignore[assignment]
    sampler.main()
