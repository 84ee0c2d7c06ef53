"""A whole campaign by the command line, on the simulator: over sockets and in virtual time."""

from pathlib import Path

import pandas as pd
import pytest

from loadgen import cells, cli

FILE = """
name = "small"
simulate = true
[[servers]]
name = "small"
model = "Qwen/Qwen2.5-0.5B-Instruct"
gpu = "4090d"
max_model_len = 32768
price_per_gpu_hour = 0.35
[[servers]]
name = "huge"
model = "Qwen/Qwen2.5-7B-Instruct"
gpu = "3090"
max_model_len = 131072
largest = true
[[servers]]
name = "mortal"
model = "Qwen/Qwen2.5-0.5B-Instruct"
gpu = "4090d"
sim_options = ["--fault=oom@6"]
[[servers]]
name = "four-bit"
model = "Qwen/Qwen2.5-0.5B-Instruct"
gpu = "4090d"
quantization = "awq"
[[servers]]
name = "eight-bit"
model = "Qwen/Qwen2.5-0.5B-Instruct"
gpu = "4090d"
quantization = "fp8"
[[servers]]
name = "generate"
kind = "transformers"
model = "Qwen/Qwen2.5-0.5B-Instruct"
gpu = "4090d"
[[workloads]]
name = "ladder"
scenario = "smoke"
concurrency = [4, 8]
num_prompts = 80
tables = ["concurrency", "cost", "ttft"]
[[workloads]]
name = "oom"
scenario = "smoke"
what = "oom"
max_concurrency = 16
budget = "60s"
tables = ["utilisation"]
[[workloads]]
name = "wire"
scenario = "json-forced"
concurrency = [4]
num_prompts = 8
repeats = 2
wire = true
tables = ["structured"]
[[exclude]]
server = "[hm]*"
workload = "wire"
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("campaign")
    (folder / "small.toml").write_text(FILE, encoding="utf-8")
    return folder


def run(folder: Path, *options: str) -> int:
    return cli._invoke(["campaign", str(folder / "small.toml"), "--out", str(folder / "out"),
                        *options], None)[0]


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(folder / "out" / "tables" / f"{name}.parquet").set_index("server")


def test_a_campaign_runs_resumes_and_ends_in_a_report(
        done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(done) == 0
    out = done / "out"
    assert {p.name for p in out.glob("report.*")} == {"report.html", "report.md"}

    # over sockets, one server for both repeats
    log = (out / "small" / "server.log").read_text(encoding="utf-8")
    assert log.count("Starting vLLM server (simulated)") == 1
    found = table(done, "structured")
    assert found.loc["small", "valid, %"] == 100
    assert found.loc["small", "trials"] == 16

    # what does not fit, with the largest that does; what dies; what is not simulated
    notes = table(done, "concurrency")["note"]
    assert notes["huge"].startswith("does not fit: needs 7 GiB of KV cache per GPU, has 6.9;")
    assert notes["eight-bit"].startswith("not simulated: fp8")
    by_load = table(done, "concurrency").loc["mortal"].set_index("concurrency")
    assert by_load.loc[4, "stable?"] == "yes"
    assert by_load.loc[8, "stable?"] == "no"
    assert "out of memory" in str(by_load.loc[8, "note"])
    assert len(table(done, "ttft").loc[["huge-fits"]]) == 1
    boundary = table(done, "utilisation").loc["mortal"]
    held, fatal = (float(str(boundary[x])) for x in ("largest concurrency", "dies at"))
    assert fatal == held + 1
    assert 6 <= fatal <= 7  # of seven in flight six surely run at once
    assert table(done, "cost").loc["mortal", "stable up to"] == 4

    # four bits and Hugging Face's generate have figures
    ttft, memory = table(done, "ttft")["mean, ms"], table(done, "memory")
    assert ttft[["four-bit", "generate"]].notna().all()
    kv, loaded = memory["KV cache, tokens"], memory["after load, GiB"]
    assert kv["four-bit"] > kv["small"]
    assert loaded["generate"] < loaded["four-bit"]
    assert memory["increase, GiB"]["generate"] > 0
    tok_s = table(done, "concurrency").set_index("concurrency", append=True)["output, tok/s"]
    assert tok_s["four-bit", 8] > 3 * tok_s["generate", 8]
    assert "response_format: model.generate" in str(found.loc["generate", "note"])

    # again: nothing is run
    before = {p: p.stat().st_mtime_ns for p in out.rglob("manifest.json")}
    capsys.readouterr()
    assert run(done) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("manifest.json")} == before
    assert "── " not in capsys.readouterr().out
    assert run(done, "--report-only") == 0
    assert len(cells.read(out).cells) == 5 + 3 + 3 + 3 + 5 + 5 + 5
