"""Locust users that ask LLM servers, load shapes, and a ramp to the safe concurrency; on one
process, or one plan over many hosts (`messages` says how). Importing it widens Locust's command
line, its page and its exit codes; nothing starts before Locust does."""

import logging
import secrets
from typing import Any

from locust import events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import LocalRunner, WorkerRunner

from loadgen.errors import LoadgenError, ScenarioError
from loadgen.fleet import options, web, wire
from loadgen.fleet.lifecycle import USAGE, Lifecycle, install
from loadgen.fleet.shapes import RampShape, ScenarioShape
from loadgen.fleet.user import LLMUser
from loadgen.fleet.wide import WideLifecycle
from loadgen.fleet.worker import Worker
from loadgen.hosts import seal

__all__ = ["LLMUser", "RampShape", "ScenarioShape"]

wire.harden()
_made = secrets.token_hex(16)  # for --processes: they are forked, and all have it
log = logging.getLogger("loadgen")


@events.init_command_line_parser.add_listener
def _add_arguments(parser: LocustArgumentParser, **_: Any) -> None:
    options.add_arguments(parser, _scenario_of(LLMUser))


@events.init.add_listener
def _init(environment: Environment, **_: Any) -> None:
    if isinstance(environment.runner, WorkerRunner):
        _init_worker(environment)
        return
    lifecycle = (Lifecycle(environment) if isinstance(environment.runner, LocalRunner)
                 else WideLifecycle(environment, _token(environment)))
    lifecycle.init()
    install(environment, lifecycle)
    if environment.web_ui is not None:
        web.attach(environment, lifecycle)


def _init_worker(environment: Environment) -> None:
    worker = Worker(environment, _token(environment))
    try:
        worker.init()
    except LoadgenError as e:
        log.error("%s", e)  # noqa: TRY400  (the operator's affair: no traceback)
        raise SystemExit(USAGE) from None
    environment.events.quitting.add_listener(lambda **_: worker.quitting())
    environment.events.quit.add_listener(lambda **_: worker.exit())


def _token(environment: Environment) -> str:
    """Exits if there is none: without it nothing is executed."""
    given: Any = environment.parsed_options
    try:
        token = seal.token_of(given.fleet_token_file) or (_made if given.processes else None)
        why = None if token else options.NO_TOKEN
    except ScenarioError as e:
        token, why = None, str(e)
    if any(c.tasks != [LLMUser.ask] for c in environment.user_classes):
        why = options.OWN_TASKS
    if why is not None or token is None:
        log.error("%s", why)
        raise SystemExit(USAGE)
    return token


def _scenario_of(base: type[LLMUser]) -> str:
    """The scenario that the locustfile's first user class names."""
    return next((c.scenario for c in base.__subclasses__()), base.scenario)
