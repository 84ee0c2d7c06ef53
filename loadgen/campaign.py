"""A campaign: a list of sweeps and runs, one after the other, into one folder. What is complete is
not run again; a run whose command has changed since is refused, never mixed in.

    name = "gpus"
    [[runs]]
    name = "4090d"
    command = "sweep mixed --max-concurrency 64 --budget 2m -- --gpu 4090d"
"""

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from loadgen.errors import ScenarioError, StoreError
from loadgen.scenario import convert
from loadgen.store import RunFolder
from loadgen.target import without_secrets

CODES = "exit-codes.json"
COMPLETE = frozenset({0, 1, 5})  # came to a verdict, or to "inconclusive"; others are run again

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,60}$")]


class PlannedRun(Struct, frozen=True, forbid_unknown_fields=True):
    """One run: the words after `loadgen`, without --out."""

    name: Name
    command: str


class Campaign(Struct, frozen=True, forbid_unknown_fields=True):
    name: Name
    runs: Annotated[tuple[PlannedRun, ...], Meta(min_length=1)]
    description: str = ""


def load(path: Path) -> Campaign:
    """The campaign of a file, checked. Raises ScenarioError."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ScenarioError(f"{path}: {e}") from e
    campaign = convert(raw, Campaign, str(path))
    names = [r.name for r in campaign.runs]
    if len(set(names)) < len(names):
        raise ScenarioError(f"{path}: two runs have one name ({', '.join(names)})")
    for r in campaign.runs:
        words = words_of(r)
        if words[:1] not in (["sweep"], ["run"]) or any(
                re.match(r"--out(=|$)", w) for w in words):
            raise ScenarioError(f"{path}: run {r.name}: command must begin with sweep or run, and "
                                "leave --out to the campaign")
    return campaign


def words_of(run: PlannedRun) -> list[str]:
    try:
        return shlex.split(run.command)
    except ValueError as e:
        raise ScenarioError(f"run {run.name}: command: {e}") from e


def execute(campaign: Campaign, out: Path, invoke: Callable[[list[str]], int],
            say: Callable[[str], None]) -> Iterator[tuple[PlannedRun, int, bool]]:
    """Each run with its exit code, and whether it was run now: one that came to a verdict before
    is not. Raises StoreError."""
    codes = _codes(out)
    for r in campaign.runs:
        folder, words = out / r.name, words_of(r)
        command = ["loadgen", *without_secrets(words)]
        if (folder / "manifest.json").exists():
            before = [w for w in RunFolder(folder).manifest().command if w != f"--out={folder}"]
            if before != command:
                raise StoreError(f"{folder} holds a run of another command ({shlex.join(before)});"
                                 " name another --out, or remove it")
            if codes.get(r.name) in COMPLETE and (folder / "summary.json").exists():
                yield r, codes[r.name], False
                continue
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            say(f"{r.name}: an earlier try did not finish; kept as {unfinished.name}")
            if unfinished.exists():
                raise StoreError(f"{unfinished} exists already; remove it")
            folder.rename(unfinished)
        say(f"── {r.name}: {shlex.join(command)}")
        code = invoke([words[0], f"--out={folder}", *words[1:]])
        codes[r.name] = code
        out.mkdir(parents=True, exist_ok=True)
        RunFolder(out).write(CODES, msgspec.json.encode(codes))
        yield r, code, True


def _codes(out: Path) -> dict[str, int]:
    """Exit codes of the runs so far, by name."""
    path = out / CODES
    return msgspec.json.decode(path.read_bytes(), type=dict[str, int]) if path.exists() else {}


COLUMNS = ("run", "verdict", "safe", "unsafe", "met SLO", "knee", "peak req/s", "TTFT p50 ms",
           "TPOT p50 ms", "simulated")


def row(name: str, summary: dict[str, Any]) -> list[str]:
    """A campaign's table, one row per run, of its summary.json. Latencies: at the safe level, or
    of the only one."""
    answer, knee = summary["conclusion"], summary["knee"]
    level = answer["safe"] if answer else None
    legs = [s for s in summary["steps"] if level is None or s["value"] == level]
    at = legs[-1] if legs and (answer is None or level is not None) else None
    proof = answer["proof"] if answer else at
    return [
        name, f"{summary['verdict']['load']}, {summary['verdict']['measurement']}",
        _number(level), _number(answer["unsafe"] if answer else None),
        f"{proof['good']} of {proof['n']}" if proof else "–",
        _number(knee["value"] if knee else None), _number(knee["peak_rps"] if knee else None),
        _number(at and at["ttft_p50_s"] and 1000 * at["ttft_p50_s"]),
        _number(at and at["tpot_p50_s"] and 1000 * at["tpot_p50_s"]),
        "yes" if summary["simulated"] else "no"]


def summaries(campaign: Campaign, out: Path) -> list[list[str]]:
    """Rows of the runs that are complete."""
    found = []
    for r in campaign.runs:
        path = out / r.name / "summary.json"
        if path.exists():
            found.append(row(r.name, msgspec.json.decode(path.read_bytes())))
    return found


def markdown(rows: list[list[str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
