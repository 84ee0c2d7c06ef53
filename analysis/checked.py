"""What the validators found: valid answers by class and level, and each kind of error."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from analysis import retention
from analysis.frame import Run
from analysis.steps import percent
from loadgen import metrics, outputs
from loadgen.leg import Leg
from loadgen.openai import Answer
from loadgen.record import Outcome
from loadgen.store import Verdict

NOTE = ("Each complete answer of a class with a validator was checked, those of the warm-up too. "
        "Where it counts, an answer that is not valid is a miss.")
HEADS = ("class", "check", "level", "checked", "valid", "share", "counts", "kinds of error")
SHOWN_HEADS = ("class", "kind of error", "answers", "for example")


def classes(run: Run) -> dict[str, str]:
    """Those with a validator, and which check it is."""
    return {c.name: str(c.validator.__struct_config__.tag) for c in run.scenario.classes
            if c.validator is not None}


def of(run: Run) -> list[dict[str, Any]]:
    """A row for each class and level."""
    level = {leg.id: leg.value for leg, _ in run.legs}
    found: dict[tuple[str, float], list[Verdict]] = {}
    for v in run.verdicts:
        if v.leg in level:
            found.setdefault((v.cls, level[v.leg]), []).append(v)
    checks = classes(run)
    return [{"class": cls, "check": checks.get(cls, ""), "value": value, "checked": len(own),
             "valid": sum(v.ok for v in own), "counts": own[0].counts,
             "kinds": dict(Counter(v.kind or "" for v in own if not v.ok).most_common())}
            for (cls, value), own in sorted(found.items())]


def figures(run: Run) -> dict[str, Any] | None:
    """None: no class has a validator."""
    if not classes(run):
        return None
    return {"levels": of(run), "unchecked": unchecked(run), "quality": quality(run),
            "made": not _virtual(run)}


def unchecked(run: Run) -> int:
    """Complete answers of classes with a validator that have no verdict. Of a dialogue only some
    turns ask for anything."""
    f = run.frame
    each = {name for name, check in classes(run).items() if check != retention.CHECK}
    whole = f["cls"].isin([*each]) & (f["outcome"] == Outcome.OK.value)
    legs = {leg.id for leg, _ in run.legs}
    return max(0, int(whole.sum()) - sum(v.leg in legs and v.cls in each for v in run.verdicts))


def _virtual(run: Run) -> bool:
    return bool(run.manifest.server.get("virtual_time"))


def says(run: Run) -> str:
    """In a sentence or two; empty where no class has a validator."""
    if not classes(run):
        return ""
    if _virtual(run):
        return ("Virtual time makes no answers, only when their tokens come: the validators of "
                f"{', '.join(classes(run))} were not run.")
    parts = []
    for cls, check in classes(run).items():
        own = [r for r in of(run) if r["class"] == cls]
        n, valid = sum(r["checked"] for r in own), sum(r["valid"] for r in own)
        if n:
            kinds: Counter[str] = sum((Counter(r["kinds"]) for r in own), Counter())
            wrong = "".join(f", {k} {m}" for k, m in kinds.most_common())
            parts.append(f"{cls} ({check}) {valid} of {n} valid{wrong}")
    said = f"Answers: {'; '.join(parts) or 'none was checked'}."
    left = unchecked(run)
    return f"{said} {left} not checked: their texts are not in this folder." if left else said


def quality(run: Run) -> list[dict[str, Any]]:
    """Of legs that sent the same prompts: by level the share of valid answers, and of those that
    are, to the letter, the answer at the lowest level. Empty where there is but one such leg."""
    alike: dict[tuple[int, int | None], list[Leg]] = {}
    for leg, _ in run.legs:
        if leg.num_sessions is not None:
            alike.setdefault((leg.seed, leg.num_sessions), []).append(leg)
    found = []
    for legs in alike.values():
        legs.sort(key=lambda leg: leg.value)
        first: dict[tuple[int, int], Answer | None] | None = None
        for leg in legs if len(legs) > 1 else ():
            own = [v for v in run.verdicts if v.leg == leg.id]
            said = {(v.session, v.turn): outputs.read(run.folder.path, v.ref) for v in own}
            first = said if first is None else first
            both = [k for k in said if k in first]
            found.append({"value": leg.value, "n": len(own), "valid": sum(v.ok for v in own),
                          "compared": len(both), "same": sum(said[k] == first[k] for k in both)})
    return found


QUALITY_NOTE = ("The same prompts at each level, at temperature 0. Same: to the letter the answer "
                "at the lowest level. Batches are added up in another order under load, so that a "
                "few answers differ on a sound server; what must not fall is the share of valid "
                "ones. Latencies of prompts that come again are flattered by a prefix cache.")
QUALITY_HEADS = ("concurrency", "answers", "valid", "share valid", "at least", "same", "share same")


def quality_cells(run: Run) -> Iterator[list[str]]:
    for r in quality(run):
        n, compared = r["n"], r["compared"]
        lower = metrics.lower_bound(r["valid"], n, run.criteria.confidence)
        yield [f"{r['value']:g}", str(n), str(r["valid"]),
               percent(r["valid"] / n) if n else "–", percent(lower, down=True),
               f"{r['same']} of {compared}", percent(r["same"] / compared) if compared else "–"]


def cells(run: Run) -> Iterator[list[str]]:
    for r in of(run):
        yield [r["class"], r["check"], f"{r['value']:g}", str(r["checked"]), str(r["valid"]),
               percent(r["valid"] / r["checked"]), "yes" if r["counts"] else "no",
               ", ".join(f"{kind} {n}" for kind, n in r["kinds"].items()) or "none"]


def examples(run: Run) -> Iterator[list[str]]:
    """Of each class and kind of error the first one's words."""
    shown: dict[tuple[str, str], list[Verdict]] = {}
    for v in run.verdicts:
        if not v.ok:
            shown.setdefault((v.cls, v.kind or ""), []).append(v)
    for (cls, kind), own in sorted(shown.items()):
        yield [cls, kind, str(len(own)), own[0].says]
