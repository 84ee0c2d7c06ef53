"""What we add to Locust's command line and start form."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from locust.argument_parser import LocustArgumentParser
from msgspec import Struct

from loadgen import scenario
from loadgen.errors import ScenarioError
from loadgen.hosts.messages import MOST_SHARDS
from loadgen.hosts.seal import TOKEN
from loadgen.scenario import Scenario

OWN_TASKS = ("users with tasks of their own run in one process: what workers send is the "
             "scenario's mix. Leave the tasks out, or --master, --worker and --processes")
NO_TOKEN = ("a fleet needs a token that all its processes share: put the same secret into "
            "$LOADGEN_FLEET_TOKEN (`openssl rand -hex 16` makes one) or a --fleet-token-file")
SHOWN_KEY = "********"  # stands for a key that was given: Locust writes defaults into its page
FIELDS = ("scenario", "model", "api_key", "slo", "rate")  # of ours in the start form

_key = os.environ.get("LOADGEN_API_KEY", "")
_typed = ""  # into the form
_default = ""  # the scenario that the locustfile's users name


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
    metrics_at: str | None = None


class _Key(argparse.Action):
    """Keeps a key out of the parsed options: they are shown in the page and sent to workers."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: object, option_string: str | None = None) -> None:
        global _key  # noqa: PLW0603
        _key = str(values)
        setattr(namespace, self.dest, SHOWN_KEY)


def add_arguments(parser: LocustArgumentParser, default: str) -> None:
    """`default`: the scenario that the locustfile's users name."""
    global _default  # noqa: PLW0603
    _default = default
    words = sys.argv[1:]
    if "--worker" in words and not os.environ.get(TOKEN) and not any(
            w.startswith("--fleet-token-file") for w in words):
        parser.error(NO_TOKEN)  # it would look for its master for minutes before `init`
    parser.set_defaults(master_bind_host="127.0.0.1")  # Locust's own is all of the host's
    add = parser.add_argument  # a group's would not reach the start form
    add("--scenario", default=default, choices=_Names(names(default)), metavar="NAME",
        help="What users ask: a shipped scenario, one of ./scenarios, or a path to a .toml file")
    add("--model", default="", help="Model name to ask for. Default: the server's only one")
    add("--api-key", default=SHOWN_KEY if _key else "", action=_Key, is_secret=True,
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
    parser.add_argument("--shards", type=int, default=1, **hidden,
                        help="Generator processes of this worker; about one per core")
    parser.add_argument("--worker-folder", default=None, metavar="FOLDER", **hidden,
                        help="Where a worker keeps records until the master has them. Default: "
                        "the system's temporary folder")
    parser.add_argument("--fleet-token-file", default=None, metavar="FILE", **hidden,
                        help="Holds the secret that master and workers share. Default: "
                        "$LOADGEN_FLEET_TOKEN; with --processes one is made")
    parser.add_argument("--metrics-port", default="", metavar="[HOST:]PORT", **hidden,
                        help="While a test runs, a Prometheus endpoint /metrics on this port of "
                        "127.0.0.1, or of HOST. 0: a free one")
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


def given_scenario() -> str | None:
    """The scenario that this process's own command line names."""
    given, _ = _peek().parse_known_args(sys.argv[1:])
    return str(given.scenario) if given.scenario is not None else None


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
    if not 1 <= options.shards <= MOST_SHARDS:
        raise ScenarioError(f"--shards {options.shards}: give 1 to {MOST_SHARDS}")
    key = key_of(options)
    if any(ord(c) < 32 or ord(c) == 127 for c in key):
        raise ScenarioError("--api-key holds a line break or another control character")
    return Asked(
        scenario=mix, model=options.model.strip(), api_key=key, rate_rps=options.rate or None,
        target=options.slo_target, seed=options.plan_seed,
        out=Path(options.run_folder) if options.run_folder else None,
        server_options=options.server_options, report=not options.no_report,
        metrics_at=options.metrics_port or None)


def key_of(options: argparse.Namespace) -> str:
    return (_typed or _key) if options.api_key == SHOWN_KEY else str(options.api_key)


def apply(form: argparse.Namespace, options: argparse.Namespace) -> None:
    """Makes a checked form's fields the options. A key that was typed is kept here, and is not
    among them."""
    global _typed  # noqa: PLW0603
    _typed = key_of(form)
    vars(options).update({k: getattr(form, k) for k in FIELDS})
    options.api_key = SHOWN_KEY if _typed else ""


def of_form(form: Mapping[str, str], options: argparse.Namespace) -> argparse.Namespace:
    """The options with a start form's fields in their place. Raises ScenarioError, in words for
    the page: only what the form offers may be named there, since whoever sees the page need not
    see this host's files."""
    given: dict[str, object] = {k: form[k] for k in FIELDS if k in form}
    if given.get("scenario", options.scenario) not in {*names(_default), options.scenario}:
        raise ScenarioError(f"no scenario {given['scenario']!r} is offered")
    try:
        if "rate" in form:
            given["rate"] = float(form["rate"] or 0)
    except ValueError:
        raise ScenarioError(f"rate: {form['rate']!r} is no number") from None
    return argparse.Namespace(**{**vars(options), **given})


def differ(form: Mapping[str, str], options: argparse.Namespace) -> list[str]:
    """Our fields that a form would change."""
    asks = of_form(form, options)
    return [k for k in FIELDS if (
        key_of(asks) != key_of(options) if k == "api_key"
        else getattr(asks, k) != getattr(options, k))]
