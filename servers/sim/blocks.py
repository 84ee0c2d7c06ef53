"""KV blocks: who holds how many, and what is findable by its hash."""

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """`free` blocks, those of requests, and idle ones whose content is still findable by hash and
    which are given away least recently used first."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self._refs: dict[int, int] = {}  # findable and in use
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable, nobody's

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
            elif h not in self._refs:
                break
            found += 1
        return found, idle

    def claim(self, hashes: Sequence[int]) -> None:
        for h in hashes:
            self._idle.pop(h, None)
            self._refs[h] = self._refs.get(h, 0) + 1

    def publish(self, hashes: Sequence[int]) -> int:
        """Makes blocks of the caller's findable: how many. It ends at one whose content is here
        already; what follows that one stays the caller's own."""
        for done, h in enumerate(hashes):
            if h in self._refs or h in self._idle:
                return done
            self._refs[h] = 1
        return len(hashes)

    def give_back(self, anonymous: int, hashes: Sequence[int]) -> None:
        self.free += anonymous
        for h in reversed(hashes):  # a prefix's tail goes first when memory is short
            self._refs[h] -= 1
            if not self._refs[h]:
                del self._refs[h]
                self._idle[h] = None
