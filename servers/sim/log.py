"""Log lines in vLLM's form, on stderr."""

import os
import sys
import time


def log(process: str, level: str, place: str, text: str) -> None:
    """`process`: APIServer, EngineCore or Worker. All are one process here, unlike in vLLM."""
    stamp = time.strftime("%m-%d %H:%M:%S")
    for line in text.split("\n"):
        print(f"({process} pid={os.getpid()}) {level} {stamp} [{place}] {line}", file=sys.stderr,
              flush=True)


def log_death(kind: str, memory_gib: float) -> None:
    """What vLLM writes when its engine dies: of "oom", "die" (a killed worker) or "hang"."""
    oom = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
           f"{memory_gib:.2f} GiB of which 1.02 GiB is free. Including non-PyTorch memory, this "
           f"process has {memory_gib - 1.02:.2f} GiB memory in use.")
    if kind == "oom":
        log("Worker", "ERROR", "multiproc_executor.py:1063", "WorkerProc hit an exception.\n"
            f"Traceback (most recent call last):\ntorch.OutOfMemoryError: {oom}")
        log("EngineCore", "ERROR", "dump_input.py:72", "Dumping input data for V1 LLM engine")
        cause = f"RuntimeError: Worker failed with error '{oom}'"
    elif kind == "die":
        log("EngineCore", "ERROR", "multiproc_executor.py:315", "Worker proc VllmWorker-0 died "
            "unexpectedly (exit code: -9), shutting down executor.")
        cause = "RuntimeError: cancelled"
    else:
        cause = "TimeoutError: RPC call to execute_model timed out."
    log("EngineCore", "ERROR", "core.py:1512", f"EngineCore encountered a fatal error.\n{cause}")
    log("APIServer", "ERROR", "async_llm.py:906", "AsyncLLM output_handler failed.\n"
        "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack "
        "trace (above) for the root cause.")
