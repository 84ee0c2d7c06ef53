"""Requests on their way into the engine: read, checked, admitted, answered."""

import asyncio
import hashlib
import json
import random
import time
import zlib
from itertools import islice
from pathlib import Path
from typing import Protocol

from aiohttp import web

from servers.sim import faults, prompts, scripts, text, webapp, wire
from servers.sim.answers import Answer
from servers.sim.choice import Choice
from servers.sim.doors import html, json_bytes
from servers.sim.engine import Engine, Request
from servers.sim.errors import Refused, busy, dumps
from servers.sim.front import Front
from servers.sim.metrics import Tally
from servers.sim.stream import Stream

MAX_BODY_BYTES = 64 * 2**20
_BIG_BYTES = 4 * 2**20
_FORESEEN_TOK = 4096  # of an answer, that the prefix cache can find
_BIG_AT_ONCE = 4  # bodies beyond that; the others wait unread, so that memory stays bounded


class House(Protocol):
    """What a request needs of the server."""

    engine: Engine
    front: Front
    tally: Tally
    faults: faults.Faults
    models: list[str]
    speed: float
    queue_limit: int | None

    def refuse_if_dead(self) -> None: ...
    def wake(self) -> None: ...


class Desk:
    """`flying`: what the engine works on, by its number there."""

    def __init__(self, house: House, habits: scripts.Habits, request_log: Path | None) -> None:
        self.flying: dict[int, tuple[Stream, Choice]] = {}
        self.known: dict[int, str] = {}  # texts of ids that /tokenize gave away
        self._house, self._habits = house, habits
        self._log = request_log.open("a", buffering=1) if request_log else None
        self._rng = random.Random(house.engine.config.seed)  # ids and words
        self._count = 0
        self._seen = 0  # what was in flight at the last step, as far as the API server knows
        self._big = asyncio.Semaphore(_BIG_AT_ONCE)

    def streams(self) -> list[Stream]:
        return list(dict.fromkeys(stream for stream, _ in self.flying.values()))

    def stepped(self) -> None:
        self._seen = len(self.flying)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=True)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=False)

    async def _generate(self, request: web.Request, chat: bool) -> web.StreamResponse:
        house = self._house
        due_s, received_ns = asyncio.get_running_loop().time(), time.monotonic_ns()
        house.refuse_if_dead()
        fault = faults.parse_request_fault(request.headers.get("x-sim-fault")) or (
            house.faults.draw())
        if (spoiled := self._at_once(request, fault)) is not None:
            return spoiled
        raw = await self.body(request)
        name = hashlib.blake2b(raw, digest_size=8).hexdigest() if self._log else ""
        config = house.engine.config
        body, small = wire.parse_body(raw, request.content_type), config.backend == "transformers"
        if small:
            webapp.check_fields(body)
        ask = wire.parse_ask(body, chat, house.models, config.max_model_len,
                             config.machine.model.vocab)
        if small:
            webapp.check_room(ask, config.max_model_len)
        rng = random.Random(zlib.crc32(raw)) if ask.sampling.greedy else self._rng
        del raw, body
        answer = Answer(ask, self._id_of(request), config.machine.model.vocab)
        said = [scripts.write(ask.constraint, self._habits, rng)
                for _ in range(len(ask.prompts) * ask.sampling.n)]
        if self._is_full(self._seen):
            raise busy()
        response = web.StreamResponse()
        if ask.shape.stream:
            response.headers["content-type"] = "text/event-stream; charset=utf-8"
            if not small:
                await response.prepare(request)  # vLLM's headers do not wait for the first token
        if request.transport is None or (fault and fault.kind == "empty"):
            return response
        stream = Stream(answer, said, due_s, request.transport, fault, house.tally, self._leave,
                        house.faults.strike, config.stream_interval, small)
        try:
            result = await self._through_engine(stream, fault, request, response)
        finally:
            self._note(name, received_ns, stream)
        if isinstance(result, Refused):
            raise result
        return response if ask.shape.stream else json_bytes(result or b"")

    def _at_once(self, request: web.Request, fault: faults.Fault | None) -> web.Response | None:
        """A fault that needs no engine."""
        if refused := faults.refusal(fault):
            raise refused
        if fault is None:
            return None
        kind = fault.kind
        if kind == "refuse" and request.transport is not None:
            request.transport.close()
        return {"wrong-type": json_bytes(b'{"simulated":true}'),
                "html": html(200, "Welcome to nginx!"), "refuse": web.Response(),
                "status-502": html(502, "502 Bad Gateway")}.get(kind)

    def _id_of(self, request: web.Request) -> str:
        return request.headers.get("x-request-id") or f"{self._rng.getrandbits(64):016x}"

    async def body(self, request: web.Request) -> bytes:
        """The whole body, and not kept by the request. Raises 413 beyond MAX_BODY_BYTES."""
        if (request.content_length or 0) > MAX_BODY_BYTES:
            raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, request.content_length or 0)
        out = bytearray()
        while len(out) <= _BIG_BYTES:
            if not (data := await request.content.readany()):
                return bytes(out)
            out += data
        async with self._big:
            while data := await request.content.readany():
                out += data
                if len(out) > MAX_BODY_BYTES:
                    raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, len(out))
        return bytes(out)

    def _is_full(self, flying: int) -> bool:
        """By vLLM's --max-num-queued-reqs, which counts the running ones, too."""
        full = self._house.queue_limit is not None and flying >= self._house.queue_limit
        self._house.tally.rejected += full
        return full

    def _note(self, name: str, received_ns: int, stream: Stream) -> None:
        """A request as the server saw it, in ns of CLOCK_MONOTONIC, which clients on this host
        share: when its head was there, and right before its first and last token were written."""
        if self._log is not None:
            self._log.write(json.dumps({
                "body": name, "received_ns": received_ns, "first_ns": stream.first_ns,
                "last_ns": stream.last_ns, "tokens": stream.tokens}) + "\n")

    async def _through_engine(self, stream: Stream, fault: faults.Fault | None,
                              request: web.Request, response: web.StreamResponse,
                              ) -> bytes | Refused | None:
        """The stream's result. A client that leaves cancels this, which aborts the request."""
        house = self._house
        # The engine's own check is exact, but comes when a stream's headers are out already.
        if self._is_full(len(self.flying)) or (fault and fault.kind == "queue-event"):
            stream.fail(busy())
            return await stream.done
        try:
            for choice in stream.choices:
                self._count += 1
                choice.request_id = self._count
                self.flying[self._count] = (stream, choice)
            late_s = fault.at if fault and fault.kind == "slow-first" else 0.0
            now_s = asyncio.get_running_loop().time()
            ready_s = house.front.take_in(now_s * house.speed) / house.speed
            await asyncio.sleep(ready_s - now_s + late_s)
            for choice in stream.choices:
                self._submit(stream, choice)
            house.wake()
            if stream.head_waits:
                await stream.has_begun.wait()
                if not stream.done.done() or stream.done.result() is None:  # else it has failed
                    await response.prepare(request)
                stream.begin()
            return await stream.done
        finally:
            for choice in stream.choices:
                del self.flying[choice.request_id]
                house.engine.abort(choice.request_id)  # of a finished one: ignored
            self._seen = min(self._seen, len(self.flying))

    def _submit(self, stream: Stream, choice: Choice) -> None:
        ask, config = stream.answer.ask, self._house.engine.config
        tokens = ask.prompts[stream.answer.prompt_of(choice.index)]
        asked = ask.sampling.max_tokens
        if asked is None and config.backend == "transformers":
            asked = webapp.DEFAULT_TOK
        most = wire.output_tok(asked, len(tokens), ask.chat, config.max_model_len)
        self._house.tally.asked(ask.sampling.n, most)
        foreseen = islice(choice.foreseen, min(most, _FORESEEN_TOK))
        hashes = text.block_hashes([*tokens, *foreseen]) if config.prefix_caching else []
        scripted = choice.script_tok is not None
        self._house.engine.submit(Request(
            choice.request_id, len(tokens), min(most, choice.script_tok or most),
            scripted or ask.sampling.ignore_eos, ask.sampling.min_tokens, hashes))

    def _leave(self, choice: Choice) -> None:
        """It ended before the engine knew: by a stop string."""
        self._house.engine.abort(choice.request_id)

    async def tokenize(self, request: web.Request) -> web.Response:
        body = wire.parse_body(await self.body(request), request.content_type)
        config = self._house.engine.config
        wire.check_model(body, self._house.models)
        tokens = prompts.prompt_tokens(body)
        ids = text.token_ids(tokens, config.machine.model.vocab)
        pieces = [str(t) for t in tokens]
        if len(self.known) + len(ids) < MAX_BODY_BYTES // 64:
            self.known.update(zip(ids, pieces, strict=True))
        return _json({"count": len(ids), "max_model_len": config.max_model_len, "tokens": ids,
                      "token_strs": pieces if body.get("return_token_strs") else None})

    async def detokenize(self, request: web.Request) -> web.Response:
        body = wire.parse_body(await self.body(request), request.content_type)
        wire.check_model(body, self._house.models)
        return _json({"prompt": text.detokenized(prompts.given_ids(
            body, self._house.engine.config.machine.model.vocab), self.known)})


def _json(value: object) -> web.Response:
    return json_bytes(dumps(value))
