"""What a run folder tells of a server: what was asked of it, and how it answered, leg by leg. (The
folder is read here without loadgen's own types: a server knows nothing of loads.)"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet
from msgspec import Struct

from servers.sim.replay import Answer, Asked

MOST, MOST_EACH = 300, 3  # answers of a leg, or of each slot, that are enough


class CannotFit(Exception):
    """A folder that is no run, or tells nothing."""


class Seen(Struct, frozen=True):
    """What is read of a record."""

    leg: str
    outcome: str
    due_ns: int
    end_ns: int
    sent_ns: int | None = None
    first_ns: int | None = None
    gaps_us: list[int] | None = None
    max_tokens: int | None = None
    prompt_tok: int | None = None
    want_prompt_tok: int | None = None
    output_tok: int | None = None


@dataclass(frozen=True)
class SeenLeg:
    """`slots`: of a closed loop; None: requests came when they came. `asked` and `answers` are in
    the order of sending; no answer: it was not whole, but its request loaded the server."""

    name: str
    slots: int | None
    asked: list[Asked]
    answers: list[Answer | None]


def read(folder: Path) -> list[Seen]:
    """Requests of a run folder that were sent; those that were cut off were in the server, too.
    Raises CannotFit."""
    found = list(_journalled(folder)) or list(_table(folder))
    kept = [r for r in found if r.sent_ns and (r.prompt_tok or r.outcome != "OK")]
    if not any(r.outcome == "OK" for r in kept):
        raise CannotFit(f"{folder}: holds no answered requests (records-*.jsonl, records.parquet)")
    return kept


def _journalled(folder: Path) -> Iterator[Seen]:
    decode = msgspec.json.Decoder(Seen).decode
    for path in sorted(folder.glob("records-*.jsonl")):
        for line in path.read_bytes().splitlines():
            if line.startswith(b'{"schema":'):
                continue
            try:
                yield decode(line)
            except msgspec.DecodeError:  # the torn last line of a crash
                continue


def _table(folder: Path) -> Iterator[Seen]:
    """The same from what is left where journals were thrown away."""
    path = folder / "records.parquet"
    if path.exists():
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches(columns=[f.name for f in msgspec.structs.fields(Seen)]):
            yield from msgspec.convert(batch.to_pylist(), list[Seen])


def legs_of(folder: Path, records: Sequence[Seen]) -> list[SeenLeg]:
    """In the order in which they ran."""
    slots, found = _slots(folder), dict[str, list[Seen]]()
    for r in sorted(records, key=lambda r: r.sent_ns or 0):
        found.setdefault(r.leg, []).append(r)
    return [_leg(name, slots.get(name), rs) for name, rs in found.items()]


def _leg(name: str, slots: int | None, records: Sequence[Seen]) -> SeenLeg:
    start_ns, asked, answers = records[0].sent_ns or 0, list[Asked](), list[Answer | None]()
    left, until_ns = max(MOST, MOST_EACH * (slots or 0)), 0
    for r in records:
        whole = r.outcome == "OK" and r.first_ns is not None and bool(r.output_tok)
        prompt_tok = r.prompt_tok or r.want_prompt_tok
        output_tok = r.max_tokens if r.outcome == "CANCELLED" else r.output_tok or 1
        sent_ns, first_ns = r.sent_ns or 0, r.first_ns or 0
        if not prompt_tok or not output_tok or not (first_ns or r.outcome == "CANCELLED"):
            continue  # it was refused
        if left <= 0 and sent_ns > until_ns:
            break
        counts, left = whole and left > 0, left - whole
        until_ns = max(until_ns, r.end_ns if counts else 0)
        asked.append(Asked((sent_ns - start_ns) / 1e9, prompt_tok, output_tok, counts))
        answers.append(Answer((first_ns - sent_ns) / 1e9, output_tok, [
            us / 1e6 for us in r.gaps_us or ()]) if counts else None)
    return SeenLeg(name, slots, asked, answers)


def _slots(folder: Path) -> dict[str, int]:
    """Of the legs that were closed loops."""
    path, found = folder / "legs.jsonl", dict[str, int]()
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            leg = msgspec.json.decode(line).get("leg") or {}
        except msgspec.DecodeError:  # the torn last line of a crash
            continue
        if leg.get("load", {}).get("mode") == "closed":
            found[leg["id"]] = leg["load"]["concurrency"]
    return found


def facts_of(folder: Path) -> dict[str, Any]:
    """The manifest. Raises CannotFit."""
    path = folder / "manifest.json"
    try:
        found: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as e:
        raise CannotFit(f"{path}: {e}") from e
    return found
