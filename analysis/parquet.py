"""records.parquet: one row per record as it was journalled (stamps in ns, gaps as a list of µs).
Lists become columns without a Python number in between: a million of long streams takes seconds."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Raw

from analysis.digest import Digest
from analysis.gaps import flatten
from loadgen.errors import StoreError
from loadgen.record import RequestRecord
from loadgen.store import RunFolder

TEXT = ("leg", "cls", "outcome", "stamp_kind", "tok_source", "finish_reason", "error", "output_ref",
        "wrong")
LISTS = ("gaps_us", "reads", "event_tok")
FIELDS = [f.name for f in msgspec.structs.fields(RequestRecord)]
INTS = pa.list_(pa.int32())
SCHEMA = pa.schema([(name, pa.string() if name in TEXT else INTS if name in LISTS else pa.int64())
                    for name in FIELDS])
BATCH = 500
GROUP = 20  # batches of a row group

_decode = msgspec.json.Decoder(Digest).decode
_decode_ints = msgspec.json.Decoder(list[int] | None).decode


def write(folder: Path) -> Path:
    """By rename. Raises StoreError."""
    target = folder / "records.parquet"
    temporary = target.with_name(".records.parquet.tmp")
    lines = _records(RunFolder(folder))
    try:
        # gaps differ: a dictionary of them would be made, found too large, and thrown away
        with pq.ParquetWriter(temporary, SCHEMA, compression="zstd", use_dictionary=list(TEXT),
                              write_statistics=False) as writer:
            while group := [_batch(records) for _ in range(GROUP)
                            if (records := list(itertools.islice(lines, BATCH)))]:
                writer.write_table(pa.Table.from_batches(group, SCHEMA))
        temporary.replace(target)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"{target}: cannot be written: {e.strerror or e}") from e
    return target


def _records(folder: RunFolder) -> Iterable[Digest]:
    """Of the lines that are records: their lists as they stand there."""
    apart, verdicts = folder.apart(), folder.verdicts()
    for path in sorted(folder.path.glob("records-*.jsonl")):
        for line, end in folder.lines(path, 0):
            if line.startswith(b'{"schema":'):
                continue
            try:
                record = _decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
            if apart.moves:
                record.leg, shift_ns = apart.of(path.name, end - len(line), record.leg)
                record.shift(shift_ns)
            if record.output_ref in verdicts:
                record.wrong = verdicts[record.output_ref].wrong
            yield record


def _batch(records: Sequence[Digest]) -> Any:
    try:
        return _columns(records)
    except msgspec.DecodeError:
        return _columns([r for r in records if _is_whole(r)])


def _is_whole(r: Digest) -> bool:
    try:
        lists = [_decode_ints(text) if text else [] for text in (r.gaps_us, r.reads, r.event_tok)]
    except msgspec.DecodeError:
        return False
    return lists[0] is not None


def _columns(records: Sequence[Digest]) -> Any:
    return pa.RecordBatch.from_arrays([
        _lists([getattr(r, name) for r in records], may_be_absent=name != "gaps_us")
        if name in LISTS else pa.array([getattr(r, name) for r in records], SCHEMA.field(name).type)
        for name in FIELDS], schema=SCHEMA)


def _lists(texts: Sequence[Raw], may_be_absent: bool) -> Any:
    """JSON arrays as a column; an absent one is null, or empty."""
    absent = np.array([may_be_absent and not text for text in texts])
    if absent.all():
        return pa.nulls(len(texts), INTS)
    flat = flatten(texts)
    if flat is None:
        found = [None if none else _decode_ints(text or b"[]")
                 for text, none in zip(texts, absent, strict=True)]
        if not may_be_absent and None in found:
            raise msgspec.ValidationError("null is no list of gaps")
        # a gap of more than half an hour is null here; the journal has it
        return pa.array([own and [x if abs(x) < 2**31 else None for x in own] for own in found],
                        INTS)
    values, counts = flat
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
                       mask=np.append(absent, False))
    return pa.ListArray.from_arrays(offsets, pa.array(values))
