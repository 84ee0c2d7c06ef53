"""Connections, before they are HTTP: no more than there are descriptors for, and one line in the
log about what is no HTTP."""

import asyncio
import logging
import os
import resource
import socket
import sys
from typing import cast

from aiohttp import web

RESERVED_FDS = 128  # for logs, and for connections that are accepted and not yet counted
_BACKLOG = 2048  # connections that the kernel keeps until they are accepted, …
_BURST = 16  # … so many per turn of the loop
_FULL = (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n"
         b"x-simulated: true\r\n\r\n")


class GatedRunner(web.AppRunner):
    """Its sites ask for `server` to make the protocol of each connection."""

    @property
    def server(self) -> web.Server | None:
        made = super().server
        return None if made is None else cast(web.Server, _Gate(made))


class _Gate:
    def __init__(self, server: web.Server) -> None:
        self._server = server

    def __call__(self) -> asyncio.Protocol:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_FDS
        return _Full() if len(self._server._connections) >= most else self._server()


class _Full(asyncio.Protocol):
    """asyncio would log thousands of lines where accept() finds no descriptor, and stand still."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(_FULL)
        transport.close()


async def listen(runner: web.AppRunner, host: str, port: int) -> None:
    """Raises OSError. asyncio takes one number for the kernel's queue and for how many connections
    it accepts in one go, of which the second must stay below RESERVED_FDS."""
    site = web.TCPSite(runner, host, port, backlog=_BURST)
    await site.start()
    for s in cast(asyncio.Server, site._server).sockets:
        with socket.socket(fileno=os.dup(s.fileno())) as twin:
            twin.listen(_BACKLOG)


def open_all_descriptors() -> None:
    """As many as the system grants, as uvicorn's launcher in vLLM does."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _OneLine(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        why = record.exc_info[1] if record.exc_info else None
        said = " ".join(str(why or record.getMessage()).split())
        print(f"WARNING:  Invalid HTTP request received. {said[:160]}", file=sys.stderr)


def http_log() -> logging.Logger:
    """aiohttp writes a traceback for each request that is none."""
    log = logging.getLogger("servers.sim.http")
    log.handlers, log.propagate = [_OneLine()], False
    return log
