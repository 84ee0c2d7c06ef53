"""A server that runs already: nothing to start, nothing to stop."""

from typing import Any

from loadgen.target import Target


class RemoteServer:
    """Any OpenAI-compatible URL."""

    patience_s = 60.0

    def __init__(self, target: Target) -> None:
        self._target = target

    def start(self) -> Target:
        return self._target

    def alive(self) -> str | None:
        return None

    def facts(self) -> dict[str, Any]:
        insecure = {"insecure": True} if self._target.trust.insecure else {}
        return {"kind": "remote", "simulated": False, **insecure}

    def stop(self) -> None:
        pass
