"""The start form of Locust's page: what is wrong with it is said in the form, and a test starts
only when its server has answered."""

import argparse
from typing import Any

from flask import Response, g, request
from flask.typing import ResponseReturnValue
from locust.env import Environment
from locust.runners import STATE_INIT, STATE_STOPPED

from loadgen.errors import LoadgenError, ScenarioError
from loadgen.fleet import options
from loadgen.fleet.lifecycle import Lifecycle

PATIENCE_S = 15.0  # somebody is looking at the form


def is_sent() -> bool:
    """This request sends the form."""
    return request.endpoint == "locust.swarm" and request.method == "POST"


class Form:
    """The start form, before Locust's own view sees it."""

    def __init__(self, environment: Environment, lifecycle: Lifecycle) -> None:
        self._environment, self._lifecycle = environment, lifecycle

    def check(self) -> ResponseReturnValue | None:
        """None, with everything ready for the test; or what is wrong, as Locust's view says it."""
        form: dict[str, str] = request.form.to_dict()
        if self._lifecycle.starting:
            return self._wrong("a test is being made ready already")
        runner = self._environment.runner
        assert runner is not None
        self._lifecycle.starting = True
        try:
            if runner.state in (STATE_INIT, STATE_STOPPED):
                g.asked = options.of_form(form, self._options)
                host = form.get("host", "").replace("<", "").replace(">", "")  # as Locust does
                self._lifecycle.prepare(g.asked, host, PATIENCE_S)
            elif changed := options.differ(form, self._options):
                raise ScenarioError(f"{', '.join(changed)}: stop the test to change that")
        except LoadgenError as e:
            return self._wrong(str(e))
        finally:
            self._lifecycle.starting = False
        # a typed key must not come among Locust's options, nor half of a form that it refuses
        rest = [(k, v) for k, v in request.form.items(multi=True) if k not in options.FIELDS]
        request.form = type(request.form)(
            [(k, (v or self._environment.host or "") if k == "host" else v) for k, v in rest])
        return None

    def keep(self, answer: Response) -> Response:
        """Makes a form's fields the options, once Locust has found nothing wrong with the rest."""
        if "asked" in g:
            if (answer.get_json(silent=True) or {}).get("success"):
                options.apply(g.asked, self._options)
            else:
                self._lifecycle.discard()
        return answer

    def fill(self, *_: Any, context: dict[str, Any], **__: Any) -> None:
        """The form shows what was asked last, not what the command line said."""
        for name, field in context.get("template_args", {}).get("extra_options", {}).items():
            if name in options.FIELDS:
                field["default_value"] = getattr(self._options, name)

    @property
    def _options(self) -> argparse.Namespace:
        given: argparse.Namespace | None = self._environment.parsed_options
        assert given is not None
        return given

    def _wrong(self, why: str) -> ResponseReturnValue:
        return {"success": False, "message": why, "host": self._environment.host}
