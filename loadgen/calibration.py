"""What this host was found to be good for, kept in the user's cache."""

import os
import platform
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from loadgen import __version__
from loadgen.errors import StoreError
from loadgen.headroom import Calibration

SCHEMA = 1
AGAIN = "`loadgen doctor --calibrate` makes a new one"
PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


class Host(Struct, frozen=True):
    """What a calibration holds for, and nothing else."""

    hostname: str
    cpu: str
    cores: int
    python: str
    loadgen: str


class Kept(Struct, frozen=True):
    """The file. The host's name stays in it: run folders, which are passed on, get the rest."""

    schema: int
    host: Host
    calibration: Calibration


class Found(Struct, frozen=True):
    """`ignored`: why there is a calibration that does not count. Both None: there is none."""

    calibration: Calibration | None = None
    ignored: str | None = None


def path() -> Path:
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a container's user that nobody knows
        cache = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return cache / "loadgen" / "calibration.json"


def this_host() -> Host:
    return Host(hostname=platform.node(), cpu=_cpu(), cores=_cores(),
                python=platform.python_version(), loadgen=__version__)


def save(calibration: Calibration) -> Path:
    """Raises StoreError."""
    kept = path()
    data = msgspec.json.format(msgspec.json.encode(Kept(SCHEMA, this_host(), calibration)))
    temporary = kept.with_suffix(f".{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(kept)
    except OSError as e:
        raise StoreError(f"{kept}: the calibration cannot be kept: {e.strerror}; set "
                         "$XDG_CACHE_HOME to a folder that can be written") from e
    return kept


def load() -> Found:
    """The calibration of this host, if there is one. A file that is of no use is no error."""
    kept = path()
    try:
        data = kept.read_bytes()
    except FileNotFoundError:
        return Found()
    except OSError as e:
        return Found(ignored=f"{kept} cannot be read: {e.strerror}")
    try:
        if (schema := msgspec.json.decode(data, type=_Schema).schema) != SCHEMA:
            return Found(ignored=f"{kept} has schema {schema}, not {SCHEMA}; {AGAIN}")
        found = msgspec.json.decode(data, type=Kept)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        return Found(ignored=f"{kept} cannot be read: {e}; {AGAIN}")
    here, there = (msgspec.structs.asdict(x) for x in (this_host(), found.host))
    for name, value in here.items():
        if there[name] != value:
            return Found(ignored=f"the calibration is of another {_WORDS[name]} ({there[name]}; "
                                 f"here: {value}); {AGAIN}")
    return Found(found.calibration)


class _Schema(Struct, frozen=True):
    schema: int


_WORDS = {"hostname": "host", "cpu": "CPU", "cores": "number of cores", "python": "Python",
          "loadgen": "loadgen"}


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """That this process may use."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1)
