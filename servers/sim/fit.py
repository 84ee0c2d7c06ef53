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
from dataclasses import replace
from pathlib import Path

import numpy as np

from servers.sim.costs import ACTIVATION_BYTES, BYTES, Machine, StepTime, batch_defaults
from servers.sim.profiles import CONSTANTS, GPUS, MODELS, Constants, Profile, dumps
from servers.sim.seen import (
    CannotFit,
    Decode,
    Floats,
    Seen,
    SeenLeg,
    legs_of,
    lone_prompts,
    quiet_gaps,
    read,
)

MIN_N = 20  # prompts that met an empty server
MIN_FRONT_STREAMS, MIN_FRONT_N = 32, 50  # gaps in which the front end is looked for
SLOWER = 1.15  # than the GPU's: a gap that is the front end's
OUTLIER = 0.01  # off by more, and a bin counts for less
PRIOR = 0.0005  # weight of the shipped constants, against all of the data
KEPT = "not told by this run: as shipped"


def fit(records: Sequence[Seen], machine: Machine, batched_tok: int,
        source: str) -> tuple[Constants, dict[str, str]]:
    """The constants, and how each was found. Raises CannotFit."""
    legs, shipped, notes = legs_of(records), machine.constants, dict[str, str]()
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


def _front_token(legs: Sequence[SeenLeg], machine: Machine) -> float | None:
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


def _low(legs: Sequence[SeenLeg], most: float) -> list[SeenLeg]:
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
