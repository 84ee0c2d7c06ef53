"""The null server on a port of 127.0.0.1:

    python -m servers.null --ttft-ms 100 --itl-ms 20 --log truth.bin

Prints `PORT n`, serves until SIGTERM or the end of its stdin, then writes the log. A line on its
stdin that names a file has the log so far written there, and forgotten; it says `SAVED` then.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
from pathlib import Path

from servers.null.server import Server

PR_SET_PDEATHSIG = 1


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("--ttft-ms", type=float, default=0.0)
    options.add_argument("--itl-ms", type=float, default=0.0, help="0: as fast as it goes")
    options.add_argument("--tokens", type=int, help="of each answer; default: its max_tokens")
    options.add_argument("--own-phase", action="store_true", help="each stream has its own grid")
    options.add_argument("--coalesce", type=int, default=1, help="token events per write")
    options.add_argument("--port", type=int, default=0)
    options.add_argument("--log", type=Path, help="written at the end")
    options.add_argument("--keep-log", action="store_true", help="for whoever asks on stdin")
    options.add_argument("--realtime", action="store_true",
                         help="nothing else may hold its core, where that is allowed")
    options.add_argument("--parent-pid", type=int, help="exit when it is gone")
    args = options.parse_args()
    if args.parent_pid:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != args.parent_pid:
            sys.exit(f"--parent-pid {args.parent_pid} is not this process's parent, or is gone")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = Server(round(args.ttft_ms * 1e6), round(args.itl_ms * 1e6), args.tokens,
                    not args.own_phase, args.coalesce, args.keep_log or args.log is not None,
                    args.port)
    if args.realtime:  # niceness alone lets a neighbour finish its slice first: 4 ms late
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server.listen_to(0)
    print("PORT", server.port, flush=True)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        server.serve()
    finally:
        if args.log:
            server.save(args.log)


if __name__ == "__main__":
    main()
