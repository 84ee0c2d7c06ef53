"""What `servers/hf/app.py` refuses of a request, in its words. No sockets."""

from typing import Any

from servers.sim.errors import Refused
from servers.sim.wire import Ask

DEFAULT_TOK = 512  # of an answer, where a request does not say


def check_fields(body: dict[str, Any]) -> None:
    """Raises Refused."""
    for field in ("stop", "tools", "response_format"):
        if body.get(field):
            raise Refused(400, f"{field}: model.generate behind a small web app does not do that")
    given = body.get("prompt")
    if isinstance(given, list) and not all(isinstance(x, int) for x in given):
        raise Refused(400, "prompt must be a text or a list of token ids")
    if body.get("n", 1) != 1:
        raise Refused(400, "n: one answer for each request")


def check_room(ask: Ask, max_model_len: int) -> None:
    """An answer is not cut to what fits. Raises Refused."""
    room_tok = max_model_len - ask.prompt_tok
    if (ask.sampling.max_tokens or DEFAULT_TOK) > room_tok:
        raise Refused(400, f"max_tokens must be from 1 to {room_tok}: what the model has room for "
                           "after this prompt")


def out_of_memory(words: str) -> Refused:
    return Refused(500, words, "OutOfMemoryError")
