"""What a campaign's folder gets at its end, from its run folders alone: report.html with charts,
report.md, and each table as CSV and Parquet."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from altair.utils import schemapi

from analysis import (
    campaign_answers,
    campaign_charts,
    campaign_load,
    campaign_tables,
    campaign_words,
    charts,
    matrix,
    report,
)
from analysis.matrix import PLUS_MINUS, Matrix, Table
from loadgen.campaign import TableName

TABLES: dict[TableName, Callable[[Matrix], Table]] = {  # in the order of the report
    "concurrency": campaign_load.concurrency, "users": campaign_load.users,
    "safe": campaign_load.safe, "cost": campaign_load.cost,
    "speed": campaign_tables.speed, "ttft": campaign_tables.ttft,
    "tasks": campaign_tables.tasks, "utilisation": campaign_load.utilisation,
    "long_text": campaign_tables.long_text, "longest_context": campaign_tables.longest_context,
    "document": campaign_tables.document, "input_length": campaign_tables.input_length,
    "longest_output": campaign_tables.longest_output, "structured": campaign_answers.structured,
    "retention": campaign_answers.retention, "features": campaign_answers.features,
    "throttled": campaign_load.throttled}
SIMULATED = ("Simulated: figures of the embedded simulator, not of hardware. It has no noise of "
             "its own, so that an interval over repeats shows only the chance of lengths and "
             "arrivals.")
WORDS = frozenset({"note", "options", "why it ended", "died of", "repeats itself", "workload",
                   "task", "model", "back end", "weights", "axis", "verdict"})  # columns of them
LONG = 30  # letters of a cell that is broken into lines
TONES = {"yes": "safe", "no": "unsafe", "near": "suspect"}


def write(folder: Path) -> list[str]:
    """Writes all of it; returns the plain words. Raises StoreError."""
    found = matrix.load(folder)
    tables = of(found)
    said = campaign_words.sentences(found)
    out = folder / "tables"
    out.mkdir(exist_ok=True)
    for old in (*out.glob("*.csv"), *out.glob("*.parquet")):
        old.unlink()
    for t in tables:
        labelled = t.frame.assign(simulated=found.simulated)
        labelled.to_csv(out / f"{t.name}.csv", index=False)
        labelled.to_parquet(out / f"{t.name}.parquet", index=False)
    (folder / "report.md").write_text(markdown(found, tables, said), encoding="utf-8")
    (folder / "report.html").write_text(html(found, tables, said), encoding="utf-8")
    return said


def of(found: Matrix) -> list[Table]:
    """Those that the campaign asks for, and what every one has."""
    wanted = {t for w in found.campaign.workloads for t in w.tables}
    tables = [make(found) for name, make in TABLES.items() if name in wanted]
    tables += [campaign_tables.memory(found), campaign_tables.servers(found)]
    return [t for t in tables if not t.frame.empty]


# ------------------------------------------------------------------------------------ as texts


def title(found: Matrix, t: Table) -> str:
    return f"{t.title} (simulated)" if found.simulated else t.title


def shown(t: Table) -> tuple[list[str], list[list[str]]]:
    """Heads and rows as people read them: an interval stands in its figure's cell."""
    heads = [c for c in map(str, t.frame) if not c.startswith(PLUS_MINUS)]
    return heads, [[_cell(r[c], r.get(f"{PLUS_MINUS}{c}")) for c in heads]
                   for r in t.frame.to_dict("records")]


def _cell(value: Any, half: Any = None) -> str:
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return "–"
    if isinstance(value, str):
        return value or "–"
    said = _number(float(value))
    if half is None or pd.isna(half):
        return said
    same = abs(half) < 1e-9 * abs(value)  # as of a simulator without chance
    return f"{said} ± {'0' if same else _number(float(half), 2)}"


def _number(value: float, digits: int = 3) -> str:
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) < 0.01:
        return f"{value:.1g}"
    return f"{value:#.{digits}g}".rstrip(".")


def markdown(found: Matrix, tables: list[Table], said: list[str]) -> str:
    lines = [f"# {found.campaign.name}{' (simulated)' if found.simulated else ''}", ""]
    for text in (found.campaign.description, SIMULATED if found.simulated else ""):
        lines += [text, ""] if text else []
    for t in tables:
        heads, rows = shown(t)
        if heads[-1] == "note":
            rows = [[*r[:-1], "–" if _is_said(r) else r[-1]] for r in rows]
        lines += [f"## {title(found, t)}", "", f"| {' | '.join(heads)} |",
                  "|" + "---|" * len(heads),
                  *("| " + " | ".join(c.replace("|", "\\|") for c in r) + " |" for r in rows), ""]
        lines += [t.note, ""] if t.note else []
    lines += ["## What to deploy", "", *(f"- {x}" for x in said), ""]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- HTML


def html(found: Matrix, tables: list[Table], said: list[str]) -> str:
    drawn: list[charts.Chart] = []
    with ThreadPoolExecutor(1) as beside, schemapi.debug_mode(False):
        library = beside.submit(report._library)
        body = "\n".join([*_head(found, said), *(x for t in tables
                                                 for x in _section(found, t, drawn)), *_end(said)])
        specs = [charts.spec(c.properties(width="container")) for c in drawn]
        return report._page(f"Campaign {found.campaign.name}", body, specs, library.result())


def _head(found: Matrix, said: list[str]) -> Iterator[str]:
    c = found.campaign
    ran = [m for m in found.cells if m.run is not None]
    about = [f"campaign {c.name}", c.description, f"{len(c.servers)} servers",
             f"{len(ran)} runs of {len(found.cells)} cells"]
    yield f'<p class="about">{escape(" · ".join(x for x in about if x))}</p>'
    mark = '<span class="badge note">SIMULATED SERVERS</span>' if found.simulated else ""
    headline, _, reason = said[0].partition(": ")
    if reason != said[0]:
        reason = reason[:1].upper() + reason[1:]
    rest = [reason, *_about(found, headline, said)]
    verdicts = [x for x in said if x.partition(": ")[2].startswith(VERDICTS)]
    if said[0] in verdicts:
        headline, rest = "What each server can take", verdicts[:SHOWN]
    rest += said[-1:] if found.simulated and len(said) > 2 else []
    text = "".join(f"<p>{report._unbroken(escape(x))}</p>" for x in rest if x)
    yield (f'<section class="verdict unresolved">{mark}<h1>{escape(headline)}</h1>{text}'
           "</section>")
    if found.simulated:
        yield f'<p class="muted" style="margin-top:14px">{escape(SIMULATED)}</p>'


VERDICTS = ("SAFE", "UNSAFE", "UNRESOLVED")
SHOWN = 4  # of them, in the headline's box; all stand at the end


def _about(found: Matrix, headline: str, said: list[str]) -> list[str]:
    """What else is said of the server of the headline; of none: what is said next."""
    named = max((s.name for s in found.campaign.servers if s.name in headline), key=len, default="")
    own = [x for x in said[1:] if named and x.startswith((f"{named}, ", f"{named}: "))]
    return (own or said[1:])[:1]


def _section(found: Matrix, t: Table, drawn: list[charts.Chart]) -> Iterator[str]:
    yield f'<h2 id="{t.name}">{escape(title(found, t))}</h2>'
    figures = [report._figure(drawn, x) for x in campaign_charts.of(t)]
    yield f'<div class="pair">{"".join(figures)}</div>' if len(figures) > 1 else "".join(figures)
    yield _table(t)
    yield f'<p class="muted">{report._unbroken(escape(t.note))}</p>' if t.note else ""


def _table(t: Table) -> str:
    heads, rows = shown(t)
    notes = [""] * len(rows)
    if heads[-1] == "note":
        notes = ["" if _is_said(r) else r[-1] for r in rows]
        heads, rows = heads[:-1], [r[:-1] for r in rows]
    top = "".join(f'<th class="words">{escape(h)}</th>' if h in WORDS else
                  f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(_tr(heads, r, note) for r, note in zip(rows, notes, strict=True))
    return (f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody>'
            "</table></div>")


def _is_said(row: list[str]) -> bool:
    """There is no note, or it is what another cell says."""
    return row[-1] == "–" or any(c.startswith(row[-1].removesuffix(" met the SLO"))
                                 for c in row[1:-1])


def _tr(heads: list[str], row: list[str], note: str) -> str:
    """A row; its note stands below, over the whole width, or in the place of what is not there."""
    wide = f'<td class="text" colspan="{len(heads) - 1}">{escape(note)}</td></tr>'
    if note and set(row[1:]) <= {"–", "not run"}:
        return f"<tr><td>{escape(row[0])}</td>{wide}"
    cells = "".join(_td(h, c) for h, c in zip(heads, row, strict=True))
    return f"<tr>{cells}</tr>" + (f'<tr class="muted"><td></td>{wide}' if note else "")


def _td(head: str, cell: str) -> str:
    kind, text = "", escape(cell)
    if head in WORDS:
        kind = "words text" if len(cell) > LONG else "words"
    if head == "options":  # which are not to be broken where they have a hyphen
        text = " ".join(f"<span>{escape(x)}</span>" for x in cell.split(" "))
    if head.endswith("?"):
        kind = TONES.get(cell.partition(":")[0].split(" ")[0], "")
    return f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>"


def _end(said: list[str]) -> Iterator[str]:
    yield '<h2 id="deploy">What to deploy</h2>'
    yield "".join(f"<p>{report._unbroken(escape(x))}</p>" for x in said)
