"""The OpenAI dialect of streaming: the body of a request, and what an event means.

What counts as a token event (vLLM sends tokens whose text is empty: half a Chinese character, a
special token; skipping them reported 44 ms between tokens where there were 6.4): every event with
`choices`, except the role-only first one, a finish-only one (`delta: {}`) and a usage-only one.

Servers that speak it differ in little: SGLang, TGI, llama.cpp, Ollama, LM Studio, TensorRT-LLM and
Transformers each have a stream and their errors in tests/data/dialects. None has to be named.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from loadgen.scenario import RequestClass, Sampling

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
STOPPED = frozenset({"stop", "eos_token", "eos", "stop_sequence"})  # the last three are TGI's
GOOD_FINISH = STOPPED | {"length", "tool_calls", "content_filter", "function_call"}
_FINISH_APART = b'"fp_ollama"'  # whose finish has an empty content, also where a length ended it

_encode = msgspec.json.Encoder().encode


def body(endpoint: str, model: str, prompt: str, max_tokens: int, cls: RequestClass,
         more: Mapping[str, Any] = {}) -> bytes:
    """The JSON body of one streamed request that asks for usage."""
    return conversation(endpoint, model, [{"role": "user", "content": prompt}], max_tokens,
                        cls.sampling, more)


def conversation(endpoint: str, model: str, messages: list[dict[str, str]], max_tokens: int,
                 sampling: Sampling, more: Mapping[str, Any] = {}) -> bytes:
    """The JSON body for all `messages` so far; completions take their texts in one piece. `more`:
    tools, a forced form."""
    what: dict[str, Any] = {"model": model}
    if endpoint == "chat":
        what["messages"] = messages
    else:
        what["prompt"] = "\n".join(m["content"] for m in messages)
    given = {k: v for k, v in msgspec.to_builtins(sampling).items() if v is not None}
    usage = {"include_usage": True}
    if (continuous := given.pop("continuous_usage_stats", None)) is not None:
        usage["continuous_usage_stats"] = continuous
    what |= {"max_tokens": max_tokens, "stream": True, "stream_options": usage}
    return _encode({**what, **given, **more})


Count = Annotated[int, Meta(ge=0, lt=2**31)]  # what else a server says is no number of tokens


class Usage(Struct):
    """Token counts by the server; `cached` of the prompt's came from its prefix cache."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: dict[str, Any] | None = None

    @property
    def cached_tokens(self) -> int | None:
        found = (self.prompt_tokens_details or {}).get("cached_tokens")
        return found if isinstance(found, int) and 0 <= found < 2**31 else None


class _Delta(Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    function_call: Any = None


class _Choice(Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Chunk(Struct):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_any = msgspec.json.Decoder().decode


class Call(Struct, frozen=True):
    """A tool that an answer calls; `arguments` as they came, which need not be JSON."""

    name: str
    arguments: str = ""


class Answer(Struct, frozen=True, omit_defaults=True):
    """What a client shows: the visible text, and the tools that are to be called."""

    text: str = ""
    calls: list[Call] = []


class Event(Struct):
    """What one event says. `n_tok` is None where the server does not count tokens per event."""

    choices: bool = False
    token: bool = False
    visible: bool = False  # carries text, or a tool call, that is not reasoning
    text: str = ""
    n_tok: int | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    error: "ServerError | None" = None
    done: bool = False
    calls: list[msgspec.Raw] | None = None  # pieces of tool calls, as they came

    @property
    def is_plain_token(self) -> bool:
        """A token, and nothing else is said."""
        return (self.token and self.n_tok is None and self.finish_reason is None
                and self.usage is None and self.error is None)


class ServerError(Struct):
    """An error object of the server: in a stream, or as the body of an HTTP error."""

    message: str
    type: str | None = None
    code: int | str | None = None

    @property
    def is_death(self) -> bool:
        """vLLM's words when its engine is dead; whatever else the answer says, it will not come
        back by waiting."""
        return "EngineCore encountered an issue" in self.message or "EngineDead" in (
            f"{self.type} {self.message}")

    @property
    def is_queue_limit(self) -> bool:
        """The server turned the request away because it is full (vLLM's --max-num-queued-reqs,
        and what proxies say), not because it is broken."""
        said = f"{self.type} {self.message}".lower()
        full = ("cannot accept new requests", "queue", "overloaded", "too many requests",
                "rate limit", "server busy")
        return str(self.code) == "429" or (
            str(self.code) == "503" and any(word in said for word in full))


class BadEvent(ValueError):
    """An event that is no JSON, or none of this dialect."""


def read(payload: bytes, first: bool) -> Event:
    """The meaning of one event's payload. `first`: no event with choices came before (only then
    can an event be role-only). Raises BadEvent."""
    if payload.strip() == b"[DONE]":
        return Event(done=True)
    try:
        chunk = _decode_chunk(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        shown = payload[:120].decode("utf-8", "replace")
        raise BadEvent(f"{e}: {shown!r}") from None
    if chunk.error is not None or (chunk.choices is None and chunk.usage is None):
        raw = _decode_any(payload)
        if chunk.error is not None or raw.get("object") == "error":
            return Event(error=_error_in(raw))
    event = Event(usage=chunk.usage, choices=bool(chunk.choices))
    for choice in chunk.choices or ():
        _read_choice(event, choice, first, _FINISH_APART in payload)
    return event


def _read_choice(event: Event, choice: _Choice, first: bool, finish_apart: bool) -> None:
    reason = choice.finish_reason
    event.finish_reason = reason or event.finish_reason
    if choice.token_ids is not None:
        event.n_tok = (event.n_tok or 0) + len(choice.token_ids)
    delta = choice.delta
    if delta is None:  # completions: the chunk that an end-of-sequence token makes has no text
        event.text = choice.text or ""
        event.visible = bool(event.text)
        event.token |= choice.text is not None and not (
            choice.text == "" and (reason in STOPPED or (reason and finish_apart)))
        return
    thought = delta.reasoning_content if delta.reasoning_content is not None else delta.reasoning
    called = bool(delta.tool_calls) or delta.function_call is not None
    says = bool(delta.content or thought or called)
    role_only = first and delta.role is not None and not says and not reason
    finish_only = not says and (reason in STOPPED or bool(reason and finish_apart))
    event.token |= (delta.content is not None or thought is not None or called) and not (
        role_only or finish_only)
    event.visible |= bool(delta.content) or called
    event.text += delta.content or ""
    if called:
        _read_calls(event, delta)


def _read_calls(event: Event, delta: _Delta) -> None:
    event.calls = [*(event.calls or ()), *(delta.tool_calls or ())]
    if delta.function_call is not None:  # the older form: one, without a number
        event.calls.append(msgspec.Raw(_encode({"index": 0, "function": delta.function_call})))


class _Function(Struct):
    name: str | None = None
    arguments: Any = None


class _Piece(Struct):
    index: int | None = None
    function: _Function | None = None


_decode_piece = msgspec.json.Decoder(_Piece).decode


def calls_of(pieces: list[msgspec.Raw]) -> list[Call]:
    """Tool calls put together of what events brought of them: a name once, arguments bit by bit;
    without an index a name begins the next one. What is no such piece is passed over."""
    found: dict[int, list[str]] = {}
    at = -1
    for raw in pieces:
        try:
            piece = _decode_piece(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        function = piece.function or _Function()
        at = piece.index if piece.index is not None else max(at, 0) + (
            function.name is not None and max(at, 0) in found)
        name_and_arguments = found.setdefault(at, ["", ""])
        name_and_arguments[0] += function.name or ""
        given = function.arguments
        name_and_arguments[1] += given if isinstance(given, str) else (
            "" if given is None else _encode(given).decode())
    return [Call(*found[i]) for i in sorted(found)]



def error_body(body: bytes, status: int) -> ServerError:
    """The error that an HTTP body tells of; whatever it holds, something is said."""
    try:
        raw = _decode_any(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raw = body[:200].decode("utf-8", "replace").strip()
    error = _error_in(raw)
    return ServerError(error.message, error.type, error.code if error.code is not None else status)


def _error_in(raw: object) -> ServerError:
    """Of what servers wrap errors in: {"error": {…}}; {"error": "…", "error_type": "…"} (TGI);
    the object itself (SGLang, TensorRT-LLM, older vLLM); {"detail": …} (FastAPI)."""
    if not isinstance(raw, dict):
        return ServerError(str(raw)[:500])
    inner = raw.get("error", raw.get("detail"))
    if inner is None:
        inner = raw
    elif not isinstance(inner, dict):
        inner = {"message": inner, "type": raw.get("error_type"), "code": raw.get("code")}
    code = inner.get("code", inner.get("http_status_code"))
    return ServerError(str(inner.get("message", inner))[:500], _str(inner.get("type")),
                       code if isinstance(code, int | str) else None)


def _str(value: object) -> str | None:
    return None if value is None else str(value)
