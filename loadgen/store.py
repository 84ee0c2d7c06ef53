"""The run folder: what was asked (manifest), what happened (journals), what follows (summary).

    manifest.json        written first, by rename
    legs.jsonl           a line when a leg starts (the Leg) and one when it ends (its Window);
                         one where a stopped search went on
    records-<shard>.jsonl  a header line, then one RequestRecord a line, as requests end
    telemetry-<source>.jsonl  generic rows
    outputs-<shard>.jsonl  answers of classes with a validator, to which `output_ref` points
    verdicts.jsonl       what the validators found in them
    records.parquet, summary.json, report.html   made of the above; no summary = crashed

Journals are append-only, one write() per line: a SIGKILL loses what was in flight, nothing else.
A torn last line is passed over and counted. Schema history: 1 = first.

A search that was stopped and goes on appends to the same journals. What it says in legs.jsonl
(Resumed) keeps the records of the leg that was cut apart from those of its repetition, and brings
stamps of another boot of the host to the first one's clock.
"""

import fcntl
import os
import weakref
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
    plan: dict[str, Any] | None = None  # of a search: levels, budget …; `--resume` goes on with it
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


class Verdict(Struct, frozen=True, omit_defaults=True):
    """What a class's check found in one answer: a line of verdicts.jsonl. `ref` is the record's
    `output_ref`; `counts`: one that is not `ok` is a miss."""

    leg: str
    shard: int
    seq: int
    session: int
    turn: int
    cls: str
    ok: bool
    kind: str | None = None
    says: str = ""
    ref: str = ""
    counts: bool = True

    @property
    def wrong(self) -> str | None:
        return None if self.ok or not self.counts else self.kind or "wrong"


class Resumed(Struct, frozen=True):
    """A stopped search goes on. `kept`: the legs that stand; whatever other leg has records within
    `sizes`, the bytes that each journal had, was cut and is repeated. `spent_s`: of the budget,
    until then; `looks`: how many of the LegLines that say so stand. `shift_ns`: what brings later
    stamps to the clock of the stamps before."""

    when: str
    spent_s: float
    kept: list[str]
    looks: int
    sizes: dict[str, int]
    shift_ns: int = 0


class LegLine(Struct, frozen=True, omit_defaults=True):
    """A line of legs.jsonl: a leg that started, how one ended, how much of the budget was spent
    when the search looked, or that it went on."""

    leg: Leg | None = None
    window: Window | None = None
    spent_s: float | None = None
    resumed: Resumed | None = None


class Apart(Struct, frozen=True):
    """What a run's resumptions, and the clocks of a fleet's hosts, say of a line in a journal.
    `ahead_ns`: by file, how far the clock of its host is ahead of the run's."""

    resumed: list[Resumed]
    ahead_ns: dict[str, int] = {}

    @property
    def moves(self) -> bool:
        """Whether there is anything to say."""
        return bool(self.resumed or self.ahead_ns)

    def of(self, name: str, start: int, leg: str) -> tuple[str, int]:
        """For the line at byte `start` of the file `name`: the leg's id, which is another one if
        the leg was cut there, and what is to be added to its stamps."""
        shift_ns = -self.ahead_ns.get(name, 0)
        for k, r in enumerate(self.resumed, 1):
            if start >= r.sizes.get(name, 0):
                shift_ns += r.shift_ns
            elif leg not in r.kept:
                return f"{leg}~cut{k}", shift_ns
        return leg, shift_ns


_encoder = msgspec.json.Encoder(enc_hook=enc_hook)


class Journal:
    """An append-only file of JSON lines. Each `append` is one write of one line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._torn = False  # the last line was written in part
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self._close = weakref.finalize(self, os.close, self._fd)
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
        """One that nobody holds any more is closed, too."""
        self._close()


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
        self._legs_read = False

    @classmethod
    def check_free(cls, path: Path) -> None:
        """Raises FolderError if a run is there already, or a folder cannot be made there."""
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise FolderError(f"{path}: cannot be made: {there} is no folder that can be written")
        if (path / "manifest.json").exists():
            raise FolderError(f"{path} holds a run already; name another folder with --out")

    def held(self) -> int:
        """A lock on the folder for as long as this process lives, or closes what is returned.
        Raises FolderError if another one writes there."""
        fd = os.open(self.path / "manifest.json", os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise FolderError(f"{self.path}: another loadgen still writes there; end it first"
                              ) from None
        return fd

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

    def verdicts_journal(self) -> Journal:
        return Journal(self.path / "verdicts.jsonl")

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
        apart, verdicts = self.apart(), self.verdicts()
        for path in sorted(self.path.glob("records-*.jsonl")):
            start = (offsets or {}).get(path, 0)
            for line, end in self.lines(path, start):
                if offsets is not None:
                    offsets[path] = end
                if not line.startswith(b'{"schema":'):
                    record = self.decoded(line)
                    if record is not None:
                        if apart.moves:
                            record.leg, shift_ns = apart.of(path.name, end - len(line), record.leg)
                            record.shift(shift_ns)
                        if record.output_ref in verdicts:
                            record.wrong = verdicts[record.output_ref].wrong
                        yield record

    def verdicts(self) -> dict[str, Verdict]:
        """What was found in answers, by their `ref`."""
        path = self.path / "verdicts.jsonl"
        if not path.exists():
            return {}
        torn = self.torn
        found = [self._decode(line, _decode_verdict) for line, _ in self.lines(path, 0)]
        self.torn = torn  # one that is lost is made again
        apart = self.apart()
        return {v.ref: self._placed(v, apart) for v in found if v is not None}

    @staticmethod
    def _placed(verdict: Verdict, apart: Apart) -> Verdict:
        """Of a leg that was cut and repeated, the verdicts of the first try stand apart."""
        if not apart.resumed:
            return verdict
        name, _, at = verdict.ref.rpartition(":")
        leg, _ = apart.of(name, int(at) if at.isdigit() else 0, verdict.leg)
        return msgspec.structs.replace(verdict, leg=leg)

    def headers(self) -> list[Header]:
        """The record journals' first lines, in the order of shards."""
        found = []
        for path in sorted(self.path.glob("records-*.jsonl")):
            found += [h for line, _ in self.lines(path, 0) if line.startswith(b'{"schema":')
                      and (h := self._decode(line, _decode_header)) is not None]
        return found

    def legs(self) -> list[tuple[Leg, Window | None]]:
        """Each leg that started, in order, with its window; None: it never ended (a crash). A leg
        that was cut and repeated is there as repeated."""
        legs: list[Leg] = []
        windows: dict[str, Window] = {}
        shift_ns = 0
        for line in self.leg_lines():
            if line.leg:
                legs.append(line.leg)
            if line.window:
                windows[line.window.leg] = line.window.shifted(shift_ns)
            if line.resumed:
                shift_ns += line.resumed.shift_ns
                kept = line.resumed.kept
                legs = [x for x in legs if x.id in kept]
                windows = {k: w for k, w in windows.items() if k in kept}
        return [(x, windows.get(x.id)) for x in legs]

    def apart(self) -> Apart:
        there = (self.path / "manifest.json").exists()
        return Apart([x.resumed for x in self.leg_lines() if x.resumed], {
            self.records_path(shard).name: worker.offset_ns
            for worker in (self.manifest().workers if there else ())
            for shard in worker.shards if worker.offset_ns})

    def leg_lines(self) -> list[LegLine]:
        """All that legs.jsonl says, in its order."""
        path = self.path / "legs.jsonl"
        if not path.exists():
            return []
        torn = self.torn
        found = [x for line, _ in self.lines(path, 0)
                 if (x := self._decode(line, _decode_leg)) is not None]
        if self._legs_read:
            self.torn = torn  # its torn lines are counted once
        self._legs_read = True
        return found

    def rows(self) -> Iterator[Row]:
        """All telemetry."""
        apart = self.apart()
        seen: set[bytes] = set()  # a virtual leg that is repeated has the same rows
        for path in sorted(self.path.glob("telemetry-*.jsonl")):
            for line, end in self.lines(path, 0):
                row = self._decode(line, _decode_row)
                if row is None or line in seen:
                    continue
                if apart.resumed:
                    seen.add(line)
                    shift_ns = apart.of(path.name, end - len(line), "")[1]
                    row = msgspec.structs.replace(row, t_ns=row.t_ns + shift_ns)
                yield row

    def decoded(self, line: bytes) -> RequestRecord | None:
        """The record that a line holds; None, and counted as torn, if it holds none."""
        return self._decode(line, _decode_record)

    def lines(self, path: Path, start: int) -> Iterator[tuple[bytes, int]]:
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


_decode_record = msgspec.json.Decoder(RequestRecord)
_decode_header = msgspec.json.Decoder(Header)
_decode_row = msgspec.json.Decoder(Row)
_decode_verdict = msgspec.json.Decoder(Verdict)
_decode_leg = msgspec.json.Decoder(LegLine, dec_hook=dec_hook)
