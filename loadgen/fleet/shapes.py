"""Load shapes: how many users there are when. From a scenario's `shape`, or a ramp to the largest
safe number of users."""

import time
from argparse import Namespace
from typing import TYPE_CHECKING, ClassVar

from locust import LoadTestShape

from loadgen import scenario
from loadgen.fleet.conductor import Conductor
from loadgen.fleet.run import run_of
from loadgen.fleet.wide import WideConductor, WideLifecycle
from loadgen.scenario import Ramp, Seconds, Shape
from loadgen.stages import at, stages

if TYPE_CHECKING:
    from loadgen.fleet.lifecycle import Lifecycle


class ScenarioShape(LoadTestShape):
    """The scenario's own shape; without one, what Locust's -u, -r and -t say."""

    abstract = True
    use_common_options = True
    _began_s: float | None = None
    _conductor: Conductor | WideConductor | None = None

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None
        began_s = self._since(run_of(self.runner.environment) is not None)
        options, shape = self.options, self.shape()
        if isinstance(shape, Ramp):
            return self._conductor.wanted if self._conductor is not None else (1, 1.0)
        if shape is None:
            over = options.run_time and began_s >= float(options.run_time)
            return None if over else (options.num_users or 1, options.spawn_rate or 1.0)
        stage = at(stages(shape), began_s)
        return None if stage is None else (stage.users, stage.rate)

    def shape(self) -> Shape | None:
        return scenario.load(self.options.scenario).shape

    @property
    def options(self) -> Namespace:
        assert self.runner is not None
        options = self.runner.environment.parsed_options
        assert isinstance(options, Namespace)
        return options

    @property
    def conducts(self) -> bool:
        """Legs are begun and ended by the search, not whenever the number of users changes."""
        return isinstance(self.shape(), Ramp)

    def conduct(self, lifecycle: "Lifecycle") -> None:
        """A test has begun."""
        shape = self.shape()
        assert isinstance(shape, Ramp)
        self._conductor = (
            lifecycle.conductor(shape.to, shape.budget_s) if isinstance(lifecycle, WideLifecycle)
            else Conductor(lifecycle, shape.to, shape.budget_s))
        self._conductor.start()

    def stop(self) -> None:
        """The test ends."""
        if self._conductor is not None:
            self._conductor.stop()
        self._conductor = self._began_s = None

    def _since(self, running: bool) -> float:
        """Seconds since the test began; a server that is waited for does not count."""
        if running and self._began_s is None:
            self._began_s = time.monotonic()
        return 0.0 if self._began_s is None else time.monotonic() - self._began_s


class RampShape(ScenarioShape):
    """A ramp to `to` users, within `budget`, whatever the scenario says. Locust's -u (above 1)
    and -t go over them."""

    abstract = True
    to: ClassVar[int] = 64
    budget: ClassVar[str] = "230s"

    def shape(self) -> Shape:
        options = self.options
        asked = options.num_users or 1
        return Ramp(to=asked if asked > 1 else self.to,
                    budget_s=Seconds(options.run_time or Seconds.parse(self.budget)))
