"""`/sim/…`: what no vLLM has. The GPUs that are played, and the faults, which can be changed while
the server runs: `curl -X POST :8000/sim/faults -d '{"faults": ["die@1"]}'`."""

import json
from collections.abc import Callable

from aiohttp import web

from servers.sim import errors, faults
from servers.sim.doors import json_bytes


class Admin:
    def __init__(self, state: faults.Faults, gpus: Callable[[], object]) -> None:
        self._faults, self._gpus = state, gpus

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/sim/gpu", self._gpu), web.get("/sim/faults", self._show),
                web.post("/sim/faults", self._set), web.delete("/sim/faults", self._clear)]

    async def _gpu(self, _request: web.Request) -> web.Response:
        return json_bytes(errors.dumps(self._gpus()))

    async def _show(self, _request: web.Request) -> web.Response:
        kinds = faults.ENGINE_KINDS | faults.SERVER_KINDS | faults.REQUEST_KINDS
        return json_bytes(errors.dumps({"faults": [str(f) for f in self._faults.all],
                                        "known": kinds}))

    async def _set(self, request: web.Request) -> web.Response:
        """Replaces all faults by those given."""
        try:
            asked = json.loads(await request.read())["faults"]
            found = [faults.parse_profile(str(f)) for f in list(asked)]
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise errors.Refused(400, f"write {{\"faults\": [\"oom@32\", …]}}: {e}") from None
        self._faults.set(found)
        return await self._show(request)

    async def _clear(self, request: web.Request) -> web.Response:
        self._faults.set(())
        return await self._show(request)
