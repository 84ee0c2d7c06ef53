"""The command line's options: what several commands share, and what their words mean."""

import importlib.util
import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
import msgspec

from loadgen import scenario
from loadgen.errors import ScenarioError
from loadgen.scenario import Closed, Load, Open, PerSecond, Scenario, Seconds, Slo, Trace
from loadgen.sources import TraceFile
from loadgen.target import HIDDEN, Trust, target_of


def duration(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Seconds | None:
    """Callback of options that take "60s"."""
    try:
        return None if value is None else Seconds.parse(value)
    except ValueError as e:
        raise click.BadParameter(str(e)) from None


def finite(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    """Callback of options that take a number: nan and inf are none."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number that can be used")
    return value


KINDS = ("sim", "vllm", "transformers")  # of servers that are started
AUTO = 0  # processes
STREAMS_EACH = 256  # that a process is given by auto: a third of what a slow core can do, or less …
STARTS_EACH_RPS = 500.0  # … and starts per second
MOST_PROCESSES = 64


def processes(_ctx: click.Context, _param: click.Parameter, value: str) -> int:
    """Callback of --processes: a number, or AUTO."""
    if value == "auto":
        return AUTO
    try:
        number = int(value)
    except ValueError:
        number = 0
    if not 1 <= number <= MOST_PROCESSES:
        raise click.BadParameter(f"{value!r}: write a number from 1 to {MOST_PROCESSES}, or auto")
    return number


def processes_of(asked: int, most: float, axis: str, base_url: str | None,
                 cores: int | None = None) -> int:
    """Generator processes for a load of up to `most` streams or starts per second. auto: what
    that needs, but of a host that runs the server as well at most half of the cores, of another
    all but one."""
    if asked != AUTO:
        return asked
    need = math.ceil(most / (STREAMS_EACH if axis == "concurrency" else STARTS_EACH_RPS))
    here = base_url is None or re.match(r"https?://(127\.|localhost\b|\[::1\])", base_url.strip())
    have = cores or _cores()
    return max(1, min(need, have // 2 if here else have - 1, MOST_PROCESSES))


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


WORDS = "loadgen.words"  # of the command line, as the manifest keeps them
LENT = "loadgen.lent"  # a server that a campaign lends to the command; else None


class Group(click.Group):
    """Cuts the words after `--` off before click reads the rest: they are the server's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[LENT], ctx.obj = ctx.obj, tuple(args[at + 1:])
        ctx.meta[WORDS] = list(args)
        return super().parse_args(ctx, args[:at])


_FILE = click.Path(exists=True, dir_okay=False, resolve_path=True)
_TLS = ("ca_cert", "insecure", "cert", "key")


def target_options(command: Any) -> Any:
    """Options that sweep and run share."""
    for option in reversed([
        click.option("--server", callback=kind, metavar="KIND", help="Server to start: sim, vllm, "
                     "transformers, or FILE.py, a kind of yours; its options follow `--`. "
                     "Default: the simulator, if no --base-url is given."),
        click.option("--virtual", is_flag=True, help="Step the simulator's engine in virtual time: "
                     "no sockets, minutes in seconds. Figures are simulated ones."),
        click.option("--server-cmd", metavar="COMMAND", help="Words that stand in for `vllm "
                     "serve`, as \"python -m vllm.entrypoints.cli.main serve\". With --server "
                     "transformers: the Python that has it, or \"transformers serve\"."),
        click.option("--start-timeout", callback=duration, metavar="45m", help="How long the "
                     "server may take to answer. Default: 30m for one that is started, 60s for "
                     "the simulator and --base-url."),
        click.option("--base-url", metavar="URL", help="An OpenAI-compatible server that runs."),
        click.option("--model", help="Model name to ask for. Default: the server's only one. With "
                     "--server vllm or transformers: the folder or name that it serves."),
        click.option("--api-key", envvar="LOADGEN_API_KEY", metavar="KEY",
                     help="Sent as a bearer token. Also $LOADGEN_API_KEY. Never written down."),
        click.option("--header", "headers", multiple=True, metavar="K=V",
                     help="Another request header; may be repeated. Never written down."),
        click.option("--proxy", metavar="URL", help="An HTTP proxy on the way to --base-url; its "
                     "user and password may stand in the URL, and are never written down."),
        click.option("--ca-cert", type=_FILE, metavar="FILE", help="Trust the authorities in this "
                     "PEM file, and no others, for an https --base-url."),
        click.option("--insecure", is_flag=True, help="Trust whoever answers at an https "
                     "--base-url."),
        click.option("--cert", type=_FILE, metavar="FILE", help="Our own certificate (PEM), for a "
                     "server that wants one; with its key, or --key FILE beside it."),
        click.option("--key", type=_FILE, metavar="FILE", help="The key of --cert."),
        click.option("--slo", "--goodput", "slos", multiple=True, metavar="NAME=LIMIT",
                     help="Limits instead of the scenario's: ttft=1s,tpot=50ms (also itl, e2e), "
                     "vLLM's ttft:1000 in ms, or a name: interactive-chat, code-completion, "
                     "document-batch, mlperf-llama2-70b …"),
        click.option("--prompt-tokens", type=click.IntRange(1, 1_000_000), metavar="N",
                     help="Prompts of so many tokens instead of the scenario's."),
        click.option("--output-tokens", type=click.IntRange(1, 1_000_000), metavar="N",
                     help="Answers of so many tokens instead of the scenario's."),
        click.option("--target", type=click.FloatRange(0.5, 0.9999), callback=finite, default=0.95,
                     show_default=True, help="Share of requests that must meet the SLO."),
        click.option("--seed", type=click.IntRange(0, 2**40), help="Same seed, same plan. "
                     "Default: a fresh one, so that no cache knows the prompts."),
        click.option("--processes", callback=processes, default="1", show_default=True,
                     metavar="N|auto", help="Generator processes; the plan is split exactly. auto: "
                     "as many as the load needs and this host's cores allow."),
        click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER",
                     help="Run folder. Default: runs/DATE-TIME-SCENARIO."),
        click.option("--gpus/--no-gpus", default=None, help="Watch this host's GPUs. Default: if "
                     "the server runs on this host (of --base-url: at 127.0.0.1)."),
        click.option("--metrics-port", metavar="[HOST:]PORT",
                     help="While the test runs, a Prometheus endpoint /metrics on this port of "
                     "127.0.0.1, or of HOST. 0: a free one."),
        click.option("--report/--no-report", default=True, show_default=True,
                     help="Write report.html and charts when the run is over."),
    ]):
        command = option(command)
    return command


def asked_for(group: click.Group, words: Sequence[str],
              commands: Sequence[str] = ("sweep",)) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The options of a command line that was given once, and the server's. Raises ScenarioError if
    they mean nothing any more."""
    try:
        with group.make_context(group.name, list(words)) as outer:
            left = [*getattr(outer, "_protected_args", ()), *outer.args]
            _, command, rest = group.resolve_command(outer, left)
            if command is None or command.name not in commands:
                raise ScenarioError(f"`loadgen {shlex.join(words)}` was no "
                                    f"{' or '.join(commands)}")
            with command.make_context(command.name, rest, parent=outer) as inner:
                return inner.params, outer.obj
    except click.ClickException as e:
        raise ScenarioError(f"the command of the run cannot be read any more: "
                            f"{e.format_message()}") from e


def hidden_in(options: dict[str, Any], server_options: Sequence[str]) -> str | None:
    """Which secrets stand there hidden; None: none."""
    if HIDDEN in str(options["api_key"]):
        return "--api-key"
    if any(HIDDEN in x for x in options["headers"]):
        return "each --header"
    if HIDDEN in str(options["proxy"]):
        return "--proxy"
    return ("the server's options after `--`" if any(HIDDEN in x for x in server_options) else None)


def server_of(options: dict[str, Any], server_options: Sequence[str], out: Path) -> Any:
    if options["virtual"]:
        from servers.sim.launch import VirtualSim  # noqa: PLC0415

        if options["base_url"] or options["server_cmd"] or options["server"] not in (
                None, "sim"):
            raise click.UsageError("--virtual is of the simulator: leave --base-url, --server and "
                                   "--server-cmd out")
        if options["metrics_port"] is not None:
            raise click.UsageError("--virtual is over before anybody could look: leave "
                                   "--metrics-port out")
        return VirtualSim(server_options)
    if options["base_url"]:
        from servers.remote import RemoteServer  # noqa: PLC0415

        if server_options or options["server"] or options["server_cmd"]:
            raise click.UsageError("--base-url names a server that runs already: neither "
                                   "--server nor options after `--` can apply to it")
        target = target_of(checked_url(options["base_url"]), options["model"] or "")
        return RemoteServer(msgspec.structs.replace(
            target, proxy=proxy_of(options["proxy"]), trust=trust_of(options)))
    if any(options[name] for name in _TLS):
        raise click.UsageError("--ca-cert, --insecure, --cert and --key go with an https "
                               "--base-url")
    if options["proxy"]:
        raise click.UsageError("--proxy goes with --base-url: a server that is started here is "
                               "asked directly")
    if launches(options):
        return launched_of(options["server"] or "vllm", options["model"], server_options,
                           out / "server.log", options["server_cmd"])
    from servers.sim.launch import SimServer  # noqa: PLC0415

    return SimServer(server_options, out / "server.log")


def checked_url(url: str) -> str:
    """The same. Raises UsageError."""
    if re.search(r"[?#]", url):
        raise click.UsageError("--base-url: give it without a query; a key belongs into "
                               "--api-key or --header, which are never written down")
    if not re.match(r"https?://[^/]", url.strip()):
        raise click.UsageError(f"--base-url {url!r}: write it with its scheme, "
                               "as http://127.0.0.1:8000")
    return url


def trust_of(options: dict[str, Any]) -> Trust:
    """Of an https address. Raises UsageError."""
    trust = Trust(*(options[name] for name in _TLS))
    if trust == Trust():
        return trust
    from loadgen.dial import context_of  # noqa: PLC0415  (asyncio waits for the command)

    if not options["base_url"].strip().startswith("https://"):
        raise click.UsageError("--ca-cert, --insecure, --cert and --key go with an https "
                               "--base-url")
    if trust.key and not trust.cert:
        raise click.UsageError("--key is the key of a --cert: give that, too")
    try:
        context_of(trust)
    except OSError as e:
        raise click.UsageError(f"--ca-cert, --cert and --key: not the PEM files that they should "
                               f"be: {e}") from None
    return trust


def kind(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Callback of what names a kind of server: one of ours, or a file with one."""
    if value is None or value in KINDS:
        return value
    if not value.endswith(".py"):
        raise click.BadParameter(f"{value!r}: one of {', '.join(KINDS)}, or FILE.py, a file with "
                                 "a class Server")
    if not Path(value).is_file():
        raise click.BadParameter(f"{value}: there is no such file")
    return value


def launched_of(kind: str, model: str | None, server_options: Sequence[str], log: Path,
                server_cmd: str | None) -> Any:
    """A server of a kind that serves a model: all but the simulator."""
    words = command_of(server_cmd)
    if kind == "vllm":
        from servers.vllm import VllmServer  # noqa: PLC0415

        return VllmServer(model, server_options, log, words)
    if kind == "transformers":
        from servers.transformers import TransformersServer  # noqa: PLC0415

        return TransformersServer(model, server_options, log, words)
    return _class_in(Path(kind))(model, server_options, log, words)


def _class_in(path: Path) -> Any:
    """The class Server of a user's file. Raises ScenarioError."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise ScenarioError(f"{path}: cannot be loaded: {type(e).__name__}: {e}") from e
    found = getattr(module, "Server", None)
    if found is None:
        raise ScenarioError(f"{path}: has no class Server; README, \"Kinds of servers\", has one")
    return found


def proxy_of(url: str | None) -> str | None:
    if url is None or re.match(r"http://[^/]+/?$", url):
        return url
    raise click.UsageError(f"--proxy {url!r}: write it as http://host:3128")


def launches(options: dict[str, Any]) -> bool:
    """Whether --model is what a server is started to serve. Raises UsageError."""
    if options["server_cmd"] and options["server"] == "sim":
        raise click.UsageError("--server-cmd starts a vLLM: leave --server sim out")
    return bool(options["server_cmd"]) or options["server"] not in (None, "sim")


def command_of(text: str | None) -> list[str]:
    """The words of --server-cmd; [] without one."""
    try:
        return shlex.split(text or "")
    except ValueError as e:
        raise click.UsageError(f"--server-cmd: {e}") from None


def headers_of(options: dict[str, Any]) -> dict[str, str]:
    headers = {}
    for pair in options["headers"]:
        key, eq, value = pair.partition("=")
        if not eq or not key.strip():
            raise click.UsageError("--header: write K=V, as --header X-Team=search")
        headers[key.strip()] = value
    for name, value in (*headers.items(), ("api key", options["api_key"] or "")):
        if re.search(r"[\x00-\x1f\x7f]", name + value):
            raise click.UsageError(f"--header and --api-key: {name!r} holds a line break or "
                                   "another control character")
    if options["api_key"]:
        headers["Authorization"] = f"Bearer {options['api_key']}"
    return headers


def slo_of(texts: Sequence[str]) -> Slo | None:
    return scenario.parse_slo(" ".join(texts)) if texts else None


def levels_of(text: str | None, most: float, axis: str) -> tuple[float, ...]:
    """Powers of two up to `most`, and `most`; a rate's ladder has seven steps up to `most`."""
    if text is None:
        if axis == "rate":
            return tuple(most / 2**k for k in range(6, -1, -1))
        return (*(float(2**k) for k in range(int(most).bit_length()) if 2**k < most), most)
    try:
        levels = tuple(sorted({float(x) for x in text.split(",")}))
    except ValueError:
        raise click.UsageError(f"--levels {text!r}: write numbers, as 1,2,4") from None
    fits = all(math.isfinite(x) and 0 < x <= most and (axis == "rate" or x == int(x))
               for x in levels)
    if not fits:
        raise click.UsageError(f"--levels {text!r}: levels go from more than 0 to {most:g}"
                               + ("" if axis == "rate" else ", in whole numbers"))
    return levels


def load_of(chosen: Scenario, options: dict[str, Any], seed: int) -> Load:
    """The load that the options ask for, else the scenario's own; of a trace what it holds."""
    given = [k for k in ("concurrency", "rate", "timestamps") if options[k] is not None]
    if len(given) > 1:
        raise click.UsageError("give one of --concurrency, --rate and --timestamps")
    gaps = [f"--{k}" for k in ("arrivals", "cv") if options[k] is not None]
    if gaps and not options["rate"]:
        raise click.UsageError(f"{' and '.join(gaps)}: of the gaps of --rate's arrivals; there is "
                               "no --rate")
    if options["concurrency"]:
        return Closed(concurrency=options["concurrency"])
    if options["rate"]:
        return _open(options)
    if options["timestamps"]:
        return _trace(options["timestamps"], options["max_inflight"])
    if chosen.load is None:
        raise click.UsageError(f"scenario {chosen.name} has no load of its own: give "
                               "--concurrency N, --rate R or --timestamps FILE")
    if isinstance(chosen.load, TraceFile):
        from loadgen import traces  # noqa: PLC0415  (numpy waits)

        return traces.trace(chosen.load, seed)
    return chosen.load


def _open(options: dict[str, Any]) -> Open:
    arrivals: Literal["constant", "poisson", "gamma"] = options["arrivals"] or (
        "poisson" if options["cv"] is None else "gamma")
    if options["cv"] is not None and arrivals != "gamma":
        raise click.UsageError(f"--cv is of --arrivals gamma; the gaps of {arrivals} ones have "
                               "their own")
    return Open(rate_rps=PerSecond(options["rate"]), arrivals=arrivals,
                cv=options["cv"] or 1.0, max_inflight=options["max_inflight"])


def _trace(path: Path, max_inflight: int) -> Trace:
    due = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ScenarioError(f"{path}: cannot be read: "
                            f"{e.strerror if isinstance(e, OSError) else e}") from e
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            due.append(float(text))
        except ValueError:
            raise ScenarioError(f"{path}:{number}: {text[:40]!r} is no number of seconds") from None
        if not 0 <= due[-1] < 1e9 or due[-1] < due[max(len(due) - 2, 0)]:
            raise ScenarioError(f"{path}:{number}: instants must be ascending, from 0 on")
    if not due:
        raise ScenarioError(f"{path}: holds no instants")
    return Trace(due_s=tuple(due), max_inflight=max_inflight)
