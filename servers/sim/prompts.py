"""A request's prompts: as tokens, and how wrong ones are refused."""

import json
from typing import Any

from servers.sim import text
from servers.sim.errors import Refused, bad, invalid

Tokens = list[str] | list[int]


def prompt_tokens(body: dict[str, Any]) -> list[str]:
    """For /tokenize: of a conversation or of one prompt."""
    if "messages" in body:
        require_messages(body)
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


def require_messages(body: dict[str, Any]) -> None:
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


def given_prompts(body: dict[str, Any]) -> list[str | list[int]]:
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


def completion_tokens(prompt: str | list[int], max_model_len: int) -> Tokens:
    return text.pieces(prompt, max_model_len + 1) if isinstance(prompt, str) else prompt


def check_prompt(tokens: Tokens, max_model_len: int, vocab: int) -> None:
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


def text_of(prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else text.detokenized(prompt)
