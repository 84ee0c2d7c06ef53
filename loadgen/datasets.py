"""Prompts from files: ShareGPT JSON, OpenAI messages as JSONL, CSV. Every entry that cannot be
used is named with its line; it is left out only where the scenario says so."""

import csv
import functools
import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from loadgen.errors import ScenarioError
from loadgen.sources import Dataset, Messages, ShareGpt, Table

SHOWN = 3  # broken entries that a message names
_CHARS_PER_TOK = 4.3  # of English, as of a vocabulary of 150,000 …
_WIDE_PER_TOK = 1.5  # … and of Chinese

Message = tuple[str, str]  # role, content


class Given(Struct, frozen=True):
    """One request: the messages before it, and what the user says. `output_tok`: as long as the
    answer in the file, or as the file says; None: it does not say."""

    before: tuple[Message, ...]
    text: str
    output_tok: int | None


class Contents(Struct, frozen=True):
    """A file, read: requests of each entry, and what is wrong with those that were left out."""

    entries: tuple[tuple[Given, ...], ...]
    broken: tuple[str, ...]
    sha256: str


class _Broken(Exception):
    """What is wrong with an entry."""


def read(source: Dataset) -> Contents:
    """What the file holds; read once in a process. Raises ScenarioError: a file that is not
    there, is not what `sha256` says or holds broken entries that nobody asked to skip."""
    plain = msgspec.structs.replace(source, sha256=None, entries=None, broken=0)
    found = _read(plain)
    check_hash(source.path, source.sha256, found.sha256)
    return found


def filled(source: Dataset, path: str) -> Dataset:
    """The source with its file's full path, hash and numbers."""
    there = msgspec.structs.replace(source, path=path)
    found = read(there)
    return msgspec.structs.replace(there, sha256=found.sha256, entries=len(found.entries),
                                   broken=len(found.broken))


def says(sources: Iterable[Dataset | None]) -> Iterator[str]:
    """What there is to know of each file before it is used."""
    for source in sources:
        if source is None:
            continue
        left_out = (f"; {source.broken:,} broken ones are left out" if source.broken else "")
        yield (f"{Path(source.path).name}: {source.entries or 0:,} entries, SHA-256 "
               f"{(source.sha256 or '')[:12]}{left_out}. After so many sessions they come again, "
               "and a server with a prefix cache has them then")


def check_lengths(source: Dataset, where: str) -> None:
    """Raises ScenarioError unless the file says of each answer how long it is to be."""
    unsaid = sum(any(g.output_tok is None for g in entry) for entry in read(source).entries)
    if unsaid:
        raise ScenarioError(f"{where}: {source.path} does not say of {unsaid} of "
                            f"{len(read(source).entries)} prompts how long the answer is to be; "
                            "give the class output_tokens, as output_tokens = 256")


def guess_tok(text: str) -> int:
    """Tokens of a text, roughly: a Chinese character takes three bytes, and stands for more."""
    wide = (len(text.encode(errors="replace")) - len(text)) / 2
    return max(1, round((len(text) - wide) / _CHARS_PER_TOK + wide / _WIDE_PER_TOK))


def content_of(path: str) -> tuple[bytes, str]:
    """A file's bytes and their hash. One that is not at its full path, as on a fleet's worker, is
    looked for by its name where the process works. Raises ScenarioError."""
    place = Path(path)
    if not place.is_file() and Path(place.name).is_file():
        place = Path(place.name)
    try:
        data = place.read_bytes()
    except OSError as e:
        raise ScenarioError(f"{path}: cannot be read: {e.strerror}. A path in a scenario is "
                            "relative to the scenario's file; on another host the file is also "
                            "looked for by its name, in the folder the process was started in"
                            ) from e
    return data, hashlib.sha256(data).hexdigest()


def check_hash(path: str, wanted: str | None, found: str) -> None:
    """Raises ScenarioError unless the file is the one that is meant."""
    if wanted is not None and wanted != found:
        raise ScenarioError(f"{path}: this is another file than the one that is asked for: its "
                            f"SHA-256 begins with {found[:12]}, wanted is {wanted[:12]}; copy the "
                            "file of the host that the test is started on, or mend sha256")


def text_of(path: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ScenarioError(f"{path}:{line}: not UTF-8 (byte {e.start}: 0x{data[e.start]:02x}); "
                            "convert the file, as with iconv -t utf-8") from None


def refuse(path: str, broken: list[str], skip: bool, n_good: int, what: str) -> None:
    """Raises ScenarioError if there is something broken that may not be skipped, or nothing else.
    `broken`: a line and its fault each."""
    if broken and not skip:
        more = f"\n… and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise ScenarioError("\n".join(broken[:SHOWN]) + more + f"\n{len(broken)} of "
                            f"{len(broken) + n_good} {what} cannot be used. Mend the file, or say "
                            "skip_broken = true to go on without them")
    if not n_good:
        raise ScenarioError(f"{path}: holds no {what} that can be used"
                            + (f"; the first of its faults: {broken[0]}" if broken else ""))


@functools.lru_cache(maxsize=8)
def _read(source: Dataset) -> Contents:
    data, sha256 = content_of(source.path)
    rows = (_sharegpt(source, data) if isinstance(source, ShareGpt) else
            _jsonl(source, data) if isinstance(source, Messages) else _csv(source, data))
    good, broken = [], []
    for line, given in rows:
        if isinstance(given, _Broken):
            broken.append(f"{source.path}:{line}: {given}")
        else:
            good.append(given)
    refuse(source.path, broken, source.skip_broken, len(good), "prompts")
    return Contents(tuple(good), tuple(broken), sha256)


Row = tuple[int, "tuple[Given, ...] | _Broken"]  # line, and what it holds


# ------------------------------------------------------------------------------------- formats


class _Said(Struct):
    """A turn, by ShareGPT's names."""

    source: str = msgspec.field(name="from")
    value: str


class _Talk(Struct):
    conversations: list[_Said]


class _Spoken(Struct):
    role: str
    content: Any = None


class _Line(Struct):
    messages: list[_Spoken]
    output_tokens: int | None = None


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
         "bing": "assistant", "bard": "assistant", "assistant": "assistant", "system": "system",
         "tool": "tool"}


def _sharegpt(source: ShareGpt, data: bytes) -> Iterator[Row]:
    try:
        talks = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        at = getattr(e, "start", None) or _byte_of(str(e))
        line = data.count(b"\n", 0, at) + 1 if at else 1
        raise ScenarioError(f"{source.path}:{line}: not a JSON list of conversations: {e}. If it "
                            'holds one JSON object a line, say format = "openai"') from None
    at, line = 0, 1
    for talk in talks:
        raw = bytes(talk)
        begins = data.index(raw, at)
        line += data.count(b"\n", at, begins)
        yield line, _caught(_of_talk, raw, source.turns)
        at = begins + len(raw)
        line += raw.count(b"\n")


def _of_talk(raw: bytes, turns: str) -> tuple[Given, ...]:
    said = msgspec.json.decode(raw, type=_Talk).conversations
    for s in said:
        if s.source not in ROLES:
            raise _Broken(f"from: {s.source!r} is nobody known; known are {', '.join(ROLES)}")
    return _requests([(ROLES[s.source], s.value) for s in said], turns, None)


def _jsonl(source: Messages, data: bytes) -> Iterator[Row]:
    for line, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if raw.strip():
            yield line, _caught(_of_line, raw, source.turns)


def _of_line(raw: bytes, turns: str) -> tuple[Given, ...]:
    line = msgspec.json.decode(raw, type=_Line)
    if line.output_tokens is not None and line.output_tokens < 1:
        raise _Broken(f"output_tokens is {line.output_tokens}; give at least 1, or leave it out")
    return _requests([(m.role, _plain(m.content)) for m in line.messages], turns,
                     line.output_tokens)


def _plain(content: object) -> str:
    """A message's text: one string, or a list of parts."""
    if content is None or isinstance(content, str):  # None: an assistant that calls a tool
        return content or ""
    parts: list[Any] = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(
                part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise _Broken(f"content of type {kind!r}: only text can be sent")
    return "".join(part["text"] for part in parts)


def _csv(source: Table, data: bytes) -> Iterator[Row]:
    for line, row in table(source.path, data, (source.prompt,)):
        yield line, row if isinstance(row, _Broken) else _caught(_of_row, row, source)


def _of_row(row: dict[str, str], source: Table) -> tuple[Given, ...]:
    system = row.get(source.system, "")
    tokens: int | None = None
    if said := row.get(source.output_tokens, "").strip():
        if not said.isdecimal() or int(said) < 1:
            raise _Broken(f"{source.output_tokens}: {said!r} is no whole number from 1 on")
        tokens = int(said)
    before = [("system", system)] if system else []
    return _requests([*before, ("user", row[source.prompt])], "first", tokens)


def table(path: str, data: bytes, needed: tuple[str, ...],
          ) -> Iterator[tuple[int, "dict[str, str] | _Broken"]]:
    """Rows of a CSV by their columns' names, with the line that each begins in. Raises
    ScenarioError where a needed column is missing."""
    reader = csv.reader(io.StringIO(text_of(path, data), newline=""), strict=True)
    names: list[str] = []
    line = 1
    while True:
        begins = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as e:
            yield begins, _Broken(f"no CSV: {e}")
            continue
        if row is None:
            break
        if not row:
            continue
        if not names:
            names, line = [name.strip() for name in row], begins
            if missing := [x for x in needed if x not in names]:
                raise ScenarioError(f"{path}:{line}: no column {missing[0]!r}; the file has: "
                                    f"{', '.join(names)}")
        elif len(row) != len(names):
            yield begins, _Broken(f"{len(row)} fields where the first line names {len(names)}")
        else:
            yield begins, dict(zip(names, row, strict=True))
    if not names:
        raise ScenarioError(f"{path}: is empty; its first line names the columns, among them "
                            f"{', '.join(needed)}")


# -------------------------------------------------------------------------------------- inside


def _caught(of: Any, raw: Any, how: Any) -> "tuple[Given, ...] | _Broken":
    try:
        found: tuple[Given, ...] = of(raw, how)
    except _Broken as e:
        return e
    except msgspec.ValidationError as e:
        return _Broken(str(e))
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        return _Broken(f"not JSON: {e}")
    return found


def _requests(said: list[Message], turns: str, output_tok: int | None) -> tuple[Given, ...]:
    """The first thing that the user says, or each, after what was said before it; a number of
    tokens in the file is of every answer. An answer that stands in the file says how long it is
    to be."""
    found = []
    for i, (role, text) in enumerate(said):
        if role != "user":
            continue
        if not text.strip():
            raise _Broken(f"message {i + 1}, the user's, is empty")
        tokens = output_tok
        if tokens is None and i + 1 < len(said) and said[i + 1][0] == "assistant":
            tokens = guess_tok(said[i + 1][1])
        before = said[:i] if turns == "all" else [m for m in said[:i] if m[0] == "system"]
        found.append(Given(tuple(before), text, tokens))
        if turns == "first":
            break
    if not found:
        raise _Broken("nobody asks: no message is the user's")
    return tuple(found)


def _byte_of(text: str) -> int:
    """msgspec's place: "… (byte 123)"."""
    _, _, at = text.rpartition("(byte ")
    return int(at.rstrip(")")) if at.rstrip(")").isdigit() else 0
