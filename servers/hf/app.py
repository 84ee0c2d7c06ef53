"""The baseline that people know: a small web app over Hugging Face's `model.generate`.

    python app.py MODEL [--host H] [--port P] …

Runs in whatever Python has torch and transformers, which need not be loadgen's: nothing else but
the standard library is imported. Each request generates in a thread of its own, with a KV cache of
its own, and nobody counts them: memory is what limits how many there may be, as in such apps. Each
token is an event (TextIteratorStreamer holds text back until a word is whole: fine for a reader,
wrong for a stopwatch).

Out of memory is HTTP 500, or an error event once tokens have come, and a line in the log; the
server goes on.
"""

import argparse
import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers

DEFAULT_TOK = 512  # of an answer, where a request does not say
MOST_BYTES = 64 * 2**20  # of a request
STACK_BYTES = 2**20
M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3  # of mallopt
_SPENT = ("out of memory", "can't allocate memory", "cannot allocate memory",
          "can't start new thread")


_NO_ROOM = (b'HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n'
            b'Content-Length: 122\r\nConnection: close\r\n\r\n'
            b'{"error":{"message":"out of memory: not even room to read the request",'
            b'"type":"OutOfMemoryError","param":null,"code":500}}')


class Refused(ValueError):
    """A request that cannot be answered, in words for its sender."""


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out: CUDA's, or the host's, which PyTorch tells as a RuntimeError."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError | OSError)
        and any(x in str(error).lower() for x in _SPENT))


def say(level: str, text: str) -> None:
    sys.stdout.write(f"{level} {time.strftime('%m-%d %H:%M:%S')} [app.py] {text}\n")  # in one piece
    sys.stdout.flush()


# ------------------------------------------------------------------------------------- the model


class Texts:
    """Of tokens that come one by one: what each adds to the text, "" for half a character."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from = self._said = 0  # what is decoded for its context; what was told already

    def add(self, token: int) -> str:
        self._ids.append(token)
        before = self._decode(self._ids[self._from:self._said])
        now = self._decode(self._ids[self._from:])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._from, self._said = self._said, len(self._ids)
        return now[len(before):]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class Streamer:
    """What `generate` hands its tokens to: at first the prompt's, then one after the other."""

    def __init__(self, tell: Any) -> None:
        self._tell, self._prompt = tell, True
        self.last = -1
        self.tokens = 0

    def put(self, value: Any) -> None:
        if self._prompt:
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self.tokens += 1
            self.last = token
            self._tell(token)

    def end(self) -> None:
        pass


class Model:
    """`generate` may be called by many threads at once."""

    def __init__(self, options: argparse.Namespace) -> None:
        began = time.monotonic()
        self.name: str = options.served_model_name or options.model
        self._static = options.cache == "static"
        trust = {"trust_remote_code": options.trust_remote_code}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, **trust)
        self.model = _loaded(options, trust)
        self.model.eval()
        config = self.model.config
        self.longest = int(options.max_model_len
                           or getattr(config, "max_position_embeddings", None) or 2**20)
        eos = self.model.generation_config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos])
        device = self.model.device
        say("INFO", "facts: " + json.dumps({
            "version": transformers.__version__, "torch": torch.__version__,
            "device": str(device), "dtype": str(self.model.dtype).removeprefix("torch."),
            "max_model_len": self.longest, "cache": options.cache,
            "load_format": options.load_format, "weights_gib": round(
                self.model.get_memory_footprint() / 2**30, 3),
            "load_s": round(time.monotonic() - began, 1)}))

    def prompt(self, body: dict[str, Any], chat: bool) -> list[int]:
        """The token ids of a request."""
        if not chat:
            given = body.get("prompt")
            if isinstance(given, list) and all(isinstance(x, int) for x in given):
                return given
            if not isinstance(given, str) or not given:
                raise Refused("prompt must be a text or a list of token ids")
            ids: list[int] = self.tokenizer(given)["input_ids"]
            return ids
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refused("messages must be a list that is not empty")
        try:
            text = (self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False)
                if self.tokenizer.chat_template else "\n".join(m["content"] for m in messages))
        except (KeyError, TypeError, ValueError) as e:
            raise Refused(f"messages: {e}") from e
        own = bool(self.tokenizer.chat_template)  # then special tokens stand in the text
        made: list[int] = self.tokenizer(text, add_special_tokens=not own)["input_ids"]
        return made

    def generate(self, ids: Sequence[int], wanted: dict[str, Any], streamer: Streamer) -> None:
        inputs = torch.tensor([list(ids)], device=self.model.device)
        if self._static:  # all of it at once, so that who has begun will also end
            wanted["past_key_values"] = transformers.StaticCache(
                config=self.model.config, max_cache_len=len(ids) + wanted["max_new_tokens"])
        with torch.inference_mode():
            self.model.generate(inputs, attention_mask=torch.ones_like(inputs),
                                streamer=streamer, **wanted)

    def warm_up(self) -> None:
        self.generate(self.tokenizer("Hello")["input_ids"][:4] or [0],
                      {"max_new_tokens": 2, "do_sample": False}, Streamer(lambda _: None))


def _loaded(options: argparse.Namespace, trust: dict[str, Any]) -> Any:
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    if options.attn_implementation:
        trust = trust | {"attn_implementation": options.attn_implementation}
    auto = transformers.AutoModelForCausalLM
    if options.load_format == "dummy":  # the shape with random weights
        config = transformers.AutoConfig.from_pretrained(options.model)
        model = auto.from_config(config, dtype=dtype, **trust)
        with contextlib.suppress(OSError):  # where it ends, and its sampling
            model.generation_config = transformers.GenerationConfig.from_pretrained(options.model)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():  # over all of them
        return auto.from_pretrained(options.model, dtype=dtype,
                                    device_map=options.device_map, **trust)
    return auto.from_pretrained(options.model, dtype=dtype, **trust)


def wanted_of(body: dict[str, Any], room_tok: int) -> dict[str, Any]:
    """What `generate` is to be told of a request; what is not said is the model's own default."""
    for field in ("stop", "tools", "response_format"):
        if body.get(field):
            raise Refused(f"{field}: model.generate behind a small web app does not do that")
    if body.get("n", 1) != 1:
        raise Refused("n: one answer for each request")
    try:
        asked = body.get("max_completion_tokens") or body.get("max_tokens") or DEFAULT_TOK
        wanted: dict[str, Any] = {"max_new_tokens": int(asked)}
        given = {k: as_(0 + body[k]) for k, as_ in (  # 0 +: a text is no number
            ("temperature", float), ("top_p", float), ("top_k", int),
            ("repetition_penalty", float)) if body.get(k) is not None}
    except (TypeError, ValueError) as e:
        raise Refused(f"sampling: {e}") from e
    if wanted["max_new_tokens"] < 1 or wanted["max_new_tokens"] > room_tok:
        raise Refused(f"max_tokens must be from 1 to {room_tok}: what the model has room for "
                      "after this prompt")
    if not 0 <= given.get("temperature", 1) <= 2 or not 0 < given.get("top_p", 1) <= 1:
        raise Refused("temperature must be from 0 to 2, top_p from more than 0 to 1")
    if given.get("temperature") == 0:
        del given["temperature"]
        wanted["do_sample"] = False
    elif given.keys() & {"temperature", "top_p", "top_k"}:
        wanted["do_sample"] = True  # else a model's default of false ignores them in silence
    if body.get("ignore_eos"):
        wanted["min_new_tokens"] = wanted["max_new_tokens"]
    return wanted | given


# ------------------------------------------------------------------------------------- the wire


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "App"

    def do_GET(self) -> None:
        if self.path == "/health":
            self.whole(200, {})
        elif self.path == "/v1/models":
            self.whole(200, {"object": "list", "data": [
                {"id": self.server.model.name, "object": "model", "owned_by": "transformers"}]})
        else:
            self.whole(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        self._begun = False  # a status line went out
        problem: tuple[int, str, str] | None = None
        try:
            body = self._body()
            if self.path in ("/v1/chat/completions", "/v1/completions"):
                self.server.enter()
                try:
                    Answer(self, body, self.path == "/v1/chat/completions").give()
                finally:
                    self.server.leave()
            elif self.path == "/tokenize":
                ids = self.server.model.prompt(body, "messages" in body)
                self.whole(200, {"count": len(ids), "max_model_len": self.server.model.longest})
            else:
                self.whole(404, {"detail": "Not Found"})
        except Refused as e:
            problem = 400, "BadRequestError", str(e)
        except Exception as e:  # noqa: BLE001  (whatever it is, client and log are told)
            if isinstance(e, OSError) and not is_memory(e):  # but a client that has left
                self.close_connection = True
            else:
                problem = 500, self._note(e), f"{e}" or type(e).__name__
        if problem is not None:  # by now nothing holds the tensors of the one that failed
            self.fail(*problem)

    def _note(self, e: Exception) -> str:
        """A log entry of a failure; the error's type for the client."""
        what = f"{type(e).__name__}: {e}"
        if not is_memory(e):
            say("ERROR", what)
            traceback.print_exc(file=sys.stdout)
            return type(e).__name__
        say("ERROR", f"out of memory while {self.server.running} requests were generating: {what}")
        return "OutOfMemoryError"

    def fail(self, status: int, kind: str, message: str) -> None:
        if status >= 500 and torch.cuda.is_available():
            torch.cuda.empty_cache()
        error = {"error": {"message": message, "type": kind, "param": None, "code": status}}
        with contextlib.suppress(OSError):
            if self._begun:
                self.event(error)
                self.done()
            else:
                self.whole(status, error)

    def event(self, value: object) -> None:
        """One event, in a chunk; the head goes with the first."""
        data = b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        self._chunk(data + b"\n\n")

    def done(self) -> None:
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, data: bytes) -> None:
        if not self._begun:
            self._begun = True
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _body(self) -> dict[str, Any]:
        try:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if 0 < size <= MOST_BYTES else None
        except ValueError as e:
            raise Refused(f"the body is no JSON: {e}") from e
        if not isinstance(body, dict):
            raise Refused("the body must be a JSON object")
        named = body.get("model")
        if named not in (None, self.server.model.name):
            raise Refused(f"The model `{named}` does not exist; this one is "
                          f"`{self.server.model.name}`")
        return body

    def whole(self, status: int, value: object) -> None:
        self._begun = True
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Not each request."""


class Answer:
    """One request's, streamed or whole."""

    def __init__(self, handler: Handler, body: dict[str, Any], chat: bool) -> None:
        self._handler, self._body, self._chat = handler, body, chat
        self._model = handler.server.model
        self._id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex[:16]
        self._stream = bool(body.get("stream"))
        self._texts = Texts(self._model.tokenizer)
        self._told: list[str] = []

    def give(self) -> None:
        ids = self._model.prompt(self._body, self._chat)
        wanted = wanted_of(self._body, self._model.longest - len(ids))
        self._most: int = wanted["max_new_tokens"]
        streamer = Streamer(self._token)
        self._model.generate(ids, wanted, streamer)
        reason = "stop" if streamer.last in self._model.eos else "length"
        usage = {"prompt_tokens": len(ids), "completion_tokens": streamer.tokens,
                 "total_tokens": len(ids) + streamer.tokens}
        if not self._stream:
            text = "".join(self._told)
            what = {"message": {"role": "assistant", "content": text}} if self._chat else {
                "text": text}
            self._handler.whole(200, self._envelope([
                {"index": 0, **what, "finish_reason": reason}], "") | {"usage": usage})
            return
        if reason == "stop":  # a length was told with the last token
            self._choice({} if self._chat else "", reason)
        if (self._body.get("stream_options") or {}).get("include_usage"):
            self._handler.event(self._envelope([]) | {"usage": usage})
        self._handler.done()

    def _token(self, token: int) -> None:
        """Told by `generate`. Raises OSError if the client has left, which ends it."""
        first = not self._told
        self._told.append(self._texts.add(token))
        if not self._stream:
            return
        if first and self._chat:
            self._choice({"role": "assistant", "content": ""})
        if token not in self._model.eos:
            last = "length" if len(self._told) == self._most else None
            self._choice({"content": self._told[-1]} if self._chat else self._told[-1], last)

    def _choice(self, what: object, reason: str | None = None) -> None:
        self._handler.event(self._envelope([{
            "index": 0, "delta" if self._chat else "text": what, "finish_reason": reason}]))

    def _envelope(self, choices: list[Any], suffix: str = ".chunk") -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": int(time.time()),
                "model": self._model.name, "choices": choices}


class App(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], model: Model) -> None:
        self.model, self.running = model, 0
        self._lock = threading.Lock()
        super().__init__(address, Handler)

    def enter(self) -> None:
        with self._lock:
            self.running += 1

    def leave(self) -> None:
        with self._lock:
            self.running -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Of a connection: no memory for its thread or its first bytes, or it broke."""
        error = sys.exc_info()[1]
        if isinstance(error, Exception) and is_memory(error):
            say("ERROR", f"out of memory while {self.running} requests were generating: "
                         f"{type(error).__name__}: {error}")
            with contextlib.suppress(OSError):
                request.settimeout(1)
                request.recv(2**16)  # what is closed with bytes unread is reset
                request.sendall(_NO_ROOM)


# ------------------------------------------------------------------------------------- the start


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="transformers server", allow_abbrev=False)
    parser.add_argument("model", help="folder or name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name")
    parser.add_argument("--dtype", default="bfloat16",
                        choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--device-map", default="auto", help="where there are GPUs")
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"],
                        help="dummy: the shape with random weights")
    parser.add_argument("--cache", default="dynamic", choices=["dynamic", "static"],
                        help="KV cache of a request: grows, or is taken whole before it begins")
    parser.add_argument("--max-model-len", type=int, help="default: the model's")
    parser.add_argument("--attn-implementation")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--memory-headroom-mb", type=int, metavar="MB",
                        help="how much more memory of the host than now requests may take in all")
    return parser.parse_args(words)


def limit(headroom_mb: int) -> None:
    """From now on this process may grow by so much."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + headroom_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    say("INFO", f"memory is limited to {headroom_mb} MB more than now")


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if options.memory_headroom_mb:  # address space that is only reserved counts, too
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)  # what is freed is given back
        threading.stack_size(STACK_BYTES)
    model = Model(options)
    model.warm_up()
    if options.memory_headroom_mb:
        limit(options.memory_headroom_mb)
    app = App((options.host, options.port), model)
    say("INFO", f"Application startup complete: {model.name} at {options.host}:{options.port}")
    with contextlib.suppress(KeyboardInterrupt):
        app.serve_forever()


if __name__ == "__main__":
    main()
