"""The verdict as data, for whoever decides by it: verdict.json with its published schema, and the
exit code. Everything in it follows from the run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
from msgspec import Struct

from analysis import words
from analysis.frame import Run
from analysis.phrases import daily
from loadgen import exits
from loadgen.errors import PASS, StoreError
from loadgen.judge import Judgement, LoadVerdict
from loadgen.leg import Axis
from loadgen.validity import Measurement

SCHEMA = 2  # 1 had bounds, which did not hold as often as they said
SCHEMA_FILE = Path(__file__).with_name("verdict.schema.json")


class Proof(Struct, frozen=True):
    """What a safe level rests on."""

    runs: int
    good: int
    n: int


class Level(Struct, frozen=True):
    """One leg. A percentile is null where n is too small to have one."""

    leg: str
    value: float
    phase: str
    n: int
    good: int
    load: LoadVerdict
    measurement: Measurement
    died: bool
    reasons: list[str]
    achieved_rps: float | None
    goodput_rps: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p90_s: float | None
    tpot_p99_s: float | None
    e2e_p50_s: float | None
    e2e_p90_s: float | None
    e2e_p99_s: float | None


class Found(Struct, frozen=True):
    """A rule by which a measurement is SUSPECT or INVALID."""

    leg: str
    rule: str
    verdict: Measurement
    says: str
    remedy: str


class Verdict(Struct, frozen=True):
    """verdict.json. Null is "there is none". `passed` is `exit_code` 0; `says` are three sentences,
    `evidence` what they rest on. Of a search: `safe` is the largest safe load, `unsafe` the
    smallest unsafe one, `at_least` says that nothing above `safe` was unsafe, and `daily` what to
    keep to."""

    schema: int
    run: str
    created: str
    model: str
    scenario: str
    simulated: bool
    load: LoadVerdict
    measurement: Measurement
    exit_code: int
    passed: bool
    says: list[str]
    evidence: list[str]
    axis: Axis
    target_frac: float
    confidence: float
    slo: dict[str, dict[str, float | None]]
    safe: float | None
    unsafe: float | None
    at_least: bool
    daily: float | None
    proof: Proof | None
    levels: list[Level]
    findings: list[Found]


def of(run: Run) -> Verdict:
    answer = words.answer(run)
    c, said, code = run.conclusion, answer.verdict, exit_code(run)
    safe = None if run.is_run else c.safe
    proof = None if safe is None or c.proof is None else Proof(
        c.proof.legs, c.proof.good, c.proof.n)
    return Verdict(
        schema=SCHEMA, run=run.manifest.run, created=run.manifest.created,
        model=run.manifest.model, scenario=run.scenario.name, simulated=run.simulated,
        load=said.load, measurement=said.measurement, exit_code=code, passed=code == PASS,
        says=said.three, evidence=said.sentences, axis=run.axis, target_frac=c.target,
        confidence=c.confidence, slo={x.name: {
            k: None if v is None else float(v) for k, v in msgspec.structs.asdict(
                run.scenario.slo_of(x.name)).items()} for x in run.scenario.classes},
        safe=safe, unsafe=None if run.is_run else c.unsafe,
        at_least=not run.is_run and c.at_least,
        daily=None if safe is None else daily(run, safe), proof=proof,
        levels=[_level(j, row) for j, row in zip(
            run.judgements, answer.steps.to_dict("records"), strict=True)],
        findings=[Found(j.leg, f.rule, f.verdict, f.says, f.remedy)
                  for j in run.judgements for f in j.findings])


def _level(j: Judgement, row: Mapping[Any, Any]) -> Level:
    numbers = {name: None if pd.isna(row[name]) else float(row[name])
               for name in Level.__struct_fields__ if name.endswith(("_rps", "_s"))}
    return Level(leg=j.leg, value=j.value, phase=j.phase, n=j.n, good=j.good, load=j.load,
                 measurement=j.measurement, died=j.died, reasons=j.reasons, **numbers)


def encoded(run: Run) -> bytes:
    return msgspec.json.format(msgspec.json.encode(of(run))) + b"\n"


def schema() -> bytes:
    """JSON Schema of verdict.json, as it is shipped in `verdict.schema.json`."""
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema",
             "title": f"verdict.json of loadgen, schema {SCHEMA}", **msgspec.json.schema(Verdict)}
    return msgspec.json.format(msgspec.json.encode(_ordered(found))) + b"\n"


def _ordered(schema: Any) -> Any:
    """The same schema with null last in each choice: which comes first differs between versions
    of msgspec."""
    match schema:
        case dict():
            return {k: _ordered(v) for k, v in schema.items()}
        case list():
            return sorted(map(_ordered, schema), key=lambda x: x == {"type": "null"})
        case _:
            return schema


def write(path: Path, data: bytes) -> Path:
    """A file that was asked for by name. Raises StoreError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as e:
        raise StoreError(f"{path}: cannot be written: {e.strerror or e}") from e
    return path


# ------------------------------------------------------------------------------------- exit codes


def exit_code(run: Run, stop: str | None = None) -> int:
    """`stop`: why one that ran just now stopped."""
    endings = [window.ending for _, window in run.legs]
    return exits.exit_code(run.judgements, None if run.is_run else run.conclusion,
                           endings[-1] if endings else None, stop)


if __name__ == "__main__":
    SCHEMA_FILE.write_bytes(schema())
