"""Runs of three requests, of none, and of a leg that was empty: the right verdict, and no figure
that so few cannot bear, wherever figures are shown."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from analysis import charts, ci, comparison, frame, gate, report, steps, words
from analysis import compare as comparing
from analysis.frame import Run
from loadgen import cli
from tests import synthetic
from tests.real import loadgen

NO_NUMBER = re.compile(r"\b(nan|inf|None(?!:)|null|NaT)\b")


class Visible(HTMLParser):
    """What a reader sees of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style", "details")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style", "details")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)


@pytest.fixture(params=[0, 1, 3, 5])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    return frame.load(synthetic.write_plain(tmp_path / "run", synthetic.few(request.param)))


def shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """All that people read of a run."""
    monkeypatch.setattr(report, "_library", str)
    page = Visible()
    page.feed(report.write(run).read_text(encoding="utf-8"))
    console = Console(record=True, width=300, file=io.StringIO())
    comparison.show(console, comparing.compare(run, run))
    return {"terminal": "\n".join(words.verdict(run)), "report": " ".join(page.text),
            "markdown": ci.markdown(run), "junit": ci.junit(run),
            "table": " ".join(steps.cells(steps.table(run).to_dict("records")[0])),
            "comparison": console.export_text()}


def test_nobody_is_told_a_number_that_is_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for where, text in shown(run, monkeypatch).items():
        assert not NO_NUMBER.search(text), (where, NO_NUMBER.search(text))


def test_nobody_is_told_a_tail_of_so_few(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said = shown(run, monkeypatch)
    assert not re.search(r"p9\d[_ ]?s?\W{0,3}[\d.]+ m?s", said["report"])
    assert not re.search(r"p9\d", said["comparison"])
    # of three answers the slow one took 9 s: as a p90 or p99 it would read so, but it stands
    # nowhere except as what it is, the largest
    row = steps.table(run).to_dict("records")[0]
    for name in ("ttft", "ttft_service", "tpot", "e2e"):
        for q in ("p90", "p99"):
            assert row[f"{name}_{q}_s"] is None or row[f"{name}_{q}_s"] != row[f"{name}_{q}_s"]
    heads = [h for h in steps.HEADS if " / p90" in h]
    cells = dict(zip(steps.HEADS, steps.cells(row), strict=True))
    assert all(cells[h].endswith("/ –") for h in heads)


def test_so_few_are_inconclusive_and_say_how_many_more_it_takes(run: Run) -> None:
    assert gate.exit_code(run) == cli.INCONCLUSIVE
    first, _, third = words.answer(run).verdict.three
    assert first.startswith("Unresolved at 2 concurrent requests")
    assert re.fullmatch(r"\d+ more requests like these would settle it(, about \d+ more minutes?)?:"
                        r" --duration\.", third)


def test_of_three_of_which_one_was_late_nothing_is_concluded(tmp_path: Path) -> None:
    run = frame.load(synthetic.write_plain(tmp_path / "run", synthetic.few(3, late_s=9.0)))
    assert gate.exit_code(run) == cli.INCONCLUSIVE
    first, _, third = words.answer(run).verdict.three
    assert "2 of 3 met" in first
    assert third == ("If that share stays, 95 % is missed: a longer run would show it "
                     "(--duration), a lower load may hold.")


def test_charts_of_so_few_can_be_drawn(run: Run) -> None:
    answer = words.answer(run)
    if len(answer.levels):
        charts.throughput(run, answer).to_dict()


@pytest.mark.parametrize("n", [0, 3])
def test_the_command_says_the_same(tmp_path: Path, n: int) -> None:
    synthetic.write_plain(tmp_path / "r", synthetic.few(n))
    said = loadgen("report", "r", "--no-html", cwd=tmp_path)
    assert said.code == cli.INCONCLUSIVE, said.all
    assert not NO_NUMBER.search(said.out)
    assert f"{n} of {n}" in said.out
