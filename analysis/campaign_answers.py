"""Tables of what the answers are worth: retention over turns, structured output, supported
features, tasks by kind of error. Made of the findings of a run: leg, session, turn, class, ok,
kind of error, as the validators left them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.matrix import (
    CONFIDENCE,
    Matrix,
    Measured,
    Table,
    by_server,
    frame_of,
    grouped,
    ran,
    why_not,
)
from loadgen.campaign import TableName

COLUMNS = ("server", "workload", "repeat", "cls", "session", "turn", "ok", "kind", "says")
RESAMPLES = 2000
SURE = 0.95  # share of good answers that its lower bound must reach for a plain yes
SIMULATED_WORDS = (" The simulator's words are no model's: it remembers and translates nothing, "
                   "which shows here; JSON and tools' arguments it makes by their schema.")
ALL = "all workloads"  # in the place of one's name
INTERVAL = "Low and high: the two-sided 95 % interval of the share (Clopper and Pearson)."


def findings(own: Sequence[Measured]) -> pd.DataFrame:
    """A row per checked answer that lies in its leg's window."""
    rows: list[dict[str, Any]] = []
    for m in ran(own):
        assert m.run is not None
        sample = m.sample
        inside = set(zip(sample["leg"], sample["session"], sample["turn"], strict=True))
        cell = {"server": m.server.name, "workload": m.work.name, "repeat": m.done.cell.repeat}
        rows += [{**cell, **{k: getattr(v, k) for k in COLUMNS[3:]}} for v in m.run.verdicts
                 if (v.leg, v.session, v.turn) in inside]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def structured_of(f: pd.DataFrame) -> pd.DataFrame:
    """Per server and workload, and of several workloads all together: the share of valid answers
    with its interval, and of each kind of error."""
    kinds = [k for k, _ in Counter(f["kind"].dropna()).most_common()]
    rows = []
    for server, of_server in f.groupby("server", sort=False):
        parts = [(str(w), own) for w, own in of_server.groupby("workload", sort=False)]
        for workload, own in [*parts, *([(ALL, of_server)] if len(parts) > 1 else [])]:
            n, ok = len(own), int(own["ok"].sum())
            lo, hi = share_interval(ok, n)
            errors = Counter(own["kind"].dropna())
            rows.append({"server": server, "workload": workload, "trials": n,
                         "valid, %": 100 * ok / n, "low, %": 100 * lo, "high, %": 100 * hi,
                         **{f"{k}, %": 100 * errors[k] / n for k in kinds}})
    return pd.DataFrame(rows)


def retention_of(f: pd.DataFrame) -> pd.DataFrame:
    """Per server: the share of correct answers, with an interval over sessions, whose turns share
    their history and are no independent trials; and the number of each kind of error."""
    kinds = [k for k, _ in Counter(f["kind"].dropna()).most_common()]
    rows = []
    for server, own in f.groupby("server", sort=False):
        each = own.groupby(["workload", "repeat", "session"])["ok"].agg(["sum", "count"])
        lo, hi = over_sessions(each["sum"].to_numpy(float), each["count"].to_numpy(float))
        errors = Counter(own["kind"].dropna())
        rows.append({"server": server, "dialogues": len(each), "questions": len(own),
                     "correct, %": 100 * own["ok"].mean(), "low, %": 100 * lo, "high, %": 100 * hi,
                     **{k: errors[k] for k in kinds}})
    return pd.DataFrame(rows)


def features_of(f: pd.DataFrame) -> pd.DataFrame:
    """Per server and workload, of one with several classes each: yes, partly, no, with how many of
    how many."""
    several = f.groupby("workload")["cls"].nunique()
    names = [f"{w}: {c}" if several[w] > 1 else str(w)
             for w, c in zip(f["workload"], f["cls"], strict=True)]
    rows = []
    for server, own in f.assign(feature=names).groupby("server", sort=False):
        rows.append({"server": server, **{str(name): _supports(part) for name, part in own.groupby(
            "feature", sort=False)}})
    return pd.DataFrame(rows)


def _supports(f: pd.DataFrame) -> str:
    n, ok = len(f), int(f["ok"].sum())
    errors = ", ".join(f"{k} {c}" for k, c in Counter(f["kind"].dropna()).most_common(3))
    if ok == n:
        return f"yes ({ok} of {n})"
    if ok == 0:
        return f"no (0 of {n}: {errors})"
    word = "yes" if share_interval(ok, n)[0] >= SURE else "partly"
    return f"{word} ({ok} of {n}; {errors})"


def share_interval(ok: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's, two-sided."""
    if n == 0:
        return 0.0, 1.0
    tail = (1 - CONFIDENCE) / 2
    lo = 0.0 if ok == 0 else float(stats.beta.ppf(tail, ok, n - ok + 1))
    hi = 1.0 if ok == n else float(stats.beta.ppf(1 - tail, ok + 1, n - ok))
    return lo, hi


def over_sessions(ok: "np.ndarray[Any, Any]", n: "np.ndarray[Any, Any]") -> tuple[float, float]:
    """Percentiles of the share over resampled sessions; where all or none is right, resampling
    cannot see what might be: then each session is one trial."""
    total = n.sum()
    if ok.sum() in (0, total) or len(n) < 2:
        return share_interval(int((ok == n).sum()), len(n))
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(n), (RESAMPLES, len(n)))
    shares = ok[picks].sum(axis=1) / n[picks].sum(axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    lo, hi = np.percentile(shares, [tail, 100 - tail])
    return float(lo), float(hi)


# ---------------------------------------------------------------------------- of a campaign


def structured(matrix: Matrix) -> Table:
    return Table("structured", "Structured output",
                 _joined(matrix, "structured", structured_of, ("server", "workload")),
                 f"Of the complete answers; failures of requests stand elsewhere. {INTERVAL}")


def retention(matrix: Matrix) -> Table:
    return Table("retention", "Retention over turns", _joined(matrix, "retention", retention_of),
                 "Does a later answer use what was said earlier? Low and high: 95 % interval over "
                 "dialogues (bootstrap), whose questions are not independent."
                 + SIMULATED_WORDS * matrix.simulated)


def features(matrix: Matrix) -> Table:
    return Table("features", "Feature support, as tested",
                 _joined(matrix, "features", features_of),
                 "Yes: every answer was right, or the lower 95 % bound of their share is 95 %. "
                 "Partly: some were. What counts is the answer, not what the server says it can."
                 + SIMULATED_WORDS * matrix.simulated)


def _joined(matrix: Matrix, table: TableName, of: Any,
            key: tuple[str, ...] = ("server",)) -> pd.DataFrame:
    """With a row for what has no findings; a server of which nothing ran has one row."""
    cells = matrix.of(table)
    f = findings(cells)
    told = of(f) if len(f) else pd.DataFrame(columns=list(key))
    known = {tuple(r[k] for k in key): r for r in told.to_dict("records")}
    rows: list[dict[Any, Any]] = []
    for server, whole in by_server(cells):
        if not ran(whole):
            rows.append({"server": server, "note": why_not(whole)})
            continue
        for at, own in grouped(whole, lambda m: (m.server.name, m.work.name)[:len(key)]):
            note = why_not(own) or ("" if at in known else "its answers were not checked")
            rows.append({**dict(zip(key, at, strict=True)), **known.get(at, {}), "note": note})
        if (together := known.get((server, ALL))) is not None:
            rows.append({**together, "note": ""})
    return frame_of(pd.DataFrame(rows, columns=[*told.columns, "note"]).to_dict("records"))
