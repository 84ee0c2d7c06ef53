"""Where requests go, and how its secrets stay out of everything that is written."""

import re
from collections.abc import Sequence

from msgspec import Struct

SECRET_FLAG = re.compile(
    r"--?[\w-]*(key|token|secret|password|auth|credential)[\w-]*", re.IGNORECASE)
NOT_SECRET = re.compile(
    r".*(tokenizer|tokens|token-ids?|max-[\w-]*token|key-?(path|file)).*", re.IGNORECASE)
HIDDEN = "***"


class Target(Struct, frozen=True):
    """An OpenAI-compatible server. `headers` may hold secrets: `repr` hides them, and nothing
    but the shard's stdin ever gets them."""

    base_url: str  # without /v1 and without a trailing slash
    model: str
    headers: dict[str, str] = {}
    verify_tls: bool = True

    def __repr__(self) -> str:
        return f"Target({self.base_url!r}, {self.model!r}, {len(self.headers)} headers)"


def base_of(url: str) -> str:
    """`http://host:port` of whatever users give: with or without a trailing slash or /v1."""
    return re.sub(r"(/v1)?/*$", "", url.strip())


def without_secrets(command: Sequence[str]) -> list[str]:
    """A command line that may be written down: values of flags that name a secret, values of
    headers, and passwords inside URLs are hidden."""
    shown, hide = [], False
    for word in command:
        flag, eq, _ = word.partition("=")
        secret = _is_secret(flag)
        if hide and not word.startswith("--"):
            shown.append(HIDDEN)
        elif secret and eq:
            shown.append(f"{flag}={HIDDEN}")
        else:
            shown.append(re.sub(r"(\w+://[^/@:\s]*):[^/@\s]*@", rf"\1:{HIDDEN}@", word))
        hide = secret and not eq
    return shown


def _is_secret(flag: str) -> bool:
    if not flag.startswith("-"):
        return False
    return flag in ("--header", "-H") or (
        SECRET_FLAG.fullmatch(flag) is not None and NOT_SECRET.fullmatch(flag) is None)
