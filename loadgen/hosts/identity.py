"""Who a process of a fleet is: what it runs, and on what host."""

import functools
import hashlib
import os
import platform
import socket
from importlib.metadata import version
from pathlib import Path

import loadgen

_HOUSE = Path(loadgen.__file__).parent


@functools.cache
def code() -> str:
    """A hash of the generator's sources: version numbers do not tell two checkouts apart."""
    digest = hashlib.sha256()
    for path in sorted(_HOUSE.rglob("*.py")):
        digest.update(path.relative_to(_HOUSE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def host() -> dict[str, str | int | float | None]:
    return {"name": socket.gethostname(), "cores": os.cpu_count(), "pid": os.getpid(),
            "machine": platform.machine(), "system": platform.platform()[:200],
            "python": platform.python_version(), "numpy": version("numpy"),
            "locust": version("locust"), "load": round(os.getloadavg()[0], 2)}
