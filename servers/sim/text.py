"""Tokens without a tokenizer: one rule that cuts text into pieces, and words that obey it.

A piece is up to 6 letters with the space before them, up to 3 digits, one or two Chinese characters
(those of the lower code points take their successor along: about 0.7 tokens per character), a run
of white space, or any other character. Answers are made of words that are one piece each, so that
an answer's text has as many tokens as were counted.
"""

import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType

from servers.sim.costs import BLOCK_TOK

_PIECE = re.compile(r" ?[A-Za-zÀ-ɏ]{1,6}|\d{1,3}|[\u4e00-\u65ff][\u4e00-\u9fff]|\s+|.")
_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_TOOLS = ("\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou "
          "are provided with function signatures within <tools></tools> XML tags:\n<tools>\n")
_CALL_THEM = ("\n</tools>\n\nFor each function call, return a json object with function name and "
              "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
              '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')

_ENGLISH = """able about after again and answer any area base below black book both build call case
 clear code cost data each early end every fact few field file first form free from full given good
 great group hand high house idea into item just keep kind last later level light line list long
 made main many mean might model more most name need never next note number often once open order
 other over part place plain point public read real result right same school second set short side
 simple since small some state step still such sum table take task term test than that then there
 time total true type under unit use value very view water when where while work world year"""
_CHINESE = """不同 专家 世界 中心 人们 今天 任务 企业 但是 作为 使用 信息 全部 公司 关于 内容
 分析 列表 功能 包括 历史 参数 发展 可以 各种 同时 名称 因为 国家 地方 城市 处理
 大家 如果 学习 完成 实现 对于 小组 工作 已经 市场 平均 年度 并且 应用 建议 开始
 当前 形式 必须 性能 情况 意见 所有 打开 技术 报告 接口 提高 支持 方法 时间"""
WORDS = tuple([f" {w}" for w in _ENGLISH.split()] + _CHINESE.split())
_ORDER = random.Random(0).choices(range(len(WORDS)), k=4096)  # looked up: cheaper than drawn


def pieces(text: str, most: int | None = None) -> list[str]:
    """`most`: no more than so many are cut off."""
    if most is None or len(text) <= most:
        return _PIECE.findall(text)
    return [m.group() for m in islice(_PIECE.finditer(text), most)]


def chat_pieces(messages: Sequence[Mapping[str, object]], tools: str = "",
                most: int | None = None) -> list[str]:
    """The conversation in Qwen's chat template, ready for the assistant's answer; `most` pieces
    at most."""
    turns = [(str(m.get("role", "")), _content(m.get("content"))) for m in messages]
    if turns and turns[0][0] != "system":
        turns.insert(0, ("system", _SYSTEM))
    if tools:
        turns[0] = (turns[0][0], f"{turns[0][1]}{_TOOLS}{tools}{_CALL_THEM}")
    out: list[str] = []
    for role, content in turns:
        out += ("<|im_start|>", role, "\n", *pieces(content, most), "<|im_end|>", "\n")
        if most is not None and len(out) > most:
            return out[:most]
    return [*out, "<|im_start|>", "assistant", "\n"]


def _content(content: object) -> str:
    """A message's text, also of one given in parts."""
    if isinstance(content, list):
        return "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    return content if isinstance(content, str) else ""


def token_ids(tokens: Sequence[str | int], vocab: int) -> list[int]:
    return [t if isinstance(t, int) else zlib.crc32(t.encode(errors="replace")) % vocab
            for t in tokens]


def detokenized(ids: Sequence[int], known: Mapping[int, str] = MappingProxyType({})) -> str:
    """Ids are hashes: those in `known` have their text back, others stand for some word."""
    return "".join(known.get(i) or WORDS[i % len(WORDS)] for i in ids)


def block_hashes(tokens: Sequence[str | int]) -> list[int]:
    """A hash per full block, chained: equal ones stand for equal prefixes (in this process)."""
    out, h = [], 0
    for end in range(BLOCK_TOK, len(tokens) + 1, BLOCK_TOK):
        h = hash((h, *tokens[end - BLOCK_TOK:end]))
        out.append(h)
    return out


def words(seed: int) -> Iterator[int]:
    """Endless indices into WORDS; the same ones for the same seed."""
    while True:
        yield _ORDER[seed % len(_ORDER)]
        seed += 1
