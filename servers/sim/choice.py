"""One of a request's answers while it is made: its tokens as events, and as a whole. No sockets."""

import random
from typing import Any

from servers.sim import scripts
from servers.sim.answers import Answer
from servers.sim.metrics import Tally
from servers.sim.scripts import Said, Script


class Choice:
    """`reason` is set when it has ended; `request_id` is its number in the engine. `interval`: an
    event tells of the first token, of every so many after it, and of the last one."""

    def __init__(self, answer: Answer, index: int, script: Script, due_s: float,
                 tally: Tally, interval: int = 1) -> None:
        self.index = index
        self.prompt_tok = len(answer.ask.prompts[answer.prompt_of(index)])
        self.script_tok, self.foreseen = script.tokens, script.foreseen
        self.tokens = 0
        self.reason: str | None = None
        self.request_id = 0
        self.due_s = due_s
        self.admitted_s: float | None = None  # when the engine began to compute it
        self.cached_tok = self.preemptions = 0
        self.first_s = self.last_s = 0.0
        self._answer, self._script, self._tally = answer, script, tally
        self._ask = answer.ask
        self._stop_string: str | None = None
        self._said: list[str] = []  # the model's own text, token by token …
        self._text = ""  # … and in one
        self._told = 0  # characters of it that went out: less, where a stop string may follow …
        self._told_tok = 0  # … and how many of `_said`
        self._interval = interval
        self._hold = max((len(s) for s in self._ask.sampling.stop), default=1) - 1
        sampling, shape = self._ask.sampling, self._ask.shape
        self._is_plain = (shape.stream and interval == 1 and script.tokens is None
                          and sampling.logprobs is None and not (
                              sampling.stop or shape.token_ids or shape.continuous_usage
                              or shape.echo))
        self._before, self._after = answer.plain(index) if shape.stream else (b"", b"")

    def token(self, now_s: float, reason: str | None, tell: bool = True) -> list[bytes]:
        """One more token, as the events that tell of it; the last one has a `reason`. An EOS
        ("stop") has no text. Not to `tell` it: it is told with the next one."""
        self.tokens += 1
        self._observe(now_s)
        said = None if reason == "stop" else next(self._script.said, None)
        if self.script_tok is not None and said is None:
            reason = "stop"
        if (self._is_plain and tell and reason is None and said is not None
                and self._told_tok == len(self._said) > 0):
            return [self.event(said.json)]
        return self._told_in_full(said, reason, tell)

    def event(self, said_json: bytes) -> bytes:
        """The event of a text that says nothing else."""
        return self._before + said_json + self._after

    def unfinished(self) -> bytes:
        """The last token without a reason to end."""
        return self.event(b'""')

    def cut(self, reason: str) -> list[bytes]:
        """It ends between two tokens."""
        return self._finish(None, reason, held=True)

    def _told_in_full(self, said: Said | None, reason: str | None, tell: bool) -> list[bytes]:
        self._said.append(said.text if said else "")
        self._text += self._said[-1]
        events = []
        if self.tokens == 1 and self._ask.chat and self._ask.shape.stream:
            events = [self._answer.role(self.index)]
        if said is not None and self._ask.sampling.stop and self._stopped():
            reason = "stop"
        if reason is not None:
            return events + self._finish(said, reason)
        if not self._ask.shape.stream or self._waits(tell):
            return events
        delta, shown = self._delta(said, held=False)
        sampling, shape = self._ask.sampling, self._ask.shape
        if self._ask.chat and not delta and sampling.logprobs is None and not shape.token_ids:
            return events
        first, tokens = not self._told_tok, self._untold()
        return [*events, self._answer.token(
            self.index, delta, shown, self.tokens, self._answer.ids(tokens),
            self._logprobs(tokens), first)]

    def _waits(self, tell: bool) -> bool:
        """It is told with a later one. (Tool calls are told part by part.)"""
        return not self._script.calls and (
            not tell or bool((self.tokens - 1) % self._interval))

    def _untold(self) -> list[str]:
        tokens, self._told_tok = self._said[self._told_tok:], len(self._said)
        return tokens

    def _finish(self, said: Said | None, reason: str, held: bool = False) -> list[bytes]:
        """The finishing event. `held`: it is no token's."""
        self.reason = reason
        delta, shown = self._delta(said, held=True)
        if reason == "stop" and self._called() and not self._ask.constraint.named:
            self.reason = "tool_calls"
        self._tally.finished(self, reason)
        if not self._ask.shape.stream:
            return []
        first, tokens = not self._told_tok, self._untold()
        return [self._answer.finish(
            self.index, delta, shown, self.tokens, self._answer.ids(tokens),
            self._logprobs(tokens) if any(tokens) else None, self.reason, self._stop_string,
            first)]

    def _delta(self, said: Said | None, held: bool) -> tuple[scripts.Delta, str]:
        """(what a chat is told now, the same as text)."""
        if said is not None and not (said.delta or {}).get("content"):
            self._told = len(self._text)  # of a tool call, as far as that is told
            return said.delta or {}, ""
        end = len(self._text) if held else max(self._told, len(self._text) - self._hold)
        if self._stop_string is not None:
            end = self._text.index(self._stop_string, self._search_from())
        shown = self._text[self._told:end]
        self._told += len(shown)
        if not self._told_tok and self._ask.shape.stream:
            shown = self._answer.echoed(self.index) + shown
        return ({"content": shown} if shown else {}), shown

    def _search_from(self) -> int:
        """Where a stop string can begin that ends in the last token."""
        return max(0, len(self._text) - len(self._said[-1]) - self._hold)

    def _stopped(self) -> bool:
        since = self._search_from()
        found = [(self._text.find(s, since), s) for s in self._ask.sampling.stop]
        hits = sorted(x for x in found if x[0] >= 0)
        self._stop_string = hits[0][1] if hits else None
        return bool(hits)

    def _called(self) -> bool:
        return self._script.calls and "<tool_call>" in self._text

    def _logprobs(self, tokens: list[str]) -> Any:
        if self._ask.chat:
            return self._answer.chat_logprobs(tokens)
        return self._answer.completion_logprobs(tokens, len(self._text) - len("".join(tokens)))

    # ------------------------------------------------------------------------------ as one body

    def told(self) -> dict[str, Any]:
        """The finished choice as a part of a whole answer."""
        reason, stop = self.reason or "length", self._stop_string
        said = [t for t in self._said if t] if reason in ("stop", "tool_calls") else self._said
        whole = self._text[:self._told] if stop is not None else self._text
        ids = self._answer.ids(self._said) if self._ask.shape.token_ids else []
        if not self._ask.chat:
            prompt = self._answer.prompt_pieces(self.index) if self._ask.shape.echo else []
            logprobs = self._answer.completion_logprobs([*prompt, *said], 0, len(prompt))
            return self._answer.completion(self.index, self._answer.echoed(self.index) + whole,
                                           reason, stop, ids, logprobs)
        content: str | None = whole
        calls: Any = ()
        if self._called() and reason != "length":
            content, calls = scripts.parsed(whole, random.Random(self._answer.id))
            if calls and self._ask.constraint.tool_choice != "auto":
                content = content or ""
            elif not calls and self._ask.constraint.tool_choice == "auto":
                reason = "stop"
        return self._answer.message(self.index, content, calls, reason, stop, ids,
                                    self._answer.chat_logprobs(said))

    def _observe(self, now_s: float) -> None:
        tally = self._tally
        tally.generation_tok += 1
        if self.tokens == 1:
            self.first_s = now_s
            tally.first_token(self)
        else:
            tally.itl.observe(now_s - self.last_s)
        self.last_s = now_s
