"""What build servers read: says what the exit code says, and holds against any text of a server."""

import itertools
from collections.abc import Callable
from html import unescape
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from msgspec import structs

from analysis import ci, frame, summary, words
from analysis.frame import Run
from loadgen import cli, measure
from tests import synthetic
from tests.synthetic import Kind

EVIL = ("]]></failure><x a=\"'\"/> & &amp; <script>alert(1)</script> | a | b |\r\n\r\n# head\n"
        "![i](http://x/y) `code` **bold** ~~no~~ \\| <!-- \x1b[31m\x00\ufffe\x85 <b>b</b>")
RESULTS = {cli.PASS: "passed", cli.SLO_MISSED: "failure", cli.INCONCLUSIVE: "skipped",
           cli.INVALID: "error", cli.DIED: "error", cli.INTERRUPTED: "error"}


def suite_of(run: Run) -> Element:
    found = ElementTree.fromstring(ci.junit(run)).find("testsuite")
    assert found is not None
    return found


def results(suite: Element) -> dict[str, str]:
    """Each testcase's name with the element that says how it went."""
    return {case.attrib["name"]: next((x.tag for x in case if x.tag in RESULTS.values()), "passed")
            for case in suite.iter("testcase")}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose texts are meant to break out of where they stand."""
    path = synthetic.run_of(tmp_path_factory.mktemp("ci") / "run", (1, "SAFE"), (2, "UNSAFE"),
                            (4, "INVALID"), (8, "died"), note=EVIL, error=EVIL, model=EVIL,
                            server={"kind": EVIL})
    return summary.finish(path, report=False)


# ---------------------------------------------------------------------------------------- JUnit


@pytest.mark.parametrize(("kinds", "said"), [
    (["SAFE"], ["passed"]), (["UNSAFE"], ["failure"]), (["UNRESOLVED"], ["skipped"]),
    (["INVALID"], ["error"]), (["died"], ["error"]), (["SAFE", "interrupted"], ["passed"] * 2),
    (["UNSAFE", "UNRESOLVED", "SAFE"], ["failure", "skipped", "passed"]),
    (["died", "UNSAFE", "SAFE"], ["error", "failure", "passed"]),
    (["UNSAFE", "INVALID"], ["failure", "error"])])
def test_each_load_is_a_testcase_and_the_verdict_goes_as_the_exit_code(
        tmp_path: Path, kinds: list[Kind], said: list[str]) -> None:
    run = frame.load(synthetic.run_of(
        tmp_path / "run", *((2.0**i, kind) for i, kind in enumerate(kinds))))
    *legs, verdict = results(suite_of(run)).values()
    assert legs == said
    assert verdict == RESULTS[measure.exit_code(run, None)]


def test_a_search_that_found_its_level_fails_nothing_though_levels_beyond_are_unsafe(
        tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run", levels=(16, 32, 64), confirm=32))
    assert (run.conclusion.load, run.judgements[2].load) == ("SAFE", "UNSAFE")
    suite = suite_of(run)
    assert (suite.attrib["failures"], suite.attrib["errors"]) == ("0", "0")
    assert results(suite)["ladder-64-r0"] == "skipped"
    assert results(suite)["verdict"] == "passed"


def test_a_search_without_a_safe_level_fails(tmp_path: Path) -> None:
    run = frame.load(synthetic.run_of(tmp_path / "run", (1, "UNSAFE"), phase="ladder"))
    assert results(suite_of(run)) == {"ladder-1-r0": "failure", "verdict": "failure"}
    empty = frame.load(synthetic.write(tmp_path / "empty", levels=(), confirm=None))
    assert results(suite_of(empty)) == {"verdict": "error"}
    assert measure.exit_code(empty, None) == cli.INVALID


def test_counts_times_and_numbers_are_those_of_the_run(tmp_path: Path) -> None:
    run = frame.load(synthetic.run_of(tmp_path / "run", (1, "SAFE"), (2, "UNSAFE"), (4, "died")))
    suite = suite_of(run)
    counts = [int(suite.attrib[x]) for x in ("tests", "failures", "errors", "skipped")]
    assert counts == [4, 1, 2, 0]
    first = next(suite.iter("testcase"))
    assert (float(first.attrib["time"]), float(suite.attrib["time"])) == (70.0, 210.0)
    numbers = {p.attrib["name"]: float(p.attrib["value"]) for p in first.iter("property")}
    assert (numbers["n"], numbers["good"]) == (80, 80)
    assert not [x for x in numbers if "lower" in x or "upper" in x]  # of one leg none holds
    assert numbers["ttft_p50_s"] == pytest.approx(0.04)


def test_a_number_that_is_absent_is_no_property(tmp_path: Path) -> None:
    run = frame.load(synthetic.run_of(tmp_path / "run", (1, "INVALID")))
    structs.force_setattr(run, "frame", run.frame.assign(ttft_s=float("nan")))
    names = {p.attrib["name"] for p in suite_of(run).iter("property")}
    assert "n" in names
    assert "ttft_p50_s" not in names


def test_hostile_texts_stay_texts_in_xml(hostile: Run) -> None:
    root = ElementTree.parse(hostile.folder.path / "junit.xml").getroot()
    assert {x.tag for x in root.iter()} == {
        "testsuites", "testsuite", "properties", "property", "testcase", "system-out", "failure",
        "error"}
    model = next(p for p in root.iter("property") if p.attrib["name"] == "model")
    assert model.attrib["value"] == EVIL.translate({0: None, 0x1b: None, 0xfffe: None})
    died = next(c for c in root.iter("testcase") if c.attrib["name"] == "run-8-r0")
    assert "<script>alert(1)</script> | a | b |" in (died[-1].text or "")


@pytest.fixture(scope="module")
def with_model(hostile: Run) -> Callable[[str], Run]:
    """The run, of a model of that name."""
    return lambda name: structs.replace(hostile, manifest=structs.replace(
        hostile.manifest, model=name))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.text(st.characters(exclude_categories=())))
def test_any_text_at_all_makes_well_formed_xml_and_utf_8(with_model: Callable[[str], Run],
                                                         text: str) -> None:
    run = with_model(text)
    model = ElementTree.fromstring(ci.junit(run).encode()).find(".//property[@name='model']")
    assert model is not None
    assert model.attrib["value"] == "".join(
        x for x in text if x in "\t\n\r" or 0x20 <= ord(x) <= 0xd7ff
        or 0xe000 <= ord(x) <= 0xfffd or ord(x) > 0xffff)
    assert len(tables(ci.markdown(run).encode().decode())) == 5


# ------------------------------------------------------------------------------------- Markdown


def tables(text: str) -> list[list[str]]:
    """The cells of all rows, as a renderer sees them."""
    rows: list[list[str]] = []
    tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(text)
    for here, after in itertools.pairwise(tokens):
        if here.type == "tr_open":
            rows.append([])
        if here.type in ("td_open", "th_open"):
            rows[-1].append(after.content)
    return rows


def test_the_summary_has_the_verdict_a_row_for_each_leg_reasons_and_knee(tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run"))
    text = ci.markdown(run)
    first, *reasons = words.verdict(run)
    assert text.splitlines()[0] == f"### {first}"
    assert [unescape(x) for x in text.splitlines() if x.startswith("- ")] == [
        f"- {x}" for x in reasons]
    assert "- Knee near" in text
    head, *rows = tables(text)
    assert [r[0] for r in rows] == [leg.id for leg, _ in run.legs]
    assert {len(r) for r in rows} == {len(head)}
    assert rows[-1][1] == str(run.judgements[-1].n)
    assert rows[-1][-1] == "SAFE"


def test_hostile_texts_stay_texts_in_markdown(hostile: Run) -> None:
    text = (hostile.folder.path / "summary.md").read_text(encoding="utf-8")
    assert not set(text) & set("<>`~\x00\x1b\ufffe")
    html = MarkdownIt("commonmark").enable("table").enable("strikethrough").render(text)
    for tag in ("<script", "<b>", "<img", "<code", "<a ", "<h1", "<s>", "<!--"):
        assert tag not in html
    assert html.count("<table") == html.count("<h3") == 1
    assert [r[0] for r in tables(text)] == ["leg", "run-1-r0", "run-2-r0", "run-4-r0", "run-8-r0"]
    assert "![i](http://x/y) `code` **bold** ~~no~~ \\|" in unescape(html)
    assert html.count("<strong>") == 1  # the finding's own


def test_findings_stand_with_their_remedy(tmp_path: Path) -> None:
    text = ci.markdown(frame.load(synthetic.run_of(
        tmp_path / "run", (2, "SAFE"), (4, "INVALID"))))
    assert "- **INVALID**, run-4-r0: the generator could not start 80 requests (EMFILE). " in text
    assert "Remedy: raise max&#95;inflight" in text
    assert tables(text)[2][-1] == "INVALID"


def test_a_run_without_a_leg_has_a_summary_without_a_table(tmp_path: Path) -> None:
    text = ci.markdown(frame.load(synthetic.write(tmp_path / "run", levels=(), confirm=None)))
    assert "No leg was run" in text
    assert tables(text) == []
