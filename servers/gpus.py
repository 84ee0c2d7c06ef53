"""The GPUs of this host, as NVML names them."""

import contextlib
from typing import Any


def facts() -> dict[str, Any]:
    """Names of the GPUs and the driver's version; None where there is no driver."""
    try:
        import pynvml  # noqa: PLC0415  (heavy, and nothing where there is no GPU)

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001  (no library, no driver, no permission: no GPU to name)
        return {"gpus": None, "driver": None}
    names: list[str] = []
    driver = None
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        names.extend(_text(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index)))
                     for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:  # one was lost: those before it stand
        pass
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return {"gpus": names or None, "driver": driver}


def _text(said: str | bytes) -> str:
    """Older libraries say bytes."""
    return said.decode() if isinstance(said, bytes) else said
