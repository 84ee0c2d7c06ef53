"""Gaps between token events by the hundred million: as counts per µs, which is exact, and no more
than a few MB however many there are."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Raw, Struct

from loadgen import metrics

Ints = np.ndarray[tuple[int], np.dtype[Any]]  # whole numbers
DENSE = 1 << 20  # gaps under a second are counted in place; the few longer ones are kept
DIGITS = 8  # of a gap: up to 100 s; what is longer is read one by one
PAD = b"[" * 8  # so that there are 8 bytes before each number
_U = np.uint64


class Gaps(Struct, frozen=True, eq=False):
    """How often each gap was seen; ascending."""

    value_us: Ints
    count: Ints

    @property
    def n(self) -> int:
        return int(self.count.sum())

    def quantile_s(self, q: float) -> float | None:
        """As `metrics.quantile` of all of them. None where there are none."""
        n = self.n
        if n == 0:
            return None
        rank = min(n - 1, math.ceil(q * n) - 1)
        return float(self.value_us[np.searchsorted(np.cumsum(self.count), rank, "right")]) / 1e6

    def distribution(self, name: str, tails: Sequence[float]) -> dict[str, object]:
        """As `steps.distribution`."""
        n = self.n
        return {f"{name}_n": n,
                f"{name}_mean_s": float(self.value_us @ self.count) / n / 1e6 if n else None,
                **{f"{name}_p{100 * q:.0f}_s": self.quantile_s(q)
                   if q == 0.5 or n >= metrics.min_n(q) else None for q in (0.5, *tails)},
                f"{name}_max_s": float(self.value_us[-1]) / 1e6 if n else None}


class Pool:
    """Adds gaps up."""

    def __init__(self) -> None:
        self._dense = np.zeros(0, np.int64)
        self._long: list[Ints] = []

    def add(self, gaps_us: Ints) -> None:
        if not len(gaps_us):
            return
        if int(gaps_us.max()) >= DENSE or int(gaps_us.min()) < 0:
            odd = (gaps_us >= DENSE) | (gaps_us < 0)
            self._long.append(gaps_us[odd].astype(np.int64))
            gaps_us = gaps_us[~odd]
        counts = np.bincount(gaps_us)
        if len(counts) > len(self._dense):
            self._dense = np.concatenate([self._dense,
                                          np.zeros(len(counts) - len(self._dense), np.int64)])
        self._dense[:len(counts)] += counts

    def gaps(self) -> Gaps:
        here = np.flatnonzero(self._dense)
        odd, many = np.unique(np.concatenate([np.empty(0, np.int64), *self._long]),
                              return_counts=True)
        values = np.concatenate([here, odd])
        order = np.argsort(values, kind="stable")
        return Gaps(values[order], np.concatenate([self._dense[here], many])[order])


def flatten(texts: Sequence[Raw]) -> tuple[Ints, Ints] | None:
    """JSON arrays of small whole numbers → all their values in one array, and how many each text
    has. An empty text has none. None: something else is among them."""
    blob = b"".join([PAD, *(text or b"[]" for text in texts)])
    if blob.translate(None, b"0123456789,[]") or blob.count(b"[") != len(texts) + len(PAD):
        return None
    given = np.frombuffer(blob, np.uint8)
    marks = np.flatnonzero(given - np.uint8(48) > 9)  # what is no digit wraps to over 9
    length = np.diff(marks) - 1
    if length.max(initial=0) > DIGITS:
        return None
    opens = np.flatnonzero(given == ord("["))[len(PAD):]
    at = np.searchsorted(marks, opens)
    empty = given[opens + 1] == ord("]")
    counts = np.diff(np.append(at, len(marks))) - 1 - empty
    ends = np.ones(len(length), bool)  # of the marks but the first: a number ends there
    ends[at - 1] = ends[at[empty]] = ends[:len(PAD) - 1] = False
    return _numbers(blob, marks[1:], length)[ends], counts


def _numbers(blob: bytes, marks: Ints, length: Ints) -> Ints:
    """The numbers of at most 8 digits that end before the bytes `marks`, anything where there is
    none: the 8 bytes there are one word, in which digits become pairs, pairs become fours, and
    fours the number (each step multiplies and adds two neighbours at once)."""
    words = np.ndarray(len(blob) - 7, "<u8", blob, strides=(1,))[np.maximum(marks - 8, 0)]
    others = ((8 - length) << 3).view(np.uint64)
    words >>= others  # the first byte is the lowest: what stands before the number falls out …
    words <<= others  # … and zeros come in
    words &= _U(0x0F0F0F0F0F0F0F0F)
    for neighbours, bits, keep in ((10, 8, 0x00FF00FF00FF00FF), (100, 16, 0x0000FFFF0000FFFF),
                                   (10_000, 32, 0x00000000FFFFFFFF)):
        words *= _U((neighbours << bits) + 1)
        words >>= _U(bits)
        words &= _U(keep)
    numbers: Ints = words.astype(np.int32)
    return numbers
