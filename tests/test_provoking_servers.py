"""Servers that spoil a measurement in ways that no record shows: each time the rule that is meant
for it fires, as SUSPECT."""

import asyncio
import re
import time
from pathlib import Path

import pytest

from loadgen import cli
from loadgen.record import Outcome
from tests.raw_server import (
    DONE,
    FIN,
    HEAD,
    HOLD,
    LAST,
    NOT_FOUND,
    ONE_MODEL,
    Got,
    RawServer,
    Script,
    finish,
    head,
    role,
    token,
    usage,
    whole,
)
from tests.real import Said, assert_is_suspect, kept, loadgen, rules

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nobody_is_left")]
ANSWER = role() + token() * 3 + finish() + usage(3)


def run(server: RawServer, folder: Path, *words: str) -> Said:
    """`loadgen run` against the server, into folder/r."""
    async def test() -> Said:
        async with server:
            return await asyncio.to_thread(
                loadgen, "run", "smoke", *words, "--out", "r", "--no-report", "--base-url",
                server.url, cwd=folder, timeout=80)
    return asyncio.run(test())


class Counting:
    """A vLLM's /metrics, of which `more_tok` tokens per answer were never streamed."""

    def __init__(self, more_tok: int) -> None:
        self.more_tok, self.answers = more_tok, 0

    def answer(self, _: int) -> Script:
        self.answers += 1
        return [HEAD + role() + token(), 0.02, token() * 2 + finish() + usage(3) + DONE + LAST]

    def get(self, got: Got) -> Script:
        path = got.head.split()[1]
        counters = {"request_success_total": 1, "prompt_tokens_total": 10,
                    "generation_tokens_total": 3 + self.more_tok}
        text = "".join(f"# TYPE vllm:{name.removesuffix('_total')} counter\n"
                       f'vllm:{name}{{model_name="m"}} {each * self.answers}\n'
                       for name, each in counters.items())
        return {"/v1/models": ONE_MODEL, "/metrics": [
            whole("200 OK", text.encode(), content_type="text/plain")]}.get(path, NOT_FOUND)


def test_a_server_that_counts_tokens_it_never_streamed_is_told(tmp_path: Path) -> None:
    counts = Counting(more_tok=1)
    said = run(RawServer(counts.answer, counts.get), tmp_path, "--concurrency", "4", "--duration",
               "4s")
    says = assert_is_suspect(said, tmp_path / "r", "token-count")
    found = re.fullmatch(r"the server's /metrics count (\d+) output tokens where its answers say "
                         r"(\d+)(?: to (\d+))?", says)
    assert found, says  # of its prompts it says the same as its answers
    theirs, ours = int(found[1]), int(found[2])
    done = [r for r in kept(tmp_path / "r") if r.outcome is Outcome.OK]
    assert len(done) > 50
    assert ours >= 3 * len(done)
    assert theirs % 4 == 0
    assert theirs >= 4 * len(done)


def test_a_server_that_counts_as_it_streams_is_not(tmp_path: Path) -> None:
    """The test's test: it is the token too many that made the difference."""
    counts = Counting(more_tok=0)
    said = run(RawServer(counts.answer, counts.get), tmp_path, "--concurrency", "4", "--duration",
               "4s")
    assert said.code in (cli.PASS, cli.INVALID), said.all
    assert not {"token-count", "foreign-load"} & set(rules(tmp_path / "r"))
    assert counts.answers > 50


def test_a_server_that_is_slow_to_accept_is_told(tmp_path: Path) -> None:
    """Each request needs a connection, of which one waits in the listen queue and the kernel turns
    all others away: they come again a second later."""
    closing = head(content_type="text/event-stream", transfer_encoding="chunked",
                   connection="close")

    def busy(_: int) -> Script:
        time.sleep(0.02)  # its loop accepts nobody meanwhile
        return [closing + ANSWER + DONE + LAST, FIN]

    said = run(RawServer(busy, ONE_MODEL, backlog=1), tmp_path, "--concurrency", "16",
               "--duration", "5s", "--slo", "ttft=30s")
    says = assert_is_suspect(said, tmp_path / "r", "connect-wait")
    found = re.search(r"1 % of requests waited (\d+) ms or more for a connection", says)
    assert found, says
    assert int(found[1]) > 500
    assert re.search(r"\((9\d|100)% opened one\)", says), says
    waits = [r.connect_wait_ns for r in kept(tmp_path / "r") if r.connect_wait_ns is not None]
    assert max(waits) > 500_000_000
    assert "late-starts" not in rules(tmp_path / "r") or "INVALID" in rules(
        tmp_path / "r").values()  # what waits for the server is not the generator's lateness


def test_a_server_that_keeps_the_body_open_is_told(tmp_path: Path) -> None:
    said = run(RawServer(lambda _: [HEAD + ANSWER + DONE, HOLD], ONE_MODEL), tmp_path,
               "--concurrency", "32", "--duration", "4s")
    says = assert_is_suspect(said, tmp_path / "r", "held-open")
    records = kept(tmp_path / "r")
    done = [r for r in records if r.outcome is Outcome.OK]
    assert len(done) > 59  # the answers themselves were whole
    found = re.match(r"of (\d+) answers the server kept the body open after \[DONE\]", says)
    assert found, says
    assert len(done) - 32 <= int(found[1]) <= len(done)  # the last ones were not awaited
