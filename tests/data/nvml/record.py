"""Records what NVML answers on this host, error codes included, as one JSON on stdout:

    python tests/data/nvml/record.py [SECONDS [NOTE]] > tests/data/nvml/h200.json

Needs nvidia-ml-py only, changes no setting. Run it beside a load and without one; a few seconds
give a dozen samples. `tests/nvml.py` answers from the file as the GPU did.
"""

# mypy: ignore-errors
import json
import sys
import time
from importlib import metadata

import pynvml as nvml

EACH_S = 0.25
ONCE = {  # of a GPU, what does not change: function → further arguments
    "nvmlDeviceGetName": (), "nvmlDeviceGetUUID": (), "nvmlDeviceGetMigMode": (),
    "nvmlDeviceGetMaxMigDeviceCount": (), "nvmlDeviceGetEnforcedPowerLimit": (),
    "nvmlDeviceGetSupportedClocksEventReasons": (), "nvmlDeviceGetComputeMode": (),
    "nvmlDeviceGetPersistenceMode": (), "nvmlDeviceGetCudaComputeCapability": ()}
OFTEN = {  # what does
    "nvmlDeviceGetMemoryInfo": (), "nvmlDeviceGetUtilizationRates": (),
    "nvmlDeviceGetPowerUsage": (), "nvmlDeviceGetClockInfo:sm": (nvml.NVML_CLOCK_SM,),
    "nvmlDeviceGetClockInfo:memory": (nvml.NVML_CLOCK_MEM,),
    "nvmlDeviceGetTemperature": (nvml.NVML_TEMPERATURE_GPU,),
    "nvmlDeviceGetCurrentClocksEventReasons": (),
    "nvmlDeviceGetCurrentClocksThrottleReasons": (),
    "nvmlDeviceGetComputeRunningProcesses": (), "nvmlDeviceGetGraphicsRunningProcesses": (),
    "nvmlDeviceGetTotalEnergyConsumption": ()}


def plain(value):
    """A struct as a dict, a list of them as a list, text as text."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    names = [f[0] for f in getattr(value, "_fields_", ())]
    if names or hasattr(value, "__dict__"):
        return {n: plain(getattr(value, n)) for n in names or vars(value)}
    return value


def ask(name, *arguments):
    """{"ok": …} or {"error": code, "says": text}; and how long it took."""
    began = time.perf_counter()
    try:
        answer = {"ok": plain(getattr(nvml, name.partition(":")[0])(*arguments))}
    except nvml.NVMLError as e:
        answer = {"error": e.value, "says": str(e)}
    except AttributeError as e:
        answer = {"missing": str(e)}
    return answer | {"us": round(1e6 * (time.perf_counter() - began))}


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    started = ask("nvmlInit")
    found = {"recorded": True, "note": " ".join(sys.argv[2:]),
             "versions": {"nvidia-ml-py": metadata.version("nvidia-ml-py"),
                          "python": sys.version.split()[0]},
             "system": {"nvmlInit": started}, "gpus": []}
    for name in ("nvmlSystemGetDriverVersion", "nvmlSystemGetNVMLVersion",
                 "nvmlSystemGetCudaDriverVersion", "nvmlDeviceGetCount"):
        found["system"][name] = ask(name)
    handles = [nvml.nvmlDeviceGetHandleByIndex(i)
               for i in range(found["system"]["nvmlDeviceGetCount"].get("ok", 0))]
    found["gpus"] = [{"once": {n: ask(n, h, *a) for n, a in ONCE.items()}, "samples": []}
                     for h in handles]
    began, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - began < seconds:
        for handle, gpu in zip(handles, found["gpus"], strict=True):
            gpu["samples"].append({"t_s": round(time.monotonic() - began, 3)} | {
                n: ask(n, handle, *a) for n, a in OFTEN.items()})
        time.sleep(EACH_S)
    found["cpu_frac"] = (time.process_time() - cpu) / max(time.monotonic() - began, 1e-9)
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
