"""The TTFT of Locust's users is the one that the server saw, to 5 % or 2 ms."""

import pytest

from tests.benchmarks.ttft_against_server_log import WAYS, measure

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("way", list(WAYS))
def test_a_clients_ttft_is_the_servers_own(way: str) -> None:
    """Up to three times: on a shared host other processes take the core from one of both."""
    tries = []
    for _ in range(3):
        tries.append(measure(way, users=8, seconds=6.0))
        assert tries[-1].n > 50
        assert tries[-1].wrong == 0  # sent ≤ received ≤ first at the server ≤ first at the client
        if tries[-1].agree:
            return
    pytest.fail(f"the medians are further apart than 5 % and 2 ms: {tries}")
