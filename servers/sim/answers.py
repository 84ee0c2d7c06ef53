"""The bytes of an answer, key by key as captured from vLLM 0.32: events of a stream, or the whole
body. No sockets."""

import time
import zlib
from collections.abc import Sequence
from typing import Any

from servers.sim import scripts, text
from servers.sim.errors import dumps
from servers.sim.wire import Ask

FINGERPRINT = "vllm-0.32.0-simulated"
DONE = b"data: [DONE]\n\n"
_SLOT = "\x00"  # stands for the text of an event while its bytes are prepared
_UNTOLD = ("refusal", "annotations", "audio", "function_call")
_LOGPROB = -0.25  # of what is said; alternatives lie a nat apart


class Answer:
    """How all choices of one request are told. `vocab`: ids of tokens are below it."""

    def __init__(self, ask: Ask, request_id: str, vocab: int) -> None:
        self.ask = ask
        self.id = ("chatcmpl-" if ask.chat else "cmpl-") + request_id
        self._vocab = vocab
        kind = "chat.completion" if ask.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": int(time.time()), "model": ask.model}
        self._head = head
        self._chunk = head | {"object": kind + ".chunk" if ask.chat else kind}

    # ------------------------------------------------------------------------------ in a stream

    def plain(self, index: int) -> tuple[bytes, bytes]:
        """What stands around the text's JSON in an event that says nothing else."""
        before, after = self.token(index, {"content": _SLOT}, _SLOT, 0, [], None).split(
            dumps(_SLOT))
        return before, after

    def role(self, index: int) -> bytes:
        """vLLM sends the role with the first token, right before it."""
        choice = {"index": index, "delta": {"role": "assistant", "content": ""},
                  "logprobs": None, "finish_reason": None}
        event = self._chunk | {"choices": [choice]} | self._continuous(index, 0)
        return _event(event | {"prompt_token_ids": self._prompt_ids(0), "prompt_text": None})

    def token(self, index: int, delta: scripts.Delta, said: str, tokens: int,
              ids: Sequence[int], logprobs: Any, first: bool = False) -> bytes:
        """`tokens`: of this choice, with this one."""
        choice = self._choice(index, delta, said, None, None, ids, logprobs, first)
        return _event(self._chunk | {"choices": [choice]} | self._continuous(index, tokens))

    def finish(self, index: int, delta: scripts.Delta, said: str, tokens: int,
               ids: Sequence[int], logprobs: Any, reason: str, stop: str | None,
               first: bool = False) -> bytes:
        """The finishing chunk: with text when cut by length, else without."""
        choice = self._choice(index, delta, said, reason, stop, ids, logprobs, first)
        end = {} if self.ask.shape.include_usage else {"system_fingerprint": FINGERPRINT}
        return _event(self._chunk | {"choices": [choice]} | self._continuous(index, tokens) | end)

    def usage(self, output_tok: int) -> bytes:
        usage = _usage(self.ask.prompt_tok, output_tok)
        return _event(self._chunk | {"choices": [], "usage": usage,
                                     "system_fingerprint": FINGERPRINT})

    def _choice(self, index: int, delta: scripts.Delta, said: str, reason: str | None,
                stop: str | None, ids: Sequence[int], logprobs: Any, first: bool,
                ) -> dict[str, Any]:
        token_ids = list(ids) if self.ask.shape.token_ids else None
        if not self.ask.chat:
            prompt_ids = self._prompt_ids(self.prompt_of(index)) if first else None
            return {"index": index, "text": said, "logprobs": logprobs, "finish_reason": reason,
                    "stop_reason": stop, "prompt_token_ids": prompt_ids, "token_ids": token_ids}
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return choice | ({} if reason is None else {"stop_reason": stop}) | {
            "token_ids": token_ids}

    def _continuous(self, index: int, tokens: int) -> dict[str, Any]:
        if not self.ask.shape.continuous_usage:
            return {}
        details = {"completion_tokens_details": None} if self.ask.chat else {}
        prompt = len(self.ask.prompts[self.prompt_of(index)])
        return {"usage": _usage(prompt, tokens) | details}

    # ------------------------------------------------------------------------------ as one body

    def whole(self, choices: Sequence[dict[str, Any]], output_tok: int) -> bytes:
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        body: dict[str, Any] = self._head | {
            "choices": list(choices), "service_tier": None, "system_fingerprint": FINGERPRINT,
            "usage": _usage(self.ask.prompt_tok, output_tok) | details}
        if self.ask.chat:
            body |= {"prompt_logprobs": None, "prompt_token_ids": self._prompt_ids(0),
                     "prompt_text": None}
        return dumps(body | dict.fromkeys(("kv_transfer_params", "ec_transfer_params", "metrics")))

    def message(self, index: int, content: str | None, calls: Sequence[scripts.Delta],
                reason: str, stop: str | None, ids: Sequence[int], logprobs: Any,
                ) -> dict[str, Any]:
        message = {"role": "assistant", "content": content, **dict.fromkeys(_UNTOLD)}
        message |= {"tool_calls": list(calls)} if calls else {}
        return {"index": index, "message": message | {"reasoning": None}, "logprobs": logprobs,
                "finish_reason": reason, "stop_reason": stop,
                "token_ids": list(ids) if self.ask.shape.token_ids else None,
                "routed_experts": None}

    def completion(self, index: int, said: str, reason: str, stop: str | None,
                   ids: Sequence[int], logprobs: Any) -> dict[str, Any]:
        at, asked = self.prompt_of(index), self.ask.sampling.logprobs
        echoed = self.ask.shape.echo and asked is not None
        return {"index": index, "text": said, "logprobs": logprobs, "finish_reason": reason,
                "stop_reason": stop, "token_ids": list(ids) if self.ask.shape.token_ids else None,
                "prompt_logprobs": self._prompt_logprobs(at, asked or 0) if echoed else None,
                "prompt_token_ids": self._prompt_ids(at), "routed_experts": None}

    # ----------------------------------------------------------------------------------- tokens

    def prompt_of(self, index: int) -> int:
        """Choices of the first prompt come first."""
        return index // self.ask.sampling.n

    def ids(self, tokens: Sequence[str]) -> list[int]:
        """An EOS, which has no text, is the last one of the vocabulary."""
        return [self._vocab - 1 if t == "" else i
                for t, i in zip(tokens, text.token_ids(tokens, self._vocab), strict=True)]

    def echoed(self, index: int) -> str:
        return self.ask.texts[self.prompt_of(index)] if self.ask.texts else ""

    def prompt_pieces(self, index: int) -> list[str]:
        tokens = self.ask.prompts[self.prompt_of(index)]
        return [text.detokenized([t]) if isinstance(t, int) else t for t in tokens]

    def _prompt_ids(self, prompt: int) -> list[int] | None:
        if not self.ask.shape.token_ids:
            return None
        return text.token_ids(self.ask.prompts[prompt], self._vocab)

    def _prompt_logprobs(self, prompt: int, asked: int) -> list[Any]:
        tokens = self.prompt_pieces(prompt * self.ask.sampling.n)[1:]
        return [None, *({str(i): {"logprob": p, "rank": r + 1, "decoded_token": t} for r, (t, p, i)
                         in enumerate(self._likely(token, max(asked, 1) + 1))}
                        for token in tokens)]

    def _likely(self, token: str, n: int) -> list[tuple[str, float, int]]:
        """(text, logprob, id) of `token` and of n − 1 others, the likeliest first."""
        seed = zlib.crc32(token.encode(errors="replace"))
        others = [text.WORDS[k % len(text.WORDS)] for k in range(seed, seed + n)]
        known = dict.fromkeys([token, *others])
        return [(t, _LOGPROB - k, i) for k, (t, i) in enumerate(
            zip(list(known)[:n], self.ids(list(known)[:n]), strict=True))]

    def chat_logprobs(self, tokens: Sequence[str]) -> Any:
        """None where none were asked for."""
        asked = self.ask.sampling.logprobs
        if asked is None:
            return None
        return {"content": [_logprob(t, _LOGPROB) | {"top_logprobs": [
            _logprob(other, p) for other, p, _ in self._likely(t, asked)]} for t in tokens]}

    def completion_logprobs(self, tokens: Sequence[str], offset: int, echoed: int = 0) -> Any:
        """`offset`: characters before the first token; `echoed`: so many are the prompt's."""
        asked = self.ask.sampling.logprobs
        if asked is None:
            return None
        offsets = [offset + sum(map(len, tokens[:k])) for k in range(len(tokens))]
        unknown = 1 if echoed else 0  # nothing foretells the first one
        return {"text_offset": offsets,
                "token_logprobs": [None] * unknown + [_LOGPROB] * (len(tokens) - unknown),
                "tokens": list(tokens),
                "top_logprobs": [None] * unknown + [
                    {t: p for t, p, _ in self._likely(token, max(asked, 1))}
                    for token in tokens[unknown:]]}


def _usage(prompt: int, output_tok: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + output_tok,
            "completion_tokens": output_tok}


def _logprob(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode(errors="replace"))}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"
