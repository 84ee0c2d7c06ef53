"""Peak memory of the generator with long streams: the shard process of a real run, its largest
resident set by wait4.

    python -m tests.benchmarks.memory                  1,024 streams × 8,192 tokens, 40 ms apart
    python -m tests.benchmarks.memory --streams 64 --tokens 1024

Exits 1 when the limit (--limit-mb, 400) is passed. The server keeps no log: it would need as much.
"""

import argparse
import os
import subprocess
import sys
import time

from tests.benchmarks import truth
from tests.benchmarks.harness import CLIENT_CORE, HERE, ROOT, Mode, server


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("--streams", type=int, default=1024)
    options.add_argument("--tokens", type=int, default=8192)
    options.add_argument("--itl-ms", type=float, default=40.0,
                         help="between events; 0: as fast as the generator reads")
    options.add_argument("--limit-mb", type=float, default=400.0)
    args = options.parse_args()
    mode = Mode("memory", args.streams, 1, args.tokens, itl_ms=args.itl_ms)
    began = time.monotonic()
    with server(mode, None) as port:
        said = subprocess.run(
            [sys.executable, str(HERE / "ours.py"), "--port", str(port), "--streams",
             str(args.streams), "--each", "1", "--tokens", str(args.tokens), "--core",
             str(CLIENT_CORE)], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    marks = truth.marks(said)
    rss_mb, events = marks["usage"]["rss_kb"] / 1024, args.streams * (args.tokens + 3)
    cpu_s = marks["usage"]["cpu_s"] - marks["begin"]["cpu_s"]
    print(f"{args.streams} streams × {args.tokens} tokens: peak {rss_mb:.0f} MB (limit "
          f"{args.limit_mb:.0f}), {cpu_s / events * 1e6:.2f} µs/event, outcomes "
          f"{marks['outcomes']}, {time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.1f}")
    sys.exit(rss_mb > args.limit_mb)


if __name__ == "__main__":
    main()
