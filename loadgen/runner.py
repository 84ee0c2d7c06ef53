"""One session with a server: start it, see that it answers, calibrate, run legs, keep everything,
stop it. The composition of all parts below the command line."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from loadgen import answers, calibrate, exporter, facts, health, resume, traces, unit
from loadgen.errors import ScenarioError, ServerError
from loadgen.judge import Criteria, ServerSigns
from loadgen.leg import Leg, Window
from loadgen.prompts import Ratio
from loadgen.ramp import SweepPlan
from loadgen.record import TROUBLE, Outcome, RequestRecord
from loadgen.resume import Clock, NextLeg, Replay, Stopped
from loadgen.scenario import Scenario, Trace, TraceFile
from loadgen.store import SCHEMA, Header, Journal, LegLine, RunFolder
from loadgen.supervise import Progress, Shards
from loadgen.sweep import Executor, SweepResult, run_one, sweep
from loadgen.target import Target
from loadgen.telemetry import gpu
from loadgen.telemetry import server as watch
from loadgen.telemetry.signs import series, signs_of
from loadgen.view import View
from loadgen.virtual import VirtualExecutor
from loadgen.watch import Watcher
from servers import death
from servers.base import Server
from servers.sim.launch import VirtualSim

QUICK_S = 60.0  # a server that may take longer to start is seen to be waited for
SERVER_LOG = "server.log"  # in the run folder
BACK_OFF_S = (2.0, 10.0)  # before a server that did not come up is tried again
LOOK_S, ENDS_LOOKS = 0.25, 28  # seven seconds, for a server that may be about to end


class Session(Struct, frozen=True):
    """What a run needs to know. `model` and `headers` go over the server's own where given."""

    scenario: Scenario
    server: Server
    out: Path
    criteria: Criteria
    seed: int
    model: str | None
    headers: dict[str, str]
    processes: int
    command: list[str]  # the words after `loadgen`
    patience_s: float | None = None  # the server's own, if None
    gpus: bool | None = None  # watch this host's; None: if the server is here
    metrics_at: str | None = None  # [HOST:]PORT of a Prometheus endpoint; None: none


def run_sweep(session: Session, plan: SweepPlan, view: View,
              unit_step: bool = False, before: Stopped | None = None) -> SweepResult:
    """Drives the search to its stop; everything is in the run folder when this returns. `before`:
    what of it was done already."""
    if before is not None:
        answers.complete(before.folder)  # it may have been killed before it had checked all
    if before is not None and not unit_step and (
            ended := _nothing_left(session, plan, before)) is not None:
        view.say(f"{before.folder.path}: the search was over already")
        return ended
    if isinstance(session.server, VirtualSim):
        async def stepped(executor: _Kept) -> SweepResult:
            found = await sweep(plan, session.scenario, executor, view.judged,
                                lambda: executor.now_s)
            if not unit_step:
                return found
            return await unit.search(plan, found, session.scenario, executor, view.judged)
        return _virtual(session, session.server, view, stepped, plan, before)

    async def body(executor: "_Executor") -> SweepResult:
        clock = Clock(executor.folder.legs_journal(), before)
        who = Replay(before, executor) if before is not None else executor
        found = await sweep(plan, session.scenario, who, view.judged, clock)
        if not unit_step or found.stop in ("interrupted", "failed"):
            return found
        return await unit.search(plan, found, session.scenario, who, view.judged)
    return _drive(_session(session, view, body, plan, before))


def _nothing_left(session: Session, plan: SweepPlan, before: Stopped) -> SweepResult | None:
    """The search's result, if it asks for no leg beyond those that stand."""
    try:
        return asyncio.run(sweep(plan, session.scenario, Replay(before), lambda *_: None,
                                 Clock(None, before)))
    except NextLeg:
        return None


def run_leg(session: Session, leg: Leg, view: View) -> SweepResult:
    """One leg, and its verdicts."""
    async def run(fit: Leg, executor: Executor) -> SweepResult:
        window, judgement = await run_one(fit, session.scenario, session.criteria, executor)
        view.judged(fit, judgement)
        says = "interrupted" if window.ending == "interrupted" else ""
        return SweepResult([judgement], window.ending, window.note or says)

    async def body(executor: "_Executor") -> SweepResult:
        asks = isinstance(leg.load, Trace) and leg.load.asked
        most = await executor.context_tok() if asks else None
        return await run(_fitted(session, leg, most, view), executor)
    if isinstance(session.server, VirtualSim):
        fit = _fitted(session, leg, session.server.config.max_model_len, view)
        return _virtual(session, session.server, view, lambda executor: run(fit, executor))
    return _drive(_session(session, view, body))


def run_legs(session: Session, legs: Sequence[Leg], view: View) -> SweepResult:
    """One leg after the other, and their verdicts; ends with one that does not end well."""
    async def body(executor: "_Executor") -> SweepResult:
        found = []
        for leg in legs:
            window, judgement = await run_one(leg, session.scenario, session.criteria, executor)
            view.judged(leg, judgement)
            found.append(judgement)
            if window.ending != "done":
                break
        says = "interrupted" if window.ending == "interrupted" else ""
        return SweepResult(found, window.ending, window.note or says)
    return _drive(_session(session, view, body))


def _fitted(session: Session, leg: Leg, max_model_len: int | None, view: View) -> Leg:
    """The leg with a trace that the server's context holds; what it does not hold is said. A
    server that does not tell its context refuses what is too long, which its records say."""
    if max_model_len is None or not isinstance(leg.load, Trace) or not leg.load.asked:
        return leg
    own = session.scenario.load
    too_long = own.too_long if isinstance(own, TraceFile) else None
    load, n = traces.fitted(leg.load, max_model_len, too_long)
    if n:
        view.say(f"{n} of the trace's {len(leg.load.asked)} requests are longer than the server's "
                 f"context of {max_model_len} tokens: "
                 f"{'their prompts are cut' if too_long == 'cut' else 'they are left out'}")
    value = leg.value * len(load.due_s) / len(leg.load.due_s)
    return msgspec.structs.replace(leg, load=load, value=float(f"{value:.3g}"))


def _virtual(session: Session, server: VirtualSim, view: View,
             body: "Callable[[_Kept], Awaitable[SweepResult]]", plan: SweepPlan | None = None,
             before: Stopped | None = None) -> SweepResult:
    """The same on the simulator's engine in virtual time; the same run folder."""
    folder = _folder(session, server.target, {}, plan, before)
    held = folder.held()
    if before is not None:
        _goes_on(before, server.target, server.facts(), 0, 0)
    if answers.has_checks(session.scenario):
        view.say("virtual time makes no answers: validators are not run")
    view.say(f"{session.scenario.name} → {server.target.model}, simulated in virtual time; records "
             f"in {folder.path}")
    executor = _Kept(folder, VirtualExecutor(
        session.scenario, server.config, server.utilization, faults=server.faults), before)

    async def doing() -> SweepResult:
        with view:
            return await body(executor)
    try:
        return asyncio.run(doing())
    finally:
        os.close(held)


def _folder(session: Session, target: Target, ratios: dict[str, Ratio],
            plan: SweepPlan | None, before: Stopped | None) -> RunFolder:
    """The run's folder: a new one, but for a search that goes on."""
    if before is not None:
        return before.folder
    manifest = facts.manifest(
        session.out, ["loadgen", *session.command], session.scenario, session.seed,
        session.criteria, target, session.server.facts(), ratios, session.processes)
    return RunFolder.create(session.out, msgspec.structs.replace(
        manifest, plan=None if plan is None else msgspec.to_builtins(plan)))


def _goes_on(before: Stopped, target: Target, server: dict[str, Any], now_ns: int,
             wall_ns: int) -> None:
    """Notes that a search goes on. Raises ScenarioError if it would on another server."""
    was = before.manifest
    differ = resume.unlike({"model": was.model, **was.server}, {"model": target.model, **server})
    if was.server.get("kind") == "remote" and was.base_url != target.base_url:
        differ.append(f"base URL: {was.base_url} before, {target.base_url} now")
    if differ:
        raise ScenarioError(f"{before.folder.path}: this is not the server that the search began "
                            f"with ({'; '.join(differ)}); begin a new one")
    journal = before.folder.legs_journal()
    journal.append(LegLine(resumed=resume.note(before, now_ns, wall_ns)))
    journal.close()


class _Kept:
    """A virtual executor whose legs are written down. Of a search that goes on the engine is
    stepped through the legs that stand once more: it then is where it was."""

    def __init__(self, folder: RunFolder, executor: VirtualExecutor,
                 before: Stopped | None = None) -> None:
        self._executor, self._folder = executor, folder
        self._again = list(before.done) if before is not None else []
        self._legs, self._telemetry = folder.legs_journal(), folder.telemetry("server")
        self._records = Journal(folder.records_path(0))
        self._records.append(Header(SCHEMA, folder.path.name, 0, 0, 0))

    @property
    def now_s(self) -> float:
        return self._executor.now_s

    async def restart(self, why: str) -> None:
        await self._executor.restart(why)

    async def run_leg(self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]:
        if self._again:
            window, records, signs = await self._executor.run_leg(leg)
            kept, then = self._again.pop(0)
            if (kept, then) != (leg, window):
                raise ScenarioError(resume.differs(self._folder.path, leg, kept))
            return window, records, signs
        self._legs.append(LegLine(leg=leg))
        window, records, signs = await self._executor.run_leg(leg)
        for record in records:
            self._records.append(record)
        for row in self._executor.rows:
            self._telemetry.append(row)
        self._legs.append(LegLine(window=window))
        return window, records, signs


def _drive(session: Coroutine[Any, Any, SweepResult]) -> SweepResult:
    try:
        return asyncio.run(session)
    except asyncio.CancelledError:  # Ctrl-C before the first leg
        raise KeyboardInterrupt from None


async def _session(session: Session, view: View,
                   body: "Callable[[_Executor], Awaitable[SweepResult]]",
                   plan: SweepPlan | None = None, before: Stopped | None = None) -> SweepResult:
    interrupt = _Interrupt()
    if before is None:
        RunFolder.check_free(session.out)
    async with AsyncExitStack() as stack:
        sock = (None if session.metrics_at is None  # taken at once: it may be in use
                else stack.enter_context(exporter.listen(session.metrics_at)))
        watcher = Watcher(view.say)
        stack.push_async_callback(watcher.close)
        launched = session.server.facts()["kind"] != "remote"
        if launched:
            stack.callback(watcher.stopped)
        stack.push_async_callback(asyncio.to_thread, session.server.stop)
        if launched and _watches_gpus(session, here=True):
            watcher.begin_gpus()  # before it loads its model
        target = await _ready(session, view, watcher)
        if not launched and _watches_gpus(session, gpu.is_here(target.base_url)):
            watcher.begin_gpus()
        ratios = (msgspec.convert(before.manifest.ratios, dict[str, Ratio]) if before is not None
                  else await calibrate.ratios(target, session.scenario, session.seed))
        folder = _folder(session, target, ratios, plan, before)
        stack.callback(os.close, folder.held())
        if before is not None:
            _goes_on(before, target, session.server.facts(), time.monotonic_ns(), time.time_ns())
        view.say(f"{session.scenario.name} → {target.model} at {target.base_url}; records in "
                 f"{folder.path}")
        if sock is not None:
            view.listener = stack.enter_context(closing(exporter.Exporter(sock, folder)))
            view.say(f"metrics at {view.listener.url}")
        shards = await stack.enter_async_context(Shards(
            folder, folder.path.name, session.scenario, target, ratios, session.processes))
        watcher.opened(folder)
        watcher.begin_server(target, bool(session.server.facts().get("simulated")))
        executor = _Executor(session, target, folder, shards, view, watcher, ratios)
        interrupt.reaches(executor.interrupt)
        with view:
            return await body(executor)


def _watches_gpus(session: Session, here: bool) -> bool:
    """`here`: the server runs on this host. A simulated one has simulated GPUs."""
    if session.server.facts().get("simulated"):
        return False
    return here if session.gpus is None else session.gpus


class _Interrupt:
    """Ctrl-C and SIGTERM: before the legs they end the session, then they are the shards' (once:
    stop arrivals and drain; twice: now)."""

    def __init__(self) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._act: Callable[[], object] = task.cancel
        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, self._pass_on)

    def _pass_on(self) -> None:
        self._act()

    def reaches(self, act: Callable[[], object]) -> None:
        self._act = act


class _Executor:
    """Runs legs on this host's shards; watches the server meanwhile."""

    def __init__(self, session: Session, target: Target, folder: RunFolder, shards: Shards,
                 view: View, watcher: Watcher, ratios: dict[str, Ratio]) -> None:
        self._session, self._target, self.folder = session, target, folder
        self._ratios = ratios
        self._shards, self._view = shards, view
        self._watcher = watcher
        self._offsets = {x: x.stat().st_size for x in folder.path.glob("records-*.jsonl")}
        self._troubles = 0
        self._looks = 0  # that a leg may still wait for an end that an aborted answer announces
        self._dying: str | None = None  # the sign of its death, before that is over …
        self._hung: str | None = None  # … or of a hang, in full
        self._restarting: asyncio.Task[Any] | None = None
        self._progress: Progress | None = None

    async def run_leg(self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]:
        watcher = self._watcher
        watcher.forget_old()
        self._troubles, self._progress, self._dying, self._hung = 0, None, None, None
        self._looks = ENDS_LOOKS
        await watcher.cool_down()
        window = await self._shards.run(leg, self._died, self._show, lambda: watcher.spoiled)
        if window.ending == "server_died":
            log = self._session.out / SERVER_LOG
            note = window.note or ""
            before = death.says(log, note, watcher.log_from)
            self._view.say(self._target.scrub(
                f"the server died at {leg.value:g}: {note}{before}"))
        await watcher.sample()
        records = [r for r in self.folder.records(self._offsets) if r.leg == leg.id]
        await asyncio.to_thread(answers.check, self.folder, self._session.scenario, self._ratios,
                                [leg], records)
        return window, records, signs_of(window, series(watcher.rows, "server"))

    async def context_tok(self) -> int | None:
        return await calibrate.context_tok(self._target)

    async def restart(self, why: str) -> None:
        self._view.say(f"restarting the server: {why}")
        self._restarting = asyncio.current_task()
        try:
            for again_s in (*BACK_OFF_S, None):
                await asyncio.to_thread(self._session.server.stop)
                try:
                    await _ready(self._session, self._view, self._watcher)
                except ServerError as e:
                    if again_s is None:
                        raise
                    self._view.say(f"it did not come up; again in {again_s:g} s: "
                                   f"{str(e).splitlines()[0]}")
                    await asyncio.sleep(again_s)
                else:
                    return
        finally:
            self._restarting = None

    def interrupt(self) -> None:
        """Ctrl-C: the shards' affair, but while a server is waited for there is no load to end."""
        if self._restarting is not None:
            self._restarting.cancel()
        else:
            self._shards.interrupt()

    def _show(self, progress: Progress) -> None:
        self._progress = progress
        self._watcher.look(progress.inflight)
        self._view.progress(progress)

    async def _died(self) -> str | None:
        """Why the server is dead. At the first sign the load ends; asked again after that, with
        its state: its process had the time to end, too, and the log to say why."""
        server = self._session.server
        if self._dying is None:
            self._dying = server.alive() or await self._sign_of_death()
            return self._dying
        if self._hung is not None:
            return self._hung
        ours = server.facts()["kind"] != "remote"
        for _ in range(100 if ours else 0):  # vLLM's watchdog looks each 5 s; only the end of all
            if server.alive() is not None:  # is the death
                break
            await asyncio.sleep(0.1)
        return str(self._watcher.name(server.alive() or self._with_cause(self._dying)))

    def _with_cause(self, dying: str) -> str:
        """And the log's cause, of a server of ours whose process does not end: a vLLM that lost one
        of several engines listens no more, and waits for ever for its own background tasks."""
        log = self._session.out / SERVER_LOG
        cause = death.named(log, self._watcher.log_from) if "log: " not in dying else None
        return f"{dying}; log: {cause}" if cause else dying

    async def _sign_of_death(self) -> str | None:
        """Of a server whose process runs, or that is not ours. Its health is asked only after
        requests failed, or where nothing comes any more: a check during the load would be load."""
        if (line := self._watcher.oom_line) is not None:
            return f"its process runs on; log: {death.plain(line)}"
        progress = self._progress
        if progress is not None and health.suspicious(silence := health.Silence(
                progress.streams, progress.inflight - progress.streams, progress.silent_s,
                progress.usual_s)):
            self._hung = str(self._watcher.dead(
                health.hung(silence, await watch.answers(self._target))))
            return self._hung
        seen = progress.outcomes if progress else {}
        troubles = sum(seen.get(outcome, 0) for outcome in TROUBLE)
        if troubles == self._troubles:
            return None
        self._troubles = troubles
        why = await watch.is_healthy(self._target)
        if self._session.server.facts()["kind"] != "remote":
            return why or (await self._ends() if seen.get(Outcome.ABORTED) else None)
        if why is not None:
            await asyncio.sleep(1)  # one bad answer may be a proxy's hiccup
            why = await watch.is_healthy(self._target)
        return why

    async def _ends(self) -> str | None:
        """Whether a server that aborted answers by itself is about to end: a vLLM that lost one of
        several engines says that it is well until it looks after them, each 5 s. Once in a leg."""
        looks, self._looks = self._looks, 0
        for _ in range(looks):
            await asyncio.sleep(LOOK_S)
            if (why := self._session.server.alive() or await watch.is_healthy(self._target)):
                return why
        return None


async def _ready(session: Session, view: View, watcher: Watcher) -> Target:
    """Starts the server. The target with the session's own model and headers, once it has
    streamed an answer."""
    server, log = session.server, session.out / SERVER_LOG
    since = log.stat().st_size if log.exists() else 0
    target = server.start()
    ours = server.facts()["kind"] != "remote"
    watcher.started(getattr(server, "pid", None), log, since, forgets=ours)

    def alive() -> str | None:
        why = server.alive()
        return None if why is None else str(watcher.name(why))
    target = msgspec.structs.replace(target, headers={**target.headers, **session.headers})
    model = session.model or target.model or await calibrate.the_model(target)
    target = msgspec.structs.replace(target, model=model)
    patience_s = server.patience_s if session.patience_s is None else session.patience_s
    try:
        with (view.waiting(patience_s, lambda: death.last_line(log, since)) if patience_s > QUICK_S
              else nullcontext()):
            await calibrate.wait_ready(target, session.scenario, alive, patience_s)
    except ServerError as e:
        raise ServerError(target.scrub(f"{e}{death.says(log, str(e), since)}")) from e
    watcher.ready()
    return target
