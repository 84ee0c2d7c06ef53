"""No arrow of the design points backwards: who may import whom, read from the sources, also from
imports inside functions. And the command line starts at once."""

import ast
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ("loadgen", "servers", "analysis")

# module of loadgen: what else of loadgen it may import. A new module is entered here first.
ALLOWED = {
    "errors": "", "texts": "", "sse": "", "target": "", "telemetry": "", "bulk": "",
    "config": "errors",
    "sources": "config", "datasets": "errors sources",
    "sessions": "config", "dialogue": "",
    "expect": "", "repeats": "", "code": "", "schema": "",
    "scenario": "config datasets errors expect presets sessions sources", "presets": "",
    "tasks": "expect scenario texts",
    "prompts": "dialogue scenario sources tasks texts",
    "leg": "scenario",
    "stages": "scenario",
    "plan": "datasets dialogue leg prompts scenario sessions sources tasks",
    "traces": "datasets errors plan scenario sources",
    "talk": "openai plan prompts record scenario",
    "recall": "dialogue",
    "openai": "scenario",
    "record": "bulk openai sse",
    "metrics": "record scenario",
    "balance": "leg metrics record scenario",
    "turns": "record scenario",
    "validity": "balance headroom leg metrics record scenario sources turns",
    "sequential": "", "settle": "",
    "worth": "leg scenario sequential",
    "judge": "balance headroom leg metrics record scenario sequential settle validity worth",
    "evidence": "judge leg metrics sequential soaks",
    "exits": "errors evidence judge",
    "pace": "evidence judge leg scenario sequential",
    "ramp": "checks evidence judge leg pace scenario soaks",
    "soaks": "judge leg sequential",
    "checks": "evidence judge leg pace scenario soaks",
    "sweep": "errors judge leg ramp record scenario",
    "unit": "errors judge leg pace ramp scenario sweep",
    "store": "errors headroom leg record scenario",
    "deadline": "record scenario",
    "pulse": "leg metrics",
    "net": "", "stamps": "", "dial": "target",
    "connection": "dial net stamps",
    "outputs": "openai record scenario store",
    "answers": "expect leg outputs plan prompts record scenario store tasks validate",
    "flight": "connection deadline dial net outputs record scenario stamps target",
    "client": "connection dial flight net openai outputs record scenario stamps target",
    "drive": "client flight leg metrics net plan prompts record scenario store talk",
    "child": "net",
    "shard": "child client datasets drive errors leg net outputs prompts pulse scenario store "
             "target",
    "supervise": "errors leg metrics prompts scenario shard store target",
    "telemetry.nvml": "", "telemetry.gpu": "store",
    "telemetry.server": "dial store target",
    "telemetry.signs": "balance judge leg store",
    "hosts": "", "hosts.clock": "", "hosts.identity": "",
    "hosts.messages": "leg prompts shard",
    "hosts.seal": "errors hosts.messages scenario",
    "hosts.ledger": "leg plan prompts record scenario",
    "hosts.tallies": "hosts.messages metrics record scenario",
    "hosts.delivery": "errors hosts.messages record",
    "hosts.members": "errors hosts hosts.clock hosts.delivery hosts.identity hosts.messages "
                     "hosts.seal leg shard store",
    "calibrate": "client dial errors net openai plan prompts record scenario target tasks",
    "health": "", "telemetry.log": "store", "telemetry.process": "store",
    "watch": "errors health store target telemetry.gpu telemetry.log telemetry.process "
             "telemetry.server telemetry.signs",
    "attend": "calibrate child errors prompts scenario store target telemetry.gpu "
              "telemetry.server watch",
    "headroom": "record",
    "rungs": "headroom validity",
    "calibration": "errors headroom",
    "selftest": "calibration errors headroom leg metrics openai plan prompts record rungs "
                "scenario store supervise",
    "doctor": "calibration dial headroom metrics rungs selftest",
    "terminal": "", "view": "judge leg supervise",
    "board": "metrics record scenario",
    "exporter": "board child errors judge leg record scenario store supervise",
    "facts": "judge prompts scenario store target",
    "virtual": "judge leg metrics plan record scenario sources store supervise talk "
               "telemetry.signs",
    "resume": "errors judge leg ramp record store sweep telemetry.signs",
    "runner": "answers calibrate errors exporter facts health judge leg prompts ramp record resume "
              "scenario store supervise sweep target telemetry.gpu telemetry.server "
              "telemetry.signs traces unit view virtual watch",
    "campaign": "errors scenario",
    "cells": "campaign errors scenario store target",
    "options": "dial errors scenario sources target traces",
    "measure": "calibration datasets errors evidence exits judge options resume runner scenario "
               "store terminal view",
    "cli": "calibration campaign cells doctor errors judge leg measure options ramp runner "
           "scenario target terminal",
    "validate": "code dialogue expect openai recall repeats schema",
}
FLEET = "loadgen.fleet"  # may import all of loadgen but its command line
ANALYSIS_MAY = {"record", "store", "metrics", "balance", "judge", "validity", "leg", "ramp",
                "scenario", "telemetry.signs", "errors", "evidence", "exits", "headroom",
                "terminal", "unit", "campaign", "cells", "answers", "openai",
                "outputs", "validate", "sequential"}
SERVERS_MAY = {"errors", "target"}
COMPOSERS = {"loadgen.cli", "loadgen.measure", "loadgen.options", "loadgen.runner",
             "loadgen.selftest", "loadgen.virtual",
             "loadgen.fleet.prepare", "loadgen.fleet.lifecycle"}  # only they know the other houses

PURE = {"config", "errors", "bulk", "texts", "sse", "openai", "record", "metrics", "balance",
        "validity", "sequential", "settle", "worth", "judge", "soaks", "evidence", "exits", "pace",
        "checks", "ramp", "leg",
        "stages", "deadline", "plan", "sources", "datasets", "prompts", "scenario", "health",
        "target", "expect", "tasks", "validate", "repeats", "code", "schema", "telemetry.signs",
        "headroom", "rungs", "presets", "hosts.clock", "hosts.ledger", "hosts.tallies",
        "sessions", "dialogue", "talk", "recall", "turns"}
IMPURE = {"asyncio", "socket", "ssl", "time", "datetime", "threading", "subprocess", "random",
          "secrets", "os", "aiohttp", "http", "requests"}
REQUESTS = {"loadgen.calibrate", "loadgen.doctor", "loadgen.telemetry.server"}


def modules() -> dict[str, Path]:
    """Every module of the house by its dotted name."""
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
            for top in HOUSE for p in sorted((ROOT / top).rglob("*.py"))}


MODULES = modules()


def imports(source: str, known: Any = MODULES) -> set[str]:
    """Full names of the modules that a source imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used here"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found


IMPORTS = {name: imports(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def of(house: str, names: set[str]) -> set[str]:
    """Those of `names` that lie in a house, without its name; the house itself holds nothing but
    its version."""
    return {n.removeprefix(f"{house}.") for n in names if n.startswith(f"{house}.")}


def foreign(names: set[str]) -> set[str]:
    return {n.split(".")[0] for n in names}


# ------------------------------------------------------------------------------ the test's test


@pytest.mark.parametrize(("source", "names"), [
    ("import loadgen.record", {"loadgen.record"}),
    ("import loadgen.record as r, os", {"loadgen.record", "os"}),
    ("from loadgen import record, metrics as m", {"loadgen.record", "loadgen.metrics"}),
    ("from loadgen import __version__", {"loadgen"}),
    ("from loadgen.record import Outcome", {"loadgen.record"}),
    ("from loadgen.telemetry import server", {"loadgen.telemetry.server"}),
    ("def f():\n    if x:\n        from loadgen import cli", {"loadgen.cli"}),
    ("class A:\n    try:\n        import locust.env\n    except E:\n        pass", {"locust.env"}),
    ("import_loadgen = 'from loadgen import cli'", set())])
def test_every_way_to_import_is_seen(source: Any, names: Any) -> None:
    assert imports(source) == names


def test_the_houses_are_found() -> None:
    assert len(MODULES) > 40
    assert {"loadgen.sse", "servers.sim.engine", "analysis.frame"} <= set(MODULES)


# ---------------------------------------------------------------------------------------- arrows


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("loadgen.")])
def test_a_module_imports_only_what_the_design_lets_it(name: Any) -> None:
    if name == FLEET or name.startswith(f"{FLEET}."):
        assert "cli" not in of("loadgen", IMPORTS[name])
        return
    short = name.removeprefix("loadgen.")
    assert short in ALLOWED, f"{name} is new: enter it into ALLOWED, with what it may import"
    assert of("loadgen", IMPORTS[name]) - set(ALLOWED[short].split()) == set()


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("servers.")])
def test_a_server_knows_nothing_of_loads(name: Any) -> None:
    assert of("loadgen", IMPORTS[name]) <= SERVERS_MAY
    assert of("analysis", IMPORTS[name]) == set()


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("analysis.")])
def test_the_analysis_reads_and_does_nothing_else(name: Any) -> None:
    assert of("loadgen", IMPORTS[name]) <= ANALYSIS_MAY
    assert of("servers", IMPORTS[name]) == set()


def test_only_the_composers_know_the_other_houses() -> None:
    for name, names in IMPORTS.items():
        if name.startswith("loadgen") and name not in COMPOSERS:
            assert foreign(names) & {"servers", "analysis"} == set(), name
    assert foreign(IMPORTS["loadgen.runner"]) & {"analysis"} == set()


def test_nobody_imports_the_command_line() -> None:
    assert [n for n, names in IMPORTS.items() if "loadgen.cli" in names] == []


def test_nothing_flows_back() -> None:
    """The arrows that are there make no circle."""
    left = {n: {m for m in names if m in MODULES and m != n} for n, names in IMPORTS.items()}
    while ready := [n for n, names in left.items() if not names & set(left)]:
        for n in ready:
            del left[n]
    assert left == {}


def test_the_list_of_allowed_arrows_makes_no_circle() -> None:
    left = {n: set(names.split()) for n, names in ALLOWED.items()}
    while ready := [n for n, names in left.items() if not names & set(left)]:
        for n in ready:
            del left[n]
    assert left == {}


# ------------------------------------------------------------------------------------- libraries


def test_locust_and_gevent_stay_in_the_fleet() -> None:
    for name, names in IMPORTS.items():
        if not name.startswith(FLEET):
            assert foreign(names) & {"locust", "gevent"} == set(), name


def test_the_generator_needs_no_analysis() -> None:
    for short, by in (("seen", {"fit", "match"}), ("match", {"fit"})):
        assert {n for n, names in IMPORTS.items() if f"servers.sim.{short}" in names} == {
            f"servers.sim.{x}" for x in by}
    for name, names in IMPORTS.items():
        if not name.startswith("analysis") and name != "servers.sim.seen":  # reads run folders
            assert foreign(names) & {"scipy", "altair", "pyarrow", "pandas", "vl_convert",
                                     "matplotlib"} == set(), name


def test_the_core_has_no_clock_no_socket_and_no_chance() -> None:
    for short in PURE:
        assert foreign(IMPORTS[f"loadgen.{short}"]) & IMPURE == set(), short


def test_the_parser_of_streams_knows_nothing_at_all() -> None:
    assert IMPORTS["loadgen.sse"] == set()


def test_the_simulator_s_engine_is_pure() -> None:
    for name in ("servers.sim.engine", "servers.sim.costs"):
        assert foreign(IMPORTS[name]) & (IMPURE - {"random"}) == set(), name


def test_requests_are_sent_in_few_places() -> None:
    assert {n for n, names in IMPORTS.items()
            if n.startswith("loadgen") and "aiohttp" in foreign(names)} <= REQUESTS


def test_libraries_stand_among_the_dependencies() -> None:
    """What is imported and is neither ours nor Python's is named in pyproject.toml."""
    given = (ROOT / "pyproject.toml").read_text(encoding="utf-8").replace("-", "_")
    named = {"vl_convert": "vl_convert_python", "prometheus_client": "prometheus_client",
             "pynvml": "nvidia_ml_py"}
    for name, names in IMPORTS.items():
        for library in foreign(names) - set(HOUSE) - set(sys.stdlib_module_names):
            assert f'"{named.get(library, library)}>=' in given, f"{name} imports {library}"


# ----------------------------------------------------------------------------------------- start

HEAVY = ["pandas", "locust", "gevent", "vllm", "scipy", "altair", "pyarrow", "aiohttp", "torch",
         "transformers", "pynvml", "matplotlib", "analysis"]


def test_the_command_line_loads_nothing_heavy() -> None:
    script = f"import sys, loadgen.cli; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, check=True,
                          capture_output=True, timeout=30)
    assert done.stdout == "[]\n"


def test_the_command_line_starts_in_half_a_second() -> None:
    took = []
    for _ in range(5):  # the best of five: the host may be busy
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import loadgen.cli"], cwd=ROOT, check=True,
                       timeout=30)
        took.append(time.monotonic() - began)
        if took[-1] < 0.5:
            return
    raise AssertionError(f"import loadgen.cli took {min(took):.2f} s at best")
