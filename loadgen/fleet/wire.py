"""Locust's sockets, made fit for a port that others can reach: they take messages of any size, and
end at bytes that are none."""

from typing import Any

from locust.rpc import protocol, zmqrpc

from loadgen.hosts.messages import WIRE_BYTES

_init = zmqrpc.BaseSocket.__init__
_unserialize = protocol.Message.unserialize


def harden() -> None:
    """For all of Locust's sockets that are made from now on."""
    zmqrpc.BaseSocket.__init__ = _bounded  # type: ignore[method-assign]
    protocol.Message.unserialize = _read  # type: ignore[method-assign]


def _bounded(self: Any, *args: Any, **kwargs: Any) -> None:
    """Who can reach the port could fill the memory."""
    _init(self, *args, **kwargs)
    self.socket.maxmsgsize = WIRE_BYTES


def _read(data: bytes) -> protocol.Message:
    """Locust passes over some bytes that are no message, and this makes others look like those: by
    them its listener would end, and with it the test."""
    try:
        message: protocol.Message = _unserialize(data)
    except Exception as e:
        raise zmqrpc.msgerr.ExtraData(None, b"") from e  # type: ignore[attr-defined]
    return message
