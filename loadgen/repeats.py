"""How much of a text was said before in it, or in another one: by n-grams of words, or of single
characters where words are not spaced apart."""

import re
import zlib
from typing import Final

from msgspec import Struct

CJK: Final = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff"
N: Final = 8  # units of an n-gram: a turn of phrase comes twice, eight words in a row hardly do
N_COPIED: Final = 5  # of a translation nothing but names can be the source's
WINDOW: Final = 60  # units in which repetition is looked for …
LOOPS: Final = 0.7  # … and the share of them from which on it has begun
_UNIT = re.compile(rf"[{CJK}]|[^\W{CJK}]{{1,12}}")


class Repeats(Struct, frozen=True):
    """`share`: of the n-grams, those that came before. `begins`: the character from which on the
    text says hardly anything new, to its end; None: it does not. `packed`: bytes that are left
    when it is compressed, a share; a loop has a few hundredths, prose about a half."""

    share: float
    begins: int | None
    packed: float

    @property
    def says(self) -> str:
        if self.begins is not None:
            return f"from character {self.begins} on it repeats itself ({100 * self.share:.0f} %)"
        return f"{100 * self.share:.0f} % repeated"


def of(text: str) -> Repeats:
    units = [(m.group().lower(), m.start()) for m in _UNIT.finditer(text)]
    old = _seen_before([u for u, _ in units])
    raw = text.encode(errors="replace")
    packed = len(zlib.compress(raw, 6)) / len(raw) if raw else 1.0
    first = _begins(old)
    return Repeats(sum(old) / len(old) if old else 0.0,
                   None if first is None else units[first][1], packed)


def copied(text: str, source: str) -> float:
    """Share of the text's n-grams that stand in the source."""
    own, theirs = _grams(_units(text), N_COPIED), set(_grams(_units(source), N_COPIED))
    return sum(g in theirs for g in own) / len(own) if own else 0.0


def _units(text: str) -> list[str]:
    return [m.group().lower() for m in _UNIT.finditer(text)]


def _grams(units: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(units[i:] for i in range(n)), strict=False))


def _seen_before(units: list[str]) -> list[bool]:
    """Of each n-gram, whether it came before."""
    seen: set[tuple[str, ...]] = set()
    found = []
    for gram in _grams(units, N):
        found.append(gram in seen)
        seen.add(gram)
    return found


def _begins(old: list[bool]) -> int | None:
    """The first n-gram after which each window to the end is mostly old. A text shorter than a
    window does not say."""
    if len(old) < WINDOW:
        return None
    inside = sum(old[-WINDOW:])
    start = len(old) - WINDOW
    if inside < LOOPS * WINDOW:
        return None
    while start > 0:
        inside += old[start - 1] - old[start + WINDOW - 1]
        if inside < LOOPS * WINDOW:
            break
        start -= 1
    while start < len(old) and not old[start]:
        start += 1
    return start
