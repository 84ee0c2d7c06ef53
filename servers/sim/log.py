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


def _out_of_memory(memory_gib: float, wanted: str) -> str:
    return (f"CUDA out of memory. Tried to allocate {wanted}. GPU 0 has a total capacity of "
            f"{memory_gib:.2f} GiB of which 281.12 MiB is free. Including non-PyTorch memory, this "
            f"process has {memory_gib - 0.27:.2f} GiB memory in use.")


def log_start_oom(memory_gib: float) -> None:
    """A GPU that had too little left for the warm-up: as from vLLM 0.32, which then exits 1."""
    oom = _out_of_memory(memory_gib, "298.00 MiB")
    log("EngineCore", "ERROR", "core.py:1330", "EngineCore failed to start.\n"
        f"Traceback (most recent call last):\ntorch.OutOfMemoryError: {oom}\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy "
        "requests. Please try lowering `max_num_seqs` or `gpu_memory_utilization` when "
        "initializing the engine.")
    log_start_failed()


def log_start_failed() -> None:
    log("APIServer", "ERROR", "core.py:1100", "RuntimeError: Engine core initialization "
        "failed. See root cause above. Failed core proc(s): {}")


def log_exception(e: Exception) -> None:
    log("APIServer", "ERROR", "sim", f"a request was answered with 500: {type(e).__name__}: {e}"
        [:300].replace("\n", " "))


def log_request_oom(flying: int, words: str) -> None:
    """Of a request that found no memory, as `servers/hf/app.py` says it: the server goes on."""
    stamp = time.strftime("%m-%d %H:%M:%S")
    print(f"ERROR {stamp} [app.py] out of memory while {flying} requests were generating: "
          f"OutOfMemoryError: {words}", file=sys.stderr, flush=True)


def log_death(kind: str, memory_gib: float) -> None:
    """What vLLM writes when its engine dies: of "oom", "die" (a killed worker) or "hang"."""
    oom = _out_of_memory(memory_gib, "2.00 GiB")
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
