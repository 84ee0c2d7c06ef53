"""Messages between master and workers under a shared token: each carries a MAC of its bytes, its
direction and its place in the session. A forged, replayed or foreign one raises Forged."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from msgspec import Struct

from loadgen import scenario
from loadgen.errors import ScenarioError
from loadgen.hosts.messages import LIMITS, FromMaster, FromWorker, Hello, Message, Refused, Welcome

TOKEN = "LOADGEN_FLEET_TOKEN"
MIN_TOKEN = 16
Side = Literal["worker", "master"]
M = TypeVar("M", bound=Message)


class Forged(Exception):
    """Bytes that this token did not seal, or not for this session."""


class _Sealed(Struct, frozen=True, array_like=True):
    """`n` 0 stands outside of a session: a greeting and its answer."""

    n: int
    body: bytes
    mac: bytes


_encode = msgspec.msgpack.Encoder(enc_hook=scenario.enc_hook).encode
_outer = msgspec.msgpack.Decoder(_Sealed).decode
_inner = {"worker": msgspec.msgpack.Decoder(FromWorker, dec_hook=scenario.dec_hook).decode,
          "master": msgspec.msgpack.Decoder(FromMaster, dec_hook=scenario.dec_hook).decode}


def token_of(path: str | None) -> str | None:
    """The token of this host, from a file or the environment; None: there is none. Raises
    ScenarioError."""
    token = os.environ.get(TOKEN, "")
    if path:
        try:
            token = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise ScenarioError(f"--fleet-token-file {path}: cannot be read: {e}") from e
    if token and len(token) < MIN_TOKEN:
        raise ScenarioError(f"the fleet's token has {len(token)} characters; give at least "
                            f"{MIN_TOKEN} (`openssl rand -hex 16` makes one)")
    return token or None


def fingerprint(token: str, secret: str) -> str:
    """Tells secrets apart without showing them; "" of none."""
    return _mac(token.encode(), "key", 0, secret.encode()).hex()[:16] if secret else ""


class Seal:
    """One side's seal. Greetings are sealed by the token itself, the rest by a session's key."""

    def __init__(self, token: str, side: Side) -> None:
        self._token, self._side = token.encode(), side
        self._from: Side = "master" if side == "worker" else "worker"
        self._key: bytes | None = None
        self._sent = self._seen = 0

    def agree(self, hello: bytes, welcome: bytes) -> None:
        """Both nonces are known: the session begins."""
        self._key = _mac(self._token, "session", 0, hello + welcome)
        self._sent = self._seen = 0

    def close(self, message: Message) -> bytes:
        body = _encode(message)
        limit = LIMITS[type(message).__name__]
        if len(body) > limit:
            raise ValueError(f"{type(message).__name__} of {len(body)} bytes; at most {limit}")
        if isinstance(message, Hello | Welcome | Refused):
            return _encode(_Sealed(0, body, _mac(self._token, self._side, 0, body)))
        if self._key is None:
            raise ValueError(f"{type(message).__name__} before a session")
        self._sent += 1
        return _encode(_Sealed(self._sent, body, _mac(self._key, self._side, self._sent, body)))

    def open(self, data: object) -> Message:
        """Raises Forged."""
        if not isinstance(data, bytes) or len(data) > max(LIMITS.values()) + 256:
            raise Forged("no sealed message")
        try:
            outer = _outer(data)
        except msgspec.DecodeError as e:
            raise Forged("no sealed message") from e
        key = self._key if outer.n else self._token
        if key is None or not hmac.compare_digest(
                outer.mac, _mac(key, self._from, outer.n, outer.body)):
            raise Forged("sealed with another token, or for another session")
        if outer.n and outer.n <= self._seen:
            raise Forged("seen before")
        try:
            message: Message = _inner[self._from](outer.body)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError, ScenarioError) as e:
            raise Forged(f"no message of this fleet: {e}") from e
        if bool(outer.n) == isinstance(message, Hello | Welcome | Refused) or (
                len(outer.body) > LIMITS[type(message).__name__]):
            raise Forged(f"a {type(message).__name__} out of place or too large")
        self._seen = outer.n or self._seen
        return message


def nonce() -> bytes:
    return secrets.token_bytes(16)


def _mac(key: bytes, side: str, n: int, body: bytes) -> bytes:
    return hmac.digest(key, b"%s %d " % (side.encode(), n) + body, hashlib.sha256)
