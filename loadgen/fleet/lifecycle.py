"""One Locust process from start to exit: its tests, each a run folder, and the server that it
started. Everything hangs on Locust's own events:

    init → (test_start → spawning_complete … → test_stopping → test_stop) … → quitting → quit
"""

import argparse
import logging
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gevent
import gevent.event
from locust import stats
from locust.env import Environment
from locust.runners import STATE_STOPPED, LocalRunner

from loadgen import facts, health
from loadgen.attend import Ask
from loadgen.errors import FolderError, GeneratorError, LoadgenError, ScenarioError, ServerError
from loadgen.exporter import Exporter, listen
from loadgen.fleet import options, prepare
from loadgen.fleet.attendant import Attendant
from loadgen.fleet.live import Live
from loadgen.fleet.run import RUNS, FleetRun, OnLeg, Prepared
from loadgen.leg import Ending, Leg
from loadgen.pulse import PROBE_S
from loadgen.record import TROUBLE
from loadgen.scenario import Closed, Load, Open, PerSecond, Trace, TraceFile
from loadgen.store import RunFolder
from loadgen.supervise import Progress
from servers.base import Server

USAGE, INVALID, DIED, INTERRUPTED = 2, 3, 4, 130
HOLD_S = 120.0  # at most: an answer that takes longer is left out with all that were due after it

log = logging.getLogger("loadgen")
now_ns = time.monotonic_ns


def _progress(run: FleetRun, on: OnLeg) -> Progress:
    now = now_ns()
    return Progress(on.leg, (now - on.t0_ns) / 1e9, inflight=len(run.flights), done=on.done,
                    done_good=on.done_good, sampled=on.sampled, good=on.good,
                    lag_s=on.pulse.lag_recent_s(), cpu_frac=on.pulse.cpu_frac(now))


def code_of(error: LoadgenError) -> int:
    if isinstance(error, ScenarioError | FolderError):
        return USAGE
    return DIED if isinstance(error, ServerError) else INVALID


class Lifecycle:
    """What this Locust process does besides Locust's own doings."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.live = Live()
        self.run: FleetRun | None = None  # the test that runs
        self.folder: Path | None = None  # of the last test
        self.failed: str | None = None  # why the last test could not be, or broke off
        self.server: Server | None = None  # of the test that runs
        self.said: dict[str, Any] = {}  # the server's facts
        self.starting = False  # what comes before the first user is under way
        self.report: gevent.Greenlet | None = None
        self._own: tuple[Server, Path, str] | None = None  # simulator, its log, its URL
        self._ready: tuple[options.Asked, Server, Prepared, Attendant] | None = None
        self.attendant: Attendant | None = None
        self.exporter: Exporter | None = None
        self._tests = self._legs = 0
        self._log_from = 0
        self._troubles = 0
        self._says = ""  # the last report's words
        self._interrupted = False
        self._watching: list[gevent.Greenlet] = []

    # ------------------------------------------------------------------------- Locust's events

    def init(self) -> None:
        """Checks the options, and starts the simulator if no host is given. Exits on errors."""
        try:
            asked = options.asked(self._options)
            if asked.metrics_at is not None:
                listen(asked.metrics_at).close()  # one in use is said now, not with a test
            hosts = {c.host for c in self.environment.user_classes} - {None}
            if not self.environment.host and not hosts:
                server, path = prepare.start_simulator(asked.server_options)
                self._own = server, path, server.target.base_url
                self.environment.host = server.target.base_url
                log.info("no --host: the simulator serves at %s", self.environment.host)
            elif asked.server_options:
                raise ScenarioError("--server-options are the simulator's, which is not started "
                                    "when there is a --host")
            if self._options.headless:  # before -t and a shape's clock begin to count
                self._prepare_at_once()
        except LoadgenError as e:
            self._stop_own()
            log.error("%s", e)  # noqa: TRY400  (the operator's affair: no traceback)
            raise SystemExit(code_of(e)) from None

    def _prepare_at_once(self) -> None:
        """Locust takes no signal yet. Raises LoadgenError."""
        main = gevent.getcurrent()
        taken = gevent.signal_handler(
            signal.SIGTERM, lambda: gevent.kill(main, KeyboardInterrupt()))
        try:
            self.prepare()
        except KeyboardInterrupt:
            self._stop_own()
            log.info("interrupted before the server was ready")
            raise SystemExit(INTERRUPTED) from None
        finally:
            taken.cancel()

    def prepare(self, form: argparse.Namespace | None = None, host: str | None = None,
                patience_s: float = prepare.PATIENCE_S) -> None:
        """Makes ready what the next test needs, as a start form asks for it, or else the options.
        Raises LoadgenError."""
        self.discard()
        asked = options.asked(form or self._options)
        self.check(asked)
        RunFolder.check_free(prepare.folder_of(asked, self._tests))
        own, url = (self._own[0], self._own[2]) if self._own else (None, None)
        hosts = [c.host for c in self.environment.user_classes if c.host]
        host = host or self.environment.host or next(iter(hosts), "")
        server, target = prepare.server_of(host, own, url)
        self._ready = asked, server, *prepare.prepare(asked, server, target, patience_s)

    def check(self, asked: options.Asked) -> None:
        """Whether these users can do that here. Raises ScenarioError."""
        if (asked.rate_rps is None and any(c.open_loop for c in self._users)
                and not isinstance(asked.scenario.load, Trace | TraceFile)):
            raise ScenarioError("these users are an open loop: say with --rate how many requests "
                                "per second all of them are to send, or name a scenario whose "
                                "load is a trace")
        if self.needs_fleet:
            raise ScenarioError("these users run on workers only: add --processes N, or start "
                                "--master and --worker")

    @property
    def needs_fleet(self) -> bool:
        return any(c.open_loop for c in self._users) and isinstance(
            self.environment.runner, LocalRunner)

    @property
    def _users(self) -> list[Any]:
        return [c for c in self.environment.user_classes if hasattr(c, "open_loop")]

    def discard(self) -> None:
        """What was made ready and not used."""
        if self._ready is not None:
            self._ready[3].close()
            self._ready = None

    def test_start(self) -> None:
        """No user is spawned before this returns."""
        self.failed, self._interrupted = None, False
        self.starting = True
        try:
            if self.report is not None:
                self.report.join()  # two cores: it must not run into the next measurement
            if self._ready is None:
                self.prepare()
            self._begin()
        except LoadgenError as e:
            self._cannot(e)
            raise gevent.GreenletExit from None  # ends the greenlet that would spawn users
        finally:
            self.starting = False

    def test_stopping(self) -> None:
        """Users are about to be killed. Without a page, where nobody waits for a button, the load
        is first held until what was measured has ended."""
        on = self.run.on if self.run is not None else None
        if on is not None and self._options.headless and not (self._interrupted or self.conducted):
            self._hold(on)
        gevent.killall(self._watching)  # waits: one that wakes up later would begin another leg
        self._watching = []
        if self.conducted:
            self.environment.shape_class.stop()  # type: ignore[union-attr]
        if self.run is not None and self.run.on is not None:
            self.end_leg("interrupted" if self._interrupted or self.conducted else "done")

    def spawned(self) -> None:
        """All users are there: those of the leg that they make, which may have yet to begin."""
        if self.run is not None:
            if not self.conducted:
                self._follow_users(self.run)
            self.run.all_there()

    def _hold(self, on: OnLeg) -> None:
        assert self.run is not None
        on.stop_ns = now_ns()
        while self.run is not None and self.run.on is on and not self.run.awaited():
            if self._interrupted or now_ns() - on.stop_ns > HOLD_S * 1e9:
                return
            gevent.sleep(0.05)

    def test_stop(self) -> None:
        """The last user is gone: what is written now is whole."""
        run, self.run = self.run, None
        RUNS.pop(self.environment, None)
        if self.attendant is not None:
            self.attendant.close()
            self.attendant = None
        if run is None or self.folder is None:
            return
        run.close()
        self.hide()
        self.live.stop()
        self._keep_log(self.folder)
        self.report = gevent.spawn(self._write_report, self.folder)

    def expose(self, folder: RunFolder) -> None:
        """While a test runs, if that was asked for. Raises ScenarioError."""
        if self.asked.metrics_at is not None:
            self.exporter = Exporter(listen(self.asked.metrics_at), folder)
            log.info("metrics at %s", self.exporter.url)

    def hide(self) -> None:
        if self.exporter is not None:
            self.exporter.close()
            self.exporter = None

    def quitting(self) -> None:
        """Locust exits: an interrupted test ends here, the exit code is set."""
        runner = self.environment.runner
        self._interrupted = self.is_running
        if runner is not None and runner.state != STATE_STOPPED:
            runner.stop()
        if self.report is not None:
            self.report.join()
        self.discard()
        self._stop_own()
        if getattr(self.environment.parsed_options, "csv_prefix", None):
            # Locust ends without a last look at its tables, and its CSV files would lack a second
            gevent.sleep(stats.CSV_STATS_INTERVAL_SEC + 0.1)

    def _stop_own(self) -> None:
        if self._own is not None:
            self._own[0].stop()
            shutil.rmtree(self._own[1].parent, ignore_errors=True)
            self._own = None

    def quit(self) -> None:
        """After Locust's own tables, so that the verdict is what one reads last."""
        if self._says:
            print(f"\n{self._says}", end="", flush=True)

    @property
    def is_running(self) -> bool:
        """A test is."""
        return self.run is not None

    @property
    def can_restart(self) -> bool:
        return self._own is not None and self.server is self._own[0]

    # ----------------------------------------------------------------------------------- a test

    @property
    def _options(self) -> Any:
        return self.environment.parsed_options

    @property
    def conducted(self) -> bool:
        """Legs are somebody else's to begin and to end (a ramp's)."""
        return bool(getattr(self.environment.shape_class, "conducts", False))

    def _begin(self) -> None:
        _, prepared = self._next()
        assert self.server is not None
        assert self.folder is not None
        assert self.attendant is not None
        said = self.said = self.server.facts()
        folder = RunFolder.create(self.folder, facts.manifest(
            self.folder, ["locust", *sys.argv[1:]], prepared.scenario, prepared.seed,
            prepared.criteria, prepared.target, said, prepared.ratios))
        self.attendant.ask(Ask("watch", folder=str(folder.path), simulated=bool(said["simulated"])))
        self.expose(folder)
        self.run = RUNS[self.environment] = FleetRun(folder, prepared)
        self.live.begin(self.run)
        log.info("%s → %s at %s; records in %s", prepared.scenario.name, prepared.target.model,
                 prepared.target.base_url, folder.path)
        if self.conducted:
            self.environment.shape_class.conduct(self)  # type: ignore[union-attr]
        else:
            self._follow_users(self.run)  # before the first user asks
        self._watching = [gevent.spawn(self._beat), gevent.spawn(self._look)]

    def _next(self) -> tuple[options.Asked, Prepared]:
        """Takes what was made ready: a new test begins."""
        assert self._ready is not None
        self.asked, self.server, prepared, self.attendant = self._ready
        self._ready = None
        self.folder = prepare.folder_of(self.asked, self._tests)
        self._tests += 1
        self._legs, self._troubles = 0, 0
        if self._own is not None:
            self._log_from = self._own[1].stat().st_size
        return self.asked, prepared

    def _cannot(self, error: LoadgenError) -> None:
        self.discard()
        self.failed = str(error)
        self.environment.process_exit_code = code_of(error)
        log.error("%s", error)
        self.stop_test()

    def stop_test(self) -> None:
        """From a greenlet that Locust does not wait for."""
        runner = self.environment.runner
        assert runner is not None
        gevent.spawn(runner.quit if self._options.headless else runner.stop)

    def end_leg(self, ending: Ending, note: str | None = None) -> None:
        assert self.run is not None
        try:
            self.run.end(ending, note)
        except LoadgenError as e:  # the disk is full
            self.failed = self.failed or str(e)

    def _beat(self) -> None:
        while True:
            slept_ns = now_ns()
            gevent.sleep(PROBE_S)
            if self.run is not None and self.run.on is not None:
                self.run.on.pulse.beat(slept_ns, now_ns())
                self.run.settle()

    def _look(self) -> None:
        """Begins a leg when the number of users changes; ends the test when it cannot go on."""
        at = 0.0
        while (run := self.run) is not None:
            if not self.conducted:
                self._follow_users(run)
                if (why := run.failed) is not None:
                    return self._break_off("failed", why)
                if (why := self.died()) is not None:
                    return self._break_off("server_died", why)
            if time.monotonic() >= at + 1:
                at = time.monotonic()
                if run.on is not None:
                    run.on.pulse.look()
                    if self.exporter is not None:
                        self.exporter.progress(_progress(run, run.on))
                self.live.sample(run, self.environment.runner.user_count)  # type: ignore[union-attr]
            gevent.sleep(0.1)
        return None

    def _follow_users(self, run: FleetRun) -> None:
        runner = self.environment.runner
        assert runner is not None
        load, value = self._load(max(1, runner.target_user_count))
        if run.on is not None and run.on.leg.value == value:
            return
        if run.on is not None:
            self.end_leg("done")
        replicate, self._legs = self._legs, self._legs + 1
        run.begin(Leg(
            id=f"run-{value:g}-r{replicate}", axis="rate" if isinstance(load, Open) else
            "concurrency", value=value, phase="run", replicate=replicate,
            seed=run.prepared.seed * 10_000 + replicate, load=load, warmup_s=0.0, measure_s=None))

    def _load(self, users: int) -> tuple[Load, float]:
        rate = self.asked.rate_rps
        if rate is None:
            return Closed(concurrency=users), float(users)
        return Open(rate_rps=PerSecond(rate), max_inflight=users), rate

    def _break_off(self, ending: Ending, why: str) -> None:
        assert self.run is not None
        why = self.run.prepared.target.scrub(why)
        self.failed = why if ending == "failed" else f"the server died: {why}"
        log.error("%s", self.failed)
        self.end_leg(ending, why)
        self.stop_test()

    def died(self) -> str | None:
        """Why the server is dead, its state first."""
        why = self._sign_of_death()
        return None if why is None else str(health.death(why, ready=True))

    def _sign_of_death(self) -> str | None:
        """Its health is asked only after requests failed: a check during the load would be
        load."""
        assert self.server is not None
        try:
            if (why := self.server.alive()) is not None:
                return why
        except OSError:  # no file descriptor is left to look with: requests tell of that
            return None
        troubles = self.troubles
        if troubles <= self._troubles or self.attendant is None:
            self._troubles = troubles  # another leg counts from nothing
            return None
        self._troubles = troubles
        try:
            for wait_s in (0.0, 1.0):  # one bad answer may be a proxy's hiccup
                gevent.sleep(wait_s)
                answer = self.attendant.ask(Ask("health"))
                if answer.failed is None:
                    return None
        except GeneratorError:
            return None
        return self.server.alive() or answer.failed

    @property
    def troubles(self) -> int:
        """Requests of the running leg that failed as if the server were dead."""
        on = self.run.on if self.run else None
        return sum(on.outcomes[x] for x in TROUBLE) if on else 0

    # ---------------------------------------------------------------------------------- after it

    def _keep_log(self, folder: Path) -> None:
        """This test's part of the simulator's log."""
        if self._own is None or self.server is not self._own[0]:
            return
        with self._own[1].open("rb") as source, (folder / "server.log").open("wb") as copy:
            source.seek(self._log_from)
            shutil.copyfileobj(source, copy)

    def _write_report(self, folder: Path) -> None:
        """Everything that follows from the journals, by a process of its own: pandas and charts
        take seconds that this loop has not. Its exit code is the verdict's."""
        html = [] if self.asked.report else ["--no-html"]
        done = subprocess.run([sys.executable, "-m", "loadgen.cli", "report", str(folder), *html],
                              capture_output=True, text=True, check=False)
        self._says = done.stdout + done.stderr
        code = INTERRUPTED if self._interrupted else done.returncode
        self.environment.process_exit_code = INVALID if done.returncode < 0 else code


def install(environment: Environment, lifecycle: Lifecycle) -> None:
    """Hangs a lifecycle on the events of its environment."""
    events = environment.events
    events.test_start.add_listener(lambda **_: lifecycle.test_start())
    events.spawning_complete.add_listener(lambda **_: lifecycle.spawned())
    events.test_stopping.add_listener(lambda **_: lifecycle.test_stopping())
    events.test_stop.add_listener(lambda **_: lifecycle.test_stop())
    events.quitting.add_listener(lambda **_: lifecycle.quitting())
    events.quit.add_listener(lambda **_: lifecycle.quit())
