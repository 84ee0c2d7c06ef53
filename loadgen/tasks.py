"""What a request asks for, where its answer can be checked: the figures planted into a document,
the tool that is to be called, the schema of a report. Data, and the draw of one request's own."""

from string import Template
from typing import Any, Final, Literal

import numpy as np
from msgspec import Struct

from loadgen import expect, texts
from loadgen.scenario import RequestClass

FACT_TOK: Final = 64  # tokens of a prompt for each figure: it must not be all figures
_SURVEY_CHARS: Final = 1000
_Spoken = Literal["en", "zh"]


class Task(Struct, frozen=True):
    """`ending`: the prompt's instruction. `planted`: sentences that stand in the document, with
    the `facts` that a good answer repeats; `tool`: the one to be called."""

    ending: str
    planted: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    tool: str | None = None


# The texts of these kinds are another one's, but for the instruction.
LIKE: Final[dict[str, Literal["summary", "code", "json", "chat"]]] = {
    "summary": "summary", "code": "code", "json": "json", "chat": "chat", "survey": "summary",
    "profile": "chat", "tools": "chat", "translation": "summary", "longest": "summary",
    "dialogue": "summary"}

PLANTED: Final = {
    "en": ("Key figure: the depot in $city counted $v crates.",
           "Key figure: $person signed for $v litres of fuel.",
           "Key figure: $product answered $v requests on its busiest day.",
           "Key figure: the bridge near $city carried $v cars in the week.",
           "Key figure: the fund of $person paid out $v euros."),
    "zh": ("关键数据：$city仓库共清点$v箱货物。", "关键数据：$person签收了$v升燃油。",
           "关键数据：$product在最忙的一天处理了$v个请求。",
           "关键数据：$city大桥一周通过车辆$v辆。", "关键数据：$person基金支付了$v元。"),
}
TOPICS: Final = {
    "en": ("paged attention and the KV cache in LLM inference", "speculative decoding",
           "quantisation of large language models to 4 bits", "mixture-of-experts routing",
           "vector databases and approximate nearest neighbours", "consensus in replicated logs"),
    "zh": ("大模型推理中的分页注意力与键值缓存", "投机解码技术", "大语言模型的四比特量化",
           "混合专家模型的路由方法", "向量数据库与近似最近邻检索", "分布式日志复制的一致性算法"),
}
PROGRAMS: Final = {
    "en": ("an image classifier in PyTorch: data set, model, training loop, evaluation",
           "a bounded LRU cache with expiry: class, tests, a small benchmark",
           "a command-line tool that merges CSV files by a key, reports conflicts, and its tests",
           "a token-bucket rate limiter: class, an asyncio version, tests"),
    "zh": ("一个 PyTorch 图像分类器：数据集、模型、训练循环和评估",
           "一个带过期时间的有界 LRU 缓存：类、测试和简单的性能测试",
           "一个按键合并 CSV 文件并报告冲突的命令行工具及其测试",
           "一个令牌桶限流器：类、asyncio 版本和测试"),
}
# Instructions with a slot for what was drawn.
ASK: Final[dict[str, dict[str, str]]] = {
    "en": {
        "facts": "Summarise the document above in a few paragraphs. Repeat every line that begins "
                 "with “Key figure” with its number; leave none out.",
        "survey": "Write a technical survey of at least $n characters about $what: background, "
                  "main approaches, how they compare, open problems. Use headings.",
        "python": "Write $what. Give one complete Python module in one fenced block; every "
                  "function has its body, nothing is left out.",
        "json": "Analyse the log above. Answer with one JSON object and nothing else, with the "
                "fields $fields.",
        "profile": "Profile: $person, $n years old, lives in $city, uses $product; likes $likes. "
                   "Turn this profile into one JSON object and nothing else, with the fields "
                   "$fields.",
        "longest": "Write a long and detailed handbook about $what, chapter by chapter. Do not "
                   "stop and do not repeat yourself; go on until you are cut off.",
        "into-zh": "Translate the document above into Chinese. Give the translation only.",
        "into-fr": "Translate the document above into French. Give the translation only.",
    },
    "zh": {
        "facts": "请用几段话总结上面的文档，并逐条写出所有以“关键数据”开头的句子及其数字，"
                 "不要遗漏。",
        "survey": "请写一篇关于$what的技术综述，不少于$n字：背景、主要方法、比较、尚未解决的问题。"
                  "使用小标题。",
        "python": "请编写$what。用一个代码块给出完整的 Python 模块，每个函数都要有实现，不要省略。",
        "json": "请分析上面的日志，只输出一个 JSON 对象，字段为 $fields。",
        "profile": "用户资料：$person，$n岁，住在$city，使用$product，喜欢$likes。请把这份资料"
                   "转换成一个 JSON 对象，只输出 JSON，字段为 $fields。",
        "longest": "请写一本关于$what的详细手册，一章接一章地写下去，不要停，也不要重复，"
                   "直到被截断为止。",
        "into-en": "请把上面的文档翻译成英文，只输出译文。",
        "into-fr": "请把上面的文档翻译成法文，只输出译文。",
    },
}
LIKES: Final = {"en": ("chess and hiking", "music, cooking and cycling", "films"),
                "zh": ("下棋和登山", "音乐、烹饪和骑车", "电影")}

_WORDS: Final = {"type": "string", "minLength": 1, "maxLength": 40}
SCHEMAS: Final[dict[str, dict[str, Any]]] = {
    "json": {
        "type": "object", "additionalProperties": False,
        "required": ["total_events", "errors", "top_action", "services", "severity"],
        "properties": {
            "total_events": {"type": "integer", "minimum": 0, "maximum": 100000},
            "errors": {"type": "integer", "minimum": 0, "maximum": 100000},
            "top_action": _WORDS,
            "services": {"type": "array", "items": _WORDS, "maxItems": 4},
            "severity": {"type": "string", "enum": ["low", "medium", "high"]}}},
    "profile": {
        "type": "object", "additionalProperties": False,
        "required": ["name", "age", "city", "interests", "active"],
        "properties": {
            "name": _WORDS, "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "city": _WORDS, "interests": {"type": "array", "items": _WORDS, "maxItems": 4},
            "active": {"type": "boolean"}}},
}


def _parameters(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False}


# name → (what it does, schema of its arguments)
TOOLS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "get_weather": ("The weather forecast of a city", _parameters(
        city=_WORDS, days={"type": "integer", "minimum": 1, "maximum": 14})),
    "send_mail": ("Sends a mail to a person", _parameters(
        to=_WORDS, subject=_WORDS, urgent={"type": "boolean"})),
    "search_products": ("Products of the shop by name and price", _parameters(
        query=_WORDS, max_price={"type": "number", "minimum": 0, "maximum": 100000},
        sort={"type": "string", "enum": ["price", "rating", "newest"]})),
}
CALLS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "en": (("get_weather", "What will the weather be like in $city over the next $n days?"),
           ("send_mail", "Send $person a mail with the subject “$product”; it is urgent."),
           ("search_products", "Find $product for at most $n euros, the cheapest first.")),
    "zh": (("get_weather", "请查询$city未来$n天的天气。"),
           ("send_mail", "请给$person发一封主题为“$product”的邮件，很紧急。"),
           ("search_products", "请查找价格不超过$n元的$product，按价格排序。")),
}


def draw(cls: RequestClass, prompt_tok: int, rng: np.random.Generator) -> Task | None:
    """What a request of the class asks for. None: its prompt is as ever, and is not drawn here."""
    spoken: _Spoken = cls.language if cls.language != "mixed" else ("en", "zh")[int(
        rng.integers(2))]
    check = cls.validator
    if isinstance(check, expect.Facts):
        return _facts(spoken, min(check.planted, prompt_tok // FACT_TOK), rng)
    if cls.kind == "tools":
        tool, ask = CALLS[spoken][int(rng.integers(len(CALLS[spoken])))]
        return Task(_filled(ask, spoken, rng, n=int(rng.integers(2, 8))), tool=tool)
    if cls.kind == "survey":
        chars = check.min_chars if isinstance(check, expect.LengthOf) else _SURVEY_CHARS
        return Task(_filled(ASK[spoken]["survey"], spoken, rng, n=chars,
                            what=_one(TOPICS[spoken], rng)))
    if cls.kind == "longest":
        return Task(_filled(ASK[spoken]["longest"], spoken, rng, what=_one(TOPICS[spoken], rng)))
    if cls.kind == "translation":
        return Task(ASK[spoken][f"into-{cls.into}"])
    if cls.kind == "code" and isinstance(check, expect.Python):
        return Task(_filled(ASK[spoken]["python"], spoken, rng, what=_one(PROGRAMS[spoken], rng)))
    if cls.kind == "profile" or (cls.kind == "json" and (
            cls.response_format is not None or isinstance(check, expect.Json))):
        return Task(_filled(ASK[spoken][cls.kind], spoken, rng, n=int(rng.integers(18, 80)),
                            likes=_one(LIKES[spoken], rng), fields=_fields(cls)))
    return None


def _facts(spoken: _Spoken, n: int, rng: np.random.Generator) -> Task:
    values = [str(v) for v in rng.choice(90_000, n, replace=False) + 10_000]
    forms = rng.permutation(len(PLANTED[spoken])).tolist()
    return Task(ASK[spoken]["facts"], facts=tuple(values), planted=tuple(
        _filled(PLANTED[spoken][forms[i % len(forms)]], spoken, rng, v=v)
        for i, v in enumerate(values)))


def _filled(text: str, spoken: _Spoken, rng: np.random.Generator, **more: object) -> str:
    return Template(text).safe_substitute(
        person=_one(texts.PEOPLE[spoken], rng), city=_one(texts.CITIES[spoken], rng),
        product=_one(texts.PRODUCTS[spoken], rng), **more)


def _one(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def schema_of(cls: RequestClass) -> dict[str, Any] | None:
    """The JSON schema of the class's answers: its validator's own, else its kind's."""
    check = cls.validator
    if isinstance(check, expect.Json) and check.schema is not None:
        return check.schema
    return SCHEMAS.get(cls.kind)


def _fields(cls: RequestClass) -> str:
    """Names and types, as an instruction tells them."""
    known: dict[str, Any] = (schema_of(cls) or {}).get("properties", {})
    return ", ".join(f'"{name}" ({_type_of(x)})' for name, x in known.items())


def _type_of(x: dict[str, Any]) -> str:
    if "enum" in x:
        return " | ".join(map(str, x["enum"]))
    if x.get("type") == "array":
        return f"array of {x.get('items', {}).get('type', 'any')}"
    return str(x.get("type", "any"))


def offered(cls: RequestClass) -> dict[str, Any]:
    """The tools that a request of the class brings along; they count into its prompt."""
    if cls.kind != "tools":
        return {}
    return {"tools": [{"type": "function", "function": {
        "name": name, "description": does, "parameters": parameters}}
        for name, (does, parameters) in TOOLS.items()]}


def wire(cls: RequestClass, task: Task | None) -> dict[str, Any]:
    """What the request's body says of it, beside the prompt: tools, a forced form."""
    said = offered(cls)
    if cls.kind == "tools":
        named = {"type": "function", "function": {"name": task.tool if task else None}}
        said["tool_choice"] = named if cls.tool_choice == "named" else cls.tool_choice or "auto"
    if cls.response_format == "json_object":
        said["response_format"] = {"type": "json_object"}
    if cls.response_format == "json_schema":
        said["response_format"] = {"type": "json_schema", "json_schema": {
            "name": cls.kind, "strict": True, "schema": schema_of(cls)}}
    return said
