"""vLLM's dialect: what a request may say, and the bytes of the answers, key by key as captured
from vLLM 0.32. No sockets."""

import json
import time
from dataclasses import dataclass
from typing import Any

from servers.sim import text

FINGERPRINT = "vllm-0.32.0-simulated"
ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
BUSY = ("The engine is currently busy and cannot accept new requests. Please try again later or on "
        "a different instance.")
DONE = b"data: [DONE]\n\n"
WORDS_JSON = tuple(json.dumps(w, ensure_ascii=False).encode() for w in text.WORDS)


def dumps(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class Refused(Exception):
    """An HTTP error with vLLM's body."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError",
                 param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": status}

    def body(self) -> bytes:
        return dumps({"error": self.error})

    def event(self) -> bytes:
        """As it is told inside a stream, where vLLM's serializer sets spaces."""
        return b"data: " + json.dumps({"error": self.error}).encode() + b"\n\n"


def engine_dead() -> Refused:
    return Refused(500, ENGINE_DEAD, "InternalServerError")


def busy() -> Refused:
    return Refused(503, BUSY, "Service Unavailable")


# -------------------------------------------------------------------------------------- requests


@dataclass(frozen=True, slots=True)
class Ask:
    """A checked request. `tokens`: the prompt's pieces or ids."""

    chat: bool
    model: str
    tokens: list[str] | list[int]
    max_tokens: int
    ignore_eos: bool
    min_tokens: int
    stream: bool
    include_usage: bool


def parse_body(raw: bytes, content_type: str) -> dict[str, Any]:
    if not raw:
        raise _invalid("missing", "body", "Field required", "None")
    if content_type != "application/json":
        raise Refused(400, "1 validation error:\n  Unsupported Media Type: Only 'application/json' "
                      "is allowed", "Bad Request")
    try:
        body = json.loads(raw)
    except ValueError as e:
        at = f"body.{getattr(e, 'pos', 0)}"
        raise _invalid("json_invalid", at, "JSON decode error", "<dict of 0 items>",
                       f", 'ctx': {{'error': '{getattr(e, 'msg', e)}'}}") from None
    if not isinstance(body, dict):
        raise _invalid("model_attributes_type", "body", "Input should be a valid dictionary",
                       str(body)[:40])
    return body


def parse_ask(body: dict[str, Any], chat: bool, models: list[str], max_model_len: int) -> Ask:
    """Raises Refused as vLLM would; unknown fields are accepted as vLLM does."""
    model = body.get("model") or models[0]
    if model not in models:
        raise Refused(404, f"The model `{model}` does not exist. Valid aliases: "
                      f"{', '.join(models)}.", "NotFoundError", "model")
    temperature = _number(body, "temperature")
    if temperature is not None and temperature < 0:
        raise _bad("temperature", f"temperature must be non-negative, got {float(temperature)}.",
                   float(temperature))
    options = body.get("stream_options") or {}
    if options and not body.get("stream"):
        raise Refused(400, "Stream options can only be defined when `stream=True`. "
                      "(parameter=stream_options)", param="stream_options")
    if (body.get("n") or 1) != 1:
        raise Refused(400, "n must be 1: the simulator answers once.", param="n")
    tokens = prompt_tokens(body, chat)
    return Ask(chat, model, tokens, _max_tokens(body, chat, len(tokens), max_model_len),
               bool(body.get("ignore_eos")), int(_number(body, "min_tokens") or 0),
               bool(body.get("stream")), bool(options.get("include_usage")))


def prompt_tokens(body: dict[str, Any], chat: bool) -> list[str] | list[int]:
    field = "messages" if chat else "prompt"
    if field not in body:
        raise _invalid("missing", f"body.{field}", "Field required",
                       f"<dict of {len(body)} items>")
    prompt = body[field]
    if chat:
        if not isinstance(prompt, list) or not all(isinstance(m, dict) for m in prompt):
            raise _invalid("list_type", "body.messages", "Input should be a valid list",
                           str(prompt)[:40])
        if not prompt:
            raise Refused(400, "Cannot apply chat template to an empty conversation. Provide at "
                          "least one message.")
        return text.chat_pieces(prompt)
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if not prompt:
        raise Refused(400, "Either prompt or prompt_embeds must be provided and non-empty. "
                      "(parameter=prompt)", param="prompt")
    if isinstance(prompt, str):
        return text.pieces(prompt)
    if isinstance(prompt, list) and all(isinstance(t, int) for t in prompt):
        return prompt
    raise Refused(400, "prompt must be one text or one list of token ids.", param="prompt")


def _max_tokens(body: dict[str, Any], chat: bool, prompt: int, max_model_len: int) -> int:
    asked = _number(body, "max_completion_tokens") if chat else None
    asked = _number(body, "max_tokens") if asked is None else asked
    if asked is not None and asked < 1:
        raise _bad("max_tokens", f"max_tokens must be at least 1, got {int(asked)}.", int(asked))
    if asked is not None and asked > max_model_len:
        raise _bad("max_tokens", f"max_tokens={int(asked)} cannot be greater than max_model_len="
                   f"{max_model_len}. Please request fewer output tokens.", int(asked))
    if prompt >= max_model_len:
        raise _bad("input_tokens", f"This model's maximum context length is {max_model_len} "
                   f"tokens. However, your prompt contains at least {prompt} input tokens, which "
                   "exceeds this limit even without any output tokens. Please reduce the length "
                   "of the input prompt.", prompt)
    default = max_model_len if chat else 16
    return min(default if asked is None else int(asked), max_model_len - prompt)


def _number(body: dict[str, Any], key: str) -> float | None:
    value = body.get(key)
    if value is None or isinstance(value, int | float):
        return value
    raise _invalid("float_parsing", f"body.{key}", "Input should be a valid number, unable to "
                   "parse string as a number", str(value)[:40])


def _bad(param: str, message: str, value: float) -> Refused:
    return Refused(400, f"{message} (parameter={param}, value={value})", param=param)


def _invalid(kind: str, loc: str, message: str, given: str, more: str = "") -> Refused:
    """A pydantic complaint, the way vLLM prints it: its type is "Bad Request", with a space."""
    return Refused(400, f"1 validation error:\n  {{'type': '{kind}', 'loc': '{loc}', 'msg': "
                   f"'{message}', 'input': '{given}'{more}}}", "Bad Request", loc)


# --------------------------------------------------------------------------------------- answers


class Answer:
    """The bytes of one answer: events of a stream, or the whole body."""

    def __init__(self, ask: Ask, request_id: str) -> None:
        self.ask = ask
        self.created = int(time.time())
        self.id = ("chatcmpl-" if ask.chat else "cmpl-") + request_id
        kind = "chat.completion.chunk" if ask.chat else "text_completion"
        self._head = b"data: " + dumps({"id": self.id, "object": kind, "created": self.created,
                                        "model": ask.model, "choices": []})[:-2]

    def role(self) -> bytes:
        """vLLM sends the role with the first token, right before it."""
        return self._head + (b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":'
                             b'null,"finish_reason":null}],"prompt_token_ids":null,'
                             b'"prompt_text":null}\n\n')

    def token(self, word_json: bytes) -> bytes:
        return self._head + self._choice(word_json, b"null") + b"}\n\n"

    def finish(self, word_json: bytes | None, reason: str) -> bytes:
        """The finishing chunk: with the last word when cut by length, else without text."""
        end = b"" if self.ask.include_usage else b',"system_fingerprint":' + dumps(FINGERPRINT)
        return self._head + self._choice(word_json, dumps(reason)) + end + b"}\n\n"

    def usage(self, output_tok: int) -> bytes:
        return (self._head + b'],"usage":' + dumps(self._usage(output_tok))
                + b',"system_fingerprint":' + dumps(FINGERPRINT) + b"}\n\n")

    def _choice(self, word_json: bytes | None, reason: bytes) -> bytes:
        if not self.ask.chat:
            return (b'{"index":0,"text":' + (word_json or b'""') + b',"logprobs":null,'
                    b'"finish_reason":' + reason
                    + b',"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]')
        delta = b"" if word_json is None else b'"content":' + word_json
        stop = b"" if reason == b"null" else b',"stop_reason":null'
        return (b'{"index":0,"delta":{' + delta + b'},"logprobs":null,"finish_reason":' + reason
                + stop + b',"token_ids":null}]')

    def whole(self, content: str, output_tok: int, reason: str) -> bytes:
        choice: dict[str, Any] = {"index": 0}
        if self.ask.chat:
            empty = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
            choice["message"] = {"role": "assistant", "content": content, **empty}
        else:
            choice["text"] = content
        choice |= {"logprobs": None, "finish_reason": reason, "stop_reason": None,
                   "token_ids": None}
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        return dumps({
            "id": self.id, "object": "chat.completion" if self.ask.chat else "text_completion",
            "created": self.created, "model": self.ask.model, "choices": [choice],
            "service_tier": None, "system_fingerprint": FINGERPRINT,
            "usage": {**self._usage(output_tok), **details}})

    def _usage(self, output_tok: int) -> dict[str, int]:
        prompt = len(self.ask.tokens)
        return {"prompt_tokens": prompt, "total_tokens": prompt + output_tok,
                "completion_tokens": output_tok}
