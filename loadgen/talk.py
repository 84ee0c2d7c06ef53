"""A session as it goes: what its user says next, after all that was said before in the server's own
words. Pure: whoever sends its requests tells it what came of them."""

from loadgen import openai, plan
from loadgen.plan import Session
from loadgen.prompts import Ratio
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Scenario

OVER = frozenset({Outcome.DROPPED, Outcome.CANCELLED})  # our own doing: the session ends with it
HEARD = frozenset({Outcome.OK, Outcome.ABANDONED})  # an answer, or what the user saw of it


class Talk:
    """One session: its texts, made ahead of time, and its history. An exchange that failed leaves
    no trace in the history (a question without an answer is refused by many chat templates), and
    the user goes on; of an answer that was left, what had come is kept."""

    def __init__(self, mix: Scenario, model: str, planned: Session, seed: int,
                 ratio: Ratio) -> None:
        self.planned, self.turn = planned, 0
        self._cls = mix.of(planned.cls)
        self._endpoint, self._model, self._seed = mix.endpoint, model, seed
        self._texts = [plan.prompt(self._cls, planned, turn, seed, ratio)
                       for turn in range(len(planned.turns))]
        self._history: list[dict[str, str]] = []
        self._history_tok = 0
        self._first: bytes | None = self._body()

    @property
    def what(self) -> plan.Turn:
        return self.planned.turns[self.turn]

    @property
    def keeps(self) -> bool:
        """A later turn will need the answer's text; a given one has its own."""
        later = self.planned.turns[self.turn + 1:self.turn + 2]
        return any(turn.text is None for turn in later)

    @property
    def want_prompt_tok(self) -> int | None:
        """What the server should count: all that was said before, and what this turn adds; of a
        given prompt, nobody knows."""
        return None if self.what.text is not None else self._history_tok + self.what.prompt_tok

    def body(self) -> bytes:
        """Of the turn that is next. The first one's was made ahead, too."""
        if self._first is not None:
            return self._first
        return self._body()

    def heard(self, record: RequestRecord, text: str) -> bool:
        """The turn's request has ended, and `text` was seen of its answer. True: there is another
        turn."""
        self._first = None
        if record.outcome in HEARD and text and self.keeps:
            self._history += [{"role": "user", "content": self._texts[self.turn]},
                              {"role": "assistant", "content": text}]
            asked_tok = record.prompt_tok or self.want_prompt_tok or 0
            self._history_tok = asked_tok + (record.output_tok or 0)
        if record.outcome in OVER or self.turn + 1 == len(self.planned.turns):
            return False
        self.turn += 1
        return True

    @property
    def rest_ns(self) -> int:
        """How long its slot rests when it is over: its user thinks before the next one, too."""
        return round(self.planned.turns[0].think_s * 1e9)

    def due_ns(self, ended_ns: int, now_ns: int) -> int:
        """When the next turn is due: its user has thought since the last answer's end. Never in
        the past: a slot is free when its answer's end was seen."""
        return max(now_ns, ended_ns + round(self.what.think_s * 1e9))

    def _body(self) -> bytes:
        before = self._history if self.what.text is None else [
            {"role": role, "content": text} for role, text in self.what.before]
        messages = [*before, {"role": "user", "content": self._texts[self.turn]}]
        return openai.conversation(self._endpoint, self._model, messages, self.what.output_tok,
                                   self._cls.sampling, plan.wire(
                                       self._cls, self.planned, self.turn, self._seed))
