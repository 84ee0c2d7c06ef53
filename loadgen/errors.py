"""Exceptions mean that the operator must act. What happens to one request is an outcome, not an
exception (see `loadgen.record.Outcome`). And the exit codes, of both."""

PASS, SLO_MISSED, USAGE, INVALID, DIED, INCONCLUSIVE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
PRECEDENCE = (INTERRUPTED, USAGE, INVALID, DIED, SLO_MISSED, INCONCLUSIVE, PASS)


class LoadgenError(Exception):
    """Base of all errors that are shown to the operator without a traceback."""


class ScenarioError(LoadgenError):
    """A scenario, flag or plan that cannot be used: says the file, the key and what is allowed."""


class ServerError(LoadgenError):
    """The server under test did not start, died or cannot be reached; carries its log's tail."""


class StoreError(LoadgenError):
    """A run folder that cannot be written or read: full disk, foreign schema, no such run."""


class FolderError(StoreError):
    """A folder that is not what the command needs: no run in it, or one already."""


class GeneratorError(LoadgenError):
    """The generator itself failed (a shard died, no file descriptors): no measurement."""
