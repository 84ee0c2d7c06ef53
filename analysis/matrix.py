"""A campaign's folder: its cells with their runs, and what the tables share: a table with its
note, intervals over repeats, and what stands where there is no run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from msgspec import Struct
from scipy import stats

from analysis import frame, steps
from analysis.frame import Run
from loadgen import cells
from loadgen.campaign import Campaign, ServerRow, TableName, Workload, is_simulated
from loadgen.cells import Done
from loadgen.record import Outcome

CONFIDENCE = 0.95
PLUS_MINUS = "± "  # a column of this name before another's is the half-width of its interval


class Measured(Struct, frozen=True, eq=False):
    """A cell with what is known of it. `row`: of `steps.table`, of a run's only leg."""

    done: Done
    server: ServerRow
    work: Workload
    run: Run | None
    row: dict[str, Any]

    @property
    def sample(self) -> pd.DataFrame:
        """Requests that count, of all legs."""
        assert self.run is not None
        f = self.run.frame
        return f[f["in_window"] & ~f["void"]]

    @property
    def answers(self) -> pd.DataFrame:
        f = self.sample
        return f[f["outcome"] == Outcome.OK.value]

    @property
    def died(self) -> str | None:
        """How the server died in it."""
        if self.run is None:
            return None
        return next((w.note or "the server died" for _, w in self.run.legs
                     if w.ending == "server_died"), None)


class Matrix(Struct, frozen=True, eq=False):
    folder: Path
    campaign: Campaign
    cells: list[Measured]

    @property
    def simulated(self) -> bool:
        return any(m.run is not None and m.run.simulated for m in self.cells) or any(
            is_simulated(self.campaign, s) for s in self.campaign.servers)

    def of(self, table: TableName) -> list[Measured]:
        """Cells of the workloads that are shown there."""
        return [m for m in self.cells if table in m.work.tables]


class Table(Struct, frozen=True, eq=False):
    """`frame`: numbers with their units in the columns' names, texts where there is none.
    `note`: what the columns mean, as plain text."""

    name: str
    title: str
    frame: pd.DataFrame
    note: str = ""


def load(folder: Path) -> Matrix:
    """Raises StoreError."""
    kept = cells.read(folder)
    return Matrix(folder, kept.campaign, [_measured(folder, kept.campaign, d)
                                          for d in kept.cells])


def _measured(folder: Path, campaign: Campaign, done: Done) -> Measured:
    path = folder / done.cell.folder
    server, work = campaign.server(done.cell.server), campaign.workload(done.cell.workload)
    if done.outcome not in ("done", "stopped") or not (path / "manifest.json").exists():
        return Measured(done, server, work, None, {})
    run = frame.load(path)
    table = steps.table(run)
    alone = not table.empty and run.is_run
    row = {str(k): v for k, v in table.iloc[-1].items()} if alone else {}
    return Measured(done, server, work, run, row)


# -------------------------------------------------------------------------------- over repeats


def interval(values: Iterable[float | None]) -> tuple[float | None, float | None, int]:
    """Mean, half-width of Student's 95 % interval, and n; absent values are left out."""
    known = np.array([v for v in values if v is not None and not pd.isna(v)], float)
    if not len(known):
        return None, None, 0
    half = None
    if len(known) > 1:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(known) - 1)
                     * known.std(ddof=1) / np.sqrt(len(known)))
    return float(known.mean()), half, len(known)


def spread(column: str, values: Iterable[float | None]) -> dict[str, float | None]:
    """A column and its interval's."""
    mean, half, _ = interval(values)
    return {column: mean, f"{PLUS_MINUS}{column}": half}


def grouped(found: Sequence[Measured], key: Callable[[Measured], Any],
            ) -> list[tuple[Any, list[Measured]]]:
    """In the order of the file: the repeats of what is one row."""
    groups: dict[Any, list[Measured]] = {}
    for m in found:
        groups.setdefault(key(m), []).append(m)
    return list(groups.items())


def by_server(found: Sequence[Measured]) -> list[tuple[str, list[Measured]]]:
    return grouped(found, lambda m: m.server.name)


def per_value(found: Sequence[Measured], value: Callable[[Measured], Any],
              ) -> list[tuple[tuple[str, Any], list[Measured]]]:
    """By server and a value; a server of which nothing ran has one row, not one per value."""
    live = {m.server.name for m in found if m.run is not None}
    return grouped(found, lambda m: (m.server.name, value(m) if m.server.name in live else None))


def ran(group: Iterable[Measured]) -> list[Measured]:
    return [m for m in group if m.run is not None]


def frame_of(rows: Sequence[Mapping[Any, Any]]) -> pd.DataFrame:
    """Columns that nobody has a value for are left out, but for the first; notes stand last."""
    found = pd.DataFrame(rows)
    found = found[[*(c for c in found if c != "note"), *(c for c in found if c == "note")]]
    empty = [c for c in found.columns[1:] if found[c].isna().all() or (found[c] == "").all()]
    return found.drop(columns=empty)


# ---------------------------------------------------------------------------------- no figures


def why_not(group: Sequence[Measured]) -> str:
    """What stands beside the figures, or in their place."""
    said = dict.fromkeys(x for m in group if (x := _why(m)))
    return "; ".join(said)


def _why(m: Measured) -> str:
    done = m.done
    if done.outcome == "does not fit":
        if done.refusal is None:
            return f"does not fit: {_short(done.says)}"
        r = done.refusal
        return (f"does not fit: needs {r.needs_gib:g} GiB of KV cache per GPU, has {r.has_gib:g}; "
                f"{r.longest_tok:,} tokens would fit")
    if done.outcome == "not simulated":
        return f"not simulated: {done.says}"
    if done.outcome == "not started":
        return f"did not start: {_short(done.says)}"
    if m.run is None:
        return f"not run: {_short(done.says)}"
    if m.died is not None:
        return f"the server died: {_short(m.died)}"
    if not m.run.legs or (done.outcome == "stopped"):
        return f"stopped: {_short(done.says)}"
    if m.row and m.row["n"] and m.answers.empty:
        said = [x for x in m.sample["error"] if isinstance(x, str) and x]
        return "no answer: " + _short(said[0] if said else m.row["outcomes"])
    return "measurement invalid" if m.row.get("measurement") == "INVALID" else ""


def _short(text: str, most: int = 160) -> str:
    first = text.strip().splitlines()[0] if text.strip() else "no reason was given"
    return first if len(first) <= most else f"{first[:most]}…"
