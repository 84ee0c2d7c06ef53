"""Many events of a stream at once, at C's speed. Servers send the same bytes again and again but
for the text: once the slow path has understood one such event, its bytes around the text are a
template, and what equals it but for the text means the same. Whatever differs, or is not plainly a
JSON string, is left to the slow path.
"""

import itertools
import re
from collections.abc import Iterable, Sequence

import msgspec

_KEYS = (b'"content":', b'"text":', b'"reasoning_content":', b'"reasoning":')
_CHAR = rb'\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'  # escaped; no half of a pair
_TEXT = re.compile(rb' ?"((?:[^"\\\x00-\x1f]|' + _CHAR + rb')*)"')
_LAST = 4  # finish, usage, [DONE], and one more
_ODD = re.compile(rb'["\\\x00-\x1f]').search
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]*\Z').match
_decode = msgspec.json.Decoder(str).decode
_ESCAPED = re.compile(rb'(?:[^"\\\x00-\x1f]++|' + _CHAR + rb')*+\Z').match


class Template:
    """The bytes of an event before and after its text; `hidden`: the text is reasoning."""

    def __init__(self, before: bytes, after: bytes, hidden: bool) -> None:
        self._before, self._after, self._hidden = b"data: " + before, after, hidden
        self._between = after + b"\n\n" + self._before

    def whole(self, parts: Sequence[bytes], start: int) -> tuple[int, int | None]:
        """How many of the parts from `start` on are each just such an event; and which of them is
        the first that has a visible text."""
        if not parts[start].startswith(self._before):
            return 0, None
        texts = self._texts(list(parts[start:]), b"\n\n", b"")
        nth = next((i for i, text in enumerate(texts) if text), None)
        return len(texts), None if nth is None or self._hidden else start + nth

    def run(self, data: bytes, start: int) -> tuple[list[int], int | None]:
        """Where the events that follow the template end, one after the other from `start`; and the
        end of the first of them that has a visible text."""
        if not data.startswith(self._before, start):
            return [], None
        events = data[start:].split(b"\n\n")
        events.pop()  # not whole
        texts = self._texts(events, b"", b"\n\n")
        sizes = map((2).__add__, map(len, events[:len(texts)]))
        ends = list(itertools.accumulate(sizes, initial=start))[1:]
        nth = next((i for i, text in enumerate(texts) if text), None)
        return ends, None if nth is None or self._hidden else ends[nth]

    def said(self, events: Iterable[bytes]) -> str:
        """The visible text of such events, which `whole` or `run` has taken for that."""
        if self._hidden:
            return ""
        first, last = len(self._before), -len(self._after) - 2
        text: str = _decode(b'"%b"' % b"".join([event[first:last] for event in events]))
        return text

    def _texts(self, events: list[bytes], ending: bytes, gap: bytes) -> list[bytes]:
        """Of the first events that are nothing but the template with a text. They end with
        `ending`, and between them is a `gap`; takes others off the list's end."""
        after = self._after + ending
        for _ in range(_LAST):  # mostly it is the last ones that say something else
            if events and not self._is_one(events[-1], after):
                events.pop()
        first, last = len(self._before), -len(after)
        texts = [event[first:last] for event in events]
        if self._is_all(gap.join(events), texts, after):
            return texts
        alike = itertools.takewhile(lambda event: self._is_one(event, after), events)
        return [event[first:last] for event in alike]

    def _is_all(self, events: bytes, texts: list[bytes], after: bytes) -> bool:
        """Looked at all at once. (Their lengths add up only if none is shorter than the template,
        so each text is where it should be.)"""
        if not texts:
            return False
        said = b" ".join(texts)  # apart: nothing may begin in one and end in the next
        if (_ODD(said) and not _ESCAPED(said)) or not _is_utf8(said):
            return False
        return events == b"%b%b%b" % (self._before, self._between.join(texts), after)

    def _is_one(self, event: bytes, after: bytes) -> bool:
        first, last = len(self._before), len(after)
        if len(event) < first + last:
            return False
        text = event[first:-last]
        return (event.startswith(self._before) and event.endswith(after)
                and bool(_PLAIN(text) or _ESCAPED(text)) and _is_utf8(text))


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def template_of(payload: bytes) -> Template | None:
    """Of an event's payload that the slow path took for a token with a text and nothing else."""
    for key in _KEYS:
        at = payload.find(key)
        if at >= 0 and (match := _TEXT.match(payload, at + len(key))):
            return Template(payload[:match.start(1)], payload[match.end(1):], b"reasoning" in key)
    return None
