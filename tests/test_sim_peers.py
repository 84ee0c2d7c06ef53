"""Other load testers against the simulator, unchanged, each in its own environment: they accept
every answer, and count what the simulator counts."""

import json
import os
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.benchmarks.peers import PEERS
from tests.test_sim_app import process
from tests.test_vllm_real import TINY, VLLM

N, STREAMS, TOKENS = 12, 3, 24
pytestmark = pytest.mark.slow


class Counted(NamedTuple):
    """`prompt_tok` None: it counts them with its own tokenizer, without the chat template."""

    good: int
    bad: int
    output_tok: float
    prompt_tok: float | None


def _of_guidellm(folder: Path) -> Counted:
    metrics = _json(folder / "guidellm.json")["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    return Counted(totals["successful"], totals["errored"] + totals["incomplete"], *(
        metrics[f"{of}_token_count"]["successful"]["total_sum"] for of in ("output", "prompt")))


def _of_aiperf(folder: Path) -> Counted:
    found = _json(folder / "aiperf" / "profile_export_aiperf.json")
    good, ended, output, prompt = (found[name]["avg"] for name in (
        "request_count", "completed_request_count", "total_usage_completion_tokens",
        "total_usage_prompt_tokens"))
    return Counted(good, ended - good, output, prompt)


def _of_vllm(folder: Path) -> Counted:
    found = _json(folder / "vllm.json")
    return Counted(found["completed"], found["failed"], found["total_output_tokens"], None)


class Peer(NamedTuple):
    binary: Path
    needs: str
    counted: Callable[[Path], Counted]


def _venv(name: str) -> tuple[Path, str]:
    """The command of $LOADGEN_TEST_NAME (its venv), and how to make one."""
    variable = f"LOADGEN_TEST_{name.upper()}"
    return (Path(os.environ.get(variable) or f"no-{name}") / "bin" / name,
            f"needs {name}: python3 -m venv V && V/bin/pip install {name}, then {variable}=V")


FOUND = {"guidellm": Peer(*_venv("guidellm"), _of_guidellm),
         "aiperf": Peer(*_venv("aiperf"), _of_aiperf),
         "vllm": Peer(VLLM, "needs a vLLM: tests/vllm/install.sh, or its command in "
                            "$LOADGEN_TEST_VLLM", _of_vllm)}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.skipif(
    not os.access(peer.binary, os.X_OK), reason=peer.needs)) for name, peer in FOUND.items()])
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def test_a_peer_accepts_every_answer_and_counts_what_the_simulator_counts(
        name: str, tmp_path: Path) -> None:
    peer = FOUND[name]
    subprocess.run([peer.binary.with_name("python"), TINY / "make_tiny_model.py",
                    tmp_path / "tiny"], check=True, timeout=60)
    tool = PEERS[name](peer.binary, tmp_path / "tiny")
    with process("--gpu", "4090d") as (_, port):
        values = {"port": port, "n": N, "streams": STREAMS, "each": N // STREAMS,
                  "tokens": TOKENS, "folder": tmp_path}
        words = [word.format(**values) for word in (*tool.command, *tool.load)]
        done = subprocess.run(words, cwd=tmp_path, env={**os.environ, **tool.env}, text=True,
                              capture_output=True, timeout=150, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        said = metrics_of(port)
    counted = peer.counted(tmp_path)
    assert counted[:3] == (N, 0, N * TOKENS)
    assert said["vllm:request_success", "length"] == N
    assert said["http_requests", "2xx"] == N  # and none of another status
    assert said["vllm:generation_tokens", ""] == N * TOKENS
    if counted.prompt_tok is not None:
        assert said["vllm:prompt_tokens", ""] == pytest.approx(counted.prompt_tok)
    assert said["vllm:num_requests_running", ""] == said["vllm:num_requests_waiting", ""] == 0


def metrics_of(port: int) -> dict[tuple[str, str], float]:
    """By name and reason or status; of requests, those to chat completions."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            if labels.get("handler", "/v1/chat/completions") != "/v1/chat/completions":
                continue
            kind = labels.get("finished_reason") or labels.get("status") or ""
            found[sample.name.removesuffix("_total"), kind] = sample.value
    assert [s for n, s in found if n == "http_requests" and s != "2xx"] == []
    return found


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found
