"""Campaigns: what is complete is not run again, what differs is not mixed in."""

from pathlib import Path

import msgspec
import pytest

from loadgen import campaign
from loadgen.errors import ScenarioError, StoreError
from loadgen.store import RunFolder
from tests import synthetic

TWO = """
name = "two"
[[runs]]
name = "a"
command = "sweep mixed --max-concurrency 8"
[[runs]]
name = "b"
command = "run smoke --num-prompts 8 -- --gpu h200"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "campaign.toml"
    path.write_text(text, encoding="utf-8")
    return path


def run_all(planned: campaign.Campaign, out: Path,
            code: int = 0) -> tuple[list[list[str]], list[int]]:
    """The commands that were invoked, and the exit code of each run."""
    invoked: list[list[str]] = []

    def invoke(words: list[str]) -> int:
        invoked.append(words)
        command = ["loadgen", *words]
        RunFolder.create(out / words[1].rpartition("/")[2], synthetic.manifest(command=command))
        (out / words[1].rpartition("/")[2] / "summary.json").write_text("{}", encoding="utf-8")
        return code

    codes = [code for _, code, _ in campaign.execute(planned, out, invoke, lambda _: None)]
    return invoked, codes


def test_each_run_gets_a_folder_of_its_name_and_its_options_stay_behind_the_dashes(
        tmp_path: Path) -> None:
    planned = campaign.load(written(tmp_path, TWO))
    invoked, codes = run_all(planned, tmp_path / "out")
    assert codes == [0, 0]
    assert invoked[1] == ["run", f"--out={tmp_path / 'out' / 'b'}", "smoke", "--num-prompts", "8",
                          "--", "--gpu", "h200"]


def test_what_is_complete_is_not_run_again(tmp_path: Path) -> None:
    planned = campaign.load(written(tmp_path, TWO))
    run_all(planned, tmp_path / "out")
    assert run_all(planned, tmp_path / "out") == ([], [0, 0])


def test_a_complete_run_keeps_its_exit_code_and_an_interrupted_one_is_run_again(
        tmp_path: Path) -> None:
    planned = campaign.load(written(tmp_path, TWO))
    run_all(planned, tmp_path / "out", code=1)
    assert run_all(planned, tmp_path / "out") == ([], [1, 1])
    other = tmp_path / "other"
    run_all(planned, other, code=130)
    assert len(run_all(planned, other)[0]) == 2


def test_a_run_of_another_command_is_refused(tmp_path: Path) -> None:
    run_all(campaign.load(written(tmp_path, TWO)), tmp_path / "out")
    changed = campaign.load(written(tmp_path, TWO.replace("concurrency 8", "concurrency 16")))
    with pytest.raises(StoreError, match="another command"):
        run_all(changed, tmp_path / "out")


def test_a_run_that_did_not_finish_is_kept_and_run_again(tmp_path: Path) -> None:
    planned = campaign.load(written(tmp_path, TWO))
    run_all(planned, tmp_path / "out")
    (tmp_path / "out" / "a" / "summary.json").unlink()
    invoked, codes = run_all(planned, tmp_path / "out")
    assert codes == [0, 0]
    assert [words[0] for words in invoked] == ["sweep"]
    assert (tmp_path / "out" / "a.unfinished" / "manifest.json").exists()


@pytest.mark.parametrize(("text", "says"), [
    ("name = 'x'\nruns = []", "runs"),
    ("name = 'x'\n[[runs]]\nname = 'a'\ncommand = 'report x'", "begin with sweep or run"),
    ("name = 'x'\n[[runs]]\nname = 'a'\ncommand = 'run smoke --out y'", "--out"),
    ("name = 'x'\n[[runs]]\nname = 'a'\ncommand = 'run \"smoke'", "quotation"),
    ("name = 'x'\n[[runs]]\nname = 'a/b'\ncommand = 'run smoke'", "name"),
    ("name = 'x'\n[[runs]]\nnam = 'a'\ncommand = 'run smoke'", "did you mean 'name'"),
    (TWO.replace('"b"', '"a"'), "one name"),
    ("name = ", "campaign.toml"),
])
def test_a_bad_campaign_is_refused_with_what_is_wrong(tmp_path: Path, text: str,
                                                      says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        campaign.load(written(tmp_path, text))


def test_the_shipped_campaigns_are_in_order() -> None:
    shipped = list((Path(__file__).parent.parent / "scenarios" / "campaigns").glob("*.toml"))
    assert shipped
    for path in shipped:
        assert campaign.load(path).runs


def test_the_table_has_a_row_per_complete_run(tmp_path: Path) -> None:
    from analysis import summary

    planned = campaign.load(written(tmp_path, TWO))
    synthetic.write(tmp_path / "a")
    summary.finish(tmp_path / "a", report=False)
    rows = campaign.summaries(planned, tmp_path)
    said = msgspec.json.decode((tmp_path / "a" / "summary.json").read_bytes())
    assert [r[0] for r in rows] == ["a"]
    assert rows[0][1].startswith("SAFE")
    assert rows[0][2] == f"{said['conclusion']['safe']:g}"
    assert campaign.markdown(rows).count("\n") == 3
