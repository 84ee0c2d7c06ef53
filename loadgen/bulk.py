"""Many events of a stream at once, at C's speed. Servers send the same bytes again and again but
for the text: once the slow path has understood one such event, its bytes around the text are a
template, and what equals it but for the text means the same. Whatever differs, or is not plainly a
JSON string, is left to the slow path.
"""

import re

_KEYS = (b'"content":', b'"text":', b'"reasoning_content":', b'"reasoning":')
_TEXT = re.compile(rb' ?"((?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*)"')
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]*\Z').match
_ESCAPED = re.compile(rb'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*\Z').match


class Template:
    """The bytes of an event before and after its text; `hidden`: the text is reasoning."""

    def __init__(self, before: bytes, after: bytes, hidden: bool) -> None:
        self._hidden = hidden
        self._before = b"data: " + before
        self._after = after + b"\n\n"
        self._between = self._after + self._before

    def run(self, data: bytes, start: int) -> tuple[list[int], int | None]:
        """Where the events that follow the template end, one after the other from `start`; and the
        end of the first of them that has a visible text."""
        if not data.startswith(self._before, start):
            return [], None
        texts = data[start + len(self._before):].split(self._between)
        texts[-1], found, _ = texts[-1].partition(self._after)
        if not found:  # the last one is another event, or not whole
            texts.pop()
        ends, visible, at, step = [], None, start, len(self._between)
        for text in texts:
            if not (_PLAIN(text) or _ESCAPED(text)):
                break
            at += step + len(text)
            ends.append(at)
            if text and visible is None and not self._hidden:
                visible = at
        return ends, visible


def template_of(payload: bytes) -> Template | None:
    """Of an event's payload that the slow path took for a token with a text and nothing else."""
    for key in _KEYS:
        at = payload.find(key)
        if at >= 0 and (match := _TEXT.match(payload, at + len(key))):
            return Template(payload[:match.start(1)], payload[match.end(1):], b"reasoning" in key)
    return None
