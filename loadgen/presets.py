"""Limits by name, as a scenario file writes them: `slo = "interactive-chat"`, `--slo
interactive-chat`."""

SLOS: dict[str, dict[str, str]] = {
    # What a reader, a typist and a queue of documents put up with: ours.
    "interactive-chat": {"ttft": "1s", "tpot": "50ms"},
    "code-completion": {"ttft": "300ms", "tpot": "30ms", "e2e": "3s"},
    "document-batch": {"ttft": "30s", "e2e": "120s"},
    # MLPerf Inference's of the server scenario (github.com/mlcommons/inference,
    # loadgen/mlperf.conf). It asks for each at the 99th percentile; `--target 0.99` asks that as
    # many requests meet both, which is a little stricter.
    "mlperf-llama3.1-8b": {"ttft": "2s", "tpot": "100ms"},
    "mlperf-llama3.1-8b-interactive": {"ttft": "500ms", "tpot": "30ms"},
    "mlperf-llama2-70b": {"ttft": "2s", "tpot": "200ms"},
    "mlperf-llama2-70b-interactive": {"ttft": "450ms", "tpot": "40ms"},
    "mlperf-mixtral-8x7b": {"ttft": "2s", "tpot": "200ms"},
    "mlperf-llama3.1-405b": {"ttft": "6s", "tpot": "175ms"},
    "mlperf-llama3.1-405b-interactive": {"ttft": "4.5s", "tpot": "80ms"},
    "mlperf-deepseek-r1": {"ttft": "2s", "tpot": "80ms"},
    "mlperf-deepseek-r1-interactive": {"ttft": "1.5s", "tpot": "15ms"},
}
