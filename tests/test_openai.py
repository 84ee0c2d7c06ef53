"""The OpenAI dialect: request bodies to the byte, and what each kind of event means."""

import json
from typing import Any

import pytest

from loadgen import openai
from loadgen.openai import BadEvent, ServerError
from loadgen.scenario import RequestClass, Sampling
from tests import captures

FULL = ("The engine is currently busy and cannot accept new requests. Please try again later or "
        "on a different instance.")
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def cls(**sampling: Any) -> RequestClass:
    return RequestClass(name="a", kind="chat", prompt_tok=9, output_tok=9,
                        sampling=Sampling(**sampling))


def chat(delta: object, finish: str | None = None, **top: Any) -> bytes:
    """The payload of a chat chunk."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return json.dumps({"id": "x", "choices": [choice], **top}).encode()


def cmpl(text: str, finish: str | None = None, **choice: Any) -> bytes:
    return json.dumps({"id": "x", "choices": [
        {"index": 0, "text": text, "finish_reason": finish, **choice}]}).encode()


# ------------------------------------------------------------------------------------- requests


def test_chat_body_is_these_bytes() -> None:
    assert openai.body("chat", "qwen", "Hi \u4f60", 5, cls()) == (
        '{"model":"qwen","messages":[{"role":"user","content":"Hi \u4f60"}],"max_tokens":5,'
        '"stream":true,"stream_options":{"include_usage":true}}').encode()


def test_completions_body_is_these_bytes() -> None:
    assert openai.body("completions", "qwen", 'a "b"\n', 5, cls()) == (
        b'{"model":"qwen","prompt":"a \\"b\\"\\n","max_tokens":5,'
        b'"stream":true,"stream_options":{"include_usage":true}}')


def test_sampling_is_sent_where_it_is_given_and_zero_is_given() -> None:
    sent = json.loads(openai.body("chat", "m", "p", 5, cls(
        temperature=0.0, top_p=0.9, ignore_eos=False, seed=0, min_tokens=0)))
    assert {k: v for k, v in sent.items() if k not in (
        "model", "messages", "max_tokens", "stream", "stream_options")} == {
        "temperature": 0.0, "top_p": 0.9, "ignore_eos": False, "seed": 0, "min_tokens": 0}


def test_absent_sampling_is_left_to_the_server() -> None:
    assert "null" not in openai.body("chat", "m", "p", 5, cls(top_p=0.5)).decode()
    assert set(json.loads(openai.body("chat", "m", "p", 5, cls()))) == {
        "model", "messages", "max_tokens", "stream", "stream_options"}


def test_a_conversation_is_sent_whole_or_in_one_piece() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    as_chat = json.loads(openai.conversation("chat", "m", messages, 5, Sampling()))
    as_text = json.loads(openai.conversation("completions", "m", messages, 5, Sampling()))
    assert (as_chat["messages"], as_text["prompt"]) == (messages, "a\nb")
    assert "prompt" not in as_chat
    assert "messages" not in as_text


# --------------------------------------------------------------------------------- token events

TOOL = [{"index": 0, "function": {"arguments": "nu"}}]
READ = {
    # what it is: (payload, first, is a token, is visible, its text)
    "role only": (chat({"role": "assistant", "content": ""}), True, False, False, ""),
    "role only, content null": (chat({"role": "assistant", "content": None}), True, False, False,
                                ""),
    "role with text": (chat({"role": "assistant", "content": "a"}), True, True, True, "a"),
    "role with reasoning": (chat({"role": "assistant", "content": "", "reasoning": "a"}), True,
                            True, False, ""),
    "role with a tool call": (chat({"role": "assistant", "content": None, "tool_calls": TOOL}),
                              True, True, True, ""),
    "role and finish at once": (chat({"role": "assistant", "content": ""}, "length"), True, True,
                                False, ""),
    "role again in each chunk": (chat({"role": "assistant", "content": ""}), False, True, False,
                                 ""),
    "text": (chat({"content": "a"}), False, True, True, "a"),
    "text in the first event": (chat({"content": "a"}), True, True, True, "a"),
    "half a character": (chat({"content": ""}), False, True, False, ""),
    "text with the finish": (chat({"content": "a"}, "length"), False, True, True, "a"),
    "finish only": (chat({}, "stop"), False, False, False, ""),
    "finish only, delta null": (chat(None, "stop"), False, False, False, ""),
    "finish only, content null": (chat({"content": None}, "stop"), False, False, False, ""),
    "reasoning_content": (chat({"reasoning_content": "a"}), False, True, False, ""),
    "reasoning": (chat({"reasoning": "a"}), False, True, False, ""),
    "both spellings of reasoning": (chat({"reasoning": "a", "reasoning_content": "a"}), False,
                                    True, False, ""),
    "empty reasoning": (chat({"reasoning_content": ""}), False, True, False, ""),
    "tool call": (chat({"content": None, "tool_calls": TOOL}), False, True, True, ""),
    "no tool call": (chat({"tool_calls": []}), False, False, False, ""),
    "function call": (chat({"function_call": {"name": "f"}}), False, True, True, ""),
    "completions text": (cmpl("a"), False, True, True, "a"),
    "completions, first": (cmpl("a"), True, True, True, "a"),
    "completions, half a character": (cmpl(""), False, True, False, ""),
    "completions, cut in half a character": (cmpl("", "length"), False, True, False, ""),
    "completions, end of sequence": (cmpl("", "stop"), False, False, False, ""),
    "completions, last text": (cmpl("a", "stop"), False, True, True, "a"),
    "usage only": (b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}', False,
                   False, False, ""),
    "no choices at all": (b'{"id":"x"}', False, False, False, ""),
    "choices null": (b'{"choices":null}', False, False, False, ""),
}


@pytest.mark.parametrize(("payload", "first", "token", "visible", "text"), READ.values(), ids=READ)
def test_what_counts_as_a_token_event(
        payload: bytes, first: bool, token: bool, visible: bool, text: str) -> None:
    event = openai.read(payload, first)
    assert (event.token, event.visible, event.text) == (token, visible, text)
    assert event.error is None
    assert not event.done


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "abort", "anything"])
def test_finish_reason_is_kept_as_the_server_says_it(reason: Any) -> None:
    assert openai.read(chat({}, reason), False).finish_reason == reason
    assert openai.read(cmpl("", reason), False).finish_reason == reason


def test_usage_only_event_has_no_choices() -> None:
    event = openai.read(b'{"choices":[],"usage":{"prompt_tokens":5,"total_tokens":8,'
                        b'"completion_tokens":3}}', False)
    assert not event.choices
    assert event.usage is not None
    assert (event.usage.prompt_tokens, event.usage.completion_tokens) == (5, 3)
    assert event.usage.cached_tokens is None


def test_cached_tokens_are_read_from_the_details() -> None:
    event = openai.read(b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3,'
                        b'"prompt_tokens_details":{"cached_tokens":4}}}', False)
    assert event.usage is not None
    assert event.usage.cached_tokens == 4


@pytest.mark.parametrize("usage", ["null", "{}"])
def test_absent_usage_is_no_zero(usage: Any) -> None:
    event = openai.read(f'{{"choices":[],"usage":{usage}}}'.encode(), False)
    assert event.usage is None or event.usage.completion_tokens is None


def test_tokens_per_event_are_asked_for_where_the_scenario_wants_them() -> None:
    wanted = Sampling(return_token_ids=True, continuous_usage_stats=True)
    said = json.loads(openai.conversation("chat", "m", [], 4, wanted))
    assert said["return_token_ids"] is True
    assert said["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert "continuous_usage_stats" not in said


def test_token_ids_count_tokens_per_event() -> None:
    assert openai.read(cmpl("ab", token_ids=[4, 9]), False).n_tok == 2
    assert openai.read(cmpl("ab", token_ids=[]), False).n_tok == 0
    assert openai.read(cmpl("ab", token_ids=None), False).n_tok is None
    assert openai.read(cmpl("ab"), False).n_tok is None


@pytest.mark.parametrize("payload", [b"[DONE]", b" [DONE] ", b"[DONE]\r"])
def test_done_is_done_and_nothing_else(payload: Any) -> None:
    event = openai.read(payload, False)
    assert event == openai.Event(done=True)


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("payload", [
    b'{"error": {"message": "m", "type": "t", "param": null, "code": 500}}',  # vLLM in a stream
    b'{"error":{"message":"m","type":"t","param":null,"code":500}}',  # as in a body
    b'{"error":{"object":"error","message":"m","type":"t","code":500},"choices":[]}',
])
def test_an_error_object_is_an_error(payload: Any) -> None:
    event = openai.read(payload, False)
    assert event.error == ServerError("m", "t", 500)
    assert not event.token


def test_an_error_may_be_but_words() -> None:
    assert openai.read(b'{"error":"out of luck"}', False).error == ServerError("out of luck")
    error = openai.read(b'{"error":{"code":{"a":1}}}', False).error
    assert error is not None
    assert error.message
    assert error.code is None


def test_error_null_is_no_error() -> None:
    assert openai.read(chat({"content": "a"}, error=None), False).error is None


def test_an_endless_message_is_cut() -> None:
    error = openai.read(json.dumps({"error": {"message": "m" * 9999}}).encode(), False).error
    assert error is not None
    assert len(error.message) == 500


@pytest.mark.parametrize("payload", [
    b"", b" ", b"{", b"{]", b"null", b"7", b'"x"', b"[]", b"[1]", b"data", b"\xff\xfe", b"[done]",
    b'{"choices":3}', b'{"choices":{}}', b'{"choices":[3]}', b'{"choices":[{"delta":3}]}',
    b'{"choices":[{"delta":{"content":3}}]}', b'{"choices":[{"text":[]}]}',
    b'{"choices":[{"finish_reason":7}]}', b'{"choices":[{"token_ids":["a"]}]}',
    b'{"usage":"many"}', b'{"choices":[],"usage":{"prompt_tokens":"5"}}',
    b'{"choices":[{"text":"\xff"}]}', b'{"choices":[{"text":"\xe4\xbd"}]}',
    b'{"choices":[]}{"choices":[]}', b"<html>502 Bad Gateway</html>",
], ids=repr)
def test_what_is_no_event_is_a_bad_event(payload: Any) -> None:
    with pytest.raises(BadEvent):
        openai.read(payload, False)


def test_a_bad_event_shows_its_beginning() -> None:
    with pytest.raises(BadEvent, match="<html>") as bad:
        openai.read(b"<html>" + b"x" * 9999, False)
    assert len(str(bad.value)) < 400


# ---------------------------------------------------------------------------- recorded answers

ERRORS = [name for name in captures.names("50", "51", "52", "53", "54", "55")
          if captures.load(name).status >= 400]


@pytest.mark.parametrize("name", ERRORS)
def test_a_recorded_error_body_gives_its_message(name: Any) -> None:
    recorded = captures.load(name)
    said = json.loads(recorded.body)
    error = openai.error_body(recorded.body, recorded.status)
    assert error.code == recorded.status
    if "detail" in said:
        assert error == ServerError(said["detail"], None, recorded.status)
    else:
        assert error.message == said["error"]["message"][:500]
        assert error.type == said["error"]["type"]
    assert not error.is_queue_limit


def test_there_are_error_bodies_of_each_shape() -> None:
    types = {openai.error_body(r.body, r.status).type for r in map(captures.load, ERRORS)}
    assert types == {"BadRequestError", "Bad Request", "NotFoundError", None}


@pytest.mark.parametrize(("body", "message"), [
    (b"", ""), (b"<html>502</html>", "<html>502</html>"), (b"\xff\xfe", "\ufffd\ufffd"),
    (b'"words"', "words"), (b'{"message":"m","object":"error"}', "m"), (b'{"detail":"d"}', "d"),
    (b'{"error":"e"}', "e"), (b'{"error":null}', "{'error': None}"), (b"[]", "[]"), (b"{}", "{}"),
    (b'{"detail":[{"loc":["body"],"msg":"Field required"}]}',
     "[{'loc': ['body'], 'msg': 'Field required'}]"),
])
def test_whatever_an_error_body_holds_something_is_said(body: Any, message: Any) -> None:
    assert openai.error_body(body, 502) == ServerError(message, None, 502)


def test_the_body_of_a_full_server_says_so() -> None:
    recorded = captures.load("77_queue_overflow_rejected")
    error = openai.error_body(recorded.body, recorded.status)
    assert error == ServerError(FULL, "Service Unavailable", 503)
    assert error.is_queue_limit


def test_the_event_of_a_full_server_says_so() -> None:
    event = captures.load("77_queue_overflow_raced_200_with_error_event").chunks[0]
    error = openai.read(event.removeprefix(b"data: ").strip(), True).error
    assert error == ServerError(FULL, "Service Unavailable", 503)
    assert error.is_queue_limit


def test_a_dead_engine_is_not_a_full_one() -> None:
    for name in ("75_cuda_oom_injected_midstream", "76_sigkill_worker_midstream"):
        event = captures.load(name).chunks[-2]
        error = openai.read(event.removeprefix(b"data: ").strip(), False).error
        assert error == ServerError(DEAD, "InternalServerError", 500)
        assert not error.is_queue_limit
    recorded = captures.load("75_cuda_oom_injected_nonstream_inflight")
    assert not openai.error_body(recorded.body, recorded.status).is_queue_limit


@pytest.mark.parametrize(("error", "full"), [
    (ServerError("anything", None, 429), True), (ServerError("anything", None, "429"), True),
    (ServerError("Model is overloaded", None, 503), True),
    (ServerError("Request queue is full", None, "503"), True),
    (ServerError("loading", None, 503), False), (ServerError(DEAD, None, 503), False),
    (ServerError("queue", None, 500), False), (ServerError("queue", None, None), False),
])
def test_full_takes_a_code_and_for_503_a_word(error: Any, full: Any) -> None:
    assert error.is_queue_limit is full
