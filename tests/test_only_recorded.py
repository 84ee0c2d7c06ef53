"""A host that only makes load: records are kept and the verdict is said without the analysis."""

import subprocess
import sys
from pathlib import Path

import pytest

from loadgen import cli
from loadgen.store import RunFolder
from tests.real import loadgen

WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"altair", "pandas", "pyarrow", "scipy", "vl_convert"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from loadgen.cli import entry
entry()
"""


@pytest.mark.parametrize(("words", "code", "says"), [
    (("run", "smoke", "--concurrency", "2", "--num-prompts", "120"), cli.PASS, ""),
    (("sweep", "smoke", "--max-concurrency", "4"), cli.PASS, "SAFE, up to ")])
def test_without_the_analysis_all_is_recorded_and_the_report_is_made_elsewhere(
        tmp_path: Path, words: tuple[str, ...], code: int, says: str) -> None:
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT, *words, "--virtual", "--seed", "1", "--out", "r"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == code, said.stdout + said.stderr
    assert "no pandas here" in said.stdout
    assert says in said.stdout
    assert len(list(RunFolder(tmp_path / "r").records())) > 100
    assert not (tmp_path / "r" / "summary.json").exists()
    elsewhere = loadgen("report", "r", "--no-html", cwd=tmp_path)
    assert elsewhere.code == code, elsewhere.all
    assert (tmp_path / "r" / "records.parquet").exists()
