"""The simulator against a real H200's figures, and against physics where nothing was measured."""

import pytest

from tests.benchmarks.sim_against_h200 import (
    closed_loop,
    figures,
    itl_ms,
    others,
    output_tps,
    prefill_tps,
    ttft_s,
)
from tests.virtual import config

WITHIN = 0.15


def test_every_figure_of_the_real_h200_is_met_within_15_percent() -> None:
    assert {f.name: round(f.off_frac, 3) for f in figures() if abs(f.off_frac) > WITHIN} == {}


def test_other_models_loads_and_gpu_counts_are_near_what_was_measured_on_another_day() -> None:
    off = {f.name: round(f.off_frac, 3) for f in others()}
    assert {name: x for name, x in off.items() if abs(x) > 0.25} == {}
    assert sum(abs(x) <= WITHIN for x in off.values()) >= len(off) - 2


@pytest.mark.parametrize("options", [
    ("--gpu", "h200", "--model", "qwen2.5-0.5b"), ("--gpu", "a100-80", "--model", "llama-3-8b"),
    ("--gpu", "4090d", "--model", "qwen2.5-7b", "--tensor-parallel-size", "4"),
    ("--gpu", "3090", "--model", "chatglm3-6b"), ("--gpu", "h100", "--model", "qwen2.5-14b")])
def test_a_decode_step_is_no_faster_than_its_weights_are_read(options: tuple[str, ...]) -> None:
    c = config(*options)
    machine = c.machine
    read_ms = machine.weights_gib * 2**30 / machine.gpu.bandwidth * 1e3
    alone = itl_ms(closed_loop(c, 1, prompts=2))
    assert read_ms < alone < 4 * read_ms + 3


def test_prefill_is_no_faster_than_the_gpus_peak() -> None:
    for options in (("--gpu", "h200"), ("--gpu", "4090d", "-tp", "2"), ("--gpu", "a100-80")):
        machine = config(*options).machine
        rate = prefill_tps(closed_loop(config(*options), 256, output_tok=1, prompts=2048), 5.0)
        assert 0.3 < rate * 2 * machine.model.body / (machine.tp * machine.gpu.flops) < 0.75


def test_more_streams_bring_more_tokens_and_longer_gaps_until_something_is_full() -> None:
    runs = [closed_loop(config("--gpu", "4090d"), c) for c in (1, 4, 16, 64)]
    for better in (output_tps, itl_ms, ttft_s):
        seen = [better(r) for r in runs]
        assert seen == sorted(seen), better.__name__


def test_more_gpus_are_faster_but_not_in_proportion() -> None:
    by_tp = [closed_loop(config("--gpu", "4090d", "-tp", str(tp)), 8) for tp in (1, 2, 4)]
    speed = [output_tps(r) for r in by_tp]
    assert speed == sorted(speed)
    assert speed[2] < 4 * speed[0]
    first = [ttft_s(r) for r in by_tp]
    assert first == sorted(first, reverse=True)


def test_longer_prompts_and_bigger_models_take_longer() -> None:
    assert (ttft_s(closed_loop(config(), 1, 512, prompts=4))
            < ttft_s(closed_loop(config(), 1, 2048, prompts=4))
            < ttft_s(closed_loop(config(), 1, 8192, prompts=4)))
    sizes = [itl_ms(closed_loop(config("--gpu", "h200", "--model", f"qwen2.5-{n}"), 8, prompts=16))
             for n in ("0.5b", "1.5b", "3b", "7b", "14b")]
    assert sizes == sorted(sizes)
