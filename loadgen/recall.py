"""Does an answer of a dialogue use what was told before? Pure: a question and what was answered →
the kind of error. Words and numbers are looked for, no model is asked: it knows the values that
were told, who they belong to, and what they were before they changed.

    forgot a fact        the value does not come (also: another one, made up)
    mixed up roles       the other person's value, or the right one said of the other person
    logic break          the number does not follow from what was told; or the value is denied
    repeated question    instead of an answer, it asks for what was told
"""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Final, Literal

from loadgen.dialogue import Person, Question

Kind = Literal["forgot a fact", "mixed up roles", "logic break", "repeated question"]
SHOWN = 80  # characters of an answer that is no good
SAME: Final = 0.8  # of a sentence: it is the question once more

_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？]*")
_ASKING = ("?", "？")
_USER = {"en": r"\b(?:you|your|yours|yourself|you're|you've)\b", "zh": r"你|您"}
_THEY = {"en": r"\b(?:he|she|his|her|they|their)\b", "zh": r"他|她"}
_NOT = {"en": r"(?:\b(?:not|never|no longer)\b|n't\b)(?:(?!\bbut\b)[^.,;!?\n]){0,20}",
        "zh": r"(?:不是|并非|不再是|不住在|没有)(?:(?!而是)[^，。；！？\n]){0,4}"}
_ONES = "one|two|three|four|five|six|seven|eight|nine"
_NUMERAL = "零一二三四五六七八九十百"


def fault(question: Question, answer: str) -> tuple[Kind | None, str]:
    """(kind of error, what to say of it); (None, …): the answer has what was asked for."""
    said = _plain(answer)
    right = _found(question, question.right, said)
    denied = [at for at in right if _is_denied(question, said, at)]
    wanted = question.right[0]
    if len(right) > len(denied):
        if denied:
            return "logic break", f"it says {wanted!r} and denies it: {_shown(said)}"
        if _is_swapped(question, said, right):
            return "mixed up roles", f"{wanted!r} is said of the wrong person: {_shown(said)}"
        return None, f"{wanted!r}"
    if denied:
        return "logic break", f"it denies {wanted!r}: {_shown(said)}"
    if _found(question, question.others, said):
        return "mixed up roles", (f"{question.others[0]!r} is the other person's, {wanted!r} was "
                                  f"asked for: {_shown(said)}")
    if question.counts and (_has_number(said) or _found(question, question.before, said)):
        return "logic break", f"{wanted!r} is what follows: {_shown(said)}"
    if _asks_back(question, said):
        return "repeated question", f"it asks for {wanted!r}: {_shown(said)}"
    return "forgot a fact", f"no {wanted!r}: {_shown(said)}"


def _plain(answer: str) -> str:
    """Without thoughts and Markdown, in small letters."""
    return re.sub(r"[*_`#]", "", _THOUGHT.sub("", answer)).replace("’", "'").lower()


def _shown(said: str) -> str:
    words = " ".join(said.split())
    return repr(words if len(words) <= SHOWN else words[:SHOWN] + "…")


def _found(question: Question, values: Sequence[str], said: str) -> list[int]:
    """Where one of these ways to say a value stands, as a word or number of its own."""
    found: list[int] = []
    for value in values:
        low = re.escape(value.lower())
        if value.isdigit():
            pattern = rf"(?<![\d.,]){low}(?!\d|[.,]\d)"
        elif question.language == "zh":
            numeral = question.counts
            pattern = rf"(?<![{_NUMERAL}]){low}(?![{_NUMERAL}])" if numeral else low
        else:
            more = rf"|\s(?:{_ONES})\b" if question.counts else ""  # thirty is not thirty five
            pattern = rf"(?<![\w-]){low}(?:s|es)?(?![\w-]{more})"
        found += [m.start() for m in re.finditer(pattern, said)]
    return found


def _is_denied(question: Question, said: str, at: int) -> bool:
    return re.search(_NOT[question.language] + r"\Z", said[max(0, at - 40):at]) is not None


# ------------------------------------------------------------------------------------ whose it is


def _is_swapped(question: Question, said: str, right: Sequence[int]) -> bool:
    """Every mention of the right value is of the other person; and either the asked one is not
    spoken of in that sentence at all, or has the other's value."""
    people = _people(question, said)
    if any(_owner(people, said, at) in (None, question.subject) for at in right):
        return False
    if any(_owner(people, said, at) == question.subject
           for at in _found(question, question.others, said)):
        return True
    return not any(person == question.subject and _same_sentence(said, where, at)
                   for at in right for where, person in people)


def _people(question: Question, said: str) -> list[tuple[int, Person]]:
    """Who is spoken of, and where, in order. "Your brother" is the brother."""
    names = "|".join(re.escape(x.lower()) for x in question.other_called)
    if question.language == "en":
        other = rf"(?:\b(?:your|my)\s+)?\b(?:{names})\b(?:'s)?|{_THEY['en']}"
    else:
        other = rf"(?:[你您我]的?)?(?:{names})|{_THEY['zh']}"
    return [(m.start(), "user" if m["user"] else "other") for m in re.finditer(
        rf"(?P<other>{other})|(?P<user>{_USER[question.language]})", said)]


def _owner(people: Sequence[tuple[int, Person]], said: str, at: int) -> Person | None:
    """Whoever was spoken of last before a value; if nobody was, then next in its sentence."""
    before = [person for where, person in people if where < at]
    if before:
        return before[-1]
    return next((person for where, person in people if _same_sentence(said, at, where)), None)


def _same_sentence(said: str, one: int, two: int) -> bool:
    return not re.search(r"[.!?。！？\n]", said[min(one, two):max(one, two)])


# ------------------------------------------------------------------------------- no answer at all


def _has_number(said: str) -> bool:
    return re.search(rf"\d|[{_NUMERAL}]{{2,}}", said) is not None


def _asks_back(question: Question, said: str) -> bool:
    """A sentence of it asks for the matter, or is the question itself."""
    asked = [s.strip().lower() for s in _SENTENCE.findall(question.text)]
    for sentence in (s.strip() for s in _SENTENCE.findall(said)):
        if any(SequenceMatcher(None, sentence, one).ratio() >= SAME for one in asked):
            return True
        if sentence.endswith(_ASKING) and any(word in sentence for word in question.about):
            return True
    return False
