"""Each death of a server, of a real vLLM (on a CPU, with a tiny model), by real signals and by a
plugin that raises inside its engine (`tests/vllm/inject`). Needs what test_vllm_real.py needs."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from loadgen import cli
from tests import test_vllm_real as real
from tests.real import endings, over, pid_of, processes_in, running, start, wait
from tests.test_states import states, summary
from tests.test_vllm_real import ENV, START_S, TINY, launched, model, nobody_is_left

pytestmark = real.pytestmark
__all__ = ["model", "nobody_is_left"]  # fixtures
INJECT = TINY / "inject"


def raises(what: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / "coming").write_text(what)
        (folder / "coming").rename(folder / "fault")
    return harm


def sends(sig: int, name: str) -> Callable[[Path], None]:
    return lambda folder: os.kill(pid_of(folder, name), sig)


@pytest.mark.parametrize(("harm", "state", "says"), [
    (raises("oom"), "OOM_RUNTIME", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"),
    (raises("boom"), "ENGINE_DEAD", "RuntimeError: boom"),
    (sends(signal.SIGKILL, "VLLM::Worker"), "KILLED", "VllmWorker-0 died unexpectedly"),
    (sends(signal.SIGKILL, "VLLM::EngineCore"), "KILLED", "ended without a word"),
    (sends(signal.SIGSTOP, "VLLM::Worker"), "HUNG", "/health says 200")],
    ids=["oom", "raises", "worker killed", "engine killed", "worker stopped"])
def test_what_befalls_an_engine_under_load_is_named(
        model: Path, tmp_path: Path, harm: Callable[[Path], None], state: str, says: str) -> None:
    """A vLLM whose engine died exits with 0, its clients hear "see stack trace (above)", and one
    that hangs says that it is well: the name comes from elsewhere."""
    env = {**ENV, "FAULT_TRIGGER": str(tmp_path / "fault"),
           "PYTHONPATH": f"{INJECT}:{os.environ.get('PYTHONPATH', '')}"}
    with start("run", str(TINY / "tiny.toml"), "--concurrency", "4", "--duration", "90s", "--out",
               "r", "--no-report", *launched(model), cwd=tmp_path, env=env) as process:
        wait(running(tmp_path / "r", 20), START_S)
        harm(tmp_path)
        said = over(process, 120)
    assert said.code == cli.DIED, said.all
    assert f"the server died at 4: {state}: " in said.out, said.out
    assert says in said.out
    assert endings(tmp_path / "r") == ["server_died"]
    seen = [x for x in states(tmp_path / "r") if x != "DEGRADED"]
    assert (seen[0], seen[1], seen[-1]) == ("STARTING", "READY", state)
    assert "SERVING" in seen
    last = summary(tmp_path / "r")["server"]["states"][-1]
    assert (last["state"], last["leg"]) == (state, "run")
    assert says in last["why"]
    assert processes_in(tmp_path) == {}


def test_a_cache_that_is_full_degrades_a_vllm_that_serves_on(model: Path, tmp_path: Path) -> None:
    said = real.loadgen(
        "run", str(TINY / "tiny.toml"), "--concurrency", "24", "--num-prompts", "300", "--out", "r",
        "--no-report", *launched(model, "--num-gpu-blocks-override", "8", "--max-model-len",
                                 "512"), cwd=tmp_path, env=ENV)
    assert said.code != cli.DIED, said.all
    told = [x for x in summary(tmp_path / "r")["server"]["states"] if x["state"] == "DEGRADED"]
    assert told, said.all
    assert "KV cache" in told[0]["why"] or "preemptions" in told[0]["why"]


def test_a_folder_without_a_model_is_a_failed_start(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = real.loadgen("run", str(TINY / "tiny.toml"), "--concurrency", "1", "--num-prompts", "1",
                        "--out", "r", *launched(tmp_path / "empty"), cwd=tmp_path)
    assert said.code == cli.DIED, said.all
    assert said.err.startswith("loadgen: the server died before it could serve: START_FAILED: ")
