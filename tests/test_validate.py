"""What checks find in answers, good and bad, English and Chinese: one table for each check."""

from typing import Any

import pytest

from loadgen import code, expect, repeats, schema, validate
from loadgen.openai import Answer, Call
from loadgen.validate import Asked, Came

WEATHER: dict[str, Any] = {"type": "object", "required": ["city"], "additionalProperties": False,
           "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}}}
TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": WEATHER,
    "send_mail": {"type": "object", "required": ["to"], "properties": {"to": {"type": "string"}}}}
REPORT: dict[str, Any] = {"type": "object", "required": ["errors", "top_action", "users"],
          "additionalProperties": False, "properties": {
              "errors": {"type": "integer"}, "top_action": {"type": "string", "enum": ["view",
                                                                                       "登录"]},
              "users": {"type": "array", "items": {"type": "string"}, "maxItems": 3}}}
ZH = ("港口管理处表示，雾天关闭了外航道，夜班工人更换了吊机的钢缆，周末需要第二艘拖船值班。卡车在"
      "闸口等待的时间比去年长了一倍，海关抽查了更多的集装箱，铁路的运力只用了三分之一。新的粮食泊位将"
      "建在北侧码头，工会与经理就排班表达成了一致，任何人都不必连续上两个夜班。")
EN = ("The harbour office said that fog had closed the outer channel, that the night shift had "
      "replaced the cables of a crane, and that a second tug was needed on call at weekends. "
      "Trucks waited at the gate twice as long as in the year before, the customs opened more "
      "containers, and the railway carries a third of what it was built for. A new berth for "
      "grain is planned on the northern quay, and dockers and managers agreed on a roster.")
FR = ("La capitainerie du port a déclaré que le brouillard avait fermé le chenal extérieur, que "
      "l’équipe de nuit avait remplacé les câbles d’une grue et qu’un second remorqueur était "
      "nécessaire le week-end. Les camions ont attendu à la porte deux fois plus longtemps que "
      "l’année précédente, la douane a ouvert plus de conteneurs et le chemin de fer ne "
      "transporte que le tiers de ce pour quoi il a été construit.")
CODE = """def total(items: list[int]) -> int:
    result = 0
    for item in items:
        result += item
    return result
"""


NOTHING = Asked()


def finds(wanted: Any, text: str, asked: Asked = NOTHING, calls: Any = (),
          **how: Any) -> tuple[str | None, str]:
    found = validate.check(wanted, asked, Came(Answer(text, list(calls)), **how))
    assert found.ok == (found.kind is None)
    return found.kind, found.says


# ------------------------------------------------------------------------------------------ facts


@pytest.mark.parametrize(("text", "kind"), [
    ("It names 48213 tonnes and 7 ships, and 90155 euros.", None),
    ("共 48,213 吨，支出９０１５５元。", None),
    ("48'213 tonnes, 90 155 euros", None),
    ("Only 48213 tonnes are named.", "forgot a fact"),
    ("报告提到了48213吨。", "forgot a fact"),
    ("148213 tonnes and 90155.", "forgot a fact"),  # another number
    ("", "no text")])
def test_planted_figures_are_looked_for_as_numbers(text: str, kind: str | None) -> None:
    assert finds(expect.Facts(share=1.0), text, Asked(facts=("48213", "90155")))[0] == kind


def test_a_share_of_the_figures_may_be_enough_and_lost_ones_are_named() -> None:
    asked = Asked(facts=("11111", "22222", "33333", "44444", "55555"))
    assert finds(expect.Facts(share=0.8), "11111 22222 33333 44444", asked) == (
        None, "4 of 5 planted figures")
    kind, says = finds(expect.Facts(share=0.8), "11111 22222 33333", asked, finish_reason="length")
    assert kind == "forgot a fact"
    assert "lost: no. 4 (44444), no. 5 (55555)" in says
    assert says.endswith("max_tokens cut it off")
    assert finds(expect.Facts(), "anything")[0] is None  # none was planted


# ----------------------------------------------------------------------------------------- length


@pytest.mark.parametrize(("text", "kind"), [
    ("a" * 1000, None), ("汉" * 1000, None), ("a " * 999, "too short"),
    ("汉字。" * 300, "too short"),
    ("a" * 2001, "too long")])
def test_characters_are_counted_without_spaces(text: str, kind: str | None) -> None:
    assert finds(expect.LengthOf(min_chars=1000, max_chars=2000), text)[0] == kind


# ------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize(("text", "kind"), [
    (f"Here it is:\n```python\n{CODE}```\nIt adds.", None),
    (f"代码如下：\n```python\n# 求和\n{CODE}```\n说明：逐项相加。", None),
    (CODE, None),
    (f"1. The function:\n\n   ```py\n{''.join('   ' + x for x in CODE.splitlines(True))}   ```",
     None),
    (f"```python\n{CODE}", None),  # an open fence whose code is whole
    (f"```python\n{CODE[:70]}", "does not parse"),
    ("```python\ndef f(:\n    return 1\n```", "does not parse"),
    ("```python\nprint 'hello'\n```", "does not parse"),
    ("I cannot write code today.", "no code"),
    ("我今天不写代码。", "no code"),
    ("```bash\nls -l\n```", "no code"),
    ("```python\ndef train(model):\n    pass\n```", "stub"),
    ("```python\ndef train(model):\n    \"\"\"Trains it.\"\"\"\n    ...\n```", "stub"),
    ("```python\ndef train(m):\n    raise NotImplementedError\n```", "stub"),
    (f"```python\n{CODE}\n# TODO: implement evaluation\n```", "stub"),
    (f"```python\n{CODE}\n# 此处省略其余部分\n```", "stub"),
    ("```python\nx = 1\n```", "too short"),
    ("```python\n" + "value = compute(value)\n" * 30 + "```", "repetition"),
    ("```python\nfrom abc import abstractmethod\nclass A:\n    @abstractmethod\n"
     "    def f(self): ...\n    def g(self):\n        return 1\n```", None)])
def test_code_must_parse_and_be_whole(text: str, kind: str | None) -> None:
    assert finds(expect.Python(), text)[0] == kind


def test_code_that_max_tokens_cut_says_so() -> None:
    said = finds(expect.Python(), f"```python\n{CODE[:70]}", finish_reason="length")
    assert said[1].endswith(validate.CUT)
    assert "line 3" in said[1]


def test_every_cut_of_code_has_a_finding() -> None:
    text = f"Here:\n```python\n{CODE}```\nDone."
    kinds = {finds(expect.Python(), text[:i])[0] for i in range(1, len(text) + 1)}
    assert kinds <= {None, "no code", "does not parse", "stub", "too short"}
    assert code.code_of(text) == CODE


# ------------------------------------------------------------------------------------------- JSON


GOOD = '{"errors": 3, "top_action": "view", "users": ["a", "b"]}'


@pytest.mark.parametrize(("text", "kind", "where"), [
    (GOOD, None, ""),
    ('  {"errors": 3, "top_action": "登录", "users": ["张伟"]}\n', None, ""),
    (GOOD[:-1], "invalid JSON", ""),
    ("{'errors': 3}", "invalid JSON", ""),
    ('{"errors": NaN}', "invalid JSON", "NaN"),
    ("There were three errors.", "invalid JSON", ""),
    ("日志中有三个错误。", "invalid JSON", ""),
    (f"Here is the report: {GOOD}", "extra text", "Here is the report"),
    (f"{GOOD}\n以上是报告。", "extra text", "以上是报告"),
    (f"```json\n{GOOD}\n```", "extra text", "```json"),
    (GOOD.replace('"errors"', '"error_count"'), "wrong field name", "$.error_count"),
    (GOOD.replace('"errors"', '"错误数"'), "wrong field name", "$.错误数"),
    (GOOD[:-1] + ', "note": 1}', "wrong field name", "$.note"),
    ('{"errors": 3, "top_action": "view"}', "missing field", "users"),
    (GOOD.replace('["a", "b"]', '"a, b"'), "array as string", "$.users"),
    (GOOD.replace('["a", "b"]', '"[\\"张伟\\"]"'), "array as string", "$.users"),
    (GOOD.replace("3", '"3"'), "wrong data type", "$.errors"),
    (GOOD.replace("3", "true"), "wrong data type", "$.errors"),
    (GOOD.replace("3", "null"), "wrong data type", "$.errors"),
    (GOOD.replace('"b"', "2"), "wrong data type", "$.users[1]"),
    ("[1, 2]", "wrong data type", "$ is array"),
    (GOOD.replace("view", "sleep"), "wrong value", "$.top_action"),
    (GOOD.replace('"b"', '"b", "c", "d"'), "wrong value", "maxItems"),
    (f"报告：{GOOD.replace('3', '{}')}", "wrong data type", "$.errors")])
def test_json_says_which_error_and_where(text: str, kind: str | None, where: str) -> None:
    found = finds(expect.Json(), text, Asked(schema=REPORT))
    assert found[0] == kind
    assert where in found[1]


def test_a_fence_is_let_pass_where_the_scenario_says_so() -> None:
    assert finds(expect.Json(fence=True), f"```json\n{GOOD}\n```", Asked(schema=REPORT))[0] is None
    assert finds(expect.Json(schema={"type": "array"}), "[]", Asked(schema=REPORT))[0] is None


def test_every_cut_of_json_is_invalid_and_deep_nesting_ends() -> None:
    for i in range(1, len(GOOD)):
        assert finds(expect.Json(), GOOD[:i], Asked(schema=REPORT))[0] == "invalid JSON"
    assert finds(expect.Json(), "[" * 200_000, Asked(schema=REPORT))[0] == "invalid JSON"


def test_our_checker_agrees_with_jsonschema_on_what_is_wrong() -> None:
    import jsonschema

    values: list[Any] = [
        {"errors": 1, "top_action": "view", "users": []}, {"errors": 1.0, "top_action": "view",
                                                            "users": []},
        {"errors": 1.5, "top_action": "view", "users": []}, {}, [], None, "x", 3, True,
        {"errors": 1, "top_action": "登录", "users": ["a", 1]},
        {"errors": 1, "top_action": "view", "users": ["a"] * 4},
        {"errors": 1, "top_action": "view", "users": [], "more": 1},
        {"errors": False, "top_action": "view", "users": []}]
    checker = jsonschema.Draft202012Validator(REPORT)
    for value in values:
        assert (schema.fault(value, REPORT) is None) == checker.is_valid(value), value


# ------------------------------------------------------------------------------------------ tools


CALLS = Asked(tool="get_weather", tools=TOOLS)


@pytest.mark.parametrize(("text", "calls", "kind"), [
    ("", [Call("get_weather", '{"city": "Lisbon", "days": 3}')], None),
    ("", [Call("get_weather", '{"city": "上海"}')], None),
    ("It will be sunny in Lisbon.", [], "no tool call"),
    ("上海明天晴。", [], "no tool call"),
    ("", [], "no tool call"),
    ("", [Call("send_mail", '{"to": "a@b"}')], "wrong tool"),
    ("", [Call("launch_rocket", "{}")], "unknown tool"),
    ("", [Call("get_weather", '{"city": "Lis')], "invalid JSON"),
    ("", [Call("get_weather", '{"city": "Lisbon"} please')], "invalid JSON"),
    ("", [Call("get_weather", '{"town": "Lisbon"}')], "wrong field name"),
    ("", [Call("get_weather", '{"城市": "上海"}')], "wrong field name"),
    ("", [Call("get_weather", "")], "missing field"),
    ("", [Call("get_weather", '{"city": "Lisbon", "days": "3"}')], "wrong data type"),
    ("", [Call("get_weather", '{"city": "Lisbon", "days": 0}')], "wrong value")])
def test_a_tool_is_called_by_name_with_arguments_of_its_schema(text: str, calls: Any,
                                                               kind: str | None) -> None:
    found = finds(expect.Tool(), text, CALLS, calls)
    assert found[0] == ("invalid JSON" if kind == "extra text" else kind)


# ------------------------------------------------------------------------------------ translation


def of(source: str, *languages: str) -> Asked:
    return Asked(source=source, languages=(languages[0], languages[1]))


@pytest.mark.parametrize(("asked", "text", "kind"), [
    (of(ZH, "zh", "en"), EN, None),
    (of(ZH, "zh", "fr"), FR, None),
    (of(EN, "en", "zh"), ZH, None),
    (of(EN, "en", "fr"), FR, None),
    (of(ZH, "zh", "en"), ZH, "copied the source"),
    (of(EN, "en", "zh"), EN, "copied the source"),
    (of(ZH, "zh", "en"), ZH[:100] + EN[:60], "copied the source"),
    (of(ZH, "zh", "en"), FR, "wrong language"),
    (of(EN, "en", "zh"), "张伟 uses the PyTorch 框架。" * 12, "wrong language"),
    (of(EN, "en", "zh"), ZH + "（见 Bluefin 系统）", None),
    (of(ZH, "zh", "fr"), EN, "wrong language"),
    (of(EN, "en", "zh"), FR, "wrong language"),
    (of(ZH, "zh", "en"), "zxq vbn qwe rty plk mnb " * 20, "wrong language"),
    (of(ZH, "zh", "en"), "The harbour is closed.", "too short"),
    (of(EN, "en", "zh"), "港口关闭了。", "too short"),
    (of(ZH, "zh", "en"), EN * 4, "too long"),
    (of(ZH, "zh", "en"), "12345 67890", "wrong language")])
def test_a_translation_is_in_its_language_and_as_long_as_the_source(asked: Asked, text: str,
                                                                    kind: str | None) -> None:
    assert finds(expect.Translation(), text, asked)[0] == kind


# ------------------------------------------------------------------------------------- repetition


@pytest.mark.parametrize(("text", "kind"), [
    (EN, None), (ZH, None), (EN * 6, "repetition"), (ZH * 6, "repetition"),
    (EN + " and so on" * 100, "repetition"), ("好" * 400, "repetition"),
    ("aaaa" * 2000, "repetition")])
def test_what_was_said_before_is_a_repetition(text: str, kind: str | None) -> None:
    assert finds(expect.Repetition(), text, output_tok=900, finish_reason="stop")[0] == kind


def test_the_longest_output_says_how_many_came_why_it_ended_and_where_it_repeats() -> None:
    asked = Asked(max_tokens=8192)
    wanted = expect.Repetition(min_tokens=8000)
    kind, says = finds(wanted, EN, asked, output_tok=7600, finish_reason="stop")
    assert kind == "too short"
    assert "7600 of 8192 tokens, ended by stop" in says
    kind, says = finds(wanted, EN + " it goes on and on for ever" * 200, asked, output_tok=8192,
                       finish_reason="length")
    assert kind == "repetition"
    assert "8192 of 8192 tokens, ended by length; from character " in says


@pytest.mark.parametrize("start", [EN, ZH])
def test_repetition_begins_where_the_loop_does(start: str) -> None:
    found = repeats.of(start + " The same words again, and again the same words." * 60)
    assert found.begins is not None
    assert len(start) - 5 <= found.begins <= len(start) + 90
    assert found.packed < repeats.of(start).packed
    assert repeats.of(start).begins is None
