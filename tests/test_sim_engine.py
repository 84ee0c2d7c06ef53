"""The simulator's engine and its arithmetic, in virtual time."""

import heapq
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from servers.sim.costs import (
    GPUS,
    MODELS,
    QUANTIZATIONS,
    Batch,
    DoesNotFit,
    Machine,
    StepTime,
    activation_gib,
    batch_defaults,
    graphs_gib,
    kv_blocks,
)
from servers.sim.engine import Engine, EngineConfig, Request, Step
from servers.sim.front import Front, Turn
from servers.sim.profiles import GENERATE, Constants, Generate, Gpu, Model, Quantization


def machine(gpu: str = "4090d", model: str = "qwen2.5-7b", tp: int = 1) -> Machine:
    return Machine(GPUS[gpu], MODELS[model], tp)


def blocks_of(m: Machine, max_model_len: int = 8192, utilization: float = 0.92) -> int:
    return kv_blocks(m, utilization, *batch_defaults(m.gpu), max_model_len)


SMALL = EngineConfig(machine(), num_blocks=64, max_model_len=512, max_num_seqs=16)


def request(i: int, prompt_tok: int = 100, output_tok: int = 50,
            blocks: tuple[int, ...] = ()) -> Request:
    return Request(i, prompt_tok, output_tok, ignore_eos=True, blocks=blocks)


def run(engine: Engine, limit: int = 100_000) -> list[Step]:
    """Steps until there is nothing to do."""
    steps: list[Step] = []
    now_s = 0.0
    while (step := engine.step(now_s)) is not None:
        steps.append(step)
        now_s = step.end_s
        assert len(steps) < limit
    return steps


def tokens_per_request(steps: list[Step]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for step in steps:
        for i in step.tokens:
            counts[i] = counts.get(i, 0) + 1
    return counts


# ------------------------------------------------------------------------------------- scheduler


def test_every_request_gets_exactly_the_tokens_it_asked_for() -> None:
    engine = Engine(SMALL)
    for i in range(40):
        engine.submit(request(i, prompt_tok=20 + i, output_tok=1 + i))
    steps = run(engine)
    assert tokens_per_request(steps) == {i: 1 + i for i in range(40)}
    assert {i: r for s in steps for i, r in s.finished.items()} == dict.fromkeys(range(40),
                                                                                 "length")
    assert engine.stats.generation_tok == sum(range(1, 41))
    assert engine.stats.prompt_tok == sum(20 + i for i in range(40))


def test_short_memory_preempts_and_everything_still_finishes() -> None:
    engine = Engine(replace(SMALL, num_blocks=40))
    for i in range(8):
        engine.submit(request(i, prompt_tok=60, output_tok=200))
    steps = run(engine)
    assert engine.stats.preemptions > 0
    assert tokens_per_request(steps) == dict.fromkeys(range(8), 200)
    assert engine.stats.prompt_tok == 8 * 60  # a recomputed prompt counts once


def test_preemption_takes_the_last_one_and_puts_it_at_the_head_of_the_queue() -> None:
    engine = Engine(replace(SMALL, num_blocks=20))
    for i in range(3):
        engine.submit(request(i, prompt_tok=96, output_tok=100))
    engine.submit(request(3, prompt_tok=64, output_tok=1))
    while not engine.stats.preemptions:
        step = engine.step(0.0)
    assert step is not None
    assert step.tokens == [0, 1]
    assert [s.request.id for s in engine._waiting] == [2, 3]


def test_no_block_is_lost_or_made_whatever_happens() -> None:
    rng = random.Random(5)
    engine = Engine(replace(SMALL, num_blocks=48))
    pool = engine._pool
    now_s = 0.0
    for i in range(400):
        if rng.random() < 0.4:
            prompt = rng.randint(1, 300)
            shared = tuple(range(rng.choice((0, 1000)), 2000))[:prompt // 16]
            engine.submit(request(i, prompt, rng.randint(1, 200), shared))
        if rng.random() < 0.1:
            engine.abort(rng.randint(0, i))
        step = engine.step(now_s)
        now_s = step.end_s if step else now_s
        held = sum(-(-s.at(engine._number) // 16) - s.findable for s in engine._decoding.values())
        held += engine._partial.room // 16 - engine._partial.findable if engine._partial else 0
        assert pool.available + held + pool.findable_used == pool.size
        assert pool.free >= 0
    run(engine)
    assert engine.stats.preemptions > 0
    assert engine.stats.prefix_hits > 0
    assert (engine.running, engine.waiting, engine.kv_usage) == (0, 0, 0.0)


def test_equal_calls_give_equal_steps() -> None:
    def trace(seed: int) -> list[Step]:
        engine = Engine(replace(SMALL, num_blocks=40, seed=seed))
        for i in range(12):
            engine.submit(Request(i, 50 + i, 400))
        return run(engine)

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)


def test_an_aborted_request_frees_its_blocks_at_the_next_step() -> None:
    engine = Engine(SMALL)
    engine.submit(request(1))
    engine.submit(request(2))
    assert engine.step(0.0) is not None
    before = engine.kv_usage
    engine.abort(1)
    assert engine.kv_usage == before
    step = engine.step(1.0)
    assert step is not None
    assert step.tokens == [2]
    assert engine.kv_usage == before / 2


def test_a_waiting_request_can_be_aborted_and_unknown_ones_are_ignored() -> None:
    engine = Engine(replace(SMALL, max_num_seqs=1))
    engine.submit(request(1, output_tok=5))
    engine.submit(request(2, output_tok=5))
    engine.abort(2)
    engine.abort(77)
    assert tokens_per_request(run(engine)) == {1: 5}


def test_a_request_that_does_not_fit_blocks_those_behind_it() -> None:
    engine = Engine(replace(SMALL, num_blocks=32))
    engine.submit(request(0, prompt_tok=200, output_tok=100))
    engine.step(0.0)
    engine.submit(request(1, prompt_tok=400, output_tok=1))
    engine.submit(request(2, prompt_tok=16, output_tok=1))
    step = engine.step(1.0)
    assert step is not None
    assert step.tokens == [0]
    assert engine.waiting == 2


def test_no_more_than_max_num_seqs_run() -> None:
    engine = Engine(replace(SMALL, max_num_seqs=3))
    for i in range(9):
        engine.submit(request(i, output_tok=10))
    assert max(len(s.tokens) for s in run(engine)) == 3


def test_a_long_prompt_is_cut_into_chunks_beside_the_others_decode() -> None:
    engine = Engine(EngineConfig(machine(), 2000, 8192, max_num_batched_tokens=512))
    engine.submit(request(1, prompt_tok=16, output_tok=100))
    engine.step(0.0)
    engine.submit(request(2, prompt_tok=1500, output_tok=1))
    steps = [engine.step(1.0) for _ in range(3)]
    assert [s.tokens for s in steps if s] == [[1], [1], [1, 2]]
    alone = engine.step(2.0)
    assert alone is not None
    assert steps[0] is not None
    assert steps[0].duration_s > 3 * alone.duration_s  # the chunk is in the other's token gap


def test_a_stream_interval_makes_an_event_of_the_first_of_every_so_many_and_of_the_last() -> None:
    engine = Engine(replace(SMALL, stream_interval=4))
    for i, output in enumerate((1, 2, 5, 6, 9, 40)):
        engine.submit(request(i, output_tok=output))
    steps = run(engine)
    wanted = sum(len({*range(0, n, 4), n - 1}) for n in (1, 2, 5, 6, 9, 40))
    assert sum(s.events for s in steps) == wanted
    assert sum(s.events for s in run_of(6)) == sum(len(s.tokens) for s in run_of(6))


def run_of(n: int) -> list[Step]:
    engine = Engine(SMALL)
    for i in range(n):
        engine.submit(request(i))
    return run(engine)


def test_a_step_says_who_begins_and_who_pauses() -> None:
    engine = Engine(replace(SMALL, num_blocks=40))
    for i in range(8):
        engine.submit(request(i, prompt_tok=60, output_tok=200))
    going: set[int] = set()
    for step in run(engine):
        going -= set(step.preempted)
        assert not going & set(step.begun)
        going |= set(step.begun)
        assert set(step.tokens) == going
        going -= set(step.finished)
    assert engine.stats.preemptions > 0


def test_fewer_tokens_a_step_than_sequences_are_refused_as_vllm_does() -> None:
    with pytest.raises(ValueError, match="must be greater than or equal to max_num_seqs"):
        EngineConfig(machine(), 100, 512, max_num_batched_tokens=64, max_num_seqs=65)


# ------------------------------------------------------------------------------------- front end


def near(turns: list[Turn], *expected: tuple[float, int]) -> bool:
    return ([t.steps for t in turns] == [steps for _, steps in expected]
            and [t.written_s for t in turns] == pytest.approx([s for s, _ in expected]))


def test_a_slow_front_end_lets_tokens_wait_for_those_before_them() -> None:
    front = Front(replace(machine().constants, front_token_s=1e-3, front_request_s=0.0))
    assert near(front.give_out(1.0, 100, 0), (1.1, 1))
    assert front.give_out(1.05, 100, 0) == []
    assert front.next_s == pytest.approx(1.1)
    assert front.begin(1.09) == []
    assert near(front.begin(1.11), (1.2, 1))
    assert front.next_s is None
    assert near(front.give_out(5.0, 1, 0), (5.001, 1))
    assert near(front.give_out(6.0, 0, 0), (6.0, 1))


def test_tokens_that_wait_for_one_turn_are_told_in_one_event_of_their_stream() -> None:
    """Of 100 streams three steps wait, and with the last a new stream begins."""
    front = Front(replace(machine().constants, front_token_s=1e-3, front_merged_s=1e-4))
    front.give_out(1.0, 1000, 0)  # until 2.0
    assert front.give_out(1.2, 100, 0) == front.give_out(1.4, 100, 0) == []
    assert front.give_out(1.6, 101, 1) == []
    assert near(front.give_out(3.0, 1, 0), (2.0 + 0.101 + 0.02, 3), (3.001, 1))


def test_a_steady_stretch_is_what_its_steps_would_be_one_by_one() -> None:
    ends = [1.0 + i / 100 for i in range(50)]
    for token_s in (1e-5, 1e-4, 1e-3):
        quick, slow = (Front(replace(machine().constants, front_token_s=token_s)) for _ in "ab")
        turns = [t for end in ends for t in slow.give_out(end, 20, 0)]
        written = quick.steady(ends, 20)
        if token_s * 20 > 0.01:
            assert not written
            assert any(t.steps > 1 for t in turns)
        else:
            assert written == [t.written_s for t in turns]
            assert quick.give_out(9.0, 1, 0) == slow.give_out(9.0, 1, 0)


def test_a_request_passes_the_tokens_and_holds_them_up() -> None:
    front = Front(replace(machine().constants, front_token_s=1e-3, front_request_s=0.01,
                          front_latency_s=0.005))
    front.give_out(1.0, 1000, 0)  # until 2.0
    assert front.take_in(1.0) == pytest.approx(1.015)
    assert front.take_in(1.0) == pytest.approx(1.025)
    assert front.give_out(1.5, 1, 0) == []
    assert near(front.begin(2.03), (2.021, 1))


# ---------------------------------------------------------------------------------- prefix cache


def test_an_answers_blocks_are_found_by_whoever_repeats_it() -> None:
    engine = Engine(SMALL)
    blocks = tuple(range(100, 110))  # of 96 tokens of prompt and 64 of the answer
    engine.submit(request(1, 96, 50, blocks))
    run(engine)
    engine.submit(request(2, 160, 1, blocks))
    run(engine)
    assert engine.stats.prefix_hits == 144  # 145 are in the cache: the last one was not computed


def test_an_equal_prefix_is_computed_once() -> None:
    engine = Engine(SMALL)
    blocks = tuple(range(100, 106))
    engine.submit(request(1, 100, 1, blocks))
    first = run(engine)
    engine.submit(request(2, 100, 1, blocks))
    second = run(engine)
    assert (engine.stats.prefix_queries, engine.stats.prefix_hits) == (200, 96)
    assert second[0].duration_s < first[0].duration_s


def test_the_last_token_is_always_computed() -> None:
    engine = Engine(SMALL)
    for i in (1, 2):
        engine.submit(request(i, 96, 3, tuple(range(6))))
        assert tokens_per_request(run(engine)) == {i: 3}
    assert engine.stats.prefix_hits == 80


def test_the_prefix_cache_can_be_off() -> None:
    engine = Engine(replace(SMALL, prefix_caching=False))
    for i in range(3):
        engine.submit(request(i, 96, 3, tuple(range(6))))
    run(engine)
    assert (engine.stats.prefix_queries, engine.stats.prefix_hits) == (0, 0)


def test_cached_blocks_are_given_away_oldest_first_when_memory_is_wanted() -> None:
    engine = Engine(replace(SMALL, num_blocks=32))
    old, new = tuple(range(10)), tuple(range(50, 60))
    for i, blocks in enumerate((old, new)):
        engine.submit(request(i, 160, 1, blocks))
        run(engine)
    engine.submit(request(2, 300, 1))  # 19 blocks: 12 are unused, 7 come from the old prefix
    run(engine)
    for i, blocks, hits in ((3, new, 144), (4, old, 48)):
        before = engine.stats.prefix_hits
        engine.submit(request(i, 160, 1, blocks))
        run(engine)
        assert engine.stats.prefix_hits - before == hits


# ------------------------------------------------------------------------------------------- EOS


def test_answers_end_by_themselves_unless_told_not_to() -> None:
    engine = Engine(EngineConfig(machine(), 7000, 32768, mean_output_tok=100))
    for i in range(600):
        engine.submit(Request(i, 10, 10_000))
    counts = tokens_per_request(run(engine))
    assert engine.stats.finished == {"stop": 600}
    assert sum(counts.values()) / 600 == pytest.approx(100, rel=0.15)


def test_min_tokens_holds_back_the_end() -> None:
    engine = Engine(EngineConfig(machine(), 7000, 32768, mean_output_tok=2))
    for i in range(50):
        engine.submit(Request(i, 10, 10_000, min_tokens=40))
    assert min(tokens_per_request(run(engine)).values()) > 40


def test_no_answer_is_longer_than_the_models_context() -> None:
    engine = Engine(SMALL)
    engine.submit(request(1, prompt_tok=500, output_tok=400))
    assert tokens_per_request(run(engine)) == {1: 12}


# ----------------------------------------------------------------------------------------- costs


def test_a_step_never_gets_cheaper_with_more_work() -> None:
    m = machine()
    base = Batch(32, 32, 32e3, 32_000)
    for more in (replace(base, new_tok=64), replace(base, sampled=64),
                 replace(base, attended=1e9), replace(base, context_tok=64_000)):
        assert StepTime(m)(more) >= StepTime(m)(base)
    decode = [StepTime(m)(Batch(b, b, b * 1e3, b * 1000)) for b in (1, 8, 32, 64, 128, 256)]
    assert decode == sorted(decode)
    prefill = [StepTime(m)(Batch(n, 1, n * n / 2, n)) for n in (16, 256, 1024, 2048)]
    assert prefill == sorted(prefill)


def test_two_gpus_are_faster_than_one_but_not_twice() -> None:
    batch = Batch(1, 1, 1000, 1000)
    one, two = (StepTime(machine(tp=tp))(batch) for tp in (1, 2))
    assert one / 2 < two < one


def test_memory_is_shared_out_as_vllm_reported_it_on_an_h200() -> None:
    m = machine("h200")
    assert m.weights_gib == pytest.approx(14.29, rel=0.01)
    assert activation_gib(m, *batch_defaults(m.gpu)) == pytest.approx(1.13, rel=0.1)
    assert graphs_gib(m) == pytest.approx(0.89, rel=0.01)
    assert blocks_of(m, 32768, 0.9) * 16 == pytest.approx(2_063_088, rel=0.02)


def test_more_gpus_longer_memory_and_smaller_models_leave_more_for_the_cache() -> None:
    assert blocks_of(machine(tp=2)) > 2 * blocks_of(machine())
    assert blocks_of(machine(tp=4), utilization=0.95) * 16 > 131_072  # report S2's profile starts
    by_model = [blocks_of(machine("a100-80", name), 4096) * machine(model=name).kv_bytes_per_tok
                for name in sorted(MODELS, key=lambda name: MODELS[name].params)]
    assert by_model == sorted(by_model, reverse=True)
    by_gpu = [blocks_of(machine(gpu, "qwen2.5-7b")) for gpu in ("4090d", "a100-80", "h200")]
    assert by_gpu == sorted(by_gpu)


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_of_a_model_are_those_of_its_shape(name: str) -> None:
    m = MODELS[name]
    attention = m.hidden * m.head_dim * (2 * m.heads + 2 * m.kv_heads)
    body = m.layers * (attention + 3 * m.hidden * m.ffn)
    assert m.body == pytest.approx(body, rel=0.01)


@pytest.mark.parametrize("entry", [*GPUS.values(), *MODELS.values(), *QUANTIZATIONS.values(),
                                   machine().constants, GENERATE])
def test_every_number_has_a_source(
        entry: Gpu | Model | Constants | Quantization | Generate) -> None:
    assert len(entry.source) > 10


@pytest.mark.parametrize(("asked", "max_model_len", "utilization", "said"), [
    (machine("3090", "qwen2.5-14b"), 8192, 0.92, "CUDA out of memory"),
    (machine(), 8192, 0.6, "No available memory for the cache blocks"),
    (machine(), 131_072, 0.92, "To serve at least one request"),
    (machine(), 8192, 0.99, "less than desired GPU memory utilization"),
    (machine(tp=3), 8192, 0.92, "must be divisible by tensor parallel size"),
])
def test_what_does_not_fit_is_refused_as_vllm_does(asked: Machine, max_model_len: int,
                                                   utilization: float, said: str) -> None:
    with pytest.raises(DoesNotFit, match=said):
        blocks_of(asked, max_model_len, utilization)


# ----------------------------------------------------------------------------------- closed loop


@dataclass
class Served:
    due_s: float
    output_tok: int
    first_s: float = 0.0
    last_s: float = 0.0

    def good(self) -> bool:
        tpot_s = (self.last_s - self.first_s) / (self.output_tok - 1)
        return self.first_s - self.due_s <= 2.0 and tpot_s <= 0.05


def mix(rng: random.Random) -> tuple[int, int]:
    """(prompt, output) tokens: 20 % documents, 50 % code, 30 % JSON."""
    kind = rng.random()
    if kind < 0.2:
        return 2048, rng.randint(200, 300)
    if kind < 0.7:
        return rng.randint(100, 300), rng.randint(180, 260)
    return rng.randint(200, 400), rng.randint(90, 130)


INTAKE_S = Front(machine().constants).take_in(0.0)  # no front end's limit is near here


def closed_loop(concurrency: int, duration_s: float,
                draw: Callable[[random.Random], tuple[int, int]] = mix) -> list[Served]:
    """Finished requests; each slot sends its next one when the last has ended."""
    engine = Engine(EngineConfig(machine(), blocks_of(machine(), 32768), 32768))
    rng, now_s = random.Random(1), 0.0
    due, served, done = [0.0] * concurrency, list[Served](), list[Served]()
    while now_s < duration_s:
        while due and due[0] + INTAKE_S <= now_s:
            prompt, output = draw(rng)
            engine.submit(request(len(served), prompt, output))
            served.append(Served(heapq.heappop(due), output))
        step = engine.step(now_s)
        if step is None:
            now_s = due[0] + INTAKE_S
            continue
        now_s = step.end_s
        for i in step.begun:
            served[i].first_s = served[i].first_s or now_s
        for i in step.finished:
            served[i].last_s = now_s
            heapq.heappush(due, now_s)
            done.append(served[i])
    return done


WARM_UP_S = 40.0


@pytest.mark.parametrize(("concurrency", "rate_rps"), [
    (1, 0.29), (2, 0.55), (4, 1.0), (8, 1.9), (16, 3.2), (32, 4.7), (64, 5.9), (128, 6.6)])
def test_the_default_profile_serves_the_mix_at_the_expected_rate(concurrency: int,
                                                                 rate_rps: float) -> None:
    until_s = WARM_UP_S + max(150, 300 / rate_rps)
    done = [r for r in closed_loop(concurrency, until_s) if r.last_s > WARM_UP_S]
    assert len(done) / (until_s - WARM_UP_S) == pytest.approx(rate_rps, rel=0.15)


def test_slo_attainment_falls_off_between_32_and_64() -> None:
    share = {}
    for concurrency in (16, 32, 48, 64):
        done = [r for r in closed_loop(concurrency, 240) if r.due_s > WARM_UP_S]
        share[concurrency] = sum(r.good() for r in done) / len(done)
    assert share[16] > 0.99
    assert share[32] > 0.95
    assert share[48] < 0.9
    assert share[64] < 0.5


def test_the_engine_is_far_faster_than_real_time() -> None:
    start_s = time.process_time()
    closed_loop(32, 100)
    assert time.process_time() - start_s < 100 / 200  # ~1,800 times on an idle core
