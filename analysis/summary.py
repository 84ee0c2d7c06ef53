"""What a run folder gets at its end: records.parquet, the report, junit.xml and summary.md for
build servers, verdict.json, summary.json."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from analysis import (
    ceiling,
    checked,
    ci,
    deaths,
    frame,
    gate,
    generator,
    gpus,
    journals,
    knee,
    limits,
    otherwise,
    retention,
    throttled,
    visible,
    words,
)
from analysis.frame import Run
from loadgen import answers
from loadgen.scenario import Slo
from loadgen.store import RunFolder

SCHEMA = 1


def finish(path: Path, slo: Slo | None = None, report: bool = True) -> Run:
    """Loads the run in `path` and writes all that follows from it; summary.json comes last, so
    that one without it did not finish. Raises StoreError, ScenarioError."""
    answers.complete(RunFolder(path))
    with _parquet(path):
        run = frame.load(path, slo)
    if report:
        from analysis import report as reports  # noqa: PLC0415  (Altair: 0.4 s)

        reports.write(run)
    run.folder.write("junit.xml", ci.junit(run).encode())
    run.folder.write("summary.md", ci.markdown(run).encode())
    run.folder.write("verdict.json", gate.encoded(run))
    run.folder.write("summary.json", msgspec.json.format(msgspec.json.encode(summarise(run))))
    return run


@contextmanager
def _parquet(path: Path) -> Iterator[None]:
    """Meanwhile records.parquet is written: of a large run on another core."""
    from analysis import parquet  # noqa: PLC0415  (0.1 s)

    size = sum(x.stat().st_size for x in path.glob("records-*.jsonl"))
    if size < journals.SPREAD_BYTES or journals.cores() < 2 or "gevent" in sys.modules:
        yield
        parquet.write(path)
        return
    with journals.pool(1) as worker:
        written = worker.submit(parquet.write, path)
        yield
        written.result()


def summarise(run: Run) -> dict[str, Any]:
    """Everything that is concluded of a run, as JSON data: absent is null, durations are s."""
    answer = words.answer(run)
    found: dict[str, Any] = _plain({
        "schema": SCHEMA, "run": run.manifest.run, "model": run.manifest.model,
        "simulated": run.simulated, "verdict": msgspec.to_builtins(answer.verdict),
        "slo": {c.name: msgspec.structs.asdict(run.scenario.slo_of(c.name))
                for c in run.scenario.classes},
        "conclusion": None if run.is_run else _conclusion(run),
        "knee": None if answer.knee is None else {
            **msgspec.to_builtins(answer.knee), "says": knee.says(answer.knee)},
        "ceiling": None if answer.ceiling is None else {
            **msgspec.to_builtins(answer.ceiling), "says": ceiling.says(answer.ceiling)},
        "binding": None if answer.binding is None else {
            **msgspec.to_builtins(answer.binding), "sentence": limits.says(answer.binding)},
        "steps": answer.steps.to_dict("records"),
        "classes": {j.leg: {c: {"good": good, "n": n} for c, (good, n) in j.classes.items()}
                    for j in run.judgements},
        "findings": [{"leg": j.leg, **msgspec.to_builtins(f)}
                     for j in run.judgements for f in j.findings],
        "server": deaths.figures(run), "otherwise": msgspec.to_builtins(otherwise.of(run)),
        "gpu": gpus.figures(run), "answers": checked.figures(run),
        "retention": retention.of(run), "first_visible": visible.of(run),
        "throttled": throttled.of(run),
        "generator": generator.figures(run), "torn_lines": run.torn})
    return found


def _conclusion(run: Run) -> dict[str, Any]:
    """Without a proof's bounds: they decided, and hold less often than they say."""
    found: dict[str, Any] = msgspec.to_builtins(run.conclusion)
    if found["proof"] is not None:
        found["proof"] |= {"lower": None, "upper": None}
    return found


def _plain(value: Any) -> Any:
    """`value` with numpy's numbers as Python's, and NaN and infinity as None."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):  # and numpy's, and Seconds
        return float(value) if math.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value
