"""When a leg had settled, and whether it stayed so."""

import random

from loadgen import settle


def noise(n: int, seed: int = 1) -> list[float]:
    rng = random.Random(seed)
    return [1 + 0.1 * rng.random() for _ in range(n)]


def test_a_transient_is_left_out_and_what_follows_is_kept() -> None:
    series = [3 - i / 20 for i in range(40)] + noise(160)
    left_out = settle.mser(series)
    assert left_out is not None
    assert 25 <= left_out <= 60


def test_a_steady_series_keeps_nearly_all() -> None:
    kept = [settle.mser(noise(200, seed)) for seed in range(20)]
    assert sum(x is not None and x <= 50 for x in kept) >= 14


def test_what_goes_on_rising_never_settled() -> None:
    assert settle.mser([0.01 * i for i in range(200)]) is None
    assert settle.mser(noise(19)) is None
    assert settle.mser([]) is None


def test_a_backlog_that_grows_is_seen_and_noise_is_not() -> None:
    rising = [x * (1 + i / 100) for i, x in enumerate(noise(200))]
    factor = settle.rises(rising)
    assert factor is not None
    assert factor > 1.5
    assert not any(settle.rises(noise(200, seed)) for seed in range(200))
    assert settle.rises(noise(10)) is None
    assert settle.rises([]) is None
    assert settle.rises(rising[::-1]) is None  # it gets better
