"""What a server died of, by logs of real vLLMs: 0.32 on a CPU, 0.26 on a GPU."""

import sys
from pathlib import Path

import pytest

from loadgen import health
from servers import death, gpus, vllm_log

LOGS = Path(__file__).parent / "data" / "vllm" / "logs"

CAUSES = {
    "oom.log": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "gpu_oom_at_start.log": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 298.00",
    "worker_killed.log": "Worker proc VllmWorker-0 died unexpectedly (exit code: -9)",
    "hang.log": "TimeoutError: RPC call to execute_model timed out.",
    "bad_model_dir.log": "huggingface_hub.errors.HFValidationError: Repo id must be in the form",
    "kv_larger_than_memory.log": "ValueError: Available memory on node 0 (7.85/9.46 GiB) on kv",
    "kv_too_small.log": "ValueError: No available memory for the cache blocks.",
    "sigterm.log": "[shutdown] API server: shutdown triggered",
}


def lines(name: str) -> list[str]:
    return (LOGS / name).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", list(CAUSES))
def test_the_line_that_names_the_cause_is_found(name: str) -> None:
    said = death.cause(lines(name))
    assert said is not None
    assert said.startswith(CAUSES[name])
    assert len(said) <= death.LONGEST


def test_an_engine_that_was_killed_says_nothing_and_that_is_said() -> None:
    """As a real vLLM 0.32 whose EngineCore got a SIGKILL: no line of its own, and exit code 0."""
    log = [*lines("start_0.32_cpu.log"),
           "(APIServer pid=9) ERROR 11-21 19:50:01 [async_llm.py:906] AsyncLLM output_handler "
           "failed.",
           "(APIServer pid=9) ERROR 11-21 19:50:01 [async_llm.py:906] Traceback (most recent call "
           "last):",
           "(APIServer pid=9) ERROR 11-21 19:50:01 [async_llm.py:906] "
           "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack "
           "trace (above) for the root cause."]
    assert death.cause(log) == death.SILENT
    assert health.death(f"its process exited with code 0; log: {death.SILENT}", ready=True
                        ).state == "KILLED"
    assert death.cause(lines("dp_engine_killed.log")) == death.SILENT  # one of two
    told = "(APIServer pid=9) INFO 11-21 19:50:00 [x.py:1] [shutdown] API server: shutdown "
    told += "triggered"
    assert "shutdown triggered" in (death.cause([*log, told]) or "")  # a SIGTERM


def test_a_worker_that_was_asked_for_its_exit_code_before_the_kernel_had_it_is_named() -> None:
    """The pipe that tells of its end closes before it can be waited for: on a busy host vLLM then
    says None, and not -9."""
    log = [x.replace("exit code: -9", "exit code: None") for x in lines("worker_killed.log")]
    said = death.cause(log)
    assert said is not None
    assert said.startswith("Worker proc VllmWorker-0 died unexpectedly (exit code: None)")
    why = f"its process exited with code 0; log: {said}"
    assert health.death(why, ready=True).state == "KILLED"


def test_a_server_that_runs_died_of_nothing() -> None:
    assert death.cause(lines("alive.log")) is None
    assert death.cause([]) is None


def test_a_request_s_error_before_the_death_is_not_its_cause() -> None:
    """sigterm.log holds a JSONDecodeError and an unknown model: requests' own."""
    said = death.cause(lines("sigterm.log")[:60] + lines("worker_killed.log"))
    assert said is not None
    assert "died unexpectedly (exit code: -9)" in said


def test_hundreds_of_echoes_do_not_hide_the_cause() -> None:
    log = lines("oom.log")
    echo = log[next(i for i, x in enumerate(log) if "Error in chat completion stream" in x):]
    assert "CUDA out of memory" in (death.cause(log + 300 * echo) or "")


@pytest.mark.parametrize(("log", "cause"), [
    (["usage: vllm serve [model_tag]", "vllm: error: unrecognized arguments: --max-seqs 3"],
     "vllm: error: unrecognized arguments: --max-seqs 3"),
    (["Traceback (most recent call last):", "OSError: [Errno 98] Address already in use"],
     "OSError: [Errno 98] Address already in use"),
    (["Traceback (most recent call last):",
      "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
      "  Value error, max_model_len (99999) is greater than the derived 8192"],
     "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig: "
     "Value error, max_model_len (99999) is greater than the derived 8192"),
    (["Traceback (most recent call last):", "KeyError: 'nosuch'", "",
      "During handling of the above exception, another exception occurred:", "",
      "Traceback (most recent call last):", "ValueError: model type `nosuch` is not known"],
     "ValueError: model type `nosuch` is not known"),
    (["cannot listen on 127.0.0.1:80: Permission denied"],
     "cannot listen on 127.0.0.1:80: Permission denied"),
    (["(APIServer pid=1) WARNING 11-20 23:11:06 [system_utils.py:255] This can cause fd limit "
      "errors"], None)])
def test_other_ways_to_say_it(log: list[str], cause: str | None) -> None:
    assert death.cause(log) == cause


@pytest.mark.parametrize("name", list(CAUSES))
def test_the_context_is_short_and_says_neither_stacks_nor_echoes(name: str) -> None:
    log = lines(name)
    cause = death.cause(log) or ""
    said = death.context(log, cause)
    assert len(said) <= 8
    assert len(said) == len(set(said))
    for line in said:
        assert "EngineDeadError" not in line
        assert "Traceback" not in line
        assert '  File "' not in line
        assert cause not in line
        assert "ERROR 11-20" not in line
        assert len(line) < death.LONGEST + 30


def test_the_context_says_who_spoke() -> None:
    said = death.context(lines("hang.log"))
    assert any(x.startswith("EngineCore: No available shared memory broadcast block")
               for x in said)


def test_a_server_without_a_log_says_nothing(tmp_path: Path) -> None:
    assert death.says(tmp_path / "none.log", "") == ""
    assert death.last_line(tmp_path / "none.log") == ""
    assert death.named(tmp_path / "none.log") is None


def test_what_an_earlier_server_said_is_not_the_last_ones(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("memory of the first is full\n")
    since = log.stat().st_size
    with log.open("a") as f:
        f.write("the second came up\n")
    assert death.last_line(log, since) == "the second came up"
    assert "first" in death.says(log, "")
    assert "first" not in death.says(log, "", since)
    assert "the second came up" in death.says(log, "", since)


def test_what_a_server_said_ends_with_where_to_read_on() -> None:
    said = death.says(LOGS / "kv_too_small.log", "")
    assert "Explicitly set (0.0/9.46) GiB for KV cache" in said
    assert said.endswith(f"the whole log: {LOGS / 'kv_too_small.log'}")


# ------------------------------------------------------------------------------------------ facts


def test_facts_of_a_start_on_a_cpu() -> None:
    assert vllm_log.facts(lines("start_0.32_cpu.log")) == {
        "version": "0.32.0", "max_model_len": 512, "block_size": 32, "max_num_seqs": 32,
        "dtype": "bfloat16", "kv_cache_dtype": "auto", "tensor_parallel": 1,
        "pipeline_parallel": 1, "data_parallel": 1, "enforce_eager": True, "device": "cpu",
        "prefix_caching": True, "chunked_prefill": True, "kv_cache_tok": 768,
        "max_concurrency": 1.5}


def test_facts_of_a_start_on_a_gpu() -> None:
    """0.26 says the maximum concurrency in a line of its own."""
    found = vllm_log.facts(lines("start_0.26_gpu.log"))
    assert found["version"] == "0.26.0"
    assert found["kv_cache_tok"] == 2_063_088
    assert found["max_concurrency"] == 62.96
    assert found["max_model_len"] == 32768
    assert found["max_num_batched_tokens"] == 8192
    assert found["gpu_memory_utilization"] == 0.9
    assert found["prefix_caching"] is False
    assert "max_num_seqs" not in found  # vLLM's default: not in its log


OLD = """\
INFO 09-07 00:53:29 api_server.py:459] vLLM API server version 0.6.0
INFO 09-07 00:53:29 api_server.py:460] args: Namespace(api_key=None, block_size=32, \
gpu_memory_utilization=0.9, max_num_batched_tokens=None, max_num_seqs=256, model='m')
INFO 09-07 00:53:30 llm_engine.py:223] Initializing an LLM engine (v0.6.0) with config: model='m', \
dtype=torch.float16, max_seq_len=4096, tensor_parallel_size=2, quantization=awq_marlin, seed=0)
INFO 09-07 00:54:00 distributed_gpu_executor.py:56] # GPU blocks: 865, # CPU blocks: 327
INFO 09-07 00:54:00 distributed_gpu_executor.py:60] Maximum concurrency for 4096 tokens per \
request: 6.76x
INFO:     Application startup complete.""".splitlines()
EARLY_V1 = ["INFO 02-13 15:01:40 kv_cache_utils.py:407] # GPU blocks: 33660", "INFO 02-13 15:01:40 "
            "kv_cache_utils.py:410] Maximum concurrency for 4096 tokens per request: 131.48x"]


def test_facts_of_a_start_of_0_6_unrecorded() -> None:
    """Lines as its source and its users' bug reports have them: blocks, and all arguments."""
    assert vllm_log.facts(OLD) == {
        "version": "0.6.0", "block_size": 32, "max_num_seqs": 256, "gpu_memory_utilization": 0.9,
        "dtype": "float16", "max_model_len": 4096, "tensor_parallel": 2,
        "quantization": "awq_marlin", "kv_cache_blocks": 865, "kv_cache_tok": 27_680,
        "max_concurrency": 6.76}


def test_facts_of_early_versions_of_v1_unrecorded() -> None:
    """131.48 × 4096 tokens are 33660 blocks of 16, vLLM's default."""
    assert vllm_log.facts(EARLY_V1) == {
        "kv_cache_blocks": 33_660, "kv_cache_tok": 538_560, "max_concurrency": 131.48,
        "max_model_len": 4096}


def test_facts_of_a_start_with_two_data_parallel_engines() -> None:
    """Each tells of its own cache, and one of them that there are two."""
    found = vllm_log.facts(lines("start_0.32_dp2_cpu.log"))
    assert (found["version"], found["data_parallel"]) == ("0.32.0", 2)
    assert found["kv_cache_tok"] == 2 * 2_097_152
    assert found["max_concurrency"] == 1024
    assert found["max_num_seqs"] == 64


def engine(who: str, tok: str, most: str) -> str:
    return (f"({who}) INFO 11-20 23:46:53 [kv_cache_utils.py:2177] GPU KV cache size: {tok} tokens,"
            f" Maximum concurrency for 4,096 tokens per request: {most}x")


def test_kv_caches_of_data_parallel_engines_are_added_up() -> None:
    """What an engine says again, for each of its workers, is the same cache: the smallest."""
    found = vllm_log.facts([
        engine("EngineCore_DP0 pid=1", "8,192", "2.00"),
        engine("EngineCore_DP0 pid=1", "8,000", "1.95"),
        engine("EngineCore_DP1 pid=2", "8,064", "1.97")])
    assert found == {"max_model_len": 4096, "kv_cache_tok": 16_064, "max_concurrency": 3.92,
                     "data_parallel": 2}


def test_two_workers_of_one_engine_are_one_cache() -> None:
    found = vllm_log.facts([engine("EngineCore pid=1", "8,192", "2.00")] * 2)
    assert (found["kv_cache_tok"], found["max_concurrency"]) == (8192, 2.0)


@pytest.mark.parametrize(("flags", "facts"), [
    (["-tp", "4", "--quantization=awq"], {"tensor_parallel": 4, "quantization": "awq"}),
    (["--pipeline-parallel-size", "2", "-dp=2"], {"pipeline_parallel": 2, "data_parallel": 2}),
    (["-q", "gptq", "--load-format", "dummy"], {"quantization": "gptq", "load_format": "dummy"}),
    (["--tensor-parallel-size", "2", "--tensor-parallel-size", "8"], {"tensor_parallel": 8}),
    ([], {})])
def test_facts_of_the_flags(flags: list[str], facts: dict[str, object]) -> None:
    assert vllm_log.asked(flags) == facts


class NVML:
    """Answers of the library on a host with an H200; older ones answer in bytes."""

    class NVMLError(Exception):
        pass

    def __init__(self, count: int = 2, lost: int = 9) -> None:
        self.count, self.lost, self.shut = count, lost, 0

    def nvmlInit(self) -> None:
        if not self.count:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        self.shut += 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == self.lost:
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H200"


@pytest.mark.parametrize(("nvml", "names", "driver"), [
    (NVML(), ["NVIDIA H200", "NVIDIA H200"], "580.65.06"), (NVML(0), None, None),
    (NVML(2, lost=1), ["NVIDIA H200"], "580.65.06"), (None, None, None)])
def test_gpus_are_named_where_there_are_some(
        monkeypatch: pytest.MonkeyPatch, nvml: NVML | None, names: list[str] | None,
        driver: str | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # None: no such library
    assert gpus.facts() == {"gpus": names, "driver": driver}
    assert nvml is None or nvml.shut == bool(driver)


def test_a_log_that_says_nothing_gives_no_facts() -> None:
    assert vllm_log.facts(["hello", "non-default args: {cut"]) == {}


def test_the_model_s_shape_comes_from_its_folder_or_the_hub_s_cache(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen2", "hidden_size": 64, "eos_token_id": 3, "head_dim": null,'
        ' "quantization_config": {"quant_method": "fp8"}}')
    shape = {"model_type": "qwen2", "hidden_size": 64, "quant_method": "fp8"}
    assert vllm_log.model_config(str(tmp_path)) == shape
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (tmp_path / "config.json").rename(snapshot / "config.json")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert vllm_log.model_config("a/b") == shape
    assert vllm_log.model_config("a/c") == {}
