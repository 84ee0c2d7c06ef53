"""Addresses as users write them, and secrets that stay out of what is written down."""

from typing import Any

import pytest

from loadgen.target import HIDDEN, Target, base_of, without_secrets

BASE = "http://127.0.0.1:8000"


@pytest.mark.parametrize("given", [
    BASE, f"{BASE}/", f"{BASE}//", f"{BASE}/v1", f"{BASE}/v1/", f"{BASE}/v1//", f"  {BASE}/v1\n"])
def test_the_base_is_what_stands_before_v1(given: Any) -> None:
    assert base_of(given) == BASE


@pytest.mark.parametrize(("given", "base"), [
    ("https://host/openai/v1", "https://host/openai"), ("https://host/v1beta", "https://host/v1beta"),
    ("https://host/v1/proxy", "https://host/v1/proxy"),
    ("https://host/llm", "https://host/llm"), ("http://[::1]:8000/v1", "http://[::1]:8000")])
def test_other_paths_are_kept(given: Any, base: Any) -> None:
    assert base_of(given) == base


def test_a_base_is_its_own_base() -> None:
    assert base_of(base_of("http://h/v1/")) == "http://h"


SECRET = "s3cr3t"


@pytest.mark.parametrize("command", [
    ["--api-key", SECRET], [f"--api-key={SECRET}"], ["--api_key", SECRET], ["--API-KEY", SECRET],
    ["-api-key", SECRET], ["--hf-token", SECRET], [f"--hf-token={SECRET}"], ["--token", SECRET],
    ["--header", f"Authorization: Bearer {SECRET}"], [f"--header=Authorization: Bearer {SECRET}"],
    ["-H", f"X-Key: {SECRET}"], ["--password", SECRET], ["--client-secret", SECRET],
    ["--basic-auth", SECRET], ["--credentials", SECRET], ["--api-key", f"-{SECRET}"],
    ["--openai-api-key", SECRET], [f"http://user:{SECRET}@host:8000/v1"],
    [f"--base-url=https://user:{SECRET}@host/v1"], ["--base-url", f"https://:{SECRET}@host"],
    [f"http://{SECRET}@host:8000"], [f"http://u:p@{SECRET}@host"],
    ["--api-key", "first", SECRET],  # vLLM takes several
])
def test_a_secret_is_hidden_and_what_surrounds_it_is_not(command: Any) -> None:
    shown = without_secrets(["loadgen", "serve", "--port", "8000", *command, "--seed", "7"])
    assert SECRET not in " ".join(shown)
    assert HIDDEN in " ".join(shown)
    assert shown[:4] == ["loadgen", "serve", "--port", "8000"]
    assert shown[-2:] == ["--seed", "7"]
    assert len(shown) == 6 + len(command)


def test_the_name_of_a_hidden_flag_stays() -> None:
    assert without_secrets(["--api-key=a", "--api-key", "b", "-H", "c: d"]) == [
        f"--api-key={HIDDEN}", "--api-key", HIDDEN, "-H", HIDDEN]
    assert without_secrets(["http://u:p@h:1/v1"]) == [f"http://{HIDDEN}@h:1/v1"]


def test_a_flag_after_a_secret_flag_is_no_secret() -> None:
    assert without_secrets(["--api-key", "--model", "qwen"]) == ["--api-key", "--model", "qwen"]


@pytest.mark.parametrize("command", [
    ["--tokenizer", "Qwen/Qwen2.5-7B"], ["--tokenizer=Qwen/Qwen2.5-7B"],
    ["--tokenizer-mode", "slow"], ["--max-num-batched-tokens", "8192"],
    ["--max-num-batched-tokens=8192"], ["--max-tokens", "64"], ["--num-prompts", "9"],
    ["--stop-token-ids", "7"], ["--ssl-keyfile", "/etc/key.pem"], ["--model", "keyword"],
    ["key", "token"], ["http://host:8000/v1"], ["http://host/a:b@c"], ["user@host:/path"],
    ["--slo", "ttft:1000"], ["--keep-going", "x"], ["--max-model-len", "4096"], []])
def test_what_is_no_secret_is_shown(command: Any) -> None:
    assert without_secrets(command) == command


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r}".format])
def test_a_target_shows_no_header(show: Any) -> None:
    target = Target(BASE, "qwen", {"Authorization": f"Bearer {SECRET}"})
    assert SECRET not in show(target)
    assert SECRET not in show([target])
    assert BASE in show(target)
    assert "1 header" in show(target)


def test_rich_shows_no_header_either() -> None:
    from rich import pretty

    shown = pretty.pretty_repr(Target(BASE, "qwen", {"Authorization": f"Bearer {SECRET}"}))
    assert SECRET not in shown


def test_a_target_shows_no_password_of_its_url() -> None:
    assert SECRET not in repr(Target(f"https://user:{SECRET}@host", "qwen"))
