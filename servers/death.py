"""What a server died of, read from its log.

vLLM's clients are only told "see stack trace (above)", and its exit code is 0 after the death of
an engine: the log alone names the cause. Written after logs of vLLM 0.32 (extracts of them lie in
tests/data/vllm/logs); the simulator logs in the same words.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

LONGEST = 300  # characters of a line that is shown
SILENT = ("its engine ended without a word of its own, as one that is killed does: clients and API "
          "server only saw an EngineDeadError")
_TAIL_BYTES = 2**16

_PREFIX = re.compile(  # "(Worker pid=12) ERROR 11-20 23:34:40 [multiproc_executor.py:1063] "
    r"(?:\((?P<who>[\w.-]+) pid=\d+\) )?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\] ?)?")
_FATAL = re.compile(  # whoever says one of these is lost; the reason stands in it, or follows
    r"WorkerProc (?:hit an exception|failed to start|initialization failed)|died unexpectedly"
    r"|EngineCore (?:failed to start|encountered a fatal error)|[Ss]egfault encountered")
_EXCEPTION = re.compile(r"(?:[A-Za-z_][\w.]*\.)?\w*(?:Error|Exception|Interrupt|Exit)\b(?=:|$)")
_POINTS_ELSEWHERE = re.compile(  # true, and of no use: also an ordinary SIGTERM ends in the first
    r"EngineDeadError|RuntimeError: cancelled$|CancelledError|KeyboardInterrupt|SystemExit"
    r"|[Ss]ee (?:root cause|stack trace)|^TimeoutError$")
_CHAINED = re.compile(r"^(?:The above exception was the direct|During handling of the above)")
_REFUSED = re.compile(r"^[\w./ -]+: error: ")  # argparse
_MEMORY = re.compile(r"out of memory", re.IGNORECASE)
_TOLD = re.compile(r"^\[shutdown\] API server: shutdown triggered")
_LESS = (r"out of memory", r"address already in use", r"\berror\b", r"refused|cannot|invalid")
_NOISE = re.compile(
    r"^\s|^Traceback \(|^Dumping |^Route: |^INFO: |^Available routes|^Process \w+:$|^[│┌└(]"
    r"|[█▄▀]|resource_tracker|Warning: |^\[?W\d{4} |^\[shutdown\] |\.\.\.$|^The above exception"
    r"|^(?:AsyncLLM output_handler failed|Error in .* stream generator|non-default args:"
    r"|Engine \d+: |Parent process exited|WorkerProc hit|EngineCore (?:failed|encountered)"
    r"|RuntimeError: Worker failed with error"
    r"|(?:Received|Added|Aborted)? ?[Rr]equest)")


def plain(line: str) -> str:
    """A line without who said it and when."""
    return _PREFIX.sub("", line, count=1).rstrip()


def cause(log: Sequence[str]) -> str | None:
    """The line that names what the server died of; None if the log does not say. `log`: lines
    since its start: after an engine's death each request in flight adds forty more."""
    lines, ended = [plain(x) for x in log], None
    for at, line in enumerate(lines):
        if _FATAL.search(line):
            killed = re.search(r"exit code: -\d", line)
            if found := line if killed else _exception_after(lines, at):
                return found[:LONGEST]
            if ended is None and "exit code: None" in line:
                ended = line[:LONGEST]  # asked for before the kernel had it: it may be a signal's
    for at in reversed([i for i, x in enumerate(log) if x.startswith("Traceback (")]):
        if found := _exception_after(lines, at):
            return found[:LONGEST]
    told = [x for x in lines if _REFUSED.match(x)] or [x for x in lines if _TOLD.match(x)]
    if told:
        return told[-1][:LONGEST]
    if any("EngineDeadError: " in x for x in lines):  # one that raises anything says so
        return ended or SILENT
    return _likely(log)


def named(log: Path, since: int = 0) -> str | None:
    """`cause` of a log file. `since`: bytes before its start, of servers before it."""
    return cause(_tail(log, since))


def context(log: Sequence[str], known: str = "", most: int = 8) -> list[str]:
    """The log's last lines that say something, oldest first: no stacks, no echoes, nothing that
    `known` says already."""
    found: dict[str, None] = {}  # keeps the order, drops what is said twice
    for line in reversed(log):
        text = plain(line)
        new = (text.partition("Error: ")[2] or text)[:60] not in known
        if text and new and not _NOISE.search(text) and not _POINTS_ELSEWHERE.search(text):
            who = _PREFIX.match(line)
            found[(f"{who['who']}: " if who and who["who"] else "") + text[:LONGEST]] = None
        if len(found) == most:
            break
    return list(reversed(found))


def says(log: Path, known: str, since: int = 0) -> str:
    """For a server that did not come up: what `known`, the cause, came after, and where to read
    on; "" if it has no log. `since`: bytes before its start, of servers before it."""
    lines = context(_tail(log, since), known)
    if not lines:
        return ""
    return "".join(f"\n  {x}" for x in ["it said before:", *lines, f"the whole log: {log}"])


def last_line(log: Path, since: int = 0) -> str:
    """What a server that starts says that it is doing."""
    return (context(_tail(log, since), most=1) or [""])[-1]


def _tail(log: Path, since: int) -> list[str]:
    try:
        with log.open("rb") as f:
            f.seek(max(since, f.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return f.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _exception_after(lines: Sequence[str], at: int) -> str | None:
    """What the next exception says; of a chain, the last one, or the one that names memory."""
    found = None
    for i in range(at, len(lines)):
        line = lines[i]
        if not _EXCEPTION.match(line) or _POINTS_ELSEWHERE.search(line):
            continue
        if line.rstrip(":").endswith("Config") and i + 1 < len(lines):  # pydantic: reason below
            line += f": {lines[i + 1].strip()}"
        found = line
        if _MEMORY.search(line) or not any(_CHAINED.match(x) for x in lines[i + 1:i + 5]):
            break
    return found


def _likely(log: Sequence[str]) -> str | None:
    """Of a log without exceptions: the last line that sounds like a complaint. (vLLM's warnings
    name errors that may come.)"""
    for pattern in _LESS:
        for line in reversed(log):
            text, prefix = plain(line), _PREFIX.match(line)
            if (re.search(pattern, text, re.IGNORECASE) and not _NOISE.search(text)
                    and not _POINTS_ELSEWHERE.search(text)
                    and not (prefix and prefix["level"] in ("INFO", "WARNING"))):
                return text[:LONGEST]
    return None
