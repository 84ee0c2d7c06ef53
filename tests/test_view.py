"""The table of levels on a terminal."""

import io

import msgspec
import pytest
from rich.console import Console

from analysis import frame
from loadgen.judge import Judgement
from loadgen.leg import Leg
from loadgen.store import RunFolder
from loadgen.validity import Finding
from loadgen.view import View
from tests import synthetic

LONG = [Finding("simulator-late", "SUSPECT", "late", "wait"),
        Finding("prompt-length", "SUSPECT", "short", "calibrate")]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Leg, Judgement]]:
    """Legs and their verdicts, the last one with a verdict as long as they come."""
    folder = synthetic.write(tmp_path_factory.mktemp("view") / "sweep")
    run = frame.load(folder)
    legs = [leg for leg, _ in RunFolder(folder).legs()]
    *rest, last = zip(legs, run.judgements, strict=True)
    return [*rest, (last[0], msgspec.structs.replace(
        last[1], load="UNRESOLVED", excused=True, cut=True, findings=LONG))]


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_a_long_verdict_takes_no_room_from_the_figures(
        judged: list[tuple[Leg, Judgement]], columns: int) -> None:
    shown = io.StringIO()
    with View(Console(file=shown, force_terminal=True, width=columns, color_system=None)) as view:
        for leg, judgement in judged:
            view.judged(leg, judgement)
    text = shown.getvalue()
    assert "…" not in text
    for name in ("level", "phase", "req/s", "TTFT p50", "TPOT p50", "E2E p50", "errors"):
        assert name in text
    for word in ("crowded", "(simulator-late,", "prompt-length)"):
        assert word in text
    for leg, _ in judged:
        assert f"\n{leg.value:g} " in text.replace("\r", "\n")
