"""What the memory holds, and which constraint binds: on hand-made runs, and on the simulator made
to bind on each of them, in virtual time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from analysis import ceiling, charts, frame, gpus, limits, report, summary, words
from analysis.ceiling import Ceiling
from analysis.frame import Run
from analysis.limits import Binding
from loadgen import cli
from loadgen.judge import ServerSigns
from loadgen.telemetry.server import rows_of
from loadgen.telemetry.signs import GpuSigns
from loadgen.validity import Finding
from tests import synthetic

FACTS = {"kind": "vllm", "kv_cache_tok": 33_600, "block_size": 16, "max_num_seqs": 48,
         "max_num_batched_tokens": 2048, "gpu_memory_utilization": 0.9}
IDLE = ServerSigns(running_mean=50.0, waiting_mean=0.0, kv_max=0.3, preemptions=0.0)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Its first unsafe level is 64, where a token takes three times as long as at 1."""
    return frame.load(synthetic.write(tmp_path_factory.mktemp("limits") / "sweep", server=FACTS))


def told(run: Run, signs: ServerSigns = IDLE, util: float | None = None,
         running: float | None = None, front: float | None = None,
         facts: Mapping[str, Any] | None = None, findings: tuple[Finding, ...] = (),
         outcomes: Mapping[str, int] | None = None) -> Binding:
    """What binds where level 64 said all this of itself and nothing else."""
    at = next(i for i, (leg, _) in enumerate(run.legs) if leg.value == 64)
    window, j = run.legs[at][1], run.judgements[at]
    instants = range(window.from_ns, window.to_ns, synthetic.S)
    telemetry = {
        "server": {} if running is None else {"running": [(t, running) for t in instants]},
        "process": {} if front is None else {"front_cores": [(t, front) for t in instants]}}
    j = structs.replace(j, findings=list(findings), outcomes=dict(outcomes or {"OK": j.n}))
    changed = structs.replace(
        run, telemetry=telemetry,
        manifest=structs.replace(run.manifest, server=FACTS if facts is None else dict(facts)),
        signs=[signs if i == at else x for i, x in enumerate(run.signs)],
        gpus=[GpuSigns(n=1, util_frac=util) if i == at else x for i, x in enumerate(run.gpus)],
        judgements=[j if i == at else x for i, x in enumerate(run.judgements)])
    return limits.of(changed, ceiling.of(run))


# ----------------------------------------------------------------------------------- the ceiling


def test_the_ceiling_is_kv_tokens_by_the_tokens_that_a_running_request_holds(sweep: Run) -> None:
    """Prompts have 300 tokens, answers 240, 175 or 118: long ones run longer."""
    found = ceiling.of(sweep)
    by_time = sum(w * n * (300 + n / 2 + 7.5) for w, n in ((0.5, 240), (0.2, 175), (0.3, 118)))
    mean = by_time / (0.5 * 240 + 0.2 * 175 + 0.3 * 118)
    assert found.live_tok == pytest.approx(mean, rel=0.02)
    assert found.requests == pytest.approx(33_600 / mean, rel=0.02)
    assert ceiling.says(structs.replace(found, seen_tok=None)) == (
        "The KV cache holds about 82 of these requests at once: 33,600 tokens at 410 live tokens "
        "each.")


@pytest.mark.parametrize("facts", [{}, {"kind": "remote"}, {"kv_cache_tok": 0}])
def test_a_server_that_does_not_say_its_kv_tokens_has_no_ceiling(tmp_path: Path,
                                                                 facts: dict[str, Any]) -> None:
    run = frame.load(synthetic.write(tmp_path / "run", levels=(1, 2), confirm=None, server=facts))
    assert ceiling.says(ceiling.of(run)) == (
        "Memory-bound ceiling not known: the server did not say its KV tokens.")
    assert summary.summarise(run)["ceiling"]["requests"] is None


def test_kv_tokens_of_a_server_that_runs_already_are_those_of_its_metrics() -> None:
    text = ('vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="900"} 1.0\n'
            'vllm:cache_config_info{block_size="32",engine="1",num_gpu_blocks="100"} 1.0\n'
            'vllm:num_requests_running{engine="0"} 3.0\n')
    rows = {(r.name, r.labels["engine"]): r.value for r in rows_of(text, 5)}
    assert rows == {("running", "0"): 3.0, ("kv_cache_tok", "0"): 28_800.0,
                    ("kv_cache_tok", "1"): 3200.0}
    no_cache = 'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="None"} 1.0\n'
    assert rows_of(no_cache, 5) == []


def test_where_no_answer_came_there_are_no_live_tokens(tmp_path: Path) -> None:
    run = frame.load(synthetic.write_plain(tmp_path / "run", synthetic.few(0), server=FACTS))
    assert ceiling.says(ceiling.of(run)) == (
        "Memory-bound ceiling not known: no answer ended with its tokens known.")


def test_a_server_whose_own_use_differs_is_believed() -> None:
    found = Ceiling(100.0, "", 40_000, 400.0, 0.0, 800.0)
    assert ceiling.says(found).endswith(
        "By the server's own KV use it is 800 tokens each, and so about 50 requests.")


def test_the_ceiling_stands_beside_the_knee_in_words_report_chart_and_summary(
        sweep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_library", str)
    said = words.answer(sweep).verdict.sentences
    knee = next(i for i, x in enumerate(said) if x.startswith("Knee "))
    assert said[knee + 1].startswith("The KV cache holds about 82 of these requests at once")
    assert said[knee + 2].startswith("What binds at 64: compute")
    found = summary.summarise(sweep)
    assert found["ceiling"]["requests"] == pytest.approx(82, abs=1)
    assert (found["binding"]["kind"], found["binding"]["value"]) == ("compute", 64)
    page = report.write(sweep).read_text(encoding="utf-8")
    assert "Memory holds" in page
    assert "≈ 82" in page
    assert "memory holds 82" in str(charts.throughput(sweep, words.answer(sweep)).to_dict())


def test_a_ceiling_beyond_the_chart_has_no_rule(tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run", levels=(1, 2, 4), confirm=None,
                                     server=FACTS))
    assert "memory holds" not in str(charts.throughput(run, words.answer(run)).to_dict())


# --------------------------------------------------------------------------------- what binds


BUSY_CLIENT = Finding("generator-cpu", "SUSPECT", "a generator process used 85% of its core",
                      "use --processes")


@pytest.mark.parametrize(("seen", "kind", "says", "change"), [
    ({"signs": structs.replace(IDLE, kv_full_frac=0.4, kv_max=1.0, preemptions=30.0)},
     "KV cache", "it is up to 100 % full and 30 requests were preempted",
     "--gpu-memory-utilization above 0.9, --kv-cache-dtype fp8"),
    ({"signs": structs.replace(IDLE, kv_full_frac=0.0, kv_max=0.96, waiting_mean=9.0)},
     "KV cache", "it is up to 96 % full and 9 wait", "--gpu-memory-utilization"),
    ({"signs": structs.replace(IDLE, waiting_mean=16.0), "running": 48.0},
     "max_num_seqs", "48 run, as many as it allows, 16 wait, and the KV cache is at most 30 % full",
     "--max-num-seqs above 48 (the KV cache holds about 82)"),
    ({"signs": structs.replace(IDLE, waiting_mean=16.0), "running": 40.0, "facts": {}},
     "max_num_seqs", "never more than 40 run (the server did not say its limit)",
     "--max-num-seqs above 40"),
    ({"signs": structs.replace(IDLE, running_mean=9.0, waiting_mean=40.0), "running": 10.0,
      "util": 1.0}, "queue", "40 wait where 9 run of 48 that may",
     "--max-num-batched-tokens above 2048"),
    ({"front": 0.98, "util": 0.4}, "front end",
     "the API server process uses 0.98 of a core and the GPU is busy only 40 %",
     "--api-server-count"),
    ({"front": 0.98, "util": 1.0, "signs": structs.replace(IDLE, running_mean=20.0)}, "front end",
     "requests in flight only 20 are in the engine", "--api-server-count"),
    ({"util": 0.97}, "compute", "the GPU is busy 97 %, and a token takes", "more GPUs"),
    ({"findings": (BUSY_CLIENT,), "util": 0.97}, "client",
     "a generator process used 85% of its core", "use --processes"),
    ({"outcomes": {"OK": 90, "THROTTLED": 20}}, "turned away", "20 of ", "--max-num-queued-reqs"),
])
def test_the_constraint_that_binds_is_named_with_its_evidence_and_flag(
        sweep: Run, seen: dict[str, Any], kind: str, says: str, change: str) -> None:
    found = told(sweep, **seen)
    assert (found.value, found.kind) == (64, kind)
    assert says in found.says
    assert change in found.change
    assert found.kind is not None
    assert limits.says(found).startswith(f"What binds at 64: {limits.NAMES[found.kind]}: ")


@pytest.mark.parametrize(("seen", "says"), [
    ({"signs": ServerSigns()}, "the server told nothing of itself"),
    ({"util": 0.5}, "the KV cache is at most 30 % full, none waits, a token takes"),
    ({"util": 0.5, "front": 0.5}, "and the GPU is busy 50 %"),
    ({}, "and the GPU was not watched"),
    ({"signs": structs.replace(IDLE, running_mean=20.0), "util": 1.0},
     "in flight only 20 were in the engine; the others were in its API server, a proxy or the "
     "network, which were not watched"),
    # the front of another kind of server is not told from what else its process does
    ({"front": 1.0, "util": 0.5, "facts": {"kind": "transformers"}}, "the GPU is busy 50 %"),
    # it varies, and so it is not held by a limit; few wait
    ({"signs": structs.replace(IDLE, waiting_mean=3.0), "facts": {}, "util": 0.5}, "3 wait"),
])
def test_without_evidence_nothing_is_named(sweep: Run, seen: dict[str, Any], says: str) -> None:
    found = told(sweep, **seen)
    assert found.kind is None, found
    assert says in found.says
    assert limits.says(found).startswith("What binds at 64 is not identified: ")


def test_a_level_that_killed_the_server_shows_no_constraint(tmp_path: Path) -> None:
    run = frame.load(synthetic.run_of(tmp_path / "run", (8, "died")))
    assert limits.says(limits.of(run, ceiling.of(run))) == (
        "What binds at 8 is not identified: the server died before it showed what it lacked.")


def test_a_search_without_an_unsafe_level_tells_of_its_highest(tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run", levels=(8, 16), confirm=16))
    found = limits.of(run, ceiling.of(run))
    assert (found.value, found.kind) == (16, None)
    assert "none waits" in found.says
    assert limits.says(found) in words.answer(run).verdict.sentences


def test_a_load_that_was_asked_for_and_met_is_asked_for_no_constraint(tmp_path: Path) -> None:
    met, missed = (frame.load(synthetic.write(tmp_path / f"run{c}", levels=(c,), confirm=None,
                                              phase="run")) for c in (8, 64))
    assert not any("What binds" in x for x in words.verdict(met))
    assert any("What binds at 64" in x for x in words.verdict(missed))
    assert not any("Memory" in x for x in words.verdict(met))


def test_the_gpu_is_said_busy_at_the_safe_level_and_at_the_busiest(sweep: Run) -> None:
    assert "; busy 72 % at the safe 32, 99 % at 128" in (gpus.sentence(sweep) or "")
    found = gpus.figures(sweep)
    assert found is not None
    assert found["safe"] == {"value": 32, "util_frac": pytest.approx(0.72)}


# ------------------------------------------------- the simulator, bound by each, in virtual time


LONG_PROMPTS = """
name = "long"
slo = { ttft = "3s", tpot = "900ms" }
[[classes]]
name = "read"
kind = "summary"
prompt_tokens = 3000
output_tokens = 8
"""
SHARED = """
name = "shared"
slo = { ttft = "60s", tpot = "500ms" }
[[classes]]
name = "ask"
kind = "chat"
prompt_tokens = 1200
output_tokens = 120
shared_prefix = { tokens = 1024, groups = 2 }
"""
SMALL_KV = ("--gpu-memory-utilization", "0.66", "--max-model-len", "4096")


def simulated(path: Path, mix: str, levels: str, *words: str) -> Run:
    if "\n" in mix:
        (path / "mix.toml").write_text(mix)
        mix = str(path / "mix.toml")
    args, _, server = " ".join(words).partition("--- ")
    with pytest.raises(SystemExit):
        cli.main(["sweep", mix, "--virtual", "--levels", levels,
                  "--max-concurrency", levels.rpartition(",")[2], "--budget", "120s", "--seed", "3",
                  "--no-report", "--out", str(path / "run"), *args.split(), "--", *server.split()])
    return frame.load(path / "run")


@pytest.mark.parametrize(("mix", "levels", "words_", "kind"), [
    ("mixed", "1,8,32", ("--slo ttft=30s,tpot=200ms", "---", *SMALL_KV), "KV cache"),
    ("mixed", "1,4,16", ("---", "--max-num-seqs 12"), "max_num_seqs"),
    ("mixed", "1,16,64", ("---", "--gpu 4090d"), "compute"),
    ("mixed", "1,16,256", ("--slo tpot=5ms", "---", "--gpu h200 --model qwen2.5-0.5b"),
     "front end"),
    (LONG_PROMPTS, "1,4,24", ("---", "--max-num-batched-tokens 2048"), "queue"),
], ids=["KV cache", "max_num_seqs", "compute", "front end", "queue"])
def test_a_simulator_made_to_bind_is_found_out(tmp_path: Path, mix: str, levels: str,
                                               words_: tuple[str, ...], kind: str) -> None:
    run = simulated(tmp_path, mix, levels, *words_)
    found = limits.of(run, ceiling.of(run))
    assert found.kind == kind, found
    assert found.value == (run.conclusion.unsafe or run.conclusion.missed)
    assert limits.says(found) in words.answer(run).verdict.sentences


@pytest.mark.parametrize("mix", ["mixed", SHARED], ids=["mixed", "shared prefix"])
def test_a_full_cache_runs_as_many_as_was_foretold_by_lower_levels(tmp_path: Path,
                                                                   mix: str) -> None:
    """The ceiling is that of the levels that fit; how many run is what the level beyond shows."""
    run = simulated(tmp_path, mix, "2,6,64", "--slo ttft=60s,tpot=500ms", "---", *SMALL_KV)
    at = [i for i, (leg, _) in enumerate(run.legs) if leg.value == 64]
    below = [i for i in range(len(run.legs)) if i not in at]
    lower = structs.replace(run, legs=[run.legs[i] for i in below],
                            judgements=[run.judgements[i] for i in below],
                            signs=[run.signs[i] for i in below])
    holds = ceiling.of(lower).requests
    assert holds is not None
    assert run.signs[at[0]].running_mean == pytest.approx(holds, rel=0.2)
    if mix == SHARED:
        assert ceiling.of(lower).common_tok == 2048
        assert holds > 1.5 * 14_352 / 1268  # as if nothing were shared
