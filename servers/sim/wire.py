"""vLLM's dialect: what a request may ask for, and how it is refused. No sockets."""

import json
import math
from dataclasses import dataclass
from typing import Any

from servers.sim import text
from servers.sim.errors import Refused, bad, invalid, unsupported_media_type

MAX_LOGPROBS = 20
MAX_N = 16384  # vLLM's VLLM_MAX_N_SEQUENCES
Tokens = list[str] | list[int]


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is asked of each answer. `max_tokens`: None for as many as fit."""

    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # so many alternatives per token; None: not asked for
    n: int = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """How the answers are to be told."""

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False
    echo: bool = False  # completions: the prompt's text first


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the answer must look like; at most one is set. `tool_choice`: "auto", "required", or
    the name of one of `tools`."""

    schema: Any = None
    choice: tuple[str, ...] = ()
    regex: str | None = None
    tools: tuple[tuple[str, Any], ...] = ()  # (name, schema of its arguments)
    tool_choice: str | None = None
    named: bool = False


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
    constraint = _constraint(body, chat)
    sampling = _sampling(body, chat, max_model_len)
    if chat:
        _require_messages(body)
        prompts: list[Tokens] = [chat_tokens(body, models[0], max_model_len)]
    else:
        prompts = [_completion_tokens(p, max_model_len) for p in _prompts(body)]
    for tokens in prompts:
        _check_prompt(tokens, max_model_len, vocab)
    texts = tuple(_text_of(p) for p in _prompts(body)) if shape.echo else ()
    return Ask(chat, body.get("model") or models[0], prompts, sampling, shape, constraint, texts)


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


# --------------------------------------------------------------------------------------- prompts


def prompt_tokens(body: dict[str, Any]) -> list[str]:
    """For /tokenize: of a conversation or of one prompt."""
    if "messages" in body:
        _require_messages(body)
        return text.chat_pieces(body["messages"], _tools_text(body))
    if "prompt" not in body:
        raise invalid("missing", "body.prompt", "Field required", body)
    prompt = body["prompt"]
    if not isinstance(prompt, str):
        raise invalid("string_type", "body.prompt", "Input should be a valid string", prompt)
    return text.pieces(prompt)


def given_ids(body: dict[str, Any], vocab: int) -> list[int]:
    """For /detokenize."""
    if "tokens" not in body:
        raise invalid("missing", "body.tokens", "Field required", body)
    tokens = body["tokens"]
    if not isinstance(tokens, list) or not all(type(t) is int for t in tokens):
        raise invalid("list_type", "body.tokens", "Input should be a valid list", tokens)
    wrong = next((t for t in tokens if not 0 <= t < vocab), None)
    if wrong is not None:
        raise Refused(400, f"Token id {wrong} is out of vocabulary")
    return tokens


def chat_tokens(body: dict[str, Any], model: str, max_model_len: int) -> list[str]:
    for message in body["messages"]:
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict) and str(part.get("type", "text")) not in (
                    "text", "refusal", "thinking"):
                raise Refused(400, f"{model} is not a multimodal model")
    return text.chat_pieces(body["messages"], _tools_text(body), max_model_len + 1)


def _require_messages(body: dict[str, Any]) -> None:
    if "messages" not in body:
        raise invalid("missing", "body.messages", "Field required", body)
    messages = body["messages"]
    if not isinstance(messages, list):
        raise invalid("list_type", "body.messages", "Input should be a valid list", messages)
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise invalid("dict_type", f"body.messages.{i}", "Input should be a valid dictionary",
                          message)
    if not messages:
        raise Refused(400, "Cannot apply chat template to an empty conversation. Provide at "
                      "least one message.")


def _tools_text(body: dict[str, Any]) -> str:
    tools = body.get("tools")
    return "\n".join(json.dumps(t) for t in tools) if isinstance(tools, list) else ""


def _prompts(body: dict[str, Any]) -> list[str | list[int]]:
    given = body.get("prompt")
    if not given:
        raise bad("prompt", "Either prompt or prompt_embeds must be provided and non-empty.")
    if isinstance(given, str):
        return [given]
    if isinstance(given, list):
        if all(type(t) is int for t in given):
            return [given]
        if all(isinstance(p, str) for p in given) or all(
                isinstance(p, list) and p and all(type(t) is int for t in p) for p in given):
            return given
    raise invalid("string_type", "body.prompt.str", "Input should be a valid string", given)


def _completion_tokens(prompt: str | list[int], max_model_len: int) -> Tokens:
    return text.pieces(prompt, max_model_len + 1) if isinstance(prompt, str) else prompt


def _check_prompt(tokens: Tokens, max_model_len: int, vocab: int) -> None:
    if not tokens:
        raise bad("prompt", "Either prompt or prompt_embeds must be provided and non-empty.")
    if len(tokens) == max_model_len:
        raise bad("max_tokens", "max_tokens must be at least 1, got 0.", 0)
    if len(tokens) > max_model_len:
        least = min(len(tokens), max_model_len + 1)  # vLLM stops counting there
        raise bad("input_tokens", f"This model's maximum context length is {max_model_len} "
                  f"tokens. However, your prompt contains at least {least} input tokens, which "
                  "exceeds this limit even without any output tokens. Please reduce the length "
                  "of the input prompt.", least)
    if isinstance(tokens[0], int):
        wrong = next((t for t in tokens if not 0 <= int(t) < vocab), None)
        if wrong is not None:
            raise Refused(400, f"Token id {wrong} is out of vocabulary")


def _text_of(prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else text.detokenized(prompt)


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
                    bool(body.get("ignore_eos")), tuple(stop), _logprobs(body, chat), n)


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


def _constraint(body: dict[str, Any], chat: bool) -> Constraint:
    asked = body.get("structured_outputs") or {}
    if not isinstance(asked, dict):
        raise invalid("dict_type", "body.structured_outputs", "Input should be a valid dictionary",
                      asked)
    tools, tool_choice, named = _tools(body) if chat else ((), None, False)
    choice = asked.get("choice") or ()
    if choice:
        if not isinstance(choice, list):
            raise invalid("list_type", "body.structured_outputs.choice", "Input should be a valid "
                          "list", choice)
        return Constraint(choice=tuple(map(str, choice)), tools=tools, tool_choice=tool_choice)
    if tool_choice not in (None, "auto"):
        return Constraint(tools=tools, tool_choice=tool_choice, named=named)
    schema = _schema(body, asked)
    if schema is not None:
        return Constraint(schema=schema)
    if asked.get("regex"):
        return Constraint(regex=str(asked["regex"]))
    return Constraint(tools=tools, tool_choice=tool_choice)


def _schema(body: dict[str, Any], asked: dict[str, Any]) -> Any:
    wanted = body.get("response_format")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if isinstance(wanted, dict) and kind == "json_schema":
        holder = wanted.get("json_schema")
        if not isinstance(holder, dict):
            raise invalid("missing", "body.response_format.json_schema", "Field required", wanted)
        return holder.get("schema", True)
    if kind == "json_object" or asked.get("json_object"):
        return {"type": "object", "minProperties": 2, "additionalProperties": {"type": "string"}}
    schema = asked.get("json")
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as e:
        raise Refused(400, f"Grammar error: {e}") from None


def _tools(body: dict[str, Any]) -> tuple[tuple[tuple[str, Any], ...], str | None, bool]:
    """(tools, which of them, whether one was named); nothing where no tool may be called."""
    given, choice = body.get("tools") or [], body.get("tool_choice")
    if not given:
        if choice not in (None, "none"):
            raise bad("tool_choice", "When using `tool_choice`, `tools` must be set.")
        return (), None, False
    functions = [t.get("function") if isinstance(t, dict) else None
                 for t in (given if isinstance(given, list) else [given])]
    tools = []
    for i, function in enumerate(functions):
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid("missing", f"body.tools.{i}.function", "Field required", given)
        tools.append((function["name"], function.get("parameters") or {"type": "object"}))
    if isinstance(choice, dict):
        name = (choice.get("function") or {}).get("name")
        if name not in [n for n, _ in tools]:
            raise bad("tool_choice", "The tool specified in `tool_choice` does not match any of "
                      "the specified `tools`")
        return tuple(tools), str(name), True
    if choice == "none":
        return (), None, False
    if choice not in (None, "auto", "required"):
        raise bad("tool_choice", "Invalid value for `tool_choice`: it must be \"none\", \"auto\", "
                  "\"required\" or a named tool.", choice)
    return tuple(tools), choice or "auto", False
