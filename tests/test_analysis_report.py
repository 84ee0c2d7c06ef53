"""The report: holds the numbers, needs no network, and no text of a server becomes markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from msgspec import structs

from analysis import charts, frame, report, summary, timeline, words
from analysis.frame import Run
from loadgen.leg import Window
from loadgen.record import Outcome
from loadgen.store import RunFolder
from tests import synthetic
from tests.synthetic import S

EVIL = "<b>evil</b></script><script>alert(1)</script>"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = synthetic.write(tmp_path_factory.mktemp("report") / "run", errors=True, model=EVIL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        run = summary.finish(path)
        kept = report._library()  # from the cache
    assert kept in (path / "report.html").read_text(encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def html(finished: Run) -> str:
    return (finished.folder.path / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]


def test_report_holds_verdict_and_numbers(finished: Run, html: str) -> None:
    confirmed = finished.judgements[-1]
    assert f"{confirmed.good} of {confirmed.n}" in html
    assert "Safe up to 32 concurrent requests" in html
    assert "SIMULATED SERVER" in html
    assert "Knee" in html
    for leg, _ in finished.legs:
        assert f">{leg.id}<" in html
    for term in ("TTFT", "lateness", "goodput"):
        assert f"<dt>{term}</dt>" in html


def test_report_needs_no_network(html: str) -> None:
    tags = Tags()
    tags.feed(html)
    assert tags.links == []
    assert "@import" not in html
    assert not re.search(r"url\(\s*['\"]?https?:", html)


def test_no_text_of_a_server_becomes_markup(html: str) -> None:
    tags = Tags()
    tags.feed(html)
    assert tags.count["script"] == 2  # the library and the charts
    assert "b" not in tags.count
    assert "&lt;script&gt;alert(&#x27;x&#x27;)" in html  # the error message, as text
    assert "&lt;b&gt;evil" in html


def test_text_in_a_chart_cannot_end_its_script() -> None:
    page = report._page("t", "", [{"data": {"values": [{"x": EVIL}]}}], "")
    assert page.count("</script>") == 2
    assert json.loads(re.search(r"const specs = (.*);", page)[1])[0]["data"]["values"] == [  # type: ignore[index]
        {"x": EVIL}]


def test_charts_keep_to_the_schema_of_vega_lite(finished: Run) -> None:
    answer = words.answer(finished)
    drawn = [charts.qps_latency(finished, answer, "ttft", "TTFT"),
             charts.throughput(finished, answer), charts.latency_by_load(finished, answer),
             charts.attainment(finished, answer), timeline.ecdf(finished, "tpot", "TPOT"),
             timeline.in_flight(finished),
             timeline.over_time(finished, "server", "kv_frac", "KV", 100.0, 100.0)]
    for chart in drawn:
        assert chart is not None
        chart.to_dict()  # validates
    assert timeline.over_time(finished, "server", "no such thing", "", 1.0) is None


def test_pictures_and_summary_lie_in_the_folder(finished: Run) -> None:
    path = finished.folder.path
    for name in ("qps_latency.png", "throughput.png"):
        assert (path / name).read_bytes().startswith(PNG)
    said = json.loads((path / "summary.json").read_bytes())
    assert said["conclusion"]["safe"] == 32
    assert said["knee"]["lo"] <= said["knee"]["value"] <= said["knee"]["hi"]
    assert [s["leg"] for s in said["steps"]] == [leg.id for leg, _ in finished.legs]
    assert said["steps"][0]["ttft_p90_s"] is None  # 6 requests have no p90
    assert said["simulated"] is True


def test_parquet_holds_every_record_with_its_gaps(finished: Run) -> None:
    table = pq.read_table(finished.folder.path / "records.parquet")
    records = list(RunFolder(finished.folder.path).records())
    assert table.num_rows == len(records)
    assert table["gaps_us"][7].as_py() == records[7].gaps_us
    assert table["outcome"][7].as_py() == records[7].outcome.value
    assert str(table.schema.field("gaps_us").type) == "list<element: int32>"


@pytest.mark.parametrize(("options", "has", "has_not"), [
    ({"levels": (), "confirm": None}, "No leg was run", "By class"),
    ({"levels": (8,), "confirm": None, "phase": "run"}, "Distributions",
     "Throughput against latency"),
    ({"levels": (8, 8), "confirm": None, "phase": "run"}, "run-8-r1", "Throughput against latency"),
    ({"levels": (2, 4), "confirm": None, "crash": True}, "1 torn line in the journals", "SAFE<")])
def test_report_of_a_lesser_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                options: dict[str, object], has: str, has_not: str) -> None:
    monkeypatch.setattr(report, "_library", str)  # bundling it takes a second
    path = synthetic.write(tmp_path / "run", **options)  # type: ignore[arg-type]
    page = report.write(frame.load(path)).read_text(encoding="utf-8")
    assert has in page
    assert has_not not in page


def test_report_of_a_run_of_several_loads_shows_each_for_itself(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_library", str)
    path = synthetic.write(tmp_path / "run", levels=(4, 16, 16, 64), confirm=None, phase="run")
    run = frame.load(path)
    page = report.write(run).read_text(encoding="utf-8")
    for text in ("Throughput against latency", "Attainment of the SLO", "run-16-r1",
                 "Met the SLO at 64"):
        assert text in page
    for text in ("Max safe", "Knee", "confirm"):
        assert text not in page.partition("<h2>Terms")[0]
    assert (path / "qps_latency.png").read_bytes().startswith(PNG)
    said = summary.summarise(run)
    assert (said["conclusion"], said["knee"]) == (None, None)


def test_legs_that_say_the_same_have_a_row_each(tmp_path: Path) -> None:
    run = frame.load(synthetic.run_of(tmp_path / "run", (2, "SAFE"), (4, "SAFE"), (4, "SAFE")))
    spec = charts.attainment(run, words.answer(run)).to_dict()
    rows = {r["leg"] for x in spec["layer"] for r in x["data"]["values"] if "leg" in r}
    assert rows == {"2 · 80/80", "4 · 80/80", "4 · 80/80 (2)"}


def test_report_of_an_invalid_run_quotes_no_figures(tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_library", str)
    leg = synthetic.leg(4, "run", 10.0, 0.0)
    dropped = [structs.replace(synthetic.answer_of(leg, 100 * S + k * S, 0.5, seq=k),
                               outcome=Outcome.DROPPED, error="EMFILE") for k in range(9)]
    window = Window(leg.id, 100 * S, 100 * S, 110 * S, 111 * S, "done")
    path = synthetic.write_plain(tmp_path / "run", synthetic.Plain([(leg, window)], dropped))
    page = report.write(frame.load(path)).read_text(encoding="utf-8")
    assert "Goodput" not in page
    assert "raise max_inflight" in page  # the finding's remedy


def test_finish_without_report_writes_no_page(tmp_path: Path) -> None:
    run = summary.finish(synthetic.write(tmp_path / "run", levels=(4,), confirm=None),
                         report=False)
    names = {p.name for p in run.folder.path.iterdir()}
    assert {"records.parquet", "summary.json", "junit.xml", "summary.md"} <= names
    assert not names & {"report.html", "qps_latency.png"}
