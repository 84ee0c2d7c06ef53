"""The `openai` package against the simulator, unchanged: its models parse what comes."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest

from servers.sim.scripts import Habits
from tests.test_sim_app import serving

SAID: Any = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {
    "type": "integer", "minimum": 0, "maximum": 99}}, "required": ["name", "age"],
    "additionalProperties": False}
TOOLS: Any = [{"type": "function", "function": {"name": "get_person", "parameters": SCHEMA,
                                              "strict": True}}]


def with_both(test: Callable[[Any], None], then: Callable[[Any], Awaitable[None]],
              **options: Any) -> None:
    """Runs `test` with a sync client (in a thread) and `then` with an async one."""
    async def go() -> None:
        async with serving(**options) as (_, port):
            url = f"http://127.0.0.1:{port}/v1"
            sync = openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=20)
            await asyncio.to_thread(test, sync)
            async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
                await then(client)
            sync.close()
    asyncio.run(asyncio.wait_for(go(), 40))


def test_an_answer_streamed_and_whole() -> None:
    asked = {"model": "tiny", "messages": SAID, "max_tokens": 12, "extra_body": {
        "ignore_eos": True}}

    def sync(client: Any) -> None:
        whole = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=3)
        assert [c.finish_reason for c in whole.choices] == ["length", "length"]
        assert len(whole.choices[0].logprobs.content) == 12
        assert whole.usage.completion_tokens == 24
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={
            "include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage.completion_tokens == 12
        told = client.completions.create(model="tiny", prompt="a b", max_tokens=3, logprobs=2)
        assert len(told.choices[0].logprobs.tokens) <= 3
        assert client.models.list().data[0].id == "tiny"

    async def then(client: Any) -> None:
        stream = await client.chat.completions.create(**asked, stream=True)
        said = [c.choices[0] async for c in stream]
        assert said[-1].finish_reason == "length"
        assert len([c for c in said if c.delta.content]) == 12
    with_both(sync, then)


def test_an_answer_of_a_schema_is_one_of_it() -> None:
    asked = {"model": "tiny", "messages": SAID, "response_format": {
        "type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA,
                                               "strict": True}}}

    def sync(client: Any) -> None:
        for _ in range(5):
            said = json.loads(client.chat.completions.create(**asked).choices[0].message.content)
            assert set(said) == {"name", "age"}

    async def then(client: Any) -> None:
        async with client.chat.completions.stream(**asked) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        assert 0 <= json.loads(final.choices[0].message.content)["age"] <= 99
        assert final.choices[0].finish_reason == "stop"
    with_both(sync, then)


@pytest.mark.parametrize(("choice", "reason"), [
    ("auto", "tool_calls"), ("required", "tool_calls"),
    ({"type": "function", "function": {"name": "get_person"}}, "stop")])
def test_tools_are_called_with_arguments_of_their_schema(choice: Any, reason: str) -> None:
    asked = {"model": "tiny", "messages": SAID, "tools": TOOLS, "tool_choice": choice}

    def check(message: Any, finish_reason: str) -> None:
        assert finish_reason == reason
        call, = message.tool_calls
        assert call.function.name == "get_person"
        assert set(json.loads(call.function.arguments)) == {"name", "age"}

    def sync(client: Any) -> None:
        choice, = client.chat.completions.create(**asked).choices
        check(choice.message, choice.finish_reason)

    async def then(client: Any) -> None:
        async with client.chat.completions.stream(**asked) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        check(final.choices[0].message, final.choices[0].finish_reason)
    with_both(sync, then, habits=Habits(auto_call_frac=1.0))


def test_a_share_of_invalid_json_can_be_asked_for() -> None:
    asked = {"model": "tiny", "messages": SAID, "response_format": {
        "type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}}

    def is_valid(said: str) -> bool:
        try:
            return set(json.loads(said)) == {"name", "age"}
        except ValueError:
            return False

    def sync(client: Any) -> None:
        valid = [is_valid(client.chat.completions.create(**asked).choices[0].message.content)
                 for _ in range(40)]
        assert 5 < sum(valid) < 35

    async def then(client: Any) -> None:
        whole = await client.chat.completions.create(
            model="tiny", messages=SAID, tools=TOOLS, tool_choice="required")
        assert whole.choices[0].finish_reason == "tool_calls"
    with_both(sync, then, habits=Habits(invalid_json_frac=0.5))


def test_errors_are_the_clients_own() -> None:
    def sync(client: Any) -> None:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(model="nope", messages=SAID)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="tiny", messages=SAID, temperature=-1)
        with pytest.raises(openai.RateLimitError) as e:
            client.chat.completions.create(model="tiny", messages=SAID, extra_headers={
                "x-sim-fault": "status-429@7"})
        assert e.value.response.headers["retry-after"] == "7"

    async def then(client: Any) -> None:
        stream = await client.chat.completions.create(
            model="tiny", messages=SAID, stream=True, extra_headers={
                "x-sim-fault": "error-event@2"})
        with pytest.raises(openai.APIError, match="EngineCore"):
            async for _ in stream:
                pass
    with_both(sync, then)
