"""Four-bit weights on the simulator: what they take, what they leave for the KV cache, and how fast
they are beside the published figures that their constants come from."""

import pytest

from servers.sim.__main__ import engine_config, parse
from servers.sim.costs import BLOCK_TOK, Batch, DoesNotFit, StepTime
from servers.sim.engine import EngineConfig

A100 = ("--gpu", "a100-80")


def config(*options: str) -> EngineConfig:
    return engine_config(parse(list(options)))


def step_s(c: EngineConfig, batch: Batch) -> float:
    return StepTime(c.machine)(batch)


def alone_s(*options: str) -> float:
    return step_s(config(*options), Batch(1, 1, 1000, 1000))


@pytest.mark.parametrize(("model", "gib"), [("qwen2.5-7b", 5.39), ("qwen2.5-14b", 9.79)])
def test_awq_models_take_the_memory_that_was_published(model: str, gib: float) -> None:
    """Transformers' with a prompt of one token, and so with 2,049 tokens of KV cache."""
    m = config(*A100, "--model", model, "-q", "awq").machine
    assert m.weights_gib + 2049 * m.kv_bytes_per_tok / 2**30 == pytest.approx(gib, rel=0.03)


def test_what_the_weights_leave_is_kv_cache() -> None:
    whole, quarter = config("--gpu", "4090d"), config("--gpu", "4090d", "--quantization", "awq")
    freed = whole.machine.weights_gib - quarter.machine.weights_gib
    more = (quarter.num_blocks - whole.num_blocks) * BLOCK_TOK * whole.machine.kv_bytes_per_tok
    assert 14.2 < whole.machine.weights_gib < 14.4
    assert 5.2 < quarter.machine.weights_gib < 5.3
    assert more / 2**30 == pytest.approx(freed, abs=0.001)
    with pytest.raises(DoesNotFit):
        config("--gpu", "4090d", "--model", "qwen2.5-14b")
    assert config("--gpu", "4090d", "--model", "qwen2.5-14b", "-q", "gptq").num_blocks > 0


@pytest.mark.parametrize(("model", "quantization", "saved_ms"), [
    ("qwen2.5-7b", "awq", 1e3 / 84.28 - 1e3 / 148.10),
    ("qwen2.5-7b", "gptq", 1e3 / 84.28 - 1e3 / 154.05),
    ("qwen2.5-14b", "awq", 1e3 / 46.30 - 1e3 / 92.66),
    ("qwen2.5-14b", "gptq", 1e3 / 46.30 - 1e3 / 98.02)])
def test_a_token_is_as_much_quicker_as_was_published(model: str, quantization: str,
                                                     saved_ms: float) -> None:
    own = (*A100, "--model", model)
    saved = alone_s(*own) - alone_s(*own, "-q", quantization)
    assert 1e3 * saved == pytest.approx(saved_ms, rel=0.05)


@pytest.mark.parametrize(("gpu", "least", "most"), [
    ("a100-80", 1.35, 1.45), ("h100", 1.6, 2.0), ("4090d", 1.05, 1.15), ("3090", 1.05, 1.15)])
def test_unpacking_makes_prompts_slower_most_where_multiplying_is_fast(gpu: str, least: float,
                                                                       most: float) -> None:
    prompt = Batch(2048, 1, 2048 * 1024, 2048)
    whole, quarter = config("--gpu", gpu), config("--gpu", gpu, "-q", "awq")
    assert least < step_s(quarter, prompt) / step_s(whole, prompt) < most


def test_few_streams_gain_by_four_bits_and_many_do_not() -> None:
    whole, quarter = config(*A100), config(*A100, "-q", "awq")
    decode = [Batch(n, n, n * 500, n * 500) for n in (8, 256)]
    few, many = (step_s(quarter, b) / step_s(whole, b) for b in decode)
    assert few < 0.6
    assert many > 1


@pytest.mark.parametrize(("model", "option", "quantized"), [
    ("Qwen/Qwen2.5-7B-Instruct-AWQ", (), True), ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", (), True),
    ("Qwen/Qwen2.5-7B-Instruct-AWQ", ("-q", "awq"), True), ("qwen2.5-7b", (), False)])
def test_a_model_says_by_its_name_how_it_is_quantized(model: str, option: tuple[str, ...],
                                                      quantized: bool) -> None:
    c = config("--model", model, *option)
    assert (c.machine.quantization is not None) is quantized
    assert c.machine.model.name == "Qwen/Qwen2.5-7B-Instruct"


def test_another_quantization_than_the_models_is_refused_in_vllms_words() -> None:
    with pytest.raises(ValueError, match=r"model config \(awq\) does not match"):
        config("--model", "Qwen/Qwen2.5-7B-Instruct-AWQ", "--quantization", "gptq")
