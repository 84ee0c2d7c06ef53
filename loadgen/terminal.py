"""The terminal that loadgen writes to."""

from rich.console import Console


def plain_console(width: int | None = None) -> Console:
    """Says texts as they are: a server's log and its answers may hold what rich would take for
    markup (`[/x]` ends the program) or for an emoji."""
    return Console(width=width, markup=False, emoji=False)
