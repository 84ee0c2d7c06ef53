"""Context retention: of the turns of dialogues that ask for what was told, how many answers had it,
and what the others did instead."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from analysis.frame import Run
from analysis.steps import percent
from loadgen import metrics

CHECK = "recall"
KINDS = ("forgot a fact", "mixed up roles", "logic break", "repeated question")
TITLE = "Context retention"
HEADS = ("class", "level", "asked", "correct", "share", "95 % interval", *KINDS)
NOTE = ("Turns that ask for what was told in earlier ones, where all of those were answered. "
        "Forgot: the fact does not come. Mixed up: it is said of the wrong person. Logic break: it "
        "is denied, or a number does not follow. Repeated question: the answer asks for it.")


def of(run: Run) -> list[dict[str, Any]]:
    """A row for each class and level."""
    names = {c.name for c in run.scenario.classes if c.validator is not None
             and c.validator.__struct_config__.tag == CHECK}
    level = {leg.id: leg.value for leg, _ in run.legs}
    found: dict[tuple[str, float], Counter[str | None]] = {}
    for v in run.verdicts:
        if v.cls in names and v.leg in level:
            found.setdefault((v.cls, level[v.leg]), Counter())[None if v.ok else v.kind] += 1
    return [_row(cls, value, own) for (cls, value), own in sorted(found.items())]


def _row(cls: str, value: float, own: Counter[str | None]) -> dict[str, Any]:
    n, correct = own.total(), own[None]
    return {"class": cls, "value": value, "asked": n, "correct": correct,
            "retention_frac": correct / n,
            "lower_frac": metrics.lower_bound(correct, n, 0.975),
            "upper_frac": metrics.upper_bound(correct, n, 0.975),
            "kinds": {kind: own[kind] for kind in (*KINDS, *sorted(
                k for k in own if k is not None and k not in KINDS)) if kind in KINDS or own[kind]}}


def cells(run: Run) -> Iterator[list[str]]:
    for r in of(run):
        yield [r["class"], f"{r['value']:g}", str(r["asked"]), str(r["correct"]),
               percent(r["retention_frac"]),
               f"{percent(r['lower_frac'], down=True)} – {percent(r['upper_frac'])}",
               *(str(r["kinds"][kind]) for kind in KINDS)]
