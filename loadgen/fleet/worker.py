"""A worker of a fleet: obeys its master's beats, runs its shards, and delivers their journals.
States and rules: see `messages`."""

import logging
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import gevent
from locust.env import Environment
from locust.rpc.protocol import Message as Envelope

import loadgen
from loadgen import scenario
from loadgen.errors import ScenarioError
from loadgen.fleet import options, rows
from loadgen.fleet.crew import Crew, Spares
from loadgen.hosts import identity, ledger, tallies
from loadgen.hosts.delivery import Outgoing, hash_of
from loadgen.hosts.messages import (
    LEASE_S,
    LOOK_S,
    LOOKS,
    PROTOCOL,
    RETURN_S,
    Ack,
    Beat,
    Delta,
    Hello,
    Message,
    Order,
    Plan,
    Refused,
    Report,
    State,
    Welcome,
)
from loadgen.hosts.seal import Forged, Seal, fingerprint, nonce
from loadgen.leg import Leg
from loadgen.record import Outcome
from loadgen.scenario import Scenario
from loadgen.target import Target

NAME = "loadgen"  # of Locust's custom message
INVALID = 3
TAIL_S = 1.0
EXIT_S = 3.0  # that Locust's shutdown may take without its master
REFILL_S = 2.0  # after a test: a headless one is followed by the end
TRIES = 5  # greetings without an answer
AT_ONCE = 25  # records that are shown without a pause

log = logging.getLogger("loadgen")
now_ns = time.monotonic_ns


class Worker:
    """What a worker's Locust process does besides Locust's own doings."""

    def __init__(self, environment: Environment, token: str) -> None:
        self.environment = environment
        self.state: State | None = None  # None: nobody has welcomed us
        self.failed: str | None = None
        self._seal, self._token = Seal(token, "worker"), token
        self._nonce = nonce()
        self._heard_ns = now_ns()
        self._plan: Plan | None = None
        self._crew: Crew | None = None
        self._folder: Path | None = None
        self._told: set[tuple[str, str]] = set()  # what was done of each leg
        self._hashes: dict[int, str] = {}
        self._deltas: list[Delta] = []
        self._slos: dict[str, Any] = {}
        self._cpu = (time.process_time(), now_ns())
        self._parent = os.getppid()
        self._refused = False
        self._spares = Spares()

    # ------------------------------------------------------------------------- Locust's events

    def init(self) -> None:
        options.asked(self._options)  # says at once what is wrong with them
        self.environment.process_exit_code = 0  # failed requests are the master's to judge
        runner = self.environment.runner
        assert runner is not None
        runner.register_message(NAME, self._hear)
        self._main = gevent.getcurrent()
        if self._options.processes:
            gevent.signal_handler(signal.SIGINT, self._interrupt)
        self._living = [gevent.spawn(x) for x in (self._greet, self._watch, self._tail)]

    def quitting(self) -> None:
        """Locust ends this process: its load ends, its journals stay if they were not delivered."""
        if self._crew is not None:
            self.failed = self.failed or "it was told to quit"
            self._report(0, 0)
        gevent.killall(self._living)
        self._put_down()
        self._spares.end()
        if self.state == "lost":  # nobody takes what waits to be sent, and ZeroMQ would wait
            self.environment.runner.client.socket.linger = 0  # type: ignore[union-attr]
            gevent.spawn_later(EXIT_S, self.exit)
        if self._folder is not None:
            log.warning("records that were not delivered are kept in %s", self._folder)
        if self.failed or self._refused:
            self.environment.process_exit_code = INVALID

    def exit(self) -> None:
        """After Locust's own doings; without a master its sockets may never come to an end."""
        if self.state == "lost":
            logging.shutdown()
            os._exit(INVALID)

    def _interrupt(self) -> None:
        """Ctrl-C reaches all processes of a terminal; while there is a master it decides."""
        if (now_ns() - self._heard_ns) / 1e9 > LEASE_S or os.getppid() != self._parent:
            gevent.kill(self._main, KeyboardInterrupt())

    @property
    def _options(self) -> Any:
        return self.environment.parsed_options

    # ----------------------------------------------------------------------------------- master

    def _greet(self) -> None:
        given = options.given_scenario()
        hello = Hello(
            protocol=PROTOCOL, name=identity.name(), nonce=self._nonce,
            version=loadgen.__version__, code=identity.code(), shards=self._options.shards,
            scenario=ledger.scenario_hash(scenario.load(given)) if given else None,
            host=identity.host())
        tries = 0
        while self.state is None and not self._refused:
            self._send(hello)
            gevent.sleep(1)
            if (tries := tries + 1) == TRIES and self.state is None and not self._refused:
                log.error("the master passes over this worker's messages: is its "
                          "$LOADGEN_FLEET_TOKEN another one?")

    def _send(self, message: Message) -> None:
        try:
            self.environment.runner.send_message(  # type: ignore[union-attr]
                NAME, self._seal.close(message))
        except ValueError as e:
            log.error("%s", e)  # noqa: TRY400  (a message too large: the master will miss it)
        except Exception as e:  # noqa: BLE001  (Locust's RPC errors: the master may be gone)
            log.debug("not sent: %s", e)

    def _hear(self, msg: Envelope, **_: Any) -> None:
        heard_ns = now_ns()
        try:
            message = self._seal.open(msg.data)
        except Forged as e:
            log.warning("a message was passed over: %s", e)
            return
        match message:
            case Welcome(hello=self._nonce) if self.state is None:
                self._seal.agree(self._nonce, message.nonce)
                self.state = "greeted"
                self._spares.fill(self._options.shards)
            case Refused(hello=self._nonce):
                self._refused = True
                log.error("the master refuses this worker: %s", message.why)
            case Beat():
                self._heard_ns = heard_ns
                self._obey(message)
                self._report(message.n, heard_ns)
            case Plan() if self._plan is None or self._plan.run != message.run:
                self._heard_ns = heard_ns
                self._take(message)
            case Ack(run=run) if self._plan is not None and run == self._plan.run:
                self._acked(message.shard, message.kept)

    def _report(self, beat: int, heard_ns: int) -> None:
        if self.state is None:
            return
        crew = self._crew
        delta, self._deltas = tallies.merged(self._deltas), []
        self._send(Report(
            beat=beat, heard_ns=heard_ns, said_ns=now_ns(),
            run=self._plan.run if self._plan else "", state=self.state,
            leg=crew.leg if crew else "", frames=crew.frames if crew else {},
            written={i: x.written for i, x in self._outgoing.items()}, hashes=self._hashes,
            failed=(self.failed or (crew.failed if crew else None) or "")[:4000] or None,
            delta=delta, cpu_frac=self._cpu_frac()))

    def _cpu_frac(self) -> float | None:
        cpu_s, at_ns = self._cpu
        self._cpu = time.process_time(), now_ns()
        over_s = (self._cpu[1] - at_ns) / 1e9
        return round((self._cpu[0] - cpu_s) / over_s, 4) if over_s > 0.2 else None

    # ------------------------------------------------------------------------------------- orders

    def _take(self, plan: Plan) -> None:
        """A new test: its shards are started, if this worker reads its plan as the master does."""
        self._put_down()
        self._plan, self.failed, self._hashes, self.state = plan, None, {}, "greeted"
        self._told, self._deltas = set(), []
        try:
            mix = scenario.parse(plan.scenario, "plan")
            self._check(plan, mix)
            self._slos = {c.name: mix.slo_of(c.name) for c in mix.classes}
            self._folder = Path(tempfile.mkdtemp(
                prefix=f"loadgen-{plan.first}-", dir=self._options.worker_folder))
            self._crew = Crew(plan, self._target(plan), self._folder, self._spares,
                              self._news)
        except (ScenarioError, OSError, KeyError) as e:
            self.failed = str(e)
            log.error("%s", e)  # noqa: TRY400  (the operator's affair: no traceback)

    def _check(self, plan: Plan, mix: Scenario) -> None:
        """Raises ScenarioError."""
        if ledger.digest(mix, plan.seed, plan.ratios) != plan.digest:
            raise ScenarioError("it makes another plan of the same seed and scenario: another "
                                "numpy, or a changed loadgen")
        if fingerprint(self._token, options.key_of(self._options)) != plan.key:
            raise ScenarioError("its API key is not the master's: give both the same "
                                "$LOADGEN_API_KEY")

    def _target(self, plan: Plan) -> Target:
        key = options.key_of(self._options)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return Target(plan.base_url, plan.model, headers)

    def _obey(self, beat: Beat) -> None:
        if self._plan is None or beat.run != self._plan.run:
            return
        for shard, kept in beat.kept.items():
            self._acked(shard, kept)
        order, crew = beat.order, self._crew
        if beat.delivered:
            self._forget()
        elif order.do == "close" and self.state != "closed":
            if self._first("", "close"):
                self._living.append(gevent.spawn(self._close))
        elif crew is None:
            return
        elif order.do == "leg" and order.leg is not None and self.state != "lost":
            if self._first(order.leg.id, "leg"):
                self._begin(order.leg, order)
        elif order.do in ("stop", "cancel") and self._first(crew.leg, order.do):
            crew.tell(order.do)

    def _first(self, leg: str, do: str) -> bool:
        """Orders come again and again."""
        new = (leg, do) not in self._told
        self._told.add((leg, do))
        return new

    def _begin(self, leg: Leg, order: Order) -> None:
        late_s = (now_ns() - order.t0_ns) / 1e9
        if late_s > 0:
            self.failed = f"the order to begin {leg.id} came {late_s:.2f} s late"
            return
        assert self._crew is not None
        self.state = "leg"
        self._crew.begin(leg, order.t0_ns)

    def _news(self) -> None:
        crew = self._crew
        if crew is None:
            return
        came = self.state == "greeted" and crew.is_ready
        if came or (self.state == "leg" and crew.is_over):
            self.state = "ready"
        self._report(0, 0)

    def _close(self) -> None:
        if self._crew is not None:
            self._crew.close()
            self._show()
        self._hashes = {i: hash_of(x.path, lambda: gevent.sleep(0))
                        for i, x in self._outgoing.items() if x.path.exists()}
        self.state = "closed"
        self._report(0, 0)

    def _forget(self) -> None:
        """The master has it all."""
        self._put_down()
        self._living.append(gevent.spawn_later(
            REFILL_S, self._spares.fill, self._options.shards))
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = self._plan = None
        self._hashes, self.state = {}, "greeted"  # what failed is its exit code's, too

    def _put_down(self) -> None:
        if self._crew is not None:
            self._crew.close()
            self._crew = None

    # ------------------------------------------------------------------------- lease and journals

    def _watch(self) -> None:
        """Cancels the load of a master that is gone, and ends with it."""
        looks = 0
        while True:
            gevent.sleep(LOOK_S)
            silent_s = (now_ns() - self._heard_ns) / 1e9
            looks = looks + 1 if silent_s > LEASE_S else 0
            orphan = bool(self._options.processes) and os.getppid() != self._parent
            if (looks >= LOOKS or orphan) and self._crew is not None and self.state not in (
                    "lost", "closed"):
                self._lose("the master's process ended" if orphan else
                           f"no word from the master for {silent_s:.1f} s")
            if orphan or (self.state in ("lost", "closed") and silent_s > LEASE_S + 2 * RETURN_S):
                self.failed = self.failed or "the master is gone"
                gevent.spawn(self.environment.runner.quit)  # type: ignore[union-attr]
                return

    def _lose(self, why: str) -> None:
        assert self._crew is not None
        self.failed, self.state = why, "lost"
        log.error("%s: the load is cancelled", why)
        self._crew.tell("cancel")

    @property
    def _outgoing(self) -> dict[int, Outgoing]:
        return self._crew.outgoing if self._crew is not None else {}

    def _acked(self, shard: int, kept: int) -> None:
        if shard in self._outgoing:
            out = self._outgoing[shard]
            out.ack(kept, time.monotonic())
            self._deliver(out)

    def _deliver(self, out: Outgoing) -> None:
        for piece in out.pieces(time.monotonic()):
            self._send(piece)

    def _tail(self) -> None:
        """Once a second: what was written goes to the master, and into Locust's statistics."""
        while True:
            gevent.sleep(TAIL_S)
            if self.state in ("ready", "leg"):
                self._show()
            if (now_ns() - self._heard_ns) / 1e9 < LEASE_S:
                for out in list(self._outgoing.values()):
                    self._deliver(out)

    def _show(self) -> None:
        for out in list(self._outgoing.values()):
            while records := out.fresh():
                self._deltas.append(tallies.tally(records, self._slos))
                for i, record in enumerate(records):
                    if record.outcome is not Outcome.CANCELLED:  # our doing: no request of Locust's
                        rows.show(self.environment, record, 0)
                    if i % AT_ONCE == AT_ONCE - 1:
                        gevent.sleep(0)
