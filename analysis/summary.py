"""What a run folder gets at its end: records.parquet, the report, junit.xml and summary.md for
build servers, summary.json."""

import itertools
import math
from pathlib import Path
from typing import Any

import msgspec

from analysis import ci, deaths, frame, generator, gpus, knee, words
from analysis.frame import Run
from loadgen.errors import StoreError
from loadgen.record import RequestRecord
from loadgen.scenario import Slo
from loadgen.store import RunFolder

SCHEMA = 1
BATCH = 2000  # records turned into columns at once: memory stays flat however long the run


def finish(path: Path, slo: Slo | None = None, report: bool = True) -> Run:
    """Loads the run in `path` and writes all that follows from it; summary.json comes last, so
    that one without it did not finish. Raises StoreError, ScenarioError."""
    run = frame.load(path, slo)
    write_parquet(run)
    if report:
        from analysis import report as reports  # noqa: PLC0415  (Altair: 0.4 s)

        reports.write(run)
    run.folder.write("junit.xml", ci.junit(run).encode())
    run.folder.write("summary.md", ci.markdown(run).encode())
    run.folder.write("summary.json", msgspec.json.format(msgspec.json.encode(summarise(run))))
    return run


def summarise(run: Run) -> dict[str, Any]:
    """Everything that is concluded of a run, as JSON data: absent is null, durations are s."""
    answer = words.answer(run)
    found: dict[str, Any] = _plain({
        "schema": SCHEMA, "run": run.manifest.run, "model": run.manifest.model,
        "simulated": run.simulated, "verdict": msgspec.to_builtins(answer.verdict),
        "slo": {c.name: msgspec.structs.asdict(run.scenario.slo_of(c.name))
                for c in run.scenario.classes},
        "conclusion": None if run.is_run else msgspec.to_builtins(run.conclusion),
        "knee": None if answer.knee is None else {
            **msgspec.to_builtins(answer.knee), "says": knee.says(answer.knee)},
        "steps": answer.steps.to_dict("records"),
        "classes": {j.leg: {c: {"good": good, "n": n} for c, (good, n) in j.classes.items()}
                    for j in run.judgements},
        "findings": [{"leg": j.leg, **msgspec.to_builtins(f)}
                     for j in run.judgements for f in j.findings],
        "server": deaths.figures(run), "gpu": gpus.figures(run),
        "generator": generator.figures(run), "torn_lines": run.torn})
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


def write_parquet(run: Run) -> Path:
    """records.parquet: one row per record as it was journalled (stamps in ns, gaps as a list of
    µs), by rename. Raises StoreError."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    texts = ("leg", "cls", "outcome", "stamp_kind", "tok_source", "finish_reason", "error",
             "output_ref")
    lists = ("gaps_us", "reads", "event_tok")
    schema = pa.schema([
        (f.name, pa.string() if f.name in texts else pa.list_(pa.int64()) if f.name in lists
         else pa.int64()) for f in msgspec.structs.fields(RequestRecord)])
    target = run.folder.path / "records.parquet"
    temporary = target.with_name(".records.parquet.tmp")
    records = RunFolder(run.folder.path).records()
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            while batch := [{**msgspec.structs.asdict(r), "outcome": r.outcome.value}
                            for r in itertools.islice(records, BATCH)]:
                writer.write_table(pa.Table.from_pylist(batch, schema))
        temporary.replace(target)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"{target}: cannot be written: {e.strerror or e}") from e
    return target
