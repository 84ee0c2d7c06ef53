"""`model.generate` behind our small web app, with real PyTorch on a CPU: by the Python of the vLLM
that tests/vllm/install.sh installs, or of $LOADGEN_TEST_TRANSFORMERS. Models are made here."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadgen import cli, openai
from loadgen.record import Outcome
from loadgen.sse import SseParser
from loadgen.store import RunFolder
from servers.base import free_port
from servers.transformers import TransformersServer
from tests import real
from tests.real import Said, kept, processes_in, wait
from tests.test_vllm_real import NEEDED, TINY, VLLM

PYTHON = Path(os.environ.get("LOADGEN_TEST_TRANSFORMERS") or VLLM.with_name("python"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not NEEDED and not os.access(PYTHON, os.X_OK),
    reason="needs a Python with transformers: tests/vllm/install.sh, or one in "
           "$LOADGEN_TEST_TRANSFORMERS")]

ENV = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
START_S = 120
WANT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12}
ENDLESS = {"ignore_eos": True}


def made(folder: Path, **config: Any) -> Path:
    subprocess.run([PYTHON, TINY / "make_tiny_model.py", folder], check=True, timeout=60)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def fat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little to compute, and a KV cache of 128 KB for a token; every second token ends it."""
    folder = made(tmp_path_factory.mktemp("model") / "fat", hidden_size=64, intermediate_size=64,
                  num_hidden_layers=8, num_attention_heads=64, num_key_value_heads=64, head_dim=64)
    (folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": list(range(0, 720, 2)), "pad_token_id": 0}))
    return folder


class Served:
    """A server that has started, and what it says."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.server = TransformersServer(
            str(model), ["--load-format", "dummy", "--served-model-name", "m", *options], log,
            [str(PYTHON)])
        self.server.env |= ENV
        self.log = log
        self.url = self.server.start().base_url
        wait(self._serves, START_S)

    def _serves(self) -> bool:
        died = self.server.alive()
        assert died is None, died
        try:
            return bool(self.get("/health") == {})
        except OSError:
            return False

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def post(self, path: str, body: object) -> tuple[int, bytes]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as e:
            return e.code, e.read()

    def chat(self, **more: Any) -> dict[str, Any]:
        status, body = self.post("/v1/chat/completions", WANT | more)
        assert status == 200, body
        answer: dict[str, Any] = json.loads(body)
        return answer

    def stream(self, path: str, **body: Any) -> list[openai.Event]:
        status, said = self.post(path, {"stream": True, **body})
        assert status == 200, said
        return [openai.read(x, first=i == 0) for i, x in enumerate(SseParser().feed(said))]

    @property
    def process(self) -> psutil.Process:
        process = self.server._process
        assert process is not None
        return next(p for p in psutil.Process(process.pid).children(recursive=True)
                    if "app.py" in " ".join(p.cmdline()))


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    it = Served(tiny, tmp_path_factory.mktemp("served") / "log")
    yield it
    it.server.stop()


@pytest.fixture(scope="module")
def tight(fat: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A host with room for a few requests of 132 tokens, 17 MB each."""
    it = Served(fat, tmp_path_factory.mktemp("tight") / "log", "--cache", "static",
                "--memory-headroom-mb", "120")
    yield it
    it.server.stop()


# -------------------------------------------------------------------------------------- the wire


@pytest.mark.parametrize(("path", "prompt"), [
    ("/v1/chat/completions", {"messages": WANT["messages"]}),
    ("/v1/completions", {"prompt": "Hello"}), ("/v1/completions", {"prompt": [1, 2, 3, 4]})])
def test_a_stream_has_an_event_for_each_token_and_usage(
        served: Served, path: str, prompt: dict[str, Any]) -> None:
    events = served.stream(path, max_tokens=12, stream_options={"include_usage": True},
                           temperature=0.7, top_p=0.9, **ENDLESS, **prompt)
    assert sum(x.token for x in events) == 12
    assert [x.finish_reason for x in events if x.finish_reason] == ["length"]
    assert [x.usage.completion_tokens for x in events if x.usage] == [12]
    assert events[-1].done
    count = json.loads(served.post("/tokenize", prompt)[1])["count"]
    assert [x.usage.prompt_tokens for x in events if x.usage] == [count]


def test_without_being_asked_it_sends_no_usage(served: Served) -> None:
    assert not any(x.usage for x in served.stream("/v1/chat/completions", **WANT))


def test_half_characters_are_held_back_until_they_are_whole(served: Served) -> None:
    """A random model speaks in bytes; what was told in pieces is what it told in all."""
    events = served.stream("/v1/completions", prompt="Hi", max_tokens=200, temperature=2,
                           **ENDLESS)
    assert sum(x.token for x in events) == 200
    assert any(x.token and not x.text for x in events)
    assert not any(x.text.endswith("\ufffd") for x in events)


def test_temperature_is_honoured(served: Served) -> None:
    cold = {served.chat(temperature=0)["choices"][0]["message"]["content"] for _ in range(2)}
    hot = {served.chat(temperature=2)["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(cold) == 1
    assert len(hot) > 1


def test_an_answer_ends_at_its_end_token_or_at_its_length(tight: Served) -> None:
    ends = Counter(tight.chat(temperature=1)["choices"][0]["finish_reason"] for _ in range(6))
    assert ends["stop"] >= 5  # each token is the end with a chance of a half
    whole = tight.chat(**ENDLESS)
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize(("body", "words"), [
    ({"model": "other"}, "`other` does not exist"), ({"max_tokens": 99999}, "max_tokens must be"),
    ({"max_tokens": "x"}, "sampling"), ({"temperature": -1}, "temperature must be"),
    ({"stop": ["a"]}, "stop:"), ({"n": 2}, "n: one answer"), ({"messages": []}, "messages must be"),
    ({"messages": "x"}, "messages must be"), ({"top_p": "0.9"}, "sampling")])
def test_what_it_cannot_do_is_refused_in_words(
        served: Served, body: dict[str, Any], words: str) -> None:
    status, said = served.post("/v1/chat/completions", WANT | body)
    assert status == 400
    assert words in json.loads(said)["error"]["message"]


def test_a_client_that_leaves_ends_its_answer(served: Served) -> None:
    body = {"prompt": "Hi", "max_tokens": 8000, "stream": True, **ENDLESS}
    with urllib.request.urlopen(urllib.request.Request(
            served.url + "/v1/completions", json.dumps(body).encode()), timeout=60) as answer:
        assert answer.readline().startswith(b"data: ")
    time.sleep(1)
    before = served.process.cpu_times()
    time.sleep(2)
    after = served.process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.5


# ---------------------------------------------------------------------------------- out of memory


def is_told(error: str) -> bool:
    return any(x in error for x in ("can't allocate memory", "out of memory", "MemoryError",
                                    "could not create a primitive"))  # oneDNN's words for it


def at_once(it: Served, n: int) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    body = WANT | ENDLESS | {"max_tokens": 100, "stream": True}
    threads = [threading.Thread(target=lambda: found.append(
        it.post("/v1/chat/completions", body))) for _ in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return found


def test_too_many_at_once_run_out_of_real_memory_and_the_server_goes_on(tight: Served) -> None:
    assert [status for status, _ in at_once(tight, 2)] == [200, 200]
    answers = at_once(tight, 16)
    failed = [json.loads(body)["error"] for status, body in answers if status == 500]
    assert len(failed) >= 8
    assert {e["type"] for e in failed} == {"OutOfMemoryError"}
    assert any("can't allocate memory" in e["message"] for e in failed)
    assert all(is_told(e["message"]) for e in failed)
    assert all(status == 200 for status, _ in answers if status != 500)
    log = tight.log.read_text()
    assert re.search(r"out of memory while \d+ requests were generating: RuntimeError", log)
    assert tight.server.alive() is None
    assert [status for status, _ in at_once(tight, 2)] == [200, 200]


def test_a_run_beyond_its_memory_tells_so_in_its_records(tight: Served, tmp_path: Path) -> None:
    scenario = tmp_path / "long.toml"
    scenario.write_text((TINY / "tiny.toml").read_text().replace("= 12", "= 100"))
    said = loadgen("run", str(scenario), "--concurrency", "12", "--num-prompts", "24",
                   "--base-url", tight.url, "--out", "r", "--no-report", cwd=tmp_path)
    assert said.code in (cli.SLO_MISSED, cli.DIED), said.all  # its health may find no memory either
    records = kept(tmp_path / "r")
    failed = [r for r in records if r.outcome is Outcome.HTTP_ERROR]
    assert failed
    assert all(is_told(r.error or "") for r in failed)
    assert {r.outcome for r in records} <= {Outcome.OK, Outcome.HTTP_ERROR,
                                            Outcome.SERVER_ERROR_EVENT}


# ------------------------------------------------------------------------- whole runs, and none


def loadgen(*words: str, cwd: Path) -> Said:
    said = real.loadgen(*words, cwd=cwd, env=ENV, timeout=2 * START_S)
    assert "Traceback" not in said.all, said.all
    return said


def launched(model: Path | str, *options: str) -> list[str]:
    return ["--server", "transformers", "--server-cmd", str(PYTHON), "--model", str(model), "--",
            "--load-format", "dummy", *options]


def test_a_run_launches_it_and_leaves_nobody_behind(tiny: Path, tmp_path: Path) -> None:
    said = loadgen("run", str(TINY / "tiny.toml"), "--concurrency", "2", "--num-prompts", "10",
                   "--out", "r", *launched(tiny), cwd=tmp_path)
    assert said.code in (cli.PASS, cli.INCONCLUSIVE, cli.SLO_MISSED, cli.INVALID), said.all
    records = kept(tmp_path / "r")
    assert [(r.outcome, r.output_tok, r.tok_source) for r in records] == [
        (Outcome.OK, 12, "usage")] * 10
    assert all(len(r.gaps_us) == 11 for r in records)
    manifest = RunFolder(tmp_path / "r").manifest()
    assert all(x["source"] == "tokenize" for x in manifest.ratios.values())
    facts = manifest.server
    assert facts["kind"] == "transformers"
    assert facts["dtype"] == "bfloat16"
    assert facts["device"] == "cpu"
    assert facts["max_model_len"] == 8192
    assert facts["gpus"] is None
    assert facts["model_config"]["hidden_size"] == 128
    assert str(facts["version"])[0].isdigit()
    wait(lambda: not processes_in(tmp_path), 5)


@pytest.mark.slow
def test_the_largest_concurrency_that_its_memory_holds_is_found_to_the_unit(
        fat: Path, tmp_path: Path) -> None:
    """Memory that really runs out: where it does is the host's affair, that it is found is ours."""
    scenario = tmp_path / "long.toml"
    scenario.write_text((TINY / "tiny.toml").read_text().replace("= 48", "= 400"))
    said = loadgen("sweep", str(scenario), "--max-concurrency", "8", "--levels", "2,8", "--budget",
                   "15s", "--seed", "1", "--slo", "ttft=20s,tpot=2s", "--unit-step",
                   "--out", "r", "--no-report", *launched(
                       fat, "--cache", "static", "--memory-headroom-mb", "200"),
                   cwd=tmp_path)
    found = re.search(r"It survives (\d+) concurrent requests, and (\d+) kill it \(([A-Z_]+)",
                      said.out)
    assert found, said.all
    survived, fatal = int(found[1]), int(found[2])
    assert fatal == survived + 1
    assert found[3] == "OOM_RUNTIME"
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["server"]["survives"] == {"survived": survived, "fatal": fatal, "exact": True}
    assert "out of memory while" in (tmp_path / "r" / "server.log").read_text()


@pytest.mark.parametrize(("options", "words"), [
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--dtype", "int3"], "invalid choice: 'int3'")])
def test_a_flag_it_does_not_know_is_exit_4_with_its_words(
        tiny: Path, tmp_path: Path, options: list[str], words: str) -> None:
    said = loadgen("run", "smoke", "--num-prompts", "1", "--out", "r",
                   *launched(tiny, *options), cwd=tmp_path)
    assert said.code == cli.DIED, said.all
    assert words in said.err.splitlines()[0]


def test_a_model_that_is_not_there_is_exit_4_with_the_cause(tmp_path: Path) -> None:
    said = loadgen("run", "smoke", "--num-prompts", "1", "--out", "r",
                   *launched("/no/such/model"), cwd=tmp_path)
    assert said.code == cli.DIED, said.all
    assert "/no/such/model" in said.err.splitlines()[0]


def test_a_serve_that_is_killed_leaves_no_app_behind(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    with real.start("serve", "transformers", "--model", str(tiny), "--server-cmd", str(PYTHON),
                        "--port", str(port), "--", "--load-format", "dummy", cwd=tmp_path,
                        env=ENV) as process:
        wait(lambda: any("app.py" in x and "guard" not in x
                         for x in processes_in(tmp_path).values()), START_S)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    wait(lambda: not processes_in(tmp_path), 20)
    shutil.rmtree(tmp_path)
