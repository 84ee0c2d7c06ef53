"""What we add to Locust's command line and start form."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from locust.argument_parser import LocustArgumentParser
from msgspec import Struct

from loadgen import scenario
from loadgen.errors import ScenarioError
from loadgen.scenario import Scenario

SHOWN_KEY = "********"  # stands for a key that was given: Locust writes defaults into its page

_key = os.environ.get("LOADGEN_API_KEY", "")


class Asked(Struct, frozen=True):
    """The options, as given. `rate_rps` is None for a closed loop."""

    scenario: Scenario
    model: str
    api_key: str
    rate_rps: float | None
    target: float
    seed: int | None
    out: Path | None
    server_options: str
    report: bool


class _Key(argparse.Action):
    """Keeps a key out of the parsed options: they are shown in the page and sent to workers."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: object, option_string: str | None = None) -> None:
        global _key  # noqa: PLW0603
        _key = str(values)
        setattr(namespace, self.dest, SHOWN_KEY)


def add_arguments(parser: LocustArgumentParser, default: str) -> None:
    """`default`: the scenario that the locustfile's users name."""
    ours = parser.add_argument_group("loadgen", "What is asked of the LLM server")
    add = ours.add_argument
    add("--scenario", default=default, choices=_Names(names(default)), metavar="NAME",
        help="What users ask: a shipped scenario, one of ./scenarios, or a path to a .toml file")
    add("--model", default="", help="Model name to ask for. Default: the server's only one")
    parser.add_argument(
        "--api-key", default=SHOWN_KEY if _key else "", action=_Key, is_secret=True,
        help="Sent as a bearer token. Also $LOADGEN_API_KEY. Never written down")
    add("--slo", default="", help="Limits instead of the scenario's: ttft=1s,tpot=50ms")
    add("--rate", type=float, default=0.0,
        help="Open loop: requests per second over all users. 0: each user sends its next request "
        "when the last has ended")
    hidden = {"include_in_web_ui": False}
    parser.add_argument("--slo-target", type=float, default=0.95, **hidden,
                        help="Share of requests that must meet the SLO")
    parser.add_argument("--plan-seed", type=int, default=None, **hidden,
                        help="Same seed, same prompts. Default: a fresh one for each test")
    parser.add_argument("--run-folder", default=None, metavar="FOLDER", **hidden,
                        help="Where records go. Default: runs/DATE-TIME-SCENARIO for each test")
    parser.add_argument("--server-options", default="", metavar="OPTIONS", **hidden,
                        help="Without --host: options of the simulator that is started, in one "
                        "word, as '--gpu h200 --model qwen2.5-7b'")
    parser.add_argument("--no-report", action="store_true", **hidden,
                        help="Do not write report.html")


class _Names(list[str]):
    """The form shows these; the command line also takes a path."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (
            isinstance(name, str) and ("/" in name or name.endswith(".toml")))


def names(default: str) -> list[str]:
    """Scenarios that the start form offers: what is at hand, and what the command line names."""
    given, _ = _peek().parse_known_args(sys.argv[1:])
    here = [*scenario.SHIPPED.glob("*.toml"), *Path("scenarios").glob("*.toml")]
    return sorted({p.stem for p in here} | {default} | ({given.scenario} - {None}))


def _peek() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--scenario", default=None)
    return parser


def asked(options: argparse.Namespace) -> Asked:
    """The options, checked. Raises ScenarioError."""
    mix = scenario.load(options.scenario)
    if options.slo:
        mix = mix.with_slo(scenario.parse_slo(options.slo))
    if not 0 <= options.rate < 1e6:
        raise ScenarioError(f"--rate {options.rate:g}: give requests per second, or 0 for none")
    if not 0.5 <= options.slo_target < 1:
        raise ScenarioError(f"--slo-target {options.slo_target:g}: give a share from 0.5 to 1")
    key = _key if options.api_key == SHOWN_KEY else options.api_key
    if any(ord(c) < 32 or ord(c) == 127 for c in key):
        raise ScenarioError("--api-key holds a line break or another control character")
    return Asked(
        scenario=mix, model=options.model.strip(), api_key=key, rate_rps=options.rate or None,
        target=options.slo_target, seed=options.plan_seed,
        out=Path(options.run_folder) if options.run_folder else None,
        server_options=options.server_options, report=not options.no_report)


def wrong(form: Iterable[tuple[str, str]], options: argparse.Namespace) -> str | None:
    """What is wrong with a start form, in words for the page. Only what the form offers may be
    named there: whoever sees the page need not see this host's files."""
    given = {k: v for k, v in form if hasattr(options, k)}
    if given.get("scenario", options.scenario) not in names(options.scenario):
        return f"no scenario {given['scenario']!r} is offered"
    try:
        rate = float(given.get("rate", options.rate))
    except ValueError:
        return f"rate: {given['rate']!r} is no number"
    try:
        asked(argparse.Namespace(**{**vars(options), **given, "rate": rate}))
    except ScenarioError as e:
        return str(e)
    return None
