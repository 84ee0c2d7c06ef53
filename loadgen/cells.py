"""A campaign's cells, run one after the other and resumed where they stopped. A server is started
once for its row; what is complete is not run again; a cell that was defined otherwise is refused,
never mixed in; a server that does not fit, or dies, is a result."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from loadgen.campaign import Campaign, Cell, ServerRow, cells_of, not_simulated
from loadgen.errors import (
    DIED,
    INCONCLUSIVE,
    INTERRUPTED,
    PASS,
    PRECEDENCE,
    SLO_MISSED,
    StoreError,
)
from loadgen.store import RunFolder
from loadgen.target import Target, without_secrets

KEPT = "cells.json"
COMPLETE = frozenset({PASS, SLO_MISSED, DIED, INCONCLUSIVE})  # with a summary: these are results

Outcome = Literal["done", "does not fit", "not simulated", "not started", "stopped"]


class Refusal(Struct, frozen=True):
    """vLLM's arithmetic of a KV cache that is too small, per GPU."""

    needs_gib: float
    has_gib: float
    longest_tok: int  # the context that would fit


class Done(Struct, frozen=True, omit_defaults=True):
    """What came of a cell. `code`: its exit code; `says`: why there is no run, or why it ended."""

    cell: Cell
    outcome: Outcome
    code: int = PASS
    says: str = ""
    refusal: Refusal | None = None


class Kept(Struct, frozen=True):
    """The file from which, with the run folders, all tables are made. `campaign`: with the rows
    that were put beside those that did not fit."""

    campaign: Campaign
    cells: list[Done]


def read(out: Path) -> Kept:
    """Raises StoreError."""
    path = out / KEPT
    try:
        return msgspec.json.decode(path.read_bytes(), type=Kept)
    except (OSError, msgspec.DecodeError) as e:
        raise StoreError(f"{path}: {e}; is {out} a campaign's folder?") from e


class Lent:
    """A server that cells use one after the other. The first start of a cell finds it running,
    a second one is a restart; only `close` stops it. Its log is one, linked into each cell."""

    def __init__(self, server: Any, log: Path) -> None:
        self._server, self._log = server, log
        self._target: Target | None = None
        self._asked = False  # to start, in this cell
        self.patience_s: float = server.patience_s
        self.cells = 0

    def begin(self, cell: Path) -> None:
        self._asked = False
        self.cells += 1
        link = cell / "server.log"
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(self._log, cell))

    def start(self) -> Target:
        again, self._asked = self._asked, True
        if self._target is not None and not again and self._server.alive() is None:
            return self._target
        self.close()
        self._target = self._server.start()
        return self._target

    @property
    def pid(self) -> int | None:
        return getattr(self._server, "pid", None)

    def alive(self) -> str | None:
        found: str | None = self._server.alive()
        return found

    def facts(self) -> dict[str, Any]:
        return {**self._server.facts(), "cells_before": self.cells - 1}

    def stop(self) -> None:
        """A cell is over; the server goes on."""

    def close(self) -> None:
        """Idempotent."""
        if self._target is not None:
            self._server.stop()
            self._target = None


Invoke = Callable[[list[str], Any], tuple[int, str]]  # words, server → exit code, why it has no run
Lend = Callable[[list[str], Path], Any]  # words, log → a server to be lent, or None: each its own


def execute(planned: Campaign, out: Path, invoke: Invoke, lend: Lend,
            say: Callable[[str], None]) -> Iterator[tuple[Done, bool]]:
    """Each cell as it is done, and whether it was run now. Raises StoreError."""
    before = {d.cell.folder: d for d in read(out).cells} if (out / KEPT).exists() else {}
    rows, done = list(planned.servers), list[Done]()
    while rows:
        row = rows.pop(0)
        for found, again in _row(planned, row, out, before, invoke, lend, say):
            done.append(found)
            larger = _that_fits(planned, row, found)
            if larger is not None:
                rows.insert(0, larger)
                at = planned.servers.index(row) + 1
                planned = msgspec.structs.replace(planned, servers=(
                    *planned.servers[:at], larger, *planned.servers[at:]))
            _keep(out, planned, [*done, *(d for f, d in before.items()
                                          if f not in {x.cell.folder for x in done})])
            yield found, again
            if found.code == INTERRUPTED:
                return
    _keep(out, planned, done)


def _keep(out: Path, planned: Campaign, done: list[Done]) -> None:
    def hidden(rows: Any) -> Any:
        return tuple(msgspec.structs.replace(r, options=tuple(without_secrets(r.options)))
                     for r in rows)

    out.mkdir(parents=True, exist_ok=True)
    kept = Kept(msgspec.structs.replace(planned, servers=hidden(planned.servers),
                                        workloads=hidden(planned.workloads)), done)
    RunFolder(out).write(KEPT, msgspec.json.format(msgspec.json.encode(kept)))


def _that_fits(planned: Campaign, row: ServerRow, found: Done) -> ServerRow | None:
    """The row with the largest context that fits, once."""
    name = f"{row.name}-fits"
    if found.refusal is None or not row.largest or found.refusal.longest_tok < 1 or any(
            s.name == name for s in planned.servers):
        return None
    return msgspec.structs.replace(row, name=name, largest=False, beside=row.name,
                                   max_model_len=found.refusal.longest_tok)


def _row(planned: Campaign, row: ServerRow, out: Path, before: dict[str, Done], invoke: Invoke,
         lend: Lend, say: Callable[[str], None]) -> Iterator[tuple[Done, bool]]:
    """A server's cells."""
    cells = cells_of(planned, row)
    if (why := not_simulated(planned, row)) is not None:
        yield from ((Done(_written(c), "not simulated", says=why), False) for c in cells)
        return
    lent: dict[str, Lent | None] = {}  # by the words that name the server
    failed: Done | None = None  # it did not start: the others would wait for the same
    try:
        for cell in cells:
            kept = before.get(cell.folder)
            if kept is not None and _is_complete(out / cell.folder, kept, cell):
                yield kept, False
                continue
            if failed is not None:
                yield msgspec.structs.replace(failed, cell=_written(cell)), False
                continue
            say(f"── {cell.folder}: loadgen {' '.join(without_secrets(cell.words))}")
            _make_room(out / cell.folder, say)
            found = _one(cell, out, invoke, _borrow(cell, out, lent, lend))
            if found.outcome in ("does not fit", "not started"):
                failed = found
            if found.code == DIED:
                for server in lent.values():
                    if server is not None:
                        server.close()
            yield found, True
            if found.code == INTERRUPTED:
                return
    finally:
        for server in lent.values():
            if server is not None:
                server.close()


def _borrow(cell: Cell, out: Path, lent: dict[str, Lent | None], lend: Lend) -> Lent | None:
    """Started by the first cell that asks; over sockets and in virtual time are two."""
    way = "virtual" if "--virtual" in cell.words else "wire"
    if way not in lent:
        log = out / cell.server / "server.log"
        server = lend(list(cell.words), log)
        lent[way] = None if server is None else Lent(server, log)
    found = lent[way]
    if found is not None:
        found.begin(out / cell.folder)
    return found


def _one(cell: Cell, out: Path, invoke: Invoke, server: Lent | None) -> Done:
    folder, written = out / cell.folder, _written(cell)
    command, *rest = cell.words
    code, says = invoke([command, f"--out={folder}", "--no-report", *rest], server)
    if (folder / "summary.json").exists():
        return Done(written, "done", code, says)
    if code == DIED and not (folder / "manifest.json").exists():
        refusal = refusal_of(says)
        if refusal or is_full(says):  # an answer to the question, not a failure
            return Done(written, "does not fit", PASS, says, refusal)
        return Done(written, "not started", code, says)
    return Done(written, "stopped", code, says)


def _is_complete(folder: Path, kept: Done, cell: Cell) -> bool:
    """Raises StoreError if the folder holds what another definition gave."""
    there = (folder / "manifest.json").exists()
    if kept.cell != _written(cell):
        if there:
            raise StoreError(
                f"{folder} holds a run of another definition (loadgen {' '.join(kept.cell.words)}, "
                f"scenario {kept.cell.mix}); name another --out, or remove it")
        return False
    return kept.outcome in ("does not fit", "not simulated") or (
        kept.outcome == "done" and kept.code in COMPLETE and (folder / "summary.json").exists())


def _written(cell: Cell) -> Cell:
    """As it may stand in a file. The scenario is known by what it holds, however it is named."""
    words = without_secrets(cell.words)
    return msgspec.structs.replace(cell, words=(words[0], cell.mix, *words[2:]))


def _make_room(folder: Path, say: Callable[[str], None]) -> None:
    """An unfinished try is kept beside."""
    if not (folder / "manifest.json").exists():
        return
    aside = folder.with_name(f"{folder.name}.unfinished")
    if aside.exists():
        raise StoreError(f"{aside} exists already; remove it")
    folder.rename(aside)
    say(f"{folder.name}: an earlier try did not finish; kept as {aside.name}")


# ------------------------------------------------------------------------- what a server says

_KV = re.compile(r"([\d.]+) GiB KV cache is needed, which is larger than the available KV cache "
                 r"memory \(([\d.]+) GiB\).*?maximum model length is (\d+)", re.DOTALL)
_FULL = re.compile(r"not enough GPU memory|No available memory for the cache blocks|"
                   r"less than desired GPU memory utilization|"
                   r"KV cache is needed, which is larger|CUDA out of memory|"
                   r"must be divisible by tensor parallel size")


def refusal_of(says: str) -> Refusal | None:
    """Of what vLLM says as it refuses to start; None: no such sentence with its numbers."""
    found = _KV.search(says)
    return None if found is None else Refusal(float(found[1]), float(found[2]), int(found[3]))


def is_full(says: str) -> bool:
    """The model itself, or what it works with, does not fit, or cannot be split so."""
    return _FULL.search(says) is not None


# -------------------------------------------------------------------------------- the exit code


LOAD_TABLES = frozenset({"concurrency", "users", "cost", "safe"})


def exit_code(planned: Campaign, done: list[Done]) -> int:
    """Of the whole: 130 > 2 > 3 > 4 > 1 > 5 > 0. Of a workload that asks how much load is safe (by
    its tables, or as it names none) the verdict counts, of the others only that they were
    measured. A ladder passes if one of its loads is safe, also if a higher one killed the server.
    What does not fit is a result."""
    codes = set()
    for key in {(d.cell.server, d.cell.workload, d.cell.prompt_tok) for d in done}:
        own = [d for d in done if (d.cell.server, d.cell.workload, d.cell.prompt_tok) == key]
        seen, w = {d.code for d in own}, planned.workload(key[1])
        ladder = len(w.concurrency or w.rate) > 1
        if ladder and PASS in {d.code for d in own if d.outcome == "done"}:
            seen -= {DIED, SLO_MISSED, INCONCLUSIVE}
        if w.tables and not LOAD_TABLES & set(w.tables):
            seen -= {SLO_MISSED, INCONCLUSIVE}
        codes |= seen or {PASS}
    return next((c for c in PRECEDENCE if c in codes), PASS)
