"""What a run needs beside its load, in a process of its own, for callers without an asyncio loop
(Locust's processes run on gevent): is the server ready, how long are prompts in its tokens, is it
still healthy; and its telemetry while the load runs.

    stdin   Setup, then Ask("ready") … Ask("watch") … Ask("health"), each a JSON line
    stdout  one Answer per Ask, each a JSON line

It ends with its stdin, and dies with its parent.
"""

import asyncio
import os
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from loadgen import calibrate, child, scenario
from loadgen.errors import LoadgenError, ServerError
from loadgen.prompts import Ratio
from loadgen.scenario import Scenario
from loadgen.store import RunFolder
from loadgen.target import Target
from loadgen.telemetry import gpu
from loadgen.telemetry import server as watch
from loadgen.watch import Watcher


class Setup(Struct, frozen=True):
    """The first line on stdin. A target without a model asks for the server's only one."""

    scenario: dict[str, Any]
    target: Target
    seed: int
    parent_pid: int


class Ask(Struct, frozen=True, omit_defaults=True):
    """ready: wait for a streamed answer, then calibrate. watch: keep telemetry in the run folder
    from now on. health: is the server alive?"""

    do: Literal["ready", "watch", "health"]
    patience_s: float = 60.0
    folder: str = ""
    simulated: bool = False


class Answer(Struct, frozen=True, omit_defaults=True):
    """`failed`: why the server cannot be used or is dead; `unreachable`: it is the server that
    failed, not what was asked of it."""

    model: str = ""
    ratios: dict[str, Ratio] = {}
    context_tok: int | None = None
    failed: str | None = None
    unreachable: bool = False


class _Attendant:
    def __init__(self, setup: Setup) -> None:
        self._mix: Scenario = scenario.parse(setup.scenario, "setup")
        self._target, self._seed = setup.target, setup.seed
        self._watching: asyncio.Task[None] | None = None

    async def answer(self, ask: Ask) -> Answer:
        try:
            if ask.do == "ready":
                return await self._ready(ask.patience_s)
            if ask.do == "health":
                why = await watch.is_healthy(self._target)
                return Answer(failed=why, unreachable=why is not None)
            if self._watching is not None:
                self._watching.cancel()
            watcher = Watcher(say=lambda text: None)
            watcher.opened(RunFolder(Path(ask.folder)))
            self._watching = asyncio.create_task(
                watcher.watch(self._target, ask.simulated, gpu.is_here(self._target.base_url)))
            return Answer()
        except LoadgenError as e:
            return Answer(failed=str(e), unreachable=isinstance(e, ServerError))

    async def _ready(self, patience_s: float) -> Answer:
        target = self._target
        if not target.model:
            model = await calibrate.the_model(target)
            self._target = target = msgspec.structs.replace(target, model=model)
        await calibrate.wait_ready(target, self._mix, lambda: None, patience_s)
        ratios = await calibrate.ratios(target, self._mix, self._seed)
        return Answer(model=target.model, ratios=ratios,
                      context_tok=await calibrate.context_tok(target))


_decode_ask = msgspec.json.Decoder(Ask).decode
_encode = msgspec.json.Encoder().encode


async def _main(lines: asyncio.StreamReader) -> None:
    setup = msgspec.json.decode(await lines.readline(), type=Setup)
    child.die_with_parent(setup.parent_pid)
    attendant = _Attendant(setup)
    while line := await lines.readline():
        os.write(1, _encode(await attendant.answer(_decode_ask(line))) + b"\n")


def main() -> None:
    child.run(_main)


if __name__ == "__main__":
    main()
