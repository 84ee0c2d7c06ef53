"""Journals → what each leg comes to: where its lines are, its digests judged, its part of the
frame; with a million of long streams in mind, so legs are spread over the cores."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from analysis.digest import Column, Digest, Reader, Stretch
from analysis.gaps import Gaps
from loadgen import metrics
from loadgen.headroom import Peak
from loadgen.judge import Criteria, Judgement, ServerSigns, is_due, judge
from loadgen.leg import Leg, Window
from loadgen.record import Outcome
from loadgen.scenario import Scenario
from loadgen.store import Apart, RunFolder

ROWS = 10_000  # rows that are turned into columns at once
SPREAD_BYTES = 96 * 2**20  # of journals from which on a second process is worth its start

FLAGS = ("good", "in_window", "void")
TEXT = ("cls", "outcome", "misses", "error")


class LegTask(Struct, frozen=True):
    """All that it takes to judge a leg."""

    leg: Leg
    window: Window
    signs: ServerSigns
    stretches: Sequence[Stretch]
    scenario: Scenario
    criteria: Criteria
    t0_ns: int
    wrong: Mapping[str, str] = {}  # kinds of error of answers, by where they are kept


class LegResult(Struct, frozen=True):
    """`columns`: of the leg's records, in the journals' order; of texts the codes, and in `texts`
    what they stand for."""

    judgement: Judgement
    peak: Peak
    gaps: Gaps
    columns: Mapping[str, Column]
    texts: Mapping[str, Sequence[str]]
    torn: int


# --------------------------------------------------------------------------------------- index


def index(folder: RunFolder) -> dict[str, list[Stretch]]:
    """Where each leg's records are. Lines that are none are counted in `folder.torn`."""
    found: dict[str, list[Stretch]] = {}
    apart = folder.apart()
    for path in sorted(folder.path.glob("records-*.jsonl")):
        for (leg, shift_ns), start, stop in _stretches(folder, path, apart):
            found.setdefault(leg, []).append(Stretch(path, start, stop, shift_ns))
    return found


def _stretches(folder: RunFolder, path: Path,
               apart: Apart) -> Iterator[tuple[tuple[str, int], int, int]]:
    now: tuple[str, int] | None = None
    begun = last = 0
    for line, end in folder.lines(path, 0):
        name = _leg_of(line)
        if name is None:  # a header, or no record
            record = None if line.startswith(b'{"schema":') else folder.decoded(line)
            if record is None:
                if now is not None:
                    yield now, begun, last
                now = None
                continue
            name = record.leg
        start = end - len(line)
        here = apart.of(path.name, start, name) if apart.moves else (name, 0)
        if here != now:
            if now is not None:
                yield now, begun, last
            now, begun = here, start
        last = end
    if now is not None:
        yield now, begun, last


def _leg_of(line: bytes) -> str | None:
    """The leg that stands first in a line, as the recorder writes it."""
    if not line.startswith(b'{"leg":"'):
        return None
    name = line[8:line.find(b'"', 8)]
    return None if b"\\" in name else name.decode("utf-8", "replace")


# ------------------------------------------------------------------------------------- judging


def judged(task: LegTask) -> LegResult:
    """A leg from its lines to its verdicts and its part of the frame."""
    collects = gc.isenabled()
    gc.disable()  # records make no cycles, and looking for them again and again takes its time
    try:
        return _judged(task)
    finally:
        if collects:
            gc.enable()


def _judged(task: LegTask) -> LegResult:
    reader = Reader(task.stretches, task.window)
    records = [r for batch in reader.batches() for r in batch]
    if task.wrong:
        for r in records:
            r.wrong = task.wrong.get(r.output_ref or "")
    parts = [_columns(records[i:i + ROWS], task) for i in range(0, len(records), ROWS)]
    texts, said = _texts(records, task.scenario)
    columns = {name: np.concatenate([np.empty(0, kind), *(p[name] for p in parts)])
               for name, kind in _KIND.items()}
    columns |= {**said, "good": said["misses"] == 0}
    judgement = judge(task.leg, task.window, records, task.signs, task.scenario, task.criteria)
    return LegResult(judgement, reader.seconds.peak(), reader.pool.gaps(), columns,
                     texts, reader.torn)


NUMBERS = ("session", "turn", "due_s", "sent_s", "end_s", "ttft_s", "ttft_service_s", "tpot_s",
           "itl_max_s", "e2e_s", "lateness_s", "output_tok", "prompt_tok", "cached_tok",
           "window_tok", "visible_s")
_KIND: dict[str, Any] = {**dict.fromkeys(NUMBERS, float), "in_window": bool, "void": bool}


def _columns(records: Sequence[Digest], task: LegTask) -> dict[str, Column]:
    """The numbers of these records; NaN where there is none. What they mean is `metrics`' affair,
    whose functions do not care whether they get a number or an array; here they get arrays."""
    def column(name: str) -> Column:
        return np.array([getattr(r, name) for r in records], float)

    since = metrics.seconds_between
    at = {x: np.array([np.nan if (ns := getattr(r, f"{x}_ns")) is None else ns - task.t0_ns
                       for r in records], float)
          for x in ("due", "sent", "first", "first_visible", "end")}
    events, output = column("n_events"), column("output_tok")
    many = (events >= 2) & (output >= 2)
    ok = np.array([r.outcome is Outcome.OK for r in records], bool)
    nan = np.full(len(records), np.nan)
    longest = np.array([r.gap_max_us for r in records], float)
    window = task.window
    return {
        "session": column("session"), "turn": column("turn"),
        **{f"{x}_s": since(np.zeros(len(records)), at[x]) for x in ("due", "sent", "end")},
        "visible_s": since(at["due"], at["first_visible"]),
        "ttft_s": since(at["due"], at["first"]), "ttft_service_s": since(at["sent"], at["first"]),
        "tpot_s": np.divide(column("sum_us") / 1e6, output - 1, where=many, out=nan.copy()),
        "itl_max_s": longest / 1e6,
        "e2e_s": np.where(ok, since(at["due"], at["end"]), nan),
        "lateness_s": since(at["due"], at["sent"]), "output_tok": output,
        **{x: column(x) for x in ("prompt_tok", "cached_tok", "window_tok")},
        "in_window": np.array([is_due(window, r) for r in records], bool),
        "void": np.array([window.is_void(r.due_ns, r.end_ns) for r in records], bool)
        if window.stalls else np.zeros(len(records), bool)}


def _texts(records: Sequence[Digest],
           mix: Scenario) -> tuple[dict[str, list[str]], dict[str, Column]]:
    """Of each text column what there is, and which of it each record has. Of the misses the first
    one is none."""
    slos = {c.name: mix.slo_of(c.name) for c in mix.classes}
    known: dict[str, dict[str, int]] = {x: {} for x in TEXT}
    known["misses"][""] = 0
    codes = {}
    for name, values in (
            ("cls", (r.cls for r in records)), ("outcome", (r.outcome.value for r in records)),
            ("error", (r.error or "" for r in records)),
            ("misses", (", ".join(metrics.misses(r, slos[r.cls])) for r in records))):
        own = known[name]
        codes[name] = np.fromiter((own.setdefault(x, len(own)) for x in values), np.int32,
                                  len(records))
    return {name: list(own) for name, own in known.items()}, codes


def all_judged(tasks: Sequence[LegTask]) -> list[LegResult]:
    """Every leg, in the tasks' order; large runs on all cores, the largest legs first."""
    sizes = [sum(s.stop - s.start for s in t.stretches) for t in tasks]
    # gevent's patches do not go with a pool; whoever brought them has small runs
    if len(tasks) < 2 or sum(sizes) < SPREAD_BYTES or cores() < 2 or "gevent" in sys.modules:
        return [judged(t) for t in tasks]
    order = sorted(range(len(tasks)), key=lambda i: -sizes[i])
    found: dict[int, LegResult] = {}
    with pool(min(cores(), len(tasks))) as workers:
        found = dict(zip(order, workers.map(judged, [tasks[i] for i in order]), strict=True))
    return [found[i] for i in range(len(tasks))]


def pool(processes: int) -> ProcessPoolExecutor:
    """Fresh processes: a fork would share locks with whatever threads libraries have."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def texts(results: Iterable[LegResult], name: str) -> Column:
    """A text column of all legs, of Python's strings."""
    return np.concatenate([np.empty(0, object), *(
        np.array(r.texts[name], object)[r.columns[name]] for r in results if r.texts[name])])
