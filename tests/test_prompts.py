"""Prompt texts: length, uniqueness, shared prefixes, and the fit of characters to tokens."""

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loadgen import prompts, texts
from loadgen.prompts import Kind, Language, Ratio
from loadgen.scenario import RequestClass, SharedPrefix

KINDS: tuple[Kind, ...] = ("summary", "code", "json", "chat")
LANGUAGES: tuple[Language, ...] = ("en", "zh", "mixed")
ALL = list(itertools.product(KINDS, LANGUAGES))
NONCE = "k3f9a2c1"
ROOT = Path(__file__).resolve().parent.parent


def cls(kind: Kind = "summary", language: Language = "en", shared_tok: int = 0) -> RequestClass:
    return RequestClass(
        name="a", kind=kind, language=language, prompt_tok=10_000, output_tok=5,
        shared_prefix=SharedPrefix(tokens=shared_tok) if shared_tok else None)


def text(c: RequestClass, tok: int, seed: int = 1, nonce: str = NONCE,
         prefix: tuple[int, ...] | None = None, ratio: Ratio | None = None) -> str:
    rng = np.random.default_rng(seed)
    return prompts.build(c, tok, ratio or prompts.guess(c), rng, nonce, prefix)


def count(chars: int, ratio: Ratio) -> int:
    """A tokenizer of known behaviour."""
    return math.ceil(ratio.overhead_tok + math.ceil(chars / ratio.chars_per_tok))


def chinese_frac(s: str) -> float:
    """Of what is a letter."""
    letters = [ch for ch in s if ch.isalpha()]
    return sum("\u4e00" <= ch <= "\u9fff" for ch in letters) / len(letters)


def instructions(kind: Kind, language: Language) -> tuple[str, ...]:
    return prompts._bank(kind, language).endings


# --------------------------------------------------------------------------------------- length


@pytest.mark.parametrize(("kind", "language"), ALL)
@pytest.mark.parametrize("tok", [100, 257, 1000, 8000])
def test_prompt_has_the_wanted_length_and_a_whole_instruction(
    kind: Kind, language: Language, tok: int
) -> None:
    c = cls(kind, language)
    for seed in range(20):
        prompt = text(c, tok, seed)
        assert abs(len(prompt) - (tok - 10) * prompts.guess(c).chars_per_tok) <= 1
        assert prompt.endswith(tuple("\n\n" + i for i in instructions(kind, language)))


@pytest.mark.parametrize("ratio", [
    Ratio(4.3, 0, "guess"), Ratio(1.5, 31, "usage"), Ratio(3.1, 4, "tokenize")], ids=str)
@pytest.mark.parametrize("tok", [100, 300, 2048, 8000])
def test_known_tokenizer_counts_the_wanted_tokens(ratio: Ratio, tok: int) -> None:
    for kind, language in ALL:
        prompt = text(cls(kind, language), tok, ratio=ratio)
        assert count(len(prompt), ratio) == pytest.approx(tok, rel=0.08)


@pytest.mark.parametrize(("kind", "language"), ALL)
def test_tiny_prompt_is_nonce_and_a_few_words_and_grows_with_its_length(
    kind: Kind, language: Language
) -> None:
    c, floor = cls(kind, language), len(f"[{NONCE}] ") + 10
    for ratio in (prompts.guess(c), Ratio(4.3, 0, "usage"), Ratio(1.0, 40, "usage")):
        for tok in range(1, 60):
            prompt = text(c, tok, seed=tok, ratio=ratio)
            assert prompt.startswith(f"[{NONCE}] ")
            assert len(prompt) > len(f"[{NONCE}] ")
            wanted = (tok - ratio.overhead_tok) * ratio.chars_per_tok
            assert len(prompt) <= max(floor, wanted + 1)


def test_very_long_prompt_is_built_whole() -> None:
    assert len(text(cls(), 131_072)) == pytest.approx(131_062 * 4.3, abs=1)


# -------------------------------------------------------------------------- seeds and uniqueness


@pytest.mark.parametrize(("kind", "language"), ALL)
def test_same_seed_and_nonce_give_the_same_text(kind: Kind, language: Language) -> None:
    c = cls(kind, language)
    assert text(c, 500) == text(c, 500)
    assert text(c, 500) != text(c, 500, seed=2)


def test_every_process_builds_the_same_texts() -> None:
    """Shards are processes with hash seeds of their own, and share prefixes all the same."""
    code = ("import sys; sys.path.insert(0, 'tests'); import test_prompts as t; "
            "print([t.text(t.cls(k, lang, 400), 900, prefix=(3,)) for k, lang in t.ALL])")
    runs = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True,
                           env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT),
                                             "PYTHONIOENCODING": "utf-8"},
                           encoding="utf-8", stdout=subprocess.PIPE).stdout
            for seed in ("1", "2", "3")}
    assert len(runs) == 1


@pytest.mark.parametrize(("kind", "language"), ALL)
def test_prompts_with_different_nonces_differ_within_the_first_16_characters(
    kind: Kind, language: Language
) -> None:
    starts = {text(cls(kind, language), 200, nonce=f"{i:08x}")[:16] for i in range(50)}
    assert len(starts) == 50


def test_nonce_that_is_too_long_for_the_first_tokens_is_a_bug() -> None:
    with pytest.raises(ValueError, match="longer than 9"):
        text(cls(), 100, nonce="0123456789")


@pytest.mark.parametrize(("kind", "language"), ALL)
def test_texts_of_two_requests_differ_throughout(kind: Kind, language: Language) -> None:
    one, two = (text(cls(kind, language), 2000, seed) for seed in (1, 2))
    lines = [{s for s in t.split("\n") if re.search(r"\d{2}", s)} for t in (one, two)]
    assert len(lines[0] & lines[1]) <= 0.05 * len(lines[0])


# --------------------------------------------------------------------------------- shared prefix


@pytest.mark.parametrize(("kind", "language"), ALL)
def test_shared_prefix_is_the_same_for_equal_ids_and_of_the_right_length(
    kind: Kind, language: Language
) -> None:
    c = cls(kind, language, 600)
    chars = round(600 * prompts.guess(c).chars_per_tok)
    one, two = (text(c, 1000, seed, f"{seed:08x}", prefix=(7,)) for seed in (1, 2))
    other = text(c, 1000, 1, prefix=(8,))
    assert one[:chars] == two[:chars]
    assert one[: chars + 3] == two[:chars] + "\n\n["
    assert one[chars + 3 : chars + 11] == "00000001"
    assert other[:chars] != one[:chars]
    assert len(one) == pytest.approx(990 * prompts.guess(c).chars_per_tok, abs=1)
    assert one.endswith(instructions(kind, language))


def test_prefixes_of_several_ids_share_what_their_first_ids_stand_for() -> None:
    ratio = Ratio(4.0, 0, "guess")
    one = text(cls(shared_tok=3 * 512), 3000, prefix=(1, 2, 3), ratio=ratio)
    two = text(cls(shared_tok=2 * 512), 3000, seed=9, prefix=(1, 2), ratio=ratio)
    assert one[: 2 * 2048] == two[: 2 * 2048]
    assert one[2 * 2048 : 2 * 2048 + 100] != two[2 * 2048 : 2 * 2048 + 100]


def test_prompt_drawn_shorter_than_its_prefix_keeps_length_nonce_and_instruction() -> None:
    c = cls(shared_tok=600)
    short, long = text(c, 300, prefix=(7,)), text(c, 1000, prefix=(7,))
    assert len(short) == pytest.approx(290 * 4.3, abs=1)
    assert f"[{NONCE}] " in short
    assert short.endswith(instructions("summary", "en"))
    assert short[:800] == long[:800]
    for tok in range(1, 30):
        assert text(c, tok, prefix=(7,)).startswith(f"[{NONCE}] ")


@pytest.mark.parametrize(("shared_tok", "prefix"), [(0, (7,)), (600, None), (600, ())])
def test_without_a_prefix_the_nonce_comes_first(
    shared_tok: int, prefix: tuple[int, ...] | None
) -> None:
    assert text(cls(shared_tok=shared_tok), 1000, prefix=prefix).startswith(f"[{NONCE}] ")


# ------------------------------------------------------------------------------ kind and language


@pytest.mark.parametrize(("kind", "language", "least", "most"), [
    ("summary", "en", 0, 0), ("summary", "zh", 0.95, 1), ("summary", "mixed", 0.1, 0.6),
    ("chat", "en", 0, 0), ("chat", "zh", 0.95, 1), ("chat", "mixed", 0.1, 0.6),
    ("json", "en", 0, 0), ("json", "zh", 0.5, 1), ("code", "en", 0, 0), ("code", "zh", 0.05, 1)])
def test_text_is_in_its_language(kind: Kind, language: Language, least: float, most: float) -> None:
    prompt = text(cls(kind, language), 4000)
    assert least <= chinese_frac(prompt.partition("] ")[2]) <= most


@pytest.mark.parametrize("language", LANGUAGES)
def test_json_task_names_its_fields(language: Language) -> None:
    for seed in range(10):
        last = text(cls("json", language), 300, seed).rpartition("\n\n")[2]
        assert "JSON" in last
        assert all(f'"{field}"' in last for field in texts.JSON_FIELDS)


@pytest.mark.parametrize("language", LANGUAGES)
def test_stamps_of_log_lines_ascend(language: Language) -> None:
    stamps = [int(s) for s in re.findall(r"^(\d{10}) ", text(cls("json", language), 4000), re.M)]
    assert len(stamps) > 50
    assert stamps == sorted(set(stamps))


@pytest.mark.parametrize(("kind", "language"), ALL)
def test_no_slot_is_left_unfilled(kind: Kind, language: Language) -> None:
    slots = r"\$\{?(n|k|u|person|city|product|noun|comment)\b|%"
    assert re.search(slots, text(cls(kind, language), 50_000)) is None


# --------------------------------------------------------------------------------- characters/token


@pytest.mark.parametrize("known", [
    Ratio(4.3, 10, "usage"), Ratio(1.5, 31, "usage"), Ratio(3.0, 0, "usage"),
    Ratio(0.4, 5, "usage")], ids=str)
def test_fit_recovers_a_known_ratio(known: Ratio) -> None:
    samples = [(n, count(n, known)) for n in (150, 400, 900, 2500, 8000)]
    fitted = prompts.fit(samples, "usage")
    assert fitted.chars_per_tok == pytest.approx(known.chars_per_tok, rel=0.02)
    assert fitted.overhead_tok == pytest.approx(known.overhead_tok, abs=2)
    assert fitted.source == "usage"


@pytest.mark.parametrize("samples", [
    [(1000, 260)], [(1000, 260)] * 5, [(1000, 258), (1001, 262), (1003, 259)]], ids=str)
def test_fit_of_one_length_goes_through_the_guessed_overhead(
    samples: list[tuple[int, int]]
) -> None:
    fitted = prompts.fit(samples, "tokenize")
    assert fitted.overhead_tok == prompts.GUESS_OVERHEAD_TOK
    assert fitted.chars_per_tok == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("samples", [
    [(1, 1)], [(3, 10)], [(100, 5)] * 3, [(100, 300), (1000, 200)], [(100, 1), (1000, 999)],
    [(0, 10), (400, 110)], [(100, 0), (400, 110)], [(100, 50), (200, 50), (300, 50)],
    [(1, 1_000_000), (1_000_000, 1)]], ids=str)
def test_fit_of_odd_samples_is_still_usable(samples: list[tuple[int, int]]) -> None:
    fitted = prompts.fit(samples, "usage")
    assert 0 < fitted.chars_per_tok < math.inf
    assert 0 <= fitted.overhead_tok < min(t for n, t in samples if n and t)


@pytest.mark.parametrize("samples", [[], [(0, 0)], [(100, 0)]], ids=str)
def test_fit_without_any_count_is_refused(samples: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="guess"):
        prompts.fit(samples, "usage")


@pytest.mark.parametrize("kind", KINDS)
def test_guess_puts_the_mix_between_the_languages(kind: Kind) -> None:
    en, zh, mixed = (prompts.guess(cls(kind, x)).chars_per_tok for x in ("en", "zh", "mixed"))
    assert zh < mixed < en
