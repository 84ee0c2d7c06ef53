"""What answers of a dialogue do with what was told: good ones, and each kind of error."""

import itertools
from typing import Any

import numpy as np
import pytest

from loadgen import dialogue, plan, prompts, scenario
from loadgen.dialogue import Question
from loadgen.recall import fault

JOB = Question("Leave the text aside. What is my own job? Answer in one sentence.", "en", "user",
               ("job", "work", "profession", "do for a living"), ("florist",), ("pilot",),
               ("brother", "Milo"))
HIS = Question("Leave the text aside. In which town does my brother live? Answer in one sentence.",
               "en", "other", ("live", "town", "where"), ("Ghent",), ("Turku",),
               ("brother", "Milo"))
LEFT = Question("How many chairs do I have left now?", "en", "user", ("how many", "number"),
                dialogue.number(38, "en"), (), ("brother", "Milo"), dialogue.number(42, "en"),
                counts=True)
ZH_JOB = Question("先不管这段文字。我自己的职业是什么？请用一句话回答。", "zh", "user",
                  ("职业", "工作", "做什么"), ("花艺师",), ("飞行员",), ("哥哥", "小满"))
ZH_HIS = Question("先不管这段文字。我哥哥住在哪座城市？请用一句话回答。", "zh", "other",
                  ("住在", "城市", "哪里"), ("绍兴",), ("洛阳",), ("哥哥", "小满"))
ZH_LEFT = Question("我现在还剩多少把椅子？", "zh", "user", ("多少", "几"),
                   dialogue.number(38, "zh"), (), ("哥哥", "小满"), dialogue.number(42, "zh"),
                   counts=True)

GOOD = [
    (JOB, "You work as a florist."), (JOB, "Florist."), (JOB, "As a **florist**, you told me."),
    (JOB, "Your brother Milo is a pilot, and you are a florist."),
    (JOB, "<think>The brother is a pilot.</think>\nYou’re a florist."),
    (JOB, "You are not a pilot but a florist."),
    (HIS, "Your brother lives in Ghent."), (HIS, "He lives in Ghent, as you told me."),
    (HIS, "You live in Turku; Milo lives in Ghent."), (HIS, "Ghent"),
    (LEFT, "You have 38 chairs left."), (LEFT, "You have thirty-eight left: 42 minus 4."),
    (LEFT, "It is no longer 42 but 38."),
    (ZH_JOB, "您的职业是花艺师。"), (ZH_JOB, "你哥哥是飞行员，而你是花艺师。"), (ZH_JOB, "花艺师"),
    (ZH_HIS, "您的哥哥小满住在绍兴。"), (ZH_HIS, "他住在绍兴。"),
    (ZH_HIS, "你住在洛阳，哥哥住在绍兴。"),
    (ZH_LEFT, "您现在还剩38把椅子。"), (ZH_LEFT, "42减去4，还剩三十八把。")]

BAD = [
    (JOB, "forgot a fact", "I'm sorry, I do not have that information."),
    (JOB, "forgot a fact", "You are a teacher."),
    (JOB, "forgot a fact", ""),
    (HIS, "forgot a fact", "He lives in Paris."),
    (LEFT, "forgot a fact", "I cannot tell how many are left."),
    (ZH_JOB, "forgot a fact", "抱歉，我不知道。"), (ZH_HIS, "forgot a fact", "他住在北京。"),
    (ZH_LEFT, "forgot a fact", "抱歉，我不清楚还剩多少。"),
    (JOB, "mixed up roles", "You are a pilot."), (JOB, "mixed up roles", "Pilot"),
    (ZH_JOB, "mixed up roles", "飞行员"), (LEFT, "logic break", "Forty-two."),
    (JOB, "mixed up roles", "You are a pilot and your brother is a florist."),
    (JOB, "mixed up roles", "Your brother is a florist."),
    (HIS, "mixed up roles", "Your brother lives in Turku."),
    (HIS, "mixed up roles", "You live in Ghent."),
    (ZH_JOB, "mixed up roles", "您的职业是飞行员。"),
    (ZH_JOB, "mixed up roles", "你是飞行员，你哥哥是花艺师。"),
    (ZH_HIS, "mixed up roles", "你住在绍兴。"), (ZH_HIS, "mixed up roles", "他住在洛阳。"),
    (LEFT, "logic break", "You have 42 chairs."), (LEFT, "logic break", "42 - 4 = 36, so 36."),
    (LEFT, "logic break", "You have forty-two left."),
    (JOB, "logic break", "You are not a florist."),
    (JOB, "logic break", "You are a florist. Later on: you are not a florist."),
    (ZH_LEFT, "logic break", "还剩42把椅子。"), (ZH_LEFT, "logic break", "还剩四十六把。"),
    (ZH_JOB, "logic break", "您不是花艺师。"),
    (JOB, "repeated question", "Could you tell me what your profession is?"),
    (JOB, "repeated question", "What is my own job?"),
    (HIS, "repeated question", "In which town does your brother live?"),
    (LEFT, "repeated question", "How many chairs did you have?"),
    (ZH_JOB, "repeated question", "请问您是做什么工作的？"),
    (ZH_HIS, "repeated question", "请问您哥哥住在哪座城市？"),
    (ZH_LEFT, "repeated question", "请问您原来有多少把椅子？")]


@pytest.mark.parametrize(("question", "answer"), GOOD)
def test_an_answer_with_the_fact_is_good(question: Any, answer: Any) -> None:
    assert fault(question, answer)[0] is None


@pytest.mark.parametrize(("question", "kind", "answer"), BAD)
def test_each_kind_of_error_is_told_from_the_others(
        question: Any, kind: Any, answer: Any) -> None:
    found, says = fault(question, answer)
    assert found == kind, says
    assert says


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("turns", [2, 3, 5, 9, 20])
def test_what_is_asked_for_was_told_in_an_earlier_turn(language: Any, turns: Any) -> None:
    for seed in range(30):
        lines = dialogue.write(language, turns, np.random.default_rng(seed))
        assert len(lines) == turns
        asking = [i for i, line in enumerate(lines) if line.asks is not None]
        assert asking == list(range(turns - len(asking), turns))
        told = "".join(line.opens for line in lines[:asking[0]])
        for i in asking:
            asks = lines[i].asks
            assert asks is not None
            assert lines[i].closes == asks.text
            assert asks.right[0] not in asks.text
            for value in (asks.before[:1] if asks.counts else (*asks.right, *asks.others)):
                assert value in told


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_right_value_is_good_and_the_others_is_a_mix_up_for_all_that_can_be_asked(
        language: Any) -> None:
    you, other = ("You: ", "Your {}: ") if language == "en" else ("你：", "你的{}：")
    seen = set()
    for seed in range(60):
        for line in dialogue.write(language, 9, np.random.default_rng(seed)):
            if (asks := line.asks) is None:
                continue
            who = you if asks.subject == "user" else other.format(asks.other_called[0])
            seen.add((asks.subject, asks.about))
            for value in asks.right:
                assert fault(asks, f"{who}{value}")[0] is None
            for value in asks.others:
                assert fault(asks, f"{who}{value}")[0] == "mixed up roles"
            for value in asks.before:
                assert fault(asks, f"{who}{value}")[0] == "logic break"
    assert len(seen) == 7


def test_numbers_in_words_are_what_they_say() -> None:
    assert dialogue.number(21, "en") == ("21", "twenty-one", "twenty one")
    assert [dialogue.number(n, "zh")[1] for n in (0, 7, 10, 12, 20, 38)] == [
        "零", "七", "十", "十二", "二十", "三十八"]
    assert [dialogue.number(n, "en")[1] for n in (0, 13, 40, 99)] == [
        "zero", "thirteen", "forty", "ninety-nine"]


def test_no_fact_stands_in_the_texts_around_it() -> None:
    """An answer has it from the dialogue, or not at all."""
    mix = scenario.parse({"name": "d", "classes": [
        {"name": x, "kind": "dialogue", "language": x, "turns": 5, "prompt_tokens": 400,
         "output_tokens": 9} for x in ("en", "zh")]}, "t")
    for k in range(40):
        planned = plan.session(mix, 7, k, None)
        cls = mix.of(planned.cls)
        lines = plan.lines(cls.language, k, 5, 7)
        for turn, line in enumerate(lines):
            text = plan.prompt(cls, planned, turn, 7, prompts.guess(cls))
            assert line.opens in text
            assert text.endswith(line.closes)
            rest = text.replace(line.opens, "")
            values = itertools.chain.from_iterable(
                (*q.right, *q.others) for x in lines if (q := x.asks) and not q.counts)
            assert not [v for v in values if v in rest]
