"""Kinds of servers that are launched: what `--server` takes, the fifth kind as the README shows it,
and the words that start Hugging Face's."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from loadgen import cli
from loadgen.errors import ScenarioError
from loadgen.record import Outcome
from loadgen.store import RunFolder
from servers.launched import LaunchedServer, without
from servers.transformers import APP, TransformersServer
from tests.real import kept, loadgen, processes_in, wait

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LLAMA = '''#!{python}
"""A stand-in for llama.cpp's server: its options and log, the simulator's answers."""
import os, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert set(given) == {{"--model", "--host", "--port", "-ngl"}}, given
print("slot   load_model: id  0 | task -1 | new slot, n_ctx_slot = 4096", flush=True)
os.execv(sys.executable, [sys.executable, "-m", "servers.sim", "--host", given["--host"], "--port",
         given["--port"], "--served-model-name", given["--model"], "--speed", "10"])
'''


def fifth() -> str:
    """The code that the README shows."""
    shown = re.search(r"`llama_cpp\.py`:\n\n```python\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    return shown[1]


def stand_in(folder: Path) -> dict[str, str]:
    """An environment with a llama-server on its PATH."""
    program = folder / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(LLAMA.format(python=sys.executable))
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{os.environ['PATH']}"}


def test_a_fifth_kind_is_a_short_file() -> None:
    assert len(fifth().splitlines()) < 100


@pytest.mark.slow
def test_the_fifth_kind_of_the_readme_is_started_measured_and_ended(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text(fifth())
    said = loadgen("run", "smoke", "--num-prompts", "20", "--out", "r", "--no-report", "--server",
                   "llama_cpp.py", "--model", "qwen.gguf", "--", "-ngl", "99", cwd=tmp_path,
                   env=stand_in(tmp_path))
    assert said.code in (cli.PASS, cli.INCONCLUSIVE), said.all
    assert [r.outcome for r in kept(tmp_path / "r")] == [Outcome.OK] * 20
    manifest = RunFolder(tmp_path / "r").manifest()
    assert manifest.model == "qwen.gguf"
    assert manifest.server["kind"] == "llama.cpp"
    assert manifest.server["context_tok"] == 4096
    assert manifest.server["simulated"] is False
    command = manifest.server["command"]
    assert isinstance(command, list)
    assert command[1:5] == ["--model", "qwen.gguf", "--host", "127.0.0.1"]
    wait(lambda: not processes_in(tmp_path), 5)


@pytest.mark.slow
def test_a_fifth_kind_that_ends_at_once_is_exit_4_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(fifth())
    said = loadgen("run", "smoke", "--num-prompts", "1", "--out", "r", "--server", "mine.py",
                   "--model", "m", "--", "--no-such", "1", cwd=tmp_path, env=stand_in(tmp_path))
    assert said.code == cli.DIED, said.all
    assert "exited with code 1" in said.err
    assert "AssertionError" in said.err


@pytest.mark.parametrize(("source", "words"), [
    (None, "there is no such file"), ("x = 1", "has no class Server"),
    ("import nosuch", "cannot be loaded: ModuleNotFoundError: No module named 'nosuch'"),
    ("def", "cannot be loaded: SyntaxError"), ("README", "there is no program 'llama-server'")])
def test_a_file_that_is_no_kind_is_exit_2_with_what_is_wrong(
        tmp_path: Path, source: str | None, words: str) -> None:
    if source is not None:
        (tmp_path / "mine.py").write_text(fifth() if source == "README" else source)
    said = loadgen("run", "smoke", "--num-prompts", "1", "--server", "mine.py", "--model", "m",
                   cwd=tmp_path)
    assert said.code == cli.USAGE, said.all
    assert words in said.err
    assert "Traceback" not in said.all


@pytest.mark.parametrize("command", [["run", "smoke", "--server", "tgi"], ["serve", "tgi"]])
def test_a_kind_that_is_none_is_refused_with_those_that_are(
        tmp_path: Path, command: list[str]) -> None:
    said = loadgen(*command, cwd=tmp_path)
    assert said.code == cli.USAGE
    assert "sim, vllm, transformers, or FILE.py" in said.err


# --------------------------------------------------------------------------- what they all share


class Plain(LaunchedServer):
    kind = "plain"

    def words(self, instead: list[str]) -> list[str]:
        return [*instead, self.model, "--port", str(self.port)]


@pytest.mark.parametrize("port", ["x", "65536", "-1"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(ScenarioError, match=f"--port {port}"):
        Plain("m", ["--port", port], Path("log"))


def test_a_free_port_is_kept_over_restarts() -> None:
    server = Plain("m", ["--port", "0"], Path("log"))
    assert server.port > 0
    assert server.command[-1] == str(server.port)


def test_a_server_that_was_not_started_is_not_alive_and_has_few_facts() -> None:
    server = Plain("m", [], Path("log"), ["x", "--token", "secret", "--"])
    assert server.alive() == "it was not started"
    assert server.pid is None
    assert server.facts() == {"kind": "plain", "simulated": False, "model": "m", "command": [
        "x", "--token", "***", "--", "m", "--port", str(server.port)]}
    server.stop()


@pytest.mark.parametrize(("options", "left"), [
    (["--port", "1", "--seed", "2"], ["--seed", "2"]), (["--port=1", "-x"], ["-x"]),
    (["-a", "1", "--port", "1", "2"], ["-a", "1"])])
def test_options_that_are_given_otherwise_are_left_out(
        options: list[str], left: list[str]) -> None:
    assert without(options, "--port") == left


# ------------------------------------------------------------------------------------ transformers


def hf(*options: str, instead: list[str] | None = None) -> TransformersServer:
    return TransformersServer("m", options, Path("log"), instead or [])


def test_the_app_is_run_by_the_python_that_is_named() -> None:
    server = hf("--port", "81", "--cache", "static", instead=[sys.executable])
    assert server.command == [sys.executable, str(APP), "m", "--host", "127.0.0.1", "--port", "81",
                              "--cache", "static"]
    assert hf("--served-model-name", "a", instead=[sys.executable]).target.model == "a"


def test_transformers_own_server_gets_model_and_bfloat16() -> None:
    own = ["env", "transformers", "serve"]
    rest = ["m", "--host", "127.0.0.1", "--port", "81"]
    assert hf("--port", "81", instead=own).command[1:] == [
        "transformers", "serve", *rest, "--dtype", "bfloat16"]
    assert hf("--port", "81", "--dtype", "auto", instead=own).command[1:] == [
        "transformers", "serve", *rest, "--dtype", "auto"]


def test_a_python_without_transformers_is_said_with_what_to_do(
        monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_it(name: str, *more: Any) -> Any:
        return None if name == "transformers" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without_it)
    with pytest.raises(ScenarioError, match=r"loadgen\[transformers\].*--server-cmd"):
        hf()
    with pytest.raises(ScenarioError, match="nosuch"):
        hf(instead=["nosuch"])


def test_facts_are_what_the_app_says_of_itself() -> None:
    server = hf(instead=[sys.executable])
    assert server.learned(["INFO [app.py] facts: {\"version\": \"5.19.0\"}"]) == {}
    found = server.learned(["INFO [app.py] facts: {\"version\": \"5.19.0\", \"torch\": \"2.13\"}",
                            "INFO [app.py] Application startup complete: m at 127.0.0.1:81"])
    assert (found["version"], found["torch"]) == ("5.19.0", "2.13")
    assert {"gpus", "driver", "model_config"} <= set(found)
