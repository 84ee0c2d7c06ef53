"""Constants that are known, fitted back from runs of the engine that has them."""

import asyncio
import functools
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet
import pytest

from loadgen import scenario
from loadgen.leg import Leg
from loadgen.scenario import Closed
from loadgen.store import SCHEMA, Header, Journal, RunFolder
from loadgen.virtual import VirtualExecutor
from servers.sim import fit, profiles, seen
from servers.sim.__main__ import parse
from servers.sim.costs import Machine, StepTime
from servers.sim.engine import EngineConfig
from servers.sim.match import FREE, Match, _leaning, _sds, _told, figures, match
from servers.sim.profiles import CONSTANTS, GPUS, MODELS, Constants
from servers.sim.replay import replay
from tests.virtual import config

OTHER = replace(CONSTANTS, bandwidth_frac=0.7, host_step_s=1.1e-3, loop_step_s=2.4e-3,
                loop_seq_s=22e-6, front_token_s=80e-6, front_merged_s=25e-6, front_request_s=5e-3,
                front_latency_s=9e-3, mfu=0.42, source="known, for a test")
LEVELS = (1, 4, 16, 64, 128, 256)


def a_run(folder: Path, constants: Constants, options: tuple[str, ...], levels: tuple[int, ...],
          mix: str = "mixed", measure_s: float = 10.0) -> EngineConfig:
    """Records of a run of that machine, as a real one's would lie there. The machine, with the
    shipped constants."""
    c = config(*options, "--no-enable-prefix-caching")
    known = replace(c, machine=replace(c.machine, constants=constants))
    executor = VirtualExecutor(scenario.load(mix), known)
    folder.mkdir()
    run, journal = RunFolder(folder), Journal(RunFolder(folder).records_path(0))
    journal.append(Header(SCHEMA, "r", 0, 0, 0))
    with (run.path / "legs.jsonl").open("wb") as legs:
        for level in levels:
            leg = Leg(id=f"c{level}", axis="concurrency", value=level, phase="run", replicate=0,
                      seed=level, load=Closed(concurrency=level), warmup_s=2.0,
                      measure_s=max(measure_s, 40.0 / level))
            legs.write(msgspec.json.encode({"leg": leg}) + b"\n")
            for r in asyncio.run(executor.run_leg(leg))[1]:
                journal.append(r)
    (folder / "manifest.json").write_text('{"run": "r", "created": "now", "model": "m", '
                                          '"server": {"kind": "vllm", "version": "0.32.0"}}')
    return c


@functools.cache
def fitted(folder: Path, model: str) -> tuple[EngineConfig, Match]:
    c = a_run(folder / model, OTHER, ("--gpu", "h200", "--model", model), LEVELS)
    return c, match(seen.legs_of(folder / model, seen.read(folder / model)), c)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fit")


@pytest.mark.parametrize(("model", "name", "within"), [
    ("qwen2.5-7b", "bandwidth_frac", 0.15), ("qwen2.5-7b", "mfu", 0.1),
    ("qwen2.5-7b", "front_token_s", 0.15), ("qwen2.5-7b", "front_latency_s", 0.2),
    ("qwen2.5-0.5b", "loop_step_s", 0.05), ("qwen2.5-0.5b", "loop_seq_s", 0.2),
    ("qwen2.5-0.5b", "front_token_s", 0.15), ("qwen2.5-0.5b", "front_merged_s", 0.3),
    ("qwen2.5-0.5b", "front_request_s", 0.3), ("qwen2.5-0.5b", "front_latency_s", 0.3)])
def test_a_known_constant_is_found_again(folder: Path, model: str, name: str,
                                         within: float) -> None:
    _, found = fitted(folder, model)
    assert name in found.sd, found.doubts.get(name)
    assert getattr(found.constants, name) == pytest.approx(getattr(OTHER, name), rel=within)


@pytest.mark.parametrize(("model", "names"), [
    ("qwen2.5-7b", ("loop_step_s", "loop_seq_s")),  # its GPU is slower than the engine's loop
    ("qwen2.5-0.5b", ("bandwidth_frac",))])  # its GPU is quicker
def test_what_a_run_cannot_tell_stays_as_shipped_and_is_said(
        folder: Path, model: str, names: tuple[str, ...]) -> None:
    _, found = fitted(folder, model)
    for name in (*names, "host_layer_s"):
        assert getattr(found.constants, name) == getattr(CONSTANTS, name)
        said = fit.notes_of(found)[name]
        assert said.startswith("as shipped: ")
        assert "; it takes " in said
    assert all("depends" in found.doubts[name] for name in names)
    assert set(found.sd) | set(found.doubts) == set(FREE)


def test_the_fitted_server_answers_as_the_known_one(folder: Path) -> None:
    for model in ("qwen2.5-7b", "qwen2.5-0.5b"):
        _, found = fitted(folder, model)
        off = [abs(x / f.value - 1) for f, x in zip(found.figures, found.found, strict=True)]
        assert sorted(off)[len(off) // 2] < 0.02
        assert sum(x < 0.15 for x in off) > 0.9 * len(off)
        before = [abs(x / f.value - 1) for f, x in zip(found.figures, found.before, strict=True)]
        assert sum(off) < 0.3 * sum(before)


def test_steps_of_the_fitted_machine_last_as_long_as_those_of_the_known_one(folder: Path) -> None:
    c, found = fitted(folder, "qwen2.5-7b")
    ours, theirs = (StepTime(replace(c.machine, constants=x)) for x in (found.constants, OTHER))
    for n in (1, 8, 64, 128, 256):
        batch = (n, n, 600.0 * n, 600 * n)
        assert ours.of(*batch) == pytest.approx(theirs.of(*batch), rel=0.07)
    assert ours.of(8192, 8, 4e6, 8192) == pytest.approx(theirs.of(8192, 8, 4e6, 8192), rel=0.1)


def test_a_replay_with_the_runs_own_constants_is_the_run(tmp_path: Path) -> None:
    c = a_run(tmp_path / "run", OTHER, ("--gpu", "h200"), (1, 4, 64), measure_s=5.0)
    c = replace(c, machine=replace(c.machine, constants=OTHER), prefix_caching=False)
    for leg in seen.legs_of(tmp_path / "run", seen.read(tmp_path / "run")):
        for slots in (None, leg.slots):
            again = {f.name: f.value for f in figures(leg, replay(leg.asked, slots, c))}
            for f in figures(leg, leg.answers):
                # with many slots, a rounded instant is enough that prompts meet other ones
                rel = 0.02 if leg.slots in (1, 4) else 0.35 if "TTFT" in f.name else 0.06
                assert again[f.name] == pytest.approx(f.value, rel=rel), (leg.name, slots, f)


def test_what_two_constants_do_alike_is_given_to_one_that_is_said_to_lean_on_the_other() -> None:
    slopes = np.zeros((40, len(FREE)))
    slopes[:, 0] = np.linspace(20, 30, 40)  # in deviations of a figure, for a constant e times …
    slopes[:, 2] = slopes[:, 0] / 4 + np.linspace(-0.1, 0.1, 40)  # … and one that does nearly that
    slopes[:, 5] = 0.01
    kept, why = _told(slopes, [0, 2, 5], 1.0)
    assert kept == [0]
    assert why == {"host_step_s": "it cannot be told from bandwidth_frac",
                   "loop_seq_s": "hardly any figure of this run depends on it"}
    assert _leaning(slopes, kept, _sds(slopes[:, kept], 1.0)) == {"bandwidth_frac": ["host_step_s"]}
    assert _told(slopes, [0, 2], 100.0)[0] == []  # the model is off by far more than a figure may


def test_a_run_at_low_levels_does_not_tell_what_is_full_at_high_ones(tmp_path: Path) -> None:
    c = a_run(tmp_path / "run", OTHER, ("--gpu", "4090d"), (2, 4))
    found = match(seen.legs_of(tmp_path / "run", seen.read(tmp_path / "run")), c)
    for name in ("front_token_s", "front_merged_s", "loop_step_s", "loop_seq_s", "host_seq_s"):
        assert getattr(found.constants, name) == getattr(CONSTANTS, name), name
        assert found.doubts[name]
    assert found.constants.mfu == pytest.approx(OTHER.mfu, rel=0.1)


def test_a_run_of_too_few_answers_is_refused(tmp_path: Path) -> None:
    c = a_run(tmp_path / "run", OTHER, ("--gpu", "4090d"), (1,))
    few = [r for r in seen.read(tmp_path / "run") if r.outcome == "OK"][:3]
    with pytest.raises(seen.CannotFit, match="5 whole answers"):
        match(seen.legs_of(tmp_path / "run", few), c)


def test_a_folder_without_journals_is_read_from_its_table(tmp_path: Path) -> None:
    a_run(tmp_path / "run", OTHER, ("--gpu", "4090d"), (4,))
    folder = RunFolder(tmp_path / "run")
    journalled = seen.read(folder.path)
    rows = [msgspec.to_builtins(r) for r in journalled]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder.path / "records.parquet")
    folder.records_path(0).unlink()
    assert seen.read(folder.path) == journalled


def test_the_profile_that_is_written_is_the_one_that_is_read(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "run", OTHER, ("--gpu", "h200"), (1, 8))
    out = tmp_path / "h200.toml"
    assert fit.main([str(tmp_path / "run"), "--gpu", "h200", "--model", "qwen2.5-7b",
                     "--out", str(out)]) == 0
    said = capsys.readouterr().err
    for name in (*FREE, "host_layer_s"):
        assert f"\n{name} = " in said
    assert re.search(r"\nc8 +TPOT .* ms .* %", said)
    assert "off by (median): fitted " in said
    options = parse(["--profile", str(out)])
    assert (options.gpu, options.model) == ("h200", "qwen2.5-7b")
    constants = config("--profile", str(out)).machine.constants
    assert constants.mfu == pytest.approx(OTHER.mfu, rel=0.1)
    assert "vllm 0.32.0" in constants.source
    assert "run r of now" in constants.source
    text = out.read_text()
    assert re.search(r"mfu = [\d.]+  # ± \d+ %", text)
    assert re.search(r"loop_step_s = 0.00162  # as shipped: .*; it takes ", text)


def test_sizes_are_the_runs_own_where_it_says_them(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(
        '{"server": {"kv_cache_blocks": 128943, "max_model_len": 4096, '
        '"max_num_batched_tokens": 2048, "max_num_seqs": 128}}')
    machine = config("--gpu", "h200").machine
    c = fit.config_of(tmp_path, machine, None, None)
    assert (c.num_blocks, c.max_model_len, c.max_num_batched_tokens, c.max_num_seqs) == (
        128943, 4096, 2048, 128)
    assert fit.config_of(tmp_path, machine, 4096, 256).max_num_seqs == 256
    (tmp_path / "manifest.json").write_text("{}")
    assert fit.config_of(tmp_path, machine, None, None).max_num_batched_tokens == 8192
    with pytest.raises(seen.CannotFit, match="does not fit"):
        fit.config_of(tmp_path, Machine(GPUS["3090"], MODELS["qwen2.5-14b"]), None, None)


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
