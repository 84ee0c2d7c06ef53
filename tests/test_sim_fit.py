"""Constants that are known, fitted back from runs of the engine that has them."""

import asyncio
import functools
from dataclasses import replace
from pathlib import Path

import msgspec
import pyarrow.parquet
import pytest

from loadgen import scenario
from loadgen.leg import Leg
from loadgen.scenario import Closed
from loadgen.store import SCHEMA, Header, Journal, RunFolder
from loadgen.virtual import VirtualExecutor
from servers.sim import fit, profiles, seen
from servers.sim.__main__ import parse
from servers.sim.costs import Machine, StepTime, batch_defaults
from servers.sim.profiles import CONSTANTS, Constants
from tests.virtual import config

OTHER = replace(CONSTANTS, bandwidth_frac=0.7, host_step_s=1.5e-3, front_token_s=80e-6,
                front_latency_s=9e-3, mfu=0.42, source="known, for a test")


def a_run(folder: Path, constants: Constants, options: tuple[str, ...],
          levels: tuple[int, ...]) -> Machine:
    """Records of a run of that machine, as a real one's would lie there."""
    c = config(*options)
    c = replace(c, machine=replace(c.machine, constants=constants))
    executor = VirtualExecutor(scenario.load("mixed"), c)
    folder.mkdir()
    journal = Journal(RunFolder(folder).records_path(0))
    journal.append(Header(SCHEMA, "r", 0, 0, 0))
    for level in levels:
        _, records, _ = asyncio.run(executor.run_leg(Leg(
            id=f"c{level}", axis="concurrency", value=level, phase="run", replicate=0, seed=level,
            load=Closed(concurrency=level), warmup_s=2.0, measure_s=max(30.0, 240.0 / level))))
        for r in records:
            journal.append(r)
    (folder / "manifest.json").write_text('{"run": "r", "created": "now", "model": "m", '
                                          '"server": {"kind": "vllm", "version": "0.32.0"}}')
    return replace(c.machine, constants=CONSTANTS)


@functools.cache
def fitted(folder: Path) -> tuple[Machine, Constants, dict[str, str]]:
    machine = a_run(folder / "run", OTHER, ("--gpu", "h200"), (1, 4, 16, 64, 256, 512))
    batched_tok, _ = batch_defaults(machine.gpu)
    return machine, *fit.fit(seen.read(folder / "run"), machine, batched_tok, "s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fit")


@pytest.mark.parametrize(("name", "within"), [
    ("bandwidth_frac", 0.07), ("mfu", 0.07), ("front_token_s", 0.07), ("front_latency_s", 0.15)])
def test_a_known_constant_is_found_again(folder: Path, name: str, within: float) -> None:
    _, found, _ = fitted(folder)
    assert getattr(found, name) == pytest.approx(getattr(OTHER, name), rel=within)


def test_steps_of_the_fitted_machine_last_as_long_as_those_of_the_known_one(folder: Path) -> None:
    machine, found, _ = fitted(folder)
    ours, theirs = (StepTime(replace(machine, constants=c)) for c in (found, OTHER))
    for n in (1, 8, 64, 128, 256):
        batch = (n, n, 600.0 * n, 600 * n)
        assert ours.of(*batch) == pytest.approx(theirs.of(*batch), rel=0.05)
    assert ours.of(8192, 8, 4e6, 8192) == pytest.approx(theirs.of(8192, 8, 4e6, 8192), rel=0.1)


def test_what_a_run_cannot_tell_stays_as_shipped(tmp_path: Path) -> None:
    machine = a_run(tmp_path / "run", OTHER, ("--gpu", "4090d"), (4, 16))
    found, notes = fit.fit(seen.read(tmp_path / "run"), machine, 2048, "s")
    assert found.front_token_s == CONSTANTS.front_token_s
    assert notes["front_token_s"] == fit.KEPT


def test_a_folder_without_journals_is_read_from_its_table(tmp_path: Path) -> None:
    a_run(tmp_path / "run", OTHER, ("--gpu", "4090d"), (4,))
    folder = RunFolder(tmp_path / "run")
    journalled = seen.read(folder.path)
    rows = [msgspec.to_builtins(r) for r in journalled]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder.path / "records.parquet")
    folder.records_path(0).unlink()
    assert seen.read(folder.path) == journalled


def test_the_profile_that_is_written_is_the_one_that_is_read(folder: Path, tmp_path: Path) -> None:
    fitted(folder)
    out = tmp_path / "h200.toml"
    assert fit.main([str(folder / "run"), "--gpu", "h200", "--model", "qwen2.5-7b",
                     "--out", str(out)]) == 0
    options = parse(["--profile", str(out)])
    assert (options.gpu, options.model) == ("h200", "qwen2.5-7b")
    constants = config("--profile", str(out)).machine.constants
    assert constants.mfu == pytest.approx(OTHER.mfu, rel=0.1)
    assert "vllm 0.32.0" in constants.source
    assert "run r of now" in constants.source


@pytest.mark.parametrize(("text", "said"), [
    ("[constants]\nmfu = 0.5", "source"), ("[constants]\nspeed = 1", "speed"),
    ('[constants]\nmfu = 3\nsource = "x"', "mfu"), ("mfu = 1", "mfu"), ("[[", "profile.toml"),
    ('gpu = "h2"\n[constants]\nsource = "x"', "h2"),
    ('[constants]\nbandwidth_frac = 0\nsource = "x"', "above 0")])
def test_a_profile_that_cannot_be_used_says_why(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "profile.toml"
    path.write_text(text)
    with pytest.raises(profiles.BadProfile, match=said):
        profiles.load(path)


def test_a_folder_without_answers_is_refused(tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main([str(tmp_path), "--gpu", "h200", "--model", "qwen2.5-7b"]) == 1
    assert "holds no answered requests" in capsys.readouterr().err


def test_a_profile_survives_its_own_text(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    known = profiles.Profile("h100", None, replace(OTHER, source='a "quoted" \\ source'))
    path.write_text(profiles.dumps(known, {"mfu": "a note"}))
    assert profiles.load(path) == known
    assert msgspec.toml.decode(path.read_bytes())["gpu"] == "h100"
