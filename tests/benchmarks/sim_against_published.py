"""The simulator against speeds and memory that were published, for what we never measured: 4-bit
weights and Hugging Face's generate.

    python -m tests.benchmarks.sim_against_published

Source: "Qwen2.5 Speed Benchmark" of Qwen's documentation: one A100 80 GB, batch size 1, 2,048
tokens written; Transformers 4.46, vLLM 0.6.3. The constants of both were worked out from these
figures: that they are met says that the arithmetic has their form, not that another card or version
would meet them. That vLLM's host took 2.2 ms more for a token than the one that was measured here.
"""

from dataclasses import dataclass

from servers.sim.__main__ import engine_config, parse
from servers.sim.costs import CONTEXT_GIB, DRIVER_GIB
from servers.sim.engine import Request
from servers.sim.turns import engine_of

OUTPUT_TOK = 2048


@dataclass(frozen=True)
class Published:
    """`gib`: PyTorch's memory at the end."""

    model: str
    backend: str
    quantization: str
    prompt_tok: int
    tok_s: float
    gib: float | None = None


ROWS = (
    Published("qwen2.5-0.5b", "transformers", "", 1, 47.40, 0.97),
    Published("qwen2.5-1.5b", "transformers", "", 1, 39.68, 2.95),
    Published("qwen2.5-7b", "transformers", "", 1, 40.38, 14.38),
    Published("qwen2.5-7b", "transformers", "", 6144, 38.76, 15.38),
    Published("qwen2.5-7b", "transformers", "", 14336, 29.78, 16.91),
    Published("qwen2.5-7b", "transformers", "", 30720, 18.83, 19.97),
    Published("qwen2.5-14b", "transformers", "", 1, 24.74, 28.08),
    Published("qwen2.5-14b", "transformers", "", 30720, 8.20, 36.85),
    Published("qwen2.5-7b", "transformers", "awq", 1, 32.03, 5.39),
    Published("qwen2.5-14b", "transformers", "awq", 1, 19.23, 9.79),
    Published("qwen2.5-7b", "transformers", "gptq", 1, 43.10, 5.52),
    Published("qwen2.5-14b", "transformers", "gptq", 1, 25.89, 9.94),
    Published("qwen2.5-7b", "vllm", "", 1, 84.28),
    Published("qwen2.5-7b", "vllm", "awq", 1, 148.10),
    Published("qwen2.5-7b", "vllm", "gptq", 1, 154.05),
    Published("qwen2.5-7b", "vllm", "", 30720, 70.33),
    Published("qwen2.5-7b", "vllm", "awq", 30720, 104.66),
    Published("qwen2.5-7b", "vllm", "gptq", 30720, 108.30),
    Published("qwen2.5-14b", "vllm", "", 1, 46.30),
    Published("qwen2.5-14b", "vllm", "awq", 1, 92.66),
    Published("qwen2.5-14b", "vllm", "gptq", 1, 98.02),
)


def simulated(row: Published) -> tuple[float, float]:
    """(tok/s, GiB)."""
    options = ["--gpu", "a100-80", "--model", row.model, "--backend", row.backend]
    engine = engine_of(engine_config(parse(
        options + (["--quantization", row.quantization] if row.quantization else []))))
    engine.submit(Request(0, row.prompt_tok, min(OUTPUT_TOK, 32768 - row.prompt_tok),
                          ignore_eos=True))
    now_s = 0.0
    while (step := engine.step(now_s)) is not None:
        now_s = step.end_s
    return OUTPUT_TOK / now_s, engine.used_gib(0.9) - CONTEXT_GIB - DRIVER_GIB


def main() -> None:
    print("| model | back end | weights | input | tok/s | simulated | off | GiB | simulated |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        tok_s, gib = simulated(row)
        memory = f"{row.gib:.2f} | {gib:.2f}" if row.gib is not None else " | "
        print(f"| {row.model} | {row.backend} | {row.quantization or '16 bit'} | "
              f"{row.prompt_tok:,} | {row.tok_s:.1f} | {tok_s:.1f} | {tok_s / row.tok_s - 1:+.0%} "
              f"| {memory} |")


if __name__ == "__main__":
    main()
