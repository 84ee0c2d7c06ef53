"""Fits the simulator's free constants to a run of a real server, and writes a profile.

    python -m servers.sim.fit RUN --gpu h200 --model qwen2.5-7b --out h200.toml
    python -m servers.sim --profile h200.toml

RUN is a run folder of loadgen; best one of several levels, 1 and the highest among them. Its
requests are replayed on the engine in virtual time until what their clients saw is what they saw
then (a minute or two). What a run cannot tell keeps its shipped value; file and terminal say why,
and what kind of run would tell it.
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from servers.sim.costs import DoesNotFit, Machine, batch_defaults, kv_blocks
from servers.sim.engine import EngineConfig
from servers.sim.match import Match, match
from servers.sim.profiles import CONSTANTS, GPUS, MODELS, Profile, dumps
from servers.sim.seen import CannotFit, facts_of, legs_of, read

UTILIZATION = 0.9  # of the card's memory, where the run does not say how much it took
TELLS = {
    "bandwidth_frac": "a model whose weights take long to read, at 1 stream and at 64",
    "mfu": "prompts of 100 to 4,000 tokens, sent one at a time",
    "host_step_s": "levels 1 to 64 with short and with long prompts",
    "host_layer_s": "runs of several models: one has only its sum with host_step_s",
    "host_seq_s": "levels up to 256 with short prompts, on a GPU that stays ahead of the API "
                  "server",
    "loop_step_s": "a model so small that the engine's loop is slower than the GPU, at 1 stream",
    "loop_seq_s": "such a model at levels 1 to 64",
    "front_token_s": "a level at which the API server is the limit: 256 and more, a quick model",
    "front_merged_s": "a small model at 64 to 128 streams, so that events hold several tokens",
    "front_request_s": "short answers at a high level: many requests a second",
    "front_latency_s": "prompts of several lengths, sent one at a time",
}


def config_of(folder: Path, machine: Machine, batched_tok: int | None,
              seqs: int | None) -> EngineConfig:
    """The server's sizes, as the manifest has them; else vLLM's defaults for the card. Raises
    CannotFit."""
    said: dict[str, Any] = facts_of(folder).get("server") or {}
    default_tok, default_seqs = batch_defaults(machine.gpu)
    seqs = seqs or said.get("max_num_seqs") or default_seqs
    batched_tok = batched_tok or said.get("max_num_batched_tokens") or max(default_tok, seqs)
    most = said.get("max_model_len") or machine.model.max_len
    blocks = said.get("kv_cache_blocks")
    try:
        blocks = blocks or kv_blocks(machine, said.get("gpu_memory_utilization") or UTILIZATION,
                                     batched_tok, seqs, most)
        return EngineConfig(machine, blocks, most, batched_tok, seqs, prefix_caching=False)
    except (DoesNotFit, ValueError) as e:
        raise CannotFit(f"this run's model does not fit on that card: {e}") from e


def notes_of(found: Match) -> dict[str, str]:
    """How each constant was found, or why not and what would tell it."""
    notes = {"host_layer_s": f"as shipped: one model tells only its sum with host_step_s; it takes "
                             f"{TELLS['host_layer_s'].partition(':')[0]}"}
    for name, sd in found.sd.items():
        leans = " and ".join(found.leaning.get(name, ()))
        notes[name] = f"± {100 * math.expm1(2 * sd):.0f} %" + (
            f", if {leans} is as shipped" if leans else "")
    for name, why in found.doubts.items():
        notes[name] = f"as shipped: {why}; it takes {TELLS[name]}"
    return notes


def table(found: Match) -> str:
    """What the run's clients saw, and what those of a simulator see, with the fitted constants and
    with the shipped ones."""
    lines = ["level            figure        measured   fitted          shipped"]
    for figure, now, before in zip(found.figures, found.found, found.before, strict=True):
        scale, unit = (1, "") if figure.name == "tokens/event" else (1e3, " ms")
        lines.append(
            f"{figure.leg:16} {figure.name:12} {scale * figure.value:7.4g}{unit:3} "
            f"{scale * now:8.4g} {_off(now, figure.value)} {scale * before:8.4g} "
            f"{_off(before, figure.value)}")
    offs = [sorted(abs(x / f.value - 1) for f, x in zip(found.figures, xs, strict=True))
            for xs in (found.found, found.before)]
    fitted, shipped = (100 * x[len(x) // 2] for x in offs)
    return "\n".join([*lines, f"off by (median): fitted {fitted:.1f} %, shipped {shipped:.1f} %"])


def _off(value: float, measured: float) -> str:
    return f"{100 * (value / measured - 1):+6.1f} %"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m servers.sim.fit", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, metavar="RUN")
    p.add_argument("--gpu", choices=sorted(GPUS), required=True, help="that it ran on")
    p.add_argument("--model", choices=sorted(MODELS), required=True)
    p.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    p.add_argument("--max-num-batched-tokens", type=int, help="default: as the run says, or vLLM's "
                                                              "for that card")
    p.add_argument("--max-num-seqs", type=int, help="the same")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    options = p.parse_args(argv)
    machine = Machine(GPUS[options.gpu], MODELS[options.model], options.tensor_parallel_size,
                      CONSTANTS)
    began_s = time.monotonic()

    def told(line: str) -> None:
        print(f"{time.monotonic() - began_s:4.0f} s: {line}", file=sys.stderr, flush=True)

    try:
        legs = legs_of(options.run, read(options.run))
        config = config_of(options.run, machine, options.max_num_batched_tokens,
                           options.max_num_seqs)
        found = match(legs, config, told)
    except CannotFit as e:
        print(f"nothing is fitted: {e}", file=sys.stderr)
        return 1
    notes = notes_of(found)
    print(table(found), file=sys.stderr)
    for name, note in notes.items():
        print(f"{name} = {getattr(found.constants, name):.3g}: {note}", file=sys.stderr)
    constants = replace(found.constants, source=source_of(options.run))
    text = dumps(Profile(options.gpu, options.model, constants), notes)
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0


def source_of(folder: Path) -> str:
    """Which run of which server, by its manifest. Raises CannotFit."""
    said = facts_of(folder)
    server = said.get("server") or {}
    kind = "a simulated server" if server.get("simulated") else server.get("kind", "a server")
    version = said.get("versions", {}).get("vllm") or server.get("version") or ""
    return (f"fitted to {kind} {version}".strip()
            + f", run {said.get('run')} of {said.get('created')}, model {said.get('model')}")


if __name__ == "__main__":
    sys.exit(main())
