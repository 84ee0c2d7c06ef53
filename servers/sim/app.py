"""The HTTP shell: one task steps the engine on a monotonic schedule, handlers wait for tokens."""

import asyncio
import contextlib
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from aiohttp import web

from servers.sim import faults, metrics, text, wire
from servers.sim.engine import Engine, Request, Step
from servers.sim.front import Front
from servers.sim.log import log, log_death
from servers.sim.stream import Stream

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

EXIT_AFTER_DEATH_S = 3.5  # vLLM's watchdog: port closed after 3.3 s, exit after 3.8 s, ...
EXIT_AFTER_FAILED_S = 0.2  # ... or at once when a new request finds the engine dead
HANG_NOTICE_S = 60.0
HANG_DEATH_S = 300.0  # VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
KEEP_ALIVE_S = 5.0  # uvicorn's: idle connections are closed, which clients must survive
MAX_BODY_BYTES = 64 * 2**20


class Server:
    """A vLLM API server over a simulated engine. `models` are the names it answers to; `speed` 2
    makes simulated time run twice as fast as the clock. `stopped` is set when it wants to exit."""

    def __init__(self, engine: Engine, models: list[str], *, utilization: float = 0.92,
                 api_key: str | None = None, fault: faults.Fault | None = None,
                 speed: float = 1.0, request_log: Path | None = None) -> None:
        self.engine = engine
        self.pacing = metrics.Pacing()
        self.latencies = metrics.Latencies()
        self.stopped = asyncio.Event()
        self._front = Front(engine.config.machine.constants)
        self._models, self._utilization, self._api_key = models, utilization, api_key
        self._fault, self._speed = fault, speed
        self._request_log = request_log.open("a", buffering=1) if request_log else None
        self._rng = random.Random(engine.config.seed)  # ids and words
        self._streams: dict[int, Stream] = {}
        self._count = 0
        self._wake = asyncio.Event()
        self._dead = False
        self._started = int(time.time())

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._dialect])
        app.on_response_prepare.append(_uvicorn_headers)
        app.cleanup_ctx.append(self._with_engine)
        app.add_routes([
            web.post("/v1/chat/completions", self._chat),
            web.post("/v1/completions", self._complete),
            web.post("/tokenize", self._tokenize),
            web.get("/health", self._health),
            web.get("/version", self._version),
            web.get("/v1/models", self._list_models),
            web.get("/metrics", self._metrics),
            web.get("/sim/gpu", self._gpu),
        ])
        return app

    def runner(self) -> web.AppRunner:
        return web.AppRunner(self.app(), handler_cancellation=True, access_log=None,
                             keepalive_timeout=KEEP_ALIVE_S, shutdown_timeout=1.0)

    def abort_all(self) -> None:
        """What is in flight ends with finish_reason "abort": SIGTERM."""
        self._dead = True
        for stream in list(self._streams.values()):
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
            step = self.engine.step(now_s * self._speed)
            if step is None:
                self._wake.clear()
                await self._wake.wait()
                now_s = loop.time()
                continue
            if self._fault and self.engine.running >= self._fault.at:
                await self._fall(self._fault.kind)
                return
            began_s, now_s = now_s, now_s + step.duration_s / self._speed
            await asyncio.sleep(max(0.0, now_s - loop.time()))
            self.pacing.ran(began_s, now_s)
            due_s = self._front.give_out(now_s * self._speed, step.events) / self._speed
            loop.call_at(due_s, self._deliver, step, due_s)

    def _deliver(self, step: Step, due_s: float) -> None:
        if self._dead:
            return
        woken_s = asyncio.get_running_loop().time()
        self.pacing.delivered(due_s, woken_s)
        for request_id in step.tokens:
            if stream := self._streams.get(request_id):
                stream.token(woken_s, step.finished.get(request_id), self.latencies)

    async def _fall(self, kind: str) -> None:
        """The engine dies, as vLLM's does: streams are told, /health says so, the process goes."""
        if kind == "hang":
            await asyncio.sleep(HANG_NOTICE_S)
            log("EngineCore", "INFO", "shm_broadcast.py:871", "No available shared memory "
                "broadcast block found in 60 seconds.")
            await asyncio.sleep(HANG_DEATH_S - HANG_NOTICE_S)
        self._dead = True
        log_death(kind, self.engine.config.machine.gpu.memory_gib)
        for stream in list(self._streams.values()):
            stream.fail(wire.engine_dead())
        asyncio.get_running_loop().call_later(EXIT_AFTER_DEATH_S, self.stopped.set)

    def _refuse_if_dead(self) -> None:
        if self._dead:
            asyncio.get_running_loop().call_later(EXIT_AFTER_FAILED_S, self.stopped.set)
            raise wire.engine_dead()

    # --------------------------------------------------------------------------------- requests

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=True)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=False)

    async def _generate(self, request: web.Request, chat: bool) -> web.StreamResponse:
        due_s, received_ns = asyncio.get_running_loop().time(), time.monotonic_ns()
        self._refuse_if_dead()
        fault = faults.parse_request_fault(request.headers.get("x-sim-fault"))
        if refused := faults.refusal(fault):
            raise refused
        if fault and fault.kind == "wrong-type":
            return _json({"simulated": True})
        ask = wire.parse_ask(wire.parse_body(await request.read(), request.content_type), chat,
                             self._models, self.engine.config.max_model_len)
        name = request.headers.get("x-request-id") or f"{self._rng.getrandbits(64):016x}"
        response = web.StreamResponse()
        if ask.stream:
            response.headers["content-type"] = "text/event-stream; charset=utf-8"
            await response.prepare(request)  # vLLM's headers do not wait for the first token
        if request.transport is None or (fault and fault.kind == "empty"):
            return response
        stream = Stream(wire.Answer(ask, name), due_s, request.transport, fault,
                        self._rng.getrandbits(32), self.engine.config.stream_interval)
        try:
            result = await self._through_engine(stream, fault)
        finally:
            self._note(await request.read(), received_ns, stream)
        if isinstance(result, wire.Refused):
            raise result
        return response if ask.stream else _json_bytes(result or b"")

    def _note(self, body: bytes, received_ns: int, stream: Stream) -> None:
        """A request as the server saw it, in ns of CLOCK_MONOTONIC, which clients on this host
        share: when its head was there, and right before its first and last token were written."""
        if self._request_log is not None:
            name = hashlib.blake2b(body, digest_size=8).hexdigest()
            self._request_log.write(json.dumps({
                "body": name, "received_ns": received_ns, "first_ns": stream.first_ns,
                "last_ns": stream.last_ns, "tokens": stream.tokens}) + "\n")

    async def _through_engine(self, stream: Stream, fault: faults.Fault | None,
                              ) -> bytes | wire.Refused | None:
        """The stream's result. A client that leaves cancels this, which aborts the request."""
        ask, config = stream.answer.ask, self.engine.config
        self._count += 1
        request_id = self._count
        hashes = text.block_hashes(ask.tokens) if config.prefix_caching else []
        self._streams[request_id] = stream
        try:
            late_s = fault.at if fault and fault.kind == "slow-first" else 0.0
            now_s = asyncio.get_running_loop().time()
            ready_s = self._front.take_in(now_s * self._speed) / self._speed
            await asyncio.sleep(ready_s - now_s + late_s)
            self.engine.submit(Request(request_id, len(ask.tokens), ask.max_tokens,
                                       ask.ignore_eos, ask.min_tokens, hashes))
            self._wake.set()
            return await stream.done
        finally:
            del self._streams[request_id]
            self.engine.abort(request_id)  # of a finished one: ignored

    # ---------------------------------------------------------------------------- other answers

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = wire.parse_body(await request.read(), request.content_type)
        config = self.engine.config
        tokens = wire.prompt_tokens(body, chat="messages" in body)
        ids = text.token_ids(tokens, config.machine.model.vocab)
        return _json({"count": len(ids), "max_model_len": config.max_model_len, "tokens": ids,
                      "token_strs": None})

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=503 if self._dead else 200)

    async def _version(self, _request: web.Request) -> web.Response:
        return _json({"version": "0.32.0", "simulated": True})

    async def _list_models(self, _request: web.Request) -> web.Response:
        root, limit = self.engine.config.machine.model.name, self.engine.config.max_model_len
        return _json({"object": "list", "data": [
            {"id": name, "object": "model", "created": self._started, "owned_by": "vllm",
             "root": root, "parent": None, "max_model_len": limit, "simulated": True}
            for name in self._models]})

    async def _metrics(self, _request: web.Request) -> web.Response:
        body = metrics.render(self.engine, self._models[0], self.latencies, self.pacing)
        return web.Response(body=body.encode(), headers={
            "content-type": "text/plain; version=1.0.0; charset=utf-8"})

    async def _gpu(self, _request: web.Request) -> web.Response:
        busy = self.pacing.busy_frac(asyncio.get_running_loop().time())
        return _json(metrics.gpus(self.engine, self._utilization, busy))

    @web.middleware
    async def _dialect(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Authorization, and errors in vLLM's words."""
        if (self._api_key and request.path.startswith("/v1")
                and request.headers.get("authorization") != f"Bearer {self._api_key}"):
            return _json({"error": "Unauthorized"}, 401)
        try:
            return await handler(request)
        except wire.Refused as e:
            response = _json_bytes(e.body(), e.status)
            if e.status == 429:
                response.headers["retry-after"] = "1"
            return response
        except web.HTTPException as e:  # unknown path or method: FastAPI's shape, not OpenAI's
            return _json({"detail": e.reason}, e.status)


async def _uvicorn_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers["server"] = "uvicorn"
    response.headers["vary"] = "Origin"
    response.headers["x-simulated"] = "true"


def _json(value: object, status: int = 200) -> web.Response:
    return _json_bytes(wire.dumps(value), status)


def _json_bytes(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")
