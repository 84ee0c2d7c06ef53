"""What the null server answers: the bytes that vLLM 0.32 sends, chunk by chunk (captures:
tests/data/vllm/16*.http, 13*.http)."""

import json
from typing import Any

_TEXTS = ("ython", " you", "合北京", ".no", " From", "", "组成", "/", " 您", " the", "行的系统会",
          " of", "\\n", " and", "eng", "天代码吗")  # an empty one: half a Chinese character
HEAD = (b"HTTP/1.1 200 OK\r\ndate: Fri, 20 Nov 2026 23:03:32 GMT\r\nserver: uvicorn\r\n"
         b"content-type: text/event-stream; charset=utf-8\r\nvary: Origin\r\n"
         b"transfer-encoding: chunked\r\n\r\n")
_START = '{"id":"chatcmpl-%s","object":"chat.completion.chunk","created":1795215812,"model":"tiny",'


class Chunks:
    """The chunks of one answer, framed. `texts` come in turn."""

    def __init__(self, ident: str, tokens: int, usage: bool) -> None:
        start = _START % ident
        choice = ('"choices":[{"index":0,"delta":{%s},"logprobs":null,"finish_reason":null%s}]%s}')
        self.role = _event(start + choice % (
            '"role":"assistant","content":""', "",
            ',"prompt_token_ids":null,"prompt_text":null'))
        self.texts = [_event(start + choice % (f'"content":"{t}"', ',"token_ids":null', ""))
                      for t in _TEXTS[:tokens]]
        self.finish = _event(start + '"choices":[{"index":0,"delta":{"content":" end"},"logprobs":'
                             'null,"finish_reason":"length","stop_reason":null,"token_ids":null}]}')
        self.tail = [_event("[DONE]")]
        if usage:
            counts = f'"prompt_tokens":53,"total_tokens":{53 + tokens},"completion_tokens":{tokens}'
            self.tail.insert(0, _event(f'{start}"choices":[],"usage":{{{counts}}},'
                                       '"system_fingerprint":"vllm-0.32.0-eaafc682"}'))


def _event(data: str) -> bytes:
    raw = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(raw), raw)


def as_json(status: int, value: object) -> bytes:
    body = json.dumps(value).encode()
    return (b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (status, len(body), body))


def to_get(head: bytes) -> bytes:
    path = head.split(b" ", 2)[1]
    if path == b"/v1/models":
        return as_json(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})
    return as_json(200 if path == b"/health" else 404, {})


def whole(asked: dict[str, Any]) -> bytes:
    """To a request that is not to be streamed; what is no chat (/tokenize) gets a 404."""
    if not asked.get("messages"):
        return as_json(404, {})
    n = int(asked.get("max_tokens") or 16)
    message = {"role": "assistant", "content": " end" * n}
    return as_json(200, {"object": "chat.completion", "model": "tiny", "choices": [
        {"index": 0, "message": message, "finish_reason": "length"}], "usage": {
            "prompt_tokens": 53, "completion_tokens": n, "total_tokens": 53 + n}})
