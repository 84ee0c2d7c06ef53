"""Campaigns: servers × workloads × repeats. What is complete is not run again, what differs is not
mixed in, and a server that does not fit, or dies, is a result."""

import contextlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadgen import campaign, cells
from loadgen.cells import Done, Kept
from loadgen.errors import ScenarioError, ServerError, StoreError
from loadgen.store import RunFolder
from loadgen.target import Target
from servers.sim.__main__ import engine_config, parse
from servers.sim.costs import DoesNotFit
from servers.sim.profiles import QUANTIZATIONS
from tests import synthetic

TWO = """
name = "two"
simulate = true
repeats = 2
[[servers]]
name = "a"
model = "Qwen/Qwen2.5-7B-Instruct"
gpu = "4090d"
[[servers]]
name = "b"
kind = "vllm"
model = "Qwen/Qwen2.5-7B-Instruct"
tensor_parallel = 2
max_model_len = 4096
options = ["--api-key=sesame", "--max-num-seqs=64"]
[[workloads]]
name = "ladder"
scenario = "chat"
concurrency = [1, 4]
duration = "20s"
[[workloads]]
name = "wire"
scenario = "smoke"
concurrency = [2]
num_prompts = 8
wire = true
repeats = 1
"""
NO_ROOM = ("the simulated vLLM refuses to start: To serve at least one request with the model's "
           "max seq len (131072), 7.00 GiB KV cache is needed, which is larger than the available "
           "KV cache memory (6.43 GiB). Based on the available memory, the estimated maximum model "
           "length is 120336. Try increasing `gpu_memory_utilization`")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "campaign.toml"
    path.write_text(text, encoding="utf-8")
    return path


def planned_of(tmp_path: Path, text: str = TWO) -> campaign.Campaign:
    return campaign.load(written(tmp_path, text))


class Ran:
    """What stands in for the command line: it notes the words and leaves a run folder."""

    def __init__(self, code: int = 0, says: str = "", leaves: bool = True) -> None:
        self.words: list[list[str]] = []
        self.lent: list[Any] = []
        self.code, self.says, self.leaves = code, says, leaves

    def __call__(self, words: list[str], server: Any) -> tuple[int, str]:
        self.words.append(words)
        self.lent.append(server)
        if server is not None:
            server.start()
        out = Path(words[1].removeprefix("--out="))
        if self.leaves:
            RunFolder.create(out, synthetic.manifest(command=["loadgen", *words]))
            (out / "summary.json").write_text("{}", encoding="utf-8")
        return self.code, self.says


class Box:
    """A server that only counts."""

    patience_s = 1.0
    pid = 7

    def __init__(self) -> None:
        self.starts = self.stops = 0
        self.dead: str | None = None

    def start(self) -> Target:
        self.starts += 1
        self.dead = None
        return Target("http://x", "m")

    def alive(self) -> str | None:
        return self.dead

    def facts(self) -> dict[str, Any]:
        return {"kind": "sim"}

    def stop(self) -> None:
        self.stops += 1


def run_all(planned: campaign.Campaign, out: Path, ran: Ran,
            lend: cells.Lend = lambda words, log: None) -> list[tuple[Done, bool]]:
    return list(cells.execute(planned, out, ran, lend, lambda _: None))


def test_each_cell_is_a_command_with_a_folder_of_its_own(tmp_path: Path) -> None:
    planned, ran = planned_of(tmp_path), Ran()
    done = run_all(planned, tmp_path / "out", ran)
    assert [d.cell.folder for d, _ in done][:5] == [
        "a/ladder-c1-1", "a/ladder-c4-1", "a/ladder-c1-2", "a/ladder-c4-2", "a/wire-c2-1"]
    first = ran.words[0]
    assert first[:6] == ["run", f"--out={tmp_path / 'out/a/ladder-c1-1'}", "--no-report", "chat",
                         "--concurrency=1", "--duration=20s"]
    assert "--virtual" in first
    assert first[-2:] == ["--model=Qwen/Qwen2.5-7B-Instruct", "--gpu=4090d"]
    assert "--server=sim" in ran.words[4]
    assert ran.words[5][-4:] == ["--tensor-parallel-size=2", "--max-model-len=4096",
                                 "--api-key=sesame", "--max-num-seqs=64"]


def test_no_two_cells_share_their_prompts_and_another_start_makes_the_same(
        tmp_path: Path) -> None:
    planned = planned_of(tmp_path)
    seeds = [[w for w in c.words if w.startswith("--seed=")]
             for s in planned.servers for c in campaign.cells_of(planned, s)]
    assert len({x[0] for x in seeds}) == len(seeds) == 10
    again = [[w for w in c.words if w.startswith("--seed=")]
             for s in planned.servers for c in campaign.cells_of(planned, s)]
    assert again == seeds


def test_one_line_makes_a_real_campaign_of_a_simulated_one(tmp_path: Path) -> None:
    planned = planned_of(tmp_path, TWO.replace("simulate = true", "simulate = false"))
    cell = campaign.cells_of(planned, planned.servers[1])[0]
    assert {"--server=vllm", "--model=Qwen/Qwen2.5-7B-Instruct"} < set(cell.words)
    assert "--virtual" not in cell.words
    assert not any(w.startswith("--gpu=") for w in cell.words)


def test_what_is_complete_is_not_run_again(tmp_path: Path) -> None:
    planned, again = planned_of(tmp_path), Ran()
    run_all(planned, tmp_path / "out", Ran(code=1))
    done = run_all(planned, tmp_path / "out", again)
    assert again.words == []
    assert {(d.code, now) for d, now in done} == {(1, False)}


def test_a_campaign_that_was_interrupted_goes_on_where_it_stopped(tmp_path: Path) -> None:
    planned, first = planned_of(tmp_path), Ran(code=130)
    assert len(run_all(planned, tmp_path / "out", first)) == 1
    assert len(cells.read(tmp_path / "out").cells) == 1
    second = Ran()
    assert len(run_all(planned, tmp_path / "out", second)) == 10
    assert len(second.words) == 10
    assert (tmp_path / "out/a/ladder-c1-1.unfinished/manifest.json").exists()


def test_an_interruption_forgets_no_later_cell_that_was_complete(tmp_path: Path) -> None:
    planned, out = planned_of(tmp_path), tmp_path / "out"
    run_all(planned, out, Ran())
    (out / "a/ladder-c1-1/summary.json").unlink()
    run_all(planned, out, Ran(code=130))
    again = Ran()
    for folder in out.glob("a/*.unfinished"):
        folder.rename(tmp_path / folder.name)
    run_all(planned, out, again)
    assert len(again.words) == 1


@pytest.mark.parametrize(("old", "new"), [
    ('duration = "20s"', 'duration = "30s"'), ("max_model_len = 4096", "max_model_len = 8192"),
    ('scenario = "smoke"', 'scenario = "own.toml"')])
def test_a_cell_of_another_definition_is_refused_and_never_mixed_in(
        tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "own.toml").write_text(
        (Path(__file__).parent.parent / "scenarios/smoke.toml").read_text(encoding="utf-8")
        .replace("output_tokens = 16", "output_tokens = 17"), encoding="utf-8")
    run_all(planned_of(tmp_path), tmp_path / "out", Ran())
    changed = planned_of(tmp_path, TWO.replace(old, new))
    with pytest.raises(StoreError, match="another definition"):
        run_all(changed, tmp_path / "out", Ran())


def test_a_scenario_is_known_by_what_it_holds_not_by_its_path(tmp_path: Path) -> None:
    shipped = Path(__file__).parent.parent / "scenarios/smoke.toml"
    (tmp_path / "smoke.toml").write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
    run_all(planned_of(tmp_path), tmp_path / "out", Ran())
    same = planned_of(tmp_path, TWO.replace('"smoke"', '"smoke.toml"'))
    again = Ran()
    run_all(same, tmp_path / "out", again)
    assert again.words == []


def test_secrets_of_a_server_are_not_written_down(tmp_path: Path) -> None:
    run_all(planned_of(tmp_path), tmp_path / "out", Ran())
    kept = (tmp_path / "out" / cells.KEPT).read_text(encoding="utf-8")
    assert "sesame" not in kept
    assert "--api-key=***" in kept


# ------------------------------------------------------------------------- servers


def test_a_server_is_started_once_for_its_row_and_stopped_at_its_end(tmp_path: Path) -> None:
    boxes: list[Box] = []

    def lend(words: list[str], log: Path) -> Any:
        if "--virtual" in words:
            return None
        boxes.append(Box())
        return boxes[-1]

    ran = Ran()
    run_all(planned_of(tmp_path, TWO.replace("wire = true\nrepeats = 1", "wire = true")),
            tmp_path / "out", ran, lend)
    assert [(b.starts, b.stops) for b in boxes] == [(1, 1), (1, 1)]
    assert sum(x is not None for x in ran.lent) == 4
    assert (tmp_path / "out/a/wire-c2-1/server.log").is_symlink()


def test_a_second_start_within_a_cell_is_a_restart_and_a_dead_server_is_started_again(
        tmp_path: Path) -> None:
    box = Box()
    lent = cells.Lent(box, tmp_path / "server.log")
    lent.begin(tmp_path / "one")
    lent.start()
    lent.stop()  # the runner's restart: stop, then start
    lent.start()
    assert (box.starts, box.stops) == (2, 1)
    lent.begin(tmp_path / "two")
    lent.start()
    assert box.starts == 2
    box.dead = "killed"
    lent.begin(tmp_path / "three")
    lent.start()
    assert box.starts == 3


def test_a_server_that_dies_in_a_cell_does_not_stop_the_campaign(tmp_path: Path) -> None:
    box = Box()
    done = run_all(planned_of(tmp_path), tmp_path / "out", Ran(code=4), lambda words, log: box)
    assert len(done) == 10
    assert box.starts == 10  # after a death nothing of the old one is trusted
    again = Ran()
    run_all(planned_of(tmp_path), tmp_path / "out", again)
    assert again.words == []


def test_a_server_that_does_not_start_is_not_waited_for_in_each_cell(tmp_path: Path) -> None:
    ran = Ran(code=4, says="cannot start vllm: no such file", leaves=False)
    done = run_all(planned_of(tmp_path), tmp_path / "out", ran)
    assert len(ran.words) == 2
    assert {d.outcome for d, _ in done} == {"not started"}
    assert cells.exit_code(planned_of(tmp_path), [d for d, _ in done]) == 4


def test_what_does_not_fit_is_a_result_with_the_largest_that_does_beside_it(
        tmp_path: Path) -> None:
    text = TWO.replace("max_model_len = 4096", "max_model_len = 131072\nlargest = true")
    planned = planned_of(tmp_path, text)

    def invoke(words: list[str], server: Any) -> tuple[int, str]:
        if "--max-model-len=131072" in words:
            return 4, NO_ROOM
        return Ran()(words, server)

    done = [d for d, _ in cells.execute(planned, tmp_path / "out", invoke, lambda *_: None,
                                        lambda _: None)]
    full = [d for d in done if d.cell.server == "b"]
    assert {d.outcome for d in full} == {"does not fit"}
    assert full[0].refusal == cells.Refusal(7.0, 6.43, 120336)
    fits = [d for d in done if d.cell.server == "b-fits"]
    assert len(fits) == 5
    assert "--max-model-len=120336" in fits[0].cell.words
    kept = cells.read(tmp_path / "out")
    assert [s.name for s in kept.campaign.servers] == ["a", "b", "b-fits"]
    assert cells.exit_code(kept.campaign, kept.cells) == 0
    again = Ran()
    run_all(planned, tmp_path / "out", again)
    assert again.words == []  # resumed: the refusal stands, and so does the row beside it


@pytest.mark.parametrize("says", [
    "Failed to load model - not enough GPU memory. torch.OutOfMemoryError: CUDA out of memory.",
    "ValueError: No available memory for the cache blocks. Try increasing it"])
def test_a_model_that_does_not_fit_has_no_largest_context(says: str) -> None:
    assert cells.is_full(says)
    assert cells.refusal_of(says) is None


def test_what_the_simulator_cannot_say_is_not_simulated(tmp_path: Path) -> None:
    text = TWO.replace('kind = "vllm"', 'quantization = "fp8"')
    ran = Ran()
    done = run_all(planned_of(tmp_path, text), tmp_path / "out", ran)
    assert {(d.outcome, d.says) for d, _ in done if d.cell.server == "b"} == {
        ("not simulated", "fp8: of the speed of its kernels the simulator knows nothing; it knows "
                          "awq and gptq")}
    assert len(ran.words) == 5


def test_four_bits_and_transformers_are_options_of_the_simulator(tmp_path: Path) -> None:
    for row, wanted in (
            ('quantization = "awq"', {"--quantization=awq"}),
            ('kind = "transformers"', {"--backend=transformers"}),
            ('kind = "transformers"\nquantization = "gptq"',
             {"--backend=transformers", "--quantization=gptq"})):
        planned = planned_of(tmp_path, TWO.replace('kind = "vllm"', row))
        b = planned.servers[1]
        assert campaign.not_simulated(planned, b) is None
        assert wanted <= set(campaign.server_options(planned, b))
        real = msgspec.structs.replace(planned, simulate=False)
        assert "--backend=transformers" not in campaign.server_options(real, b)
    assert set(campaign.SIMULATED) == set(QUANTIZATIONS)


# ------------------------------------------------------------------------------- the exit code


def test_a_ladder_passes_if_one_of_its_loads_is_safe(tmp_path: Path) -> None:
    planned = planned_of(tmp_path)
    a = campaign.cells_of(planned, planned.servers[0])

    def code(*codes: int) -> int:
        return cells.exit_code(planned, [Done(a[i], "done", x) for i, x in enumerate(codes)])
    assert code(0, 4, 0, 1) == 0
    assert code(1, 1, 1, 1) == 1
    assert code(5, 5) == 5
    assert code(0, 3) == 3
    assert code(0, 0, 0, 0, 4) == 4


def test_a_workload_that_asks_for_no_load_is_only_measured(tmp_path: Path) -> None:
    planned = planned_of(tmp_path, TWO + 'tables = ["ttft"]\n')
    wire = campaign.cells_of(planned, planned.servers[0])[-1]
    assert cells.exit_code(planned, [Done(wire, "done", 5)]) == 0
    assert cells.exit_code(planned, [Done(wire, "done", 1)]) == 0
    assert cells.exit_code(planned, [Done(wire, "done", 3)]) == 3


# ------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize(("text", "says"), [
    (TWO.replace('"b"', '"a"'), "one name"),
    (TWO.replace("concurrency = [1, 4]", ""), "takes one of concurrency, rate"),
    (TWO.replace("concurrency = [1, 4]", "max_concurrency = 4"), "takes one of"),
    (TWO.replace('duration = "20s"', ""), "duration or num_prompts"),
    (TWO.replace('"chat"', '"chatt"'), "did you mean"),
    (TWO.replace('gpu = "4090d"', 'gpus = "4090d"'), "did you mean 'gpu'"),
    (TWO.replace('kind = "vllm"', 'kind = "remote"'), "base_url goes with"),
    (TWO.replace("max_model_len = 4096", "largest = true"), "give that"),
    (TWO + 'options = ["--seed=3"]', "leave --, --out and --seed"),
    (TWO + 'tables = ["speeed"]', "speeed"),
    (TWO + '[[include]]\nserver = "z"', "leave no pair"),
    ('name = "x"\n[[runs]]\nname = "a"\ncommand = "sweep mixed"', "written before"),
    ("name = ", "campaign.toml"),
])
def test_a_bad_campaign_is_refused_with_what_is_wrong(tmp_path: Path, text: str,
                                                      says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        planned_of(tmp_path, text)


def test_pairs_are_included_and_excluded_by_patterns(tmp_path: Path) -> None:
    text = TWO + '[[include]]\nserver = "a"\n[[exclude]]\nworkload = "w*"\n'
    planned = planned_of(tmp_path, text)
    assert [[w.name for w in campaign.workloads_of(planned, s)] for s in planned.servers] == [
        ["ladder"], []]


def test_the_longest_prompt_leaves_room_for_the_answer(tmp_path: Path) -> None:
    text = TWO + 'prompt_tokens = ["longest"]\noutput_tokens = 256\n[[include]]\nserver = "b"\n'
    planned = planned_of(tmp_path, text)
    cell = campaign.cells_of(planned, planned.servers[1])[-1]
    assert cell.prompt_tok == 4096 - 256 - campaign.RESERVE_TOK
    with pytest.raises(ScenarioError, match="max_model_len"):
        campaign.cells_of(planned_of(tmp_path, text.replace('server = "b"', 'server = "a"')),
                          planned.servers[0])


SHIPPED = sorted((Path(__file__).parent.parent / "scenarios" / "campaigns").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_campaign_is_in_order_and_simulated_as_it_stands(path: Path) -> None:
    planned = campaign.load(path)
    assert planned.simulate
    for s in planned.servers:
        assert all(c.words for c in campaign.cells_of(planned, s))
        assert campaign.not_simulated(planned, s) is None
        asked = parse(campaign.server_options(planned, s))
        assert asked.backend == ("transformers" if s.kind == "transformers" else "vllm")
        with contextlib.suppress(DoesNotFit):
            found = engine_config(asked).machine.quantization
            assert (found.name if found else None) == s.quantization


def test_a_folder_without_cells_is_no_campaign(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="campaign's folder"):
        cells.read(tmp_path)


def test_the_kept_file_reads_as_it_was_written(tmp_path: Path) -> None:
    run_all(planned_of(tmp_path), tmp_path / "out", Ran())
    kept = cells.read(tmp_path / "out")
    assert isinstance(kept, Kept)
    assert len(kept.cells) == 10


def test_an_error_of_the_operator_s_is_raised_by_no_stand_in() -> None:
    """`Ran` is what `cli._invoke` is: code and words, never an exception."""
    from loadgen import cli

    code, says = cli._invoke(["run", "nosuch", "--concurrency=1", "--num-prompts=1"], None)
    assert code == 2
    assert "no scenario 'nosuch'" in says
    assert issubclass(ServerError, Exception)
