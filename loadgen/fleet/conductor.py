"""The search of `loadgen sweep`, with Locust's users as the load: the third way to execute a leg,
beside shards and the simulator's virtual time. Same reducer, same judge, same verdict."""

import logging
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import gevent

from loadgen import answers, view
from loadgen.attend import Ask
from loadgen.errors import GeneratorError, LoadgenError, ServerError
from loadgen.fleet.run import FleetRun, OnLeg
from loadgen.judge import Judgement, ServerSigns
from loadgen.leg import Ending, Leg, Window
from loadgen.options import levels_of
from loadgen.ramp import SweepPlan, finest_of
from loadgen.record import RequestRecord
from loadgen.scenario import Closed
from loadgen.store import RunFolder
from loadgen.supervise import is_lost
from loadgen.sweep import SweepResult, sweep
from loadgen.telemetry.signs import series, signs_of

if TYPE_CHECKING:
    from loadgen.fleet.lifecycle import Lifecycle

HEAD_START_S = 1.5  # Locust asks its shape once a second how many users there are to be
LOOK_S = 0.1
T = TypeVar("T")

log = logging.getLogger("loadgen")
now_ns = time.monotonic_ns


class Conductor:
    """One search. `wanted`: the users there are to be and how many may come per second; None when
    the search is over. An `Executor` of `loadgen.sweep`."""

    def __init__(self, lifecycle: "Lifecycle", most: int, budget_s: float) -> None:
        assert lifecycle.run is not None
        self.wanted: tuple[int, float] | None = (1, 1.0)
        self._lifecycle, self._run = lifecycle, lifecycle.run
        self._offsets: dict[Path, int] = {}
        self._folder = RunFolder(lifecycle.run.folder.path)
        prepared, rate = lifecycle.run.prepared, lifecycle.asked.rate_rps
        self._most = most
        self._plan = SweepPlan(
            axis="concurrency" if rate is None else "rate",
            levels=levels_of(None, float(most) if rate is None else rate,
                             "concurrency" if rate is None else "rate"),
            budget_s=budget_s, seed=prepared.seed, criteria=prepared.criteria,
            can_restart=lifecycle.can_restart, finest=finest_of(budget_s))

    def start(self) -> None:
        self._run.goes_on = True
        self._searching = gevent.spawn(self._search)

    def stop(self) -> None:
        self._run.goes_on = False
        self._searching.kill(block=False)

    def _search(self) -> None:
        log.info("%s", view.LINE_HEAD)
        try:
            result: SweepResult = at_once(sweep(
                self._plan, self._run.prepared.scenario, self, self._judged))
            log.info("%s: %s", result.stop, result.says)
            if result.stop == "failed":
                self._lifecycle.failed = result.says
        except LoadgenError as e:
            self._lifecycle.failed = str(e)
            log.error("%s", e)  # noqa: TRY400  (the operator's affair: no traceback)
        finally:  # a bug of ours, too, must end the test
            self._run.goes_on = False
            self.wanted = None

    def _judged(self, leg: Leg, judgement: Judgement) -> None:
        log.info("%s", view.line(leg, judgement))

    # ----------------------------------------------------------------------------- the executor

    async def run_leg(self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]:
        """Waits as gevent waits; nothing in it is asyncio's."""
        run = self._run
        users = leg.load.concurrency if isinstance(leg.load, Closed) else self._most
        self.wanted = users, float(users)
        on = run.begin(leg, now_ns() + round((HEAD_START_S + leg.warmup_s) * 1e9))
        ending, note = self._watch(run, on)
        window = run.end(ending, note)
        run.cancel(on)
        records = [r for r in self._folder.records(self._offsets) if r.leg == leg.id]
        prepared = run.prepared
        answers.check(self._folder, prepared.scenario, prepared.ratios, [leg], records)
        return window, records, signs_of(window, series(self._folder.rows(), "server"))

    def _watch(self, run: FleetRun, on: OnLeg) -> tuple[Ending, str | None]:
        while True:
            gevent.sleep(LOOK_S)
            if run.failed is not None:
                return "failed", run.failed
            if (why := self._lifecycle.died()) is not None:
                return "server_died", why
            held_s = (now_ns() - on.t0_ns) / 1e9 - HEAD_START_S
            if is_lost(on.leg, on.done, on.done_good, held_s):
                return "cut", None
            if run.awaited():
                return "done", None

    async def restart(self, why: str) -> None:
        restart_server(self._lifecycle, why)


def restart_server(lifecycle: "Lifecycle", why: str) -> None:
    """Returns when it has streamed an answer. Raises LoadgenError."""
    log.info("restarting the server: %s", why)
    server, attendant = lifecycle.server, lifecycle.attendant
    if server is None or attendant is None:
        raise GeneratorError("the test is over")
    server.stop()
    server.start()
    answer = attendant.ask(Ask("ready"), server.alive)
    if answer.failed is not None:
        raise ServerError(answer.failed)


def at_once(doing: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing but greenlets."""
    try:
        doing.send(None)
    except StopIteration as e:
        result: T = e.value
        return result
    raise AssertionError("it waits for an event loop, and there is none")
