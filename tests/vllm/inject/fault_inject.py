# mypy: ignore-errors
"""A plugin of vLLM for fault tests. When the file that $FAULT_TRIGGER names appears, the next step
of the worker raises: torch.OutOfMemoryError in CUDA's words if it holds "oom", else a RuntimeError
with what it holds. Use: PYTHONPATH=tests/vllm/inject FAULT_TRIGGER=FILE vllm serve …"""

import os
from pathlib import Path

OOM = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
       "which 1.02 GiB is free. Including non-PyTorch memory, this process has 78.08 GiB memory in "
       "use. Of the allocated memory 76.31 GiB is allocated by PyTorch, and 512.11 MiB is reserved "
       "by PyTorch but unallocated.")


def register():
    if "FAULT_TRIGGER" not in os.environ:
        return
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if getattr(GPUModelRunner, "_faulty", False):
        return
    trigger, execute = Path(os.environ["FAULT_TRIGGER"]), GPUModelRunner.execute_model

    def execute_model(self, *args, **more):
        if trigger.exists():
            what = trigger.read_text().strip()
            trigger.unlink()
            if what == "oom":
                import torch

                raise torch.OutOfMemoryError(OOM)
            raise RuntimeError(what)
        return execute(self, *args, **more)
    GPUModelRunner._faulty = True
    GPUModelRunner.execute_model = execute_model
