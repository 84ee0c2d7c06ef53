"""The Prometheus endpoint beside a run: what it shows, and that nothing depends on it. The last
tests are read by a real Prometheus (Debian's package)."""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadgen import cli, exporter
from loadgen.errors import ScenarioError
from loadgen.exporter import Exporter
from loadgen.scenario import Closed
from loadgen.store import Journal, RunFolder
from loadgen.supervise import Progress
from servers.base import free_port
from tests import synthetic
from tests.real import (
    FAST,
    Popen,
    kept,
    loadgen,
    over,
    pid_of,
    processes_in,
    start,
    started,
    wait,
)
from tests.test_board import record

ROOT = Path(__file__).resolve().parent.parent
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
real = pytest.mark.skipif(
    PROMETHEUS is None and "prometheus" not in os.environ.get("LOADGEN_TESTS_NEED", ""),
    reason="needs a Prometheus: apt-get install prometheus")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "r", synthetic.manifest())


def text(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: str = answer.read().decode()
    return found


def samples(url: str) -> dict[tuple[str, ...], float]:
    """As `test_board.shown`."""
    return {(x.name, *(v for _, v in sorted(x.labels.items()))): x.value
            for family in text_string_to_metric_families(text(url)) for x in family.samples}


def total(url: str, name: str = "loadgen_requests_total") -> float:
    return sum(value for (what, *_), value in samples(url).items() if what == name)


def up(url: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(text(url))
    return False


# ------------------------------------------------------------------------------------ its parts


def test_it_follows_the_journals_from_where_they_were(folder: RunFolder) -> None:
    """What a search had written before it was stopped is not counted again; and a torn line is
    read when it is whole."""
    journal = Journal(folder.records_path(0))
    journal.append(record(seq=0))
    with closing(Exporter(exporter.listen("0"), folder)) as endpoint:
        wait(lambda: up(endpoint.url))
        journal.append(record(seq=1))
        Journal(folder.records_path(1)).append(record(seq=0, shard=1, cls="json"))
        wait(lambda: total(endpoint.url) == 2)
        with folder.records_path(1).open("ab") as f:
            f.write(b'{"leg":"x","shard":1,')
            f.flush()
            time.sleep(2.5 * exporter.TAIL_S)
            assert total(endpoint.url) == 2
            f.write(b'"seq":1,"session":1,"turn":0,"cls":"json","due_ns":1,"end_ns":2,'
                    b'"outcome":"EMPTY"}\n')
        wait(lambda: total(endpoint.url) == 3)
        assert samples(endpoint.url)["loadgen_requests_total", "json", "EMPTY"] == 1


def test_who_hangs_up_is_no_news(folder: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(Exporter(exporter.listen("0"), folder)) as endpoint:
        wait(lambda: up(endpoint.url))
        where = urllib.parse.urlsplit(endpoint.url)
        for _ in range(20):
            with socket.create_connection((where.hostname, where.port)) as s:  # and resets it
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                s.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert up(endpoint.url)
    assert capfd.readouterr().err == ""


def test_it_shows_the_leg_that_runs(folder: RunFolder) -> None:
    leg = synthetic.leg(8, "ladder", 20.0)
    assert isinstance(leg.load, Closed)
    with closing(Exporter(exporter.listen("0"), folder)) as endpoint:
        endpoint.progress(Progress(leg, 3.0, inflight=8, sampled=10, good=9, lag_s=0.004))
        wait(lambda: up(endpoint.url) and total(endpoint.url, "loadgen_level") == 8)
        assert total(endpoint.url, "loadgen_attainment_ratio") == 0.9
        assert total(endpoint.url, "loadgen_generator_lag_seconds") == 0.004
        assert samples(endpoint.url)[
            "loadgen_run_info", "qwen2.5-7b", "synthetic", "mixed", "true", "0.1.0"] == 1


def test_it_ends_with_who_started_it_and_gives_its_port_back(folder: RunFolder) -> None:
    endpoint = Exporter(exporter.listen("0"), folder)
    wait(lambda: up(endpoint.url))
    port = urllib.parse.urlsplit(endpoint.url).port
    endpoint.close()
    endpoint.close()
    exporter.listen(str(port)).close()


def test_nobody_is_held_up_by_an_endpoint_that_stands_still(folder: RunFolder) -> None:
    endpoint = Exporter(exporter.listen("0"), folder)
    wait(lambda: up(endpoint.url))
    pid = pid_of(Path.cwd(), "loadgen.exporter")
    os.kill(pid, signal.SIGSTOP)
    try:
        now = Progress(synthetic.leg(8, "ladder", 20.0), 3.0)
        began = time.monotonic()
        for _ in range(5000):  # far more than a pipe holds
            endpoint.progress(now)
        assert time.monotonic() - began < 5
    finally:
        os.kill(pid, signal.SIGKILL)
    endpoint.progress(now)  # nor by one that is dead
    endpoint.close()


@pytest.mark.parametrize("where", ["0", "127.0.0.1:0", "localhost:0", "[::1]:0"])
def test_a_host_may_be_named(where: str) -> None:
    if "::1" in where and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this host has no IPv6")
    with closing(exporter.listen(where)) as sock:
        assert sock.getsockname()[0] in ("127.0.0.1", "::1")


def test_a_port_in_use_is_said_with_what_to_try() -> None:
    with closing(exporter.listen("0")) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ScenarioError, match=rf"127\.0\.0\.1:{port}: Address already in use; "
                           "choose another port, or 0"):
            exporter.listen(str(port))


# -------------------------------------------------------------------------------- beside a run


def test_a_port_in_use_is_exit_2_before_anything_starts(tmp_path: Path) -> None:
    with closing(exporter.listen("0")) as taken:
        port = taken.getsockname()[1]
        said = loadgen("run", "smoke", "--concurrency", "1", "--num-prompts", "1", "--out", "r",
                       "--metrics-port", str(port), cwd=tmp_path)
    assert said.code == cli.USAGE, said.all
    assert said.err == (
        f"loadgen: --metrics-port {port}: cannot listen on 127.0.0.1:{port}: Address already in "
        "use; choose another port, or 0 for a free one\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "says"), [
    (("--metrics-port", "many"), "write a port, as 9464"),
    (("--metrics-port", "70000"), "write a port, as 9464"),
    (("--metrics-port", "0", "--virtual"), "leave --metrics-port out")])
def test_a_port_that_is_none_is_refused(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    said = loadgen("run", "smoke", "--concurrency", "1", "--num-prompts", "1", *words,
                   cwd=tmp_path)
    assert said.code == cli.USAGE
    assert says in said.err


def test_a_run_whose_endpoint_is_killed_goes_on(tmp_path: Path) -> None:
    with start("run", "smoke", "--concurrency", "2", "--duration", "6s", "--out", "r",
               "--no-report", "--metrics-port", "0", *FAST, cwd=tmp_path) as process:
        wait(lambda: list(tmp_path.glob("r/records-*.jsonl")))
        wait(lambda: any("loadgen.exporter" in x for x in processes_in(tmp_path).values()))
        os.kill(pid_of(tmp_path, "loadgen.exporter"), signal.SIGKILL)
        said = over(process)
    assert said.code in (cli.PASS, cli.INVALID), said.all
    assert len(kept(tmp_path / "r")) > 20


# --------------------------------------------------------------------------------------- Locust


def locust(port: str, *options: str, cwd: Path) -> contextlib.AbstractContextManager[Popen]:
    return started(
        [sys.executable, "-m", "locust", "-f", str(ROOT / "locustfiles" / "chat.py"), "--headless",
         "--only-summary", "--run-folder", "r", "--scenario", "smoke", "-t", "8s", "--no-report",
         "--metrics-port", port, *options], cwd, {"PYTHONPATH": str(ROOT)})


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ("-u", "3", "-r", "3", "--server-options", "--speed 3"),
    ("-u", "3", "-r", "3", "--server-options", "--speed 3", "--processes", "2")])
def test_locust_has_it_too(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Of a fleet, all workers' requests."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/metrics"
    with locust(str(port), *options, cwd=tmp_path) as process:
        wait(lambda: process.poll() is not None or (
            up(url) and total(url) >= 5 and total(url, "loadgen_level") > 0), 60)
        found = samples(url)
        assert found["loadgen_level", "concurrency", "run"] == 3
        assert found["loadgen_requests_in_flight",] <= 3
        assert found["loadgen_ttft_seconds_count", "hello"] >= 5
        said = over(process, 60)
    assert len(kept(tmp_path / "r")) >= 5, said.all
    assert not up(url)


@pytest.mark.slow
@pytest.mark.parametrize(("port", "says"), [
    (None, "Address already in use; choose another port"), ("many", "write a port, as 9464")])
def test_locust_refuses_a_port_that_cannot_be_before_anything_starts(
        tmp_path: Path, port: str | None, says: str) -> None:
    with closing(exporter.listen("0")) as taken, locust(
            port or str(taken.getsockname()[1]), "-u", "1", cwd=tmp_path) as process:
        said = over(process, 60)
    assert said.code == cli.USAGE, said.all
    assert says in said.all
    assert not (tmp_path / "r").exists()


# ----------------------------------------------------------------------------- a real Prometheus


@contextlib.contextmanager
def scraping(port: int, folder: Path) -> Iterator[str]:
    """The URL of a Prometheus that scrapes this port each second."""
    assert PROMETHEUS is not None, "needs a Prometheus: apt-get install prometheus"
    own = free_port()
    (folder / "prometheus.yml").write_text(
        "global: { scrape_interval: 1s, scrape_timeout: 1s }\n"
        f"scrape_configs: [{{ job_name: loadgen, static_configs: "
        f"[{{ targets: ['127.0.0.1:{port}'] }}] }}]\n", encoding="utf-8")
    with (folder / "prometheus.log").open("w") as log, subprocess.Popen(
            [PROMETHEUS, f"--config.file={folder}/prometheus.yml",
             f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address=127.0.0.1:{own}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0) as process:
        try:
            wait(lambda: up(f"http://127.0.0.1:{own}/-/ready"))
            yield f"http://127.0.0.1:{own}"
        finally:
            process.terminate()
            process.wait(20)


def asked(url: str, query: str) -> list[dict[str, Any]]:
    answer = json.loads(text(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"))
    assert answer["status"] == "success", answer
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def value(url: str, query: str) -> float | None:
    found = asked(url, query)
    return float(found[0]["value"][1]) if found else None


@real
@pytest.mark.slow
def test_a_prometheus_sees_what_the_journals_hold(tmp_path: Path) -> None:
    port = free_port()
    with scraping(port, tmp_path) as prometheus, start(
            "run", "mixed", "--concurrency", "4", "--duration", "9s", "--warmup", "1s", "--out",
            "r", "--no-report", "--metrics-port", str(port), *FAST, cwd=tmp_path) as process:
        wait(lambda: (value(prometheus, "sum(loadgen_requests_total)") or 0) >= 30, 60)
        assert value(prometheus, "up") == 1
        assert value(prometheus, 'loadgen_level{axis="concurrency", phase="run"}') == 4
        assert value(prometheus, "loadgen_requests_in_flight") == 4
        lag_s = value(prometheus, "loadgen_generator_lag_seconds")
        assert lag_s is not None
        assert 0 <= lag_s < 5
        assert PROMTOOL is not None
        checked = subprocess.run(
            [PROMTOOL, "check", "metrics"], input=text(f"http://127.0.0.1:{port}/metrics"),
            capture_output=True, text=True, check=False, timeout=30)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
        said = over(process, 90)
        assert said.code != cli.USAGE, said.all
        # the last scrape before it ended, against the records that had ended by then
        n = value(prometheus, "sum(last_over_time(loadgen_requests_total[5m]))")
        records = sorted(kept(tmp_path / "r"), key=lambda r: r.end_ns)
        assert n is not None
        assert 30 <= n <= len(records)
        seen = records[:int(n)]
        first = [(r.first_ns - r.due_ns) / 1e9 for r in seen if r.first_ns]
        ttft_s = value(prometheus, "sum(last_over_time(loadgen_ttft_seconds_sum[5m]))")
        # journals are written as requests end, but those of one instant in any order
        assert ttft_s == pytest.approx(sum(first), rel=0.05)
        by_class = {x["metric"]["class"]: float(x["value"][1]) for x in asked(
            prometheus, "sum by (class) (last_over_time(loadgen_output_tokens_total[5m]))")}
        assert set(by_class) == {r.cls for r in records}
        assert sum(by_class.values()) == pytest.approx(sum(r.output_tok or 0 for r in seen),
                                                       rel=0.05)
        p50_s = value(prometheus, "histogram_quantile(0.5, sum by (le) (last_over_time("
                                  "loadgen_ttft_seconds_bucket[5m])))")
        assert p50_s is not None
        assert p50_s <= 2.5 * sorted(first)[len(first) // 2] + 0.02  # to its bucket


@real
@pytest.mark.slow
def test_a_prometheus_sees_a_search_s_levels_and_verdicts(tmp_path: Path) -> None:
    port = free_port()
    with scraping(port, tmp_path) as prometheus, start(
            "sweep", "smoke", "--max-concurrency", "4", "--budget", "20s", "--out", "r",
            "--no-report", "--metrics-port", str(port), *FAST, cwd=tmp_path) as process:
        said = over(process, 120)
        assert said.code in (cli.PASS, cli.INCONCLUSIVE, cli.INVALID), said.all
        levels = {x["metric"]["level"] for x in asked(
            prometheus, "last_over_time(loadgen_leg_verdict[5m])")}
        before = RunFolder(tmp_path / "r").legs()[:-1]  # the last one's may come with the end
        assert {f"{leg.value:g}" for leg, _ in before} <= levels
        assert value(prometheus, "max_over_time(max(loadgen_level)[5m:500ms])") == 4
        assert not up(f"http://127.0.0.1:{port}/metrics")  # over with the search
