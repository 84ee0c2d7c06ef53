"""A trace's shared blocks on a real vLLM: what its prefix cache holds of each prompt is what the
trace's hash ids say. On a CPU, with a tiny model; needs what test_vllm_real.py needs."""

from pathlib import Path

from loadgen.record import Outcome
from loadgen.scenario import Trace
from loadgen.sources import shared_tok
from loadgen.store import RunFolder
from tests import test_vllm_real as real_vllm
from tests.real import over, start
from tests.test_traces import talks

pytestmark = real_vllm.pytestmark
model = real_vllm.model
nobody_is_left = real_vllm.nobody_is_left
CPU_BLOCK_TOK = 128  # vLLM's, on a CPU
SCENARIO = """
load = { mode = "trace", format = "mooncake", path = "t.jsonl", to = "40s", scale = 2.0 }
slo = { ttft = "30s" }
[[classes]]
name = "chat"
kind = "chat"
prompt_tokens = 600
output_tokens = 8
sampling = { ignore_eos = true }
"""


def test_a_real_prefix_cache_holds_what_the_hash_ids_say(tmp_path: Path, model: Path) -> None:
    talks(tmp_path / "t.jsonl")  # four turns of ten users in 40 s
    (tmp_path / "s.toml").write_text(SCENARIO)
    with start(
            "run", "./s.toml", "--server", "vllm", "--server-cmd", real_vllm.SERVE, "--model",
            str(model), "--seed", "5", "--out", "r", "--no-report", "--", *real_vllm.FLAGS,
            "--enable-prompt-tokens-details", cwd=tmp_path, env=real_vllm.ENV) as process:
        said = over(process, real_vllm.START_S + 60)
    assert said.code in real_vllm.JUDGED, said.all
    folder = RunFolder(tmp_path / "r")
    ((leg, _),) = folder.legs()
    assert isinstance(leg.load, Trace)
    records = sorted(folder.records(), key=lambda r: r.session)
    assert {r.outcome for r in records} == {Outcome.OK}, said.all
    assert len(records) == len(leg.load.due_s) == 40
    implied = shared_tok(leg.load.asked)
    near = [abs((r.cached_tok or 0) - implied[r.session]) < CPU_BLOCK_TOK for r in records]
    assert sum(near) >= 36, [(r.cached_tok, implied[r.session]) for r in records]  # one that comes
    # while the prompt before it is computed finds less
    cached = sum(r.cached_tok or 0 for r in records) / sum(r.prompt_tok or 0 for r in records)
    assert cached > 0.45
    assert "prompts-reused" not in said.all
    assert "prefix-not-reused" not in said.all
