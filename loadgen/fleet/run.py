"""A test of Locust's as a run folder: what users are to send, the records of what they sent, and
the legs, one for each number of users that held.

A leg's sample begins when all users are there and what they had begun until then has ended. It
ends with the due instant of the oldest request that was still undecided when the leg ended: so
every request in it was awaited, and none of them met a server that empties. (Locust kills users in
the middle of their answers. Counting those as misses would blame the server; leaving out only
them would be an average of survivors.)
"""

import bisect
import itertools
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator

import gevent
import gevent.event
import msgspec
from locust.env import Environment
from locust.exception import StopUser
from msgspec import Struct

from loadgen import metrics, openai, plan
from loadgen.errors import StoreError
from loadgen.judge import Criteria
from loadgen.leg import Ending, Leg, Window
from loadgen.outputs import Outputs
from loadgen.prompts import Ratio
from loadgen.pulse import Pulse
from loadgen.record import Outcome, Recorder, RequestRecord, Shot
from loadgen.scenario import Closed, Scenario, Slo
from loadgen.store import SCHEMA, Header, Journal, LegLine, RunFolder
from loadgen.talk import Talk
from loadgen.target import Target

SETTLE_S = 10.0  # at most so long a leg waits for what was begun before all users were there
LOOKAHEAD = 64  # bodies that are built in idle moments
RECENT_S = 30.0  # what the live page looks back on
SURPLUS_S = 0.2  # a user without a slot looks again
HIDE_S = 0.1  # a user whose answer has just ended has asked again by then

now_ns = time.monotonic_ns


class Cancelled(BaseException):
    """Thrown into a user whose request is given up; the user lives on."""


class Prepared(Struct, frozen=True):
    """What all legs of a test share: the mix, where it goes, and how long prompts are there."""

    scenario: Scenario
    target: Target
    ratios: dict[str, Ratio]
    criteria: Criteria
    seed: int
    context_tok: int | None = None  # that the server's context holds, if it says so

    def slo(self, cls: str) -> Slo:
        return self.scenario.slo_of(cls)


class Planned(Struct, frozen=True):
    """A session of the plan; `due_s` counts from the leg's start, None: when its user is free."""

    talk: Talk
    due_s: float | None = None

    @property
    def k(self) -> int:
        return self.talk.planned.k


class OnLeg:
    """The leg that runs: its plan, and what came of it so far."""

    def __init__(self, prepared: Prepared, leg: Leg, from_ns: int | None) -> None:
        self.leg, self.t0_ns = leg, now_ns()
        self.from_ns = from_ns  # None: not settled yet
        self.pulse = Pulse(self.t0_ns)
        self.pulse.begin()
        self.over = gevent.event.Event()
        self.done = self.done_good = self.sampled = self.good = 0
        self.outcomes: Counter[Outcome] = Counter()
        self.complete_ns: int | None = None  # when all users were there
        self.taken = 0  # requests that were handed out and have not landed
        self.stop_ns: int | None = None  # nothing that is due later is measured
        self.unsettled: set[int] = set()
        self.killed: list[int] = []  # due instants of what nobody knows how it would have ended
        self._prepared = prepared
        self._sessions = plan.sessions(prepared.scenario, leg)
        self._ahead: deque[Planned] = deque()
        self._filling = gevent.spawn(self._fill)

    @property
    def to_ns(self) -> int | None:
        """The end of the window, once it is known."""
        if self.leg.measure_s is None or self.from_ns is None:
            return self.stop_ns
        planned_ns = self.from_ns + round(self.leg.measure_s * 1e9)
        return planned_ns if self.stop_ns is None else min(planned_ns, self.stop_ns)

    def measures(self, due_ns: int) -> bool:
        to_ns = self.to_ns
        return self.from_ns is not None and due_ns >= self.from_ns and (
            to_ns is None or due_ns < to_ns)

    @property
    def is_full(self) -> bool:
        """A closed loop has no more slots: users are left over that Locust has yet to stop."""
        return isinstance(self.leg.load, Closed) and self.taken >= self.leg.load.concurrency

    def next(self, cls: str | None) -> Planned:
        """The plan's next request; of class `cls`, where one is asked for."""
        if not self._ahead:
            return self._build(next(self._sessions), cls)
        if self._filling.ready():
            self._filling = gevent.spawn(self._fill)
        planned = self._ahead.popleft()
        session = planned.talk.planned
        return planned if cls in (None, session.cls) else self._build(session, cls)

    def give_back(self, planned: Planned) -> None:
        """Its user was stopped before it was due: another one sends it."""
        bisect.insort(self._ahead, planned, key=lambda p: p.k)

    def wait_until(self, due_ns: int) -> bool:
        """Whose turn it is not yet holds its slot. False: the leg ended meanwhile."""
        self.taken += 1
        try:
            return not self.over.wait(max(0.0, (due_ns - now_ns()) / 1e9))
        finally:
            self.taken -= 1

    def finish(self) -> None:
        self.over.set()
        self.pulse.end()
        self._filling.kill(block=False)

    def _fill(self) -> None:
        while len(self._ahead) < LOOKAHEAD:
            gevent.sleep(0)  # one at a time: an answer may be waiting to be stamped
            self._ahead.append(self._build(next(self._sessions), None))

    def _build(self, session: plan.Session, cls: str | None) -> Planned:
        mix, seed = self._prepared.scenario, self.leg.seed
        if cls is not None and cls != session.cls:
            only = msgspec.structs.replace(mix, classes=(mix.of(cls),))
            session = plan.session(only, seed, session.k, session.due_s)
        talk = Talk(mix, self._prepared.target.model, session, seed,
                    self._prepared.ratios[session.cls])
        return Planned(talk, session.due_s if session.due_s is not None
                       else self._spread(session.k))

    def _spread(self, k: int) -> float | None:
        """A closed loop's first starts are spread over the warm-up: all at once would be a burst
        that no closed loop has later."""
        load, warmup_s = self.leg.load, self.leg.warmup_s
        if not isinstance(load, Closed) or k >= load.concurrency or warmup_s <= 0:
            return None
        return warmup_s * k / load.concurrency


Going = tuple[OnLeg, Talk]  # a user's session, and the leg of whose plan it is


class FleetRun:
    """One test: from Locust's start to its stop."""

    def __init__(self, folder: RunFolder, prepared: Prepared) -> None:
        self.folder, self.prepared = folder, prepared
        self.on: OnLeg | None = None
        self.failed: str | None = None  # the run's own failure: a disk that is full
        self.goes_on = False  # users without a leg wait for the next one
        self.flights: dict[int, tuple[OnLeg, Recorder]] = {}
        self._greenlets: dict[int, gevent.Greenlet] = {}  # who flies them
        self._begun = gevent.event.Event()
        self.recent: deque[RequestRecord] = deque()
        self.ended_tok = 0  # output tokens of ended requests, for the live throughput
        self._journal = Journal(folder.records_path(0))
        self._journal.append(Header(SCHEMA, folder.path.name, 0, now_ns(), time.time_ns()))
        self._outputs = Outputs(folder.path / "outputs-0.jsonl", prepared.scenario)
        self._legs: Journal = folder.legs_journal()
        self._seq: Iterator[int] = itertools.count()

    # ------------------------------------------------------------------------------------ legs

    def begin(self, leg: Leg, from_ns: int | None = None) -> OnLeg:
        """From now on users send this leg's plan. `from_ns`: when its sample begins; None: when
        the users have settled."""
        self._legs.append(LegLine(leg=leg))
        self.on = OnLeg(self.prepared, leg, from_ns)
        self._begun.set()
        return self.on

    def all_there(self) -> None:
        """Locust has spawned all users of this leg."""
        on = self.on
        if on is not None and on.complete_ns is None:
            on.complete_ns = now_ns()
            on.unsettled = {seq for seq, (of, _) in self.flights.items() if of is on}

    def settle(self) -> None:
        """Begins the sample once it can; to be called now and then."""
        on = self.on
        if on is None or on.from_ns is not None or on.complete_ns is None:
            return
        now = now_ns()
        if not on.unsettled or now - on.complete_ns > SETTLE_S * 1e9:
            on.from_ns = now

    def awaited(self) -> bool:
        """The leg's window is over, and all that was due in it has ended or is lost anyway."""
        on, now = self.on, now_ns()
        if on is None or on.to_ns is None or now < on.to_ns + HIDE_S * 1e9:
            return False
        return not any(on.measures(due_ns) for due_ns in self._undecided(on, now))

    def end(self, ending: Ending, note: str | None = None) -> Window:
        """Ends the leg; its window as it was. What is in flight of it goes on, outside."""
        on, now = self.on, now_ns()
        assert on is not None
        self.on = None
        self._begun.clear()
        from_ns = min(on.from_ns or now, now)
        to_ns = min(on.to_ns or now, now)
        if ending in ("done", "interrupted"):
            to_ns = min([to_ns, *on.killed, *self._undecided(on, now)])
        health = on.pulse.health(0, now, from_ns, to_ns)
        window = Window(
            leg=on.leg.id, t0_ns=on.t0_ns, from_ns=from_ns, to_ns=max(from_ns, to_ns), end_ns=now,
            ending=ending, stalls=on.pulse.stalls, lag_p99_s=health.lag_p99_s,
            cpu_frac=health.cpu_frac, records=on.done, note=note, shards=[health])
        self._legs.append(LegLine(window=window))
        on.finish()
        return window

    def cancel(self, on: OnLeg) -> None:
        """Cancels what is in flight of a leg; their users go on. Returns when all have landed."""
        for seq in [seq for seq, (of, _) in self.flights.items() if of is on]:
            gevent.get_hub().loop.run_callback(self._cancel, seq)
        while any(of is on for of, _ in self.flights.values()):
            gevent.sleep(0.01)

    def _cancel(self, seq: int) -> None:
        if seq in self.flights:  # not one that landed since, whose user is at another request
            self._greenlets[seq].throw(Cancelled)

    def _undecided(self, on: OnLeg, now: int) -> list[int]:
        """Due instants of requests in flight that may yet be good."""
        so_far = [r.end(now, Outcome.CANCELLED) for of, r in self.flights.values() if of is on]
        return [r.due_ns for r in so_far if not metrics.is_lost(r, self.prepared.slo(r.cls))]

    def close(self) -> None:
        """After the last user was killed."""
        self._journal.close()
        self._legs.close()

    # -------------------------------------------------------------------------------- requests

    def check_class(self, cls: str | None) -> None:
        """Raises StopUser if the scenario has no such class; the run cannot go on then."""
        mix = self.prepared.scenario
        names = [c.name for c in mix.classes]
        if cls is not None and cls not in names:
            self.failed = self.failed or (
                f"ask(cls={cls!r}): {mix.name} has no such class; it has {', '.join(names)}")
            raise StopUser

    def take_off(self, cls: str | None, text: str | None, max_tokens: int | None,
                 free_ns: int | None, going: Going | None = None) -> tuple[OnLeg, Recorder,
                                                                           Talk] | None:
        """The next request to send, once it is due. Open loop: at its instant in the plan; closed:
        when its user becomes free (`free_ns`; None: now). `going`: the user's session, which goes
        on as long as its leg does. None: there is no leg any more."""
        while self.on is not None or self.goes_on:
            if (on := self.on) is None:
                self._begun.wait()
                continue
            if on.is_full:
                on.over.wait(SURPLUS_S)
                free_ns = None  # the slot that it may get is another's, and free only then
                continue
            planned = None
            if going is not None and going[0] is on and text is None and (
                    cls in (None, going[1].planned.cls)):
                talk, due_ns = going[1], going[1].due_ns(free_ns or now_ns(), now_ns())
            else:
                planned = on.next(cls)
                talk, due_ns = planned.talk, _due_ns(on, planned, free_ns)
            if due_ns > now_ns():
                try:
                    if not on.wait_until(due_ns):
                        continue  # the leg ended meanwhile: its plan is void
                except BaseException:
                    if planned is not None:
                        on.give_back(planned)
                    raise
            due_ns = max(due_ns, on.t0_ns)  # a user that comes over from the leg before
            shot = self._shot(on, talk, due_ns, text, max_tokens)
            recorder = Recorder(shot, self.prepared.scenario.throttle_status,
                                shot.keeps or self._outputs.wants(shot.cls))
            self.flights[recorder.shot.seq] = on, recorder
            on.taken += 1
            self._greenlets[recorder.shot.seq] = gevent.getcurrent()
            recorder.inflight = len(self.flights)
            return on, recorder, talk
        return None

    def land(self, on: OnLeg, record: RequestRecord) -> None:
        """A request has ended: journal, counts, and what the live page looks back on."""
        recorder = self.flights[record.seq][1]
        del self.flights[record.seq], self._greenlets[record.seq]
        try:
            if self._outputs.wants(record.cls):
                record.output_ref = self._outputs.keep(record, recorder.answer())
            self._journal.append(record)
        except StoreError as e:
            self.failed = self.failed or str(e)
        good = not metrics.misses(record, self.prepared.slo(record.cls))
        on.unsettled.discard(record.seq)
        on.taken -= 1
        on.done += 1
        on.done_good += good
        on.outcomes[record.outcome] += 1
        if record.outcome is Outcome.CANCELLED and isinstance(on.leg.load, Closed) and (
                not metrics.is_lost(record, self.prepared.slo(record.cls))):
            on.killed.append(record.due_ns)  # Locust stops users: the leg is about to end
        if on.measures(record.due_ns):
            on.sampled += 1
            on.good += good
        self.ended_tok += record.output_tok or 0
        self.recent.append(record)
        while self.recent and record.end_ns - self.recent[0].end_ns > RECENT_S * 1e9:
            self.recent.popleft()

    def _shot(self, on: OnLeg, talk: Talk, due_ns: int, text: str | None,
              max_tokens: int | None) -> Shot:
        """The talk's next turn; or, instead of all of it, a `text` of the user's own, with the
        sampling of its class."""
        planned, what, tokens = talk.planned, talk.what, talk.what.output_tok
        body, want_tok = b"", None
        if text is None:
            body, want_tok = talk.body(), talk.want_prompt_tok
        else:
            mix, tokens = self.prepared.scenario, max_tokens or tokens
            body = openai.body(mix.endpoint, self.prepared.target.model, text, tokens,
                               mix.of(planned.cls))
        return Shot(leg=on.leg.id, shard=0, seq=next(self._seq), session=planned.k, turn=talk.turn,
                    cls=planned.cls, due_ns=due_ns, body=body, want_prompt_tok=want_tok,
                    max_tokens=tokens, abandon_after_s=what.abandon_after_s,
                    keeps=talk.keeps and text is None)


def _due_ns(on: OnLeg, planned: Planned, free_ns: int | None) -> int:
    """When a session is due: at its instant, or when its user is free."""
    if planned.due_s is not None:
        return on.t0_ns + round(planned.due_s * 1e9)
    return now_ns() if free_ns is None else free_ns


RUNS: "weakref.WeakKeyDictionary[Environment, FleetRun]" = weakref.WeakKeyDictionary()


def run_of(environment: Environment) -> FleetRun | None:
    """The test that runs in this Locust process."""
    return RUNS.get(environment)
