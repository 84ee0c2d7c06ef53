"""Dialogues that tell facts early and ask for them later: about the user, about somebody else, and
about a number that changes on the way. What is told and asked is drawn; nothing of it stands in
the other texts of the prompts, so that an answer can have it only from the dialogue.
"""

from typing import Final, Literal, NamedTuple

import numpy as np
from msgspec import Struct

Spoken = Literal["en", "zh"]
Person = Literal["user", "other"]
ASKING_FRAC: Final = 0.4  # of the turns, the last ones


class Question(Struct, frozen=True):
    """What is asked for. `right`, `others` (the same of the other person) and `before` (what it was
    until it changed) are each ways to say one value; `about`: what its matter is called;
    `other_called`: the other person's names."""

    text: str
    language: Spoken
    subject: Person
    about: tuple[str, ...]
    right: tuple[str, ...]
    others: tuple[str, ...]
    other_called: tuple[str, ...]
    before: tuple[str, ...] = ()
    counts: bool = False  # the value is a number that follows from two others


class Line(Struct, frozen=True):
    """The user's part of one turn: how it begins and how it ends; between them is room for a text
    that has nothing to do with either."""

    opens: str
    closes: str
    asks: Question | None = None


class _Words(NamedTuple):
    """A language's values and sentences."""

    values: dict[str, tuple[str, ...]]
    called: dict[str, tuple[str, ...]]
    relations: tuple[str, ...]
    names: tuple[str, ...]
    things: tuple[str, ...]
    user_is: str
    other_is: str
    has: str
    change: str
    closes: tuple[str, ...]
    asks: dict[tuple[str, Person], str]
    asks_count: str
    counted: tuple[str, ...]


_EN: Final = _Words(
    values={
        "job": ("beekeeper", "locksmith", "violinist", "geologist", "dentist", "florist", "pilot",
                "plumber", "baker", "optician", "surveyor", "shepherd"),
        "town": ("Ghent", "Turku", "Bergen", "Zadar", "Brno", "Uppsala", "Aarhus", "Graz",
                 "Perugia", "Salamanca", "Galway", "Coimbra"),
        "pet": ("parrot", "tortoise", "hedgehog", "rabbit", "canary", "ferret", "iguana",
                "goldfish")},
    called={"job": ("job", "work", "profession", "occupation", "do for a living"),
            "town": ("live", "town", "city", "where"), "pet": ("pet", "animal")},
    relations=("brother", "sister", "cousin", "neighbour"),
    names=("Milo", "Tessa", "Anouk", "Rafe", "Signe", "Bram", "Odile", "Ivo"),
    things=("chairs", "lamps", "tickets", "notebooks", "blankets"),
    user_is="A word about me: I work as a {job}, I live in {town}, and my pet is a {pet}.",
    other_is="My {relation} {name} works as a {job}, lives in {town}, and has a {pet} as a pet.",
    has="By the way, I have {n} {things} to give away.",
    change="This morning I gave {m} of my {things} away.",
    closes=("Please keep in mind what I said about us, and sum up the text in two sentences.",
            "Remember what I told you at the start; then name the text's main point.",
            "Note what I told you. In two sentences: what is the text about?"),
    asks={("job", "user"): "Leave the text aside. What is my own job? Answer in one sentence.",
          ("town", "user"): "Leave the text aside. In which town do I live? Answer in one "
                            "sentence.",
          ("pet", "user"): "Leave the text aside. Which pet do I have? Answer in one sentence.",
          ("job", "other"): "Leave the text aside. What is the job of my {relation}? Answer in "
                            "one sentence.",
          ("town", "other"): "Leave the text aside. In which town does my {relation} live? Answer "
                             "in one sentence.",
          ("pet", "other"): "Leave the text aside. Which pet does my {relation} have? Answer in "
                            "one sentence."},
    asks_count="Leave the text aside. How many {things} do I have left now? Answer in one "
               "sentence.",
    counted=("how many", "number"))

_ZH: Final = _Words(
    values={
        "job": ("养蜂人", "锁匠", "小提琴手", "地质学家", "牙医", "花艺师", "飞行员", "水管工",
                "面包师", "验光师", "测绘员", "牧羊人"),
        "town": ("扬州", "洛阳", "桂林", "绍兴", "泉州", "大理", "喀什", "威海", "丽江", "敦煌",
                 "承德", "景德镇"),
        "pet": ("鹦鹉", "乌龟", "刺猬", "兔子", "金丝雀", "雪貂", "鬣蜥", "金鱼")},
    called={"job": ("职业", "工作", "做什么"), "town": ("住在", "城市", "哪里", "哪座"),
            "pet": ("宠物", "动物")},
    relations=("哥哥", "姐姐", "表弟", "邻居"),
    names=("小满", "阿宁", "立夏", "子墨", "若溪", "思远", "晓棠", "念安"),
    things=("把椅子", "盏台灯", "张门票", "本笔记本", "条毛毯"),
    user_is="先介绍一下我自己：我的职业是{job}，我住在{town}，我的宠物是{pet}。",
    other_is="我的{relation}叫{name}，职业是{job}，住在{town}，养的宠物是{pet}。",
    has="顺便说一下，我有{n}{things}要送人。",
    change="今天早上我送出了其中的{m}{things}。",
    closes=("请记住我说的这些情况，再用两句话概括这段文字。",
            "记住我开头告诉你的内容，然后说出这段文字的要点。",
            "请留意我说的话。用两句话说明：这段文字讲的是什么？"),
    asks={("job", "user"): "先不管这段文字。我自己的职业是什么？请用一句话回答。",
          ("town", "user"): "先不管这段文字。我住在哪座城市？请用一句话回答。",
          ("pet", "user"): "先不管这段文字。我的宠物是什么？请用一句话回答。",
          ("job", "other"): "先不管这段文字。我{relation}的职业是什么？请用一句话回答。",
          ("town", "other"): "先不管这段文字。我{relation}住在哪座城市？请用一句话回答。",
          ("pet", "other"): "先不管这段文字。我{relation}的宠物是什么？请用一句话回答。"},
    asks_count="先不管这段文字。我现在还剩多少{things}？请用一句话回答。",
    counted=("多少", "几"))

_WORDS: Final[dict[Spoken, _Words]] = {"en": _EN, "zh": _ZH}


def write(language: Literal["en", "zh", "mixed"], turns: int,
          rng: np.random.Generator) -> tuple[Line, ...]:
    """A user's part of a dialogue of that many turns (2 or more). Of a mixed class every dialogue
    keeps to one language."""
    spoken: Spoken = language if language != "mixed" else ("en", "zh")[int(rng.integers(2))]
    words = _WORDS[spoken]
    facts, questions = _drawn(spoken, words, rng)
    asking = max(1, round(ASKING_FRAC * turns))
    telling = turns - asking
    told: list[list[str]] = [[] for _ in range(telling)]
    for i, fact in enumerate(facts):  # in their order, over all the turns that tell
        told[i * telling // len(facts)].append(fact)
    gap = "" if spoken == "zh" else " "
    closes = [str(words.closes[int(i)]) for i in rng.integers(len(words.closes), size=telling)]
    order = [questions[int(i)] for i in rng.permutation(len(questions))]
    return (*(Line(gap.join(says), ends) for says, ends in zip(told, closes, strict=True)),
            *(Line("", q.text, q) for q in (order[i % len(order)] for i in range(asking))))


def _drawn(spoken: Spoken, words: _Words,
           rng: np.random.Generator) -> tuple[list[str], list[Question]]:
    """What is told, in order, and all that can be asked for."""
    own, other = {}, {}
    for matter, values in words.values.items():
        first, second = rng.choice(len(values), size=2, replace=False)
        own[matter], other[matter] = values[int(first)], values[int(second)]
    relation, name, things = (_pick(x, rng) for x in (words.relations, words.names, words.things))
    n = int(rng.integers(25, 60))
    m = int(rng.integers(3, 12))
    facts = [words.user_is.format(**own),
             words.other_is.format(relation=relation, name=name, **other),
             words.has.format(n=n, things=things), words.change.format(m=m, things=things)]
    questions = []
    for (matter, subject), text in words.asks.items():
        right, wrong = (own, other) if subject == "user" else (other, own)
        questions.append(Question(
            text.format(relation=relation), spoken, subject, words.called[matter],
            (right[matter],), (wrong[matter],), (relation, name)))
    questions.append(Question(
        words.asks_count.format(things=things), spoken, "user", words.counted,
        number(n - m, spoken), (), (relation, name), number(n, spoken), counts=True))
    return facts, questions


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


_ONES: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
                "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen",
                "seventeen", "eighteen", "nineteen")
_TENS: Final = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_DIGITS: Final = "零一二三四五六七八九"


def number(n: int, spoken: Spoken) -> tuple[str, ...]:
    """The ways to write 0 ≤ n < 100: in digits and in words."""
    tens, ones = divmod(n, 10)
    if spoken == "zh":
        head = "" if tens == 0 else "十" if tens == 1 else f"{_DIGITS[tens]}十"
        return (str(n), head + (_DIGITS[ones] if ones or not tens else ""))
    if n < len(_ONES):
        return (str(n), _ONES[n])
    if not ones:
        return (str(n), _TENS[tens - 2])
    return (str(n), f"{_TENS[tens - 2]}-{_ONES[ones]}", f"{_TENS[tens - 2]} {_ONES[ones]}")
