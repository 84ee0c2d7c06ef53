"""Recorded request traces: when each request came, how long prompt and answer were, and, of
Mooncake's, which blocks of its prompt others had before it.

    azure      CSV    TIMESTAMP, ContextTokens, GeneratedTokens    text, to 100 ns
    mooncake   JSONL  timestamp, input_length, output_length, hash_ids    ms
    burstgpt   CSV    Timestamp, Model, Request tokens, Response tokens, Total tokens, Log Type    s
"""

import bisect
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from datetime import datetime
from fractions import Fraction
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from loadgen import datasets
from loadgen.errors import ScenarioError
from loadgen.plan import TRACE, stream
from loadgen.scenario import Trace
from loadgen.sources import BLOCK_TOK, Asked, TraceFile

MOST_TOK = 10_000_000
COARSE_S = 0.5  # stamps in steps of this and more are spread inside the step
_OFF_STEP = 0.01  # of a step: Mooncake's steps of 3 s are rounded to ms
SLACK = 0.03  # of a context: a prompt that is made to measure is a little longer now and then


class Recorded(Struct, frozen=True):
    """A trace's file: instants in s from its first request on, ascending; `step_s`: what they are
    whole steps of, if those are coarse."""

    at_s: tuple[float, ...]
    asked: tuple[Asked, ...]
    step_s: float | None
    sha256: str
    broken: tuple[str, ...]


def read(replay: TraceFile) -> Recorded:
    """The whole file. Raises ScenarioError: it is not there, is not what `sha256` says, or a line
    is not as it should be and may not be skipped."""
    data, sha256 = datasets.content_of(replay.path)
    datasets.check_hash(replay.path, replay.sha256, sha256)
    rows = (_mooncake(data) if replay.format == "mooncake" else
            _table(replay.path, data, *_COLUMNS[replay.format]))
    at: list[Fraction] = []
    asked, broken = [], []
    for line, row in rows:
        if isinstance(row, str):
            broken.append(f"{replay.path}:{line}: {row}")
        elif at and row[0] < at[-1]:
            broken.append(f"{replay.path}:{line}: its time is before that of the line before; "
                          "sort the file by time")
        else:
            at.append(row[0])
            asked.append(row[1])
    datasets.refuse(replay.path, broken, replay.skip_broken, len(at), "requests")
    at_s = tuple(float(x - at[0]) for x in at)
    return Recorded(at_s, tuple(asked), step_of(at_s), sha256, tuple(broken))


def trace(replay: TraceFile, seed: int) -> Trace:
    """What is to be sent, and when: stamps in coarse steps spread, the window cut out, the rate
    scaled. Raises ScenarioError."""
    found = read(replay)
    at_s = spread(found.at_s, found.step_s, seed)
    from_s, to_s = replay.from_s or 0.0, math.inf if replay.to_s is None else replay.to_s
    a, b = bisect.bisect_left(at_s, from_s), bisect.bisect_left(at_s, to_s)
    if a == b:
        raise ScenarioError(f"{replay.path}: no request came from {from_s:g} s to {to_s:g} s after "
                            f"its first; its last came after {at_s[-1]:.1f} s")
    return Trace(due_s=tuple((t - from_s) / replay.scale for t in at_s[a:b]),
                 max_inflight=replay.max_inflight, asked=found.asked[a:b])


def step_of(at_s: Sequence[float]) -> float | None:
    """The step of instants that are whole steps from each other, if it is coarse and most of them
    share theirs with another one."""
    steps = [y - x for x, y in itertools.pairwise(sorted(set(at_s)))]
    if not steps or 2 * (len(steps) + 1) > len(at_s):
        return None
    step_s = statistics.median_low(steps)
    whole = all(abs(x / step_s - round(x / step_s)) <= _OFF_STEP * max(1, round(x / step_s))
                and x > step_s / 2 for x in steps)
    return step_s if whole and step_s >= COARSE_S else None


def spread(at_s: Sequence[float], step_s: float | None, seed: int) -> list[float]:
    """Each instant somewhere in the step that it begins, all of them equally likely; requests of
    one step stay in the file's order."""
    if step_s is None:
        return list(at_s)
    found: list[float] = []
    for number, (begins_s, group) in enumerate(itertools.groupby(at_s)):
        inside = np.sort(stream(seed, TRACE, number).random(len(list(group)))) * step_s
        found += [float(begins_s + x) for x in inside]
    ascending: list[float] = np.maximum.accumulate(found).tolist()
    return ascending


def fitted(given: Trace, max_model_len: int, too_long: str | None) -> tuple[Trace, int]:
    """The trace as a server takes it whose context holds so many tokens, and how many requests
    were cut or left out for that. A prompt's tokens are known to SLACK only. Raises
    ScenarioError if there are such, and nobody said what becomes of them."""
    most = math.floor(max_model_len * (1 - SLACK))
    over = [i for i, a in enumerate(given.asked) if a.prompt_tok + a.output_tok > most]
    if not over:
        return given, 0
    if too_long is None:
        longest = max(a.prompt_tok + a.output_tok for a in given.asked)
        raise ScenarioError(
            f"{len(over)} of the trace's {len(given.asked)} requests are longer than the server "
            f"takes: prompt and answer are up to {longest} tokens, its context is {max_model_len}. "
            'Say too_long = "cut" or "skip" in [load], or serve with a larger --max-model-len')
    if too_long == "cut":
        asked = tuple(_cut(a, most) for a in given.asked)
        return msgspec.structs.replace(given, asked=asked), len(over)
    gone = set(over)
    kept = [i for i in range(len(given.asked)) if i not in gone]
    if not kept:
        raise ScenarioError(f"all of the trace's {len(over)} requests are longer than the server's "
                            f"context of {max_model_len} tokens; say too_long = \"cut\"")
    return msgspec.structs.replace(
        given, asked=tuple(given.asked[i] for i in kept),
        due_s=tuple(given.due_s[i] for i in kept)), len(over)


def _cut(a: Asked, most: int) -> Asked:
    """A prompt without its end; an answer no longer than half of the context."""
    output_tok = min(a.output_tok, max(1, most // 2))
    return Asked(min(a.prompt_tok, most - output_tok), output_tok, a.runs)


# ------------------------------------------------------------------------------------- formats

Row = tuple[int, tuple[Fraction, Asked] | str]  # line, and what it holds or what is wrong
_COLUMNS = {"azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
            "burstgpt": ("Timestamp", "Request tokens", "Response tokens")}


def _table(path: str, data: bytes, at: str, prompt: str, output: str) -> Iterator[Row]:
    for line, row in datasets.table(path, data, (at, prompt, output)):
        if not isinstance(row, dict):
            yield line, str(row)
            continue
        try:
            when = _instant(row[at]) if at == "TIMESTAMP" else _seconds(row[at])
            yield line, (when, Asked(_tokens(row, prompt), _tokens(row, output)))
        except ValueError as e:
            yield line, str(e)


def _instant(text: str) -> Fraction:
    """2023-11-16 18:17:03.9799600, to its last digit, in s."""
    whole, _, rest = text.strip().removesuffix("+00:00").partition(".")
    try:
        then = datetime.fromisoformat(f"{whole}+00:00")
        return int(then.timestamp()) + Fraction(f"0.{rest or 0}")
    except ValueError:
        raise ValueError(f"TIMESTAMP: {text!r} is no instant as 2023-11-16 18:17:03.9799600"
                         ) from None


def _seconds(text: str) -> Fraction:
    try:
        return Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"Timestamp: {text!r} is no number of seconds") from None


def _tokens(row: dict[str, str], name: str) -> int:
    text = row[name].strip()
    if not text.isdecimal() or not 0 < int(text) <= MOST_TOK:
        failed = (" (a request that failed: there is a file without those, and skip_broken = true)"
                  if text == "0" else "")
        raise ValueError(f"{name}: {text!r} is no whole number of tokens from 1 on{failed}")
    return int(text)


_Tokens = Annotated[int, Meta(ge=1, le=MOST_TOK)]


class _Call(Struct):
    timestamp: Annotated[float, Meta(ge=0)]
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: list[Annotated[int, Meta(ge=0, lt=2**53)]] = []


def _mooncake(data: bytes) -> Iterator[Row]:
    decode = msgspec.json.Decoder(_Call).decode
    for line, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            call = decode(raw)
        except msgspec.ValidationError as e:
            yield line, str(e)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            yield line, f"not JSON: {e}"
        else:
            blocks = math.ceil(call.input_length / BLOCK_TOK)
            if call.hash_ids and len(call.hash_ids) != blocks:
                yield line, (f"{len(call.hash_ids)} hash_ids for {call.input_length} tokens, which "
                             f"are {blocks} blocks of {BLOCK_TOK}")
                continue
            yield line, (Fraction(call.timestamp) / 1000, Asked(
                call.input_length, call.output_length, tuple(_runs(call.hash_ids))))


def _runs(idents: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ids as rows of one after the other: they mostly are."""
    for _, group in itertools.groupby(enumerate(idents), lambda x: x[1] - x[0]):
        row: list[Any] = list(group)
        yield row[0][1], len(row)
