"""What vLLM's /metrics says of its process and of HTTP, by the library that it uses for both."""

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Histogram,
    Summary,
    generate_latest,
)

_UNCOUNTED = ("/metrics", "/health", "/load", "/ping", "/version")
_FINE_S = (.01, .025, .05, .075, .1, .25, .5, .75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30,
           60)
_COARSE_S = (.1, .5, 1)


class Visits:
    """Requests by path, method and class of status; `handler` is "none" for an unknown path."""

    def __init__(self) -> None:
        self._registry = r = CollectorRegistry()
        self._requests = Counter(
            "http_requests_total", "Total number of requests by method, status and handler.",
            ("method", "status", "handler"), registry=r)
        self._in_bytes = Summary(
            "http_request_size_bytes", "Content length of incoming requests by handler. Only value "
            "of header is respected. Otherwise ignored. No percentile calculated. ", ("handler",),
            registry=r)
        self._out_bytes = Summary(
            "http_response_size_bytes", "Content length of outgoing responses by handler. Only "
            "value of header is respected. Otherwise ignored. No percentile calculated. ",
            ("handler",), registry=r)
        self._fine_s = Histogram(
            "http_request_duration_highr_seconds", "Latency with many buckets but no API specific "
            "labels. Made for more accurate percentile calculations. ", buckets=_FINE_S, registry=r)
        self._coarse_s = Histogram(
            "http_request_duration_seconds", "Latency with only few buckets by handler. Made to be "
            "only used if aggregation by handler is important. ", ("method", "handler"),
            buckets=_COARSE_S, registry=r)

    def note(self, handler: str, method: str, status: int, took_s: float, in_bytes: int,
             out_bytes: int) -> None:
        if handler in _UNCOUNTED or handler.startswith("/sim/"):
            return
        self._requests.labels(method, f"{status // 100}xx", handler).inc()
        self._in_bytes.labels(handler).observe(in_bytes)
        self._out_bytes.labels(handler).observe(out_bytes)
        self._fine_s.observe(took_s)
        self._coarse_s.labels(method, handler).observe(took_s)

    def of_http(self) -> str:
        return generate_latest(self._registry).decode()


def of_process() -> str:
    return generate_latest(REGISTRY).decode()
