"""Labels of the throughput-latency chart: none lies on a point or on another label."""

import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import labels

POINTS = st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.001, 20.0)), min_size=1, max_size=12)


def rows_of(points: list[tuple[float, float]], safe: int = -1) -> list[dict[str, Any]]:
    return [{"q": "p50", "rps": rps, "s": s, "status": "safe" if i == safe else "",
             "label": f"{2**i}{' safe' if i == safe else ''}"} for i, (rps, s) in enumerate(points)]


def boxes(rows: list[dict[str, Any]]) -> list[labels.Box]:
    """Of the labels that were placed; the points lie as `place` has them, on a linear axis."""
    align = {(dx, dy): a for dx, dy, a in labels.SPOTS}
    top = max(r["rps"] for r in rows) * 1.2
    return [labels._box((labels.WIDTH * r["rps"] / top, -labels.HEIGHT * 0.8 * r["s"] / 8.0),
                        r["dx"], r["dy"], align[r["dx"], r["dy"]], len(r["label"]))
            for r in rows if "dx" in r]


def test_labels_of_points_that_are_apart_stand_at_their_right_below() -> None:
    rows = rows_of([(1.0, 2.0), (4.0, 4.0), (8.0, 8.0)])
    labels.place(rows, [2.0, 8.0])
    assert {(r["dx"], r["dy"]) for r in rows} == {labels.SPOTS[0][:2]}


def test_labels_of_points_that_are_close_make_room_for_each_other() -> None:
    rows = rows_of([(1.0, 2.0), (1.2, 2.1), (9.0, 8.0)])
    labels.place(rows, [2.0, 2.1, 8.0])
    found = boxes(rows)
    assert len(found) == 3
    assert not any(labels._overlap(a, b) for a, b in itertools.combinations(found, 2))
    assert (rows[0]["dx"], rows[0]["dy"]) != (rows[1]["dx"], rows[1]["dy"])


def test_of_points_on_one_spot_the_level_with_a_status_keeps_its_label() -> None:
    rows = rows_of([(5.0, 1.0)] * 8, safe=7)
    labels.place(rows, [1.0])
    assert "dx" in rows[7]
    assert any("dx" not in r for r in rows)  # four spots for eight labels


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(POINTS)
def test_no_two_labels_overlap_wherever_the_points_are(points: list[tuple[float, float]]) -> None:
    rows = rows_of([(rps, 1.0 + s % 7.0) for rps, s in points])  # a linear axis up to 8
    labels.place(rows, [1.0, 8.0])
    if max(r["rps"] for r in rows) > 0:
        assert not any(labels._overlap(a, b) for a, b in itertools.combinations(boxes(rows), 2))


def test_no_point_at_all_is_no_error() -> None:
    rows: list[dict[str, Any]] = []
    labels.place(rows, [])
    assert rows == []
