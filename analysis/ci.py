"""What a build server reads of a run: JUnit XML, and a summary in Markdown for the job's page.

Pure: run → text. Names, errors and reasons come from servers and files of others, so every text is
escaped, and what XML forbids is left out.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal
from xml.etree import ElementTree

import pandas as pd
from msgspec import Struct

from analysis import phrases, words
from analysis.frame import Run
from analysis.steps import duration, number, percent
from loadgen.judge import Judgement

Result = Literal["passed", "failure", "error", "skipped"]

# https://www.w3.org/TR/xml/#charsets: all else may not stand in a document, not even escaped
FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
MARKUP = re.compile(r"[&<>|\\`*_~\[\]$]")
NUMBERS = ("n", "good", "achieved_rps", "goodput_rps", "ttft_p50_s", "tpot_p50_s", "e2e_p50_s")


class Case(Struct, frozen=True):
    """A testcase. `says` is a line; `more` stands below it."""

    name: str
    time_s: float
    result: Result
    says: str
    more: list[str]
    properties: Mapping[str, str]


# ---------------------------------------------------------------------------------------- JUnit


def junit(run: Run) -> str:
    """A testsuite with a testcase for each leg and one for the verdict, which passes exactly if
    the run exits with 0. UNSAFE is a failure, INVALID, a death and an interrupt are errors,
    UNRESOLVED is skipped. Of a search that found its safe level no leg fails: to find it, levels
    beyond had to."""
    cases = [*_legs(run), _verdict(run)]
    results = [c.result for c in cases]
    root = ElementTree.Element("testsuites")
    suite = _element(
        root, "testsuite", name=run.manifest.run, tests=str(len(cases)),
        failures=str(results.count("failure")), errors=str(results.count("error")),
        skipped=str(results.count("skipped")), time=f"{sum(c.time_s for c in cases):.3f}",
        timestamp=run.manifest.created)
    _properties(suite, {
        "model": run.manifest.model, "scenario": run.scenario.name, "seed": str(run.manifest.seed),
        "simulated": str(run.simulated).lower(), "target_frac": f"{run.criteria.target:g}"})
    owner = ".".join(x.replace(".", "_") for x in ("loadgen", run.scenario.name,
                                                  run.manifest.model))
    for c in cases:
        item = _element(suite, "testcase", classname=owner, name=c.name, time=f"{c.time_s:.3f}")
        _properties(item, c.properties)
        out = (_element(item, "system-out") if c.result == "passed"
               else _element(item, c.result, message=c.says))
        out.text = _allowed("\n".join([c.says, *c.more]))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(
        root, encoding="unicode") + "\n"


def _legs(run: Run) -> list[Case]:
    found = not run.is_run and run.conclusion.safe is not None
    rows = words.answer(run).steps.to_dict("records")
    cases = []
    for (leg, window), j, row in zip(run.legs, run.judgements, rows, strict=True):
        result = _result(j)
        kind = "INVALID" if j.measurement == "INVALID" else j.load
        cases.append(Case(
            leg.id, (window.end_ns - window.t0_ns) / 1e9,
            "skipped" if found and result != "passed" else result,
            f"{kind} at {phrases.load_of(run, j.value)}: {'; '.join(j.reasons)}",
            [f"{f.verdict}: {f.says}. Remedy: {f.remedy}." for f in j.findings],
            {x: f"{row[x]:.6g}" for x in NUMBERS if pd.notna(row[x])}))
    return cases


def _result(j: Judgement) -> Result:
    if j.measurement == "INVALID" or j.died:
        return "error"
    return "passed" if j.load == "SAFE" else "failure" if j.load == "UNSAFE" else "skipped"


def _verdict(run: Run) -> Case:
    """The whole run, as its exit code has it."""
    says, *more = words.verdict(run)
    verdict, c = words.answer(run).verdict, run.conclusion
    judged = run.judgements if run.is_run else run.judgements[-1:]
    result: Result = "failure" if verdict.load == "UNSAFE" else "skipped"
    if verdict.measurement == "INVALID" or run.legs[-1][1].ending == "interrupted":
        result = "error"
    elif verdict.load == "SAFE":
        result = "passed"
    elif any(j.died for j in judged):
        result = "error"
    numbers = {"safe": c.safe, "unsafe": c.unsafe, "n": c.proof and c.proof.n}
    return Case("verdict", 0.0, result, says, more, {} if run.is_run else {
        k: f"{v:.6g}" for k, v in numbers.items() if v is not None})


def _element(parent: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
    return ElementTree.SubElement(parent, tag, {k: _allowed(v) for k, v in attributes.items()})


def _properties(parent: ElementTree.Element, values: Mapping[str, str]) -> None:
    if values:
        inner = _element(parent, "properties")
        for name, value in values.items():
            _element(inner, "property", name=name, value=value)


def _allowed(text: str) -> str:
    return FORBIDDEN.sub("", text)


# ------------------------------------------------------------------------------------- Markdown


HEADS = ("leg", "n", "met the SLO", "req/s", "TTFT p50", "TPOT p50", "E2E p50", "errors", "verdict")


def markdown(run: Run) -> str:
    """The verdict in one line, the table of legs, reasons with the knee, findings."""
    says, *reasons = words.verdict(run)
    m = run.manifest
    about = (f"Model {m.model}", str(m.server.get("kind", "")), f"mix {run.scenario.name}",
             f"run {m.run}")
    parts = [f"### {plain(says)}", plain(" · ".join(x for x in about if x))]
    if run.legs:
        lines = [HEADS, ("---", *["---:"] * (len(HEADS) - 2), "---"),
                 *(_cells(r) for r in words.answer(run).steps.to_dict("records"))]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    parts.append("\n".join(f"- {plain(x)}" for x in reasons))
    parts.append("\n".join(
        f"- **{f.verdict}**, {plain(f'{j.leg}: {f.says}. Remedy: {f.remedy}.')}"
        for j in run.judgements for f in j.findings))
    return "\n\n".join(x for x in parts if x) + "\n"


def _cells(r: Mapping[Any, Any]) -> list[str]:
    """A row of `steps.table`."""
    verdict = r["load"] if r["measurement"] == "VALID" else f"{r['load']}, {r['measurement']}"
    return [plain(str(x)) for x in (
        r["leg"], r["n"], percent(r["attainment_frac"]), number(r["achieved_rps"]),
        *(duration(r[f"{x}_p50_s"]) for x in ("ttft", "tpot", "e2e")),
        r["errors"], "INVALID" if r["measurement"] == "INVALID" else verdict)]


def plain(text: str) -> str:
    """Text that is nothing but text, on one line: a character reference is never structure
    (https://spec.commonmark.org/0.31.2/#entity-and-numeric-character-references)."""
    return MARKUP.sub(lambda x: f"&#{ord(x[0])};", " ".join(_allowed(text).split()))
