"""KV blocks: who holds how many, and what is findable by its hash."""

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """`free` blocks, those of requests, and idle ones whose content is still findable by hash and
    which are given away least recently used first."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self._used: set[int] = set()  # findable, and in use …
        self._more: dict[int, int] = {}  # … by so many more than one
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable, nobody's

    @property
    def findable_used(self) -> int:
        return len(self._used)

    @property
    def available(self) -> int:
        return self.free + len(self._idle)

    def take(self, n: int) -> None:
        """`n` blocks for new content; the caller has seen that so many are available."""
        fresh = min(n, self.free)
        self.free -= fresh
        for _ in range(n - fresh):
            self._idle.popitem(last=False)

    def match(self, hashes: Sequence[int], most: int) -> tuple[int, int]:
        """(leading blocks of `hashes` that are here, `most` at most; how many of them are idle)."""
        found = idle = 0
        for h in hashes[:most]:
            if h in self._idle:
                idle += 1
            elif h not in self._used:
                break
            found += 1
        return found, idle

    def claim(self, hashes: Sequence[int]) -> None:
        for h in hashes:
            if h in self._used:
                self._more[h] = self._more.get(h, 0) + 1
            else:
                del self._idle[h]
                self._used.add(h)

    def publish(self, hashes: Sequence[int]) -> int:
        """Makes blocks of the caller's findable: how many. It ends at one whose content is here
        already; what follows that one stays the caller's own."""
        new = len(hashes)
        if not (self._used.isdisjoint(hashes) and self._idle.keys().isdisjoint(hashes)):
            new = next(i for i, h in enumerate(hashes) if h in self._used or h in self._idle)
        self._used.update(hashes[:new])
        return new

    def give_back(self, anonymous: int, hashes: Sequence[int]) -> None:
        """A prefix's tail is the first to go when memory is short."""
        self.free += anonymous
        if self._more and (shared := self._more.keys() & set(hashes)):
            for h in shared:
                self._one_less(h)
            hashes = [h for h in hashes if h not in shared]
        self._used.difference_update(hashes)
        idle = self._idle
        for h in reversed(hashes):
            idle[h] = None

    def _one_less(self, h: int) -> None:
        self._more[h] -= 1
        if not self._more[h]:
            del self._more[h]
