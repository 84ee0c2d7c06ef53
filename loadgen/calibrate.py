"""Before the clock starts: does the server answer at all, and how long are prompts in its tokens?

Characters per token are measured with /tokenize where the server has it, else with the usage of
a few requests for one token, else guessed. Nothing here is part of the measurement.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

from loadgen import openai, plan, prompts, tasks
from loadgen.client import Client
from loadgen.dial import context_of, why_not
from loadgen.errors import ScenarioError, ServerError
from loadgen.net import now_ns
from loadgen.prompts import Ratio
from loadgen.record import Outcome, RequestRecord, Shot
from loadgen.scenario import RequestClass, Scenario, longest
from loadgen.target import Target

SAMPLES = 20  # over all classes
PROBES = 3  # per class, where only usage counts tokens
RETRY_S, SELDOM_S = 0.05, 0.5  # between questions to a server that starts: at first, and later


async def wait_ready(target: Target, scenario: Scenario, alive: Callable[[], str | None],
                     patience_s: float) -> None:
    """Returns when a whole streamed answer came. Raises ServerError if the server dies first or
    does not serve within `patience_s`; ScenarioError if it refuses this model or key."""
    until, retry_s = time.monotonic() + patience_s, RETRY_S
    async with Client(target, scenario) as client:
        while True:
            asking = asyncio.create_task(_ask(client, scenario, scenario.classes[0], "Hello", 2))
            try:
                while not asking.done():  # whoever has the port instead may never answer
                    await asyncio.wait([asking], timeout=0.2)
                    if (died := alive()) is not None:
                        raise ServerError(f"the server died before it could serve: {died}")
            finally:
                asking.cancel()
                await asyncio.wait([asking])
            record = asking.result()
            if record.outcome is Outcome.OK:
                return
            if record.status in (400, 401, 403, 404, 422):
                why = (record.error or "").rstrip(".")
                raise ScenarioError(
                    f"{target.base_url} refuses a request for model {target.model!r}: {why}. "
                    "Check --model, --api-key and the scenario's sampling")
            if time.monotonic() > until:
                said = f" ({record.error})" if record.error else ""
                raise ServerError(f"{target.base_url} gave no streamed answer within "
                                  f"{patience_s:.0f} s: {record.outcome}{said}")
            await asyncio.sleep(retry_s)
            retry_s = min(SELDOM_S, 1.1 * retry_s)


async def the_model(target: Target) -> str:
    """The server's model if it has just one. Raises ScenarioError (name one) or ServerError."""
    url = f"{target.base_url}/v1/models"
    try:
        async with (aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=10), proxy=target.proxy) as session,
                    session.get(url, headers=target.headers, ssl=context_of(target.trust)
                                ) as answer):
            if answer.status != 200:
                raise ScenarioError(f"{url} says {answer.status}: is an OpenAI-compatible server "
                                    "there? If so, give --model NAME (and --api-key KEY if it "
                                    "wants one)")
            said = await answer.json(content_type=None)
            names = [str(m["id"]) for m in said["data"]]
    except (aiohttp.ClientError, TimeoutError, OSError) as e:
        raise ServerError(f"{target.base_url} cannot be reached: {why_not(e)}. Is the server "
                          "running, and this its address?") from e
    except (ValueError, KeyError, TypeError) as e:
        raise ScenarioError(f"{url} does not list models; give --model NAME") from e
    if len(names) == 1:
        return names[0]
    raise ScenarioError(f"the server has several models; give --model, one of: {', '.join(names)}")


async def context_tok(target: Target) -> int | None:
    """Tokens that the model's context holds, if the server says so: vLLM's `max_model_len`."""
    try:
        async with (aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=10), proxy=target.proxy) as session,
                    session.get(f"{target.base_url}/v1/models", headers=target.headers,
                                ssl=context_of(target.trust)) as answer):
            said = await answer.json(content_type=None)
            found = next(m.get("max_model_len") for m in said["data"] if m["id"] == target.model)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError,
            AttributeError, StopIteration):
        return None
    return found if isinstance(found, int) and found > 0 else None


async def ratios(target: Target, scenario: Scenario, seed: int) -> dict[str, Ratio]:
    """Characters per token of each class, by the best means the server offers."""
    found: dict[str, Ratio] = {}
    async with Client(target, scenario) as client:
        for c in scenario.classes:
            if c.prompt_tok is None:  # a dataset's: nothing is made to measure
                found[c.name] = prompts.guess(c)
                continue
            texts = _texts(c, seed, -(-SAMPLES // len(scenario.classes)))
            counts = await _tokenized(target, scenario, texts, tasks.offered(c))
            if counts:
                found[c.name] = _plausible(prompts.fit(counts, "tokenize"), c)
                continue
            texts = texts[:: -(-len(texts) // PROBES)]
            answers = await asyncio.gather(*(_ask(
                client, scenario, c, text, 1, _unused(tasks.offered(c))) for text in texts))
            counts = [(len(t), r.prompt_tok) for t, r in zip(texts, answers, strict=True)
                      if r.prompt_tok]
            found[c.name] = (_plausible(prompts.fit(counts, "usage"), c) if counts
                             else prompts.guess(c))
    return found


def _plausible(ratio: Ratio, c: RequestClass) -> Ratio:
    """The guess, where a server's counts make no sense (the same usage whatever the prompt)."""
    return ratio if 0.2 <= ratio.chars_per_tok <= 20 else prompts.guess(c)


def _texts(c: RequestClass, seed: int, n: int) -> list[str]:
    """Prompts of the class, of lengths from a quarter to the whole of its longest."""
    assert c.prompt_tok is not None
    most, guess = min(longest(c.prompt_tok), 4096), prompts.guess(c)
    texts = []
    for k in range(n):
        rng = plan.stream(seed, plan.CALIBRATION, k)
        prefix = (0,) if c.shared_prefix else None
        tokens = max(16, round(most * (k + n // 3 + 1) / (n + n // 3)))
        texts.append(prompts.build(c, tokens, guess, rng, plan.nonce(seed, k, 63), prefix))
    return texts


async def _tokenized(target: Target, scenario: Scenario, texts: list[str],
                     more: dict[str, Any]) -> list[tuple[int, int]]:
    """(characters, tokens) of each text by the server's /tokenize; [] if it has none."""
    url, counts = f"{target.base_url}/tokenize", []
    context = context_of(target.trust)
    async with aiohttp.ClientSession(headers=target.headers, proxy=target.proxy,
                                     timeout=aiohttp.ClientTimeout(total=10)) as session:
        for text in texts:
            what = ({"messages": [{"role": "user", "content": text}]}
                    if scenario.endpoint == "chat" else {"prompt": text})
            try:
                async with session.post(url, json={"model": target.model, **what, **more},
                                        ssl=context) as answer:
                    if answer.status != 200:
                        return []
                    counts.append((len(text), int((await answer.json())["count"])))
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
                return []
    return counts


def _unused(offered: dict[str, Any]) -> dict[str, Any]:
    """Tools that are counted, and that not every server would let a model choose from."""
    return {**offered, "tool_choice": "none"} if offered else {}


async def _ask(client: Client, scenario: Scenario, c: RequestClass, text: str,
               tokens: int, more: Mapping[str, Any] | None = None) -> RequestRecord:
    body = openai.body(scenario.endpoint, client.target.model, text, tokens, c, more or {})
    return await client.send(Shot(leg="", shard=0, seq=0, session=0, turn=0, cls=c.name,
                                  due_ns=now_ns(), body=body, max_tokens=tokens))
