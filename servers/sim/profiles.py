"""Cards, models and fitted constants as data (`hardware.toml`), each with its source; and profile
files that put other constants in their place (`python -m servers.sim.fit` writes them)."""

import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. `memory_gib` is what CUDA reports; `link_*` is an all-reduce with its peers."""

    name: str
    bandwidth: float  # bytes/s
    flops: float  # dense bf16 with fp32 accumulation, per second
    mfu: float  # share of it that a prefill reaches
    int_ops: float  # integer operations per second, by its data sheet
    memory_gib: float
    link_bandwidth: float  # bytes/s on the bus
    link_latency_s: float
    idle_w: float
    max_w: float
    big_batches: bool  # vLLM's larger defaults: ≥ 70 GiB and not an A100
    source: str


@dataclass(frozen=True, slots=True)
class Model:
    """A dense decoder's shape, as its config.json has it."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    params: float  # all weights; the embedding counts once where it is tied to the output layer
    tied: bool
    max_len: int
    source: str

    @property
    def body(self) -> float:
        """Weights that every token passes: all but the embedding and the output layer."""
        return self.params - self.vocab * self.hidden * (1 if self.tied else 2)


@dataclass(frozen=True, slots=True)
class Quantization:
    """Weights of the linear layers in few bits, as AWQ and GPTQ files have them."""

    name: str
    bits: int
    group: int  # weights that share a 16-bit scale and a zero point
    bandwidth_frac: float  # of what 16-bit kernels reach
    unpack_ops: float  # integer operations of the card, per multiplication
    generate_layer_s: float  # in place of Generate.layer_s
    source: str

    @property
    def weight_bytes(self) -> float:
        """Of one weight, with its part of scale and zero point."""
        return (self.bits + (16 + self.bits) / self.group) / 8


@dataclass(frozen=True, slots=True)
class Generate:
    """What a token costs in Hugging Face's `generate` besides the GPU's work."""

    layer_s: float  # of the host
    gpu_layer_s: float  # besides weights, KV and arithmetic
    kv_moves: float  # of all of a sequence's KV, per token
    source: str


@dataclass(frozen=True, slots=True)
class Constants:
    """What no data sheet says. `mfu` None: the card's own."""

    bandwidth_frac: float  # of the data sheet's, that a decode step reaches
    host_step_s: float  # schedule, build the batch, sample, hand over
    host_layer_s: float  # launches of a layer's kernels that CUDA graphs do not hide
    host_seq_s: float  # per sampled sequence
    loop_step_s: float  # the engine's loop beside the GPU: no step is shorter …
    loop_seq_s: float  # … and per sampled sequence
    front_token_s: float  # the API process's CPU: per token event …
    front_merged_s: float  # … per token that is told in another one's event …
    front_request_s: float  # … and per request …
    front_latency_s: float  # … and what a request waits besides, before the engine has it
    source: str
    mfu: float | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """A file of `--profile`: constants, and the card and model that they were fitted on."""

    gpu: str | None
    model: str | None
    constants: Constants


_HARDWARE = tomllib.loads(Path(__file__).with_name("hardware.toml").read_text(encoding="utf-8"))
CONSTANTS = Constants(**_HARDWARE["constants"])
GENERATE = Generate(**_HARDWARE["generate"])
QUANTIZATIONS = {key: Quantization(**entry) for key, entry in _HARDWARE["quantizations"].items()}
GPUS = {key: Gpu(**entry) for key, entry in _HARDWARE["gpus"].items()}
MODELS = {key: Model(**entry) for key, entry in _HARDWARE["models"].items()}


class BadProfile(ValueError):
    """A profile file that cannot be used: says where and why."""


def load(path: Path) -> Profile:
    """Raises BadProfile."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise BadProfile(f"{path}: {e}") from e
    given = raw.pop("constants", None)
    gpu, model = raw.pop("gpu", None), raw.pop("model", None)
    if not isinstance(given, dict) or raw:
        raise BadProfile(f"{path}: holds {', '.join(raw) or 'no [constants]'}; a profile has gpu, "
                         "model and a table [constants]")
    for name, value, known in (("gpu", gpu, GPUS), ("model", model, MODELS)):
        if value is not None and value not in known:
            raise BadProfile(f"{path}: {name} = {value!r}; there are: {', '.join(known)}")
    return Profile(gpu, model, _constants(path, given))


def _constants(path: Path, given: dict[str, Any]) -> Constants:
    """The shipped ones where the file says nothing; but its source must be said."""
    known = [f.name for f in fields(Constants)]
    for key, value in given.items():
        if key not in known:
            raise BadProfile(f"{path}: constants.{key} is none; there are: {', '.join(known)}")
        if key == "source":
            continue
        most = 1.0  # shares, and seconds of one step, token or request
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
            raise BadProfile(f"{path}: constants.{key} = {value!r} is no number from 0 to {most:g}")
    if not isinstance(given.get("source"), str):
        raise BadProfile(f"{path}: constants.source must say what they were measured on")
    if not given.get("bandwidth_frac", 1) or not given.get("mfu", 1):
        raise BadProfile(f"{path}: bandwidth_frac and mfu must be above 0")
    return replace(CONSTANTS, **given)


def dumps(profile: Profile, notes: dict[str, str]) -> str:
    """The file's text. `notes`: how each constant was found."""
    lines = [f'{name} = "{value}"' for name, value in (("gpu", profile.gpu),
                                                       ("model", profile.model)) if value]
    lines += ["", "[constants]"]
    for f in fields(Constants):
        value = getattr(profile.constants, f.name)
        if value is None:
            continue
        text = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' if isinstance(
            value, str) else f"{value:.6g}"
        note = notes.get(f.name)
        lines.append(f"{f.name} = {text}" + (f"  # {note}" if note else ""))
    return "\n".join(lines) + "\n"
