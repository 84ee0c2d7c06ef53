"""Where requests go, and how its secrets stay out of everything that is written."""

import base64
import re
import shlex
import urllib.parse
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

SECRET_FLAG = re.compile(
    r"--?[\w-]*(key|token|secret|password|auth|credential)[\w-]*", re.IGNORECASE)
NOT_SECRET = re.compile(
    r".*(tokenizer|tokens|token-ids?|max-[\w-]*token|key-?(path|file)).*", re.IGNORECASE)
HIDDEN = "***"


class Trust(Struct, frozen=True):
    """Whom to trust over https, and who we are. Paths of PEM files."""

    ca: str | None = None  # instead of the authorities that the host knows
    insecure: bool = False  # whoever answers
    cert: str | None = None  # our own, for servers that want one …
    key: str | None = None  # … and its key, where that is a file of its own


class Target(Struct, frozen=True):
    """An OpenAI-compatible server. `headers` may hold secrets: `repr` hides them, and nothing
    but the shard's stdin ever gets them."""

    base_url: str  # without /v1 and without a trailing slash
    model: str
    headers: dict[str, str] = {}
    proxy: str | None = None  # http://host:port of an HTTP proxy
    trust: Trust = Trust()

    def __repr__(self) -> str:
        url = _without_password(self.base_url)
        return f"Target({url!r}, {self.model!r}, {len(self.headers)} headers)"

    def scrub(self, text: str) -> str:
        """`text` without this target's secrets: servers repeat keys in their errors."""
        for value in self.headers.values():
            for secret in {value, value.removeprefix("Bearer ")}:
                if len(secret) > 3:
                    text = text.replace(secret, HIDDEN)
        return text

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("base_url", _without_password(self.base_url)), ("model", self.model)]


def base_of(url: str) -> str:
    """`http://host:port` of whatever users give: with or without a trailing slash or /v1."""
    return re.sub(r"(/v1)?/*$", "", url.strip())


def target_of(url: str, model: str) -> Target:
    """The target of a URL. A user and password in it become the header that they stand for."""
    base = base_of(url)
    match = re.match(r"(\w+://)([^/]*)@(.*)", base)
    if match is None:
        return Target(base, model)
    basic = base64.b64encode(urllib.parse.unquote(match[2]).encode()).decode()
    return Target(match[1] + match[3], model, {"Authorization": f"Basic {basic}"})


def without_secrets(command: Sequence[str]) -> list[str]:
    """A command line that may be written down: values of flags that name a secret, values of
    headers, and passwords inside URLs are hidden."""
    shown: list[str] = []
    hide = first = False  # right after a secret flag even a word with one dash is its value
    for word in command:
        flag, eq, _ = word.partition("=")
        secret = _is_secret(flag)
        if hide and not word.startswith("--" if first else "-"):
            shown.append(HIDDEN)
            first = False
            continue  # vLLM takes several keys after one flag
        if secret and eq:
            shown.append(f"{flag}={HIDDEN}")
        else:
            shown.append(_within(word))
        hide = first = secret and not eq
    return shown


def _within(word: str) -> str:
    """A word that may be a command line itself, as that of --server-cmd."""
    try:
        words = shlex.split(word) if " -" in word else [word]
    except ValueError:
        words = [word]
    return shlex.join(without_secrets(words)) if len(words) > 1 else _without_password(word)


def _without_password(url: str) -> str:
    return re.sub(r"(\w+://)[^/\s]*@", rf"\1{HIDDEN}@", url)


def _is_secret(flag: str) -> bool:
    if not flag.startswith("-"):
        return False
    return flag in ("--header", "-H") or (
        SECRET_FLAG.fullmatch(flag) is not None and NOT_SECRET.fullmatch(flag) is None)
