"""The master's Locust process from start to exit: as `lifecycle`, with the load on its workers."""

import logging
import sys
import time
from pathlib import Path
from socket import gethostname

import gevent
import psutil
from locust.env import Environment

from loadgen import facts, traces, view
from loadgen.attend import Ask
from loadgen.errors import LoadgenError, ScenarioError
from loadgen.fleet import options
from loadgen.fleet.conductor import at_once, restart_server
from loadgen.fleet.lifecycle import INTERRUPTED, INVALID, USAGE, Lifecycle
from loadgen.fleet.master import Fleet, FleetTest, Outcome, workers_of
from loadgen.fleet.wide_live import WideLive
from loadgen.hosts import ledger
from loadgen.judge import Judgement, ServerSigns
from loadgen.leg import Leg, Window
from loadgen.options import levels_of
from loadgen.ramp import SweepPlan
from loadgen.record import TROUBLE, RequestRecord
from loadgen.scenario import Closed, Load, Open, PerSecond, Trace, TraceFile
from loadgen.store import RunFolder
from loadgen.supervise import Progress
from loadgen.sweep import SweepResult, run_one, sweep
from loadgen.telemetry.signs import series, signs_of

WARMUP_FRAC, WARMUP_S = 0.1, 5.0  # of -t; at most
DRAIN_S = 30.0  # after Stop in the page

log = logging.getLogger("loadgen")


class WideLifecycle(Lifecycle):
    """What a master's Locust process does besides Locust's own doings."""

    live: WideLive

    def __init__(self, environment: Environment, token: str) -> None:
        super().__init__(environment)
        self.live = WideLive()
        self.fleet = Fleet(environment, token)
        self.fleet.roll.scenario = lambda: ledger.scenario_hash(
            options.asked(self._options).scenario)
        self.test: FleetTest | None = None
        self.outcome: Outcome | None = None
        self._conductor: WideConductor | None = None
        self._run_time_s: float | None = None
        self.seen: dict[str, int] = {}  # outcomes of the leg that runs

    # ------------------------------------------------------------------------- Locust's events

    def init(self) -> None:
        given = self._options
        if given.headless and not self.conducted:  # the load's time, not Locust's
            self._run_time_s, given.run_time = given.run_time, None
        super().init()

    def check(self, asked: options.Asked) -> None:
        if not self.conducted and asked.scenario.shape is not None and (
                self.environment.shape_class is not None):
            raise ScenarioError(f"{asked.scenario.name}: a shape of users does not run on a fleet; "
                                "use locustfiles/ramp.py or open_loop.py, or one process")
        super().check(asked)

    def test_start(self) -> None:
        self._began_ns = time.monotonic_ns()
        super().test_start()

    def test_stopping(self) -> None:
        if self._conductor is not None:
            self._conductor.stop(self._interrupted)
            self._conductor = None
        gevent.killall(self._watching)
        self._watching = []
        if self.conducted:
            self.environment.shape_class.stop()  # type: ignore[union-attr]

    def spawned(self) -> None:
        """Users of Locust's are no load here."""

    def test_stop(self) -> None:
        test, self.test = self.test, None
        if test is not None:
            try:
                self.outcome = test.close()
                for says in self.outcome.says:
                    log.error("%s", says)
            except LoadgenError as e:
                self.failed = self.failed or str(e)
                test.leave()
                self.outcome = None
            self.live.stop()
        self.hide()
        if self.attendant is not None:
            self.attendant.close()
            self.attendant = None
        if test is not None and self.folder is not None:
            self._keep_log(self.folder)
            self.report = gevent.spawn(self._write_report, self.folder)

    def quitting(self) -> None:
        super().quitting()
        self.fleet.end()
        if self._options.processes:  # Locust waits for them, however long they are stopped
            for m in self.fleet.roll.members.values():
                if m.is_silent:
                    _kill_child(int(m.hello.host.get("pid") or 0))

    @property
    def is_running(self) -> bool:
        return self.test is not None

    @property
    def troubles(self) -> int:
        return sum(self.seen.get(x.value, 0) for x in TROUBLE)

    # ----------------------------------------------------------------------------------- a test

    def _begin(self) -> None:
        self.outcome, self.seen = None, {}
        asked, prepared = self._next()
        expected = self._options.expect_workers if self._options.headless else 1
        key = {"Authorization": f"Bearer {asked.api_key}"} if asked.api_key else {}
        if prepared.target.headers != key:
            raise ScenarioError("a password in --host does not travel to workers; give all of them "
                                "the same $LOADGEN_API_KEY")
        members = self.fleet.muster(expected)
        if self.can_restart and any(m.hello.host.get("name") != gethostname() for m in members):
            raise ScenarioError("the simulator of this host can be reached from this host only: "
                                "give --host, with a name that all workers know")
        stripes = self.fleet.stripes(members)
        shards = sum(m.hello.shards for m, _, _ in stripes)
        assert self.server is not None
        assert self.folder is not None
        assert self.attendant is not None
        said = self.said = self.server.facts()
        folder = RunFolder.create(self.folder, facts.manifest(
            self.folder, ["locust", *sys.argv[1:]], prepared.scenario, prepared.seed,
            prepared.criteria, prepared.target, said, prepared.ratios, shards,
            workers_of(stripes)))
        test = self.fleet.begin(stripes, folder, prepared, asked.api_key)
        self.attendant.ask(Ask("watch", folder=str(folder.path), simulated=bool(said["simulated"])))
        self.expose(folder)
        self.test, test.began_ns = test, self._began_ns
        self.live.begin_test(test)
        log.info("%s → %s at %s over %d workers with %d shards; records in %s",
                 prepared.scenario.name, prepared.target.model, prepared.target.base_url,
                 len(stripes), shards, folder.path)
        if self.conducted:
            self.environment.shape_class.conduct(self)  # type: ignore[union-attr]
        else:
            self._conductor = WideConductor(self, None)
        self._watching = [gevent.spawn(self._show)]

    def conductor(self, most: int, budget_s: float) -> "WideConductor":
        self._conductor = WideConductor(self, (most, budget_s))
        return self._conductor

    def _cannot(self, error: LoadgenError) -> None:
        self.fleet.over()
        for m in self.fleet.roll.members.values():
            m.leave()
        super()._cannot(error)

    def _show(self) -> None:
        while self.test is not None:
            gevent.sleep(1)
            if self.test is not None:
                self.live.look(self.test)

    def leg(self) -> Leg:
        """The load that Locust's options ask for, over the whole fleet."""
        assert self.test is not None
        rate, measure_s = self.asked.rate_rps, self._run_time_s
        users = max(1, self.environment.runner.target_user_count)  # type: ignore[union-attr]
        if rate is None and any(c.open_loop for c in self._users):
            return self._recorded(measure_s)
        load: Load = Closed(concurrency=users) if rate is None else Open(rate_rps=PerSecond(rate))
        warmup_s = 0.0
        if measure_s is not None:
            warmup_s = min(WARMUP_S, WARMUP_FRAC * measure_s)
            measure_s -= warmup_s
        return Leg(id="run", axis="concurrency" if rate is None else "rate",
                   value=float(users) if rate is None else rate, phase="run", replicate=0,
                   seed=self.test.prepared.seed, load=load, warmup_s=warmup_s,
                   measure_s=measure_s)

    def _recorded(self, measure_s: float | None) -> Leg:
        """The scenario's trace, over the whole fleet; -t may end it sooner."""
        prepared, load = self.asked, self.asked.scenario.load
        assert self.test is not None
        seed = self.test.prepared.seed
        if isinstance(load, TraceFile):
            too_long, load = load.too_long, traces.trace(load, seed)
            if (most := self.test.prepared.context_tok) is not None:
                load, n = traces.fitted(load, most, too_long)
                if n:
                    log.info("%d requests of the trace are longer than the server's context of %d "
                             "tokens: %s", n, most, "cut" if too_long == "cut" else "left out")
        assert isinstance(load, Trace), prepared.scenario.name
        whole_s = load.due_s[-1] + 1.0
        over_s = whole_s if measure_s is None else min(measure_s, whole_s)
        return Leg(id="run", axis="rate", value=float(f"{len(load.due_s) / whole_s:.3g}"),
                   phase="run", replicate=0, seed=seed, load=load, warmup_s=0.0, measure_s=over_s)

    # ---------------------------------------------------------------------------------- after it

    def _write_report(self, folder: Path) -> None:
        super()._write_report(folder)
        exact = self.outcome is not None and self.outcome.exact
        if not exact and self.environment.process_exit_code not in (USAGE, INTERRUPTED):
            self.environment.process_exit_code = INVALID
            why = "; ".join(self.outcome.says) if self.outcome is not None else self.failed
            self._says += f"The fleet's run is INVALID: {why}\n"


class WideConductor:
    """Runs one leg, or a search, over the fleet; an `Executor` of `loadgen.sweep`. `wanted`: what
    Locust's shape is told; its users are no load here."""

    def __init__(self, lifecycle: WideLifecycle, search: tuple[int, float] | None) -> None:
        assert lifecycle.test is not None
        self.wanted: tuple[int, float] | None = (1, 1.0)
        self._lifecycle, self._test = lifecycle, lifecycle.test
        self._folder = RunFolder(lifecycle.test.folder.path)
        self._search = search
        self._running: gevent.Greenlet | None = None
        self.start()

    def start(self) -> None:
        if self._running is None:
            self._running = gevent.spawn(self._run)

    def stop(self, interrupted: bool = True) -> None:
        """The test is to end: what is in flight is cancelled, or awaited for a while."""
        running = self._running
        if running is None or running.ready():
            return
        self._test.stopping = "cancel" if interrupted or self._search else "stop"
        running.join(timeout=DRAIN_S)
        self._test.stopping = "cancel"
        running.join()

    def _run(self) -> None:
        try:
            result = at_once(self._doing())
            if result.stop == "failed":
                self._lifecycle.failed = result.says
            if self._search:
                log.info("%s: %s", result.stop, result.says)
        except LoadgenError as e:
            self._lifecycle.failed = str(e)
            log.error("%s", e)  # noqa: TRY400  (the operator's affair: no traceback)
        finally:  # a bug of ours, too, must end the test
            self.wanted = None
            if self._test.stopping is None and not self._search:
                self._lifecycle.stop_test()

    async def _doing(self) -> SweepResult:
        prepared = self._test.prepared
        if self._search is None:
            leg = self._lifecycle.leg()
            window, judgement = await run_one(leg, prepared.scenario, prepared.criteria, self)
            log.info("%s", view.LINE_HEAD)
            self._judged(leg, judgement)
            return SweepResult([judgement], window.ending, window.note or "")
        log.info("%s", view.LINE_HEAD)
        return await sweep(self._plan(*self._search), prepared.scenario, self, self._judged)

    def _plan(self, most: int, budget_s: float) -> SweepPlan:
        prepared, rate = self._test.prepared, self._lifecycle.asked.rate_rps
        axis = "concurrency" if rate is None else "rate"
        return SweepPlan(
            axis="concurrency" if rate is None else "rate",
            levels=levels_of(None, float(most) if rate is None else rate, axis),
            budget_s=budget_s, seed=prepared.seed, criteria=prepared.criteria,
            can_restart=self._lifecycle.can_restart)

    def _judged(self, leg: Leg, judgement: Judgement) -> None:
        log.info("%s", view.line(leg, judgement))

    # ----------------------------------------------------------------------------- the executor

    async def run_leg(self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]:
        """Waits as gevent waits; nothing in it is asyncio's."""
        self._lifecycle.seen = {}
        window, records = self._test.run_leg(leg, self._died, self._seen)
        return window, records, signs_of(window, series(self._folder.rows(), "server"))

    def _seen(self, progress: Progress) -> None:
        self._lifecycle.seen = progress.outcomes
        if self._lifecycle.exporter is not None:
            self._lifecycle.exporter.progress(progress)

    def _died(self) -> str | None:
        return self._lifecycle.died()

    async def restart(self, why: str) -> None:
        restart_server(self._lifecycle, why)


def _kill_child(pid: int) -> None:
    """A worker that this process forked and that stands still."""
    try:
        if pid and psutil.Process(pid).ppid() == psutil.Process().pid:
            psutil.Process(pid).kill()
    except psutil.Error:
        pass
