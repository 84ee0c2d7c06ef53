"""The run folder: what survives a crash, what is refused, what a full disk says."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadgen.errors import StoreError
from loadgen.leg import Leg, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Open, PerSecond, Trace
from loadgen.store import SCHEMA, Header, Journal, LegLine, Manifest, Row, RunFolder

ROOT = Path(__file__).resolve().parent.parent
GARBAGE = [b"garbage\n", b"{\n", b'{"leg":"x"}\n', b"[]\n", b"7\n", b"\x00\x00\x00\n",
           b"\xff\xfe\xfd\n", b'{"leg":"\xff"}\n', b'{"leg":"\xe4\xbd\n']


def manifest(**changes: Any) -> Manifest:
    base: dict[str, Any] = {
        "schema": SCHEMA, "run": "r", "created": "2025-11-21T01:00:00+00:00",
        "command": ["loadgen", "run"], "scenario": {"name": "x"}, "seed": 7, "target_frac": 0.95,
        "confidence": 0.95, "base_url": "http://h", "model": "m", "server": {}, "ratios": {},
        "versions": {}, "host": {}}
    return Manifest(**(base | changes))


def record(seq: int, **fields: Any) -> RequestRecord:
    base: dict[str, Any] = {"leg": "ladder-4-r0", "shard": 0, "seq": seq, "session": seq,
                            "turn": 0, "cls": "a", "due_ns": seq, "end_ns": seq + 1,
                            "outcome": Outcome.OK, "gaps_us": [1, 2]}
    return RequestRecord(**(base | fields))


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", manifest())


def journal_of(folder: RunFolder, *seqs: int, shard: int = 0) -> Path:
    """A record journal with its header and these records."""
    path = folder.records_path(shard)
    journal = Journal(path)
    journal.append(Header(SCHEMA, "r", shard, 1, 2))
    for seq in seqs:
        journal.append(record(seq, shard=shard))
    journal.close()
    return path


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as f:
        f.write(data)


def seqs(folder: RunFolder) -> list[int]:
    return [r.seq for r in folder.records()]


# ------------------------------------------------------------------------------------- journals


def test_records_come_back_as_they_were(folder: Any) -> None:
    journal = Journal(folder.records_path(0))
    journal.append(Header(SCHEMA, "r", 0, 1, 2))
    sent = [record(0), record(1, error="\u4f60\n\u2028\"\\", first_ns=5, reads=[2, 1]),
            record(2, outcome=Outcome.DROPPED, gaps_us=[])]
    for r in sent:
        journal.append(r)
    journal.close()
    assert list(folder.records()) == sent
    assert folder.headers() == [Header(SCHEMA, "r", 0, 1, 2)]
    assert folder.torn == 0


def test_shards_are_read_one_after_the_other(folder: Any) -> None:
    for shard in (1, 0):
        journal_of(folder, 10 * shard, 10 * shard + 1, shard=shard)
    assert seqs(folder) == [0, 1, 10, 11]
    assert [h.shard for h in folder.headers()] == [0, 1]


def test_each_line_is_there_as_soon_as_it_is_appended(folder: Any) -> None:
    journal = Journal(folder.records_path(0))
    for seq in range(3):
        journal.append(record(seq))
        assert len(list(folder.records())) == seq + 1


def test_a_torn_last_line_is_passed_over_and_counted_wherever_it_was_torn(folder: Any) -> None:
    path = journal_of(folder, 1, 2, 3)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last + 1, len(whole)):
        path.write_bytes(whole[:cut])
        fresh = RunFolder(folder.path)
        assert seqs(fresh) == [1, 2], cut
        assert fresh.torn == 1, cut


@pytest.mark.parametrize("tail", [b'{"leg":"ladder-4-r0","sha', b"x", b'{"leg":"\xe4\xbd'])
def test_a_torn_tail_does_not_spoil_what_is_appended_later(folder: Any, tail: Any) -> None:
    path = journal_of(folder, 1, 2)
    append(path, tail)
    journal = Journal(path)
    journal.append(record(3))
    assert seqs(folder) == [1, 2, 3]
    assert folder.torn == 1


def test_opening_a_whole_journal_again_adds_nothing(folder: Any) -> None:
    path = journal_of(folder, 1)
    before = path.read_bytes()
    Journal(path).close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", GARBAGE, ids=repr)
def test_a_line_of_garbage_in_the_middle_is_passed_over_and_counted(folder: Any, line: Any) -> None:
    path = journal_of(folder, 1, 2)
    append(path, line)
    journal = Journal(path)
    journal.append(record(3))
    assert seqs(folder) == [1, 2, 3]
    assert folder.torn == 1


@pytest.mark.parametrize("line", GARBAGE[:3] + GARBAGE[6:], ids=repr)
def test_garbage_among_legs_and_telemetry_is_passed_over_too(folder: Any, line: Any) -> None:
    legs, rows = folder.legs_journal(), folder.telemetry("server")
    rows.append(Row("server", 1, "running", 4.0, {"engine": "0"}))
    legs.append(LegLine(leg=leg("a")))
    for name in ("legs", "telemetry-server"):
        append(folder.path / f"{name}.jsonl", line)
    rows.append(Row("server", 2, "running", 5.0))
    legs.append(LegLine(window=window("a")))
    assert list(folder.rows()) == [Row("server", 1, "running", 4.0, {"engine": "0"}),
                                   Row("server", 2, "running", 5.0)]
    assert folder.legs()[0][0] == leg("a")
    assert folder.torn >= 1


def test_reading_goes_on_where_it_had_stopped(folder: Any) -> None:
    offsets: dict[Path, int] = {}
    path = journal_of(folder, 1, 2)
    assert [r.seq for r in folder.records(offsets)] == [1, 2]
    assert offsets == {path: path.stat().st_size}
    assert list(folder.records(offsets)) == []
    journal = Journal(path)
    journal.append(record(3))
    journal_of(folder, 10, shard=1)
    assert [r.seq for r in folder.records(offsets)] == [3, 10]
    assert list(folder.records(offsets)) == []
    assert seqs(folder) == [1, 2, 3, 10]


def test_a_line_that_is_being_written_is_read_when_it_is_whole(folder: Any) -> None:
    offsets: dict[Path, int] = {}
    path = journal_of(folder, 1)
    line = msgspec.json.encode(record(2)) + b"\n"
    append(path, line[:20])
    assert [r.seq for r in folder.records(offsets)] == [1]
    append(path, line[20:])
    assert [r.seq for r in folder.records(offsets)] == [2]


def test_a_folder_without_journals_holds_nothing(folder: Any) -> None:
    assert (list(folder.records()), folder.headers(), folder.legs(), list(folder.rows())) == (
        [], [], [], [])


# ----------------------------------------------------------------------------------------- legs


def leg(name: str, load: Any = None) -> Leg:
    return Leg(id=name, axis="concurrency", value=4, phase="ladder", replicate=0, seed=1,
               load=load or Closed(4), warmup_s=1, measure_s=7)


def window(name: str) -> Window:
    return Window(name, 0, 1, 8, 9, "done", stalls=[(2, 3)], note="n")


@pytest.mark.parametrize("load", [Closed(4), Open(PerSecond(2.5), "gamma", cv=2.0, max_inflight=9),
                                  Trace((0.0, 1.5))])
def test_a_leg_comes_back_with_its_load_and_window(folder: Any, load: Any) -> None:
    journal = folder.legs_journal()
    journal.append(LegLine(leg=leg("a", load)))
    journal.append(LegLine(window=window("a")))
    assert folder.legs() == [(leg("a", load), window("a"))]


def test_a_leg_that_never_ended_has_no_window(folder: Any) -> None:
    journal = folder.legs_journal()
    for name in ("a", "b"):
        journal.append(LegLine(leg=leg(name)))
    journal.append(LegLine(window=window("a")))
    assert folder.legs() == [(leg("a"), window("a")), (leg("b"), None)]


# ------------------------------------------------------------------------------------- manifest


def test_the_manifest_comes_back(folder: Any) -> None:
    assert folder.manifest() == manifest()


def test_a_run_is_not_written_over_another(folder: Any) -> None:
    before = (folder.path / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match=r"holds a run already; .* --out"):
        RunFolder.create(folder.path, manifest(run="other"))
    assert (folder.path / "manifest.json").read_bytes() == before


def test_an_empty_folder_may_become_a_run(tmp_path: Any) -> None:
    assert RunFolder.create(tmp_path, manifest()).manifest() == manifest()


def test_a_newer_schema_is_refused(tmp_path: Any) -> None:
    newer = RunFolder.create(tmp_path / "run", manifest(schema=SCHEMA + 1))
    with pytest.raises(StoreError, match=f"schema {SCHEMA + 1} is newer .* update loadgen"):
        newer.manifest()


def test_a_newer_schema_is_refused_by_its_number_whatever_else_it_holds(folder: Any) -> None:
    (folder.path / "manifest.json").write_bytes(b'{"schema":%d,"runs":[]}' % (SCHEMA + 1))
    with pytest.raises(StoreError, match="newer"):
        folder.manifest()


@pytest.mark.parametrize("text", [b"", b"{", b"{}", b"[]", b"\xff", b'{"schema":"one"}'])
def test_a_manifest_that_is_none_is_a_store_error(folder: Any, text: Any) -> None:
    (folder.path / "manifest.json").write_bytes(text)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        folder.manifest()


def test_a_folder_without_a_manifest_is_no_run(tmp_path: Any) -> None:
    with pytest.raises(StoreError, match="is no run folder"):
        RunFolder(tmp_path / "nothing").manifest()


def test_a_file_is_there_whole_or_not_at_all(folder: Any, monkeypatch: Any) -> None:
    """The old one stays until the new one is on the disk, and then gives its place at once."""
    folder.write("summary.json", b"old")
    seen: list[bytes] = []

    def replace(self: Path, target: Path) -> None:
        seen.append((folder.path / "summary.json").read_bytes())
        seen.append(self.read_bytes())
        os.replace(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    folder.write("summary.json", b"new")
    assert seen == [b"old", b"new"]
    assert (folder.path / "summary.json").read_bytes() == b"new"
    assert sorted(p.name for p in folder.path.iterdir()) == ["manifest.json", "summary.json"]


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(folder: Any, monkeypatch: Any) -> None:
    folder.write("summary.json", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        folder.write("summary.json", b"new")
    assert (folder.path / "summary.json").read_bytes() == b"old"
    assert sorted(p.name for p in folder.path.iterdir()) == ["manifest.json", "summary.json"]


def test_a_folder_that_cannot_be_made_is_a_store_error(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        RunFolder.create(tmp_path / "file" / "run", manifest())


# ------------------------------------------------------------------------------------ full disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_a_store_error_that_says_what_to_do() -> None:
    journal = Journal(Path("/dev/full"))
    with pytest.raises(StoreError, match=r"No space left .* records so far are kept.*space"):
        journal.append(record(1))


NO_ROOM = """
import resource, signal, sys
from pathlib import Path
from loadgen.errors import StoreError
from loadgen.record import Outcome, RequestRecord
from loadgen.store import Journal
path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
journal = Journal(path)
record = RequestRecord("l", 0, 3, 3, 0, "a", 1, 2, Outcome.OK)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
for _ in range(2):
    try:
        journal.append(record)
        print("no error")
    except StoreError as e:
        print(e)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
for _ in range(int(sys.argv[2])):
    journal.append(record)
"""


def without_room(path: Path, afterwards: int = 0) -> list[str]:
    """A process of its own finds room for 20 bytes, then none, then enough again: what its first
    two appends raised."""
    return subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(path), str(afterwards)], cwd=ROOT, text=True,
        capture_output=True, check=True, timeout=30).stdout.splitlines()


def test_a_line_that_fits_only_in_part_is_a_store_error(folder: Any) -> None:
    said = without_room(journal_of(folder, 1, 2))
    assert len(said) == 2
    assert "only 20 of" in said[0]
    assert "File too large" in said[1]
    assert all("records so far are kept" in line for line in said)
    assert (seqs(folder), folder.torn) == ([1, 2], 1)


def test_a_line_that_fitted_only_in_part_does_not_spoil_the_next(folder: Any) -> None:
    """After a full disk, what was in flight is cancelled, and those records are appended too."""
    without_room(journal_of(folder, 1, 2), afterwards=2)
    assert (seqs(folder), folder.torn) == ([1, 2, 3, 3], 1)


def test_a_journal_that_cannot_be_opened_is_a_store_error(tmp_path: Any) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        Journal(tmp_path / "nowhere" / "records-0.jsonl")
