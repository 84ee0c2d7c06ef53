"""Servers that speak OpenAI's dialect and are no vLLM: what each sends (tests/data/dialects; the
first line of a file says whether it was recorded) comes out as the same kind of record, and nobody
has to say which server it is."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadgen import openai
from loadgen.record import Outcome, Recorder, RequestRecord, Shot

DATA = Path(__file__).parent / "data" / "dialects"
MS = 1_000_000
OK, ERROR = Outcome.OK, Outcome.SERVER_ERROR_EVENT

# stream: (outcome, finish_reason, token events, the first that is visible, output tokens, source,
#          cached tokens, what the error says)
STREAMS: dict[str, tuple[Any, ...]] = {
    "sglang_chat": (OK, "stop", 4, 3, 5, "usage", 8, None),
    "sglang_error": (ERROR, None, 1, 1, 1, "events", None,
                     "INTERNAL_SERVER_ERROR: Generation aborted."),
    "tgi_chat": (OK, "stop", 3, 1, 4, "usage", None, None),
    "tgi_completions": (OK, "eos_token", 3, 1, 3, "usage", None, None),
    "tgi_error": (ERROR, None, 1, 1, 1, "events", None,
                  "generation: Request failed during generation: Server error: CUDA out of memory"),
    "llamacpp_chat": (OK, "stop", 2, 1, 3, "usage", None, None),
    "llamacpp_chat_2025": (OK, "length", 2, 1, 2, "usage", None, None),
    "llamacpp_thinks": (OK, "stop", 3, 3, 3, "events", None, None),
    "llamacpp_error": (ERROR, None, 1, 1, 1, "events", None, "server_error: Compute error."),
    "llamacpp_error_2025": (ERROR, None, 0, None, None, None, None,
                            "exceed_context_size_error: the request exceeds the available"),
    "ollama_chat": (OK, "stop", 4, 3, 5, "usage", None, None),
    "ollama_length": (OK, "length", 2, 1, 2, "events", None, None),
    "lmstudio_chat": (OK, "stop", 2, 1, 2, "events", None, None),
    "lmstudio_error": (ERROR, None, 1, 1, 1, "events", None, "error: The model has crashed"),
    "trtllm_chat": (OK, "length", 3, 1, 3, "usage", None, None),
    "trtllm_error": (ERROR, None, 1, 1, 1, "events", None,
                     "InternalServerError: Executor worker died"),
    "transformers_serve": (OK, "length", 1, 1, 8, "usage", None, None)}


def record(parts: list[bytes], status: int = 200, kind: str = "text/event-stream",
           bulk: bool = False) -> RequestRecord:
    """Of an answer that comes in these reads, a millisecond apart."""
    recorder = Recorder(Shot(leg="", shard=0, seq=0, session=0, turn=0, cls="", due_ns=0,
                             body=b""))
    recorder.sent(0)
    recorder.response(1, status, kind, False)
    stamps = [(n + 1) * MS for n in range(len(parts))]
    if bulk:
        recorder.feed_reads(stamps, parts)
    else:
        for at, part in zip(stamps, parts, strict=True):
            recorder.feed(at, part)
    return recorder.end((len(parts) + 1) * MS)


def events(name: str) -> list[bytes]:
    return [x + b"\n\n" for x in (DATA / f"{name}.sse").read_bytes().split(b"\n\n") if x]


def test_each_stream_is_looked_at_and_says_where_it_comes_from() -> None:
    assert {p.stem for p in DATA.glob("*.sse")} == set(STREAMS)
    for name in STREAMS:
        assert events(name)[0].startswith((b": unrecorded; after ", b": recorded from ")), name


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_of_each_server_becomes_a_record(name: str, bulk: bool) -> None:
    outcome, finish, n_events, visible, tokens, source, cached, error = STREAMS[name]
    r = record(events(name), bulk=bulk)
    assert (r.outcome, r.finish_reason, r.n_events) == (outcome, finish, n_events), r
    assert (r.output_tok, r.tok_source, r.cached_tok) == (tokens, source, cached), r
    assert (r.error or "").startswith(error or ""), r
    assert (r.error is None) == (error is None)
    if visible is None:
        assert r.first_visible_ns is None
    else:
        assert r.first_ns is not None
        at = [r.first_ns + 1000 * sum(r.gaps_us[:n]) for n in range(n_events)]
        assert r.first_visible_ns == at[visible - 1]


@pytest.mark.parametrize("name", STREAMS)
def test_wherever_the_network_cuts_a_stream_it_says_the_same(name: str) -> None:
    data = b"".join(events(name))
    whole = record([data])
    for size in (1, 7, 64):
        r = record([data[i:i + size] for i in range(0, len(data), size)], bulk=True)
        assert (r.outcome, r.finish_reason, r.n_events, r.output_tok, r.error) == (
            whole.outcome, whole.finish_reason, whole.n_events, whole.output_tok, whole.error)


ERRORS = json.loads((DATA / "errors.json").read_text(encoding="utf-8"))["errors"]


@pytest.mark.parametrize(("who", "status", "body", "outcome", "kind"), ERRORS)
def test_an_error_of_each_server_is_told_in_its_words(
        who: str, status: int, body: Any, outcome: str, kind: str | None) -> None:
    raw = (body if isinstance(body, str) else json.dumps(body)).encode()
    r = record([raw], status, "application/json")
    assert (r.outcome, r.status) == (Outcome(outcome), status)
    inner = body.get("error", body) if isinstance(body, dict) else body
    words = (inner.get("message") or inner.get("detail")) if isinstance(inner, dict) else inner
    assert r.error == f"HTTP {status}: {words}"
    error = openai.error_body(raw, status)
    assert (error.type, error.code) == (kind, inner.get("code") or status
                                        if isinstance(inner, dict) else status)


@pytest.mark.parametrize("body", [body for _, _, body, _, _ in ERRORS if isinstance(body, dict)])
def test_an_error_with_status_200_that_is_called_a_stream_is_told_in_its_words(body: Any) -> None:
    r = record([json.dumps(body).encode()])
    inner = body.get("error", body)
    words = (inner.get("message") or inner.get("detail")) if isinstance(inner, dict) else inner
    assert r.error == f"HTTP 200: {words}"
    assert r.outcome is (Outcome.BAD_STREAM if "detail" in body else Outcome.SERVER_ERROR_EVENT)


def test_an_empty_end_is_a_token_where_a_length_cut_half_a_character() -> None:
    """vLLM's, unlike Ollama's: a token it is, though its text is empty."""
    cut = b'{"choices":[{"delta":{"content":""},"finish_reason":"length"}]}'
    assert openai.read(cut, False).token
    assert not openai.read(cut[:-1] + b',"system_fingerprint":"fp_ollama"}', False).token
    assert not openai.read(cut.replace(b"length", b"stop"), False).token
