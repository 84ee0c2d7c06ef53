"""Other load testers: how each is started for a mode, and what it reports of it.

They run as they come, but for: exact answer lengths, the tokenizer from a local folder, no
telemetry, no progress bars, a result file. guidellm and aiperf are fleets of processes made for
many cores; on one core their processes also compete with each other: with
GUIDELLM__MAX_WORKER_PROCESSES=1 in the environment guidellm took 106 µs per event instead of 184
(paced64; at paced256 no fewer), and its TTFT was closer.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Tool
from tests.benchmarks.truth import Reported

PROMPT_TOK = 64
_URL = "http://127.0.0.1:{port}"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _vllm(binary: Path, tokenizer: Path) -> Tool:
    return Tool("vllm", (
        str(binary), "bench", "serve", "--backend", "openai-chat", "--base-url", _URL,
        "--endpoint", "/v1/chat/completions", "--model", "tiny", "--tokenizer", str(tokenizer),
        "--dataset-name", "random", "--random-input-len", str(PROMPT_TOK), "--random-output-len",
        "{tokens}", "--ignore-eos", "--num-prompts", "{n}", "--disable-tqdm",
        "--save-result", "--result-dir", "{folder}", "--result-filename", "vllm.json"),
        marks=False, load=("--max-concurrency", "{streams}"),
        open_loop=("--request-rate", "{rate}"), reads=_of_vllm)


def _of_vllm(folder: Path) -> Reported:
    found = _json(folder / "vllm.json")
    return Reported(int(found["completed"]), found["median_ttft_ms"], found["p99_ttft_ms"],
                    found["p99_itl_ms"])


def _guidellm(binary: Path, tokenizer: Path) -> Tool:
    """It asks for max_completion_tokens and ignore_eos by itself. Its inter-token latency is
    (last − first) / (tokens − 1) of each request."""
    return Tool("guidellm", (
        str(binary), "run", "--backend", f"kind=openai_http,target={_URL},model=tiny",
        "--tokenizer", f"kind=hf_auto,model={tokenizer}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOK},output_tokens={{tokens}}",
        "--constraint", "kind=max_requests,count={n}",
        "--output", "kind=json,path={folder}/guidellm.json", "--disable-console"),
        marks=False, load=("--profile", "kind=concurrent,streams={streams}"),
        open_loop=("--profile", "kind=poisson,rate={rate}"), env=_OFFLINE, reads=_of_guidellm)


def _of_guidellm(folder: Path) -> Reported:
    metrics = _json(folder / "guidellm.json")["benchmarks"][0]["metrics"]
    ttft, itl = (metrics[name]["successful"]["percentiles"]
                 for name in ("time_to_first_token_ms", "inter_token_latency_ms"))
    return Reported(int(metrics["request_totals"]["successful"]), ttft["p50"], ttft["p99"],
                    itl["p99"], "means")


def _aiperf(binary: Path, tokenizer: Path) -> Tool:
    """The server's token counts, as its texts are no tokens of this tokenizer. Of its two
    inter-token figures that of gaps is read, inter_chunk_latency; it does not count events without
    text. Offline modes must be off: with them it takes the tokenizer's folder for a name on a
    hub."""
    return Tool("aiperf", (
        str(binary), "profile", "--model", "tiny", "--url", _URL, "--endpoint-type", "chat",
        "--streaming", "--tokenizer", str(tokenizer), "--use-server-token-count",
        "--isl", str(PROMPT_TOK), "--osl", "{tokens}", "--extra-inputs", "ignore_eos:true",
        "--request-count", "{n}", "--no-gpu-telemetry", "--no-server-metrics", "--ui", "none",
        "--artifact-dir", "{folder}/aiperf"),
        marks=False, load=("--concurrency", "{streams}"),
        open_loop=("--request-rate", "{rate}", "--arrival-pattern", "poisson"),
        env=dict.fromkeys(_OFFLINE, ""), reads=_of_aiperf)


def _of_aiperf(folder: Path) -> Reported:
    found = _json(folder / "aiperf" / "profile_export_aiperf.json")
    ttft = found["time_to_first_token"]
    return Reported(int(found["request_count"]["avg"]), ttft["p50"], ttft["p99"],
                    found["inter_chunk_latency"]["p99"], "texts")


def of_loadgen(folder: Path) -> Reported:
    """Its TTFT counts from when a request was due. It gives no p99 of fewer than 368 requests."""
    found = _json(folder / "run" / "summary.json")["steps"][0]
    p99_s, gap_s = found["ttft_p99_s"], found["itl_p99_s"]
    return Reported(int(found["n"]), 1000 * found["ttft_p50_s"],
                    None if p99_s is None else 1000 * p99_s,
                    None if gap_s is None else 1000 * gap_s)


PEERS: dict[str, Callable[[Path, Path], Tool]] = {
    "vllm": _vllm, "guidellm": _guidellm, "aiperf": _aiperf}


def version(name: str, binary: Path) -> str:
    """Of the package `name`, by the Python beside its binary."""
    asked = subprocess.run(
        [str(binary.parent / "python"), "-c", "import sys; from importlib.metadata import version;"
         "print(version(sys.argv[1]))", name], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found
