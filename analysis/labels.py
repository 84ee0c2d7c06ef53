"""Where the labels of the throughput-latency chart stand, so that none lies on another."""

import math
from collections.abc import Sequence
from typing import Any

SPOTS = ((6, 14, "left"), (6, -12, "left"), (-6, 14, "right"), (-6, -12, "right"))  # dx, dy, align
WIDTH, HEIGHT = 310.0, 300.0  # pixels of a panel on a phone: what is apart there is so everywhere
CHARACTER, HALF_LINE, HALF_POINT = 7.0, 6.0, 5.0  # pixels

Box = tuple[float, float, float, float]  # left, top, right, bottom; y grows downwards


def place(rows: Sequence[dict[str, Any]], shown_s: Sequence[float]) -> None:
    """Gives each median ("q": "p50") its label's "dx" and "dy": the first of SPOTS that is clear
    of all points and of the labels placed before, those with a "status" first. None, if there is
    none: of two labels on each other neither can be read. `shown_s`: what the y axis spans."""
    if not rows:
        return
    top_rps, low_s, high_s = max(r["rps"] for r in rows) * 1.2 or 1.0, min(shown_s), max(shown_s)
    log = high_s > 8 * low_s > 0  # as the axis

    def at(r: dict[str, Any]) -> tuple[float, float]:
        up = (math.log(r["s"] / low_s) / math.log(high_s / low_s) if log
              else r["s"] / (high_s or 1.0))
        return WIDTH * r["rps"] / top_rps, -HEIGHT * 0.8 * up  # the axis ends at a round number

    taken: list[Box] = [(x - HALF_POINT, y - HALF_POINT, x + HALF_POINT, y + HALF_POINT)
                        for x, y in map(at, rows)]
    for r in sorted((r for r in rows if r["q"] == "p50"), key=lambda r: not r["status"]):
        for dx, dy, align in SPOTS:
            box = _box(at(r), dx, dy, align, len(r["label"]))
            if not any(_overlap(box, other) for other in taken):
                r["dx"], r["dy"] = dx, dy
                taken.append(box)
                break


def _box(at: tuple[float, float], dx: int, dy: int, align: str, length: int) -> Box:
    wide = CHARACTER * length
    left, middle = at[0] + dx - (wide if align == "right" else 0), at[1] + dy
    return left, middle - HALF_LINE, left + wide, middle + HALF_LINE


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
