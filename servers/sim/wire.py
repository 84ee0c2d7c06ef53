"""vLLM's dialect: what a request may ask for, and how it is refused. No sockets."""

import json
import math
from dataclasses import dataclass
from typing import Any

from servers.sim import constraints, prompts
from servers.sim.constraints import Constraint
from servers.sim.errors import Refused, bad, invalid, unsupported_media_type
from servers.sim.prompts import Tokens

MAX_LOGPROBS = 20
MAX_N = 16384  # vLLM's VLLM_MAX_N_SEQUENCES


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is asked of each answer. `max_tokens`: None for as many as fit."""

    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # so many alternatives per token; None: not asked for
    n: int = 1
    greedy: bool = False  # temperature 0: the same words to the same request


@dataclass(frozen=True, slots=True)
class Shape:
    """How the answers are to be told."""

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False
    echo: bool = False  # completions: the prompt's text first


@dataclass(frozen=True, slots=True)
class Ask:
    """A checked request. `prompts`: the pieces or ids of each; `texts`: with `echo`, themselves."""

    chat: bool
    model: str
    prompts: list[Tokens]
    sampling: Sampling
    shape: Shape
    constraint: Constraint
    texts: tuple[str, ...] = ()

    @property
    def prompt_tok(self) -> int:
        return sum(map(len, self.prompts))


def parse_body(raw: bytes, content_type: str) -> dict[str, Any]:
    if not raw:
        raise invalid("missing", "body", "Field required", None)
    if content_type != "application/json":
        raise unsupported_media_type()
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as e:
        at = f"body.{getattr(e, 'pos', 0)}"
        raise invalid("json_invalid", at, "JSON decode error", {},
                      f", 'ctx': {{'error': '{getattr(e, 'msg', e)}'}}") from None
    if not isinstance(body, dict):
        raise invalid("model_attributes_type", "body", "Input should be a valid dictionary or "
                      "object to extract fields from", body)
    return body


def parse_ask(body: dict[str, Any], chat: bool, models: list[str], max_model_len: int,
              vocab: int) -> Ask:
    """Raises Refused as vLLM would; unknown fields are accepted as vLLM does."""
    check_model(body, models)
    shape = _shape(body, chat)
    constraint = constraints.parse(body, chat)
    sampling = _sampling(body, chat, max_model_len)
    if chat:
        prompts.require_messages(body)
        asked: list[Tokens] = [prompts.chat_tokens(body, models[0], max_model_len)]
    else:
        asked = [prompts.completion_tokens(p, max_model_len) for p in prompts.given_prompts(body)]
    for tokens in asked:
        prompts.check_prompt(tokens, max_model_len, vocab)
    texts = tuple(map(prompts.text_of, prompts.given_prompts(body))) if shape.echo else ()
    return Ask(chat, body.get("model") or models[0], asked, sampling, shape, constraint, texts)


def check_model(body: dict[str, Any], models: list[str]) -> None:
    model = body.get("model") or models[0]
    if not isinstance(model, str):
        raise invalid("string_type", "body.model", "Input should be a valid string", model)
    if model not in models:
        raise Refused(404, f"The model `{model}` does not exist. Valid aliases: "
                      f"{', '.join(models)}.", "NotFoundError", "model")


def output_tok(asked: int | None, prompt_tok: int, chat: bool, max_model_len: int) -> int:
    """Tokens that an answer may have: what is asked, or 16 of completions, cut to what fits."""
    default = max_model_len if chat else 16
    return min(default if asked is None else asked, max_model_len - prompt_tok)


# -------------------------------------------------------------------------------------- sampling


def _sampling(body: dict[str, Any], chat: bool, max_model_len: int) -> Sampling:
    _ranges(body)
    n = int(_number(body, "n", 1))
    if not 1 <= n <= MAX_N:
        raise Refused(400, f"n must be at least 1, got {n}." if n < 1 else
                      f"n must be at most {MAX_N}, got {n}.")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise invalid("string_type", "body.stop.str", "Input should be a valid string", stop)
    return Sampling(_max_tokens(body, chat, max_model_len), int(_number(body, "min_tokens", 0)),
                    bool(body.get("ignore_eos")), tuple(stop), _logprobs(body, chat), n,
                    _number(body, "temperature", 1.0) == 0)


def _ranges(body: dict[str, Any]) -> None:
    temperature = float(_number(body, "temperature", 1.0))
    if temperature < 0:
        raise bad("temperature", f"temperature must be non-negative, got {temperature}.",
                  temperature)
    top_p = float(_number(body, "top_p", 1.0))
    if not 0 < top_p <= 1:
        raise bad("top_p", f"top_p must be in (0, 1], got {top_p}.", top_p)


def _max_tokens(body: dict[str, Any], chat: bool, max_model_len: int) -> int | None:
    asked = _number(body, "max_completion_tokens", None) if chat else None
    asked = _number(body, "max_tokens", None) if asked is None else asked
    if asked is None:
        return None
    asked = int(asked)
    if asked < 1:
        raise bad("max_tokens", f"max_tokens must be at least 1, got {asked}.", asked)
    if asked > max_model_len:
        raise bad("max_tokens", f"max_tokens={asked} cannot be greater than max_model_len="
                  f"{max_model_len}. Please request fewer output tokens.", asked)
    return asked


def _logprobs(body: dict[str, Any], chat: bool) -> int | None:
    if chat:
        asked = int(_number(body, "top_logprobs", 0)) if body.get("logprobs") else None
    else:
        given = body.get("logprobs")
        asked = None if given in (None, False) else int(_number(body, "logprobs", 0))
    if asked is not None and asked > MAX_LOGPROBS:
        raise bad("logprobs", f"Requested sample logprobs of {asked}, which is greater than max "
                  f"allowed: {MAX_LOGPROBS}", asked)
    return asked if asked is None else max(asked, 0)


def _number(body: dict[str, Any], key: str, default: Any) -> Any:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float):
        raise invalid("float_parsing", f"body.{key}", "Input should be a valid number, unable to "
                      "parse string as a number", value)
    if not math.isfinite(value) or abs(value) > 2**62:
        raise invalid("finite_number", f"body.{key}", "Input should be a finite number", value)
    return value


# ---------------------------------------------------------------------------------------- shapes


def _shape(body: dict[str, Any], chat: bool) -> Shape:
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise invalid("model_attributes_type", "body.stream_options", "Input should be a valid "
                      "dictionary or object to extract fields from", options)
    if options and not body.get("stream"):
        raise bad("stream_options", "Stream options can only be defined when `stream=True`.")
    usage = bool(options.get("include_usage"))
    return Shape(bool(body.get("stream")), usage,
                 usage and bool(options.get("continuous_usage_stats")),
                 bool(body.get("return_token_ids")), bool(body.get("echo")) and not chat)
