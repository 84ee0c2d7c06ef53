"""Ways to go wrong on demand: of the whole server (`--fault oom@32`, `/sim/faults`), and of single
requests (header `x-sim-fault: truncate@5`, or `--fault truncate@5:0.1` for a tenth of them)."""

import difflib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from time import time

from servers.sim.engine import Engine
from servers.sim.errors import Refused, busy, engine_dead

ENGINE_KINDS = {  # at N running requests; in a header: after the K-th token
    "oom": "CUDA runs out of memory and the engine dies",
    "die": "a worker is killed and the engine dies",
    "hang": "no step ends any more, and /health stays 200",
}
SERVER_KINDS = {
    "oom-slack": "CUDA runs out of memory when the sampler needs more than N GiB",
    "oom-start": "CUDA runs out of memory in the warm-up: exit 1",
    "warmup": "503 to all for the first N seconds",
    "throttle": "a reverse proxy lets N requests per second and client pass, with a burst of 4 "
                "(default 2); 429 for the others",
    "throttle-503": "the same with nginx's default status",
}
REQUEST_KINDS = {
    # at once, without the engine
    "status-429": "429 with Retry-After: K (default 1)",
    "status-429-date": "429 with Retry-After: the date in K seconds (default 1)",
    "status-503": "503, as vLLM says that its queue is full",
    "status-503-retry": "503 with Retry-After: K (default 1)",
    "status-503-date": "503 with Retry-After: the date in K seconds (default 1)",
    "queue-event": "200, then vLLM's error event of a full queue, then [DONE]",
    "status-500": "500, as vLLM says that its engine is dead",
    "status-502": "502 with the page of a proxy",
    "wrong-type": "200, but application/json and no answer",
    "html": "200 with a page of HTML",
    "empty": "200 and an event stream without events",
    "refuse": "the connection is closed without an answer",
    "slow-first": "the engine gets the request K seconds late (default 3)",
    # after the K-th token (default 3)
    "error-event": "an error object, then [DONE]",
    "bad-json": "an event that is not JSON, then on as usual",
    "cut-json": "an event of half a JSON, then a clean end; of a whole answer half the body",
    "big-line": "an event of 700 kB, then on as usual",
    "truncate": "the connection is closed without the final chunk, as after a SIGKILL",
    "fin": "the body ends cleanly in the middle of the answer",
    "rst": "the connection is reset",
    "stall": "nothing more is sent, nor is the connection closed",
    # all along
    "slice": "events are written in pieces of 7 bytes",
    "drip": "events are written K seconds apart (default 3)",
    "no-finish": "the stream ends with [DONE], but no finish_reason and no usage",
    "no-done": "the stream ends without [DONE]",
}
IN_VIRTUAL_TIME = ("oom", "die", "oom-slack", "stall")  # those that there are without a wire
SILENCING = frozenset(("error-event", "truncate", "rst", "stall", "fin", "cut-json"))
SLICE_BYTES = 7
BIG_LINE_BYTES = 700_000
SAMPLER_BYTES = 12  # per running request and word of the vocabulary: logits in fp32, their
#                     softmax and their sorted copy, which vLLM's sampler holds at once
_DEFAULTS = {"throttle": 2.0, "throttle-503": 2.0, "oom-start": 1.0, **dict.fromkeys(
    ("status-429", "status-429-date", "status-503-retry", "status-503-date"), 1.0)}
_PAGE = ("<html>\r\n<head><title>{0}</title></head>\r\n<body>\r\n<center><h1>{0}</h1></center>\r\n"
         "<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n")


@dataclass(frozen=True, slots=True)
class Fault:
    """`at`: running requests (engine), or the token after which it strikes, or seconds, or GiB.
    `share`: of the requests that it strikes."""

    kind: str
    at: float
    share: float = 1.0

    def __str__(self) -> str:
        return f"{self.kind}@{self.at:g}" + (f":{self.share:g}" if self.share < 1 else "")


def parse_profile(text: str) -> Fault:
    """Of the whole server: `oom@32`, `throttle`, `truncate@5:0.1`. Raises ValueError."""
    what, colon, share = text.partition(":")
    known = [*ENGINE_KINDS, *SERVER_KINDS, *REQUEST_KINDS]
    kind = what.partition("@")[0]
    default = _DEFAULTS.get(kind, 3.0 if kind in REQUEST_KINDS else None)
    fault = _parse(what, known, default)
    if not colon:
        return fault
    if kind not in REQUEST_KINDS:
        raise ValueError(f"{text!r}: only faults of requests strike a share of them")
    return Fault(kind, fault.at, _number(share, f"{text!r}: write {what}:SHARE, SHARE up to 1", 1))


def parse_request_fault(text: str | None) -> Fault | None:
    """The header's value, `KIND` or `KIND@K`. Raises Refused."""
    if not text:
        return None
    try:
        return _parse(text, [*REQUEST_KINDS, *ENGINE_KINDS],
                      _DEFAULTS.get(text.partition("@")[0], 3.0))
    except ValueError as e:
        raise Refused(400, f"x-sim-fault: {e}", param="x-sim-fault") from None


def _parse(text: str, kinds: Sequence[str], default: float | None) -> Fault:
    kind, at_sign, number = text.partition("@")
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no fault {kind!r}{hint}; there are: {', '.join(kinds)}")
    if not at_sign and default is not None:
        return Fault(kind, default)
    return Fault(kind, _number(number, f"{text!r}: write {kind}@N, N a number above 0"))


def _number(text: str, wrong: str, most: float = 1e9) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= most:
        raise ValueError(wrong)
    return value


class Faults:
    """What is to go wrong now; it can be changed while the server runs."""

    def __init__(self, faults: Iterable[Fault], rng: random.Random,
                 clock: Callable[[], float]) -> None:
        self._rng, self._clock = rng, clock
        self._struck: str | None = None
        self._warm_s = 0.0
        self.set(faults)

    def set(self, faults: Iterable[Fault]) -> None:
        self.all = tuple(faults)
        self.throttle = self.of("throttle") or self.of("throttle-503")
        warmup = self.of("warmup")
        self._warm_s = self._clock() + warmup.at if warmup else 0.0

    def of(self, kind: str) -> Fault | None:
        return next((f for f in self.all if f.kind == kind), None)

    @property
    def is_warming_up(self) -> bool:
        return bool(self._warm_s) and self._clock() < self._warm_s

    def draw(self) -> Fault | None:
        """The fault of the next request, if it is to have one."""
        return next((f for f in self.all if f.kind in REQUEST_KINDS
                     and self._rng.random() < f.share), None)

    def strike(self, kind: str) -> None:
        """The engine falls at its next step."""
        self._struck = kind

    def due(self, engine: Engine) -> str | None:
        """How the engine falls now: "oom", "die" or "hang"."""
        for fault in self.all if self._struck is None else ():
            if fault.kind in ENGINE_KINDS and engine.running >= fault.at:
                return fault.kind
            if fault.kind == "oom-slack" and _sampler_gib(engine) > fault.at:
                return "oom"
        return self._struck


def _sampler_gib(engine: Engine) -> float:
    return float(engine.running * SAMPLER_BYTES * engine.config.machine.model.vocab / 2**30)


def refusal(fault: Fault | None) -> Refused | None:
    """The HTTP error that the fault asks for."""
    if fault is None:
        return None
    after, date = f"{fault.at:g}", formatdate(time() + fault.at, usegmt=True)
    return {
        "status-429": Refused(429, "Rate limit exceeded.", "Too Many Requests", None, after),
        "status-429-date": Refused(429, "Rate limit exceeded.", "Too Many Requests", None, date),
        "status-503": busy(),
        "status-503-retry": Refused(503, "Overload.", "Service Unavailable", None, after),
        "status-503-date": Refused(503, "Overload.", "Service Unavailable", None, date),
        "status-500": engine_dead(),
    }.get(fault.kind)


def page(title: str) -> bytes:
    """What a proxy says: HTML."""
    return _PAGE.format(title).encode()
