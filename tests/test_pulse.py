"""The generator's own health, as it is measured: beats, pauses, descriptors, waits for a core."""

import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadgen import pulse
from loadgen.leg import Health
from loadgen.pulse import PROBE_S, Pulse, open_fds, waits

S = 1_000_000_000


@pytest.fixture
def beating() -> Iterator[Pulse]:
    made = Pulse(0)
    made.begin()
    yield made
    made.end()


def beats(made: Pulse, *beats_s: tuple[float, float | None]) -> Pulse:
    """At these instants, with so many request-seconds flown; each slept for as long as it
    should."""
    for at_s, flown_s in beats_s:
        at = round(at_s * S)
        made.beat(at - round(PROBE_S * S), at, None if flown_s is None else round(flown_s * S))
    return made


def inflight_s(from_s: float, to_s: float, *beats_s: tuple[float, float | None]) -> float | None:
    made = beats(Pulse(0), *beats_s)
    return made.health(0, round(to_s * S), round(from_s * S), round(to_s * S)).inflight_s


@pytest.mark.parametrize(("from_s", "to_s", "whole_s"), [
    (0, 10, 40), (2, 4, 8), (9.99, 10, 0.04), (8, 12, 8)])  # after the last beat nothing is known
def test_a_count_that_does_not_change_is_its_time(
        from_s: float, to_s: float, whole_s: float) -> None:
    assert inflight_s(from_s, to_s, *((t / 2, 7 + 2 * t) for t in range(21))) == pytest.approx(
        whole_s)


def test_what_flew_before_the_window_is_not_in_it() -> None:
    assert inflight_s(5, 10, (0, 0), (5, 100), (10, 103)) == pytest.approx(3)


def test_who_counts_nothing_has_no_integral() -> None:
    assert inflight_s(0, 10, (0, None), (5, None)) is None
    assert inflight_s(0, 10) is None
    assert inflight_s(5, 5, (0, 1), (9, 1)) is None  # no window


def test_a_beat_that_came_much_too_late_is_a_stall() -> None:
    made = Pulse(0)
    made.beat(1 * S, 1 * S + round((PROBE_S + 0.24) * S), 1)
    assert made.stalls == []
    made.beat(2 * S, 4 * S, 1)
    assert made.stalls == [(2 * S, 4 * S)]


def test_pauses_of_the_collector_are_counted_from_begin_to_end(beating: Pulse) -> None:
    def told() -> Health:
        return beating.health(0, S, 0, S)

    gc.disable()
    try:
        before = told().gc_pause_s
        gc.collect()
        once = told()
        assert once.gc_pause_s > before
        assert 0 < once.gc_pause_max_s <= once.gc_pause_s
        beating.end()
        gc.collect()
        assert told().gc_pause_s == once.gc_pause_s
        assert len([x for x in gc.callbacks if getattr(x, "__self__", None) is beating]) == 0
    finally:
        gc.enable()


def test_descriptors_are_counted_by_the_lowest_that_is_free() -> None:
    before = open_fds()
    more = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
    try:
        assert open_fds() >= before + 1
        assert open_fds() > max(more)
    finally:
        for fd in more:
            os.close(fd)
    assert open_fds() == before


def test_the_peak_of_descriptors_is_kept_and_stands_beside_the_limit() -> None:
    made = Pulse(0)
    more = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
    made.look()
    for fd in more:
        os.close(fd)
    told = made.health(3, S, 0, S)
    assert told.shard == 3
    assert told.fds is not None
    assert told.fds > max(more)
    assert told.fd_limit == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_at_the_limit_all_descriptors_are_open() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = open_fds()
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        assert open_fds() == free
        with pytest.raises(OSError, match="Too many open files"):
            os.close(os.open(os.devnull, os.O_RDONLY))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("said", "waited"), [
    ("1005437561 2059950 10\n", (2059950, 10)), ("", None), ("12\n", None), ("a b c\n", None)])
def test_the_wait_for_a_core_is_the_kernels_second_number(
        said: str, waited: tuple[int, int] | None, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "schedstat").write_text(said)
    monkeypatch.setattr(pulse, "_SCHEDSTAT", tmp_path / "schedstat")
    assert waits() == waited
    monkeypatch.setattr(pulse, "_SCHEDSTAT", tmp_path / "nosuch")
    assert waits() is None


def test_the_wait_for_a_core_is_a_share_of_the_legs_clock(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "schedstat"
    monkeypatch.setattr(pulse, "_SCHEDSTAT", said)
    said.write_text(f"0 {7 * S} 1000")
    made = beats(Pulse(10 * S), (9.99, 0), (10, 0))  # what came before the leg is not its own
    said.write_text(f"0 {8 * S} 1500")
    assert made.health(0, 10 * S + S // 2, 0, S).run_queue_frac is None  # too short to say
    told = made.health(0, 20 * S, 0, S)
    assert told.run_queue_frac == pytest.approx(0.1)
    assert told.run_queue_each_s == pytest.approx(0.002)
    said.write_text("")
    assert made.health(0, 20 * S, 0, S).run_queue_frac is None
