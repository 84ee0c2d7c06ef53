"""A launched vLLM as in test_vllm.py, on a real one: on a CPU, with a tiny model, installed by
`tests/vllm/install.sh`. Plumbing, records and token counts; its timings here say nothing."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from analysis import frame
from loadgen import cli
from loadgen.balance import Tally
from loadgen.record import Outcome
from loadgen.scenario import Trace
from loadgen.sources import shared_tok
from loadgen.store import RunFolder
from servers.base import free_port
from servers.processes import alive
from tests import real
from tests.real import (
    LOADGEN,
    Said,
    endings,
    kept,
    outcomes,
    over,
    pid_of,
    processes_in,
    running,
    start,
    wait,
)
from tests.test_traces import talks

ROOT = Path(__file__).resolve().parent.parent
TINY = Path(__file__).with_name("vllm")
NEEDED = "vllm" in os.environ.get("LOADGEN_TESTS_NEED", "")


def _vllm() -> Path:
    """The `vllm` command of $LOADGEN_TEST_VLLM (itself, or its venv), else of .vllm-venv."""
    given = Path(os.environ.get("LOADGEN_TEST_VLLM") or ROOT / ".vllm-venv")
    return given / "bin" / "vllm" if given.is_dir() else given


VLLM = _vllm()
SERVE = f"{shlex.quote(str(VLLM))} serve"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not NEEDED and not os.access(VLLM, os.X_OK),
    reason="needs a vLLM: tests/vllm/install.sh, or its command in $LOADGEN_TEST_VLLM")]

ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
       "DO_NOT_TRACK": "1"}
FLAGS = ["--served-model-name", "tiny", "--load-format", "dummy", "--enforce-eager", "--dtype",
         "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "64"]
JUDGED = (cli.PASS, cli.SLO_MISSED, cli.INVALID, cli.INCONCLUSIVE)  # on two cores: any of them
START_S = 240  # at most; 30 to 60 s on two cores that nobody else uses


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model") / "tiny"
    assert os.access(VLLM, os.X_OK), "needs a vLLM: tests/vllm/install.sh"
    subprocess.run([VLLM.with_name("python"), TINY / "make_tiny_model.py", folder], check=True,
                   timeout=60)
    return folder


@pytest.fixture(autouse=True)
def nobody_is_left(tmp_path: Path) -> Iterator[None]:
    """After each test: no process of it lives on, whatever it calls itself, and none of the
    160 MB of shared memory that an engine and its worker talk through."""
    before = shared_memory()
    yield
    left = processes_in(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == {}
    assert shared_memory() - before == set()


def shared_memory() -> set[str]:
    return {x for x in os.listdir("/dev/shm") if x.startswith(("psm_", "sem.mp-"))}


def launched(model: Path, *flags: str) -> list[str]:
    """Words of a sweep or run that launches its vLLM."""
    return ["--server", "vllm", "--server-cmd", SERVE, "--model", str(model), "--",
            *FLAGS, *flags]


def loadgen(*words: str, cwd: Path, env: dict[str, str] = ENV) -> Said:
    said = real.loadgen(*words, cwd=cwd, env=env, timeout=2 * START_S)
    assert "Traceback" not in said.all, said.all
    return said


def assert_records_are_what_was_asked_for(folder: Path, cut: bool = False) -> None:
    """Of a run on the tiny scenario: each answer is whole, and vLLM itself counted it so."""
    records = kept(folder)
    for r in records:
        if cut and r.outcome is not Outcome.OK:
            continue
        assert (r.outcome, r.status, r.finish_reason) == (Outcome.OK, 200, "length"), r
        assert r.tok_source == "usage"
        assert r.output_tok == r.max_tokens == 12
        assert r.prompt_tok is not None
        # title and instruction are never cut, and to this tokenizer a character is a token or more
        assert 0.6 * 48 <= r.prompt_tok <= 2 * 48
        assert r.sent_ns is not None
        assert r.first_ns is not None
        assert r.due_ns <= r.sent_ns <= r.first_ns <= r.end_ns
    assert any(r.outcome is Outcome.OK for r in records)


# --------------------------------------------------------------------- a server that runs already


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a `loadgen serve vllm`, for all tests that need no server of their own."""
    folder: Path = tmp_path_factory.mktemp("served")
    port = free_port()
    with (folder / "log").open("w") as log, subprocess.Popen(
            [*LOADGEN, "serve", "vllm", "--server-cmd", SERVE, "--model", str(model),
             "--port", str(port), "--", *FLAGS, "--enable-prompt-tokens-details",
             "--enable-auto-tool-choice", "--tool-call-parser", "hermes"], cwd=folder,
            env={**os.environ, **ENV}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            process_group=0) as process:
        try:
            wait(lambda: process.poll() is not None or _answers(port), START_S)
            assert process.poll() is None, (folder / "log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
    wait(lambda: not processes_in(folder), 20)


def _answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def counters(url: str) -> dict[str, float]:
    """vLLM's own counts of tokens so far."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(
        r"^vllm:(prompt_tokens_total|generation_tokens_total)\{[^}]*\} (\S+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("load", [["--concurrency", "4"], ["--rate", "8"]])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_what_is_asked_for_comes_back_and_is_counted_as_the_server_counts(
        served: str, tmp_path: Path, load: list[str], endpoint: str) -> None:
    mix = (TINY / "tiny.toml").read_text(encoding="utf-8")
    (tmp_path / "mix.toml").write_text(f'endpoint = "{endpoint}"\n{mix}', encoding="utf-8")
    before = counters(served)
    said = loadgen("run", "./mix.toml", *load, "--num-prompts", "40", "--base-url", served, "--out",
                   "r", cwd=tmp_path)
    assert said.code in JUDGED, said.all
    assert RunFolder(tmp_path / "r").manifest().model == "tiny"  # it serves just one
    assert_records_are_what_was_asked_for(tmp_path / "r")
    records = kept(tmp_path / "r")
    assert len(records) == 40
    now = counters(served)
    asked = now["generation_tokens_total"] - before["generation_tokens_total"]
    assert asked - sum(r.output_tok or 0 for r in records) <= 4  # "Hello": does it serve?
    assert asked > sum(r.output_tok or 0 for r in records)
    read = now["prompt_tokens_total"] - before["prompt_tokens_total"]
    assert sum(r.prompt_tok or 0 for r in records) < read <= sum(
        r.prompt_tok or 0 for r in records) + 30
    names = {row.name for row in RunFolder(tmp_path / "r").rows()}
    assert {"running", "waiting", "kv_frac", "preemptions"} <= names


@pytest.mark.parametrize("load", [["--concurrency", "4"], ["--rate", "8"]])
def test_requests_and_tokens_are_those_that_the_server_s_metrics_count(
        served: str, tmp_path: Path, load: list[str]) -> None:
    """To the last one, over the leg's whole life: 60 requests, each awaited to its end."""
    said = loadgen("run", str(TINY / "tiny.toml"), *load, "--num-prompts", "60", "--base-url",
                   served, "--out", "r", "--no-report", cwd=tmp_path)
    assert said.code in JUDGED, said.all
    assert_records_are_what_was_asked_for(tmp_path / "r")
    run = frame.load(tmp_path / "r")
    [judgement], records = run.judgements, kept(tmp_path / "r")
    books = judgement.balance
    assert books.requests == Tally(60, 60, 60)
    assert books.output_tok == Tally(60 * 12, 60 * 12, 60 * 12)
    prompt_tok = sum(r.prompt_tok or 0 for r in records)
    assert books.prompt_tok == Tally(prompt_tok, prompt_tok, prompt_tok)
    assert not {"token-count", "foreign-load", "no-usage", "no-telemetry"} & {
        f.rule for f in judgement.findings}


def test_a_model_that_is_not_served_is_refused(served: str, tmp_path: Path) -> None:
    said = loadgen("run", str(TINY / "tiny.toml"), "--concurrency", "1", "--num-prompts", "1",
                   "--base-url", served, "--model", "other", cwd=tmp_path)
    assert said.code == cli.USAGE, said.all
    assert "The model `other` does not exist" in said.err


# ------------------------------------------------------------------------- one that it launches


def test_a_sweep_launches_a_vllm_and_another_one_after_its_worker_was_killed(
        model: Path, tmp_path: Path) -> None:
    with start("sweep", str(TINY / "tiny.toml"), "--max-concurrency", "4", "--levels", "1,2,4",
               "--budget", "150s", "--out", "r", *launched(model), cwd=tmp_path,
               env=ENV) as process:
        folder = tmp_path / "r"
        wait(lambda: (folder / "legs.jsonl").exists() and len(endings(folder)) == 2, START_S)
        time.sleep(2)
        os.kill(pid_of(tmp_path, "VLLM::Worker"), signal.SIGKILL)
        said = over(process, START_S + 200)
    assert said.code in JUDGED, said.all
    assert endings(folder)[:2] == ["done", "server_died"]
    assert endings(folder)[2:]
    assert set(endings(folder)[2:]) <= {"done", "cut"}  # by the new server
    # vLLM says -9, or None if it looks before the kernel has told it
    assert "Worker proc VllmWorker-0 died unexpectedly (exit code: " in said.out, said.out
    log = (folder / "server.log").read_text(encoding="utf-8")
    assert log.count("Application startup complete") == 2
    assert_records_are_what_was_asked_for(folder, cut=True)
    assert processes_in(tmp_path) == {}
    assert (folder / "report.html").exists()


def test_two_data_parallel_engines_are_counted_together_and_the_death_of_one_ends_the_sweep(
        model: Path, tmp_path: Path) -> None:
    """Needs no second core, but the memory of two. One API server, which is not the default: it
    saves a process that takes as long to start as an engine."""
    with start("sweep", str(TINY / "tiny.toml"), "--max-concurrency", "8", "--levels", "4,8",
               "--budget", "120s", "--no-restart", "--out", "r", "--no-report",
               *launched(model, "--data-parallel-size", "2", "--api-server-count", "1"),
               cwd=tmp_path, env=ENV) as process:
        folder = tmp_path / "r"
        wait(lambda: process.poll() is not None or (
            (folder / "legs.jsonl").exists() and len(endings(folder)) == 2), 2 * START_S)
        assert process.poll() is None, process.communicate()
        log = (folder / "server.log").read_text(encoding="utf-8")
        time.sleep(0.5)
        os.kill(pid_of(tmp_path, "VLLM::EngineCore_DP1"), signal.SIGKILL)
        said = over(process, 120)
    assert said.code == cli.DIED, said.all
    assert endings(folder) == ["done", "server_died"]
    assert "the server died at 8: KILLED: " in said.out, said.out
    assert "ended without a word" in said.out
    assert processes_in(tmp_path) == {}

    each = [int(x.replace(",", "")) for x in re.findall(r"KV cache size: ([\d,]+) tokens", log)]
    facts = RunFolder(folder).manifest().server
    assert len(each) == 2
    assert (facts["data_parallel"], facts["kv_cache_tok"]) == (2, sum(each))
    assert facts["max_concurrency"] == pytest.approx(sum(each) / 4096)
    assert facts["kv_cache_blocks"] * facts["block_size"] == sum(each)

    finished = {r.labels["engine"]: r.value for r in RunFolder(folder).rows()
                if r.source == "server" and r.name == "finished" and r.value}
    assert set(finished) == {"0", "1"}  # both have worked
    books = frame.load(folder).judgements[0].balance  # of 4, who held to its end
    for both in (books.requests, books.prompt_tok, books.output_tok):
        assert both is not None
        assert both.ratio == 1.0
        assert both.most > 20


@pytest.mark.parametrize(("method", "config", "said_to_be"), [
    ("awq", {"zero_point": True, "version": "gemm"}, "awq"),
    ("gptq", {"desc_act": False, "sym": True}, "gptq")])
def test_a_model_of_four_bits_is_launched_and_said_to_be_one(
        model: Path, tmp_path: Path, method: str, config: dict[str, Any], said_to_be: str) -> None:
    small = Path(shutil.copytree(model, tmp_path / "model"))
    told = json.loads((small / "config.json").read_text())
    told["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, **config}
    (small / "config.json").write_text(json.dumps(told))
    said = loadgen("run", str(TINY / "tiny.toml"), "--concurrency", "2", "--num-prompts", "6",
                   "--out", "r", "--no-report", *launched(small), cwd=tmp_path)
    assert said.code in JUDGED, said.all
    assert outcomes(tmp_path / "r") == {Outcome.OK: 6}
    assert said_to_be in str(RunFolder(tmp_path / "r").manifest().server["quantization"])


def test_a_run_whose_api_server_is_killed_is_exit_4_and_leaves_no_engine_behind(
        model: Path, tmp_path: Path) -> None:
    with start("run", str(TINY / "tiny.toml"), "--concurrency", "2", "--duration", "60s", "--out",
               "r", *launched(model, "--api-key", "sk-secret", "--max-num-batched-tokens",
                              "2048"), cwd=tmp_path, env=ENV) as process:
        wait(running(tmp_path / "r", 10), START_S)
        engine = psutil.Process(pid_of(tmp_path, "VLLM::EngineCore"))
        worker = psutil.Process(pid_of(tmp_path, "VLLM::Worker"))
        os.kill(psutil.Process(engine.ppid()).pid, signal.SIGKILL)
        said = over(process, 60)
    assert alive([engine, worker]) == []
    assert said.code == cli.DIED, said.all
    assert "killed by signal 9" in said.out
    assert endings(tmp_path / "r") == ["server_died"]
    assert outcomes(tmp_path / "r")[Outcome.OK] >= 10
    manifest = RunFolder(tmp_path / "r").manifest()
    assert manifest.model == "tiny"
    facts = manifest.server
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", str(facts["version"]))
    assert facts["dtype"] == "bfloat16"
    assert facts["max_model_len"] == 4096
    assert facts["max_num_seqs"] == 64
    assert facts["max_num_batched_tokens"] == 2048
    assert (facts["gpus"], facts["driver"]) == (None, None)
    assert facts["tensor_parallel"] == 1
    assert facts["block_size"] == 128
    assert facts["kv_cache_tok"] == 128 * int(str(facts["kv_cache_blocks"]))
    assert facts["max_concurrency"] == int(str(facts["kv_cache_tok"])) / 4096
    assert facts["env"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert facts["model_config"]["hidden_size"] == 128
    for path in (tmp_path / "r").iterdir():
        assert b"sk-secret" not in path.read_bytes(), path


@pytest.mark.parametrize(("flags", "state", "cause"), [
    (["--max-model-len", "99999"], "START_FAILED", "max_model_len"),
    (["--kv-cache-memory-bytes", "1000"], "OOM_START: its process exited with code 1; log",
     "No available memory for the cache blocks")])
def test_a_vllm_that_dies_at_its_start_is_exit_4_with_its_cause(
        model: Path, tmp_path: Path, flags: list[str], state: str, cause: str) -> None:
    env = {k: v for k, v in ENV.items() if k != "VLLM_CPU_KVCACHE_SPACE"}  # it goes over the flag
    said = loadgen("run", str(TINY / "tiny.toml"), "--concurrency", "1", "--num-prompts", "1",
                   "--out", "r", *launched(model, *flags), cwd=tmp_path, env=env)
    assert said.code == cli.DIED, said.all
    first, *context = said.err.strip().splitlines()
    assert first.startswith(f"loadgen: the server died before it could serve: {state}: ")
    assert cause in first
    assert len(context) <= 10
    assert context[-1] == "  the whole log: r/server.log"


def test_a_flag_that_vllm_does_not_know_is_exit_4_in_its_words(
        model: Path, tmp_path: Path) -> None:
    said = loadgen("run", str(TINY / "tiny.toml"), "--concurrency", "1", "--num-prompts", "1",
                   "--out", "r", *launched(model, "--no-such-flag"), cwd=tmp_path)
    assert said.code == cli.DIED, said.all
    assert said.err.splitlines()[0].endswith(
        "exited with code 2; log: vllm: error: unrecognized arguments: --no-such-flag"), said.err


def test_a_model_that_is_not_there_is_exit_4_with_the_cause(tmp_path: Path) -> None:
    said = loadgen("run", str(TINY / "tiny.toml"), "--concurrency", "1", "--num-prompts", "1",
                   "--out", "r", *launched(tmp_path / "nosuch"), cwd=tmp_path)
    assert said.code == cli.DIED, said.all
    first = said.err.splitlines()[0]
    assert first.startswith("loadgen: the server died before it could serve: ")
    assert str(tmp_path / "nosuch") in first


def test_a_port_that_is_taken_is_exit_4_and_no_vllm_is_started(
        model: Path, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        said = loadgen("run", str(TINY / "tiny.toml"), "--concurrency", "1", "--num-prompts", "1",
                       "--out", "r", *launched(model, "--port", str(port)), cwd=tmp_path)
    assert said.code == cli.DIED, said.all
    assert said.err == (f"loadgen: cannot listen on 127.0.0.1:{port}: Address already in use; "
                        "choose another port with -- --port N, or none\n")
    assert list(tmp_path.iterdir()) == []


def test_a_serve_that_is_killed_leaves_no_engine_behind(model: Path, tmp_path: Path) -> None:
    with start("serve", "vllm", "--server-cmd", SERVE, "--model", str(model), "--port", "0", "--",
               *FLAGS, cwd=tmp_path, env=ENV) as process:
        wait(lambda: any("EngineCore" in x for x in processes_in(tmp_path).values()), START_S)
        process.kill()
        process.communicate()
    wait(lambda: not processes_in(tmp_path), 20)


def test_a_loadgen_that_is_killed_while_vllm_starts_leaves_nothing_behind(
        model: Path, tmp_path: Path) -> None:
    with start("run", str(TINY / "tiny.toml"), "--concurrency", "1", "--num-prompts", "1",
               *launched(model), cwd=tmp_path, env=ENV) as process:
        wait(lambda: any("EngineCore" in x for x in processes_in(tmp_path).values()), START_S)
        process.kill()
        process.communicate()
    wait(lambda: not processes_in(tmp_path), 20)


# -------------------------------------------------------------------------------------- its answers

CHECKED = """
[slo]
e2e = "300s"

[[classes]]
name = "forced"
kind = "json"
prompt_tokens = 600
output_tokens = 600
response_format = "json_schema"

[classes.validator]
check = "json"
schema = { type = "object", additionalProperties = false, required = ["errors", "top", "seen"], \
properties = { errors = { type = "integer", minimum = 0, maximum = 999 }, top = { type = "string", \
enum = ["view", "登录"] }, seen = { type = "array", minItems = 1, maxItems = 3, items = { \
type = "string", pattern = "^[a-z]{1,8}$" } } } }

[[classes]]
name = "named"
kind = "tools"
prompt_tokens = 300
output_tokens = 600
tool_choice = "named"
validator = { check = "tool" }

[[classes]]
name = "asked"
kind = "json"
prompt_tokens = 600
output_tokens = 60
validator = { check = "json" }

[[classes]]
name = "facts"
kind = "summary"
prompt_tokens = 512
output_tokens = 60
validator = { check = "facts" }

[[classes]]
name = "translation"
kind = "translation"
language = "zh"
into = "en"
prompt_tokens = 300
output_tokens = 60
validator = { check = "translation" }

[[classes]]
name = "code"
kind = "code"
prompt_tokens = 300
output_tokens = 60
validator = { check = "python" }
"""


def test_noise_is_told_from_what_guided_decoding_forces(served: str, tmp_path: Path) -> None:
    """The tiny model's words mean nothing: no check may pass but of what a grammar forced."""
    (tmp_path / "checked.toml").write_text(CHECKED, encoding="utf-8")
    said = loadgen("run", "./checked.toml", "--concurrency", "6", "--num-prompts", "60", "--out",
                   "r", "--base-url", served, cwd=tmp_path)
    assert said.code in JUDGED, said.all
    found: dict[str, set[str | None]] = {}
    for v in RunFolder(tmp_path / "r").verdicts().values():
        found.setdefault(v.cls, set()).add(v.kind)
    assert found["forced"] == {None}, said.all
    assert found["asked"] == {"invalid JSON"}
    assert found["facts"] == {"forgot a fact"}
    assert None not in found["translation"]
    assert None not in found["code"]
    assert "wrong tool" not in found["named"]  # the name is forced, and of the arguments the form
    assert "no tool call" not in found["named"]
    run = frame.load(tmp_path / "r")
    assert run.judgements[0].good <= sum(n for c, (_, n) in run.judgements[0].classes.items()
                                         if c in ("forced", "named"))


CPU_BLOCK_TOK = 128  # vLLM's, on a CPU
TRACE = """
load = { mode = "trace", format = "mooncake", path = "t.jsonl", to = "40s", scale = 2.0 }
slo = { ttft = "30s" }
[[classes]]
name = "chat"
kind = "chat"
prompt_tokens = 600
output_tokens = 8
sampling = { ignore_eos = true }
"""


def test_a_real_prefix_cache_holds_what_the_hash_ids_say(served: str, tmp_path: Path) -> None:
    """A trace's shared blocks: what its prefix cache holds of each prompt is what the trace's hash
    ids say."""
    talks(tmp_path / "t.jsonl")  # four turns of ten users in 40 s
    (tmp_path / "s.toml").write_text(TRACE)
    said = loadgen("run", "./s.toml", "--base-url", served, "--seed", "5", "--out", "r",
                   "--no-report", cwd=tmp_path)
    assert said.code in JUDGED, said.all
    folder = RunFolder(tmp_path / "r")
    ((leg, _),) = folder.legs()
    assert isinstance(leg.load, Trace)
    records = sorted(folder.records(), key=lambda r: r.session)
    assert {r.outcome for r in records} == {Outcome.OK}, said.all
    assert len(records) == len(leg.load.due_s) == 40
    implied = shared_tok(leg.load.asked)
    near = [abs((r.cached_tok or 0) - implied[r.session]) < CPU_BLOCK_TOK for r in records]
    assert sum(near) >= 36, [(r.cached_tok, implied[r.session]) for r in records]  # one that comes
    # while the prompt before it is computed finds less
    cached = sum(r.cached_tok or 0 for r in records) / sum(r.prompt_tok or 0 for r in records)
    assert cached > 0.45
    assert "prompts-reused" not in said.all
    assert "prefix-not-reused" not in said.all
