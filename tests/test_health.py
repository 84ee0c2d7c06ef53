"""The state of a server: each state by the evidence that names it."""

from pathlib import Path
from typing import Any

import pytest

from loadgen import health
from loadgen.health import Gauges, Health, Named, Silence, State
from servers import death

S = 1_000_000_000
LOGS = Path(__file__).parent / "data" / "vllm" / "logs"


def cause(name: str) -> str:
    said = death.cause((LOGS / name).read_text(encoding="utf-8").splitlines())
    assert said is not None
    return said


# ------------------------------------------------------------------------------ names of a death


@pytest.mark.parametrize(("log", "ready", "state"), [
    ("oom.log", True, "OOM_RUNTIME"), ("gpu_oom_at_start.log", False, "OOM_START"),
    ("gpu_kv_too_large.log", False, "OOM_START"), ("kv_too_small.log", False, "OOM_START"),
    ("kv_larger_than_memory.log", False, "OOM_START"),
    ("worker_killed.log", True, "KILLED"), ("bad_model_dir.log", False, "START_FAILED"),
    ("hang.log", True, "ENGINE_DEAD")])
@pytest.mark.parametrize("code", [0, 1])
def test_recorded_logs_name_the_death_whatever_the_exit_code(
        log: str, ready: bool, state: State, code: int) -> None:
    why = f"its process exited with code {code}; log: {cause(log)}"
    assert health.death(why, ready) == Named(state, why)


def test_a_recorded_oom_at_start_on_an_h200_says_why_in_a_sentence() -> None:
    named = health.death(f"its process exited with code 1; log: {cause('gpu_kv_too_large.log')}",
                         ready=False)
    assert str(named).startswith(
        "OOM_START: its process exited with code 1; log: torch.OutOfMemoryError: CUDA out of "
        "memory. Tried to allocate 5.76 GiB.")


def test_a_signal_that_we_did_not_send_is_a_kill_and_one_that_we_sent_a_stop() -> None:
    why = "its process killed by signal 9; log: (empty)"
    assert health.death(why, ready=True).state == "KILLED"
    assert health.death(why, ready=True, stopped=True).state == "STOPPED"


@pytest.mark.parametrize(("said", "state"), [
    ("(exit code: -9)", "KILLED"), ("(exit code: None)", "KILLED"),  # it looked before the kernel
    (", shutting down client.", "KILLED"), ("(exit code: 1)", "ENGINE_DEAD")])
def test_a_worker_that_ended_without_a_word_was_killed(said: str, state: State) -> None:
    why = f"its process exited with code 0; log: Worker proc VllmWorker-0 died unexpectedly {said}"
    assert health.death(why, ready=True).state == state


def test_a_kill_by_the_kernel_for_memory_is_out_of_memory() -> None:
    why = "its process exited with code 0; log: Worker proc died unexpectedly (exit code: -9)"
    named = health.death(why, True, "the kernel killed 1 process of its cgroup for memory")
    assert named.state == "OOM_RUNTIME"
    assert "the kernel killed" in named.why
    assert health.death(why, False, "the kernel killed").state == "OOM_START"


def test_an_exit_with_code_0_after_serving_is_a_dead_engine() -> None:
    why = "its process exited with code 0; log: RuntimeError: boom"
    assert health.death(why, ready=True).state == "ENGINE_DEAD"


def test_a_stranger_s_server_that_is_gone_is_unreachable() -> None:
    assert health.death("it cannot be reached any more: refused", True).state == "UNREACHABLE"
    assert health.death("/health says 503", ready=True).state == "ENGINE_DEAD"


# ----------------------------------------------------------------------------------------- hangs


@pytest.mark.parametrize(("silence", "hangs"), [
    (Silence(streams=8, silent_s=9.9, usual_s=0.5), False),
    (Silence(streams=8, silent_s=10.5, usual_s=0.5), True),
    (Silence(streams=8, silent_s=14, usual_s=1.5), False),  # it is often silent for so long
    (Silence(streams=8, silent_s=26, usual_s=9.0), True),
    (Silence(streams=0, waiting=8, silent_s=26, usual_s=0.5), False),  # prompts take their time
    (Silence(streams=0, waiting=8, silent_s=31, usual_s=0.5), True),
    (Silence(streams=0, waiting=8, silent_s=50, usual_s=20), False),
    (Silence(streams=0, waiting=8, silent_s=56, usual_s=40), True),
    (Silence(silent_s=1000), False)])  # nothing is in flight: nothing can come
def test_silence_is_a_hang_beyond_the_usual(silence: Silence, hangs: bool) -> None:
    assert health.suspicious(silence) is hangs


def test_a_hang_says_what_it_rests_on() -> None:
    named = health.hung(Silence(streams=8, silent_s=12.3, usual_s=0.52), answers=True)
    assert str(named) == ("HUNG: no token on any of 8 streams for 12 s (the longest pause before "
                          "was 0.5 s), while its process runs and /health says 200")
    assert "tells nothing" in health.hung(Silence(streams=1, silent_s=12), None).why


# ---------------------------------------------------------------------------------------- strain


def line(*values: float, every_s: float = 1.0) -> list[tuple[int, float]]:
    return [(round(i * every_s * S), v) for i, v in enumerate(values)]


@pytest.mark.parametrize(("gauges", "says"), [
    (Gauges(preemptions=line(3, 3, 15)), "12 preemptions in 2 s"),
    (Gauges(preemptions=line(3, 3, 3)), None),
    (Gauges(kv_frac=line(0.2, 0.97)), "KV cache 97 % full"),
    (Gauges(kv_frac=line(0.97, 0.5)), None),
    (Gauges(waiting=line(3, 5, 7, 9, 12)), "its queue grew from 3 to 12 in 4 s"),
    (Gauges(waiting=line(3, 12)), None),  # a moment is no trend
    (Gauges(waiting=line(100, 101, 103, 104, 105)), None),
    (Gauges(slowed_by=("temperature (driver)",)), "GPU clocks held down: temperature (driver)"),
    (Gauges(), None)])
def test_strain_is_told_by_the_server_s_own_gauges(gauges: Gauges, says: str | None) -> None:
    assert health.strain(gauges) == ([says] if says else [])


def states(*steps: Any) -> list[str]:
    """From a server that is ready; a step: (s, in flight, strain)."""
    h = health.ready(Health())
    seen: list[str] = []
    for t_s, inflight, strained in steps:
        h = health.look(h, t_s * S, inflight, strained)
        seen.append(h.named.state)
    return seen


def test_a_server_serves_while_requests_are_in_flight() -> None:
    assert states((1, 0, []), (2, 3, []), (3, 0, [])) == ["READY", "SERVING", "READY"]


def test_degraded_lasts_until_strain_is_not_seen_for_a_while() -> None:
    assert states((1, 3, []), (2, 3, ["full"]), (6, 3, []), (7, 3, []), (8, 3, [])) == [
        "SERVING", "DEGRADED", "DEGRADED", "SERVING", "SERVING"]


def test_no_look_wakes_the_dead() -> None:
    for state in health.DEAD:
        dead = health.died(Health(), Named(state, "x"))
        assert health.look(dead, 9 * S, 3, ["full"]) == dead
    assert health.look(health.started(Health()), S, 0, []).named.state == "STARTING"
