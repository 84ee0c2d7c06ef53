"""The largest concurrency that a server survives, to the unit, on a server that is a function."""

import asyncio
from typing import Any

import pytest

from loadgen import unit
from loadgen.errors import ServerError
from loadgen.judge import Criteria, Judgement, ServerSigns
from loadgen.leg import Leg, Window
from loadgen.ramp import SweepPlan
from loadgen.record import RequestRecord
from loadgen.scenario import Scenario
from loadgen.sweep import SweepResult, run_one
from loadgen.unit import Boundary
from tests.synthetic import MIX

S = 1_000_000_000


class Server:
    """Dies at `kills` concurrent requests; `comes_up`: so often."""

    def __init__(self, kills: float, comes_up: int = 99) -> None:
        self.kills, self.comes_up = kills, comes_up
        self.tried: list[float] = []
        self.dead = False

    async def run_leg(self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]:
        assert not self.dead, "load for a dead server"
        self.tried.append(leg.value)
        self.dead = leg.value >= self.kills
        window = Window(leg.id, 0, S, 9 * S, 10 * S, "server_died" if self.dead else "done",
                        note="OOM_RUNTIME: x" if self.dead else None)
        return window, [], ServerSigns(died=window.note)

    async def restart(self, why: str) -> None:
        if not self.comes_up:
            raise ServerError("no room")
        self.comes_up -= 1
        self.dead = False


def search(server: Server, levels: Any = (1, 2, 4, 8, 16, 32, 64), before: Any = (),
           can_restart: bool = True) -> tuple[SweepResult, Boundary]:
    """`before`: levels that a sweep held, the last of which killed the server if it kills."""
    plan = SweepPlan("concurrency", tuple(map(float, levels)), 600, 7, Criteria(), can_restart)
    mix: Scenario = MIX

    async def test() -> SweepResult:
        judged: list[Judgement] = []
        for value in before:
            leg = unit._leg(unit.State(plan, ()), float(value))
            leg = Leg(f"ladder-{value}-r0", "concurrency", float(value), "ladder", 0, 1, leg.load,
                      1.0, 7.0)
            judged.append((await run_one(leg, mix, plan.criteria, server))[1])
        server.tried.clear()
        return await unit.search(plan, SweepResult(judged, "CONFIRMED", "8 is confirmed"), mix,
                                 server, lambda leg, j: None)
    found = asyncio.run(test())
    return found, unit.boundary(found.judgements)


@pytest.mark.parametrize("kills", [2, 3, 31, 32, 33, 37, 63, 64])
def test_the_last_that_is_survived_and_the_first_that_kills_are_neighbours(kills: int) -> None:
    server = Server(kills)
    found, b = search(server)
    assert (b.survived, b.fatal, b.exact) == (kills - 1, kills, True)
    assert found.stop == "CONFIRMED"
    assert found.says == (f"8 is confirmed; it survives {kills - 1} concurrent requests, and "
                          f"{kills} kill it")
    assert len(server.tried) <= 14


def test_it_goes_on_where_the_sweep_ended() -> None:
    server = Server(37)
    _, b = search(server, before=(1, 2, 4, 8, 16, 32, 64))
    assert server.tried == [48, 40, 36, 38, 37]
    assert (b.survived, b.fatal) == (36, 37)


def test_a_server_that_nothing_kills_is_tried_up_to_the_largest_level() -> None:
    server = Server(1000)
    found, b = search(server, before=(1, 2, 4))
    assert server.tried == [8, 16, 32, 64]
    assert (b.survived, b.fatal) == (64, None)
    assert "more were not tried" in found.says


def test_a_server_that_the_first_request_kills_survives_none() -> None:
    found, b = search(Server(1))
    assert (b.survived, b.fatal, b.exact) == (None, 1, True)
    assert "no smaller load was held" in found.says


def test_without_restarts_it_ends_at_the_first_death() -> None:
    server = Server(37)
    found, b = search(server, can_restart=False)
    assert server.tried == [1, 2, 4, 8, 16, 32, 64]
    assert (b.survived, b.fatal, b.exact) == (32, 64, False)
    assert "is not to be restarted" in found.says


def test_a_server_that_does_not_come_up_again_ends_it_and_what_was_found_stands() -> None:
    found, b = search(Server(37, comes_up=1))
    assert "could not be restarted: no room" in found.says
    assert (b.survived, b.fatal) == (32, 48)
    assert found.stop == "CONFIRMED"


def test_a_server_that_dies_of_anything_is_not_restarted_for_ever() -> None:
    class Moody(Server):
        async def run_leg(self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]:
            self.kills = leg.value if len(self.tried) > 1 else 10**9
            return await super().run_leg(leg)
    server = Moody(1)
    found, b = search(server, levels=(1, 2, 2**40))
    assert len(server.tried) <= 3 + unit.MAX_RESTARTS
    assert "died 20 times" in found.says
    assert not b.exact
