"""Prompt texts of a wanted token length: seeded, and unique per request unless a prefix is shared.

A prompt is `[nonce] title, filler, instruction`; a shared prefix stands before the nonce. Length
is steered by characters (see `Ratio`), and only the filler is cut. Filler is joined from a few
hundred paragraphs that are put together once per kind and language, in an order and with numbers
drawn per prompt: 2,048 tokens in tens of microseconds.
"""

import functools
import itertools
from collections.abc import Sequence
from string import Template
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from msgspec import Struct

from loadgen import texts
from loadgen.dialogue import Line
from loadgen.scenario import RequestClass
from loadgen.sources import BLOCK_TOK
from loadgen.tasks import LIKE, Task

NONCE_MAX_CHARS = 9  # in brackets and with a space 12: inside the first 16 tokens of any tokenizer
GUESS_OVERHEAD_TOK = 10.0  # of a ChatML template without a system prompt

_GUESS_CHARS_PER_TOK = {
    ("summary", "en"): 4.3, ("summary", "zh"): 1.5, ("summary", "mixed"): 2.9,
    ("chat", "en"): 4.3, ("chat", "zh"): 1.5, ("chat", "mixed"): 2.8,
    ("code", "en"): 3.2, ("code", "zh"): 2.8, ("code", "mixed"): 3.0,
    ("json", "en"): 2.7, ("json", "zh"): 1.9, ("json", "mixed"): 2.3,
}  # fmt: skip
_MIN_SPREAD = 0.1  # lengths must differ by this share of their mean to tell slope from overhead

_BLOCKS = 256  # paragraphs per kind and language
_SENTENCES = 5  # of a section or a piece of log
_TITLES = 32
_EPOCH_S = 1_750_000_000  # where the time stamps of log lines begin
_SALT = 0x5EED  # of the streams that are the same in every process

Kind = Literal["summary", "code", "json", "chat"]
Language = Literal["en", "zh", "mixed"]
_Spoken = Literal["en", "zh"]
_Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
_T = TypeVar("_T")


class Ratio(Struct, frozen=True):
    """tokens ≈ overhead_tok + chars / chars_per_tok, for the prompts of one class. The overhead is
    what the chat template adds; `source` says who counted the tokens."""

    chars_per_tok: float
    overhead_tok: float
    source: Literal["tokenize", "usage", "guess"]


def guess(cls: RequestClass) -> Ratio:
    """What to build with until a server's own count can be fitted; not measured."""
    return Ratio(_GUESS_CHARS_PER_TOK[LIKE[cls.kind], cls.language], GUESS_OVERHEAD_TOK, "guess")


def fit(samples: Sequence[tuple[int, int]], source: Literal["tokenize", "usage"]) -> Ratio:
    """The least-squares line through (chars, tokens). Where lengths hardly differ, the overhead is
    the guessed one; where it makes no sense (negative, or more than a whole prompt), it is 0.
    Raises ValueError when no sample holds both characters and tokens."""
    kept = [s for s in samples if min(s) > 0]
    if not kept:
        raise ValueError("no sample with characters and tokens; use guess()")
    chars, tokens = np.array(kept, dtype=float).T
    overhead = GUESS_OVERHEAD_TOK
    if np.ptp(chars) >= _MIN_SPREAD * chars.mean():
        overhead = float(np.polyfit(chars, tokens, 1)[1])
    if not 0 <= overhead < tokens.min():
        overhead = 0.0
    chars_per_tok = (chars @ chars) / (chars @ (tokens - overhead))  # the line through overhead
    return Ratio(float(chars_per_tok), overhead, source)


def build(
    cls: RequestClass,
    prompt_tok: int,
    ratio: Ratio,
    rng: np.random.Generator,
    nonce: str,
    prefix: tuple[int, ...] | None = None,
    task: Task | None = None,
    line: Line | None = None,
) -> str:
    """A prompt of about `prompt_tok` tokens, the template's own included; one too short for nonce
    and instruction is as short as it can be.

    `nonce` (at most 9 characters) comes first and differs between requests, so that they share no
    cache block. With `cls.shared_prefix`, what comes first is the text of the ids (>= 0) in
    `prefix`: each id stands for an equal part of `shared_prefix.tokens`, and equal ids give equal
    text whatever `rng` is. A prefix that leaves no room for nonce and instruction is cut.

    With a `task`, its instruction ends the prompt, and its sentences stand in the filler. `line`:
    what must be said, whole, before and after what fills the prompt."""
    if len(nonce) > NONCE_MAX_CHARS:
        raise ValueError(f"nonce {nonce!r} is longer than {NONCE_MAX_CHARS} characters")
    kind = LIKE[cls.kind]
    bank = _bank(kind, cls.language)
    longest = bank.longest if task is None else len(task.ending) + sum(map(len, task.planted))
    chars = round((prompt_tok - ratio.overhead_tok) * ratio.chars_per_tok)
    opening = f"[{nonce}] "
    if cls.shared_prefix and prefix:
        each = round(cls.shared_prefix.tokens / len(prefix) * ratio.chars_per_tok)
        common = "".join(_common(kind, cls.language, each, ident) for ident in prefix)
        spare = chars - len(opening) - 2 - longest
        if spare > 0:
            opening = f"{common[:spare]}\n\n{opening}"
    room = chars - len(opening)
    if task is not None:
        return opening + _with_task(task, kind, cls.language, room, rng)
    ending = _pick(bank.endings, rng) if line is None else line.closes
    if line is not None and line.opens:
        opening += f"{line.opens}\n\n"
        room = chars - len(opening)
    if line is None and len(ending) > room:
        ending = next((e for e in bank.fallbacks if len(e) <= room), bank.fallbacks[-1])
    room -= len(ending) + 2
    if room <= 0:
        return opening + ending
    return f"{opening}{_filler(kind, cls.language, room, rng)}\n\n{ending}"


def _with_task(task: Task, kind: Kind, language: Language, room: int,
               rng: np.random.Generator) -> str:
    """The filler with what is planted in it, at equal distances, then the instruction; where
    there is no room for filler, the rest alone."""
    planted = [f"\n{x}" for x in task.planted]
    room -= len(task.ending) + 2 + sum(map(len, planted))
    filler = _filler(kind, language, room, rng) if room > 0 else ""
    parts, at = [], 0
    for i, sentence in enumerate(planted, 1):
        near = len(filler) * i // (len(planted) + 1)
        cut = max(filler.find("\n", near), near) if filler else 0  # not inside a line
        parts += [filler[at:cut], sentence]
        at = max(at, cut)
    return "".join([*parts, filler[at:]]).lstrip("\n") + f"\n\n{task.ending}"


def recorded(cls: RequestClass, prompt_tok: int, ratio: Ratio, blocks: Sequence[int],
             seed: int) -> str:
    """A prompt of about `prompt_tok` tokens, the template's own included, of a trace's blocks: each
    id stands for the same BLOCK_TOK tokens of text wherever it is, and for other ones under
    another seed. Nothing else is in it, so that prompts share what the trace says, no less and no
    more; the last block is cut."""
    each = round(BLOCK_TOK * ratio.chars_per_tok)
    chars = max(1, round((prompt_tok - ratio.overhead_tok) * ratio.chars_per_tok))
    return "".join([_block(cls.kind, cls.language, each, seed, ident) for ident in blocks])[:chars]


@functools.lru_cache(maxsize=2048)
def _block(kind: Kind, language: Language, chars: int, seed: int, ident: int) -> str:
    """Begins with a mark of its own: shared are whole blocks, not how two of them happen to
    begin."""
    mark = f"\n\n[{seed:x}.{ident:x}] "
    rng = np.random.default_rng([_SALT, seed, ident])
    return mark + _filler(kind, language, max(1, chars - len(mark)), rng)


class _Bank(NamedTuple):
    """What the prompts of one kind and language are made of."""

    titles: tuple[str, ...]
    blocks: tuple[str, ...]  # paragraphs, with %d where a fresh number goes
    numbers_of: _Numbers  # fresh numbers of each block
    shortest: int  # characters of the shortest block
    endings: tuple[str, ...]  # instructions
    longest: int  # characters of the longest one
    fallbacks: tuple[str, ...]  # for prompts too short for it, longest first


def _filler(kind: Kind, language: Language, chars: int, rng: np.random.Generator) -> str:
    """Exactly `chars` characters: a title, then paragraphs in random order with fresh numbers. The
    cut may fall inside a word: an exact length is worth more here."""
    bank = _bank(kind, language)
    picks = rng.integers(_BLOCKS, size=chars // bank.shortest + 1)
    numbers = rng.integers(11, 990, size=int(bank.numbers_of[picks].sum()))
    if kind == "json":
        numbers = numbers.cumsum() + _EPOCH_S
    order: list[int] = picks.tolist()
    body = "".join([bank.blocks[i] for i in order]) % tuple(numbers.tolist())
    return (bank.titles[order[0] % len(bank.titles)] + body)[:chars]


@functools.lru_cache(maxsize=128)
def _common(kind: Kind, language: Language, chars: int, ident: int) -> str:
    """The text of one prefix id, the same in every process."""
    return _filler(kind, language, chars, np.random.default_rng([_SALT, ident]))


@functools.cache
def _bank(kind: Kind, language: Language) -> _Bank:
    """Takes tens of milliseconds, once; its own stream makes it the same in every process."""
    rng = np.random.default_rng(_SALT)
    spoken: tuple[_Spoken, ...] = ("en", "zh") if language == "mixed" else (language,)
    turns = list(itertools.islice(itertools.cycle(spoken), _BLOCKS + 1))
    blocks = tuple(_paragraph(kind, turns[i % 2 :], i, rng) for i in range(_BLOCKS))
    endings = tuple(_fill(e, s, rng) for s in spoken for e in texts.INSTRUCTIONS[s][kind])
    brief = tuple(b for s in spoken for b in texts.BRIEF[s][kind])
    return _Bank(
        titles=tuple(_fill(texts.TITLES[s][kind], s, rng) for s in turns[:_TITLES]),
        blocks=blocks,
        numbers_of=np.array([b.count("%d") for b in blocks]),
        shortest=min(len(b) for b in blocks),
        endings=endings,
        longest=max(map(len, endings)),
        fallbacks=tuple(sorted(endings + brief, key=len, reverse=True)),
    )


def _paragraph(kind: Kind, turns: Sequence[_Spoken], i: int, rng: np.random.Generator) -> str:
    """A section of a document, a piece of code, some log lines or a turn of a conversation;
    sentence j is in language turns[j], and the sections go through the subjects by `i`."""
    first = turns[0]
    if kind == "summary":
        subject = i // 2 % len(texts.DOCUMENTS[first])
        heading = texts.DOCUMENTS[first][subject][0]
        lines = {s: rng.permutation(texts.DOCUMENTS[s][subject][1].split("\n")).tolist()
                 for s in dict.fromkeys(turns)}  # a set's order would differ between processes
        sentences = [_fill(lines[s].pop(), s, rng) for s in turns[:_SENTENCES]]
        return f"\n\n## {heading}\n{('' if set(turns) == {'zh'} else ' ').join(sentences)}"
    if kind == "code":
        return "\n\n" + _fill(texts.CODE[i // 2 % len(texts.CODE)], first, rng).rstrip("\n")
    if kind == "json":
        return "".join("\n" + _fill(_pick(texts.LOGS[s], rng), s, rng)
                       for s in turns[:_SENTENCES])
    question, answer = texts.CHAT[first][i // 2 % len(texts.CHAT[first])]
    user, assistant = texts.SPEAKERS[first]
    return _fill(f"\n\n{user}: {question}\n{assistant}: {answer}", first, rng)


def _fill(text: str, language: _Spoken, rng: np.random.Generator) -> str:
    return Template(text).safe_substitute(
        person=_pick(texts.PEOPLE[language], rng),
        city=_pick(texts.CITIES[language], rng),
        product=_pick(texts.PRODUCTS[language], rng),
        noun=_pick(texts.NOUNS, rng),
        comment=_pick(texts.COMMENTS[language], rng),
        k=rng.integers(2, 9999),
        u=rng.integers(1000, 9999),
        n="%d",
    )


def _pick(choices: Sequence[_T], rng: np.random.Generator) -> _T:
    return choices[int(rng.integers(len(choices)))]
