"""From what was asked to a server that answers: composition for a test of Locust's."""

import secrets
import shlex
import tempfile
from datetime import datetime
from pathlib import Path

import msgspec

from loadgen.attend import Ask
from loadgen.errors import ScenarioError, ServerError
from loadgen.fleet.attendant import Attendant
from loadgen.fleet.options import Asked
from loadgen.fleet.run import Prepared
from loadgen.judge import Criteria
from loadgen.target import Target, target_of
from servers.base import Server
from servers.remote import RemoteServer
from servers.sim.launch import SimServer

PATIENCE_S = 60.0


def start_simulator(options: str) -> tuple[SimServer, Path]:
    """The embedded default, for a test without --host; its log goes on over all tests of this
    Locust. Raises ScenarioError, ServerError."""
    try:
        words = shlex.split(options)
    except ValueError as e:
        raise ScenarioError(f"--server-options {options!r}: {e}") from e
    log = Path(tempfile.mkdtemp(prefix="loadgen-")) / "server.log"
    server = SimServer(words, log)
    server.start()
    return server, log


def server_of(host: str, own: Server | None, own_url: str | None) -> tuple[Server, Target]:
    """The server at `host`: our own, or one that runs already."""
    if own is not None and host.rstrip("/") == own_url:
        return own, own.start() if own.alive() else _target(own)
    if not host.startswith(("http://", "https://")):
        raise ScenarioError(f"host {host!r}: write it with its scheme, as http://127.0.0.1:8000")
    target = target_of(host, "")
    return RemoteServer(target), target


def _target(own: Server) -> Target:
    return own.target if isinstance(own, SimServer) else own.start()


def prepare(asked: Asked, server: Server, target: Target,
            patience_s: float = PATIENCE_S) -> tuple[Prepared, Attendant]:
    """Waits until the server has streamed an answer, and measures how long prompts are there.
    Raises ScenarioError, ServerError."""
    headers = {**target.headers}
    if asked.api_key:
        headers["Authorization"] = f"Bearer {asked.api_key}"
    target = msgspec.structs.replace(target, headers=headers, model=asked.model or target.model)
    seed = asked.seed if asked.seed is not None else secrets.randbelow(2**31)
    attendant = Attendant(asked.scenario, target, seed)
    answer = None
    try:
        answer = attendant.ask(Ask("ready", patience_s=patience_s), server.alive)
    finally:
        if answer is None or answer.failed is not None:
            attendant.close()
    if answer.failed is not None:
        raise (ServerError if answer.unreachable else ScenarioError)(target.scrub(answer.failed))
    target = msgspec.structs.replace(target, model=answer.model)
    return Prepared(asked.scenario, target, answer.ratios, Criteria(target=asked.target), seed,
                    answer.context_tok), attendant


def folder_of(asked: Asked, nth: int) -> Path:
    """The run folder of this Locust's nth test (from 0)."""
    if asked.out is not None:
        return asked.out if nth == 0 else asked.out.with_name(f"{asked.out.name}-{nth + 1}")
    now = datetime.now().astimezone()
    return Path("runs") / f"{now:%Y%m%d-%H%M%S}-{asked.scenario.name}"
