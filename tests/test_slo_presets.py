"""Limits by name: in a scenario file, for a class, on the command line."""

import pytest

from loadgen import scenario
from loadgen.errors import ScenarioError
from loadgen.presets import SLOS
from loadgen.scenario import Seconds, Slo, parse_slo

CLASS = {"name": "a", "kind": "chat", "prompt_tokens": 9, "output_tokens": 9}


def test_a_scenario_and_a_class_take_limits_by_name() -> None:
    found = scenario.parse({"name": "x", "slo": "interactive-chat", "classes": [
        CLASS, {**CLASS, "name": "b", "slo": "mlperf-llama2-70b-interactive"}]}, "x.toml")
    assert found.slo_of("a") == Slo(Seconds(1), Seconds(0.05))
    assert found.slo_of("b") == Slo(Seconds(0.45), Seconds(0.04))


def test_the_command_line_takes_a_name_and_limits_over_it() -> None:
    assert parse_slo("code-completion") == Slo(Seconds(0.3), Seconds(0.03), e2e_s=Seconds(3))
    assert parse_slo("code-completion ttft=1s").ttft_s == Seconds(1)
    assert parse_slo("ttft=1s,code-completion").ttft_s == Seconds(0.3)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ScenarioError, match=r"--slo.*interactive-chat"):
        parse_slo("interactive-chta")
    with pytest.raises(ScenarioError, match=r"x\.toml: slo: no limits are named"):
        scenario.parse({"name": "x", "slo": "fast", "classes": [CLASS]}, "x.toml")


@pytest.mark.parametrize("name", SLOS)
def test_each_preset_asks_for_a_first_token_in_time(name: str) -> None:
    found = parse_slo(name)
    assert found.ttft_s
    assert found.tpot_s or found.e2e_s
