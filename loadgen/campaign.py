"""A campaign: servers × workloads × repeats, as a TOML file, and the cells that it comes to. Each
cell is one `loadgen run` or `loadgen sweep`, whose words are made here; nothing is run here.

    name = "two"
    simulate = true                     # false: the real vLLM of each row
    [[servers]]
    name = "7b"
    model = "Qwen/Qwen2.5-7B-Instruct"
    gpu = "4090d"
    [[workloads]]
    name = "ladder"
    scenario = "chat"
    concurrency = [1, 4, 16]
    duration = "60s"
    tables = ["concurrency"]
"""

import fnmatch
import hashlib
import tomllib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from loadgen import scenario as scenarios
from loadgen.errors import ScenarioError
from loadgen.scenario import convert

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,60}$")]
Count = Annotated[int, Meta(ge=1, le=100_000)]
Tokens = Annotated[int, Meta(ge=1, le=1_000_000)]
Repeats = Annotated[int, Meta(ge=1, le=100)]
Price = Annotated[float, Meta(ge=0)]
LONGEST = "longest"  # a prompt that fills the server's context
RESERVE_TOK = 64  # that it leaves beside the answer: a prompt is made to its length, but for a few
ANSWER_TOK = 512  # beside the longest prompt, where no length is asked for
SIMULATED = ("awq", "gptq")  # quantisations that the simulator knows

TableName = Literal[
    "speed", "ttft", "memory", "utilisation", "long_text", "longest_context", "concurrency",
    "cost", "safe", "document", "input_length", "longest_output", "users", "structured",
    "retention", "features", "throttled", "tasks"]


class _Plain(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all of a campaign file."""


class ServerRow(_Plain, frozen=True):
    """One server. `gpu`, `tensor_parallel` and the price are also what its cost is counted by.
    `largest`: where it does not fit, the largest context that does gets a row beside it."""

    name: Name
    model: str
    kind: Literal["sim", "vllm", "transformers", "remote"] = "vllm"
    gpu: str | None = None
    tensor_parallel: Annotated[int, Meta(ge=1, le=64)] = 1
    quantization: str | None = None
    max_model_len: Tokens | None = None
    options: tuple[str, ...] = ()
    sim_options: tuple[str, ...] = ()  # that only the simulator is given
    price_per_gpu_hour: Price | None = None
    base_url: str | None = None
    command: str | None = None  # in place of `vllm serve`, as --server-cmd
    largest: bool = False
    beside: Name | None = None  # the row that did not fit, of one that a campaign adds


class Workload(_Plain, frozen=True):
    """What is done with each server. Lists are ladders: one cell per value. `oom`: a sweep that
    goes on until the server dies or `max_concurrency` is held. `wire`: over sockets with the
    simulator, too, whose engine is else stepped in virtual time: where answers are looked at."""

    name: Name
    scenario: str
    what: Literal["run", "sweep", "oom"] = "run"
    concurrency: tuple[Count, ...] = ()
    rate: tuple[Annotated[float, Meta(gt=0)], ...] = ()
    max_concurrency: Count | None = None
    max_rate: Annotated[float, Meta(gt=0)] | None = None
    budget: str | None = None
    duration: str | None = None
    num_prompts: Count | None = None
    prompt_tokens: tuple[Tokens | Literal["longest"], ...] = ()
    output_tokens: Tokens | None = None
    slo: str | None = None
    wire: bool = False
    repeats: Repeats | None = None
    options: tuple[str, ...] = ()
    tables: tuple[TableName, ...] = ()


class Pair(_Plain, frozen=True):
    """Names as shell patterns."""

    server: str = "*"
    workload: str = "*"

    def fits(self, server: str, workload: str) -> bool:
        return fnmatch.fnmatchcase(server, self.server) and fnmatch.fnmatchcase(
            workload, self.workload)


class Campaign(_Plain, frozen=True):
    """`simulate`: rows of kind vllm run on the simulator, with their GPU and model."""

    name: Name
    servers: Annotated[tuple[ServerRow, ...], Meta(min_length=1)]
    workloads: Annotated[tuple[Workload, ...], Meta(min_length=1)]
    description: str = ""
    simulate: bool = False
    currency: str = "€"
    repeats: Repeats = 1
    seed: Annotated[int, Meta(ge=0, le=2**31)] = 1
    include: tuple[Pair, ...] = ()
    exclude: tuple[Pair, ...] = ()

    def server(self, name: str) -> ServerRow:
        return next(s for s in self.servers if s.name == name)

    def workload(self, name: str) -> Workload:
        return next(w for w in self.workloads if w.name == name)


class Cell(Struct, frozen=True, omit_defaults=True):
    """One run. `load`: requests in flight, or per second; None: a sweep's. `folder`: below the
    campaign's; `words`: what follows `loadgen`; `mix`: the scenario's name and a digest of it."""

    server: str
    workload: str
    folder: str
    words: tuple[str, ...]
    mix: str
    load: float | None = None
    prompt_tok: int | None = None
    repeat: int = 0


def load(path: Path) -> Campaign:
    """The campaign of a file, checked. Raises ScenarioError."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ScenarioError(f"{path}: cannot be read: {e.strerror}; the shipped campaigns lie in "
                            "scenarios/campaigns") from e
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ScenarioError(f"{path}: not valid TOML: {e}") from e
    if "runs" in raw:
        raise ScenarioError(f"{path}: [[runs]] is how campaigns were written before; write "
                            "[[servers]] and [[workloads]], as scenarios/campaigns/gpus.toml")
    planned = convert(raw, Campaign, str(path))
    for what, rows in (("servers", planned.servers), ("workloads", planned.workloads)):
        names = [r.name for r in rows]
        if len(set(names)) < len(names):
            raise ScenarioError(f"{path}: two {what} have one name ({', '.join(names)})")
    for s in planned.servers:
        _check_server(s, f"{path}: server {s.name}")
    planned = msgspec.structs.replace(planned, workloads=tuple(
        msgspec.structs.replace(w, scenario=_beside(w.scenario, path)) for w in planned.workloads))
    for w in planned.workloads:
        _check_workload(w, f"{path}: workload {w.name}")
    if not any(True for s in planned.servers for _ in workloads_of(planned, s)):
        raise ScenarioError(f"{path}: include and exclude leave no pair of server and workload")
    return planned


def _beside(scenario: str, file: Path) -> str:
    """A path is looked up beside the campaign's file first."""
    beside = file.parent / scenario
    return str(beside) if scenario.endswith(".toml") and beside.is_file() else scenario


def _check_server(s: ServerRow, where: str) -> None:
    if (s.kind == "remote") != (s.base_url is not None):
        raise ScenarioError(f'{where}: base_url goes with kind = "remote", and that with it')
    if s.kind in ("sim", "remote") and s.command:
        raise ScenarioError(f"{where}: command is of a server that is started: vllm, transformers")
    if s.largest and s.max_model_len is None:
        raise ScenarioError(f"{where}: largest looks for a smaller max_model_len: give that")


def _check_workload(w: Workload, where: str) -> None:
    mix = scenarios.load(w.scenario)
    given = {"concurrency": bool(w.concurrency), "rate": bool(w.rate),
             "max_concurrency": w.max_concurrency is not None, "max_rate": w.max_rate is not None}
    loads = [k for k, there in given.items() if there]
    allowed = {"run": ("concurrency", "rate"), "sweep": ("max_concurrency", "max_rate"),
               "oom": ("max_concurrency",)}[w.what]
    if len(loads) > 1 or not set(loads) <= set(allowed) or (
            not loads and (w.what != "run" or mix.load is None)):
        raise ScenarioError(f'{where}: what = "{w.what}" takes one of {", ".join(allowed)}; there '
                            f"is {', '.join(loads) or 'none'}")
    if w.what == "run" and (w.duration is None) == (w.num_prompts is None):
        raise ScenarioError(f"{where}: give duration or num_prompts")
    if w.what != "run" and (w.duration or w.num_prompts):
        raise ScenarioError(f"{where}: a {w.what} takes a budget, no duration and no num_prompts")
    if w.what == "run" and w.budget:
        raise ScenarioError(f"{where}: budget is of a sweep; a run takes duration or num_prompts")
    if any(o == "--" or o.split("=")[0] in ("--out", "--seed") for o in w.options):
        raise ScenarioError(f"{where}: options: leave --, --out and --seed to the campaign")


# ------------------------------------------------------------------------------------- the cells


def workloads_of(planned: Campaign, server: ServerRow) -> Iterator[Workload]:
    """Those that it gets; a row beside one that did not fit gets that one's."""
    name = server.beside or server.name
    for w in planned.workloads:
        wanted = not planned.include or any(p.fits(name, w.name) for p in planned.include)
        if wanted and not any(p.fits(name, w.name) for p in planned.exclude):
            yield w


def cells_of(planned: Campaign, server: ServerRow) -> list[Cell]:
    """All of a server's, a ladder's repeats after each other: what drifts is seen in each."""
    return [_cell(planned, server, w, load, length, repeat)
            for w in workloads_of(planned, server)
            for repeat in range(w.repeats or planned.repeats)
            for load in w.concurrency or w.rate or (None,)
            for length in w.prompt_tokens or (None,)]


def _cell(planned: Campaign, s: ServerRow, w: Workload, load: float | None,
          length: int | str | None, repeat: int) -> Cell:
    prompt_tok = longest_prompt(s, w) if length == LONGEST else length
    name = w.name + (f"-c{load:g}" if w.concurrency else f"-r{load:g}" if w.rate else "") + (
        f"-in{length}" if length is not None else "") + f"-{repeat + 1}"
    folder = f"{s.name}/{name}"
    seed = zlib.crc32(f"{planned.seed} {folder}".encode()) % 2**31  # no two cells share prompts
    assert prompt_tok is None or isinstance(prompt_tok, int)
    words = [*_load_words(w, load), *_target_words(planned, s, w),
             *([f"--prompt-tokens={prompt_tok}"] if prompt_tok else []),
             *([f"--output-tokens={w.output_tokens}"] if w.output_tokens else []),
             *([f"--slo={w.slo}"] if w.slo else []), f"--seed={seed}", *w.options]
    options = server_options(planned, s)
    return Cell(s.name, w.name, folder, tuple(words + (["--", *options] if options else [])),
                _mix(w.scenario), load, prompt_tok, repeat)


def _mix(name: str) -> str:
    mix = scenarios.load(name)
    plain = msgspec.json.encode(scenarios.to_plain(mix), order="sorted")
    return f"{mix.name}#{hashlib.sha256(plain).hexdigest()[:12]}"


def longest_prompt(s: ServerRow, w: Workload) -> int:
    """That fits with its answer into the server's context. Raises ScenarioError."""
    if s.max_model_len is None:
        raise ScenarioError(f"server {s.name}: workload {w.name} asks for the longest prompt: give "
                            "the server a max_model_len")
    return max(1, s.max_model_len - (w.output_tokens or ANSWER_TOK) - RESERVE_TOK)


def _load_words(w: Workload, load: float | None) -> list[str]:
    if w.what == "run":
        given = [] if load is None else [
            f"--concurrency={load:g}" if w.concurrency else f"--rate={load:g}"]
        much = f"--duration={w.duration}" if w.duration else f"--num-prompts={w.num_prompts}"
        return ["run", w.scenario, *given, much]
    most = (f"--max-concurrency={w.max_concurrency}" if w.max_concurrency
            else f"--max-rate={w.max_rate:g}")
    return ["sweep", w.scenario, most, *([f"--budget={w.budget}"] if w.budget else []),
            *(["--unit-step"] if w.what == "oom" else [])]


def is_simulated(planned: Campaign, s: ServerRow) -> bool:
    return s.kind == "sim" or (planned.simulate and s.kind in ("vllm", "transformers"))


def not_simulated(planned: Campaign, s: ServerRow) -> str | None:
    """Why nothing honest can be said of it without the real thing; None: something can."""
    if is_simulated(planned, s) and s.quantization and s.quantization not in SIMULATED:
        return (f"{s.quantization}: of the speed of its kernels the simulator knows nothing; it "
                f"knows {' and '.join(SIMULATED)}")
    return None


def _target_words(planned: Campaign, s: ServerRow, w: Workload) -> list[str]:
    if is_simulated(planned, s):
        return ["--server=sim"] if w.wire else ["--virtual"]
    if s.kind == "remote":
        return [f"--base-url={s.base_url}", f"--model={s.model}"]
    command = [f"--server-cmd={s.command}"] if s.command else []
    return [f"--server={s.kind}", f"--model={s.model}", *command]


def server_options(planned: Campaign, s: ServerRow) -> list[str]:
    """What follows `--`."""
    if s.kind == "remote":
        return []
    length = [f"--max-model-len={s.max_model_len}"] if s.max_model_len else []
    simulated = is_simulated(planned, s)
    if s.kind == "transformers" and not simulated:  # over all GPUs there are, as a model's file is
        return list(s.options)
    card = [f"--model={s.model}", *([f"--gpu={s.gpu}"] if s.gpu else [])] if simulated else []
    return [*card, *(["--backend=transformers"] if s.kind == "transformers" else []),
            *([f"--tensor-parallel-size={s.tensor_parallel}"] if s.tensor_parallel > 1 else []),
            *([f"--quantization={s.quantization}"] if s.quantization else []),
            *length, *s.options, *(s.sim_options if simulated else ())]
