"""Locust users that ask LLM servers, load shapes, and a ramp to the safe concurrency. Importing
it widens Locust's command line, its page and its exit codes; nothing starts before Locust does."""

from typing import Any

from locust import events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from loadgen.fleet import options, web
from loadgen.fleet.lifecycle import Lifecycle, install
from loadgen.fleet.shapes import RampShape, ScenarioShape
from loadgen.fleet.user import LLMUser

__all__ = ["LLMUser", "RampShape", "ScenarioShape"]


@events.init_command_line_parser.add_listener
def _add_arguments(parser: LocustArgumentParser, **_: Any) -> None:
    options.add_arguments(parser, _scenario_of(LLMUser))


@events.init.add_listener
def _init(environment: Environment, **_: Any) -> None:
    lifecycle = Lifecycle(environment)
    lifecycle.init()
    install(environment, lifecycle)
    if environment.web_ui is not None:
        web.attach(environment, lifecycle)


def _scenario_of(base: type[LLMUser]) -> str:
    """The scenario that the locustfile's first user class names."""
    return next((c.scenario for c in base.__subclasses__()), base.scenario)
