"""The texts of answers that are to be checked: a journal beside the records, written by whoever
sends, read between legs. Only answers of classes with a validator are kept."""

from pathlib import Path

import msgspec
from msgspec import Struct

from loadgen.openai import Answer
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Scenario
from loadgen.store import Journal


class Output(Struct, frozen=True, omit_defaults=True):
    """A line of outputs-<shard>.jsonl: whose answer it is, and the answer."""

    leg: str
    shard: int
    seq: int
    session: int
    turn: int
    cls: str
    answer: Answer


class Outputs:
    """Keeps answers in `path`, which is made when the first one comes."""

    def __init__(self, path: Path, scenario: Scenario) -> None:
        self._path = path
        self._classes = frozenset(c.name for c in scenario.classes if c.validator is not None)
        self._journal: Journal | None = None

    def wants(self, cls: str) -> bool:
        """Whether answers of the class are to be kept."""
        return cls in self._classes

    def keep(self, record: RequestRecord, answer: Answer) -> str | None:
        """Where it stands, for the record's `output_ref`; None: one that failed has a miss already.
        Raises StoreError."""
        if record.outcome is not Outcome.OK:
            return None
        if self._journal is None:
            self._journal = Journal(self._path)
        at = self._path.stat().st_size
        self._journal.append(Output(record.leg, record.shard, record.seq, record.session,
                                    record.turn, record.cls, answer))
        return f"{self._path.name}:{at}"


_decode = msgspec.json.Decoder(Output).decode


def read(folder: Path, ref: str) -> Answer | None:
    """The answer that an `output_ref` names; None: it is not there, or torn."""
    name, _, at = ref.rpartition(":")
    try:
        with (folder / name).open("rb") as f:
            f.seek(int(at))
            line = f.readline()
            return _decode(line if line != b"\n" else f.readline()).answer
    except (OSError, ValueError, msgspec.DecodeError):
        return None
