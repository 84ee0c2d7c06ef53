"""Load shapes: what a scenario's `shape` means, and what it may not say."""

from typing import Any

import pytest

from loadgen import scenario
from loadgen.errors import ScenarioError
from loadgen.scenario import Ramp, Scenario, Seconds, Soak, Spike, Steps
from loadgen.stages import SPAWN_S, Stage, at, stages

CLASS = {"name": "a", "kind": "chat", "prompt_tokens": 10, "output_tokens": 10}


def parsed(shape: Any) -> Scenario:
    return scenario.parse({"name": "s", "classes": [CLASS], "shape": shape}, "s.toml")


def test_steps_are_held_one_after_the_other() -> None:
    shape = Steps(users=(1, 2, 40), hold_s=Seconds(30))
    assert stages(shape) == [Stage(1, 30, 1.0), Stage(2, 30, 1.0), Stage(40, 30, 38 / SPAWN_S)]


def test_after_a_spike_its_users_go_as_fast_as_they_came() -> None:
    shape = Spike(base=4, peak=32, spike_s=Seconds(20), hold_s=Seconds(30))
    assert stages(shape) == [Stage(4, 30, 1.0), Stage(32, 20, 7.0), Stage(4, 30, 7.0)]


def test_a_soak_is_one_stage() -> None:
    assert stages(Soak(users=16, hold_s=Seconds(1800))) == [Stage(16, 1800, 4.0)]


@pytest.mark.parametrize(("t_s", "users"), [
    (0.0, 1), (29.9, 1), (30.0, 2), (59.9, 2), (60.0, 40), (89.9, 40), (90.0, None), (1e9, None)])
def test_a_stage_ends_when_its_time_is_over(t_s: float, users: int | None) -> None:
    stage = at(stages(Steps(users=(1, 2, 40), hold_s=Seconds(30))), t_s)
    assert (stage.users if stage else None) == users


@pytest.mark.parametrize(("raw", "shape"), [
    ({"kind": "steps", "users": [1, 2], "hold": "30s"}, Steps((1, 2), Seconds(30))),
    ({"kind": "spike", "base": 4, "peak": 32, "spike": "20s", "hold": "1m"},
     Spike(4, 32, Seconds(20), Seconds(60))),
    ({"kind": "soak", "users": 16, "hold": "30m"}, Soak(16, Seconds(1800))),
    ({"kind": "ramp", "to": 64, "budget": "4m"}, Ramp(64, Seconds(240)))])
def test_each_kind_of_shape_can_be_written_and_goes_into_the_manifest(raw: Any, shape: Any) -> None:
    mix = parsed(raw)
    assert mix.shape == shape
    assert scenario.parse(scenario.to_plain(mix), "manifest").shape == shape


@pytest.mark.parametrize(("raw", "word"), [
    ({"kind": "stairs", "users": [1]}, "stairs"),
    ({"kind": "steps", "users": [], "hold": "30s"}, "users"),
    ({"kind": "steps", "users": [0], "hold": "30s"}, "users"),
    ({"kind": "steps", "users": [1], "hold": 30}, "hold"),
    ({"kind": "soak", "users": 1, "hold": "30s", "peak": 2}, "peak"),
    ({"kind": "ramp", "budget": "4m"}, "to")])
def test_a_shape_that_cannot_be_is_refused_by_its_key(raw: Any, word: str) -> None:
    with pytest.raises(ScenarioError, match=word):
        parsed(raw)
