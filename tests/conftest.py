"""What all tests rest on."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real import processes_in

# A shell that starts the tests in the background has SIGINT ignored in them, and in all that they
# start; Ctrl-C is what some of them test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def nobody_is_left(tmp_path: Path) -> Iterator[None]:
    """After each run: no simulator and no generator process of it lives on."""
    yield
    left = processes_in(tmp_path)
    until = time.monotonic() + 5
    while left and time.monotonic() < until:
        time.sleep(0.1)
        left = processes_in(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, list(left.values())
