"""The example run of a real H200 (docs/example): a folder from a host without the analysis, whose
tables and verdict are made here."""

import json
import subprocess
from pathlib import Path

import pytest

from loadgen import cli
from tests.real import loadgen

EXAMPLE = Path(__file__).parent.parent / "docs" / "example" / "h200-qwen2.5-7b.tar.xz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("example")
    subprocess.run(["tar", "-xJf", str(EXAMPLE)], cwd=where, check=True)
    said = loadgen("report", "h200-qwen2.5-7b", cwd=where)
    assert said.code == cli.PASS, said.all
    return where / "h200-qwen2.5-7b"


def test_a_real_gpu_s_memory_and_utilisation_stand_beside_each_level(folder: Path) -> None:
    said = json.loads((folder / "summary.json").read_bytes())
    assert (said["simulated"], said["gpu"]["gpus"]) == (False, 1)
    assert said["gpu"]["memory_loaded_gib"] == pytest.approx(128.4, abs=0.1)
    assert said["gpu"]["memory_increase_gib"] == pytest.approx(0.6, abs=0.1)
    by_level = {s["value"]: s for s in said["steps"] if s["phase"] == "ladder"}
    assert by_level[128.0]["gpu_util_frac"] > 0.9
    assert by_level[1.0]["tpot_p50_s"] == pytest.approx(4.8e-3, rel=0.1)
    assert by_level[256.0]["load"] == "UNSAFE"
    assert all(s["server_rss_gib"] > 1 for s in by_level.values())


def test_the_clients_count_and_the_server_s_agree_on_a_real_gpu(folder: Path) -> None:
    for step in json.loads((folder / "summary.json").read_bytes())["steps"]:
        for name in ("server_requests_ratio", "server_output_tok_ratio"):
            if step[name] is not None and step["ending"] == "done":
                assert step[name] == pytest.approx(1.0, abs=0.01), (step["leg"], name)


def test_the_report_of_the_example_names_its_gpu_and_its_states(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    for words in ("NVIDIA H200", "power cap", "STARTING", "vllm"):
        assert words in page, words
