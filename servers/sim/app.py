"""The HTTP shell: one task steps the engine on a monotonic schedule, handlers wait for tokens."""

import asyncio
import contextlib
import os
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from aiohttp import web

from servers.sim import errors, exposition, faults, metrics, visits, webapp
from servers.sim.admin import Admin
from servers.sim.desk import MAX_BODY_BYTES, Desk
from servers.sim.doors import Doors, json_bytes, uvicorn_headers
from servers.sim.engine import Engine, Step
from servers.sim.front import Front, Turn
from servers.sim.gate import GatedRunner, http_log
from servers.sim.log import log, log_death, log_request_oom
from servers.sim.scripts import Habits

EXIT_AFTER_DEATH_S = 3.5  # vLLM's watchdog: port closed after 3.3 s, exit after 3.8 s, ...
EXIT_AFTER_FAILED_S = 0.2  # ... or at once when a new request finds the engine dead
HANG_NOTICE_S = 60.0
HANG_DEATH_S = float(os.environ.get("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "300"))
KEEP_ALIVE_S = 5.0  # uvicorn's: idle connections are closed, which clients must survive


class Server:
    """A vLLM API server over a simulated engine. `models` are the names it answers to; `speed` 2
    makes simulated time run twice as fast as the clock. `stopped` is set when it wants to exit."""

    def __init__(self, engine: Engine, models: list[str], *, utilization: float = 0.92,
                 api_key: str | None = None, faults: Sequence[faults.Fault] = (),
                 speed: float = 1.0, request_log: Path | None = None,
                 queue_limit: int | None = None, habits: Habits | None = None) -> None:
        self.engine = engine
        self.pacing = metrics.Pacing()
        self.tally = metrics.Tally(engine.config.max_model_len)
        self.front = Front(engine.config.machine.constants)
        self.stopped = asyncio.Event()
        self.models, self.speed, self.queue_limit = models, speed, queue_limit
        self.faults = _state(faults, engine.config.seed)
        self._doors = Doors(self.faults, api_key, time.monotonic)
        self._admin = Admin(self.faults, self._gpus)
        self._desk = Desk(self, habits or Habits(), request_log)
        self._utilization = utilization
        self._untold: deque[Step] = deque()  # steps that have no turn of the front end yet
        self._alarm: asyncio.TimerHandle | None = None  # … and for when that begins
        self._wake = asyncio.Event()
        self._dead = False
        self._started = int(time.time())

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._doors.middleware])
        app.on_response_prepare.append(uvicorn_headers)
        app.cleanup_ctx.append(self._with_engine)
        app.add_routes([
            web.post("/v1/chat/completions", self._desk.chat),
            web.post("/v1/completions", self._desk.complete),
            web.post("/tokenize", self._desk.tokenize),
            web.get("/health", self._health), web.get("/v1/models", self._list_models),
            web.get("/metrics", self._metrics), *self._admin.routes()])
        if self.engine.config.backend == "vllm":
            app.add_routes([
                web.post("/detokenize", self._desk.detokenize), web.get("/ping", self._health),
                web.get("/load", self._load), web.get("/version", self._version)])
        return app

    def runner(self) -> web.AppRunner:
        return GatedRunner(self.app(), handler_cancellation=True, access_log=None,
                           keepalive_timeout=KEEP_ALIVE_S, shutdown_timeout=1.0,
                           logger=http_log())

    def abort_all(self) -> None:
        """SIGTERM: what is in flight ends with finish_reason "abort"; the web app just ends."""
        self._dead = True
        for stream in self._desk.streams():
            if self.engine.config.backend == "transformers":
                stream.cut()
            else:
                stream.finish("abort")

    # ------------------------------------------------------------------------------- the engine

    async def _with_engine(self, _app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _run(self) -> None:
        """Steps the engine. Deadlines are absolute: a late step delays no later one, and lateness
        is counted, never hidden. Where the front end lags, the engine runs ahead of it."""
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        while True:
            step = self.engine.step(now_s * self.speed)
            if step is None:
                self._wake.clear()
                await self._wake.wait()
                now_s = loop.time()
                continue
            self._note_moves(step, now_s)
            if kind := self.faults.due(self.engine):
                await self._fall(kind)
                return
            began_s, now_s = now_s, now_s + step.duration_s / self.speed
            await asyncio.sleep(max(0.0, now_s - loop.time()))
            self.pacing.ran(began_s, began_s + (now_s - began_s) * step.busy_frac)
            self._untold.append(step)
            self._turn(self.front.give_out(now_s * self.speed, step.events, step.fresh))

    def _turn(self, known: Sequence[Turn]) -> None:
        """Turns of the front end that are known; and an alarm for the one that is not."""
        loop = asyncio.get_running_loop()
        for turn in known:
            due_s = turn.written_s / self.speed
            steps = [self._untold.popleft() for _ in range(turn.steps)]
            loop.call_at(due_s, self._deliver, steps, due_s)
        if self.front.next_s is not None and self._alarm is None:
            self._alarm = loop.call_at(self.front.next_s / self.speed, self._begin_turn)

    def _begin_turn(self) -> None:
        self._alarm = None
        now_s = asyncio.get_running_loop().time()
        self._turn(self.front.begin(now_s * self.speed))

    def _deliver(self, steps: Sequence[Step], due_s: float) -> None:
        """Tokens that a stream had in several steps are told in one event."""
        if self._dead:
            return
        loop = asyncio.get_running_loop()
        later: Counter[int] = Counter()
        for step in steps[1:]:
            later.update(step.tokens)
        for i, step in enumerate(steps):
            if i:
                later.subtract(step.tokens)
            self._tell(step, loop.time(), later)
        self.pacing.delivered(due_s, loop.time())

    def _tell(self, step: Step, woken_s: float, later: Mapping[int, int]) -> None:
        """`later`: whose next tokens are told right after."""
        flying = self._desk.flying
        for request_id in step.tokens:
            if found := flying.get(request_id):
                found[0].token(found[1], woken_s, step.finished.get(request_id),
                               not later or not later[request_id])
        for request_id, words in step.failed.items():
            if found := flying.get(request_id):
                log_request_oom(len(flying), words)
                found[0].fail(webapp.out_of_memory(words))
        self.tally.stepped()
        self._desk.stepped()

    def _note_moves(self, step: Step, now_s: float) -> None:
        """Which requests the engine has begun to compute, or thrown out, in the step it plans."""
        for request_id, cached_tok in step.admitted:
            found = self._desk.flying.get(request_id)
            if found and found[1].admitted_s is None:
                found[1].admitted_s, found[1].cached_tok = now_s, cached_tok
        for request_id in step.preempted:
            if found := self._desk.flying.get(request_id):
                found[1].preemptions += 1

    async def _fall(self, kind: str) -> None:
        """The engine dies, as vLLM's does: streams are told, /health says so, the process goes."""
        if kind == "hang":
            await asyncio.sleep(min(HANG_NOTICE_S, HANG_DEATH_S))
            log("EngineCore", "INFO", "shm_broadcast.py:871", "No available shared memory "
                "broadcast block found in 60 seconds.")
            await asyncio.sleep(max(0.0, HANG_DEATH_S - HANG_NOTICE_S))
        self._dead = True
        log_death(kind, self.engine.config.machine.gpu.memory_gib)
        for stream in self._desk.streams():
            stream.fail(errors.engine_dead())
        asyncio.get_running_loop().call_later(EXIT_AFTER_DEATH_S, self.stopped.set)

    def refuse_if_dead(self) -> None:
        if self._dead:
            asyncio.get_running_loop().call_later(EXIT_AFTER_FAILED_S, self.stopped.set)
            raise errors.engine_dead()

    def wake(self) -> None:
        self._wake.set()

    # ---------------------------------------------------------------------------- other answers

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=503 if self._dead else 200)

    async def _load(self, _request: web.Request) -> web.Response:
        """Always 0, as from a vLLM that was not told to track it."""
        return _json({"server_load": 0})

    async def _version(self, _request: web.Request) -> web.Response:
        return _json({"version": "0.32.0"})

    async def _list_models(self, _request: web.Request) -> web.Response:
        limit = self.engine.config.max_model_len
        return _json({"object": "list", "data": [
            {"id": name, "object": "model", "created": self._started,
             "owned_by": self.engine.config.backend,
             "root": self.engine.config.machine.model.name, "parent": None,
             "max_model_len": limit, "permission": [_permission(self._started)]}
            for name in self.models]})

    async def _metrics(self, _request: web.Request) -> web.Response:
        if self.engine.config.backend == "transformers":  # has no /metrics: the simulator's own
            body = exposition.of_simulator(self.engine, self.pacing)
        else:
            body = exposition.render(self.engine, self.models[0], self.tally, self.pacing,
                                     self._utilization)
            body = visits.of_process() + body + self._doors.visits.of_http()
        return web.Response(body=body.encode(), headers={
            "content-type": "text/plain; version=1.0.0; charset=utf-8"})

    def _gpus(self) -> object:
        busy = self.pacing.busy_frac(asyncio.get_running_loop().time())
        return metrics.gpus(self.engine, self._utilization, busy)


def _state(asked: Sequence[faults.Fault], seed: int) -> faults.Faults:
    return faults.Faults(asked, random.Random(seed), time.monotonic)


def _permission(created: int) -> dict[str, object]:
    return {"id": f"modelperm-{created:016x}", "object": "model_permission", "created": created,
            "allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True,
            "allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False,
            "organization": "*", "group": None, "is_blocking": False}


def _json(value: object) -> web.Response:
    return json_bytes(errors.dumps(value))
