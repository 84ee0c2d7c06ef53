"""The command line: what is refused, in one line and with which exit code; what is never written
down; help and README that hold."""

import asyncio
import contextlib
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from loadgen import cli, options, runner
from loadgen.record import Outcome
from loadgen.scenario import Open
from loadgen.store import RunFolder
from servers.base import free_port
from tests.raw_server import (
    DONE,
    HEAD,
    HOLD,
    LAST,
    ONE_MODEL,
    RawServer,
    Script,
    finish,
    good,
    role,
    token,
    whole,
)
from tests.real import Said, loadgen, start

ROOT = Path(__file__).resolve().parent.parent
USAGE, INVALID, DIED = cli.USAGE, cli.INVALID, cli.DIED


def plain() -> Script:
    """A good answer without usage: prompts are then made by a guess of characters per token."""
    return [HEAD + role() + token() * 3, finish() + DONE + LAST]


Called = Callable[..., Said]


class NotRefused(BaseException):
    """The command line let it through: a run would have begun. (No Exception: those are caught.)"""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
           capsys: pytest.CaptureFixture[str]) -> Called:
    """Calls the command line in this process, up to where a server would be started."""
    def started(*_: object) -> None:
        raise NotRefused

    monkeypatch.setattr(runner, "run_leg", started)
    monkeypatch.setattr(runner, "run_sweep", started)
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["loadgen", *args])
        code = 0
        try:
            cli.entry()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        return Said(code, *capsys.readouterr())
    return call


def assert_is_for_the_operator(said: Said) -> None:
    """No traceback; what went wrong in one line, at the end of stderr."""
    assert "Traceback" not in said.all, said.all
    last = said.err.strip().splitlines()[-1]
    assert last.startswith(("loadgen: ", "Error: ")), said.err
    assert said.err.count("loadgen: ") + said.err.count("Error: ") == 1


# ------------------------------------------------------------------------------ help and README


def commands() -> list[tuple[str, click.Command]]:
    return sorted(cli.main.commands.items())


NAMES = [name for name, _ in commands()]


def examples(text: str) -> list[str]:
    """Lines that call loadgen, without prompt, comment and redirection."""
    text = text.replace("\\\n", " ")
    lines = [re.sub(r"^\$ ", "", x.strip()) for x in text.splitlines()]
    return [re.split(r" [>|#]", x)[0] for x in lines if re.match(r"loadgen [a-z-]", x)]


def parse(example: str) -> None:
    """Raises click.UsageError if the command does not take these words."""
    words = shlex.split(example, comments=True)[1:]
    words = words[:words.index("--")] if "--" in words else words
    if words[0] in ("--help", "-h", "--version"):
        return
    command = cli.main.commands[words[0]]
    context = command.make_context(words[0], words[1:], parent=click.Context(cli.main))
    context.close()


@pytest.mark.parametrize("name", NAMES)
def test_each_command_has_help_with_an_example_that_parses(called: Called, name: str) -> None:
    said = called(name, "--help")
    assert said.code == 0
    found = [x for x in examples(said.out) if x.split()[1] == name]
    assert found, said.out
    for example in found:
        parse(re.sub(r"  .*", "", example))  # words after it explain it


def test_the_groups_help_names_each_command_and_the_exit_codes(called: Called) -> None:
    said = called("--help")
    assert said.code == 0
    for name in NAMES:
        assert re.search(rf"^  {name} ", said.out, re.MULTILINE), name
    for code in ("0 pass", "1 SLO not met", "2 usage", "3 ", "4 ", "5 ", "130 "):
        assert code in said.out


@pytest.mark.parametrize("name", NAMES)
def test_each_command_is_in_the_readme(name: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"loadgen {name}\b", readme), f"README.md says nothing of `loadgen {name}`"


def test_what_the_readme_shows_can_be_typed() -> None:
    """Every command line in code blocks of README.md and docs/ is one that the commands take."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(x.read_text(encoding="utf-8") for x in pages)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    found = examples("\n".join(code for language, code in blocks if language in ("", "bash")))
    assert len(found) > 20, "no command lines are shown"
    for example in found:
        if re.search(r"[\[|<…]", example):
            continue  # a synopsis
        try:
            parse(example)
        except (click.UsageError, KeyError) as e:
            pytest.fail(f"{example}: {e}")


def test_version_is_said(called: Called) -> None:
    said = called("--version")
    assert said.code == 0
    assert re.match(r"loadgen.* \d+\.\d+", said.out)


def test_import_is_cheap_and_free_of_heavy_things() -> None:
    script = ("import sys, loadgen.cli; print([m for m in ('pandas', 'locust', 'gevent', 'vllm', "
              "'torch', 'aiohttp', 'altair', 'pyarrow') if m in sys.modules])")
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=True, cwd=ROOT)
    assert said.stdout.strip() == "[]"


def test_scenarios_lists_and_prints_what_can_be_read_back(called: Called, tmp_path: Path) -> None:
    listed = [x.split()[0] for x in called("scenarios").out.splitlines()]
    assert {"mixed", "smoke", "chat", "code", "json", "summary"} <= set(listed)
    (tmp_path / "my.toml").write_text(called("scenarios", "smoke").out)
    with pytest.raises(NotRefused):
        called("run", "my.toml", "--num-prompts", "3")


# --------------------------------------------------------------------------- what is refused: 2


REFUSED = {
    "an unknown scenario": (["run", "nosuch"], "no scenario 'nosuch'"),
    "a misspelt scenario": (["sweep", "mixd", "--max-concurrency", "2"], "did you mean 'mixed'"),
    "a scenario file that is not there": (["run", "./no.toml"], "no such scenario file"),
    "a duration without unit": (["run", "smoke", "--duration", "5"], "with its unit"),
    "a negative duration": (["run", "smoke", "--duration", "-5s"], "-5s"),
    "no duration": (["run", "smoke", "--duration", "0s"], "more than zero"),
    "a duration that is no number": (["run", "smoke", "--duration", "nans"], "nans"),
    "an endless duration": (["run", "smoke", "--duration", "1e999s"], "1e999s"),
    "a warm-up without unit": (["run", "smoke", "--warmup", "3"], "with its unit"),
    "a budget without unit": (["sweep", "--max-concurrency", "2", "--budget", "40"],
                              "with its unit"),
    "two loads": (["run", "smoke", "--rate", "1", "--concurrency", "2"], "--rate"),
    "three loads": (["run", "smoke", "--rate", "1", "--concurrency", "2", "--timestamps", "x"],
                    "--timestamps"),
    "no load": (["run", "mixed", "--duration", "5s"], "--concurrency"),
    "no end": (["run", "mixed", "--concurrency", "2"], "--num-prompts"),
    "two axes": (["sweep", "--max-concurrency", "2", "--max-rate", "3"], "--max-rate"),
    "no axis": (["sweep"], "--max-concurrency"),
    "no concurrency": (["run", "smoke", "--concurrency", "0"], "0"),
    "no rate": (["run", "smoke", "--rate", "0"], "0"),
    "a negative rate": (["run", "smoke", "--rate", "-1"], "-1"),
    "a rate that is no number": (["run", "smoke", "--rate", "nan", "--num-prompts", "3"], "rate"),
    "an endless rate": (["run", "smoke", "--rate", "inf", "--num-prompts", "3"], "rate"),
    "a highest rate that is no number": (["sweep", "--max-rate", "nan"], "rate"),
    "an endless highest rate": (["sweep", "--max-rate", "inf"], "rate"),
    "a cv that is no number": (["run", "smoke", "--rate", "1", "--arrivals", "gamma", "--cv",
                                "nan"], "cv"),
    "a cv of gaps that have their own": (["run", "smoke", "--rate", "1", "--arrivals", "poisson",
                                          "--cv", "2"], "--arrivals gamma"),
    "gaps of a closed loop": (["run", "smoke", "--concurrency", "2", "--arrivals", "gamma"],
                              "--arrivals: "),
    "a cv of a closed loop": (["run", "smoke", "--concurrency", "2", "--cv", "2"], "--cv: "),
    "a doctor's address without http": (["doctor", "--base-url", "localhost:8000"],
                                        "http://127.0.0.1:8000"),
    "a target that is no number": (["run", "smoke", "--target", "nan"], "target"),
    "a target of all": (["run", "smoke", "--target", "1"], "target"),
    "no prompts": (["run", "smoke", "--num-prompts", "0"], "0"),
    "a header without value": (["run", "smoke", "--header", "X-Team"], "K=V"),
    "a header without name": (["run", "smoke", "--header", "=x"], "K=V"),
    "a header of two lines": (["run", "smoke", "--header", "X-A=b\r\nX-B: c"], "header"),
    "an api key of two lines": (["run", "smoke", "--api-key", "a\nb"], "key"),
    "a URL and a server": (["run", "smoke", "--base-url", "http://h", "--server", "sim"],
                           "--base-url"),
    "a URL and server options": (["run", "smoke", "--base-url", "http://h", "--", "--gpu", "x"],
                                 "--base-url"),
    "an address without http": (["run", "smoke", "--base-url", "localhost:8000", "--model", "m"],
                                "http"),
    "an address of another kind": (["run", "smoke", "--base-url", "ftp://h", "--model", "m"],
                                   "http"),
    "an address of nothing": (["run", "smoke", "--base-url", "http://", "--model", "m"], "http"),
    "an unknown server": (["serve", "nosuch"], "nosuch"),
    "an unknown command": (["nosuch"], "nosuch"),
    "an unknown option": (["run", "smoke", "--levels", "3"], "--levels"),
    "instants that are not there": (["run", "smoke", "--timestamps", "no.txt"], "no.txt"),
    "a folder for instants": (["run", "smoke", "--timestamps", "."], "."),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_bad_input_is_refused_before_anything_starts(called: Called, what: str) -> None:
    args, word = REFUSED[what]
    said = called(*args)
    assert said.code == USAGE, said.all
    assert_is_for_the_operator(said)
    assert word in said.err
    assert not Path("runs").exists()


@pytest.mark.parametrize("levels", ["a,b", "1,,2", "", "0,1", "-1,2", "1,8", "1.5", "nan",
                                    "1,nan", "inf", "1e999"])
def test_bad_levels_are_refused(called: Called, levels: str) -> None:
    for axis in ("--max-concurrency", "--max-rate"):
        if axis == "--max-rate" and levels == "1.5":
            continue
        said = called("sweep", axis, "4", "--levels", levels)
        assert said.code == USAGE, said.all
        assert_is_for_the_operator(said)
        assert "--levels" in said.err


@pytest.mark.parametrize("slo", ["ttft", "ttft=2", "ttft=-1s", "ttft=0s", "ttft=nan", "ttft=nans",
                                 "foo=1s", "ttft:abc", "ttft:-5", "=1s", "ttft=1s,,", "ttft=infs"])
def test_bad_limits_are_refused_by_each_command_that_takes_them(
        called: Called, tmp_path: Path, slo: str) -> None:
    for args in (["run", "smoke"], ["sweep", "--max-concurrency", "2"], ["report", str(tmp_path)]):
        if slo == "ttft=1s,,":
            continue  # a comma too many harms nobody
        said = called(*args, "--slo", slo)
        assert said.code == USAGE, said.all
        assert_is_for_the_operator(said)
        assert "--slo" in said.err
        said = called(*args, "--goodput", slo)
        assert said.code == USAGE, said.all


@pytest.mark.parametrize(("text", "words"), [
    ('nmae = "x"', ["nmae", "did you mean 'name'", "allowed here"]),
    ('[slo]\nttft = 2', ["ttft", "with its unit"]),
    ('[slo]\nttft = "-2s"', ["ttft", "-2s"]),
    ('duration = "soon"', ["duration", "soon"]),
    ('load = { mode = "open", rate = "0/s" }', ["rate", "more than zero"]),
    ('load = { mode = "open", rate = 3 }', ["rate", "3"]),
    ('load = { mode = "shut" }', ["load", "shut"]),
    ("this is no TOML", ["not valid TOML"]),
])
def test_a_bad_scenario_is_refused_with_file_and_key(called: Called, tmp_path: Path, text: str,
                                                     words: list[str]) -> None:
    own = ('[[classes]]\nname = "a"\nkind = "chat"\nprompt_tokens = 9\noutput_tokens = 5\n')
    (tmp_path / "bad.toml").write_text(f"{text}\n{own}")
    said = called("run", "bad.toml", "--concurrency", "1", "--num-prompts", "1")
    assert said.code == USAGE
    assert_is_for_the_operator(said)
    for word in ["bad.toml", *words]:
        assert word in said.err


@pytest.mark.parametrize(("text", "word"), [
    ("", "no instants"), ("# nothing\n\n", "no instants"), ("0\nsoon\n", "in.txt:2"),
    ("0\n2\n1\n", "in.txt:3"), ("-1\n", "in.txt:1"), ("nan\n", "in.txt:1"),
    ("0\ninf\n", "in.txt:2"), ("1e10\n", "in.txt:1"), ("\x00\n", "in.txt:1"),
])
def test_bad_instants_are_refused_with_file_and_line(called: Called, tmp_path: Path, text: str,
                                                     word: str) -> None:
    (tmp_path / "in.txt").write_text(text)
    said = called("run", "smoke", "--timestamps", "in.txt")
    assert said.code == USAGE
    assert_is_for_the_operator(said)
    assert word in said.err


@pytest.mark.parametrize("args", [
    ["run", "smoke", "--num-prompts", "3", "--slo", "ttft=1s,tpot=50ms"],
    ["run", "smoke", "--num-prompts", "3", "--goodput", "ttft:1000 tpot:50"],
    ["run", "smoke", "--rate", "0.5", "--duration", "1m", "--header", "X-A=b=c"],
    ["sweep", "--max-concurrency", "9"], ["sweep", "--max-rate", "0.3", "--levels", "0.1,0.3"],
    ["sweep", "smoke", "--max-concurrency", "8", "--levels", "8,1,4", "--", "--gpu", "h200"],
])
def test_good_input_is_not_refused(called: Called, args: list[str]) -> None:
    with pytest.raises(NotRefused):
        called(*args)


# ------------------------------------------------------------------ servers that cannot be used


def test_an_address_where_nobody_listens_is_exit_4(tmp_path: Path) -> None:
    port = free_port()
    said = loadgen("run", "smoke", "--num-prompts", "3", "--base-url", f"http://127.0.0.1:{port}",
                   cwd=tmp_path)
    assert said.code == DIED
    assert_is_for_the_operator(said)
    assert f"127.0.0.1:{port} cannot be reached: Connection refused. Is the server" in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_cannot_be_resolved_is_exit_4(tmp_path: Path) -> None:
    said = loadgen("run", "smoke", "--base-url", "http://no-such-host.invalid", cwd=tmp_path)
    assert said.code == DIED
    assert_is_for_the_operator(said)
    assert "no-such-host.invalid" in said.err


@pytest.mark.parametrize(("args", "code", "words"), [
    (["--model", "nosuch"], USAGE, ["404", "The model `nosuch` does not exist", "--model"]),
    (["--api-key", "wrong", "--", "--api-key", "right"], USAGE, ["401", "--api-key"]),
    (["--", "--api-key"], USAGE, ["expected one argument"]),
    (["--", "--gpuu", "h200"], USAGE, ["unknown option '--gpuu'", "did you mean --gpu"]),
    (["--", "--gpu", "h2"], USAGE, ["'h2' is not simulated"]),
    (["--", "--fault", "oom"], USAGE, ["write oom@N"]),
    (["--", "--port", "99999"], USAGE, ["99999"]),
])
def test_a_server_that_refuses_says_why(tmp_path: Path, args: list[str], code: int,
                                        words: list[str]) -> None:
    said = loadgen("run", "smoke", "--num-prompts", "3", *args, cwd=tmp_path)
    assert said.code == code, said.all
    assert_is_for_the_operator(said)
    for word in words:
        assert word in said.err
    assert not _processes_of(tmp_path)


def _processes_of(folder: Path) -> list[str]:
    """Command lines of simulators and shards whose working directory is `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if (path / "cwd").resolve() == folder.resolve() and (
                    "servers.sim" in line or "loadgen" in line):
                found.append(line)
    return found


def test_a_port_in_use_is_exit_4_in_the_logs_words(tmp_path: Path) -> None:
    """Whoever has the port never answers: the simulator's death is seen all the same, and soon."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(16)
        port = str(taken.getsockname()[1])
        said = loadgen("run", "smoke", "--num-prompts", "3", "--", "--port", port, cwd=tmp_path,
                       timeout=40)
    assert said.code == DIED
    assert_is_for_the_operator(said)
    assert "Address already in use" in said.err


def test_another_server_on_the_port_is_not_loaded(tmp_path: Path) -> None:
    """The simulator's port is taken by another server: that one must not be measured for it."""
    async def test() -> None:
        async with RawServer(lambda _: plain(), get=ONE_MODEL) as server:
            said = await asyncio.to_thread(
                loadgen, "run", "smoke", "--num-prompts", "2000", "--", "--port",
                str(server.port), cwd=tmp_path, timeout=40)
            assert said.code == DIED, said.all
            assert "Traceback" not in said.all
            assert "Address already in use" in said.all
            assert len(server.requests) < 2000
    asyncio.run(test())


def test_port_0_is_any_free_port(tmp_path: Path) -> None:
    said = loadgen("run", "smoke", "--num-prompts", "3", "--no-report", "--", "--port", "0",
                   "--speed", "20", cwd=tmp_path, timeout=40)
    assert said.code in (cli.PASS, cli.INCONCLUSIVE), said.all


def test_several_models_are_a_question_to_the_operator(tmp_path: Path) -> None:
    async def test() -> None:
        several = [whole("200 OK", b'{"data":[{"id":"one"},{"id":"two"}]}')]
        async with RawServer(lambda _: good(), get=several) as server:
            said = await asyncio.to_thread(loadgen, "run", "smoke", "--base-url", server.url,
                                           cwd=tmp_path)
            assert said.code == USAGE
            assert_is_for_the_operator(said)
            assert "one, two" in said.err
            assert "--model" in said.err
            assert not server.requests
    asyncio.run(test())


def test_a_url_may_end_as_users_write_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with RawServer(lambda _: plain(), get=ONE_MODEL) as server:
            for k, ending in enumerate(("/", "/v1", "/v1/")):
                said = await asyncio.to_thread(
                    loadgen, "run", "smoke", "--num-prompts", "3", "--no-report", "--out", str(k),
                    "--base-url", server.url + ending, cwd=tmp_path)
                assert "Traceback" not in said.all
                assert {r.outcome for r in RunFolder(tmp_path / str(k)).records()} == {Outcome.OK}
            assert {r.head.split()[1] for r in server.requests} <= {
                "/v1/chat/completions", "/tokenize"}
    asyncio.run(test())


def test_a_server_that_counts_all_prompts_alike_is_measured_still(tmp_path: Path) -> None:
    """Stubs and some gateways report the same prompt_tokens whatever was sent: no characters per
    token follow from that, least of all petabytes of prompt."""
    async def test() -> None:
        async with RawServer(lambda _: good(), get=ONE_MODEL) as server:
            said = await asyncio.to_thread(
                loadgen, "run", "smoke", "--num-prompts", "5", "--no-report", "--out", "r",
                "--base-url", server.url, cwd=tmp_path)
            assert "Traceback" not in said.all
            assert "MemoryError" not in said.all
            assert all(len(got.body) < 5000 for got in server.requests)
    asyncio.run(test())
    assert [r.outcome for r in RunFolder(tmp_path / "r").records()] == [Outcome.OK] * 5


def test_an_interrupt_ends_the_wait_for_a_server_that_never_answers(tmp_path: Path) -> None:
    async def test() -> None:
        async with RawServer(lambda _: [HOLD], get=ONE_MODEL) as server:
            with start("run", "smoke", "--base-url", server.url, cwd=tmp_path) as process:
                await server.until(lambda: server.inflight > 0, 20)
                process.send_signal(signal.SIGINT)
                out, err = await asyncio.to_thread(_ended, process, 8)
                assert process.returncode == cli.INTERRUPTED, out + err
                assert "Traceback" not in out + err
    asyncio.run(test())


def _ended(process: subprocess.Popen[str], within_s: float) -> tuple[str, str]:
    try:
        return process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"not over {within_s} s after the interrupt: {out}{err}") from None


# --------------------------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that was made with secrets in it."""
    folder = tmp_path_factory.mktemp("cli")
    said = loadgen("run", "smoke", "--num-prompts", "5", "--api-key=SECRET-A", "--header",
                   "X-Key=SECRET-B", "--header=Cookie=SECRET-C", "--out", "r", "--",
                   "--api-key", "SECRET-A", "--speed", "20", cwd=folder,
                   env={"LOADGEN_API_KEY": "SECRET-D"})
    assert "Traceback" not in said.all, said.all
    (folder / "said.txt").write_text(said.all)
    return folder / "r"


def holding(folder: Path, *words: str) -> list[str]:
    return [f"{path.relative_to(folder)}: {word}" for path in folder.rglob("*") if path.is_file()
            for word in words if word.encode() in path.read_bytes()]


def test_secrets_reach_no_file_and_no_terminal(a_run: Path) -> None:
    assert (a_run / "report.html").stat().st_size > 1000
    assert (a_run / "server.log").stat().st_size > 0
    assert holding(a_run.parent, "SECRET") == []
    command = json.loads((a_run / "manifest.json").read_bytes())["command"]
    assert "--api-key=***" in command
    assert command[command.index("--header") + 1] == "***"
    assert command[-4:-2] == ["--api-key", "***"]


def test_the_password_of_a_url_is_not_written_down(tmp_path: Path) -> None:
    async def test() -> None:
        async with RawServer(lambda _: plain(), get=ONE_MODEL) as server:
            url = server.url.replace("http://", "http://user:SECRET-E@")
            said = await asyncio.to_thread(loadgen, "run", "smoke", "--num-prompts", "3", "--out",
                                           "r", "--base-url", url, cwd=tmp_path)
            assert "SECRET-E" not in said.all
            assert server.requests
    asyncio.run(test())
    assert (tmp_path / "r" / "manifest.json").exists()
    assert holding(tmp_path, "SECRET-E") == []


def test_a_secret_that_the_server_repeats_in_an_error_is_not_written_down(tmp_path: Path) -> None:
    """As OpenAI does: "Incorrect API key provided: …"."""
    async def test() -> None:
        said_no = [whole("401 Unauthorized", b'{"error":{"message":"Incorrect API key provided: '
                         b'SECRET-F. You can find yours at ...","code":"invalid_api_key"}}')]
        async with RawServer(lambda k: plain() if k < 8 else said_no, get=ONE_MODEL) as server:
            said = await asyncio.to_thread(
                loadgen, "run", "smoke", "--num-prompts", "20", "--out", "r", "--base-url",
                server.url, "--api-key", "SECRET-F", cwd=tmp_path)
            assert "SECRET-F" not in said.all
    asyncio.run(test())
    assert any(r.status == 401 for r in RunFolder(tmp_path / "r").records())
    assert holding(tmp_path, "SECRET-F") == []


def test_a_folder_that_holds_a_run_is_left_as_it_is(a_run: Path, tmp_path: Path) -> None:
    shutil.copytree(a_run, tmp_path / "r")
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    said = loadgen("run", "smoke", "--num-prompts", "3", "--out", "r", cwd=tmp_path)
    assert said.code in (USAGE, INVALID)
    assert_is_for_the_operator(said)
    assert "holds a run already" in said.err
    assert "--out" in said.err
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()} == before


@pytest.mark.parametrize("out", ["file", "file/r"])
def test_a_run_folder_that_cannot_be_made_is_said_in_one_line(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("in the way")
    said = loadgen("run", "smoke", "--num-prompts", "3", "--out", out, cwd=tmp_path)
    assert said.code in (USAGE, INVALID), said.all
    assert_is_for_the_operator(said)
    assert "file" in said.err
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_report_on_no_run_is_a_usage_error_for_each_command(called: Called,
                                                              tmp_path: Path) -> None:
    """3 means that a measurement is invalid: here none was made."""
    for args in (["report", str(tmp_path)], ["report", "no/such"],
                 ["compare", str(tmp_path), str(tmp_path)]):
        said = called(*args)
        assert_is_for_the_operator(said)
        assert "is no run folder" in said.err
        assert said.code == USAGE, args


@pytest.mark.parametrize(("manifest", "word"), [
    ("", "manifest.json"), ("{", "manifest.json"), ('{"schema": 1}', "manifest.json"),
])
def test_a_manifest_that_cannot_be_read_is_named(called: Called, tmp_path: Path, manifest: str,
                                                 word: str) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "manifest.json").write_text(manifest)
    said = called("report", "r")
    assert said.code in (USAGE, INVALID)
    assert_is_for_the_operator(said)
    assert word in said.err


def test_a_run_of_a_newer_loadgen_is_refused(called: Called, a_run: Path, tmp_path: Path) -> None:
    shutil.copytree(a_run, tmp_path / "r")
    manifest = tmp_path / "r" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 1,', '"schema": 99,'))
    said = called("report", "r")
    assert said.code in (USAGE, INVALID)
    assert_is_for_the_operator(said)
    assert "newer" in said.err


def test_a_report_with_other_limits_changes_the_verdict_without_a_run(called: Called, a_run: Path,
                                                                      tmp_path: Path) -> None:
    shutil.copytree(a_run, tmp_path / "r")
    before = (tmp_path / "r" / "records-0.jsonl").read_bytes()
    said = called("report", "r", "--slo", "ttft=0.001ms", "--no-html")
    assert (said.code, said.out.split(",")[0].strip()) == (cli.SLO_MISSED, "UNSAFE"), said.all
    said = called("report", "r", "--slo", "ttft=60s", "--no-html")
    assert said.code == cli.INCONCLUSIVE, said.all  # 5 of 5 prove no 95 %
    assert (tmp_path / "r" / "records-0.jsonl").read_bytes() == before


def test_a_run_whose_folder_is_called_sweep_is_a_run(called: Called, a_run: Path,
                                                     tmp_path: Path) -> None:
    shutil.copytree(a_run, tmp_path / "r")
    manifest = tmp_path / "r" / "manifest.json"
    kept = json.loads(manifest.read_bytes())
    kept["command"][kept["command"].index("--out") + 1] = "sweep"
    manifest.write_text(json.dumps(kept))
    assert called("report", str(a_run), "--no-html").out == called("report", "r", "--no-html").out


def test_a_report_of_a_run_without_a_leg_is_no_traceback(called: Called, a_run: Path,
                                                         tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    shutil.copy(a_run / "manifest.json", tmp_path / "r")
    said = called("report", "r")
    assert said.code in (INVALID, cli.INCONCLUSIVE)
    assert "Traceback" not in said.all


@pytest.mark.parametrize("torn", ["records-0.jsonl", "legs.jsonl", "telemetry-server.jsonl"])
def test_a_report_of_torn_journals_is_made_of_what_is_whole(
        called: Called, a_run: Path, tmp_path: Path, torn: str) -> None:
    shutil.copytree(a_run, tmp_path / "r")
    journal = tmp_path / "r" / torn
    journal.write_bytes(journal.read_bytes()[:-20])
    said = called("report", "r", "--no-html")
    # without its end, the leg is one that broke off; without a record, it is no sample
    assert said.code == {"legs.jsonl": cli.INTERRUPTED, "records-0.jsonl": INVALID}.get(
        torn, cli.INCONCLUSIVE)
    assert "Traceback" not in said.all
    assert json.loads((tmp_path / "r" / "summary.json").read_bytes())["torn_lines"] == 1


def test_lines_for_people_are_not_broken_when_they_go_to_a_file(tmp_path: Path) -> None:
    """What a log file or CI shows: a path or cause that was broken over lines cannot be found."""
    async def test() -> None:
        async with RawServer(lambda k: plain() if k < 8 else [HOLD], get=ONE_MODEL) as server:
            with start("run", "smoke", "--num-prompts", "20", "--no-report", "--out", "r",
                       "--base-url", server.url, cwd=tmp_path,
                       env={"COLUMNS": "80"}) as process:
                await server.until(lambda: len(server.requests) > 9, 20)
                server._server.close()
                for handler in list(server._handlers):
                    handler.cancel()
                out, err = await asyncio.to_thread(_ended, process, 20)
            assert process.returncode == DIED, out + err
            stopped = [x for x in out.splitlines() if x.startswith("Stopped: ")]
            assert len(stopped) == 1
            assert "Connection refused" in stopped[0]
    asyncio.run(test())


def test_doctor_says_what_it_looked_at(tmp_path: Path) -> None:
    said = loadgen("doctor", cwd=tmp_path)
    assert said.code in (cli.PASS, cli.SLO_MISSED, USAGE, INVALID), said.all
    assert "Traceback" not in said.all
    assert len(said.out.splitlines()) > 2
    assert not re.search(r"\[/?(green|yellow|red)?\]", said.out)  # markup that is not meant to show


def test_doctor_says_in_plain_words_that_nobody_is_there(tmp_path: Path) -> None:
    said = loadgen("doctor", "--base-url", f"http://127.0.0.1:{free_port()}", cwd=tmp_path)
    assert said.code == INVALID
    assert re.search(r"^bad .*/v1/models .*Connection refused", said.out, re.MULTILINE), said.out


def test_a_cv_alone_makes_the_gaps_gamma_ones(tmp_path: Path) -> None:
    loadgen("run", "smoke", "--rate", "4", "--cv", "2", "--num-prompts", "3", "--virtual", "--out",
            "r", "--no-report", cwd=tmp_path)
    load = next(iter(RunFolder(tmp_path / "r").legs()))[0].load
    assert isinstance(load, Open)
    assert (load.arrivals, load.cv) == ("gamma", 2.0)


def test_serve_ends_with_the_servers_exit_code_and_words(tmp_path: Path) -> None:
    said = loadgen("serve", "sim", "--port", "0", "--", "--gpuu", "x", cwd=tmp_path)
    assert said.code == USAGE
    assert "did you mean --gpu" in said.err


def test_serve_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    port = free_port()
    with start("serve", "sim", "--port", str(port), cwd=tmp_path) as process:
        until = time.monotonic() + 40
        while not _answers(port):
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert _ended(process, 8) is not None
        assert process.returncode in (0, cli.INTERRUPTED)


def _answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(("most", "axis", "base_url", "cores", "processes"), [
    (128, "concurrency", None, 16, 1),  # one is enough
    (2000, "concurrency", None, 16, 8),  # half of the cores are the server's
    (2000, "concurrency", "http://127.0.0.1:8000", 16, 8),
    (2000, "concurrency", "http://10.0.0.9:8000", 8, 7),
    (600, "concurrency", "http://10.0.0.9:8000", 8, 3),  # as many as are needed
    (1200, "rate", "https://llm.example", 8, 3),
    (5000, "rate", None, 1, 1),
])
def test_auto_takes_the_processes_that_the_load_needs_and_the_host_has(
        most: float, axis: str, base_url: str | None, cores: int, processes: int) -> None:
    assert options.processes_of(options.AUTO, most, axis, base_url, cores) == processes
    assert options.processes_of(5, most, axis, base_url, cores) == 5


@pytest.mark.parametrize("word", ["0", "65", "many", "-1", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(word: str, tmp_path: Path) -> None:
    said = loadgen("run", "mixed", "--concurrency", "1", "--processes", word, cwd=tmp_path)
    assert said.code == USAGE
    assert "write a number from 1 to 64, or auto" in said.all
