"""How small a difference `loadgen compare` can see: half the width of its intervals, of pairs of
runs of a minute of one server of the simulator.

    python -m tests.benchmarks.reach --n 12

`all`: as the table prints it, all figures of two levels at once; `gate`: as --max-regression of one
figure at one level has it. Medians over pairs, and `at best`, with endless requests.
"""

import argparse
import math
import tempfile
from pathlib import Path
from statistics import NormalDist, median

from analysis import compare
from analysis.spread import RUNS_DIFFER, RUNS_DIFFER_OPEN
from tests.benchmarks import coverage

FIRST_SEED = 9000


def pair(what: str, seed: int) -> dict[tuple[float, str], tuple[float, float]]:
    """(level, figure) → half the widths of its intervals: all, gate."""
    with tempfile.TemporaryDirectory() as place:
        base, new = (coverage.folder(Path(place) / f"{i}", what, 2 * seed + i, 1.0)
                     for i in range(2))
        limits = [(name, 0.1) for name in compare.FIGURES]
        every = {(d.level, d.name): (d.hi - d.lo) / 2
                 for d in compare.compare(base, new).differences}
        found = {}
        for level in coverage.COMPARED[what][1]:
            for r in compare.compare(base, new, limits, [level]).regressions:
                if r.level is not None and r.lo is not None and r.hi is not None:
                    found[level, r.name] = every[level, r.name], (r.hi - r.lo) / 2
    return found


def main() -> None:
    args = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    args.add_argument("--n", type=int, default=12, help="pairs of either axis")
    n = args.parse_args().n
    print("| axis | level | figure | all | gate |\n|---|---|---|---|---|")
    for what, each in (("concurrency", RUNS_DIFFER), ("rate", RUNS_DIFFER_OPEN)):
        found = [pair(what, FIRST_SEED + i) for i in range(n)]
        for level, name in found[0]:
            own = [x[level, name] for x in found if (level, name) in x]
            wide, gate = (100 * median(x[i] for x in own) for i in range(2))
            print(f"| {what} | {level:g} | {name} | ± {wide:.1f} % | ± {gate:.1f} % |", flush=True)
        best = 100 * math.sqrt(2) * each * NormalDist().inv_cdf(1 - compare.ALPHA)
        print(f"| {what} | any | a latency, at best | | ± {best:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
