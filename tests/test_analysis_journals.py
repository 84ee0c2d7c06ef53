"""A run of a million streams is analysed from digests; they must say what whole records say. Here
both ways go over the same random records, of every outcome and with everything absent once."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import frame, gaps, journals, parquet
from loadgen import judge, metrics, scenario
from loadgen.headroom import Calibration, peak_of
from loadgen.judge import is_due
from loadgen.leg import Health, Leg, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Open, PerSecond
from loadgen.store import RunFolder
from tests import synthetic
from tests.synthetic import MIX, Plain, S

T0 = 7_777_777 * S + 123_456_789
KINDS = list(Outcome)


def random_record(rng: np.random.Generator, leg: Leg, seq: int, t0: int) -> RequestRecord:
    def maybe(value: Any, p: float = 0.8) -> Any:
        return value if rng.random() < p else None

    outcome = KINDS[int(rng.integers(len(KINDS)))] if rng.random() < 0.5 else Outcome.OK
    due = t0 + int(rng.integers(0, 30 * S))
    sent = None if outcome is Outcome.DROPPED else due + int(rng.exponential(2e6))
    first = maybe(sent and sent + int(rng.exponential(8e8)))
    n = 0 if first is None else int(rng.integers(0, 400))
    size = int(rng.choice([1, 30, 20_000, 80_000, 3_000_000]))
    found = rng.integers(0, size + 1, n).tolist()
    reads = None
    if n and rng.random() < 0.3:
        reads = [2] + [1] * (n - 1)
    tok = rng.integers(1, 4, n + 1).tolist() if first and rng.random() < 0.2 else None
    return RequestRecord(
        leg=leg.id, shard=int(rng.integers(3)), seq=seq, session=seq, turn=int(rng.integers(2)),
        cls=str(rng.choice(["code", "json", "summary"])), due_ns=due, sent_ns=sent,
        end_ns=(first or due) + 1000 * sum(found) + int(rng.integers(S)), outcome=outcome,
        first_ns=first, headers_ns=first, first_visible_ns=maybe(first), gaps_us=found,
        reads=reads, event_tok=tok, stamp_kind="kernel" if rng.random() < 0.5 else "user",
        connect_wait_ns=maybe(1000, 0.2), stale_retries=int(rng.random() < 0.1),
        inflight=maybe(3), want_prompt_tok=maybe(300), max_tokens=maybe(400),
        prompt_tok=maybe(310), output_tok=maybe(n + 1) if n else None, cached_tok=maybe(16, 0.3),
        tok_source=maybe("usage"), status=200, finish_reason="stop",
        error=None if outcome is Outcome.OK else 'said "no" é\n')


def folder_of(path: Path, seed: int, legs: int = 3, n: int = 700) -> Path:
    rng = np.random.default_rng(seed)
    held, records = [], []
    for i in range(legs):
        t0 = T0 + 100 * i * S
        leg = synthetic.leg(2.0**i, "ladder", 20.0, 5.0)
        if i == 1:
            leg = msgspec.structs.replace(leg, load=Open(PerSecond(20)), axis="rate")
        stalls = [(t0 + 9 * S, t0 + 10 * S)] if i == 0 else []
        held.append((leg, Window(
            leg.id, t0, t0 + 5 * S, t0 + 25 * S, t0 + 60 * S, ("done", "cut", "done")[i % 3],
            stalls=stalls, records=n, alone=i == 2, lag_p99_s=0.03,
            shards=[Health(0, full_reads=40, inflight_s=11.0)])))
        records += [random_record(rng, leg, k, t0) for k in range(n)]
    rng.shuffle(records)  # legs do not follow each other here
    calibration = Calibration("2025-11-21", 100, 900.0, "core", 9.0, "core", 10.0)
    return synthetic.write_plain(path, Plain(held, records), calibration=calibration)


def whole(path: Path) -> dict[str, list[RequestRecord]]:
    found: dict[str, list[RequestRecord]] = {}
    for r in RunFolder(path).records():
        found.setdefault(r.leg, []).append(r)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_digests_are_judged_as_whole_records_are(tmp_path: Path, seed: int) -> None:
    path = folder_of(tmp_path / "run", seed)
    run, records = frame.load(path), whole(path)
    for (leg, window), signs, judged, peak in zip(run.legs, run.signs, run.judgements, run.peaks,
                                                  strict=True):
        assert judged == judge.judge(leg, window, records[leg.id], signs, MIX, run.criteria)
        assert peak == peak_of(records[leg.id])
    assert any(f.rule == "beyond-calibration" for j in run.judgements for f in j.findings)


def window_tok(r: RequestRecord, window: Window) -> float:
    if r.first_ns is None or not r.output_tok:
        return 0.0
    at_ns = [r.first_ns + 1000 * sum(r.gaps_us[:i]) for i in range(r.n_events)]
    inside = [window.from_ns <= t < window.to_ns for t in at_ns]
    tok: list[Any] = [*(r.event_tok or ())] or [r.output_tok / r.n_events] * r.n_events
    return float(sum(t for t, x in zip(tok, inside, strict=True) if x))


@pytest.mark.parametrize("seed", range(3))
def test_the_frame_holds_what_metrics_says_of_each_whole_record(tmp_path: Path, seed: int) -> None:
    path = folder_of(tmp_path / "run", seed)
    run, records = frame.load(path), whole(path)
    t0_ns = min(w.t0_ns for _, w in run.legs)
    rows = iter(run.frame.to_dict("records"))
    for leg, window in run.legs:
        for r, row in zip(records[leg.id], rows, strict=False):
            why = metrics.misses(r, MIX.slo_of(r.cls))
            wanted: dict[str, Any] = {
                "due_s": (r.due_ns - t0_ns) / 1e9, "end_s": (r.end_ns - t0_ns) / 1e9,
                "sent_s": None if r.sent_ns is None else (r.sent_ns - t0_ns) / 1e9,
                **{f"{x}_s": getattr(metrics, f"{x}_s")(r) for x in (
                    "ttft", "ttft_service", "tpot", "itl_max", "e2e", "lateness")},
                **{x: getattr(r, x) for x in ("session", "turn", "output_tok", "prompt_tok",
                                              "cached_tok")},
                "window_tok": window_tok(r, window), "good": not why, "misses": ", ".join(why),
                "cls": r.cls, "outcome": r.outcome.value, "error": r.error or "", "leg": leg.id,
                "phase": leg.phase, "value": leg.value, "in_window": is_due(window, r),
                "void": window.is_void(r.due_ns, r.end_ns),
                "visible_s": None if r.first_visible_ns is None else (
                    r.first_visible_ns - r.due_ns) / 1e9}
            assert set(wanted) == set(row)
            for name, value in wanted.items():
                if isinstance(value, str | bool):
                    assert row[name] == value, name
                else:
                    assert row[name] == pytest.approx(np.nan if value is None else value,
                                                      abs=1e-9, nan_ok=True), name
    assert next(rows, None) is None


def test_event_gaps_of_the_sample_are_counted_exactly(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "run", 1)
    run, records = frame.load(path), whole(path)
    for leg, window in run.legs:
        pooled = sorted(x for r in judge.sample_of(window, records[leg.id]) for x in r.gaps_us)
        found = run.gaps[leg.id]
        assert np.repeat(found.value_us, found.count).tolist() == pooled
        for q in (0.01, 0.5, 0.9, 0.99, 0.999):
            wanted = metrics.quantile([x / 1e6 for x in pooled], q)
            assert wanted is not None
            assert found.quantile_s(q) == wanted.value


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.one_of(st.none(), st.lists(st.one_of(
    st.integers(0, 99), st.integers(0, 10**8), st.integers(-5, 10**12)), max_size=9)),
    min_size=1, max_size=8))
def test_any_arrays_of_numbers_are_read_or_left_to_the_slow_way(lists: Any) -> None:
    texts = [msgspec.Raw(b"" if x is None else msgspec.json.encode(x)) for x in lists]
    flat = gaps.flatten(texts)
    if all(0 <= x < 10**8 for own in lists for x in own or ()):
        assert flat is not None
        assert flat[0].tolist() == [x for own in lists for x in own or ()]
        assert flat[1].tolist() == [len(own or ()) for own in lists]
    else:
        assert flat is None


@pytest.mark.parametrize("odd", [b'"gaps_us":[1,-2,3]', b'"gaps_us":[1,99999999999,3]',
                                 b'"gaps_us":[ 1, 2 ,3]'])
def test_odd_gaps_are_gaps_still(tmp_path: Path, odd: bytes) -> None:
    path = synthetic.write(tmp_path / "run", levels=(4,), confirm=None)
    journal = path / "records-0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    at = lines[9].index(b'"gaps_us":')
    lines[9] = lines[9][:at] + odd + lines[9][lines[9].index(b"]", at) + 1:]
    journal.write_bytes(b"".join(lines))
    run = frame.load(path)
    leg, window = run.legs[0]
    assert run.torn == 0
    assert run.judgements[0] == judge.judge(leg, window, whole(path)[leg.id], run.signs[0], MIX,
                                            run.criteria)
    assert pq.read_table(parquet.write(path), columns=["seq"]).num_rows == len(lines) - 1


@pytest.mark.parametrize("broken", [b'"gaps_us":"x"', b'"gaps_us":[[1],2]', b'"gaps_us":null',
                                    b'"gaps_us":[1.5]', b'"gaps_us":[1', b'"reads":"x"'])
def test_a_line_that_is_no_record_is_passed_over_and_counted(tmp_path: Path, broken: bytes) -> None:
    path = synthetic.write(tmp_path / "run", levels=(4,), confirm=None)
    journal = path / "records-0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    at = lines[9].index(b'"gaps_us":')
    lines[9] = lines[9][:at] + broken + lines[9][lines[9].index(b"]", at) + 1:]
    lines.insert(4, b"not even JSON\n")
    journal.write_bytes(b"".join(lines) + b'{"leg":"torn')
    run = frame.load(path)
    known = whole(path)
    assert run.torn == 3
    assert len(run.frame) == len(known[run.legs[0][0].id]) == len(lines) - 3
    sessions = [r.session for r in known[run.legs[0][0].id]]
    assert sessions == run.frame["session"].tolist()
    assert pq.read_table(parquet.write(path))["session"].to_pylist() == sessions


def test_several_processes_find_what_one_does(tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder_of(tmp_path / "run", 2, n=120)
    one = frame.load(path)
    monkeypatch.setattr(journals, "SPREAD_BYTES", 0)
    monkeypatch.setattr(journals, "cores", lambda: 2)
    several = frame.load(path)
    assert several.judgements == one.judgements
    assert several.frame.equals(one.frame)
    assert several.peaks == one.peaks


def test_parquet_holds_each_record_as_the_journal_does(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "run", 3, n=1300)  # more than a batch
    rows = pq.read_table(parquet.write(path)).to_pylist()
    records = list(RunFolder(path).records())
    assert len(rows) == len(records)
    for row, r in zip(rows, records, strict=True):
        assert row == {**msgspec.structs.asdict(r), "outcome": r.outcome.value}


def test_an_slo_of_another_kind_is_judged_on_digests_as_on_records(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "run", 5, n=300)
    slo = scenario.parse_slo("ttft=300ms,itl=40ms,e2e=3s")
    run, records = frame.load(path, slo), whole(path)
    for (leg, window), signs, judged in zip(run.legs, run.signs, run.judgements, strict=True):
        assert judged == judge.judge(leg, window, records[leg.id], signs, MIX.with_slo(slo),
                                     run.criteria)
