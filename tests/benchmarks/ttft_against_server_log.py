"""Is the TTFT that a client shows the one that the server saw? Locust's users and `loadgen run`, at
16 requests in flight, against the simulator's own log of each request (one clock on one host).

    python -m tests.benchmarks.ttft_against_server_log [--users 16] [--seconds 10] [--mix smoke]
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from msgspec import Struct

from loadgen import openai, plan, scenario
from loadgen.prompts import Ratio
from loadgen.record import Outcome, RequestRecord
from loadgen.store import RunFolder

ROOT = Path(__file__).resolve().parent.parent.parent


class Served(Struct, frozen=True):
    """A line of the simulator's log; stamps are ns of CLOCK_MONOTONIC."""

    body: str
    received_ns: int
    first_ns: int | None
    last_ns: int | None
    tokens: int


Pair = tuple[RequestRecord, Served]


class Figures(Struct, frozen=True):
    """Of the requests that ended well; times in ms, medians. `client`: first − sent; `server`:
    first token about to be written − head received. `wrong`: requests whose events are not in
    order: sent ≤ received ≤ first at the server ≤ first at the client."""

    n: int
    client_ms: float
    server_ms: float
    sent_to_received_ms: float
    first_to_first_ms: float
    wrong: int

    @property
    def apart_ms(self) -> float:
        return abs(self.client_ms - self.server_ms)

    @property
    def agree(self) -> bool:
        """Within 5 % or 2 ms."""
        return self.apart_ms <= max(2.0, 0.05 * self.server_ms)


def figures(pairs: list[Pair]) -> Figures:
    def ms(values: list[int]) -> float:
        return median(values) / 1e6

    stamps = [(r.sent_ns or 0, s.received_ns, s.first_ns or 0, r.first_ns or 0) for r, s in pairs]
    return Figures(
        n=len(pairs), client_ms=ms([d - a for a, _, _, d in stamps]),
        server_ms=ms([c - b for _, b, c, _ in stamps]),
        sent_to_received_ms=ms([b - a for a, b, _, _ in stamps]),
        first_to_first_ms=ms([d - c for _, _, c, d in stamps]),
        wrong=sum(not a <= b <= c <= d for a, b, c, d in stamps))


def pairs(folder: Path, log: Path) -> list[Pair]:
    """Records of a run with what the server noted of the same body; each body was sent once."""
    run = RunFolder(folder)
    manifest = run.manifest()
    mix = scenario.parse(manifest.scenario, "manifest")
    ratios = {k: msgspec.convert(v, Ratio) for k, v in manifest.ratios.items()}
    seeds = {leg.id: leg.seed for leg, _ in run.legs()}
    lines = [msgspec.json.decode(x, type=Served) for x in log.read_bytes().splitlines()]
    served = {x.body: x for x in lines}

    def body(r: RequestRecord) -> str:
        session = plan.session(mix, seeds[r.leg], r.session, None)
        of = mix.of(session.cls)
        text = plan.prompt(of, session, 0, seeds[r.leg], ratios[of.name])
        raw = openai.body(mix.endpoint, manifest.model, text, session.turns[0].output_tok, of)
        return hashlib.blake2b(raw, digest_size=8).hexdigest()

    return [(r, served[body(r)]) for r in run.records() if r.outcome is Outcome.OK]


def locust(folder: Path, users: int, seconds: float, mix: str) -> list[Pair]:
    log = folder / "served.jsonl"
    _call(folder, "locust", "-f", str(ROOT / "locustfiles" / "chat.py"), "--headless",
          "--only-summary", "-u", str(users), "-r", str(users), "-t", f"{seconds:g}s",
          "--scenario", mix, "--run-folder", "r", "--no-report",
          "--server-options", f"--request-log {log}")
    return pairs(folder / "r", log)


def ours(folder: Path, users: int, seconds: float, mix: str) -> list[Pair]:
    log = folder / "served.jsonl"
    _call(folder, "loadgen.cli", "run", mix, "--concurrency", str(users), "--duration",
          f"{seconds:g}s", "--out", "r", "--no-report", "--", "--request-log", str(log))
    return pairs(folder / "r", log)


WAYS = {"Locust, HttpUser": locust, "loadgen run": ours}


def measure(way: str, users: int = 16, seconds: float = 10.0, mix: str = "smoke") -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        return figures(WAYS[way](Path(folder), users, seconds, mix))


def _call(folder: Path, *module_and_options: str) -> None:
    """Raises AssertionError if nothing was run. A verdict is none of our business."""
    done = subprocess.run([sys.executable, "-m", *module_and_options], cwd=folder, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          timeout=120 + 60, check=False)
    assert done.returncode in (0, 1, 3, 5), done.stdout + done.stderr


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--users", type=int, default=16)
    options.add_argument("--seconds", type=float, default=10.0)
    options.add_argument("--mix", default="smoke", help="a scenario")
    options.add_argument("--json", action="store_true")
    asked = options.parse_args()
    print(f"{'client':18} {'n':>5} {'TTFT client':>12} {'server':>9} {'apart':>8} "
          f"{'sent→received':>14} {'first→first':>12}  order")
    for way in WAYS:
        f = measure(way, asked.users, asked.seconds, asked.mix)
        print(f"{way:18} {f.n:5} {f.client_ms:9.2f} ms {f.server_ms:6.2f} ms {f.apart_ms:5.2f} ms "
              f"{f.sent_to_received_ms:11.2f} ms {f.first_to_first_ms:9.2f} ms  "
              f"{'held' if not f.wrong else f'{f.wrong} wrong'}")
        if asked.json:
            said: dict[str, Any] = msgspec.to_builtins(f)
            print(json.dumps({"client": way, **said}))


if __name__ == "__main__":
    main()
