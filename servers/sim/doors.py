"""What stands before the API: a reverse proxy that limits clients, a start-up that is not over,
the API key, and vLLM's words for every error."""

from collections import OrderedDict
from collections.abc import Awaitable, Callable

from aiohttp import web

from servers.sim import errors, faults
from servers.sim.log import log_exception
from servers.sim.visits import Visits

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

BURST = 4
_CLIENTS = 10_000  # remembered by the throttle


class Throttle:
    """nginx's `limit_req rate=R burst=4 nodelay`: a leaky bucket per client."""

    def __init__(self) -> None:
        self._excess: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (requests, s)

    def lets(self, client: str, rate_rps: float, now_s: float) -> bool:
        excess, since_s = self._excess.pop(client, (-1.0, now_s))
        excess = max(0.0, excess - rate_rps * (now_s - since_s) + 1.0)
        passes = excess <= BURST
        self._excess[client] = (excess if passes else excess - 1.0, now_s)
        if len(self._excess) > _CLIENTS:
            self._excess.popitem(last=False)
        return passes


class Doors:
    def __init__(self, state: faults.Faults, api_key: str | None,
                 clock: Callable[[], float]) -> None:
        self._faults, self._api_key, self._clock = state, api_key, clock
        self._throttle = Throttle()
        self.visits = Visits()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every request that is answered is counted."""
        began_s = self._clock()
        response = await self._let_in(request, handler)
        known = request.match_info.route.resource
        self.visits.note(known.canonical if known else "none", request.method, response.status,
                         self._clock() - began_s, request.content_length or 0,
                         response.content_length or 0)
        return response

    async def _let_in(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        is_api = request.path.startswith("/v1")
        if not request.path.startswith("/sim/"):
            if self._faults.is_warming_up:
                return html(503, "503 Service Temporarily Unavailable")
            limit = self._faults.throttle if is_api else None
            if limit and not self._throttle.lets(request.remote or "", limit.at, self._clock()):
                return html(503, "503 Service Temporarily Unavailable") if (
                    limit.kind == "throttle-503") else html(429, "429 Too Many Requests")
        if (self._api_key and is_api
                and request.headers.get("authorization") != f"Bearer {self._api_key}"):
            return json_bytes(errors.dumps({"error": "Unauthorized"}), 401)
        try:
            return await handler(request)
        except errors.Refused as e:
            return refused(e)
        except web.HTTPException as e:  # unknown path or method: FastAPI's shape, not OpenAI's
            response = json_bytes(errors.dumps({"detail": e.reason}), e.status)
            if "allow" in e.headers:
                response.headers["allow"] = e.headers["allow"].replace("HEAD", "").strip(",")
            return response
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError,
                RecursionError) as e:  # of an input that nobody foresaw
            log_exception(e)
            return refused(errors.broken(e))


def refused(e: errors.Refused) -> web.Response:
    response = json_bytes(e.body(), e.status)
    if e.retry_after is not None:
        response.headers["retry-after"] = e.retry_after
    return response


def json_bytes(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


def html(status: int, title: str) -> web.Response:
    return web.Response(body=faults.page(title), status=status, content_type="text/html")


async def uvicorn_headers(_request: web.BaseRequest, response: web.StreamResponse) -> None:
    response.headers["server"] = "uvicorn"
    if response.content_type == "application/octet-stream":  # of an empty body: aiohttp's own
        response.headers.pop("content-type", None)
    response.headers["vary"] = "Origin"
    response.headers["x-simulated"] = "true"
