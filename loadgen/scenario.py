"""Scenario files: TOML in, frozen types out. All validation happens here, before anything starts.

Quantities carry their unit in the file (`ttft = "2s"`, `rate = "20/s"`); a bare number is refused
where a unit belongs. In the types, the unit is in the field's name. Exclusive options are tagged
unions: a length has a `dist`, a load has a `mode`.
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from loadgen import datasets, expect
from loadgen.config import PerSecond as PerSecond
from loadgen.config import Seconds as Seconds
from loadgen.config import convert as convert
from loadgen.config import dec_hook as dec_hook
from loadgen.config import enc_hook as enc_hook
from loadgen.config import nearest
from loadgen.config import to_plain as to_plain
from loadgen.errors import ScenarioError
from loadgen.expect import Validator
from loadgen.presets import SLOS as PRESETS
from loadgen.sessions import MOST_TURNS, Abandon, Think, normalised
from loadgen.sources import Asked, Dataset
from loadgen.sources import TraceFile as TraceFile
from loadgen.sources import placeless as placeless

Tokens = Annotated[int, Meta(ge=1, le=1_000_000)]
Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]


class _Frozen(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all configuration: immutable, no unknown keys."""


class Fixed(_Frozen, frozen=True, tag_field="dist", tag="fixed"):
    """Always `tokens`. A bare integer in the file means the same."""

    tokens: Tokens


class Uniform(_Frozen, frozen=True, tag_field="dist", tag="uniform"):
    """Whole numbers from `min` to `max`, both included."""

    min: Tokens
    max: Tokens


class Lognormal(_Frozen, frozen=True, tag_field="dist", tag="lognormal"):
    """exp(N(ln median, sigma²)), clipped to `min` … `max`."""

    median: Tokens
    sigma: Annotated[float, Meta(gt=0, le=5)]
    min: Tokens
    max: Tokens


Length = Tokens | Fixed | Uniform | Lognormal


class Slo(_Frozen, frozen=True):
    """Limits a request must meet to be good; an absent one is not asked for."""

    ttft_s: Seconds | None = field(default=None, name="ttft")
    tpot_s: Seconds | None = field(default=None, name="tpot")
    itl_s: Seconds | None = field(default=None, name="itl")  # the request's largest event gap
    e2e_s: Seconds | None = field(default=None, name="e2e")


class Timeouts(_Frozen, frozen=True):
    """When the client gives a request up. Counted from the instant it was sent."""

    first_token_s: Seconds = field(default=Seconds(60), name="first_token")
    stall_s: Seconds = field(default=Seconds(30), name="stall")
    total_s: Seconds = field(default=Seconds(600), name="total")


class Sampling(_Frozen, frozen=True):
    """Sampling parameters, sent as they are; an absent one is left to the server."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    seed: int | None = None
    ignore_eos: bool | None = None  # vLLM: always `output_tokens` tokens
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    return_token_ids: bool | None = None  # vLLM: each event says its tokens, of which it may …
    continuous_usage_stats: bool | None = None  # … hold several; so does usage in each event


class SharedPrefix(_Frozen, frozen=True):
    """The first `tokens` of each prompt are one of `groups` common texts (a system prompt, a
    document that many ask about); what follows is unique."""

    tokens: Tokens
    groups: Count = 1


Kind = Literal["summary", "code", "json", "chat", "survey", "profile", "tools", "translation",
               "longest", "dialogue"]


class RequestClass(_Frozen, frozen=True):
    """One kind of request of the mix. Its prompts are made, `prompt_tokens` long, or those of a
    `dataset`, whose answers are as long as the file says where `output_tokens` is not given.
    `validator`: what its answers must be. `response_format`: the server is to force JSON, of the
    kind's schema where it is json_schema. `tool_choice`: of kind tools; named: the one that the
    prompt asks for. `into`: of kind translation."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,40}$")]
    kind: Kind
    prompt_tok: Length | None = field(default=None, name="prompt_tokens")
    output_tok: Length | None = field(default=None, name="output_tokens")
    dataset: Dataset | None = None
    weight: Annotated[float, Meta(ge=0, le=1e9)] = 1.0
    language: Literal["en", "zh", "mixed"] = "en"
    shared_prefix: SharedPrefix | None = None
    sampling: Sampling = Sampling()
    slo: Slo = Slo()
    timeouts: Timeouts | None = None
    validator: Validator | None = None
    response_format: Literal["json_object", "json_schema"] | None = None
    tool_choice: Literal["auto", "required", "named"] | None = None
    into: Literal["en", "zh", "fr"] | None = None
    turns: Length = 1  # requests of a session; lengths above are of what each turn adds
    think_s: Think | None = field(default=None, name="think")  # before each, after an answer
    abandon: Abandon | None = None


class Closed(_Frozen, frozen=True, tag_field="mode", tag="closed"):
    """`concurrency` slots; each sends its next request when the last one has ended."""

    concurrency: Count


class Open(_Frozen, frozen=True, tag_field="mode", tag="open"):
    """Arrivals at planned instants, whatever the server does. `cv` is the coefficient of variation
    of gamma gaps (Poisson has 1); what would exceed `max_inflight` is DROPPED, never queued."""

    rate_rps: PerSecond = field(name="rate")
    arrivals: Literal["constant", "poisson", "gamma"] = "poisson"
    cv: Annotated[float, Meta(gt=0, le=20)] = 1.0
    max_inflight: Count = 4096


class Trace(_Frozen, frozen=True, tag_field="mode", tag="trace"):
    """Arrivals at given instants: `due`, seconds from the start, ascending. `asked`: the lengths
    of each, where it is of a recorded trace; else its class draws them."""

    due_s: tuple[Annotated[float, Meta(ge=0, le=1e9)], ...] = field(name="due")
    max_inflight: Count = 4096
    asked: tuple[Asked, ...] = ()


Load = Closed | Open | Trace


class Steps(_Frozen, frozen=True, tag_field="kind", tag="steps"):
    """So many Locust users one after the other, each number held for `hold`."""

    users: Annotated[tuple[Count, ...], Meta(min_length=1)]
    hold_s: Seconds = field(name="hold")


class Spike(_Frozen, frozen=True, tag_field="kind", tag="spike"):
    """`base` users, then `peak` for `spike`, then `base` again; `base` is held for `hold` before
    and after."""

    base: Count
    peak: Count
    spike_s: Seconds = field(name="spike")
    hold_s: Seconds = field(name="hold")


class Soak(_Frozen, frozen=True, tag_field="kind", tag="soak"):
    """The same number of users for long."""

    users: Count
    hold_s: Seconds = field(name="hold")


class Ramp(_Frozen, frozen=True, tag_field="kind", tag="ramp"):
    """1, 2, 4 … `to` users until errors, a death or the SLO stop it; then the largest level that
    looked safe is confirmed, all within `budget`."""

    to: Count
    budget_s: Seconds = field(name="budget")


Shape = Steps | Spike | Soak | Ramp


class Scenario(_Frozen, frozen=True):
    """A mix of request classes with their SLOs. Immutable; `load()` has checked all of it."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,60}$")]
    classes: Annotated[tuple[RequestClass, ...], Meta(min_length=1)]
    description: str = ""
    endpoint: Literal["chat", "completions"] = "chat"
    slo: Slo = Slo()
    timeouts: Timeouts = Timeouts()
    throttle_status: tuple[Annotated[int, Meta(ge=400, le=599)], ...] = ()
    load: Load | TraceFile | None = None
    shape: Shape | None = None  # of a test by Locust
    duration_s: Seconds | None = field(default=None, name="duration")

    @property
    def thinks(self) -> bool:
        """Slots of a closed loop rest by plan."""
        return any(c.think_s is not None for c in self.classes)

    @property
    def judges_answers(self) -> bool:
        """Of some class, an answer that is not valid is a miss."""
        return any(c.validator is not None and c.validator.counts for c in self.classes)

    def slo_of(self, cls: str) -> Slo:
        """The class's own limits over the scenario's."""
        return merge_slo(self.slo, self.of(cls).slo)

    def timeouts_of(self, cls: str) -> Timeouts:
        return self.of(cls).timeouts or self.timeouts

    def of(self, cls: str) -> RequestClass:
        return next(c for c in self.classes if c.name == cls)

    def greedy(self) -> "Scenario":
        """The same mix at temperature 0: the likeliest answer each time."""
        return msgspec.structs.replace(self, classes=tuple(
            msgspec.structs.replace(c, sampling=msgspec.structs.replace(
                c.sampling, temperature=0.0, top_p=None)) for c in self.classes))

    def with_slo(self, override: Slo) -> "Scenario":
        """The same mix judged by other limits: `override` wins over file and class."""
        classes = tuple(msgspec.structs.replace(c, slo=merge_slo(c.slo, override))
                        for c in self.classes)
        return msgspec.structs.replace(self, slo=merge_slo(self.slo, override), classes=classes)

    def with_lengths(self, prompt_tok: int | None, output_tok: int | None) -> "Scenario":
        """The same mix with other lengths in all classes; None leaves them. Raises ScenarioError.
        """
        change = {**({"prompt_tok": prompt_tok} if prompt_tok else {}),
                  **({"output_tok": output_tok} if output_tok else {})}
        for c in self.classes:
            if prompt_tok and c.shared_prefix and c.shared_prefix.tokens >= prompt_tok:
                raise ScenarioError(f"prompts of {prompt_tok} tokens: class {c.name} has a shared "
                                    f"prefix of {c.shared_prefix.tokens}; ask for more than that")
        return msgspec.structs.replace(self, classes=tuple(
            msgspec.structs.replace(c, **change) for c in self.classes))


def merge_slo(base: Slo, over: Slo) -> Slo:
    return Slo(ttft_s=over.ttft_s or base.ttft_s, tpot_s=over.tpot_s or base.tpot_s,
               itl_s=over.itl_s or base.itl_s, e2e_s=over.e2e_s or base.e2e_s)


# -------------------------------------------------------------------------------------- loading


def find(name: str) -> Path:
    """The file meant by `name`: a path if it holds "/" or ends in ".toml", else NAME.toml in
    ./scenarios, else among the shipped ones. Raises ScenarioError."""
    if "/" in name or name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ScenarioError(f"{name}: no such scenario file; a shipped one is named without "
                                "folder and ending, as mixed")
        return path
    for folder in (Path("scenarios"), SHIPPED):
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    known = sorted(p.stem for p in SHIPPED.glob("*.toml"))
    raise ScenarioError(f"no scenario {name!r}{nearest(name, known)}; shipped are: "
                        f"{', '.join(known)} (or give a path to a .toml file)")


SHIPPED = Path(__file__).resolve().parent.parent / "scenarios"


def load(name: str) -> Scenario:
    """The scenario of a file or a shipped name, wholly checked. Raises ScenarioError."""
    path = find(name)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ScenarioError(f"{path}: cannot be read: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ScenarioError(f"{path}: not valid TOML: {e}") from e
    raw.setdefault("name", re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem)[:60])
    return _with_files(parse(raw, where=str(path)), path)


def _with_files(scenario: Scenario, path: Path) -> Scenario:
    """The same with its files' full paths, and what is in the datasets. Raises ScenarioError."""
    classes = tuple(c if c.dataset is None else msgspec.structs.replace(c, dataset=datasets.filled(
        c.dataset, _place(path, c.dataset.path))) for c in scenario.classes)
    for c in classes:
        if c.dataset is not None and c.output_tok is None:
            datasets.check_lengths(c.dataset, f"{path}: class {c.name}")
    load = scenario.load
    if isinstance(load, TraceFile):
        place = _place(path, load.path)
        _, sha256 = datasets.content_of(place)
        datasets.check_hash(place, load.sha256, sha256)
        load = msgspec.structs.replace(load, path=place, sha256=sha256)
    return msgspec.structs.replace(scenario, classes=classes, load=load)


def _place(path: Path, named: str) -> str:
    """Where a file is that a scenario's file names; a shipped one also for a scenario that began as
    a copy of a shipped one."""
    here = (path.parent / named).resolve()
    return str(here if here.exists() or not (SHIPPED / named).exists() else SHIPPED / named)


def parse(raw: object, where: str) -> Scenario:
    """A checked Scenario of plain data (a TOML file's, a manifest's)."""
    scenario = convert(_named_slos(_named_replay(raw), where), Scenario, where)
    names = [c.name for c in scenario.classes]
    if len(set(names)) < len(names):
        raise ScenarioError(f"{where}: classes: two of them have one name ({', '.join(names)}); "
                            "rename one")
    if sum(c.weight for c in scenario.classes) <= 0:
        raise ScenarioError(f"{where}: classes: the weights sum to nothing; give at least one "
                            "class a weight above 0")
    for c in scenario.classes:
        _check_prompts(scenario, c, f"{where}: class {c.name}")
        for key, length in (("prompt_tokens", c.prompt_tok), ("output_tokens", c.output_tok),
                            ("turns", c.turns)):
            if isinstance(length, Uniform | Lognormal) and length.min > length.max:
                raise ScenarioError(f"{where}: class {c.name}: {key}: min {length.min} is more "
                                    f"than max {length.max}; exchange them")
            if isinstance(length, Lognormal) and not length.min <= length.median <= length.max:
                raise ScenarioError(f"{where}: class {c.name}: {key}: median {length.median} is "
                                    f"not between min {length.min} and max {length.max}")
        _check_turns(c, f"{where}: class {c.name}")
        _check_kind(c, scenario.endpoint, f"{where}: class {c.name}")
        if c.shared_prefix and c.prompt_tok and c.shared_prefix.tokens >= longest(c.prompt_tok):
            raise ScenarioError(f"{where}: class {c.name}: shared_prefix of "
                                f"{c.shared_prefix.tokens} tokens leaves nothing of the prompt; "
                                f"give it less than {longest(c.prompt_tok)}")
    if isinstance(scenario.load, Trace):
        due_s = list(scenario.load.due_s)
        if not due_s or due_s != sorted(due_s):
            raise ScenarioError(f"{where}: load.due: instants must be ascending, and at least one")
        if len(scenario.load.asked) not in (0, len(due_s)):
            raise ScenarioError(f"{where}: load.asked: {len(scenario.load.asked)} requests for "
                                f"{len(due_s)} instants; a trace's file gives both")
    return scenario


def _named_replay(raw: object) -> object:
    """The same; a load of mode "trace" that names a file is a replay's."""
    load = raw.get("load") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(load, dict) or load.get("mode") != "trace" or (
            not {"format", "path"} & load.keys()):
        return raw
    return {**raw, "load": {**load, "mode": "replay"}}


def _check_prompts(scenario: Scenario, c: RequestClass, where: str) -> None:
    """Lengths are given once: by the class, its dataset or the trace. Raises ScenarioError."""
    if c.dataset is None:
        for key, length in (("prompt_tokens", c.prompt_tok), ("output_tokens", c.output_tok)):
            if length is None:
                raise ScenarioError(f"{where}: {key} is missing: say how long they are to be, as "
                                    f"{key} = 512, or give the class a dataset")
        if c.shared_prefix and isinstance(scenario.load, TraceFile):
            raise ScenarioError(f"{where}: shared_prefix: what the prompts of a trace share, its "
                                "file says; leave this out")
        return
    for key, given in (("prompt_tokens", c.prompt_tok), ("shared_prefix", c.shared_prefix)):
        if given is not None:
            raise ScenarioError(f"{where}: {key}: the prompts are those of the dataset; leave one "
                                "of the two out")
    if isinstance(scenario.load, TraceFile):
        raise ScenarioError(f"{where}: dataset: a trace says how long prompts are, a dataset what "
                            "they are; leave one of the two out")
    if longest(c.turns) > 1 or c.kind == "dialogue":
        raise ScenarioError(f"{where}: turns: those of a dataset are its own; leave this out")
    if isinstance(c.validator, expect.Facts | expect.Recall | expect.Tool):
        raise ScenarioError(f"{where}: validator: it knows what made prompts ask for, not those of "
                            "a dataset; leave one of the two out")


def _check_turns(c: RequestClass, where: str) -> None:
    if longest(c.turns) > MOST_TURNS:
        raise ScenarioError(f"{where}: turns: a session has at most {MOST_TURNS}, not "
                            f"{longest(c.turns)}")
    if c.kind == "dialogue" and shortest(c.turns) < 2:
        raise ScenarioError(f"{where}: kind dialogue tells facts and asks for them later: it needs "
                            "2 turns or more, as turns = 5")


def _check_kind(c: RequestClass, endpoint: str, where: str) -> None:
    """What a kind cannot do without, or is the only one to have. Raises ScenarioError."""
    check, kind = c.validator, c.kind
    if (c.into is not None) != (kind == "translation"):
        raise ScenarioError(f"{where}: kind translation needs into = \"en\", \"zh\" or \"fr\", and "
                            "no other kind has it")
    if c.into is not None and c.into == c.language:
        raise ScenarioError(f"{where}: into = {c.into!r} is the language that it is in already")
    if kind == "translation" and c.language == "mixed":
        raise ScenarioError(f"{where}: kind translation is from one language: en or zh")
    if c.tool_choice is not None and kind != "tools":
        raise ScenarioError(f"{where}: tool_choice is of kind tools, this is {kind}")
    if kind == "tools" and endpoint != "chat":
        raise ScenarioError(f"{where}: tools are called over endpoint = \"chat\" only")
    if c.response_format == "json_schema" and kind not in ("json", "profile"):
        raise ScenarioError(f"{where}: only kinds json and profile have a schema; write "
                            "response_format = \"json_object\"")
    for needs, kinds in ((expect.Tool, ("tools",)), (expect.Translation, ("translation",)),
                         (expect.Facts, ("summary", "survey")), (expect.Recall, ("dialogue",))):
        if isinstance(check, needs) and kind not in kinds:
            raise ScenarioError(f"{where}: this validator is for kind {' or '.join(kinds)}, "
                                f"this is {kind}")
    if isinstance(check, expect.Json) and check.schema is None and kind not in (
            "json", "profile"):
        raise ScenarioError(f"{where}: kind {kind} has no schema of its own; give the validator "
                            "one: schema = { type = \"object\", … }")


def _named_slos(raw: object, where: str) -> object:
    """The same with limits in the place of their name, of the scenario and of its classes."""
    if not isinstance(raw, dict):
        return raw
    found = dict(raw)
    if isinstance(found.get("slo"), str):
        found["slo"] = _preset(found["slo"], f"{where}: slo")
    if isinstance(found.get("classes"), list):
        found["classes"] = [_named_slos(normalised(c), where) for c in found["classes"]]
    return found


def _preset(name: str, where: str) -> dict[str, str]:
    """The limits of that name. Raises ScenarioError."""
    if name not in PRESETS:
        raise ScenarioError(f"{where}: no limits are named {name!r}{nearest(name, [*PRESETS])}; "
                            f"known are {', '.join(PRESETS)}")
    return PRESETS[name]


def longest(length: Length) -> int:
    if isinstance(length, int):
        return length
    return length.tokens if isinstance(length, Fixed) else length.max


def shortest(length: Length) -> int:
    if isinstance(length, int):
        return length
    return length.tokens if isinstance(length, Fixed) else length.min


def parse_slo(text: str) -> Slo:
    """`ttft=1s,tpot=50ms`, or vLLM's `ttft:1000` (milliseconds), or a preset's name, as an Slo; of
    several the last wins where they say the same."""
    raw: dict[str, str] = {}
    for part in re.split(r"[,\s]+", text.strip()):
        if re.fullmatch(r"[a-z][a-z0-9.-]*-[a-z0-9.-]*", part):
            raw.update(_preset(part, "--slo"))
            continue
        key, eq, value = part.partition("=")
        if not eq:
            key, colon, value = part.partition(":")
            if colon and not re.fullmatch(r"\d+(\.\d+)?", value):
                raise ScenarioError(f"--slo {part!r}: vLLM's form is a number of milliseconds, as "
                                    "ttft:1000; one with its unit is ttft=1s")
            value = f"{value}ms" if colon else value
        if not value:
            raise ScenarioError(f"--slo {part!r}: write NAME=LIMIT as ttft=1s, or vLLM's form "
                                "ttft:1000 in milliseconds")
        raw[{"e2el": "e2e"}.get(key, key)] = value
    return convert(raw, Slo, "--slo")
