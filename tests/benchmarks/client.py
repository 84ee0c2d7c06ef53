"""What the generator costs and how exact it is, beside other clients, on one core each.

    python -m tests.benchmarks.client                  about 20 minutes; --quick: about one
    python -m tests.benchmarks.client --modes paced256,blast --json figures.json
    python -m tests.benchmarks.client --before /tmp/old-checkout
    python -m tests.benchmarks.client --with-vllm BIN --with-guidellm BIN --with-aiperf BIN \
        --tokenizer FOLDER

Clients: `epoll` and `naive` (reference_clients.py), `ours` (a real shard process), `loadgen run`
as a whole, `before` (ours of another checkout), `vllm` (vllm bench serve), `guidellm`, `aiperf`.
They take turns, and all of it is repeated: medians are printed, and how far repeats lie apart. Runs
in which the server was late or the core was shared (†) count only where there is no other.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from tests.benchmarks import peers
from tests.benchmarks.harness import CLIENT_CORE, HERE, Mode, Run, Tool, measure

_SIZE = ("--port", "{port}", "--streams", "{streams}", "--each", "{each}", "--tokens", "{tokens}",
         "--out", "{out}")
_SHORT_TOK, _SHORT_TTFT_MS, _SHORT_ITL_MS = 16, 50.0, 5.0  # answers of the open loop

MODES = (
    Mode("paced64", 64, 2),
    Mode("paced256", 256, 2),
    Mode("paced512", 512, 2),
    Mode("busy64", 64, 2, busy=True),
    Mode("busy512", 512, 2, busy=True),
    Mode("blast", 64, 13, ttft_ms=0, itl_ms=0, is_paced=False),
    Mode("sat", 64, 13, ttft_ms=0, itl_ms=0, coalesce=32, is_paced=False),
    *(Mode(f"open{rate}", 50, n // 50, _SHORT_TOK, _SHORT_TTFT_MS, _SHORT_ITL_MS, rate_rps=rate)
      for rate, n in ((50, 5000), (200, 5000), (1000, 5000))),
)


def quick(mode: Mode) -> Mode:
    """The same, much shorter: not good for p99s."""
    if mode.rate_rps:
        return replace(mode, each=max(1, round(mode.rate_rps * 3 / 50)))
    return replace(mode, each=1 if mode.is_paced else 4, tokens=64 if mode.is_paced else 256)


def tools(args: argparse.Namespace) -> list[Tool]:
    reference = (sys.executable, str(HERE / "reference_clients.py"))
    ours = (sys.executable, str(HERE / "ours.py"), "--core", str(CLIENT_CORE), *_SIZE)
    loadgen = (str(Path(sys.executable).parent / "loadgen"), "run", "{folder}/bench.toml",
               "--base-url", "http://127.0.0.1:{port}", "--no-report", "--num-prompts", "{n}",
               "--seed", "7", "--out", "{folder}/run")
    known = [Tool("epoll", (*reference, "epoll", *_SIZE), open_loop=None),
             Tool("naive", (*reference, "naive", *_SIZE)),
             Tool("ours", ours, pinned=False),
             Tool("run", loadgen, marks=False, load=("--concurrency", "{streams}"),
                  codes=(0, 1), reads=peers.of_loadgen)]  # 1: the SLO was not met
    if args.before:
        known.append(Tool("before", ours, pinned=False, checkout=args.before.resolve()))
    known += [peers.PEERS[name](binary, args.tokenizer)
              for name, binary in given_peers(args).items()]
    return [tool for tool in known if not args.clients or tool.name in args.clients]


def given_peers(args: argparse.Namespace) -> dict[str, Path]:
    return {name: binary.absolute() for name in peers.PEERS
            if (binary := getattr(args, f"with_{name}"))}


def run_all(modes: Sequence[Mode], clients: Sequence[Tool], repeats: int) -> list[Run]:
    """Clients take turns within each mode, all of it `repeats` times."""
    runs = []
    for k in range(repeats):
        for mode in modes:
            for tool in clients:
                if mode.rate_rps and tool.open_loop is None:
                    continue
                try:
                    run = measure(tool, mode)
                except RuntimeError as e:
                    print(f"{tool.name} in {mode.name}: {e}", file=sys.stderr)
                    continue
                runs.append(run)
                print(f"[{k + 1}/{repeats}] {_line(run)}", file=sys.stderr, flush=True)
    return runs


def _line(run: Run) -> str:
    seen = run.accuracy
    exact = "" if seen is None or seen.ttft is None or seen.gap is None else (
        f"  ttft p99 {seen.ttft.p99:.3f} gap p99 {seen.gap.p99:.3f} ms")
    return (f"{run.mode:9} {run.client:7} {run.us_per_event:7.2f} µs/event  start-up "
            f"{run.start_up_cpu_s:.2f} s  foreign {run.foreign_frac:4.0%}  server late p99 "
            f"{run.server_late_p99_ms:.2f} ms  load {os.getloadavg()[0]:.1f}{exact}"
            f"{'  †' if run.doubtful else ''}")


# ----------------------------------------------------------------------------------------- tables


def table(runs: Sequence[Run]) -> str:
    clients = list(dict.fromkeys(run.client for run in runs))
    modes = list(dict.fromkeys(run.mode for run in runs))
    parts = [_costs(runs, clients, modes), _accuracy(runs, clients, modes),
             _reports(runs, clients, modes), _open(runs, clients, modes),
             _processes(runs, clients)]
    return "\n\n".join(part for part in parts if part)


def good(runs: Sequence[Run], client: str, mode: str) -> list[Run]:
    """The repeats that count: those without †, if there are any."""
    mine = [run for run in runs if (run.client, run.mode) == (client, mode)]
    return [run for run in mine if not run.doubtful] or mine


def middle(runs: Sequence[Run], of: Callable[[Run], float | None]) -> float | None:
    values = [value for run in runs if (value := of(run)) is not None]
    return statistics.median(values) if values else None


def _costs(runs: Sequence[Run], clients: Sequence[str], modes: Sequence[str]) -> str:
    lines = ["CPU, µs per SSE event from the clock's start to the process's end (run and other "
             "tools: to the last answer): median [min–max] of n, × epoll, × naive", "",
             "| client | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    for client in clients:
        cells = [_cost(runs, client, mode) for mode in modes]
        lines.append(f"| {client} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cost(runs: Sequence[Run], client: str, mode: str) -> str:
    def cost(who: str) -> float | None:
        return middle(good(runs, who, mode), lambda run: run.us_per_event)

    mine, kept = cost(client), good(runs, client, mode)
    if mine is None:
        return "–"
    ratios = [f"{mine / base:.2f}×" if (base := cost(who)) else "–" for who in ("epoll", "naive")]
    ends = [run.us_per_event for run in kept]
    mark = "†" if kept[0].doubtful else ""
    return f"{mine:.2f} [{min(ends):.2f}–{max(ends):.2f}] n={len(kept)}{mark}, {', '.join(ratios)}"


def _accuracy(runs: Sequence[Run], clients: Sequence[str], modes: Sequence[str]) -> str:
    lines = ["Error against the server's log, ms: p50 / p99 / max (medians over repeats; what came "
             "in a host stall, or by a send() of > 0.1 ms, is set aside)", "",
             "| mode | client | TTFT | gap | requests | wrong | set aside |",
             "|---|---|---|---|---|---|---|"]
    for mode in modes:
        for client in clients:
            kept = [r.accuracy for r in good(runs, client, mode) if r.accuracy is not None]
            if not kept:
                continue
            figures = []
            for name in ("ttft", "gap"):
                spreads = [s for a in kept if (s := getattr(a, name)) is not None]
                figures.append(" / ".join(
                    f"{statistics.median(getattr(s, q) for s in spreads):.3f}"
                    for q in ("p50", "p99", "max")) if spreads else "–")
            counts = [sum(getattr(a, name) for a in kept)
                      for name in ("requests", "wrong", "aside")]
            lines.append(f"| {mode} | {client} | " + " | ".join(map(str, figures + counts)) + " |")
    return "\n".join(lines) if len(lines) > 4 else ""


def _reports(runs: Sequence[Run], clients: Sequence[str], modes: Sequence[str]) -> str:
    lines = ["What each client itself reports against the server's log, deviation in % (medians "
             "over repeats). TTFT counts from the send, of `run` from when the request was due. "
             "Inter-token: gaps between events; of `texts`: between events with text; of `means`: "
             "the mean gap of each request, in which a late read does not show", "",
             "| mode | client | TTFT p50 | TTFT p99 | inter-token p99 | requests: reported / "
             "arrived / asked |", "|---|---|---|---|---|---|"]
    for mode in modes:
        for client in clients:
            kept = good(runs, client, mode)
            found = [run.deviation for run in kept if run.deviation is not None]
            if not found:
                continue
            cells = []
            for name in ("ttft_p50_pct", "ttft_p99_pct", "gap_p99_pct"):
                off = [x for one in found if (x := getattr(one, name)) is not None]
                cells.append(f"{statistics.median(off):+.1f}" if off else "–")
            cells[-1] += f" ({found[0].gap})" if found[0].gap != "events" else ""
            counts = [sum(getattr(one, name) for one in found)
                      for name in ("reported", "arrived", "asked")]
            mark = "†" if kept[0].doubtful else ""
            lines.append(f"| {mode} | {client}{mark} | {' | '.join(cells)} | "
                         f"{' / '.join(map(str, counts))} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def _open(runs: Sequence[Run], clients: Sequence[str], modes: Sequence[str]) -> str:
    lines = ["Open loop, by the server's kernel-stamped arrivals (medians over repeats). KS: p of "
             "the gaps against exponential ones; of the plan itself", "",
             "| mode | client | achieved/s | arrived | KS p (plan's) | arrival − due, ms: p50 / "
             "p99 / max | not OK |", "|---|---|---|---|---|---|---|"]
    for mode in modes:
        for client in clients:
            kept = [r for r in good(runs, client, mode) if r.arrivals is not None]
            if not kept:
                continue
            a = [run.arrivals for run in kept if run.arrivals is not None]
            late = [x.lateness for x in a if x.lateness is not None]
            how = " / ".join(f"{statistics.median(getattr(s, q) for s in late):.3f}"
                             for q in ("p50", "p99", "max")) if late else "–"
            plan_p = [x.plan_p for x in a if x.plan_p is not None]
            lines.append(
                f"| {mode} | {client} | {statistics.median(x.achieved_rps for x in a):.1f} | "
                f"{sum(x.n for x in a)} | {statistics.median(x.ks_p for x in a):.2g} "
                f"({f'{statistics.median(plan_p):.2g}' if plan_p else '–'}) | {how} | "
                f"{sum(n for r in kept for k, n in r.outcomes.items() if k != 'OK'):.0f} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def _processes(runs: Sequence[Run], clients: Sequence[str]) -> str:
    lines = ["| client | start-up CPU s | CPU after the last answer, s | processes | peak RSS of "
             "the largest, MB |", "|---|---|---|---|---|"]
    for client in clients:
        mine = [run for run in runs if run.client == client]
        processes = max((r.processes for r in mine if r.processes), default="–")
        lines.append(f"| {client} | {statistics.median(r.start_up_cpu_s for r in mine):.2f} | "
                     f"{statistics.median(r.post_cpu_s for r in mine):.2f} | {processes} | "
                     f"{max(r.rss_mb for r in mine):.0f} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("--quick", action="store_true", help="about a minute, one repeat")
    options.add_argument("--repeats", type=int, help="default: 3; 1 with --quick")
    options.add_argument("--modes", type=lambda s: s.split(","), default=[])
    options.add_argument("--clients", type=lambda s: s.split(","), default=[])
    options.add_argument("--before", type=Path, help="another checkout of loadgen")
    options.add_argument("--with-vllm", type=Path, help="its `vllm`, for vllm bench serve")
    options.add_argument("--with-guidellm", type=Path, help="its `guidellm`")
    options.add_argument("--with-aiperf", type=Path, help="its `aiperf`")
    options.add_argument("--tokenizer", type=Path, help="a local folder, for these three")
    options.add_argument("--json", type=Path, help="every run's figures")
    args = options.parse_args()
    if given_peers(args) and not args.tokenizer:
        options.error("--with-… needs --tokenizer FOLDER")
    modes = [mode for mode in MODES if not args.modes or mode.name in args.modes]
    if args.quick:
        modes = [quick(mode) for mode in modes if args.modes or mode.name in (
            "paced64", "paced256", "blast", "busy64", "open200")]
    began = time.monotonic()
    runs = run_all(modes, tools(args), args.repeats or (1 if args.quick else 3))
    host = {"cpu_count": os.cpu_count(), "load": os.getloadavg(), "kernel": platform.release(),
            "python": platform.python_version(),
            "peers": {name: peers.version(name, at) for name, at in given_peers(args).items()},
            "took_s": round(time.monotonic() - began)}
    if args.json:
        args.json.write_text(json.dumps(
            {"command": sys.argv, "host": host, "runs": msgspec.to_builtins(runs)}, indent=1))
    print(f"{table(runs)}\n\n{json.dumps(host)}")


if __name__ == "__main__":
    main()
