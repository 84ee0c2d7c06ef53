"""A vLLM that is launched: its command, and whole runs on a stand-in (`fake_vllm.py`). The real
one is in test_vllm_real.py."""

import contextlib
import http.server
import json
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadgen import cli
from loadgen.errors import ScenarioError, ServerError
from loadgen.store import RunFolder
from servers.base import free_port
from servers.vllm import VllmServer, _cache_config, _environment
from tests.real import Said, endings, kept, loadgen, processes_in, running, start, wait

FAKE = [sys.executable, str(Path(__file__).with_name("fake_vllm.py"))]
BY = ["--server-cmd", " ".join(FAKE), "--model", "/models/tiny"]


def server(*options: str, model: str | None = "/models/tiny") -> VllmServer:
    return VllmServer(model, options, Path("server.log"), FAKE)


# ----------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(("options", "url", "model"), [
    ([], r"http://127\.0\.0\.1:\d{4,5}", "/models/tiny"),
    (["--port", "0"], r"http://127\.0\.0\.1:[1-9]\d{3,4}", "/models/tiny"),
    (["--host", "0.0.0.0", "--port=81"], r"http://127\.0\.0\.1:81", "/models/tiny"),
    (["--host=::", "--port", "81"], r"http://\[::1\]:81", "/models/tiny"),
    (["--port", "81", "--port", "82"], r"http://127\.0\.0\.1:82", "/models/tiny"),
    (["--served-model-name", "a", "b"], r"http://127.*", "a"),
    (["--served_model_name=a"], r"http://127.*", "a"),
    (["--seed", "3", "--served-model-name", "a"], r"http://127.*", "a")])
def test_the_target_is_what_the_options_say(options: list[str], url: str, model: str) -> None:
    target = server(*options).target
    assert re.fullmatch(url, target.base_url)
    assert target.model == model
    assert target.headers == {}


def test_the_command_is_model_host_port_and_the_options() -> None:
    made = server("--max-num-seqs", "8", "--port", "81", "--served-model-name", "a", "b",
                  "--enforce-eager").command
    assert made == [*FAKE, "/models/tiny", "--host", "127.0.0.1", "--port", "81",
                    "--max-num-seqs", "8", "--served-model-name", "a", "b", "--enforce-eager"]


@pytest.mark.parametrize("options", [["--api-key", "sk-1", "sk-2"], ["--api_key=sk-1"]])
def test_a_key_is_used_and_stands_in_no_command(options: list[str]) -> None:
    made = server(*options, "--enforce-eager")
    assert made.target.headers == {"Authorization": "Bearer sk-1"}
    assert "sk-" not in " ".join(made.command)
    assert made.command[-1] == "--enforce-eager"
    assert made.env["VLLM_API_KEY"] == "sk-1"
    assert "sk-1" not in str(made.facts())


@contextlib.contextmanager
def saying(answers: dict[str, str]) -> Iterator[str]:
    """A server that knows these paths; its URL."""
    class Info(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(answers.get(self.path, "").encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Info) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{it.server_port}"
        it.shutdown()


def test_only_a_vllm_that_nobody_else_reaches_is_in_dev_mode(
        monkeypatch: pytest.MonkeyPatch) -> None:
    assert server().env == {"VLLM_SERVER_DEV_MODE": "1"}
    assert server("--host", "0.0.0.0").env == {}
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
    assert server().env == {"VLLM_SERVER_DEV_MODE": "0"}


def test_blocks_of_all_engines_are_the_sum_that_each_one_s_line_says() -> None:
    lines = [f'vllm:cache_config_info{{block_size="128",engine="{n}",num_gpu_blocks="{blocks}"}} 1'
             for n, blocks in enumerate((984, 984))]
    with saying({"/metrics": "\n".join(["# HELP x", *lines, "vllm:x 1"])}) as url:
        assert _cache_config(url) == {"block_size": 128, "kv_cache_blocks": 984}
    with saying({"/metrics": lines[0].replace("984", "None")}) as url:
        assert _cache_config(url) == {"block_size": 128}
    assert _cache_config(url) == {}


START = ["(APIServer pid=1) INFO:     Application startup complete.",
         "(EngineCore pid=2) INFO 11-21 10:00:00 [core.py:133] Initializing a V1 LLM engine "
         "(v0.32.0) with config: model='m', tensor_parallel_size=2, pipeline_parallel_size=1, "
         "data_parallel_size=1, quantization={}"]


@pytest.mark.parametrize(("config", "flags", "log", "named"), [
    (None, [], "None", None), ("awq", [], "None", "awq"), ("awq", [], "awq_marlin", "awq_marlin"),
    (None, ["-q", "gptq"], "None", "gptq"), ("gptq", ["--quantization=gptq"], "gptq", "gptq")])
def test_the_quantisation_is_named_by_log_or_flag_or_config(
        tmp_path: Path, config: str | None, flags: list[str], log: str,
        named: str | None) -> None:
    quantized = {"quantization_config": {"quant_method": config}} if config else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **quantized}))
    made = server(*flags, "--max-num-seqs", "8", model=str(tmp_path))
    found = made.learned([*START[:1], START[1].format(log)])
    assert found.get("quantization") == named
    assert found["tensor_parallel"] == 2
    assert found["model_config"]["model_type"] == "qwen2"
    assert {"gpus", "driver"} <= set(found)


def test_nothing_is_learned_before_it_serves() -> None:
    assert server().learned(START[1:]) == {}


def test_a_key_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-3")
    assert server().target.headers == {"Authorization": "Bearer sk-3"}


@pytest.mark.parametrize(("options", "words"), [
    (["--uds", "/x"], "TCP"), (["--ssl-keyfile=x"], "--base-url"), (["--ssl_certfile", "x"], "TLS"),
    (["--model", "other"], "once"), (["other"], "once"), (["--headless"], "API server"),
    (["--help"], "vllm serve --help"), (["--port", "x"], "--port x"),
    (["--port=65536"], "65536"), (["--port", "-1"], "--port -1")])
def test_what_cannot_work_is_refused(options: list[str], words: str) -> None:
    with pytest.raises(ScenarioError, match=re.escape(words)):
        server(*options)


def test_a_model_is_needed() -> None:
    with pytest.raises(ScenarioError, match="--model"):
        server(model=None)


def test_a_vllm_that_is_not_there_is_said_with_what_to_do(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ScenarioError, match=r"pip install vllm.*--server-cmd"):
        VllmServer("m", [], tmp_path / "log")
    with pytest.raises(ScenarioError, match="nosuch"):
        VllmServer("m", [], tmp_path / "log", ["nosuch", "serve"])
    for place in ("python", "vllm"):
        (tmp_path / place).write_text("#!/bin/sh\n")
        (tmp_path / place).chmod(0o755)
    assert VllmServer("m", [], tmp_path / "log").command[:3] == [
        str(tmp_path / "vllm"), "serve", "m"]


def test_a_port_that_is_taken_is_nobody_s_vllm(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(ServerError, match="choose another port"):
            server("--port", str(s.getsockname()[1])).start()


def test_secrets_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VLLM_API_KEY": "sk-1", "HF_HUB_TOKEN": "hf-1", "VLLM_X": "http://u:p@h",
                        "VLLM_CPU_KVCACHE_SPACE": "1", "SECRET": "x"}.items():
        monkeypatch.setenv(name, value)
    said = _environment()
    assert said["VLLM_API_KEY"] == said["HF_HUB_TOKEN"] == "***"
    assert said["VLLM_X"] == "http://***@h"
    assert said["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "SECRET" not in said


def test_words_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for words in (["--server", "sim", *BY], ["--base-url", "http://127.0.0.1:1", *BY],
                  ["--server", "vllm"], ["--server-cmd", "a 'b", "--model", "m"]):
        said = loadgen("run", "smoke", "--num-prompts", "3", *words, cwd=tmp_path)
        assert said.code == cli.USAGE, said.all
        assert "Traceback" not in said.all
    said = loadgen("serve", "sim", "--model", "m", cwd=tmp_path)
    assert said.code == cli.USAGE
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------- whole runs on the stand-in


def nobody_left(folder: Path) -> None:
    wait(lambda: not processes_in(folder), 5)


def run(folder: Path, *words: str, env: dict[str, str] | None = None) -> Said:
    said = loadgen("run", "smoke", "--num-prompts", "40", "--out", "r", "--no-report", *words,
                   cwd=folder, env=env)
    nobody_left(folder)
    assert "Traceback" not in said.all, said.all
    return said


@pytest.mark.slow
def test_a_run_launches_waits_measures_and_leaves_nobody_behind(tmp_path: Path) -> None:
    said = run(tmp_path, "--server-cmd", f"{BY[1]} --hf-token sk-secret", *BY[2:], "--",
               "--served-model-name", "tiny", "--start-s", "2", "--api-key", "sk-secret")
    assert said.code in (cli.PASS, cli.INCONCLUSIVE), said.all
    assert "waiting for the server, at most 30:00" in said.out
    manifest = RunFolder(tmp_path / "r").manifest()
    assert manifest.model == "tiny"
    assert manifest.server["kind"] == "vllm"
    assert manifest.server["simulated"] is False
    assert manifest.server["version"] == "0.32.0"
    assert manifest.server["max_num_seqs"] == 32
    assert manifest.server["model"] == "/models/tiny"
    assert len(kept(tmp_path / "r")) == 40
    for path in (tmp_path / "r").iterdir():
        assert b"sk-secret" not in path.read_bytes(), path


@pytest.mark.slow
@pytest.mark.parametrize(("log", "state", "cause"), [
    ("kv_too_small.log", "OOM_START", "ValueError: No available memory for the cache blocks."),
    ("bad_model_dir.log", "START_FAILED", "HFValidationError: Repo id must be in the form")])
def test_a_death_at_the_start_is_exit_4_with_its_cause_first(tmp_path: Path, log: str, state: str,
                                                             cause: str) -> None:
    said = run(tmp_path, *BY, "--", "--die-as", log)
    assert said.code == cli.DIED
    first, *context = said.err.strip().splitlines()
    assert first.startswith(f"loadgen: the server died before it could serve: {state}: its "
                            "process exited with code 1; log: ")
    assert cause in first
    assert len(context) <= 10
    assert all(x.startswith("  ") for x in context)
    assert context[-1] == "  the whole log: r/server.log"


@pytest.mark.slow
def test_patience_ends(tmp_path: Path) -> None:
    said = run(tmp_path, *BY, "--start-timeout", "2s", "--", "--start-s", "60")
    assert said.code == cli.DIED
    assert "no streamed answer within 2 s" in said.err
    assert "CPU KV cache size: 768 tokens" in said.err  # what it said last


@pytest.mark.slow
def test_one_that_listens_no_more_and_does_not_end_is_named_by_its_log(tmp_path: Path) -> None:
    """As a real vLLM 0.32 with `-dp 2`, one of whose engines was killed."""
    said = run(tmp_path, "--num-prompts", "400", "--concurrency", "4", *BY, "--", "--fault",
               "die@4", "--linger-as", "dp_engine_killed.log")
    assert said.code == cli.DIED, said.all
    assert "the server died at 4: KILLED: " in said.out, said.out
    assert "; log: its engine ended without a word" in said.out
    assert endings(tmp_path / "r") == ["server_died"]


@pytest.mark.slow
def test_after_a_death_the_sweep_goes_on_with_a_new_server(tmp_path: Path) -> None:
    said = loadgen("sweep", "smoke", "--max-concurrency", "4", "--levels", "2,4", "--budget",
                   "60s", "--out", "r", "--no-report", *BY, "--", "--fault", "oom@4",
                   cwd=tmp_path, timeout=100)
    nobody_left(tmp_path)
    assert said.code == cli.PASS, said.all
    assert "restarting the server" in said.out
    assert "CUDA out of memory" in said.out
    assert "Safe up to 2 concurrent requests" in said.out
    assert "server_died" in endings(tmp_path / "r")
    assert (tmp_path / "r" / "server.log").read_text().count("Starting vLLM server") == 2


@pytest.mark.slow
def test_what_was_found_stands_if_the_server_does_not_come_up_again(tmp_path: Path) -> None:
    script = tmp_path / "once.sh"
    script.write_text(f"#!/bin/sh\n[ -e {tmp_path}/once ] && exec {' '.join(FAKE)} "
                      f"--die-as kv_too_small.log \"$@\"\ntouch {tmp_path}/once\n"
                      f"exec {' '.join(FAKE)} \"$@\"\n")
    script.chmod(0o755)
    said = loadgen("sweep", "smoke", "--max-concurrency", "4", "--levels", "2,4", "--budget",
                   "60s", "--out", "r", "--server-cmd", str(script), "--model", "m", "--",
                   "--fault", "oom@4", cwd=tmp_path, timeout=100)
    nobody_left(tmp_path)
    assert said.code == cli.DIED, said.all
    assert "could not be restarted" in said.out
    assert "No available memory for the cache blocks" in said.out
    assert (tmp_path / "r" / "report.html").exists()
    assert endings(tmp_path / "r")[0] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "load"])
def test_a_loadgen_that_is_killed_leaves_no_server_behind(tmp_path: Path, moment: str) -> None:
    with start("run", "smoke", "--concurrency", "2", "--duration", "60s", "--out", "r", *BY, "--",
               "--start-s", "30" if moment == "start" else "0", cwd=tmp_path) as process:
        log = tmp_path / "r" / "server.log"
        wait(running(tmp_path / "r", 5) if moment == "load"
             else lambda: log.exists() and "KV cache" in log.read_text())
        process.kill()
        process.communicate()
    wait(lambda: not processes_in(tmp_path), 15)


@pytest.mark.slow
def test_serve_runs_the_vllm_and_leaves_nobody_behind(tmp_path: Path) -> None:
    port = free_port()
    with start("serve", "vllm", *BY, "--port", str(port), cwd=tmp_path) as process:
        with socket.socket() as s:
            wait(lambda: s.connect_ex(("127.0.0.1", port)) == 0)
        said = loadgen("run", "smoke", "--num-prompts", "10", "--no-report", "--out", "r",
                       "--base-url", f"http://127.0.0.1:{port}", cwd=tmp_path)
        assert said.code in (cli.PASS, cli.INCONCLUSIVE), said.all
        assert RunFolder(tmp_path / "r").manifest().model == "/models/tiny"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        process.communicate()
    nobody_left(tmp_path)  # nor the stand-in's engine, which hears no SIGTERM


@pytest.mark.slow
def test_a_serve_that_is_killed_leaves_no_engine_behind(tmp_path: Path) -> None:
    port = free_port()
    with start("serve", "vllm", *BY, "--port", str(port), cwd=tmp_path) as process:
        with socket.socket() as s:
            wait(lambda: s.connect_ex(("127.0.0.1", port)) == 0)
        assert len(processes_in(tmp_path)) >= 4  # serve, guard, API server, engine
        process.kill()
        process.communicate()
    wait(lambda: not processes_in(tmp_path), 15)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "code"), [
    (["--die-as", "kv_too_small.log"], 1), (["--die-by", "9"], 137)])
def test_serve_ends_as_the_server_did(tmp_path: Path, words: list[str], code: int) -> None:
    said = loadgen("serve", "vllm", *BY, "--port", "0", "--", *words, cwd=tmp_path)
    assert said.code == code, said.all
    nobody_left(tmp_path)
