"""Many events of a stream at once, at C's speed. Servers send the same bytes again and again but
for the text: once the slow path has understood one such event, its bytes around the text are a
template, and what equals it but for the text means the same. Whatever differs, or is not plainly a
JSON string, is left to the slow path.
"""

import itertools
import re

_KEYS = (b'"content":', b'"text":', b'"reasoning_content":', b'"reasoning":')
_TEXT = re.compile(rb' ?"((?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*)"')
_LAST = 4  # finish, usage, [DONE], and one more
_ODD = re.compile(rb'["\\\x00-\x1f]').search
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]*\Z').match
_ESCAPED = re.compile(
    rb'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+\Z').match


class Template:
    """The bytes of an event before and after its text; `hidden`: the text is reasoning."""

    def __init__(self, before: bytes, after: bytes, hidden: bool) -> None:
        self._before, self._after, self._hidden = b"data: " + before, after, hidden
        self._between = after + b"\n\n" + self._before

    def run(self, data: bytes, start: int) -> tuple[list[int], int | None]:
        """Where the events that follow the template end, one after the other from `start`; and the
        end of the first of them that has a visible text."""
        if not data.startswith(self._before, start):
            return [], None
        events = data[start:].split(b"\n\n")
        events.pop()  # not whole
        for _ in range(_LAST):  # mostly it is the last ones that say something else
            if events and not self._is_one(events[-1]):
                events.pop()
        first, last = len(self._before), -len(self._after)
        texts = [event[first:last] for event in events]
        if not self._is_all(data, start, texts):
            events = list(itertools.takewhile(self._is_one, events))
            texts = [event[first:last] for event in events]
        sizes = map((2).__add__, map(len, events))
        ends = list(itertools.accumulate(sizes, initial=start))[1:]
        nth = next((i for i, text in enumerate(texts) if text), None)
        return ends, None if nth is None or self._hidden else ends[nth]

    def _is_all(self, data: bytes, start: int, texts: list[bytes]) -> bool:
        """The events are nothing but the template with these texts: looked at all at once."""
        if not texts:
            return False
        said = b" ".join(texts)  # apart: no escape may begin in one and end in the next
        if _ODD(said) and not _ESCAPED(said):
            return False
        whole = b"%b%b%b\n\n" % (self._before, self._between.join(texts), self._after)
        return data.startswith(whole, start)

    def _is_one(self, event: bytes) -> bool:
        first, last = len(self._before), len(self._after)
        if len(event) < first + last:
            return False
        text = event[first:-last]
        return (event.startswith(self._before) and event.endswith(self._after)
                and bool(_PLAIN(text) or _ESCAPED(text)))


def template_of(payload: bytes) -> Template | None:
    """Of an event's payload that the slow path took for a token with a text and nothing else."""
    for key in _KEYS:
        at = payload.find(key)
        if at >= 0 and (match := _TEXT.match(payload, at + len(key))):
            return Template(payload[:match.start(1)], payload[match.end(1):], b"reasoning" in key)
    return None
