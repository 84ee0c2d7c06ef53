"""Fits the simulator's free constants to a run of a real server, and writes a profile.

    python -m servers.sim.fit RUN --gpu h200 --model qwen2.5-7b --out h200.toml
    python -m servers.sim --profile h200.toml

RUN is a run folder of loadgen; best one of several levels, 1 and the highest among them. What a run
cannot tell keeps its shipped value, and the file says so.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from servers.sim.costs import ACTIVATION_BYTES, BYTES, Machine, StepTime, batch_defaults
from servers.sim.profiles import CONSTANTS, GPUS, MODELS, Constants, Profile, dumps

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

MOST_GAPS = 200_000
MIN_N = 20  # gaps in a bin, and prompts that met an empty server
MIN_FRONT_STREAMS, MIN_FRONT_N = 32, 50  # gaps in which the front end is looked for
SLOWER = 1.15  # than the GPU's: a gap that is the front end's
OUTLIER = 0.01  # off by more, and a bin counts for less
PRIOR = 0.0005  # weight of the shipped constants, against all of the data
KEPT = "not told by this run: as shipped"


class CannotFit(Exception):
    """A folder that is no run, or tells nothing."""


class Seen(Struct, frozen=True):
    """What is read of a record."""

    leg: str
    outcome: str
    due_ns: int
    end_ns: int
    sent_ns: int | None = None
    first_ns: int | None = None
    gaps_us: list[int] = []
    prompt_tok: int | None = None
    want_prompt_tok: int | None = None
    output_tok: int | None = None


@dataclass(frozen=True)
class Decode:
    """Quiet token gaps, binned: streams, tokens in their caches, seconds of a step, how many."""

    streams: Floats
    context_tok: Floats
    gap_s: Floats
    n: Floats


def read(folder: Path) -> list[Seen]:
    """Requests of a run folder that were sent; those that were cut off were in the server, too.
    Raises CannotFit."""
    decode = msgspec.json.Decoder(Seen).decode
    found = []
    for path in sorted(folder.glob("records-*.jsonl")):
        for line in path.read_bytes().splitlines():
            if line.startswith(b'{"schema":'):
                continue
            try:
                found.append(decode(line))
            except msgspec.DecodeError:  # the torn last line of a crash
                continue
    kept = [r for r in found if r.sent_ns and (r.prompt_tok or r.outcome != "OK")]
    if not any(r.outcome == "OK" for r in kept):
        raise CannotFit(f"{folder}: holds no answered requests (records-*.jsonl)")
    return kept


# -------------------------------------------------------------------------------------- features


class _Leg:
    """How many streams of a leg decoded, and how many prompts were on their way, at any time."""

    def __init__(self, records: Sequence[Seen]) -> None:
        self.records = records
        sent = np.array([r.sent_ns or 0 for r in records], float)
        self.first = np.array([r.first_ns or r.end_ns for r in records], float)
        last = self.first + 1e3 * np.array([sum(r.gaps_us) for r in records], float)
        self.sent = sent
        self._sent, self._first, self._last = np.sort(sent), np.sort(self.first), np.sort(last)
        prompt = np.array([(r.prompt_tok or r.want_prompt_tok or 0) if r.first_ns else 0
                           for r in records], float)
        speed = np.array([(r.output_tok or 1) for r in records]) / np.maximum(last - self.first, 1)
        begun = prompt - speed * self.first  # a stream's context at t: begun + speed * t
        self._by_first = _sums(self.first, begun, speed)
        self._by_last = _sums(last, begun, speed)

    @property
    def peak(self) -> float:
        """Streams at once, at most."""
        return float(self.streams(self._first).max())

    def streams(self, t: Floats) -> Floats:
        return (np.searchsorted(self._first, t, "right")
                - np.searchsorted(self._last, t, "left")).astype(float)

    def prompts(self, t: Floats) -> Floats:
        return (np.searchsorted(self._sent, t, "right")
                - np.searchsorted(self._first, t, "right")).astype(float)

    def sent_between(self, a: Floats, b: Floats) -> Floats:
        return (np.searchsorted(self._sent, b, "right")
                - np.searchsorted(self._sent, a, "right")).astype(float)

    def context_tok(self, t: Floats) -> Floats:
        total = np.zeros_like(t)
        for sign, (at, begun, speed) in ((1, self._by_first), (-1, self._by_last)):
            i = np.searchsorted(at, t, "right")
            total += sign * (begun[i] + speed[i] * t)
        return total


def _sums(at: Floats, *values: Floats) -> tuple[Floats, ...]:
    order = np.argsort(at)
    return at[order], *(np.concatenate([[0.0], np.cumsum(v[order])]) for v in values)


def _legs(records: Sequence[Seen]) -> list[_Leg]:
    names = sorted({r.leg for r in records})
    return [_Leg([r for r in records if r.leg == name]) for name in names]


def quiet_gaps(legs: Sequence[_Leg]) -> Decode:
    """Gaps during which no prompt was on its way: each is one step of all streams."""
    rows = [row for leg in legs for row in _gaps_of(leg, MOST_GAPS // len(legs))]
    if not rows:
        raise CannotFit("no token gap without a prompt in it: the run needs a lower level")
    streams, context, gap, n = (np.array(column, float) for column in zip(*rows, strict=True))
    return Decode(streams, context, gap, n)


def _gaps_of(leg: _Leg, most: int) -> list[tuple[float, float, float, float]]:
    every = max(1, sum(len(r.gaps_us) for r in leg.records) // most)
    starts, gaps = [], []
    for r in leg.records:
        us = np.array(r.gaps_us, float)
        at = (r.first_ns or 0) + 1e3 * np.concatenate([[0.0], np.cumsum(us)])[:-1]
        starts.append(at[::every])
        gaps.append(us[::every] / 1e6)
    t, gap = np.concatenate(starts), np.concatenate(gaps)
    middle = t + gap * 0.5e9
    streams = leg.streams(middle)
    quiet = (leg.prompts(t) == 0) & (leg.sent_between(t, t + gap * 1e9) == 0) & (streams > 0)
    context = leg.context_tok(middle)
    rows = []
    for n in np.unique(streams[quiet]):
        here = quiet & (streams == n)
        if here.sum() >= MIN_N:
            rows.append((float(n), float(np.median(context[here])), float(np.median(gap[here])),
                         float(here.sum())))
    return rows


def lone_prompts(legs: Sequence[_Leg]) -> tuple[Floats, Floats]:
    """(prompt tokens, seconds from sent to first token) of those that met an empty server."""
    found: list[tuple[float, float]] = []
    for leg in legs:
        alone = (leg.streams(leg.sent) == 0) & (leg.prompts(leg.sent) == 1) & (
            leg.sent_between(leg.sent, leg.first) == 0)
        found += [(r.prompt_tok or 0, ((r.first_ns or 0) - (r.sent_ns or 0)) / 1e9)
                  for r, lone in zip(leg.records, alone, strict=True)
                  if lone and r.outcome == "OK"]
    tokens, seconds = np.array(found, float).reshape(-1, 2).T
    return tokens, seconds


# ------------------------------------------------------------------------------------- constants


def fit(records: Sequence[Seen], machine: Machine, batched_tok: int,
        source: str) -> tuple[Constants, dict[str, str]]:
    """The constants, and how each was found. Raises CannotFit."""
    legs, shipped, notes = _legs(records), machine.constants, dict[str, str]()
    front_s = _front_token(legs, machine)
    token_s = shipped.front_token_s if front_s is None else front_s
    notes["front_token_s"] = (KEPT if front_s is None else "the shortest gap per stream, where "
                              "gaps are longer than the GPU's")
    # where the front end is the limit, gaps tell nothing of the GPU, nor do those of such a leg's
    # quieter moments, which come late
    decode = quiet_gaps(legs if front_s is None else _low(legs, max(
        leg.peak for leg in legs) / 4))
    share, host_s = _decode(machine, decode)
    about = f"{int(decode.n.sum())} token gaps at {decode.streams.min():g} to " \
            f"{decode.streams.max():g} streams"
    notes |= {"bandwidth_frac": about, "host_step_s": about}
    found = replace(shipped, bandwidth_frac=share, host_step_s=host_s,
                    front_token_s=token_s, source=source)
    tokens, ttft_s = lone_prompts(legs)
    if len(tokens) < MIN_N:
        return found, notes | {"front_latency_s": KEPT}
    mfu, latency_s = _prefill(replace(machine, constants=found), tokens, ttft_s, batched_tok)
    about = f"{len(tokens)} prompts that met an empty server, of {tokens.min():g} to " \
            f"{tokens.max():g} tokens"
    notes |= {"mfu": about, "front_latency_s": about if latency_s is not None else KEPT}
    return replace(found, mfu=mfu, front_latency_s=(
        shipped.front_latency_s if latency_s is None else latency_s)), notes


def _front_token(legs: Sequence[_Leg], machine: Machine) -> float | None:
    """Seconds per token of the front end; None if it was never the limit. Where it is, a step's
    tokens are as far from the next step's as they take to be written, however fast the GPU is:
    the shortest gap per stream; and that is longer than levels below let expect of the GPU."""
    d = quiet_gaps(legs)
    of = (d.streams >= MIN_FRONT_STREAMS) & (d.n >= MIN_FRONT_N)
    if not of.any():
        return None
    each = (d.gap_s / d.streams)[of]
    front_s = float(np.median(each[each <= 1.1 * each.min()]))
    low = _low(legs, max(leg.peak for leg in legs) / 4)
    if len(low) == len(legs):
        return None
    share, host_s = _decode(machine, quiet_gaps(low))
    gpu = StepTime(replace(machine, constants=replace(
        machine.constants, bandwidth_frac=share, host_step_s=host_s)))
    at = int(np.argmin(np.where(of, d.gap_s / d.streams, np.inf)))
    n, context = int(d.streams[at]), int(d.context_tok[at])
    return front_s if d.gap_s[at] > SLOWER * gpu.of(n, n, float(context), context) else None


def _low(legs: Sequence[_Leg], most: float) -> list[_Leg]:
    """The legs with so many streams at most; the one with the fewest at least."""
    fewest = min(leg.peak for leg in legs)
    return [leg for leg in legs if leg.peak <= max(most, fewest)]


def _decode(machine: Machine, d: Decode) -> tuple[float, float]:
    """(bandwidth_frac, host_step_s): a step reads weights and caches, and costs the host something
    besides. Relative least squares, none below 0, outliers weighed down; the shipped constants as
    a weak prior. (What the host takes per stream cannot be told from its cache: as shipped.)"""
    m, c = machine.model, machine.constants
    fixed_s = (c.host_layer_s * m.layers + c.host_seq_s * d.streams
               + _links_s(machine, d.streams))
    moved_s = (BYTES * (m.body + m.hidden * m.vocab) / machine.tp
               + machine.kv_bytes_per_tok * (d.context_tok + d.streams)
               + ACTIVATION_BYTES * m.layers * m.hidden * d.streams) / machine.gpu.bandwidth
    prior = np.array([1 / c.bandwidth_frac, max(c.host_step_s, 1e-4)])
    size = np.sqrt(d.n)
    rows = np.column_stack([moved_s, np.ones_like(moved_s)]) / d.gap_s[:, None] * prior
    wanted = (d.gap_s - fixed_s) / d.gap_s
    pull = PRIOR * np.sqrt((size**2).sum()) * np.eye(2)
    weight, x = size, prior
    for _ in range(10):
        x = _nonnegative(np.vstack([rows * weight[:, None], pull]),
                         np.concatenate([wanted * weight, pull @ np.ones(2)]))
        weight = size / (1 + (np.abs(rows @ x - wanted) / OUTLIER) ** 2)
    slope, host_s = x * prior
    return float(min(1.0, 1 / max(slope, 1e-9))), float(host_s)


def _nonnegative(a: Floats, b: Floats) -> Floats:
    """Least squares; what comes out below 0 is set to 0 and the others are found anew."""
    keep = np.ones(a.shape[1], bool)
    while True:
        x = np.zeros(a.shape[1])
        x[keep] = np.linalg.lstsq(a[:, keep], b, rcond=None)[0]
        if (x >= 0).all():
            return x
        keep &= x > 0


def _prefill(machine: Machine, tokens: Floats, ttft_s: Floats,
             batched_tok: int) -> tuple[float, float | None]:
    """(mfu, front_latency_s or None where all prompts are of one length)."""
    m, c = machine.model, machine.constants
    peak = machine.tp * machine.gpu.flops
    flops_s = (2 * m.body * tokens + 2 * m.hidden * m.vocab
               + 4 * m.layers * m.heads * m.head_dim * tokens**2 / 2) / peak
    chunks = np.ceil(tokens / batched_tok)
    step_s = c.host_step_s + c.host_layer_s * m.layers
    host_s = chunks * step_s + chunks * _links_s(machine, tokens / chunks) + c.host_seq_s
    rest_s = ttft_s - host_s - c.front_request_s - c.front_token_s
    if np.ptp(flops_s) < 0.2 * flops_s.mean():
        return _share(float(np.median((rest_s - c.front_latency_s) / flops_s))), None
    slope, latency_s = 1 / 0.5, 0.0
    keep = np.ones(len(tokens), bool)
    for _ in range(5):  # without what a stall of a host made slow
        rows = np.column_stack([flops_s, np.ones_like(flops_s)])[keep] / ttft_s[keep, None]
        slope, latency_s = _nonnegative(rows, rest_s[keep] / ttft_s[keep])
        off = np.abs(rest_s - slope * flops_s - latency_s) / ttft_s
        keep = off <= max(3 * float(np.median(off)), 0.01)
    return _share(float(slope)), float(latency_s)


def _links_s(machine: Machine, tokens: Floats) -> Floats:
    """Of a step with so many tokens: what the GPUs say to each other."""
    if machine.tp == 1:
        return np.zeros_like(tokens)
    m, gpu, tp = machine.model, machine.gpu, machine.tp
    sent = 2 * (tp - 1) / tp * m.hidden * BYTES * tokens
    return 2 * m.layers * (gpu.link_latency_s + sent / gpu.link_bandwidth)


def _share(slope: float) -> float:
    return min(1.0, max(0.01, 1 / max(slope, 1e-9)))


# --------------------------------------------------------------------------------------- command


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m servers.sim.fit", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, metavar="RUN")
    p.add_argument("--gpu", choices=sorted(GPUS), required=True, help="that it ran on")
    p.add_argument("--model", choices=sorted(MODELS), required=True)
    p.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    p.add_argument("--max-num-batched-tokens", type=int, help="default: vLLM's for that card")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    options = p.parse_args(argv)
    machine = Machine(GPUS[options.gpu], MODELS[options.model], options.tensor_parallel_size,
                      CONSTANTS)
    batched_tok = options.max_num_batched_tokens or batch_defaults(machine.gpu)[0]
    try:
        constants, notes = fit(read(options.run), machine, batched_tok, source_of(options.run))
    except CannotFit as e:
        print(f"nothing is fitted: {e}", file=sys.stderr)
        return 1
    text = dumps(Profile(options.gpu, options.model, constants), notes)
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0


def source_of(folder: Path) -> str:
    """Which run of which server, by its manifest. Raises CannotFit."""
    path = folder / "manifest.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CannotFit(f"{path}: {e}") from e
    server = said.get("server") or {}
    kind = "a simulated server" if server.get("simulated") else server.get("kind", "a server")
    version = said.get("versions", {}).get("vllm") or server.get("version") or ""
    return (f"fitted to {kind} {version}".strip()
            + f", run {said.get('run')} of {said.get('created')}, model {said.get('model')}")


if __name__ == "__main__":
    sys.exit(main())
