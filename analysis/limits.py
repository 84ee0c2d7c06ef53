"""Which constraint binds: why the server (or the generator) did no more at a level, by what was
recorded there, and the flag to change. Nothing is named without evidence of it.

The level is a search's first unsafe one, else the most loaded. Rules are asked in order, the
surest first; the names of flags are a vLLM's.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from analysis.ceiling import Ceiling, rounded
from analysis.frame import Run
from analysis.steps import duration, percent
from loadgen.evidence import OF_LEVEL
from loadgen.judge import KV_FULL, KV_FULL_FRAC, PREEMPTED_FRAC, Judgement, ServerSigns
from loadgen.leg import Window
from loadgen.validity import Finding

Kind = Literal["client", "turned away", "KV cache", "max_num_seqs", "front end", "queue", "compute"]

CLIENT = frozenset({"generator-cpu", "slots-empty", "achieved-rate", "read-behind",
                    "beyond-calibration"})  # the generator's limit even where it is but SUSPECT
OWN = CLIENT | {"late-starts", "run-queue", "dropped", "loop-lag", "generator-failed"}
WAITING = 1.0  # requests in the mean: more than a batch that is made up
QUEUED_FRAC = 0.1  # of those that run: so many wait, and it is no batch that is made up
TURNED_AWAY = 0.05  # of the requests: what the server refused is the load that it did not take
AT_MOST = 0.8  # of samples show the very same largest number: a limit, not chance
BUSY = 0.9  # of the time, or of a core: the rest is what sampling loses
MISSING = 0.25  # of what is in flight is in no engine: it is before it, or after
GROWN = 1.25  # steps take so much longer than at the lowest level


class Binding(Struct, frozen=True):
    """At level `value` it is `kind` that binds (None: not identified); `says` is the evidence, or
    why there is none; `change` the flag, or what else helps."""

    value: float | None
    kind: Kind | None
    says: str
    change: str = ""


class Seen(Struct, frozen=True):
    """What was recorded at a level. None: nobody told."""

    j: Judgement
    signs: ServerSigns
    facts: Mapping[str, Any]
    ceiling: Ceiling
    running_max: float | None
    at_most_frac: float  # of the samples in which as many ran as ever did
    util_frac: float | None
    front_cores: float | None  # of the busiest process that answers HTTP
    prompt_tok: float  # mean
    least: Judgement  # the lowest level

    @property
    def waiting(self) -> float:
        return self.signs.waiting_mean or 0.0

    @property
    def max_num_seqs(self) -> int | None:
        told = self.facts.get("max_num_seqs")
        return told * int(self.facts.get("data_parallel") or 1) if isinstance(told, int) else None

    @property
    def kv(self) -> str:
        return f"the KV cache is at most {percent(self.signs.kv_max)} full"


def of(run: Run, ceiling: Ceiling) -> Binding:
    i = _leg(run)
    if i is None:
        return Binding(None, None, "no level was measured")
    j = run.judgements[i]
    if j.died:
        return Binding(j.value, None, "the server died before it showed what it lacked")
    seen = _seen(run, i, ceiling)
    found = next((b for rule in RULES if (b := rule(seen)) is not None), None)
    return found or Binding(j.value, None, _nothing(seen))


def says(binding: Binding) -> str:
    """One sentence, or two."""
    if binding.value is None:
        return f"What binds is not identified: {binding.says}."
    if binding.kind is None:
        return f"What binds at {binding.value:g} is not identified: {binding.says}."
    change = f" To change it: {binding.change}." if binding.change else ""
    return f"What binds at {binding.value:g}: {NAMES[binding.kind]}: {binding.says}.{change}"


NAMES: dict[Kind, str] = {
    "client": "the load generator", "turned away": "a limit on requests", "KV cache": "KV cache",
    "max_num_seqs": "--max-num-seqs", "front end": "the front end",
    "queue": "prompts wait to be computed", "compute": "compute, the GPU itself"}


# ---------------------------------------------------------------------------------------- evidence


def _leg(run: Run) -> int | None:
    """The leg that tells most of the level in question."""
    told = [i for i, j in enumerate(run.judgements)
            if j.phase in OF_LEVEL | {"run"} and (j.n or j.died or j.findings)]
    if not told:
        return None
    value = None if run.is_run else run.conclusion.unsafe
    if run.is_run:
        value = min((run.judgements[i].value for i in told if run.judgements[i].load == "UNSAFE"),
                    default=None)
    if value is None:
        value = max(run.judgements[i].value for i in told)
    here = [i for i in told if run.judgements[i].value == value]

    def weight(i: int) -> tuple[bool, bool, int]:
        j = run.judgements[i]
        return j.died, j.load == "UNSAFE", j.n
    return max(here, key=weight, default=None)


def _seen(run: Run, i: int, ceiling: Ceiling) -> Seen:
    (leg, window), j = run.legs[i], run.judgements[i]
    running = _inside(run, "server", "running", window)
    cores = _inside(run, "process", "front_cores", window)
    real = run.simulated and not run.manifest.server.get("virtual_time")
    prompts = run.sample(leg.id)["prompt_tok"].dropna()
    most = max(running, default=None)
    usable = [x for x in run.judgements if x.n and x.measurement != "INVALID" and x.tpot_p50_s]
    return Seen(
        j, run.signs[i], run.manifest.server, ceiling, most,
        sum(x == most for x in running) / len(running) if running else 0.0,
        run.gpus[i].util_frac,
        # a simulator on sockets is one process for all, and its CPU is not that of a front end
        None if real or not cores else sum(cores) / len(cores),
        float(prompts.mean()) if len(prompts) else 0.0,
        min(usable, key=lambda x: (x.value, -x.n), default=j))


def _inside(run: Run, source: str, name: str, window: Window) -> list[float]:
    return [v for t, v in run.telemetry.get(source, {}).get(name, ())
            if window.from_ns <= t <= window.to_ns]


# ------------------------------------------------------------------------------------------- rules


def _client(s: Seen) -> Binding | None:
    """By the rules of `validity`: each says so itself, with its remedy."""
    found: list[Finding] = [f for f in s.j.findings if f.rule in CLIENT or (
        f.rule in OWN and f.verdict == "INVALID")]
    if not found:
        return None
    f = min(found, key=lambda x: x.verdict != "INVALID")
    return Binding(s.j.value, "client", f.says, f.remedy)


def _turned_away(s: Seen) -> Binding | None:
    n = Counter(s.j.outcomes)["THROTTLED"]
    if n <= TURNED_AWAY * max(s.j.n, 1):
        return None
    return Binding(s.j.value, "turned away", f"{n} of {s.j.n} requests were refused as too many",
                   "--max-num-queued-reqs of the server, or the rate limit of what is before it")


def _kv(s: Seen) -> Binding | None:
    preempted = s.signs.preemptions or 0.0
    thrash = preempted > PREEMPTED_FRAC * max(s.j.n, 1)
    full = (s.signs.kv_full_frac or 0.0) > KV_FULL_FRAC
    # the next prompt waits for as much as it needs, so that the cache is never quite full
    tok = s.ceiling.kv_cache_tok
    near = 1 - max(1 - KV_FULL, s.prompt_tok / tok if tok else 0.0)
    held = s.waiting > WAITING and (s.signs.kv_max or 0.0) >= near and not _is_at_seqs(s)
    if not (thrash or full or held):
        return None
    told = [f"it is up to {percent(s.signs.kv_max)} full"] if s.signs.kv_max is not None else []
    told += [f"{preempted:.0f} requests were preempted"] if preempted else []
    told += [f"{s.waiting:.3g} wait"] if s.waiting > WAITING else []
    now = s.facts.get("gpu_memory_utilization")
    ways = ["--gpu-memory-utilization" + (f" above {now:g}" if isinstance(now, float) else "")]
    if "fp8" not in str(s.facts.get("kv_cache_dtype", "")):
        ways.append("--kv-cache-dtype fp8 (half the bytes per token)")
    ways.append("more GPUs (--tensor-parallel-size)")
    return Binding(s.j.value, "KV cache", _and(told), _or(ways))


def _is_at_seqs(s: Seen) -> bool:
    return (s.max_num_seqs is not None and s.running_max is not None
            and s.running_max >= s.max_num_seqs)


def _seqs(s: Seen) -> Binding | None:
    """As many run as may, and others wait. Where the limit is not known it shows as a number that
    is hardly ever less."""
    inferred = s.max_num_seqs is None and s.at_most_frac >= AT_MOST
    if s.waiting <= WAITING or s.running_max is None or not (_is_at_seqs(s) or inferred):
        return None
    told = (f"{s.running_max:g} run, as many as it allows" if not inferred else
            f"never more than {s.running_max:g} run (the server did not say its limit)")
    room = ("" if s.ceiling.requests is None else
            f" (the KV cache holds about {rounded(s.ceiling.requests)})")
    return Binding(s.j.value, "max_num_seqs", f"{told}, {s.waiting:.3g} wait, and {s.kv}",
                   f"--max-num-seqs above {s.running_max:g}{room}")


def _front(s: Seen) -> Binding | None:
    """One process takes requests in and writes tokens out. It is busy where the GPU is not, or
    where what is in flight is not in the engine."""
    if s.facts.get("kind") not in ("vllm", "sim") or (s.front_cores or 0.0) < BUSY:
        return None
    told = [f"the API server process uses {s.front_cores:.2f} of a core"]
    if s.util_frac is not None and s.util_frac < BUSY:
        told.append(f"the GPU is busy only {percent(s.util_frac)}")
    if (_missing(s) or 0.0) >= MISSING:
        told.append(f"of {s.j.balance.inflight_mean:.3g} requests in flight only "
                    f"{(s.signs.running_mean or 0) + s.waiting:.3g} are in the engine")
    return Binding(s.j.value, "front end", _and(told), "--api-server-count 2 or more") if (
        len(told) > 1) else None


def _missing(s: Seen) -> float | None:
    """The share of what is in flight that is in no engine."""
    there, running = s.j.balance.inflight_mean, s.signs.running_mean
    return None if not there or running is None else max(0.0, 1 - (running + s.waiting) / there)


def _queue(s: Seen) -> Binding | None:
    """KV cache and sequences have room, and yet requests wait: a step's tokens are used up."""
    if s.waiting <= max(WAITING, QUEUED_FRAC * (s.signs.running_mean or 0.0)) or (
            s.signs.kv_max is None or s.max_num_seqs is None):
        return None
    now = s.facts.get("max_num_batched_tokens")
    above = f" above {now}" if isinstance(now, int) else ""
    return Binding(
        s.j.value, "queue", f"{s.waiting:.3g} wait where {s.signs.running_mean or 0:.3g} run of "
        f"{s.max_num_seqs} that may, and {s.kv}",
        f"--max-num-batched-tokens{above} (prompts wait less, and each step takes longer), or more "
        "GPUs (--tensor-parallel-size, --data-parallel-size)")


def _compute(s: Seen) -> Binding | None:
    elsewhere = (_missing(s) or 0.0) >= MISSING  # then it is not the engine that is slow
    if (s.util_frac or 0.0) < BUSY or _growth(s) < GROWN or elsewhere:
        return None
    return Binding(s.j.value, "compute", f"the GPU is busy {percent(s.util_frac)}, and {_steps(s)}",
                   "more GPUs (--tensor-parallel-size, --data-parallel-size), or smaller weights "
                   "(--quantization fp8)")


RULES: Sequence[Callable[[Seen], Binding | None]] = (
    _client, _turned_away, _kv, _seqs, _front, _queue, _compute)


def _growth(s: Seen) -> float:
    now, least = s.j.tpot_p50_s, s.least.tpot_p50_s
    return now / least if now and least and s.j.value > s.least.value else 1.0


def _steps(s: Seen) -> str:
    return (f"a token takes {duration(s.j.tpot_p50_s)} where it took "
            f"{duration(s.least.tpot_p50_s)} at {s.least.value:g}")


def _nothing(s: Seen) -> str:
    """Why no rule fires: what was seen, and who was not asked."""
    if s.signs.running_mean is None and s.util_frac is None:
        return "the server told nothing of itself (no /metrics, and its GPU was not watched)"
    missing, front = _missing(s), s.front_cores
    if missing is not None and missing >= MISSING and front is None:
        return (f"of {s.j.balance.inflight_mean:.3g} in flight only "
                f"{(s.signs.running_mean or 0) + s.waiting:.3g} were in the engine; the others "
                "were in its API server, a proxy or the network, which were not watched")
    told = [s.kv] if s.signs.kv_max is not None else []
    if s.signs.waiting_mean is not None:
        told.append("none waits" if s.waiting <= WAITING else f"{s.waiting:.3g} wait")
    told += [_steps(s)] if _growth(s) >= GROWN else []
    told.append("the GPU was not watched" if s.util_frac is None else
                f"the GPU is busy {percent(s.util_frac)}")
    return _and(told)


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _or(parts: Sequence[str]) -> str:
    return " or ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
