"""A simulated vLLM on a port: `python -m servers.sim`, with vLLM's options and exit codes."""

import argparse
import asyncio
import ctypes
import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from servers.sim import costs, faults, profiles, turns
from servers.sim.app import Server
from servers.sim.engine import EngineConfig
from servers.sim.gate import listen, open_all_descriptors
from servers.sim.log import log, log_start_failed, log_start_oom
from servers.sim.scripts import AUTO_CALL_SHARE, Habits

GPU, MODEL = "4090d", "qwen2.5-7b"
ENDINGS = {"awq": "-awq", "gptq": "-gptq-int4"}  # of the names of models that are quantised so
PR_SET_PDEATHSIG = 1
LATE_SHARE = 0.01  # of the steps late: then the log says that the schedule was not kept


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.parent_pid:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != options.parent_pid:  # gone before we asked, or never our parent
            print(f"--parent-pid {options.parent_pid} is not this process's parent "
                  f"({os.getppid()}), or is gone; nothing is served", file=sys.stderr)
            return 1
    try:
        config = engine_config(options)
    except (costs.DoesNotFit, ValueError) as e:
        log("EngineCore", "ERROR", "core.py:1512", f"EngineCore failed to start.\nValueError: {e}")
        log_start_failed()
        return 1
    if any(f.kind == "oom-start" for f in options.fault):
        log_start_oom(config.machine.gpu.memory_gib)
        return 1
    open_all_descriptors()
    return asyncio.run(serve(options, config))


async def serve(options: argparse.Namespace, config: EngineConfig) -> int:
    """Until SIGTERM, or until the engine has died; 0 in both cases, as from vLLM."""
    server = Server(turns.engine_of(config), options.served_model_name or [options.model],
                    utilization=options.gpu_memory_utilization, api_key=options.api_key,
                    faults=options.fault, speed=options.speed,
                    request_log=options.request_log, queue_limit=options.max_num_queued_reqs,
                    habits=Habits(options.invalid_json_frac, options.tool_call_frac))
    log_start(config)
    runner = server.runner()
    await runner.setup()
    try:
        await listen(runner, options.host, int(options.port))
    except OSError as e:
        print(f"cannot listen on {options.host}:{options.port}: {os.strerror(e.errno or 0)}; "
              "choose another --port, or 0 for any free one", file=sys.stderr)
        await runner.cleanup()
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, server.stopped.set)
    log("APIServer", "INFO", "entry.py:140", "Starting vLLM server (simulated) on "
        f"http://{options.host}:{runner.addresses[0][1]}")
    await server.stopped.wait()
    server.abort_all()
    await runner.cleanup()
    late = server.pacing
    if late.late_frac() > LATE_SHARE:
        log("APIServer", "WARNING", "sim", f"the simulator fell behind its schedule: "
            f"{late.late_frac():.1%} of {late.steps} steps came late, the worst by "
            f"{late.worst_s:.3f} s; this host's CPU, not the simulated GPU, was measured")
    return 0


def log_start(config: EngineConfig) -> None:
    tokens = config.num_blocks * costs.BLOCK_TOK
    bits = config.machine.quantization
    log("EngineCore", "INFO", "sim", f"SIMULATED: {config.machine.model.name} on "
        f"{config.machine.tp} x {config.machine.gpu.name}" + (f", {bits.name}" if bits else ""))
    if config.backend == "transformers":
        log("APIServer", "INFO", "app.py", "Hugging Face's generate behind a small web app: one "
            f"token of one request at a time; weights {config.machine.weights_gib:.2f} GiB")
        return
    log("EngineCore", "INFO", "kv_cache_utils.py:2327", f"GPU KV cache size: {tokens:,} tokens, "
        f"Maximum concurrency for {config.max_model_len:,} tokens per request: "
        f"{tokens / config.max_model_len:.2f}x")


# --------------------------------------------------------------------------------------- options


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m servers.sim", allow_abbrev=False,
                                description=__doc__)
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=_number(int, 0, 65535), default=8000, help="0: any free one")
    p.add_argument("--gpu", type=_one_of(costs.GPUS), default=None, help=f"default: {GPU}")
    p.add_argument("--model", type=_one_of(costs.MODELS), default=None, help=f"default: {MODEL}")
    p.add_argument("--profile", type=_profile, metavar="FILE", help="constants that were fitted on "
                   "a real server, by `python -m servers.sim.fit RUN`")
    p.add_argument("--tensor-parallel-size", "-tp", type=_number(int, 1, 64), default=1)
    p.add_argument("--gpu-memory-utilization", type=_number(float, 0.01, 1), default=0.92)
    p.add_argument("--dtype", choices=("auto", "half", "float16", "bfloat16"), default="auto",
                   help="all of two bytes: here they are one")
    p.add_argument("--backend", choices=("vllm", "transformers"), default="vllm",
                   help="transformers: Hugging Face's generate behind a small web app, with its "
                        "memory, errors and speed, in place of a vLLM")
    p.add_argument("--quantization", "-q", choices=tuple(costs.QUANTIZATIONS),
                   help="4-bit weights; default: as the model's name ends (…-AWQ, …-GPTQ-Int4)")
    p.add_argument("--max-model-len", type=_number(int, 1, 10**7))
    p.add_argument("--max-num-seqs", type=_number(int, 1, 10**5))
    p.add_argument("--max-num-batched-tokens", type=_number(int, 1, 10**6))
    p.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--stream-interval", type=_number(int, 1, 10**4), default=1)
    p.add_argument("--served-model-name", nargs="+")
    p.add_argument("--api-key")
    p.add_argument("--seed", type=_number(int, 0, 2**63), default=0)
    p.add_argument("--mean-output-tokens", type=_number(float, 1, 10**6), default=256.0,
                   help="of answers that end by themselves (no ignore_eos)")
    p.add_argument("--max-num-queued-reqs", type=_number(int, 1, 10**6),
                   help="more requests than so many, running and waiting, are refused with 503")
    p.add_argument("--invalid-json-frac", type=_number(float, 0, 1), default=0.0,
                   help="of answers that ought to be JSON of a schema, and of tools' arguments")
    p.add_argument("--tool-call-frac", type=_number(float, 0, 1), default=AUTO_CALL_SHARE,
                   help="of answers to which tools are offered (tool_choice auto)")
    p.add_argument("--fault", type=_fault, action="append", default=[], metavar="KIND@N",
                   help="oom@N, die@N, hang@N: at N running requests; oom-slack@GIB; oom-start; "
                        "warmup@S; throttle@RPS; any fault of requests, as truncate@5:0.1 (a tenth "
                        "of them); can be repeated. GET /sim/faults lists all")
    p.add_argument("--speed", type=_number(float, 0.001, 1000), default=1.0,
                   help="simulated seconds per second")
    p.add_argument("--request-log", type=Path, metavar="FILE",
                   help="when each request came and was answered, a JSON line each")
    p.add_argument("--parent-pid", type=_number(int, 1, 2**31), help="exit when it is gone")
    options, unknown = p.parse_known_args(argv)
    if options.request_log and not options.request_log.parent.is_dir():
        p.error(f"--request-log {options.request_log}: there is no such folder")
    if options.backend == "transformers" and (given := _of_vllm(options)):
        p.error(f"{given} is vLLM's: --backend transformers has no such limit")
    fitted = options.profile
    options.gpu = options.gpu or (fitted and fitted.gpu) or GPU
    options.model = options.model or (fitted and fitted.model) or MODEL
    if unknown:
        known = [o for a in p._actions for o in a.option_strings]
        p.error(f"unknown option {unknown[0]!r}{_nearest(unknown[0].split('=')[0], known)}; "
                "--help lists all")
    return options


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """Raises DoesNotFit; ValueError for sizes that vLLM refuses."""
    machine = costs.Machine(costs.GPUS[_key(options.gpu)], costs.MODELS[_key(options.model)],
                            options.tensor_parallel_size,
                            quantization=_quantization(options.model, options.quantization))
    if options.profile:
        machine = replace(machine, constants=options.profile.constants)
    batched_tok, seqs = costs.batch_defaults(machine.gpu)
    seqs = options.max_num_seqs or seqs
    batched_tok = options.max_num_batched_tokens or max(batched_tok, seqs)
    max_model_len = options.max_model_len or machine.model.max_len
    if options.backend == "transformers":
        blocks = int(turns.room_gib(machine) * costs.GIB * machine.tp
                     // (replace(machine, tp=1).kv_bytes_per_tok * costs.BLOCK_TOK))
        return EngineConfig(machine, blocks, max_model_len, prefix_caching=False,
                            mean_output_tok=options.mean_output_tokens, seed=options.seed,
                            backend="transformers")
    blocks = costs.kv_blocks(machine, options.gpu_memory_utilization, batched_tok, seqs,
                             max_model_len)
    return EngineConfig(machine, blocks, max_model_len, batched_tok, seqs,
                        options.enable_prefix_caching, options.mean_output_tokens, options.seed,
                        options.stream_interval)


def _of_vllm(options: argparse.Namespace) -> str | None:
    """An option that was given, and that Hugging Face's generate has nothing like."""
    given = {"--max-num-seqs": options.max_num_seqs, "--max-num-batched-tokens":
             options.max_num_batched_tokens, "--max-num-queued-reqs": options.max_num_queued_reqs,
             "--stream-interval": options.stream_interval > 1}
    return next((name for name, value in given.items() if value), None)


def _quantization(model: str, asked: str | None) -> profiles.Quantization | None:
    """Raises ValueError."""
    name = model.lower()
    own = next((q for q, end in ENDINGS.items() if name.endswith(end)), None)
    if own and asked and own != asked:
        raise ValueError(  # vLLM's words
            f"Quantization method specified in the model config ({own}) does not match the "
            f"quantization method specified in the `quantization` argument ({asked}).")
    found = asked or own
    return None if found is None else costs.QUANTIZATIONS[found]


def _key(name: str) -> str:
    """`Qwen/Qwen2.5-7B-Instruct-AWQ` or `RTX-4090D` as the tables have it."""
    key = name.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    for end in ENDINGS.values():
        key = key.removesuffix(end)
    key = key.removesuffix("-instruct").removesuffix("-chat")
    return key.removeprefix("rtx").lstrip("-_ ")


def _one_of(known: Iterable[str]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if _key(name) not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not simulated"
                                             f"{_nearest(_key(name), known)}; there are: "
                                             f"{', '.join(known)}")
        return name
    return check


def _number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    def check(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return value
    return check


def _profile(text: str) -> profiles.Profile:
    try:
        return profiles.load(Path(text))
    except profiles.BadProfile as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _fault(text: str) -> faults.Fault:
    try:
        return faults.parse_profile(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=2)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


if __name__ == "__main__":
    sys.exit(main())
