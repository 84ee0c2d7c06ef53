"""The API server's one process as a queue: it takes requests in and gives token events out, one
thing after the other. Where it is the limit, the engine runs ahead of it, and clients see tokens,
and their answers' ends, later than the engine made them."""

from servers.sim.profiles import Constants


class Front:
    """Calls come in the order of time. Token events wait for those before them. A new request does
    not wait for them (the process's loop comes round to its socket), but for those before it; its
    work makes the tokens later."""

    def __init__(self, constants: Constants) -> None:
        self._token_s = constants.front_token_s
        self._request_s, self._latency_s = constants.front_request_s, constants.front_latency_s
        self._taken_s = self._given_s = 0.0  # the last request, and the last event, is through

    def take_in(self, now_s: float) -> float:
        """A request came; when the engine has it."""
        self._taken_s = max(now_s, self._taken_s) + self._request_s
        self._given_s = max(now_s, self._given_s) + self._request_s
        return self._taken_s + self._latency_s

    def give_out(self, now_s: float, events: int) -> float:
        """A step ended with so many token events; when they are written."""
        if not events:
            return now_s
        self._given_s = max(now_s, self._given_s) + self._token_s * events
        return self._given_s
