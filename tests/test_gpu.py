"""GPUs through NVML: what is sampled, what is said where something is not to be had, and that no
driver holds anything up."""

import asyncio
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pynvml
import pytest

from loadgen.leg import Window
from loadgen.store import Row, RunFolder
from loadgen.telemetry import gpu, nvml
from loadgen.telemetry.nvml import Gpus
from loadgen.telemetry.signs import GpuSigns, gpu_signs_of, gpus, loaded_bytes
from loadgen.watch import Watcher
from tests.nvml import Nvml
from tests.synthetic import manifest

S, GIB = 1_000_000_000, 2**30
LIE = [sys.executable, "-m", "tests.nvml"]


def sampled(lib: Any, n: int = 3, visible: str | None = None) -> tuple[Gpus, list[nvml.Value]]:
    """n samples, a second apart."""
    watched = Gpus(lib, visible)
    return watched, [v for i in range(1, n + 1) for v in watched.sample(i * S)]


def named(values: list[nvml.Value], name: str) -> list[float]:
    return [v for n, v, _ in values if n == name]


# ----------------------------------------------------------------------------------- the sampler


def test_a_recorded_gpu_tells_memory_utilisation_clocks_power_heat_and_why_it_is_slow() -> None:
    _, values = sampled(Nvml(), n=12)  # the load began with the sixth sample
    assert named(values, "memory_used_bytes")[-1] == pytest.approx(2.213 * GIB, rel=1e-3)
    assert named(values, "util_frac") == [0.01, *[0.0] * 5, *[1.0] * 6]
    assert named(values, "power_w")[-3:] == [707.167, 693.267, 693.007]
    assert named(values, "sm_clock_mhz")[4:8] == [1980, 1980, 1470, 1470]
    assert named(values, "memory_clock_mhz")[-1] == 3201
    assert named(values, "temperature_c")[-1] == 63
    assert named(values, "throttle_bits") == [*[0] * 6, *[4] * 6]  # its power cap
    [per_pid] = {v[2]["pid"] for v in values if v[0] == "process_memory_bytes"}
    assert per_pid == "440"


def test_what_changes_slowly_is_asked_once_a_second() -> None:
    lib = Nvml()
    watched = Gpus(lib, None)
    for i in range(11):
        watched.sample(S + i * S // 5)  # 2 s at 5 Hz
    assert lib.asked.count("nvmlDeviceGetMemoryInfo") == 11
    assert lib.asked.count("nvmlDeviceGetTemperature") == 3


@pytest.mark.parametrize(("function", "field", "what"), [
    ("nvmlDeviceGetUtilizationRates", "util_frac", "utilisation"),
    ("nvmlDeviceGetPowerUsage", "power_w", "power"),
    ("nvmlDeviceGetComputeRunningProcesses", "process_memory_bytes", "memory of each process")])
@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_NOT_SUPPORTED,
                                   pynvml.NVML_ERROR_NO_PERMISSION])
def test_what_a_gpu_does_not_tell_is_said_once_and_the_rest_goes_on(
        function: str, field: str, what: str, error: int) -> None:
    lib = Nvml(broken={function: error})
    watched, values = sampled(lib)
    assert named(values, field) == []
    assert len(named(values, "memory_used_bytes")) == 3
    [said] = watched.says
    assert said.startswith(f"GPU 0 (NVIDIA H200) does not tell: {what} (")
    assert lib.asked.count(function) == 1


def test_an_error_that_passes_is_not_the_end_of_a_field() -> None:
    lib = Nvml(broken={"nvmlDeviceGetPowerUsage": pynvml.NVML_ERROR_UNKNOWN})
    watched, _ = sampled(lib, n=nvml.PATIENCE - 1)
    lib.broken.clear()
    assert named(watched.sample(100 * S), "power_w") != []
    assert watched.says == []


def test_an_error_that_does_not_pass_is() -> None:
    watched, _ = sampled(Nvml(broken={"nvmlDeviceGetPowerUsage": pynvml.NVML_ERROR_UNKNOWN}),
                         n=nvml.PATIENCE + 5)
    assert len(watched.says) == 1
    assert "power" in watched.says[0]


def test_a_lost_gpu_is_said_and_the_other_is_watched_on() -> None:
    watched, values = sampled(Nvml(gpus=2, lose=(1, 2)))
    used = [labels["index"] for name, _, labels in values if name == "memory_used_bytes"]
    assert used == ["0", "1", "0", "0"]
    [said] = watched.says
    assert "GPU 1 (NVIDIA H200) is not watched any more" in said


@pytest.mark.parametrize(("visible", "watched"), [
    (None, ["0", "1", "2"]), ("", []), ("-1", []), ("2,0", ["2", "0"]), ("1,7,0", ["1"]),
    ("GPU-2", ["2"]), ("nonsense", [])])
def test_only_gpus_that_cuda_shows_are_watched(visible: str | None, watched: list[str]) -> None:
    found = Gpus(Nvml(gpus=3), visible)
    assert [d.labels["index"] for d in found.devices] == watched


def test_older_libraries_have_other_names_or_lack_some() -> None:
    lib = Nvml(broken={"nvmlDeviceGetCurrentClocksEventReasons": -1,
                       "nvmlDeviceGetTemperature": -1})
    watched, values = sampled(lib, n=8)
    assert named(values, "throttle_bits") == [0, 0, 0, 0, 0, 0, 4, 4]
    assert watched.says == [
        "GPU 0 (NVIDIA H200) does not tell: temperature (not known to this nvidia-ml-py)"]


class Divided(Nvml):
    """A GPU that MIG divides into two."""

    def nvmlDeviceGetMigMode(self, handle: Any) -> list[int]:
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, i: int) -> Any:
        if i in (1, 3):
            return handle
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)


def test_of_a_gpu_that_mig_divides_the_instances_are_watched() -> None:
    watched, values = sampled(Divided())
    assert {labels["index"] for _, _, labels in values} == {"0.1", "0.3"}
    assert named(values, "util_frac") == []
    [said] = watched.says
    assert "divided by MIG" in said


@pytest.mark.parametrize(("took_s", "pause"), [(0.0, 0.2), (0.003, 0.3), (0.1, 0.5)])
def test_sampling_slows_down_where_it_would_cost_too_much(took_s: float, pause: float) -> None:
    assert nvml.pause_s(took_s) == pytest.approx(pause)


# ------------------------------------------------------------------------------ and who keeps it


def watched(command: list[str], for_s: float, silent_s: float = gpu.SILENT_S
            ) -> tuple[list[Row], list[str], float]:
    """Rows, what was said, and how long it took to end."""
    rows: list[Row] = []
    says: list[str] = []

    async def test() -> float:
        task = asyncio.create_task(gpu.watch(rows.extend, says.append, command, silent_s))
        await asyncio.wait([task], timeout=for_s)
        began = time.monotonic()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return time.monotonic() - began
    return rows, says, asyncio.run(test())


def test_a_process_of_its_own_samples_several_times_a_second() -> None:
    rows, says, _ = watched(LIE, 3.0)
    used = [r for r in rows if r.name == "memory_used_bytes"]
    assert says == []
    assert rows[0].name == "info"
    assert (rows[0].labels["name"], rows[0].labels["driver"]) == ("NVIDIA H200", "580.159.04")
    assert 4 <= len(used) <= 16
    assert all(b.t_ns > a.t_ns for a, b in itertools.pairwise(used))
    assert abs(used[-1].t_ns - time.monotonic_ns()) < 3 * S  # the same clock as the records'


def test_without_a_driver_it_is_said_and_nothing_else_happens() -> None:
    code = ("import sys; from tests.nvml import Nvml; from loadgen.telemetry import nvml;"
            "sys.modules['pynvml'] = Nvml(broken={'nvmlInit': 12}); nvml.main()")
    rows, says, _ = watched([sys.executable, "-c", code], 10)
    assert rows == []
    [said] = says
    assert said.startswith("no GPU is watched: NVML says ")


def test_without_the_library_it_is_said() -> None:
    code = ("import sys; sys.modules['pynvml'] = None\n"
            "from loadgen.telemetry import nvml; nvml.main()")
    _, says, _ = watched([sys.executable, "-c", code], 10)
    assert says == ["no GPU is watched: nvidia-ml-py is not installed "
                    "(pip install nvidia-ml-py)"]


def test_a_driver_that_hangs_is_said_once_and_holds_nobody_up() -> None:
    line = json.dumps({"t_ns": 1, "rows": [["util_frac", 0.5, {"index": "0"}]]})
    hangs = (f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
             f"print({line!r}, flush=True); time.sleep(60)")
    rows, says, ended_s = watched([sys.executable, "-c", hangs], 2.5, silent_s=0.8)
    assert [r.value for r in rows] == [0.5]
    assert says == ["the GPUs are not watched: NVML has not answered for 0.8 s"]
    assert ended_s < 1.5


def test_a_sampler_that_talks_nonsense_is_left() -> None:
    _, says, _ = watched([sys.executable, "-c", "print('oops', flush=True)"], 10)
    assert len(says) == 1


def test_the_sampler_ends_with_whoever_started_it(tmp_path: Path) -> None:
    """Its stdin is a pipe that nobody else has."""
    async def test() -> int:
        process = await asyncio.create_subprocess_exec(
            *LIE, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL)
        await asyncio.sleep(0.5)
        assert process.stdin is not None
        process.stdin.close()
        async with asyncio.timeout(5):
            return await process.wait()
    assert asyncio.run(test()) == 0


def test_rows_from_before_the_run_folder_are_written_into_it(tmp_path: Path) -> None:
    watcher = Watcher(say=print)
    watcher.keep([Row("gpu", 1, "memory_used_bytes", 5.0, {"index": "0"})])
    folder = RunFolder.create(tmp_path / "r", manifest())
    watcher.opened(folder)
    watcher.keep([Row("server", 2, "running", 1.0)])
    asyncio.run(watcher.close())
    assert [(r.source, r.t_ns) for r in folder.rows()] == [("gpu", 1), ("server", 2)]
    assert [r.t_ns for r in watcher.rows] == [1, 2]


@pytest.mark.parametrize(("url", "here"), [
    ("http://127.0.0.1:8000", True), ("http://localhost:1", True), ("https://[::1]:8", True),
    ("http://u:p@127.0.0.1:8", True), ("http://10.0.0.5:8000", False),
    ("http://localhost.example.com", False), ("https://127.example.com", False)])
def test_only_a_server_on_this_host_has_this_host_s_gpus(url: str, here: bool) -> None:
    assert gpu.is_here(url) is here


# ----------------------------------------------------------------------------------------- signs


def rows_of(name: str, points: dict[float, float], index: str = "0") -> list[Row]:
    return [Row("gpu", round(t * S), name, v, {"index": index}) for t, v in points.items()]


def signs(*rows: list[Row]) -> GpuSigns:
    """Of a leg from 0 s to 25 s, measured from 10 s to 20 s."""
    return gpu_signs_of(Window("l", 0, 10 * S, 20 * S, 25 * S, "done"),
                        gpus(r for own in rows for r in own))


def test_memory_is_the_fullest_gpu_s_and_of_the_leg_s_whole_life() -> None:
    s = signs(rows_of("memory_used_bytes", {-1: 9 * GIB, 1: 2 * GIB, 22: 3 * GIB, 26: 9 * GIB}),
              rows_of("memory_used_bytes", {1: 1 * GIB, 12: 5 * GIB, 13: 4 * GIB}, "1"))
    assert (s.n, s.memory_start_bytes, s.memory_peak_bytes) == (2, 1 * GIB, 5 * GIB)


def test_utilisation_is_of_the_measured_window_and_the_mean_of_all_gpus() -> None:
    s = signs(rows_of("util_frac", {5: 0.0, 11: 0.8, 19: 0.6, 20: 0.0}),
              rows_of("util_frac", {11: 0.3, 12: 0.3, 13: 0.3, 14: 0.3}, "1"))
    assert s.util_frac == pytest.approx((0.7 + 0.3) / 2)


def test_power_adds_up_over_gpus() -> None:
    s = signs(rows_of("power_w", {11: 100, 12: 300}), rows_of("power_w", {11: 50}, "1"))
    assert s.power_w == 250


def test_idleness_holds_no_clock_down_and_heat_does() -> None:
    s = signs(rows_of("throttle_bits", {11: 1, 12: 0x20, 13: 0x40 + 4, 14: 0, 22: 0x80}))
    assert (s.slowed_frac, s.slowed_by) == (0.5, [
        "power cap", "temperature (driver)", "temperature (hardware)"])


def test_without_gpus_nothing_is_told() -> None:
    assert signs() == GpuSigns()


def test_memory_after_load_is_that_when_the_server_was_ready() -> None:
    told = gpus(rows_of("memory_used_bytes", {1: 0.5 * GIB, 5: 14.2 * GIB, 9: 16 * GIB}))
    assert loaded_bytes(told, 6 * S) == 14.2 * GIB
    assert loaded_bytes(told, None) == 0.5 * GIB
    assert loaded_bytes({}, 6 * S) is None
