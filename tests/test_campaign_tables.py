"""Tables of a campaign: each figure against one worked out by hand, of hand-made runs. An answer of
`synthetic.answer_of` that takes T has 11 tokens, its first after T / 10, and a TPOT of 0.09 T."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from analysis import (
    campaign_answers,
    campaign_charts,
    campaign_load,
    campaign_report,
    campaign_tables,
    campaign_words,
    matrix,
)
from loadgen import cells
from loadgen.campaign import Campaign, Cell, ServerRow, TableName, Workload
from loadgen.cells import Done, Kept, Refusal
from loadgen.leg import Ending, Phase, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.store import Row, RunFolder, Verdict
from tests import synthetic
from tests.synthetic import GIB, Plain, S

ROWS = (ServerRow(name="one", model="m", gpu="4090d", price_per_gpu_hour=0.5),
        ServerRow(name="two", model="m", gpu="4090d", tensor_parallel=2, price_per_gpu_hour=0.5))


class Folder:
    """A campaign's folder that is written cell by cell."""

    def __init__(self, path: Path, *works: Workload, simulate: bool = False) -> None:
        self.path, self.done = path, list[Done]()
        self.campaign = Campaign(name="c", servers=ROWS, workloads=works, simulate=simulate)

    def cell(self, server: str, work: str, takes_s: Sequence[float], load: float | None = 1,
             repeat: int = 0, prompt_tok: int | None = None, ending: Ending = "done",
             rows: Sequence[Row] = (), verdicts: Sequence[dict[str, Any]] = (),
             code: int = 0, **changes: Any) -> list[RequestRecord]:
        folder = f"{server}/{work}-{load}-{prompt_tok}-{repeat}"
        one = synthetic.leg(load or 1, "run", 40.0, 0.0)
        records = [synthetic.answer_of(one, 100 * S + k * S // 10, t, seq=k)
                   for k, t in enumerate(takes_s)]
        for r in records:
            for name, value in changes.items():
                setattr(r, name, value)
        window = Window(one.id, 100 * S, 100 * S, 140 * S, 170 * S, ending,
                        note="CUDA out of memory" if ending == "server_died" else None)
        out = synthetic.write_plain(self.path / folder, Plain([(one, window)], records, rows),
                                    server={"kind": "vllm"})
        from analysis import parquet

        parquet.write(out)
        journal = RunFolder(out).verdicts_journal() if verdicts else None
        for v in verdicts:
            assert journal is not None
            journal.append(Verdict(**{"leg": one.id, "shard": 0, "seq": 0, "turn": 0, "cls": "code",
                                      "ref": f"x:{v['session']}", **v}))
        self.done.append(Done(Cell(server, work, folder, ("run",), "mix", load, prompt_tok, repeat),
                              "done", code))
        return records

    def sweep(self, server: str, work: str, takes_s: float, safe: int = 2) -> None:
        """A search that ended at its largest level, which was confirmed."""
        legs, records = [], []
        phases: tuple[Phase, ...] = ("ladder", "confirm", "confirm")
        for i, phase in enumerate(phases):
            one = synthetic.leg(safe, phase, 40.0, 0.0, replicate=i)
            t0 = (100 + 100 * i) * S
            records += [synthetic.answer_of(one, t0 + k * S // 4, takes_s, seq=200 * i + k)
                        for k in range(160)]
            legs.append((one, Window(one.id, t0, t0, t0 + 40 * S, t0 + 60 * S, "done")))
        folder = f"{server}/{work}"
        synthetic.write_plain(self.path / folder, Plain(legs, records), server={"kind": "vllm"})
        self.done.append(Done(Cell(server, work, folder, ("sweep",), "mix", None), "done", 0))

    def without(self, server: str, work: str, outcome: cells.Outcome, says: str = "",
                refusal: Refusal | None = None) -> None:
        self.done.append(Done(Cell(server, work, f"{server}/{work}", ("run",), "mix", 1),
                              outcome, 0, says, refusal))

    def read(self) -> matrix.Matrix:
        self.path.mkdir(exist_ok=True)
        (self.path / cells.KEPT).write_bytes(msgspec.json.encode(Kept(self.campaign, self.done)))
        return matrix.load(self.path)


def work(name: str, *tables: TableName, **more: Any) -> Workload:
    return Workload(**{"name": name, "scenario": "chat", "concurrency": (1,), "num_prompts": 9,
                       "tables": tables, **more})


def row_of(table: matrix.Table, **where: Any) -> dict[str, Any]:
    f = table.frame
    for name, value in where.items():
        f = f[f[name] == value]
    assert len(f) == 1
    return {str(k): v for k, v in f.iloc[0].items()}


# ------------------------------------------------------------------------------------- intervals


def test_an_interval_over_repeats_is_student_s() -> None:
    mean, half, n = matrix.interval([1.0, 2.0, 3.0, None])
    assert (mean, n) == (2.0, 3)
    assert half == pytest.approx(4.3027 * 1.0 / np.sqrt(3), rel=1e-4)  # t of 2 degrees, 95 %


def test_one_repeat_has_no_interval_and_none_has_no_mean() -> None:
    assert matrix.interval([5.0]) == (5.0, None, 1)
    assert matrix.interval([None, float("nan")]) == (None, None, 0)


# ------------------------------------------------------------------------------- how fast


def test_speed_is_the_mean_of_one_over_tpot_by_task(tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("survey", "speed"), work("code", "speed"))
    folder.cell("one", "survey", [1.0, 2.0])
    folder.cell("one", "survey", [1.0, 1.0], repeat=1)
    folder.cell("one", "code", [4.0])
    r = row_of(campaign_tables.speed(folder.read()))
    first, second = (1 / 0.09 + 1 / 0.18) / 2, 1 / 0.09
    assert r["survey, tok/s"] == pytest.approx((first + second) / 2)
    assert r["± survey, tok/s"] == pytest.approx(12.706 * (second - first) / 2, rel=1e-3)
    assert r["code, tok/s"] == pytest.approx(1 / 0.36)
    assert r["mean, tok/s"] == pytest.approx((r["survey, tok/s"] + 1 / 0.36) / 2)
    assert (r["answers"], r["repeats"]) == (5, 2)


def test_ttft_has_mean_least_and_largest_and_a_p99_only_of_many(tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("a", "ttft"))
    folder.cell("one", "a", [1.0, 2.0, 6.0])
    folder.cell("two", "a", [1.0] * 400)
    table = campaign_tables.ttft(folder.read())
    r = row_of(table, server="one")
    assert [r[f"{x}, ms"] for x in ("mean", "min", "max", "p50")] == pytest.approx(
        [300, 100, 600, 200])
    assert pd.isna(r["p99, ms"])
    assert row_of(table, server="two")["p99, ms"] == pytest.approx(100)


def test_memory_is_of_the_fullest_gpu_after_load_at_its_peak_and_the_increase(
        tmp_path: Path) -> None:
    def card(t_s: float, gib: float, index: str) -> Row:
        return Row("gpu", int(t_s * S), "memory_used_bytes", gib * GIB, {"index": index})
    rows = [Row("state", 90 * S, "READY", 1.0, {}), card(90, 14.0, "0"), card(90, 14.2, "1"),
            card(110, 14.5, "0"), card(110, 16.1, "1")]
    folder = Folder(tmp_path, work("a", "memory"))
    folder.cell("one", "a", [1.0], rows=rows)
    r = row_of(campaign_tables.memory(folder.read()), server="one")
    assert r["after load, GiB"] == pytest.approx(14.2)
    assert r["peak, GiB"] == pytest.approx(16.1)
    assert r["increase, GiB"] == pytest.approx(1.9)


def test_a_longer_input_has_a_row_and_says_whether_all_succeeded(tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("a", "input_length"))
    folder.cell("one", "a", [1.0, 3.0], prompt_tok=128)
    folder.cell("one", "a", [2.0, 2.0], prompt_tok=512, outcome=Outcome.TIMEOUT_TOTAL)
    table = campaign_tables.input_length(folder.read())
    short = row_of(table, **{"input, tokens": 128})
    assert (short["TTFT, s"], short["total, s"]) == pytest.approx((0.2, 2.0))
    assert short["longest pause, ms"] == pytest.approx(270)
    assert short["all succeeded?"] == "yes"
    assert row_of(table, **{"input, tokens": 512})["all succeeded?"] == "no: 2 TIMEOUT_TOTAL"


def test_the_longest_output_says_how_many_came_and_why_it_ended(tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("a", "longest_output", output_tokens=8192))
    folder.cell("one", "a", [2.0, 2.0, 2.0], finish_reason="length")
    r = row_of(campaign_tables.longest_output(folder.read()))
    assert (r["asked, tokens"], r["produced, tokens"]) == (8192, 11)
    assert r["speed, tok/s"] == pytest.approx(5.5)
    assert r["why it ended"] == "length 3"


# ---------------------------------------------------------------------------- how much load


@pytest.mark.parametrize(("takes_s", "ending", "answer"), [
    ([0.4] * 80, "done", "yes"), ([25.0] * 80, "done", "no"),
    ([0.4] * 10, "done", "too few"), ([0.4] * 75 + [25.0] * 3, "done", "near the limit"),
    ([0.54] * 80, "done", "near the limit"), ([0.4] * 80, "server_died", "no")])
def test_stable_has_the_definition_of_its_note(tmp_path: Path, takes_s: list[float],
                                               ending: Ending, answer: str) -> None:
    folder = Folder(tmp_path, work("a", "concurrency"))
    folder.cell("one", "a", takes_s, ending=ending)
    r = row_of(campaign_load.concurrency(folder.read()))
    assert r["stable?"] == answer
    assert answer in campaign_load.STABLE


def test_repeats_are_taken_together_where_one_alone_proves_nothing(tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("a", "concurrency"))
    for repeat in range(3):
        folder.cell("one", "a", [0.4] * 30, repeat=repeat)
    r = row_of(campaign_load.concurrency(folder.read()))
    assert (r["stable?"], r["repeats"]) == ("yes", 3)
    assert r["met the SLO"] == "90 of 90 (100 %)"
    assert r["mean TTFT, ms"] == pytest.approx(40)


@pytest.mark.parametrize(("rows", "why"), [
    ([("kv_frac", 110, 0.93), ("kv_frac", 120, 0.92)], "KV cache 93 % full"),
    ([("preemptions", 99, 0.0), ("preemptions", 150, 1.0), ("preemptions", 171, 1.0)],
     "1 preemptions")])
def test_a_full_cache_and_preemptions_are_near_the_limit(
        tmp_path: Path, rows: list[tuple[str, int, float]], why: str) -> None:
    folder = Folder(tmp_path, work("a", "concurrency"))
    folder.cell("one", "a", [0.4] * 150,
                rows=[Row("server", t * S, name, v, {}) for name, t, v in rows])
    r = row_of(campaign_load.concurrency(folder.read()))
    assert r["stable?"] == "near the limit"
    assert why in r["note"]


def test_the_best_load_has_no_refuted_one_below_it(tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("a", "concurrency", concurrency=(1, 2, 4, 8)))
    for load, kind in ((1, 10), (2, 80), (8, 80)):
        folder.cell("one", "a", [0.4] * kind, load=load)
    folder.cell("one", "a", [25.0] * 80, load=4)
    assert campaign_load.best_load(folder.read().cells) == 2


def test_cost_counts_tokens_and_good_requests_per_gpu_and_for_the_money(tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("a", "cost", concurrency=(1, 2)))
    folder.cell("two", "a", [0.4] * 80, load=1)
    folder.cell("two", "a", [0.4] * 100, load=2)
    found = folder.read()
    r = row_of(campaign_load.cost(found))
    tok_s, good_s = 100 * 11 / 40, 100 / 40  # in the window of 40 s
    assert r["stable up to"] == 2
    assert r["alone: E2E, ms"] == pytest.approx(400)
    assert r["tokens per GPU-second"] == pytest.approx(tok_s / 2)
    assert r["good requests per GPU-second"] == pytest.approx(good_s / 2)
    assert r["million tokens per €"] == pytest.approx(tok_s / 2 * 3600 / 0.5 / 1e6)
    assert r["good requests per €"] == pytest.approx(good_s / 2 * 3600 / 0.5)


def test_users_are_told_as_locust_does_with_a_bound_on_the_errors(tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("a", "users"))
    records = folder.cell("one", "a", [0.4] * 40)
    assert len(records) == 40
    r = row_of(campaign_load.users(folder.read()))
    assert r["QPS"] == pytest.approx(1.0)
    assert r["mean E2E, s"] == pytest.approx(0.4)
    assert r["errors, %"] == 0
    assert r["errors at most, %"] == pytest.approx(100 * (1 - 0.05 ** (1 / 40)), rel=1e-3)


def test_what_is_throttled_is_no_failure(tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("a", "throttled"))
    folder.cell("one", "a", [0.4] * 8, outcome=Outcome.THROTTLED)
    r = row_of(campaign_load.throttled(folder.read()))
    assert (r["throttled, %"], r["failed, %"], r["answered, %"]) == (100, 0, 0)


# -------------------------------------------------------------------------- cells without a run


def test_what_does_not_fit_says_what_it_needs_and_has_in_one_row(tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("a", "concurrency", "memory", concurrency=(1, 2)))
    for _ in (1, 2):
        folder.without("one", "a", "does not fit", "…", Refusal(7.0, 6.43, 120400))
    table = campaign_load.concurrency(folder.read())
    assert row_of(table)["note"] == ("does not fit: needs 7 GiB of KV cache per GPU, has 6.43; "
                                     "120,400 tokens would fit")


def test_what_is_not_simulated_has_a_row_that_says_so(tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("a", "speed"), simulate=True)
    folder.cell("one", "a", [1.0])
    folder.without("two", "a", "not simulated", "awq: nobody measured it")
    table = campaign_tables.speed(folder.read())
    assert row_of(table, server="two")["note"] == "not simulated: awq: nobody measured it"


# ------------------------------------------------------------------------------- the answers


def rows(*verdicts: tuple[str, int, bool, str | None]) -> pd.DataFrame:
    return pd.DataFrame([{"server": s, "workload": "w", "repeat": 0, "cls": "c", "session": n,
                          "turn": t, "ok": ok, "kind": kind, "says": ""}
                         for t, (s, n, ok, kind) in enumerate(verdicts)])


def test_structured_output_is_told_by_kind_of_error() -> None:
    f = rows(*[("one", i, True, None) for i in range(97)],
             *[("one", 100 + i, False, "wrong field name") for i in range(2)],
             ("one", 110, False, "array as string"), ("two", 1, True, None))
    found = campaign_answers.structured_of(f).set_index("server")
    assert found.loc["one", "valid, %"] == 97
    assert found.loc["one", "wrong field name, %"] == 2
    assert found.loc["one", "array as string, %"] == 1
    assert found.loc["two", "wrong field name, %"] == 0
    assert found.loc["one", "low, %"] == pytest.approx(91.48, abs=0.01)  # Clopper and Pearson
    assert found.loc["one", "high, %"] == pytest.approx(99.38, abs=0.01)


def test_structured_output_has_a_row_for_each_workload_and_one_for_all_of_a_server(
        tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("asked", "structured"), work("forced", "structured"),
                    work("cut", "structured"))
    bad = [{"session": k, "ok": k >= 3, "kind": None if k >= 3 else "bad"} for k in range(4)]
    good = [{"session": k, "ok": True} for k in range(6)]
    folder.cell("one", "asked", [0.4] * 4, verdicts=bad)
    folder.cell("one", "forced", [0.4] * 6, verdicts=good)
    folder.cell("one", "cut", [0.4])
    folder.cell("two", "forced", [0.4] * 6, verdicts=good)
    table = campaign_answers.structured(folder.read())
    for workload, told in (("asked", [4, 25, 75]), ("forced", [6, 100, 0]),
                           ("all workloads", [10, 70, 30])):
        r = row_of(table, server="one", workload=workload)
        assert [r[c] for c in ("trials", "valid, %", "bad, %")] == pytest.approx(told)
    assert row_of(table, workload="cut")["note"] == "its answers were not checked"
    assert row_of(table, server="two")["workload"] == "forced"  # of one there is no total
    [chart] = campaign_charts.of(table)
    shown = str(chart.to_dict())
    assert all(f"'what': '{x}'" in shown for x in ("asked", "forced", "all workloads"))
    assert len(campaign_report.shown(table)[1]) == 5


def test_retention_counts_questions_and_takes_dialogues_as_the_trials() -> None:
    f = rows(*[("one", s, s < 9, None if s < 9 else "forgot a fact")
               for s in range(10) for _ in range(4)])
    found = campaign_answers.retention_of(f).iloc[0]
    assert (found["dialogues"], found["questions"], found["correct, %"]) == (10, 40, 90)
    assert found["forgot a fact"] == 4
    assert found["low, %"] <= 70  # of ten dialogues, not of forty questions
    assert found["high, %"] == 100


def test_where_all_dialogues_are_right_each_is_one_trial() -> None:
    f = rows(*[("one", s, True, None) for s in range(10) for _ in range(4)])
    assert campaign_answers.retention_of(f).iloc[0]["low, %"] == pytest.approx(69.15, abs=0.01)


@pytest.mark.parametrize(("ok", "bad", "says"), [
    (20, 0, "yes (20 of 20)"), (0, 5, "no (0 of 5: wrong tool 5)"),
    (10, 10, "partly (10 of 20; wrong tool 10)"), (995, 5, "yes (995 of 1000; wrong tool 5)")])
def test_a_feature_is_supported_if_its_answers_are_right(ok: int, bad: int, says: str) -> None:
    f = rows(*[("one", i, True, None) for i in range(ok)],
             *[("one", i, False, "wrong tool") for i in range(bad)])
    assert campaign_answers.features_of(f).iloc[0]["w"] == says


def test_findings_are_read_from_the_journals_of_runs_and_a_torn_line_is_passed_over(
        tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("a", "structured"))
    folder.cell("one", "a", [0.4] * 3, verdicts=[
        {"session": 0, "ok": True, "kind": None}, {"session": 1, "ok": False, "kind": "bad"},
        {"session": 99, "ok": False, "kind": "of no record"}])
    folder.cell("two", "a", [0.4])
    journal = next(tmp_path.glob("one/*/verdicts.jsonl"))
    journal.write_bytes(journal.read_bytes() + b'{"leg":"to')
    table = campaign_answers.structured(folder.read())
    assert row_of(table, server="one")["trials"] == 2
    assert row_of(table, server="one")["bad, %"] == 50
    assert row_of(table, server="two")["note"] == "its answers were not checked"


# -------------------------------------------------------------------------------- the report


@pytest.fixture
def whole(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path, work("ab", "concurrency", "cost", "speed", concurrency=(1, 2)),
                    simulate=True)
    for server in ("one", "two"):
        for load, takes_s in ((1, 0.4), (2, 25.0)):
            for repeat in range(2):
                folder.cell(server, "ab", [takes_s] * 80, load=load, repeat=repeat)
    folder.read()
    return folder


def test_simulated_figures_say_so_in_every_title_and_file(whole: Folder) -> None:
    campaign_report.write(whole.path)
    text = (whole.path / "report.md").read_text(encoding="utf-8")
    titles = [x for x in text.splitlines() if x.startswith("## ") and "deploy" not in x]
    assert len(titles) >= 4
    assert all(t.endswith("(simulated)") for t in titles)
    page = (whole.path / "report.html").read_text(encoding="utf-8")
    assert "SIMULATED SERVERS" in page
    for path in (whole.path / "tables").glob("*.csv"):
        assert pd.read_csv(path)["simulated"].all()
    assert len(list((whole.path / "tables").glob("*.parquet"))) == len(titles)


def test_a_table_in_parquet_has_numbers(whole: Folder) -> None:
    campaign_report.write(whole.path)
    f = pd.read_parquet(whole.path / "tables" / "concurrency.parquet")
    assert f["mean TTFT, ms"].dtype == float
    assert f["± mean TTFT, ms"].tolist() == pytest.approx([0, 0, 0, 0], abs=1e-9)


def test_the_report_is_remade_from_the_folders_alone(whole: Folder) -> None:
    campaign_report.write(whole.path)
    before = {p.name: p.read_bytes() for p in whole.path.glob("report.*")}
    for name in before:
        (whole.path / name).unlink()
    campaign_report.write(whole.path)
    assert {p.name: p.read_bytes() for p in whole.path.glob("report.*")} == before


def test_plain_words_say_what_to_deploy_up_to_what_load_and_why(whole: Folder) -> None:
    said = campaign_words.sentences(whole.read())
    assert said[0].startswith("Deploy one, as many as you need, with at most 1 request in flight")
    assert "one, ab: keep to 1; at 2 it is not stable (0 of 160 met the SLO)." in said
    assert said[-1].startswith("All of this was simulated")


def test_safe_loads_are_set_against_their_prices(tmp_path: Path) -> None:
    folder = Folder(tmp_path, Workload(name="mix", scenario="chat", what="sweep", tables=("safe",),
                                       max_concurrency=2, budget="5m"))
    for server, takes_s in (("one", 0.4), ("two", 0.2)):
        folder.sweep(server, "mix", takes_s)
    found = folder.read()
    one, two = found.cells
    rps = [float(np.mean([j.achieved_rps for j in m.run.judgements if j.phase == "confirm"]))
           for m in (one, two) if m.run is not None]
    r = row_of(campaign_load.safe(found), server="two")
    assert r["requests per €"] == pytest.approx(rps[1] * 3600 / 0.5 / 2)  # of two GPUs
    said = campaign_words.sentences(found)
    assert said[0].startswith("Deploy one, as many as you need, with at most 2 concurrent requests")
    assert f"{rps[0] * 3600 / 0.5:,.0f} requests per €" in said[0]
    assert "was not driven to its limit" in said[0]
    assert r["note"] == "its limit lies higher: no load above was tried"


def test_without_a_load_nothing_is_said_of_what_holds(tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("a", "ttft"))
    folder.cell("one", "a", [0.4])
    assert campaign_words.sentences(folder.read())[0].startswith("No load was tried")


def test_a_number_is_written_for_people() -> None:
    shown = [campaign_report._cell(x) for x in (0.0, 12, 1234.4, 0.4567, 123.456, 0.00042, None)]
    assert shown == ["0", "12", "1,234", "0.457", "123", "0.0004", "–"]
    assert campaign_report._cell(100.0, 12.34) == "100 ± 12"
    assert campaign_report._cell(100.0, 1e-12) == "100 ± 0"


def test_the_headline_goes_on_about_its_own_server(whole: Folder) -> None:
    campaign_report.write(whole.path)
    head = (whole.path / "report.html").read_text(encoding="utf-8").partition("</section>")[0]
    assert "<h1>Deploy one, as many as you need" in head
    assert "<p>one, ab: keep to 1;" in head
    assert "two, ab" not in head


def test_verdicts_of_sweeps_stand_together_in_the_headline(whole: Folder) -> None:
    said = ["one, ab: SAFE up to 4 concurrent, by 80 of 80 requests with 95 % confidence.",
            "two, ab: UNRESOLVED, no safe level was found.", "Nothing else.", "All was simulated."]
    head = "".join(campaign_report._head(whole.read(), said))
    assert "<h1>What each server can take</h1><p>one, ab: SAFE up to 4" in head
    assert "<p>two, ab: UNRESOLVED, no safe level was found.</p><p>All was simulated.</p>" in head
    assert "Nothing else" not in head


@pytest.mark.parametrize(("servers", "dashed"), [(7, []), (9, ["s7", "s8"])])
def test_servers_beyond_the_last_colour_have_dashed_lines(servers: int, dashed: list[str]) -> None:
    names = [f"s{i}" for i in range(servers)]
    for name, x, ys in (("concurrency", "concurrency", ("mean TTFT, ms", "output, tok/s")),
                        ("input_length", "input, tokens", ("TTFT, s", "total, s"))):
        f = pd.DataFrame([{"server": s, x: at, "stable?": "yes", **dict.fromkeys(ys, at)}
                          for s in names for at in (1, 2)])
        for chart in campaign_charts.of(matrix.Table(name, name, f)):
            line = chart.to_dict()["layer"][0]["encoding"]
            assert line["color"]["scale"]["domain"] == names
            scale = line.get("strokeDash", {"scale": {"domain": [], "range": []}})["scale"]
            assert [s for s, dash in zip(scale["domain"], scale["range"], strict=True)
                    if dash != [1, 0]] == dashed


def test_memory_has_a_note_only_where_it_has_no_figure_or_the_server_died(tmp_path: Path) -> None:
    folder = Folder(tmp_path, work("a", "memory"), work("b", "memory"))
    folder.cell("one", "a", [1.0], rows=[
        Row("gpu", at * S, "memory_used_bytes", 14.0 * GIB, {"index": "0"}) for at in (90, 110)])
    folder.cell("one", "b", [1.0], outcome=Outcome.HTTP_ERROR, error="HTTP 400: no tools here")
    row = row_of(campaign_tables.memory(folder.read()))
    assert (row.get("note", ""), row["peak, GiB"]) == ("", 14.0)
    assert "no tools here" in matrix.why_not(folder.read().cells)
