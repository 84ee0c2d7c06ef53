"""Pure: what a class asks of an answer, and what came, → a Finding: right, or which kind of error.

A check knows the answer and what the request asked for (`Asked`), nothing of time or load. It runs
between legs, never while one is measured.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from msgspec import Struct

from loadgen import code, expect, recall, repeats, schema
from loadgen.dialogue import Question
from loadgen.openai import Answer
from loadgen.repeats import CJK

CUT = "; max_tokens cut it off"  # what an answer was, when that is why it is no good
_WORD = re.compile(rf"[{CJK}]|[^\W\d_]+")
_CHINESE = re.compile(rf"[{CJK}]")
_LATIN = re.compile(r"[A-Za-zÀ-ÿœŒ]")
_SMALL = {  # words that every longer text of a language has, and the other has not
    "en": frozenset(("the", "of", "and", "to", "in", "is", "was", "with", "for", "on", "that",
                     "were", "by", "from", "at", "an", "are")),
    "fr": frozenset(("le", "la", "les", "de", "des", "du", "et", "un", "une", "en", "que", "qui",
                     "est", "dans", "pour", "par", "sur", "au", "aux", "plus", "ont", "été",
                     "avec", "ce", "cette", "sont", "d", "l")),
}
_PER_CHAR = {"zh": 1.0, "en": 3.0, "fr": 3.4}  # characters that say what one Chinese one does


class Finding(Struct, frozen=True):
    """What a check found. `kind` is the kind of error, None where `ok`; `says` is for people, and
    may stand with a good answer as well."""

    ok: bool
    kind: str | None = None
    says: str = ""


class Asked(Struct, frozen=True):
    """What a request wanted of its answer, as its class's check needs it: the figures that were
    planted, what was to be translated and between which languages, the JSON schema, the tool with
    its parameters' schema, the question of a dialogue, and how many tokens might come."""

    facts: tuple[str, ...] = ()
    source: str = ""
    languages: tuple[str, str] = ("en", "en")
    schema: dict[str, Any] | None = None
    tool: str | None = None
    tools: dict[str, dict[str, Any]] = {}
    question: Question | None = None
    max_tokens: int | None = None


class Came(NamedTuple):
    """An answer and how it ended."""

    answer: Answer
    finish_reason: str | None = None
    output_tok: int | None = None

    @property
    def cut(self) -> str:
        return CUT if self.finish_reason == "length" else ""


GOOD = Finding(True)


def check(wanted: expect.Validator, asked: Asked, came: Came) -> Finding:
    """The one check that the class names."""
    if not came.answer.text.strip() and not came.answer.calls and not isinstance(
            wanted, expect.Tool):
        return Finding(False, "no text", "the answer has no visible text" + came.cut)
    return _CHECKS[type(wanted)](wanted, asked, came)


# ------------------------------------------------------------------------------------- the checks


def facts(wanted: expect.Facts, asked: Asked, came: Came) -> Finding:
    """Figures are looked for as numbers: 48,213 and 48213 are the same, 148213 is another."""
    if not asked.facts:
        return Finding(True, None, "the prompt was too short for a figure")
    said = set(re.findall(r"\d+", re.sub(r"(?<=\d)[,，_'\u00a0\u202f ](?=\d{3}(?!\d))", "",
                                         _half_width(came.answer.text))))
    lost = [f"no. {i} ({x})" for i, x in enumerate(asked.facts, 1) if x not in said]
    found = len(asked.facts) - len(lost)
    says = f"{found} of {len(asked.facts)} planted figures"
    if found >= wanted.share * len(asked.facts):
        return Finding(True, None, says)
    return Finding(False, "forgot a fact", f"{says}; lost: {', '.join(lost)}{came.cut}")


def length(wanted: expect.LengthOf, asked: Asked, came: Came) -> Finding:
    del asked
    n = len("".join(came.answer.text.split()))
    if n < wanted.min_chars:
        return Finding(False, "too short", f"{n} of {wanted.min_chars} characters{came.cut}")
    if wanted.max_chars is not None and n > wanted.max_chars:
        return Finding(False, "too long", f"{n} characters, at most {wanted.max_chars}")
    return Finding(True, None, f"{n} characters")


def python(wanted: expect.Python, asked: Asked, came: Came) -> Finding:
    del asked
    kind, says = code.fault(came.answer.text, wanted.min_statements, wanted.max_repeated)
    return Finding(kind is None, kind, says + (came.cut if kind in code.OF_A_CUT else ""))


def json(wanted: expect.Json, asked: Asked, came: Came) -> Finding:
    value, kind, says = schema.value_in(came.answer.text, wanted.fence)
    if kind is not None and value is schema.NOTHING:
        return Finding(False, kind, says + came.cut)
    wants = wanted.schema if wanted.schema is not None else asked.schema
    wrong = schema.fault(value, wants or {})
    if wrong is not None:  # of two errors the one that no reader could mend
        return Finding(False, *wrong)
    return GOOD if kind is None else Finding(False, kind, says)


def tool(wanted: expect.Tool, asked: Asked, came: Came) -> Finding:
    del wanted
    calls = came.answer.calls
    if not calls:
        shown = " ".join(came.answer.text.split())[:60]
        return Finding(False, "no tool call", f"it said: {shown!r}{came.cut}")
    call = calls[0]
    if call.name not in asked.tools:
        return Finding(False, "unknown tool", f"{call.name!r}; there are {', '.join(asked.tools)}")
    value, kind, says = schema.value_in(call.arguments or "{}", fence=False)
    if kind is not None:
        return Finding(False, "invalid JSON", f"arguments of {call.name}: {says}{came.cut}")
    if asked.tool is not None and call.name != asked.tool:
        return Finding(False, "wrong tool", f"{call.name} instead of {asked.tool}")
    wrong = schema.fault(value, asked.tools[call.name])
    if wrong is not None:
        return Finding(False, wrong[0], f"arguments of {call.name}: {wrong[1]}")
    return GOOD if len(calls) == 1 else Finding(True, None, f"{len(calls)} calls")


def translation(wanted: expect.Translation, asked: Asked, came: Came) -> Finding:
    said, (source, into) = came.answer.text, asked.languages
    if source != into and (share := repeats.copied(said, asked.source)) > wanted.max_copied:
        return Finding(False, "copied the source", f"{100 * share:.0f} % of it stands in the source"
                       f"; the text was to be in {into}")
    if (other := language(said)) != into:
        return Finding(False, "wrong language", f"it reads as {other or 'none of ' + _KNOWN}, and "
                       f"was to be {into}")
    expected = len(asked.source) / _PER_CHAR[source] * _PER_CHAR[into]
    ratio = len(said.strip()) / max(expected, 1)
    if ratio < wanted.min_ratio:
        return Finding(False, "too short", f"{100 * ratio:.0f} % of the length to be expected"
                       f"{came.cut}")
    if ratio > wanted.max_ratio:
        return Finding(False, "too long", f"{ratio:.1f} times the length to be expected")
    return Finding(True, None, f"{100 * ratio:.0f} % of the length to be expected")


def repetition(wanted: expect.Repetition, asked: Asked, came: Came) -> Finding:
    found = repeats.of(came.answer.text)
    asks = f" of {asked.max_tokens}" if asked.max_tokens else ""
    n = "an unknown number" if came.output_tok is None else f"{came.output_tok}{asks}"
    says = f"{n} tokens, ended by {came.finish_reason}; {found.says}"
    if found.share > wanted.max_repeated:
        return Finding(False, "repetition", says)
    if wanted.min_tokens is not None and (came.output_tok or 0) < wanted.min_tokens:
        return Finding(False, "too short", f"{says}; at least {wanted.min_tokens} tokens were "
                       "wanted")
    return Finding(True, None, says)


def recalled(wanted: expect.Recall, asked: Asked, came: Came) -> Finding:
    del wanted
    if asked.question is None:
        return Finding(True, None, "nothing was asked for")
    kind, says = recall.fault(asked.question, came.answer.text)
    return Finding(kind is None, kind, says + (came.cut if kind == "forgot a fact" else ""))


_CHECKS: dict[type, Callable[[Any, Asked, Came], Finding]] = {
    expect.Facts: facts, expect.LengthOf: length, expect.Python: python, expect.Json: json,
    expect.Tool: tool, expect.Translation: translation, expect.Repetition: repetition,
    expect.Recall: recalled}


# ------------------------------------------------------------------------------------- languages


_KNOWN = "Chinese, English and French"
_FOREIGN = 0.2  # of a text may be names and terms of another script
_SURE = 0.05  # of a text's words are small ones of its language; noise has fewer


def language(text: str) -> str | None:
    """en, zh or fr: by its script, and where that is Latin by small words. None: none of them."""
    chinese, latin = len(_CHINESE.findall(text)), len(_LATIN.findall(text))
    share = 3 * chinese / max(3 * chinese + latin, 1)  # a character says as much as three letters
    if share > _FOREIGN:
        return "zh" if share >= 1 - _FOREIGN else None
    words = [w.lower() for w in _WORD.findall(text) if not _CHINESE.match(w)]
    if not words:
        return None
    shares = {name: sum(w in small for w in words) / len(words) for name, small in _SMALL.items()}
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= _SURE else None


def _half_width(text: str) -> str:
    return text.translate({0xFF10 + i: 48 + i for i in range(10)})


def counted(findings: Sequence[Finding]) -> dict[str, int]:
    """How often each kind of error came."""
    kinds: dict[str, int] = {}
    for f in findings:
        if f.kind is not None:
            kinds[f.kind] = kinds.get(f.kind, 0) + 1
    return kinds
