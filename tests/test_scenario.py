"""Scenario files: what is refused, and how; what is read back; where files are found."""

from pathlib import Path
from typing import Any

import pytest

from loadgen import scenario
from loadgen.errors import ScenarioError
from loadgen.scenario import Seconds, Slo

CLASS = {"name": "a", "kind": "chat", "prompt_tokens": 100, "output_tokens": 5}
SHIPPED = sorted(p.stem for p in scenario.SHIPPED.glob("*.toml"))

TOML = """\
name = "x"
{top}
[[classes]]
name = "a"
kind = "chat"
prompt_tokens = 100
output_tokens = 5
{cls}
"""


def plain(cls: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    return {"name": "x", "classes": [CLASS | (cls or {})], **top}


def length(dist: str, **keys: Any) -> dict[str, Any]:
    return {"prompt_tokens": {"dist": dist, **keys}}


# ------------------------------------------------------------------------------------- refusals

BAD_FILES = {
    # what is wrong: (top of the file, end of its class, what the message holds)
    "unknown key": ("descripton = 'y'", "", ["'descripton'", "did you mean 'description'?"]),
    "unknown key of a class": ("", "promt_tokens = 3", ["classes[0]", "mean 'prompt_tokens'?"]),
    "unknown key of an slo": ("slo = {tttf = '1s'}", "", ["slo: ", "mean 'ttft'?", "e2e, itl"]),
    "key given twice": (
        "", "prompt_tokens = 3", ["not valid TOML", "Cannot overwrite a value"]),
    "unknown key of the sampling": (
        "", "sampling = {temprature = 1}", ["classes[0].sampling", "mean 'temperature'?"]),
    "unknown key of a load": (
        "load = {mode = 'closed', concurency = 3}", "", ["load: ", "mean 'concurrency'?"]),
    "negative duration": ("slo = {ttft = '-1s'}", "", ["slo.ttft", "'-1s'", '"2s"']),
    "zero duration": ("duration = '0s'", "", ["duration", "more than zero"]),
    "infinite duration": ("duration = '1e999s'", "", ["duration", "'1e999s'"]),
    "negative weight": ("", "weight = -1", ["classes[0].weight", ">= 0"]),
    "infinite weight": ("", "weight = inf", ["classes[0].weight", "<= 1"]),
    "weight that is no number": ("", "weight = nan", ["classes[0].weight", ">= 0"]),
    "duration without unit": ("slo = {ttft = 2}", "", ["slo.ttft", "with its unit", '"50ms"']),
    "duration text without unit": ("slo = {ttft = '2'}", "", ["slo.ttft", "with its unit"]),
    "duration with a rate's unit": ("slo = {tpot = '2/s'}", "", ["slo.tpot", "with its unit"]),
    "rate without unit": ("load = {mode = 'open', rate = 20}", "", ["load.rate", '"20/s"']),
    "rate with a duration's unit": (
        "load = {mode = 'open', rate = '20ms'}", "", ["load.rate", '"20/s"']),
    "weights that sum to nothing": ("", "weight = 0", ["classes", "a weight above 0"]),
    "shared prefix as long as the prompt": (
        "", "shared_prefix = {tokens = 100}", ["class a", "100 tokens", "less than 100"]),
    "shared prefix with unknown key": (
        "", "shared_prefix = {token = 9}", ["classes[0].shared_prefix", "mean 'tokens'?"]),
    "unsorted trace": (
        "load = {mode = 'trace', due = [2, 1]}", "", ["load.due", "must be ascending"]),
    "negative instant in a trace": (
        "load = {mode = 'trace', due = [1, -1]}", "", ["load.due[1]", ">= 0"]),
    "impossible throttle status": (
        "throttle_status = [200]", "", ["throttle_status[0]", ">= 400"]),
}


@pytest.mark.parametrize(("top", "cls", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_refused_by_file_key_and_remedy(
    tmp_path: Path, top: str, cls: str, says: list[str]
) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(TOML.format(top=top, cls=cls))
    with pytest.raises(ScenarioError) as e:
        scenario.load(str(file))
    assert str(e.value).startswith(f"{file}: ")
    assert [s for s in says if s not in str(e.value)] == []


BAD_DATA = {
    "two classes of one name": (
        {"name": "x", "classes": [CLASS, CLASS]}, ["classes", "(a, a)", "rename"]),
    "no classes": ({"name": "x", "classes": []}, ["classes", "length >= 1"]),
    "classes left out": ({"name": "x"}, ["key 'classes' is missing"]),
    "weights of two classes": (
        {"name": "x", "classes": [CLASS | {"weight": 0}, CLASS | {"name": "b", "weight": 0}]},
        ["classes", "a weight above 0"]),
    "negative length": (plain({"prompt_tokens": -3}), ["classes[0].prompt_tokens", ">= 1"]),
    "unknown key of a length": (
        plain(length("uniform", min=1, mx=3)), ["classes[0].prompt_tokens", "mean 'max'?"]),
    "negative bound of a length": (
        plain(length("uniform", min=-1, max=3)), ["classes[0].prompt_tokens.min", ">= 1"]),
    "min above max, uniform": (
        plain(length("uniform", min=9, max=3)), ["class a: prompt_tokens", "min 9", "max 3"]),
    "min above max, lognormal": (
        plain(length("lognormal", median=5, sigma=1, min=9, max=3)),
        ["class a: prompt_tokens", "min 9", "max 3"]),
    "shared prefix longer than any drawn prompt": (
        plain(length("uniform", min=9, max=30) | {"shared_prefix": {"tokens": 40}}),
        ["class a: shared_prefix", "40 tokens", "less than 30"]),
    "list instead of a table": ([1], ["Expected `object`, got `array`"]),
}


@pytest.mark.parametrize(("raw", "says"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_is_refused_by_place_key_and_remedy(raw: object, says: list[str]) -> None:
    with pytest.raises(ScenarioError) as e:
        scenario.parse(raw, "manifest.json")
    assert str(e.value).startswith("manifest.json: ")
    assert [s for s in says if s not in str(e.value)] == []


@pytest.mark.parametrize("content", [b"name = ", b"name = \xff", b"a = 1\na = 2"])
def test_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(ScenarioError, match=f"{file}: not valid TOML: "):
        scenario.load(str(file))


@pytest.mark.parametrize("name", ["./nope.toml", "nope.toml", "no/such/folder"])
def test_missing_file_is_refused_with_advice(name: str) -> None:
    with pytest.raises(ScenarioError, match=f"^{name}: no such scenario file; .* mixed"):
        scenario.load(name)


def test_unknown_name_is_refused_with_the_nearest_and_all_shipped_ones() -> None:
    with pytest.raises(ScenarioError) as e:
        scenario.load("mixd")
    assert "did you mean 'mixed'?" in str(e.value)
    assert ", ".join(SHIPPED) in str(e.value)


# -------------------------------------------------------------------------------- what is found


def test_name_is_looked_up_in_the_working_folder_first_then_among_the_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert scenario.load("mixed").classes[0].name == "summary"
    (tmp_path / "scenarios").mkdir()
    (tmp_path / "scenarios" / "mixed.toml").write_text(TOML.format(top="", cls=""))
    assert scenario.load("mixed").classes[0].name == "a"
    assert scenario.find("mixed") == Path("scenarios/mixed.toml")
    assert scenario.find("smoke") == scenario.SHIPPED / "smoke.toml"


def test_name_with_the_ending_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScenarioError, match="no such scenario file"):
        scenario.load("mixed.toml")
    (tmp_path / "mixed.toml").write_text(TOML.format(top="", cls=""))
    assert scenario.load("mixed.toml").name == "x"


def test_file_without_a_name_is_named_after_itself(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(TOML.format(top="", cls="").partition("\n")[2])
    assert scenario.load(str(file)).name == "mine"


# ---------------------------------------------------------------------------------- round trips


def test_all_classes_of_the_mix_have_a_scenario_of_their_own() -> None:
    assert {"mixed", "smoke", "chat", "summary", "code", "json"} <= set(SHIPPED)
    for cls in scenario.load("mixed").classes:
        (own,) = scenario.load(cls.name).classes
        assert (own.kind, own.language, own.prompt_tok, own.output_tok) == (
            cls.kind, cls.language, cls.prompt_tok, cls.output_tok)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_scenario_loads_has_an_slo_and_survives_a_round_trip(name: str) -> None:
    loaded = scenario.load(name)
    assert loaded.name == name
    assert loaded.description
    assert all(loaded.slo_of(c.name) != Slo() for c in loaded.classes)
    assert scenario.parse(scenario.to_plain(loaded), "again") == loaded


@pytest.mark.parametrize("extra", [
    {},
    {"load": {"mode": "open", "rate": "90/min", "arrivals": "gamma", "cv": 2.5}},
    {"load": {"mode": "open", "rate": "0.1/h"}},  # 2.8e-05/s: an exponent in the plain form
    {"load": {"mode": "closed", "concurrency": 7}, "duration": "1h"},
    {"load": {"mode": "trace", "due": [0, 0.25, 0.25, 3]}},
    {"slo": {"ttft": "1.1s", "tpot": "33.3ms", "itl": "0.05ms", "e2e": "2m"}},
    {"timeouts": {"first_token": "10s", "stall": "0.1s"}, "throttle_status": [429, 529]},
    {"endpoint": "completions", "description": "长文档 – ü"},
], ids=str)
@pytest.mark.parametrize("cls", [
    {},
    {"prompt_tokens": {"dist": "fixed", "tokens": 7}, "weight": 0.25, "language": "zh"},
    length("uniform", min=9, max=9),
    length("lognormal", median=757, sigma=0.99, min=16, max=4096),
    {"shared_prefix": {"tokens": 99, "groups": 4}, "slo": {"ttft": "1s"}},
    {"sampling": {"temperature": 0, "seed": 1, "ignore_eos": True}, "timeouts": {"total": "9s"}},
], ids=str)
def test_plain_form_reads_back_equal(cls: dict[str, Any], extra: dict[str, Any]) -> None:
    parsed = scenario.parse(plain(cls, **extra), "first")
    assert scenario.parse(scenario.to_plain(parsed), "again") == parsed


@pytest.mark.parametrize(("text", "seconds"), [
    ("50ms", 0.05), ("2s", 2), (" 1.5 s ", 1.5), ("2m", 120), ("2min", 120), (".5h", 1800),
    ("1e-3s", 0.001)])
def test_duration_is_read_with_its_unit(text: str, seconds: float) -> None:
    assert Seconds.parse(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "per_second"), [("20/s", 20), ("90/min", 1.5), ("36 / h", 0.01)])
def test_rate_is_read_with_its_unit(text: str, per_second: float) -> None:
    assert scenario.PerSecond.parse(text) == pytest.approx(per_second)


# ------------------------------------------------------------------------------------------ SLOs


def test_limits_of_a_class_come_before_those_of_the_scenario() -> None:
    mix = scenario.parse(plain({"slo": {"ttft": "1s"}}, slo={"ttft": "9s", "tpot": "50ms"}), "-")
    assert mix.slo_of("a") == Slo(ttft_s=Seconds(1), tpot_s=Seconds(0.05))


def test_limits_of_the_command_line_come_before_all_and_leave_the_rest() -> None:
    mix = scenario.parse(plain({"slo": {"ttft": "1s"}}, slo={"ttft": "9s", "tpot": "50ms"}), "-")
    judged = mix.with_slo(scenario.parse_slo("ttft=3s,e2e=1m"))
    assert judged.slo_of("a") == Slo(ttft_s=Seconds(3), tpot_s=Seconds(0.05), e2e_s=Seconds(60))
    assert mix.slo_of("a").ttft_s == Seconds(1)


def test_timeouts_of_a_class_replace_those_of_the_scenario() -> None:
    mix = scenario.parse(plain({"timeouts": {"total": "9s"}}, timeouts={"stall": "1s"}), "-")
    assert mix.timeouts_of("a").total_s == Seconds(9)
    assert mix.timeouts_of("a").stall_s == Seconds(30)
    plainly = scenario.parse(plain(timeouts={"stall": "1s"}), "-")
    assert plainly.timeouts_of("a").stall_s == Seconds(1)


@pytest.mark.parametrize(("text", "want"), [
    ("ttft=1s", Slo(ttft_s=Seconds(1))),
    ("ttft=1s,tpot=50ms", Slo(ttft_s=Seconds(1), tpot_s=Seconds(0.05))),
    ("ttft:1000", Slo(ttft_s=Seconds(1))),
    ("ttft:1000 tpot:50", Slo(ttft_s=Seconds(1), tpot_s=Seconds(0.05))),
    ("e2el:3000", Slo(e2e_s=Seconds(3))),
    ("itl=0.2s, e2e=1m", Slo(itl_s=Seconds(0.2), e2e_s=Seconds(60))),
])
def test_slo_option_reads_our_form_and_that_of_vllm(text: str, want: Slo) -> None:
    assert scenario.parse_slo(text) == want


@pytest.mark.parametrize(("text", "says"), [
    ("", "ttft=1s"), ("ttft", "ttft=1s"), ("ttft=", "ttft=1s"), ("ttft=1", "with its unit"),
    ("ttft:abc", "with its unit"), ("tttf=1s", "did you mean 'ttft'?"), ("=1s", "allowed here"),
    ("ttft=-1s", "with its unit")])
def test_bad_slo_option_is_refused_with_advice(text: str, says: str) -> None:
    with pytest.raises(ScenarioError, match=r"^--slo") as e:
        scenario.parse_slo(text)
    assert says in str(e.value)
