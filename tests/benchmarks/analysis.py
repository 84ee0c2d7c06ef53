"""How long does the analysis of a run take, and how much memory?

    python -m tests.benchmarks.analysis          a million records of 256 events
    python -m tests.benchmarks.analysis --records 10000 --repeats 3

Writes journals into a temporary folder (1.6 GB for a million), analyses them as `loadgen report
--no-html` does, in a process of its own, and removes them. Peak memory is that of the process and
of all that it started, added up, looked at 20 times a second.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import psutil

from loadgen.leg import Leg, Phase, Window
from loadgen.scenario import Closed
from loadgen.store import SCHEMA, Header, LegLine, RunFolder
from tests import synthetic

S = 1_000_000_000
LEGS = 12


def write(path: Path, records: int, events: int, legs: int) -> int:
    """A sweep of closed loops, whose answers have gaps of about 20 ms; the bytes of its records.
    Lines are the recorder's, put together of a few hundred ready streams."""
    folder = RunFolder.create(path, synthetic.manifest())
    journal, rng = folder.legs_journal(), np.random.default_rng(1)
    streams = []
    for _ in range(257):
        drawn = rng.integers(15_000, 25_000, events - 1)
        streams.append((b",".join(b"%d" % x for x in drawn), int(drawn.sum())))
    now_ns, each = 1000 * S, max(1, records // legs)
    with folder.records_path(0).open("wb") as out:
        out.write(msgspec.json.encode(Header(SCHEMA, "synthetic", 0, now_ns, 1_763_000_000 * S))
                  + b"\n")
        for i in range(legs):
            c = 2 ** min(i, legs - 2)
            phase: Phase = "confirm" if i == legs - 1 else "ladder"
            answer_ns = round(1.1 * S + streams[0][1] * 1000)
            span_ns = answer_ns * each // c
            leg = Leg(f"{phase}-{c}-r0", "concurrency", float(c), phase, 0, i, Closed(c), 0.0,
                      span_ns / S)
            journal.append(LegLine(leg=leg))
            end_ns = now_ns
            for k in range(each):
                due = now_ns + k * answer_ns // c
                first = due + 150_000_000 + (k * 7919 % 1000) * 100_000
                gaps, sum_us = streams[k % 257]
                end_ns = max(end_ns, first + 1000 * sum_us)
                out.write(
                    b'{"leg":"%b","shard":0,"seq":%d,"session":%d,"turn":0,"cls":"%b","due_ns":%d,'
                    b'"end_ns":%d,"outcome":"OK","sent_ns":%d,"headers_ns":%d,"first_ns":%d,'
                    b'"first_visible_ns":%d,"gaps_us":[%b],"stamp_kind":"kernel","inflight":%d,'
                    b'"want_prompt_tok":300,"max_tokens":%d,"prompt_tok":300,"output_tok":%d,'
                    b'"tok_source":"usage","status":200,"finish_reason":"length"}\n' % (
                        leg.id.encode(), i * each + k, k, (b"code", b"json", b"summary")[k % 3],
                        due, first + 1000 * sum_us, due + 100_000, first - 1_000_000, first, first,
                        gaps, c, events, events))
            journal.append(LegLine(window=Window(
                leg.id, now_ns, now_ns, now_ns + span_ns, end_ns, "done", lag_p99_s=0.001,
                cpu_frac=0.2, records=each)))
            now_ns = end_ns + S
        return out.tell()


def measured(command: list[str], cache: Path) -> tuple[float, float, int]:
    """Seconds, peak in MiB of all its processes together, exit code. `cache`: of compiled modules,
    which pip leaves behind where it installs."""
    began, peak = time.monotonic(), 0
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL,
                          env={**env, "PYTHONPYCACHEPREFIX": str(cache)}) as process:
        own = psutil.Process(process.pid)
        while process.poll() is None:
            used = 0
            try:
                for x in (own, *own.children(recursive=True)):
                    used += x.memory_info().rss
            except psutil.Error:
                pass
            peak = max(peak, used)
            time.sleep(0.05)
    return time.monotonic() - began, peak / 2**20, process.returncode


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    args.add_argument("--records", type=int, default=1_000_000)
    args.add_argument("--events", type=int, default=256)
    args.add_argument("--legs", type=int, default=LEGS)
    args.add_argument("--repeats", type=int, default=1)
    asked = args.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="loadgen-analysis-"))
    try:
        began = time.monotonic()
        size = write(folder / "run", asked.records, asked.events, asked.legs)
        print(f"{asked.records:,} records of {asked.events} events, {size / 1e9:.2f} GB, written "
              f"in {time.monotonic() - began:.0f} s; {os.cpu_count()} cores", flush=True)
        command = [sys.executable, "-m", "loadgen.cli", "report", str(folder / "run"), "--no-html"]
        write(folder / "small", 100, 8, 3)
        measured([*command[:4], str(folder / "small"), "--no-html"], folder / "pyc")
        for _ in range(asked.repeats):
            took_s, peak_mib, code = measured(command, folder / "pyc")
            print(f"loadgen report --no-html: {took_s:.2f} s, peak {peak_mib:,.0f} MiB, exit code "
                  f"{code}", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
