"""The parts of a fleet that need no process: seals, clocks, the ledger, deliveries, counts."""

import itertools
import math
import zlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loadgen
from loadgen import metrics, plan, scenario, validity
from loadgen.errors import ScenarioError, StoreError
from loadgen.hosts import delivery, identity, ledger, seal, tallies
from loadgen.hosts.clock import Clock, Offset, Ping
from loadgen.hosts.delivery import Incoming, Outgoing
from loadgen.hosts.members import Roll
from loadgen.hosts.messages import (
    LIMITS,
    PIECE_BYTES,
    Ack,
    Beat,
    Hello,
    Message,
    Order,
    Piece,
    Plan,
    Refused,
    Report,
    Welcome,
)
from loadgen.hosts.seal import Forged, Seal
from loadgen.leg import Health, Leg, Window
from loadgen.prompts import Ratio
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Load, Open, PerSecond
from loadgen.shard import Frame
from loadgen.store import SCHEMA, Header, Journal, RunFolder
from tests.test_store import manifest

TOKEN = "0123456789abcdef"
S = 1_000_000_000
RATIOS = {"hello": Ratio(4.0, 0.0, "guess")}


def hello(nonce: bytes = b"n" * 16) -> Hello:
    return Hello(1, "w", nonce, "0.1.0", "c", None, 1, {"cores": 2})


def pair(token: str = TOKEN, other: str = TOKEN) -> tuple[Seal, Seal]:
    """A worker's and a master's seal, in session."""
    worker, master = Seal(token, "worker"), Seal(other, "master")
    worker.agree(b"h" * 16, b"w" * 16)
    master.agree(b"h" * 16, b"w" * 16)
    return worker, master


PIECE = Piece("r", 0, 5, 7, b"x" * 100)
BEAT = Beat(1, 2, "r", Order(), {0: 5})


# ------------------------------------------------------------------------------------------ seals


def test_what_one_side_seals_the_other_reads() -> None:
    worker, master = pair()
    assert master.open(worker.close(PIECE)) == PIECE
    assert worker.open(master.close(BEAT)) == BEAT
    assert master.open(Seal(TOKEN, "worker").close(hello())) == hello()


@pytest.mark.parametrize("message", [PIECE, hello()])
def test_another_token_opens_nothing(message: Message) -> None:
    worker, master = pair(other="f" * 16)
    with pytest.raises(Forged):
        master.open(worker.close(message))


def test_a_message_is_read_once_and_in_order() -> None:
    worker, master = pair()
    first, second = worker.close(PIECE), worker.close(PIECE)
    master.open(second)
    for old in (second, first):
        with pytest.raises(Forged, match="before"):
            master.open(old)


def test_a_message_that_comes_back_to_its_sender_is_forged() -> None:
    worker, _ = pair()
    with pytest.raises(Forged):
        worker.open(worker.close(PIECE))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_changed_byte_is_read(data: st.DataObject) -> None:
    worker, master = pair()
    sealed = bytearray(worker.close(PIECE))
    at = data.draw(st.integers(0, len(sealed) - 1))
    sealed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Forged):
        master.open(bytes(sealed))


@given(st.binary(max_size=300) | st.none() | st.dictionaries(st.text(), st.integers()))
def test_no_bytes_of_a_stranger_do_anything_but_raise_forged(data: object) -> None:
    for side in pair():
        with pytest.raises(Forged):
            side.open(data)


def test_a_session_s_message_does_not_stand_outside_of_one() -> None:
    """Who has seen a greeting cannot have anything else taken for one."""
    fresh = Seal(TOKEN, "worker")
    with pytest.raises(ValueError, match="before a session"):
        fresh.close(PIECE)
    _, master = pair()
    fresh.agree(b"h" * 16, b"x" * 16)  # another welcome: another session
    with pytest.raises(Forged):
        master.open(fresh.close(PIECE))


def test_a_message_that_is_too_large_is_neither_sent_nor_read() -> None:
    worker, master = pair()
    with pytest.raises(ValueError, match="at most"):
        worker.close(msgspec.structs.replace(hello(), version="v" * LIMITS["Hello"]))
    with pytest.raises(ValueError, match="at most"):
        worker.close(Piece("r", 0, 0, 0, b"x" * (PIECE_BYTES + 2000)))
    assert master.open(worker.close(Piece("r", 0, 0, 0, b"x" * PIECE_BYTES)))
    with pytest.raises(Forged):
        master.open(b"x" * 2**25)


def test_a_token_comes_from_a_file_or_the_environment_and_is_not_short(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(seal.TOKEN, raising=False)
    assert seal.token_of(None) is None
    monkeypatch.setenv(seal.TOKEN, TOKEN)
    assert seal.token_of(None) == TOKEN
    (tmp_path / "t").write_text("f" * 20 + "\n")
    assert seal.token_of(str(tmp_path / "t")) == "f" * 20
    (tmp_path / "t").write_text("short")
    with pytest.raises(ScenarioError, match="at least 16"):
        seal.token_of(str(tmp_path / "t"))
    with pytest.raises(ScenarioError, match="cannot be read"):
        seal.token_of(str(tmp_path / "none"))


def test_a_key_s_fingerprint_shows_nothing_of_it() -> None:
    assert seal.fingerprint(TOKEN, "sk-1") == seal.fingerprint(TOKEN, "sk-1")
    assert seal.fingerprint(TOKEN, "sk-1") != seal.fingerprint(TOKEN, "sk-2")
    assert "sk" not in seal.fingerprint(TOKEN, "sk-1")
    assert seal.fingerprint(TOKEN, "") == ""


def test_every_message_has_a_limit_and_none_is_larger_than_the_wire_takes() -> None:
    from loadgen.hosts.messages import WIRE_BYTES, FromMaster, FromWorker
    kinds = {x.__name__ for x in (*FromWorker.__args__, *FromMaster.__args__)}
    assert kinds == set(LIMITS)
    assert max(LIMITS.values()) < WIRE_BYTES


# ------------------------------------------------------------------------------------------ clock


@given(ahead=st.integers(-10**15, 10**15), to=st.integers(0, 10**9), back=st.integers(0, 10**9),
       held=st.integers(0, 10**9))
def test_the_offset_is_known_to_half_a_round_trip(ahead: int, to: int, back: int,
                                                  held: int) -> None:
    """Whatever the ways there and back, and however long the other side took."""
    sent = 12345
    heard = sent + to + ahead
    ping = Ping(sent, heard, heard + held, sent + to + held + back)
    assert ping.round_ns == to + back
    assert abs(ping.ahead_ns - ahead) <= ping.error_ns + 1


def test_the_ping_with_the_least_round_trip_tells_the_offset() -> None:
    clock = Clock()
    assert clock.offset() is None
    for slow in (9_000_000, 1_000_000, 40_000_000):  # all of it on the way there
        clock.add(Ping(0, slow + 500, slow + 500, slow))
    offset = clock.offset()
    assert offset is not None
    assert (offset.ahead_ns, offset.error_ns, offset.pings) == (500_500, 500_000, 3)


def test_a_clock_that_drifts_is_seen_beyond_its_error() -> None:
    clock = Clock(recent=10)
    for k in range(30):
        ahead = 100 * k * 1000
        clock.add(Ping(0, ahead + 10, ahead + 10, 20))
    assert clock.drift_ns(0) > 1_900_000
    clock.forget()
    offset = clock.offset()
    assert offset is not None
    assert offset.ahead_ns >= 2_000_000
    assert clock.drift_ns(offset.ahead_ns) <= 900_000


def test_a_slow_ping_is_no_drift() -> None:
    clock = Clock()
    clock.add(Ping(0, 900_000, 900_000, 1_000_000))  # nearly all of it on the way there
    clock.add(Ping(0, 50, 50, 100))
    assert clock.drift_ns(0) == 0
    clock.add(Ping(0, 5_000_020, 5_000_020, 40))  # a drift that the slow one would hide
    assert clock.drift_ns(-5_000_000) > 4_900_000


# ----------------------------------------------------------------------------------------- ledger


def leg_of(load: Load, measure_s: float | None = 10.0) -> Leg:
    return Leg(id="run", axis="rate", value=1.0, phase="run", replicate=0, seed=5, load=load,
               warmup_s=0.0, measure_s=measure_s)


def entries(leg: Leg, records: list[RequestRecord], owners: list[str],
            stop_s: float = 12.0) -> list[ledger.Entry]:
    until_ns = ledger.until_ns(leg, 7 * S, [7 * S + round(stop_s * S), 20 * S])
    return ledger.entries(leg, 7 * S, until_ns, records, owners)


def record(k: int, shard: int, due_s: float) -> RequestRecord:
    due_ns = 7 * S + round(due_s * S)
    return RequestRecord(leg="run", shard=shard, seq=k, session=k, turn=0, cls="hello",
                         due_ns=due_ns, end_ns=due_ns + S, outcome=Outcome.OK)


OPEN = Open(rate_rps=PerSecond(7.0))
ALL = [(k, s) for k, s in enumerate(itertools.takewhile(
    lambda s: s < 12, plan.arrivals(OPEN, 5)))]
INSIDE = [k for k, s in ALL if s < 10]


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_a_plan_with_all_its_records_misses_nothing(of: int) -> None:
    leg = leg_of(OPEN)
    found = entries(leg, [record(k, k % of, s) for k, s in ALL],
                           [f"w{i}" for i in range(of)])
    assert all(e.is_exact for e in found)
    assert sum(e.planned for e in found) == sum(e.received for e in found) == len(INSIDE)
    assert ledger.says(found) is None


@given(st.sets(st.sampled_from(INSIDE), min_size=1), st.sampled_from([1, 2, 3]))
def test_each_arrival_without_a_record_is_named_with_its_worker(gone: set[int], of: int) -> None:
    leg = leg_of(OPEN)
    found = entries(
        leg, [record(k, k % of, s) for k, s in ALL if k not in gone],
        [f"w{i}" for i in range(of)])
    named = {k for e in found for a, b in e.missing for k in range(a, b + 1, e.every)}
    assert named == gone
    assert sum(e.n_missing for e in found) == len(gone)
    for e in found:
        assert {k % of for a, b in e.missing for k in range(a, b + 1, e.every)} <= {e.shard}
    says = ledger.says(found)
    assert says is not None
    assert all((f"w{i}" in says) == any(k % of == i for k in gone) for i in range(of))


def test_an_arrival_with_two_records_is_named() -> None:
    leg = leg_of(OPEN)
    records = [record(k, k % 2, s) for k, s in ALL]
    found = entries(leg, [*records, records[4]], ["a", "b"])
    assert found[0].twice == [4]
    assert not found[0].is_exact


def test_of_a_leg_that_was_stopped_the_last_instant_is_nobody_s_fault() -> None:
    """A start that was due right when the stop came may have been called off."""
    leg = leg_of(OPEN, None)
    k, due_s = ALL[40]
    records = [record(i, 0, s) for i, s in ALL[:40]]
    for to_s, missing in ((due_s + 0.05, 0), (due_s + 0.2, 1)):
        found = entries(leg, records, ["a"], to_s)
        assert found[0].n_missing >= missing
        assert (k in {a for a, _ in found[0].missing}) is bool(missing)


def test_of_a_leg_that_failed_in_its_warm_up_only_what_was_due_by_then_is_asked_for() -> None:
    leg = msgspec.structs.replace(leg_of(OPEN), warmup_s=5.0)
    records = [record(k, 0, s) for k, s in ALL if s < 2.0]
    found = entries(leg, records, ["a"], 2.0)
    assert found[0].is_exact
    assert found[0].planned == sum(s < 1.9 for _, s in ALL)


def test_of_a_closed_loop_what_lies_before_the_last_one_known_is_missing() -> None:
    leg = leg_of(Closed(concurrency=4))
    due = {0: [0, 2, 4, 8], 1: [1, 3, 5]}
    records = [record(k, i, k / 10) for i, ks in due.items() for k in ks]
    found = entries(leg, records, ["a", "b"])
    assert [e.missing for e in found] == [[(6, 6)], []]
    assert entries(leg, [], ["a", "b"])[0].planned == 0


def test_of_a_closed_loop_what_was_under_way_at_its_end_is_nobody_s_fault() -> None:
    """The load is held beyond the window, and cancelled in any order."""
    leg = leg_of(Closed(concurrency=4))
    records = [record(k, 0, s) for k, s in ((0, 1), (1, 2), (2, 3), (4, 10.5), (9, 11.0))]
    assert entries(leg, records, ["a"])[0].is_exact


def test_a_shard_without_a_slot_misses_nothing() -> None:
    leg = leg_of(Closed(concurrency=2))
    found = entries(leg, [record(k, k % 2, k / 10) for k in range(6)],
                           ["a", "b", "c"])
    assert [(e.planned, e.n_missing) for e in found] == [(3, 0), (3, 0), (0, 0)]


def test_a_digest_tells_plans_apart() -> None:
    mix = scenario.load("smoke")
    same = ledger.digest(mix, 5, RATIOS)
    assert ledger.digest(scenario.load("smoke"), 5, RATIOS) == same
    assert ledger.digest(mix, 6, RATIOS) != same
    assert ledger.digest(mix, 5, {"hello": Ratio(3.0, 0.0, "guess")}) != same
    other = msgspec.structs.replace(mix, classes=(
        msgspec.structs.replace(mix.classes[0], output_tok=17),))
    assert ledger.digest(other, 5, RATIOS) != same


# --------------------------------------------------------------------------------------- delivery


def journal_of(path: Path, n: int, size: int = 300) -> Journal:
    journal = Journal(path)
    journal.append(Header(SCHEMA, "r", 0, 0, 0))
    for k in range(n):
        r = record(k, 0, k / 10)
        r.error = "x" * size
        journal.append(r)
    return journal


def test_a_journal_comes_over_byte_for_byte_whatever_is_lost_on_the_way(tmp_path: Path) -> None:
    """Every third piece and every second acknowledgement is lost; the sender may not know."""
    path = tmp_path / "there.jsonl"
    journal = journal_of(path, 9000)
    out, into = Outgoing("r", 0, path), Incoming(tmp_path / "here.jsonl")
    lost, now_s = itertools.count(), 0.0
    while into.kept < out.written:
        now_s += 1.0
        assert now_s < 200
        for piece in out.pieces(now_s):
            if next(lost) % 3:
                into.take(piece)
            if next(lost) % 2:
                out.ack(into.kept, now_s)
        if now_s == 3:
            journal.append(record(9001, 0, 1.0))  # it goes on being written
    assert (tmp_path / "here.jsonl").read_bytes() == path.read_bytes()
    assert path.stat().st_size > 8 * PIECE_BYTES
    same = [delivery.hash_of(p, lambda: None) for p in (path, tmp_path / "here.jsonl")]
    assert same[0] == same[1]


def test_a_damaged_piece_is_passed_over(tmp_path: Path) -> None:
    journal_of(tmp_path / "there.jsonl", 3)
    out, into = Outgoing("r", 0, tmp_path / "there.jsonl"), Incoming(tmp_path / "here.jsonl")
    piece = out.pieces(0.0)[0]
    into.take(msgspec.structs.replace(piece, data=piece.data[:-1] + b"?"))
    assert into.kept == 0
    into.take(piece)
    into.take(piece)  # and once more
    assert into.kept == out.written


def test_a_master_s_full_disk_is_an_error_and_keeps_what_came(tmp_path: Path) -> None:
    into = Incoming(tmp_path / "here.jsonl")
    into.close()
    with pytest.raises(StoreError, match="kept"):
        into.take(Piece("r", 0, 0, 0, b""))


def test_records_are_read_once_as_they_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    out = Outgoing("r", 0, path)
    assert out.fresh() == []
    journal = journal_of(path, 2)
    assert [r.session for r in out.fresh()] == [0, 1]
    line = msgspec.json.encode(record(2, 0, 0.2)) + b"\n"
    with path.open("ab") as f:
        f.write(line[:20])
    assert out.fresh() == []
    with path.open("ab") as f:
        f.write(line[20:])
    assert [r.session for r in out.fresh()] == [2]
    assert out.fresh() == []
    journal.close()


def test_records_are_read_on_the_master_s_clock(tmp_path: Path) -> None:
    """Every instant is moved by the worker's offset, and no duration changes."""
    from loadgen.store import Worker
    folder = RunFolder.create(tmp_path / "r", manifest(workers=[
        Worker("a", [0], 0, 10, {}), Worker("b", [1, 2], 5_000, 10, {})]))
    for shard in range(3):
        journal = Journal(folder.records_path(shard))
        journal.append(Header(SCHEMA, "r", shard, 0, 0))
        r = record(shard, shard, 1.0)
        r.sent_ns, r.first_ns, r.headers_ns = r.due_ns + 5, r.due_ns + 50, r.due_ns + 40
        r.first_visible_ns, r.connect_wait_ns = r.first_ns, 77
        r.role_ns, r.finish_ns = r.due_ns + 45, r.due_ns + 60
        journal.append(r)
    was = record(0, 0, 1.0)
    for r in folder.records():
        assert was.due_ns - r.due_ns == was.end_ns - r.end_ns == (5_000 if r.shard else 0)
        assert (r.sent_ns, r.headers_ns, r.first_ns, r.first_visible_ns) == (
            r.due_ns + 5, r.due_ns + 40, r.due_ns + 50, r.due_ns + 50)
        assert (r.role_ns, r.finish_ns) == (r.due_ns + 45, r.due_ns + 60)
        assert r.connect_wait_ns == 77


# ------------------------------------------------------------------------------------------ roll


class Wire:
    """What a roll sends, by node; and a worker's side of it."""

    def __init__(self) -> None:
        self.sent: dict[str, list[bytes]] = {}
        self.roll = Roll(TOKEN, lambda node, data: self.sent.setdefault(node, []).append(data))
        self.seal = Seal(TOKEN, "worker")

    def greet(self, node: str = "n", **changes: object) -> Message:
        said = msgspec.structs.replace(
            hello(), code=identity.code(), version=loadgen.__version__, **changes)
        self.roll.hear(node, self.seal.close(said), 0)
        return self.seal.open(self.sent[node][-1])


def report(beat: int, run: str = "", failed: str | None = None, heard_ns: int = 0) -> Report:
    return Report(beat, heard_ns, heard_ns, run, "ready", "", {}, {}, {}, failed, None, None)


def test_a_greeting_that_comes_twice_has_the_same_answer_and_one_member() -> None:
    """The first answer may have been lost, or not have come yet."""
    wire = Wire()
    first, again = wire.greet(), wire.greet()
    assert isinstance(first, Welcome)
    assert again == first
    assert len(wire.roll.members) == 1


@pytest.mark.parametrize(("changes", "words"), [
    ({"version": "0.0.9"}, "runs loadgen 0.0.9"), ({"protocol": 99}, "runs loadgen"),
    ({"code": "x"}, "other sources"), ({"scenario": "x"}, "not the master's")])
def test_who_would_send_something_else_is_refused_with_the_reason(
        changes: dict[str, object], words: str) -> None:
    wire = Wire()
    said = msgspec.structs.replace(
        hello(), **{"code": identity.code(), "version": loadgen.__version__, **changes})
    assert wire.roll.hear("n", wire.seal.close(said), 0) is None
    answer = wire.seal.open(wire.sent["n"][0])
    assert isinstance(answer, Refused)
    assert words in answer.why
    assert words in wire.roll.refused["n"]
    assert not wire.roll.members
    wire.roll.forget_gone(set())
    assert not wire.roll.refused


def test_a_member_s_answers_to_beats_tell_its_clock() -> None:
    wire = Wire()
    welcome = wire.greet()
    assert isinstance(welcome, Welcome)
    wire.seal.agree(b"n" * 16, welcome.nonce)
    member = wire.roll.members["n"]
    member.beat("", Order())
    beat = wire.seal.open(wire.sent["n"][-1])
    assert isinstance(beat, Beat)
    answer = report(beat.n, heard_ns=beat.sent_ns + 10_000 + S)
    wire.roll.hear("n", wire.seal.close(answer), beat.sent_ns + 20_000)
    offset = member.clock.offset()
    assert offset is not None
    assert (offset.ahead_ns, offset.pings) == (S, 1)
    wire.roll.hear("n", wire.seal.close(report(beat.n)), beat.sent_ns + 30_000)
    offset = member.clock.offset()
    assert offset is not None
    assert offset.pings == 1, "a beat is answered once"


def test_a_failure_counts_in_the_test_that_it_is_of(tmp_path: Path) -> None:
    wire = Wire()
    welcome = wire.greet()
    assert isinstance(welcome, Welcome)
    wire.seal.agree(b"n" * 16, welcome.nonce)
    member = wire.roll.members["n"]
    plan_ = Plan("r", {}, 5, "http://x", "m", "", {}, 0, 1, 1, "d")
    member.join(plan_, tmp_path, Offset(5_000, 10, 1))
    wire.roll.hear("n", wire.seal.close(report(0, "before", "disk full")), 0)
    assert member.lost is None
    wire.roll.hear("n", wire.seal.close(report(0, "r", "disk full")), 0)
    assert member.lost == "worker w: disk full"


def test_a_leg_s_start_is_sent_in_the_worker_s_clock_and_its_frames_are_read_in_ours(
        tmp_path: Path) -> None:
    wire = Wire()
    welcome = wire.greet()
    assert isinstance(welcome, Welcome)
    wire.seal.agree(b"n" * 16, welcome.nonce)
    member = wire.roll.members["n"]
    member.join(Plan("r", {}, 5, "http://x", "m", "", {}, 3, 1, 4, "d"), tmp_path,
                Offset(7 * S, 2_000_000, 1))
    member.beat("r", Order("leg", leg_of(OPEN), 100))
    beat = wire.seal.open(wire.sent["n"][-1])
    assert isinstance(beat, Beat)
    assert (beat.run, beat.order.t0_ns) == ("r", 100 + 7 * S)
    frame = Frame(kind="ended", leg="run", t_ns=9 * S, stalls=[(8 * S, 8 * S + 5)],
                  stopped_ns=8 * S, health=Health(3))
    answer = msgspec.structs.replace(report(0, "r"), frames={3: frame, 2: frame}, leg="run")
    wire.roll.hear("n", wire.seal.close(answer), 0)
    assert member.frames == {3: Frame(
        kind="ended", leg="run", t_ns=2 * S, stalls=[(S, S + 5)], stopped_ns=S,
        health=Health(3, clock_error_s=0.002))}, "nobody speaks for another's shard"


def test_a_piece_of_another_s_journal_is_not_taken(tmp_path: Path) -> None:
    wire = Wire()
    welcome = wire.greet()
    assert isinstance(welcome, Welcome)
    wire.seal.agree(b"n" * 16, welcome.nonce)
    member = wire.roll.members["n"]
    member.join(Plan("r", {}, 5, "http://x", "m", "", {}, 3, 1, 4, "d"), tmp_path,
                Offset(0, 0, 1))
    for shard, run in ((2, "r"), (3, "old")):
        wire.roll.hear("n", wire.seal.close(Piece(run, shard, 0, zlib.crc32(b"x"), b"x")), 0)
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == {"records-3.jsonl": 0}
    wire.roll.hear("n", wire.seal.close(Piece("r", 3, 0, zlib.crc32(b"x"), b"x")), 0)
    assert (tmp_path / "records-3.jsonl").read_bytes() == b"x"
    ack = wire.seal.open(wire.sent["n"][-1])
    assert ack == Ack("r", 3, 1)


# ---------------------------------------------------------------------------------------- tallies

MIX = scenario.load("smoke")
SLOS = {"hello": MIX.slo_of("hello")}


def answered(k: int, ttft_s: float, gap_us: int, outcome: Outcome = Outcome.OK) -> RequestRecord:
    r = record(k, 0, k / 10)
    r.sent_ns, r.first_ns = r.due_ns, r.due_ns + round(ttft_s * S)
    r.gaps_us, r.outcome, r.output_tok = [gap_us] * 15, outcome, 16
    r.end_ns = (r.last_ns or 0) + 1000
    return r


def test_counts_add_up_over_workers_as_if_there_were_one() -> None:
    records = [answered(k, 0.01 * (1 + k % 90), 100 * (1 + k % 37)) for k in range(1000)]
    one = tallies.total([tallies.tally(records, SLOS)])
    three = tallies.total([tallies.tally(records[i::3], SLOS) for i in range(3)])
    assert one == three
    assert one.n == 1000
    assert sum(one.itl.values()) == 15_000
    assert one.good == sum(not metrics.misses(r, SLOS["hello"]) for r in records)
    assert tallies.merged([tallies.tally(records[i::3], SLOS) for i in range(3)]) == (
        tallies.tally(records, SLOS))


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_a_quantile_of_counts_is_that_of_the_values_to_two_percent(q: float) -> None:
    values = [0.0005 * 1.01**k for k in range(900)]
    counts: dict[int, int] = {}
    for v in values:
        counts[tallies.bucket(v)] = counts.get(tallies.bucket(v), 0) + 1
    true = sorted(values)[math.ceil(q * 900) - 1]
    found = tallies.quantile_s(counts, q)
    assert found is not None
    assert abs(found / true - 1) < 0.021
    assert tallies.quantile_s({5: 3}, 0.9) is None
    assert tallies.quantile_s({100: 5, 200: 5}, 0.5) == round(tallies.middle_s(100), 6)


def test_what_we_cancelled_is_no_request_and_errors_keep_the_last_words() -> None:
    records = [answered(k, 0.1, 100, o) for k, o in enumerate(
        [Outcome.CANCELLED, Outcome.HTTP_ERROR, Outcome.HTTP_ERROR, Outcome.OK])]
    records[1].error, records[2].error = "first", "x" * 5000
    delta = tallies.tally(records, SLOS)
    assert delta.classes["hello"].n == 3
    assert delta.errors == {"HTTP_ERROR": (2, "x" * 200)}


def test_a_delta_of_a_thousand_requests_a_second_fits_into_its_message() -> None:
    records = [answered(k, 0.001 * (1 + k), 17 * k + 1) for k in range(1000)]
    assert len(msgspec.msgpack.encode(tallies.tally(records, SLOS))) < LIMITS["Report"] / 50


def test_messages_of_each_kind_survive_the_way() -> None:
    worker, master = pair()
    leg = leg_of(OPEN)
    for message in (Plan("r", scenario.to_plain(MIX), 5, "http://x", "m", "", RATIOS, 0, 1, 3, "d"),
                    Beat(1, 2, "r", Order("leg", leg, 99), {0: 1}), Ack("r", 0, 9),
                    Welcome(b"h" * 16, b"w" * 16)):
        read = worker.open(master.close(message))
        json = [msgspec.json.encode(x, enc_hook=scenario.enc_hook) for x in (read, message)]
        assert json[0] == json[1]
        assert type(read) is type(message)


# ------------------------------------------------------------------------------------- measurement


@pytest.mark.parametrize(("error_s", "verdict"), [(0.011, "SUSPECT"), (0.009, "VALID")])
def test_a_clock_that_is_not_known_to_10_ms_makes_a_run_suspect(
        error_s: float, verdict: str) -> None:
    leg = leg_of(OPEN)
    window = Window(leg="run", t0_ns=0, from_ns=0, to_ns=S, end_ns=S, ending="done", shards=[
        Health(0), Health(1, clock_error_s=error_s), Health(2, clock_error_s=0.001)])
    findings = validity.check(leg, window, [], 0)
    assert validity.verdict(findings) == verdict
    assert {f.rule for f in findings} == ({"clock-error"} if verdict == "SUSPECT" else set())
