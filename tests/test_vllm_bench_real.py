"""Exported runs beside a real `vllm bench serve` and read by vLLM's own code; installed by
`tests/vllm/install.sh`. The server is the simulator."""

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from analysis.vllm_bench import Options, Seen, figures
from loadgen import cli
from servers.base import free_port
from tests import synthetic, test_vllm_real
from tests.real import LOADGEN, loadgen, started, wait
from tests.synthetic import MIX
from tests.test_vllm_real import ENV, VLLM

pytestmark = test_vllm_real.pytestmark
model = test_vllm_real.model  # a fixture
PYTHON = VLLM.with_name("python")
# options of `vllm bench serve`, and ours
DETAILED = ("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99",
            "--save-detailed")

# vLLM's own figures of requests that are given as JSON, by the function that its command calls;
# and its own reading of result files, where it has code for that
ITS = """
import argparse, json, os, sys
os.environ["SAVE_TO_PYTORCH_BENCHMARK_FORMAT"] = "1"
from pathlib import Path
from vllm.benchmarks import plot, serve
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
from vllm.benchmarks.sweep import plot as curves, plot_pareto
from vllm.utils.argparse_utils import FlexibleArgumentParser

NAMES = "errors latencies output_lens ttfts itls input_lens start_times".split()
folder, answer = Path("all"), {}
for name in ("whole", "mixed"):
    detailed = json.load(open(name + ".json"))
    outputs = [RequestFuncOutput(
        success=not error, latency=latency, output_tokens=n, ttft=ttft, itl=itl, prompt_len=asked,
        error=error, start_time=start) for error, latency, n, ttft, itl, asked, start in zip(*(
            detailed[x] for x in NAMES))]
    metrics, lens = serve.calculate_metrics(
        [], outputs, detailed["duration"], None, [50.0, 99.0], {"ttft": 2000.0, "tpot": 50.0})
    found = {k: v for k, v in vars(metrics).items() if not k.startswith("percentiles")}
    for metric in ("ttft", "tpot", "itl", "e2el"):
        for p, value in getattr(metrics, f"percentiles_{metric}_ms"):
            found[f"p{p:g}_{metric}_ms"] = value
    answer[name] = {"metrics": found, "lens": lens}
requests = [dict(start_time=o.start_time, ttft=o.ttft, itl=o.itl, latency=o.latency,
                 prompt_len=o.prompt_len, output_tokens=o.output_tokens) for o in outputs]
timeline = plot.construct_timeline_data(requests, [0.025, 0.05], ["a", "b", "c"])
serve.save_to_pytorch_benchmark_format(
    argparse.Namespace(model="tiny"), detailed, str(folder / "records.json"))
records = json.load(open(folder / "records.pytorch.json"))
several = curves._json_load_bytes(folder / "summary.json")
prepared, skipped = plot_pareto._prepare_records(several, user_count_var="max_concurrency",
                                                 gpu_count_var=None)
for command, kind, words in (
        (curves, curves.SweepPlotArgs, ["--var-x", "max_concurrency", "--var-y", "p99_ttft_ms",
                                        "--curve-by", "model_id"]),
        (plot_pareto, plot_pareto.SweepPlotParetoArgs, ["--user-count-var", "max_concurrency"])):
    parser = kind.add_cli_args(FlexibleArgumentParser())
    command.main(parser.parse_args([str(folder), *words, "--dry-run"]))
json.dump({**answer, "timeline": len(timeline), "skipped": skipped,
           "users": [x["user_count_estimate"] for x in prepared],
           "gpus": [x["gpu_count"] for x in prepared],
           "pytorch": [x["metric"]["name"] for x in records]}, open("its.json", "w"), default=float)
"""


def its(words: list[str], cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=240, check=False,
                          env={**os.environ, **ENV})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_keys_and_types_are_those_of_a_real_one_on_the_same_server(
        model: Path, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with started([*LOADGEN, "serve", "sim", "--port", str(port), "--", "--speed", "5"],
                 tmp_path, {}):
        wait(lambda: is_open(port))
        its([str(VLLM), "bench", "serve", "--backend", "openai-chat", "--base-url", url,
             "--endpoint", "/v1/chat/completions", "--model", "qwen2.5-7b", "--tokenizer",
             str(model), "--dataset-name", "random", "--random-input-len", "32",
             "--random-output-len", "16", "--ignore-eos", "--num-prompts", "12",
             "--max-concurrency", "3", "--goodput", "ttft:2000", "tpot:50", *DETAILED,
             "--save-result", "--result-dir", ".", "--result-filename", "theirs.json"], tmp_path)
        said = loadgen("run", "smoke", "--concurrency", "3", "--num-prompts", "12", "--out", "r",
                       "--slo", "ttft=2s,tpot=50ms", "--base-url", url, cwd=tmp_path)
        assert said.code in (cli.PASS, cli.INCONCLUSIVE, cli.INVALID), said.all
    said = loadgen("report", "r", "--as", "vllm-bench", "--out", "ours.json", *DETAILED,
                   cwd=tmp_path)
    assert said.code == cli.PASS, said.all
    ours, theirs = (json.loads((tmp_path / x).read_bytes()) for x in ("ours.json", "theirs.json"))
    assert list(ours) == list(theirs)
    assert {k: kind(v) for k, v in ours.items()} == {
        k: kind(v) for k, v in theirs.items()} | {"tokenizer_id": "str"}
    # the same answers of the same server: a role and 16 tokens each
    assert ours["output_lens"] == theirs["output_lens"] == [16] * 12
    assert (ours["completed"], ours["failed"], ours["num_prompts"]) == (12, 0, 12)
    assert [len(x) for x in ours["itls"]] == [len(x) for x in theirs["itls"]] == [16] * 12


def is_open(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def kind(value: Any) -> str:
    """Its type; a list's with that of what it holds."""
    if isinstance(value, list):
        return f"[{', '.join(sorted({kind(x) for x in value}))}]"
    return type(value).__name__


def test_vllm_s_own_code_computes_the_same_figures_and_reads_the_files(tmp_path: Path) -> None:
    """Of 20 s of a sweep's level with failures, tokens by the thousand and 64 at once."""
    synthetic.write(tmp_path / "r", levels=(16, 64), confirm=None, errors=True)
    said = loadgen("report", "r", "--as", "vllm-bench", "--out", "all", *DETAILED, cwd=tmp_path)
    assert said.code == cli.PASS, said.all
    path, = (tmp_path / "all").glob("ladder-64-*.json")
    ours = json.loads(path.read_bytes())
    assert ours["failed"] == 0  # what was cut short is a success to it …
    assert len(ours["ttfts"]) > 150
    for i in range(5):  # … so some of what it takes for a failure
        ours["errors"][i], ours["output_lens"][i], ours["latencies"][i] = "said no", 0, 0.0
    given = {"whole": json.loads(path.read_bytes()), "mixed": recomputed(ours)}
    for name, was in given.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(was))
    printed = its([str(PYTHON), "-c", ITS], tmp_path)
    found = json.loads((tmp_path / "its.json").read_bytes())
    for name, was in given.items():
        assert found[name]["lens"] == was["output_lens"]
        renamed = {"total_input": "total_input_tokens", "total_output": "total_output_tokens"}
        for key, value in found[name]["metrics"].items():
            assert was[renamed.get(key, key)] == pytest.approx(value, rel=1e-12), key
        assert len(found[name]["metrics"]) == 31
    assert found["timeline"] == sum(1 + len(x) for x in ours["itls"])
    assert (found["users"], found["gpus"], found["skipped"]) == ([16.0, 64.0], [1.0, 1.0], 0)
    assert len(found["pytorch"]) == 12
    assert printed.count("[END FIGURE]") == 2  # of `vllm bench sweep plot` and `plot_pareto`


def recomputed(result: dict[str, Any]) -> dict[str, Any]:
    outputs = [Seen(not error, start, ttft, itl, latency, queue, asked, n, error, MIX.slo)
               for error, start, ttft, itl, latency, queue, asked, n in zip(*(
                   result[x] for x in ("errors", "start_times", "ttfts", "itls", "latencies",
                                       "queue_times", "input_lens", "output_lens")), strict=True)]
    return {**result, **figures(outputs, result["duration"], Options(
        ("ttft", "tpot", "itl", "e2el"), (50.0, 99.0)), closed=True)}
