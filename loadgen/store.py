"""The run folder: what was asked (manifest), what happened (journals), what follows (summary).

    manifest.json        written first, by rename
    legs.jsonl           a line when a leg starts (the Leg) and one when it ends (its Window)
    records-<shard>.jsonl  a header line, then one RequestRecord a line, as requests end
    telemetry-<source>.jsonl  generic rows
    records.parquet, summary.json, report.html   made of the above; no summary = crashed

Journals are append-only, one write() per line: a SIGKILL loses what was in flight, nothing else.
A torn last line is passed over and counted. Schema history: 1 = first.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from loadgen.errors import FolderError, StoreError
from loadgen.headroom import Calibration
from loadgen.leg import Leg, Window
from loadgen.record import RequestRecord
from loadgen.scenario import dec_hook, enc_hook

SCHEMA = 1
T = TypeVar("T")


class Worker(Struct, frozen=True):
    """One host's part of a run on many. Its shards stamp with its own monotonic clock, which is
    `offset_ns` ahead of the master's, give or take `error_ns`; journals hold its stamps, and
    `RunFolder.records` gives them on the master's clock."""

    name: str
    shards: list[int]
    offset_ns: int
    error_ns: int
    host: dict[str, Any]


class Manifest(Struct, frozen=True):
    """What was asked, of what, with what. Holds no secret."""

    schema: int
    run: str
    created: str  # wall clock, ISO 8601 with offset
    command: list[str]
    scenario: dict[str, Any]  # resolved; `scenario.parse` reads it
    seed: int
    target_frac: float  # the attainment that "safe" asks for …
    confidence: float  # … with this one-sided confidence
    base_url: str
    model: str
    server: dict[str, Any]  # facts; "simulated": true for the simulator
    ratios: dict[str, Any]  # characters per token of each class, and how they were found
    versions: dict[str, str]
    host: dict[str, Any]
    processes: int = 1
    calibration: Calibration | None = None  # that was in force; of one generator process
    workers: list[Worker] = []  # of a fleet


class Header(Struct, frozen=True):
    """First line of a record journal. `mono_ns` and `wall_ns` were read together: they place
    this shard's monotonic stamps on the wall clock."""

    schema: int
    run: str
    shard: int
    mono_ns: int
    wall_ns: int


class Row(Struct, frozen=True, omit_defaults=True):
    """One value of telemetry, whatever its source."""

    source: str
    t_ns: int
    name: str
    value: float
    labels: dict[str, str] = {}


class LegLine(Struct, frozen=True, omit_defaults=True):
    """A line of legs.jsonl: a leg that started, or how one ended."""

    leg: Leg | None = None
    window: Window | None = None


_encoder = msgspec.json.Encoder(enc_hook=enc_hook)


class Journal:
    """An append-only file of JSON lines. Each `append` is one write of one line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._torn = False  # the last line was written in part
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if not _ends_whole(path):  # a crash tore the last line: do not write on its tail
                os.write(self._fd, b"\n")
        except OSError as e:
            raise StoreError(f"{path}: cannot be written: {e.strerror}") from e

    def append(self, value: Struct) -> None:
        """Raises StoreError if the line did not reach the file whole (a full disk)."""
        line = (b"\n" if self._torn else b"") + _encoder.encode(value) + b"\n"
        try:
            written = os.write(self._fd, line)
        except OSError as e:
            raise StoreError(f"{self.path}: {e.strerror}; records so far are kept. Free some "
                             "space and see `loadgen report`") from e
        self._torn = written < len(line)
        if self._torn:
            raise StoreError(f"{self.path}: only {written} of {len(line)} bytes could be written "
                             "(disk full?); records so far are kept")

    def close(self) -> None:
        os.close(self._fd)


def _ends_whole(path: Path) -> bool:
    size = path.stat().st_size
    if size == 0:
        return True
    with path.open("rb") as f:
        f.seek(size - 1)
        return f.read(1) == b"\n"


class RunFolder:
    """Names and reading of a run's files. Making one does not touch the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.torn = 0  # lines that could not be read so far

    @classmethod
    def check_free(cls, path: Path) -> None:
        """Raises FolderError if a run is there already, or a folder cannot be made there."""
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise FolderError(f"{path}: cannot be made: {there} is no folder that can be written")
        if (path / "manifest.json").exists():
            raise FolderError(f"{path} holds a run already; name another folder with --out")

    @classmethod
    def create(cls, path: Path, manifest: Manifest) -> "RunFolder":
        """A new folder with its manifest. Raises StoreError if a run is there already."""
        cls.check_free(path)
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise FolderError(f"{path}: cannot be made: {e.strerror}") from e
        folder.write("manifest.json", msgspec.json.format(_encoder.encode(manifest)))
        return folder

    def write(self, name: str, data: bytes) -> Path:
        """Writes a whole file by rename: it is there complete or not at all."""
        path, temporary = self.path / name, self.path / f".{name}.tmp"
        try:
            with temporary.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise StoreError(f"{path}: cannot be written: {e.strerror}") from e
        return path

    def records_path(self, shard: int) -> Path:
        return self.path / f"records-{shard}.jsonl"

    def telemetry(self, source: str) -> Journal:
        return Journal(self.path / f"telemetry-{source}.jsonl")

    def legs_journal(self) -> Journal:
        return Journal(self.path / "legs.jsonl")

    # --------------------------------------------------------------------------------- reading

    def manifest(self) -> Manifest:
        path = self.path / "manifest.json"
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        except OSError as e:
            raise FolderError(f"{self.path} is no run folder: {path.name}: {e.strerror}") from e
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise StoreError(f"{path}: {e}") from e
        if manifest.schema > SCHEMA:
            raise FolderError(f"{path}: schema {manifest.schema} is newer than this loadgen's "
                             f"({SCHEMA}); update loadgen to read it")
        return manifest

    def records(self, offsets: dict[Path, int] | None = None) -> Iterator[RequestRecord]:
        """All records. `offsets` (bytes already read, by file) makes it read only what came
        since, and is brought up to date."""
        ahead_ns = self._ahead_ns()
        for path in sorted(self.path.glob("records-*.jsonl")):
            start = (offsets or {}).get(path, 0)
            for line, end in self._lines(path, start):
                if offsets is not None:
                    offsets[path] = end
                if not line.startswith(b'{"schema":'):
                    record = self._decode(line, _decode_record)
                    if record is not None:
                        yield _back(record, ahead_ns.get(record.shard, 0))

    def _ahead_ns(self) -> dict[int, int]:
        """By shard: how far its host's clock is ahead of this run's."""
        if not (self.path / "manifest.json").exists():
            return {}
        return {shard: w.offset_ns for w in self.manifest().workers for shard in w.shards}

    def headers(self) -> list[Header]:
        """The record journals' first lines, in the order of shards."""
        found = []
        for path in sorted(self.path.glob("records-*.jsonl")):
            found += [h for line, _ in self._lines(path, 0) if line.startswith(b'{"schema":')
                      and (h := self._decode(line, _decode_header)) is not None]
        return found

    def legs(self) -> list[tuple[Leg, Window | None]]:
        """Each leg that started, in order, with its window; None: it never ended (a crash)."""
        path = self.path / "legs.jsonl"
        if not path.exists():
            return []
        lines = [x for line, _ in self._lines(path, 0)
                 if (x := self._decode(line, _decode_leg)) is not None]
        windows = {x.window.leg: x.window for x in lines if x.window}
        return [(x.leg, windows.get(x.leg.id)) for x in lines if x.leg]

    def rows(self) -> Iterator[Row]:
        """All telemetry."""
        for path in sorted(self.path.glob("telemetry-*.jsonl")):
            for line, _ in self._lines(path, 0):
                row = self._decode(line, _decode_row)
                if row is not None:
                    yield row

    def _lines(self, path: Path, start: int) -> Iterator[tuple[bytes, int]]:
        """(line, offset after it) for each whole line from byte `start`."""
        with path.open("rb") as f:
            f.seek(start)
            for line in f:
                if not line.endswith(b"\n"):
                    self.torn += 1
                    return
                start += len(line)
                if line != b"\n":
                    yield line, start

    def _decode(self, line: bytes, decoder: "msgspec.json.Decoder[T]") -> T | None:
        try:
            return decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.torn += 1
            return None


def _back(record: RequestRecord, ahead_ns: int) -> RequestRecord:
    """Its instants on a clock that is so far behind; every duration stays what it was."""
    if ahead_ns:
        record.due_ns -= ahead_ns
        record.end_ns -= ahead_ns
        for name in ("sent_ns", "headers_ns", "first_ns", "first_visible_ns"):
            if (at := getattr(record, name)) is not None:
                setattr(record, name, at - ahead_ns)
    return record


_decode_record = msgspec.json.Decoder(RequestRecord)
_decode_header = msgspec.json.Decoder(Header)
_decode_row = msgspec.json.Decoder(Row)
_decode_leg = msgspec.json.Decoder(LegLine, dec_hook=dec_hook)
