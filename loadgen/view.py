"""What the operator sees while legs run: on a terminal a live table, one row per leg, with the
running one's progress and the time left; elsewhere one line per leg."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loadgen.judge import Judgement
from loadgen.leg import Leg
from loadgen.supervise import Progress

_COLOURS = {"SAFE": "green", "UNSAFE": "red", "UNRESOLVED": "yellow", "INVALID": "magenta"}


class Listener(Protocol):
    """Who hears what the operator sees."""

    def progress(self, now: Progress) -> None: ...

    def judged(self, leg: Leg, judgement: Judgement) -> None: ...


class View:
    """Use as `with View(…) as view`. `budget_s`: of the whole search; None for a single leg.
    `checks_later`: answers are checked when their leg is over, and one that is not valid is a miss;
    until then nobody knows which of them are good."""

    def __init__(self, console: Console, budget_s: float | None = None,
                 checks_later: bool = False) -> None:
        self._console, self._budget_s, self._checks_later = console, budget_s, checks_later
        self._began = time.monotonic()
        self._done: list[tuple[Leg, Judgement]] = []
        self._now: Progress | None = None
        self._waits: Callable[[], Text] | None = None
        self.listener: Listener | None = None
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render,
                          vertical_overflow="visible") if console.is_terminal else None

    def __enter__(self) -> Self:
        self._began = time.monotonic()  # what a server takes to start is not of the budget
        if self._live:
            self._live.start()
        else:
            self._console.print(LINE_HEAD, soft_wrap=True, highlight=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self._now = None
        if self._live:
            self._live.stop()

    def progress(self, now: Progress) -> None:
        self._now = now
        if self.listener is not None:
            self.listener.progress(now)

    def judged(self, leg: Leg, judgement: Judgement) -> None:
        self._now = None
        if self.listener is not None:
            self.listener.judged(leg, judgement)
        self._done.append((leg, judgement))
        if not self._live:
            self._console.print(line(leg, judgement), soft_wrap=True, highlight=False)

    def say(self, text: str) -> None:
        """A line above the table."""
        self._console.print(text, soft_wrap=True, highlight=False)

    @contextlib.contextmanager
    def waiting(self, patience_s: float, doing: Callable[[], str]) -> Iterator[None]:
        """While a server starts. `doing`: what it says that it does, the last line of its log."""
        began = time.monotonic()

        def waits() -> Text:
            line = f"waiting for the server: {_clock(time.monotonic() - began)}  {doing()}"
            return Text(line, style="dim", no_wrap=True, overflow="ellipsis")
        self._waits = waits
        alone = self._live is None or self._live.is_started
        try:
            if self._live is None:
                self.say(f"waiting for the server, at most {_clock(patience_s)} …")
            with contextlib.nullcontext() if alone else Live(
                    console=self._console, get_renderable=waits, transient=True):
                yield
        finally:
            self._waits = None

    # ---------------------------------------------------------------------------------- inside

    def _render(self) -> Group:
        gap = 2 if self._console.width >= 100 else 1
        table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim")
        for name in ("level", "phase"):
            table.add_column(name, no_wrap=True)
        for name in ("n", "good", "req/s", "TTFT p50", "TPOT p50", "E2E p50", "errors"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("verdict")  # it alone may wrap: rich narrows whoever may before the rest
        for leg, j in self._done:
            table.add_row(*_cells(leg, j), Text(_verdict(j), style=_COLOURS.get(_kind(j), "")))
        if self._now is None:
            return Group(table, self._waits() if self._waits else Text(""))
        return Group(table, self._running(self._now))

    def _running(self, now: Progress) -> Table:
        total_s = now.leg.warmup_s + (now.leg.measure_s or 0.0)
        state = ("stopping" if now.stopping
                 else "draining" if now.leg.measure_s and now.elapsed_s > total_s
                 else "warm-up" if now.elapsed_s < now.leg.warmup_s else "measuring")
        good = f"{now.done} done"
        if now.sampled:
            good = f"{now.good}/{now.sampled} " + (
                "in time, not yet checked" if self._checks_later else "good")
        here, whole, of = now.elapsed_s, total_s, f"/{total_s:.0f}"
        if now.leg.num_sessions is not None:  # a number of requests takes as long as it takes
            here, whole, of = float(now.done), float(now.leg.num_sessions), ""
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(
            Text(f"{now.leg.value:g} {now.leg.phase}", style="bold"),
            ProgressBar(total=max(whole, 0.1), completed=min(here, whole), width=24),
            Text(f"{now.elapsed_s:.0f}{of} s"), Text(state, style="cyan"),
            Text(f"{now.inflight} in flight"), Text(good), Text(self._left(), style="dim"))
        return line

    def _left(self) -> str:
        if self._budget_s is None:
            return ""
        left_s = max(0.0, self._budget_s - (time.monotonic() - self._began))
        return f"≤ {_clock(left_s)} left"


def _clock(seconds: float) -> str:
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


LINE_HEAD = "level phase        n    good  req/s  TTFT p50  TPOT p50   E2E p50  errors  verdict"


def line(leg: Leg, j: Judgement) -> str:
    """A judged leg in one line, under LINE_HEAD."""
    value, phase, n, good, rate, ttft, tpot, e2e, errors = _cells(leg, j)
    return (f"{value:>5} {phase:8} {n:>5}  {good:>6}  {rate:>5}  {ttft:>8}  {tpot:>8}  {e2e:>8}  "
            f"{errors:>6}  {_verdict(j)}")


def _cells(leg: Leg, j: Judgement) -> tuple[str, ...]:
    share = "–" if j.attainment is None else f"{'≤ ' if j.cut else ''}{100 * j.attainment:.0f} %"
    return (f"{leg.value:g}", leg.phase, str(j.n), share, f"{j.achieved_rps:.2f}",
            _ms(j.ttft_p50_s), _ms(j.tpot_p50_s), _ms(j.e2e_p50_s), str(j.errors))


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1000 * seconds:.0f} ms"


def _kind(j: Judgement) -> str:
    return "INVALID" if j.measurement == "INVALID" else j.load


def _verdict(j: Judgement) -> str:
    """The load verdict; the measurement's, where it is not VALID."""
    if j.measurement == "INVALID":
        return f"INVALID ({j.findings[0].rule})"
    if j.n == 0 and j.load == "UNRESOLVED":
        return "nothing was due yet: answers take longer"
    words: str = "not refuted" if j.load == "UNRESOLVED" and j.phase == "ladder" else j.load
    if j.excused:
        words = "no evidence: prompts crowded each other at the start"
    suspect = f"; SUSPECT ({', '.join(f.rule for f in j.findings)})" if j.findings else ""
    return f"{words}{', cut short' if j.cut else ''}{suspect}"
