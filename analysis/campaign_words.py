"""What to deploy, up to what load, and why: sentences from a campaign's figures, and none without
them."""

from collections.abc import Iterator

from analysis import campaign_tables
from analysis.campaign_load import best_load, safe_per_money, stability
from analysis.matrix import Matrix, Measured, by_server, grouped, interval, ran, why_not
from analysis.phrases import load_of
from analysis.steps import duration

IN_WORDS = {"no": "not stable", "near the limit": "near the limit", "unknown": "not known",
            "too few": "not settled"}  # a load above the largest stable one


NEAR = 0.95  # of the best: less apart than prices are from one offer to the next


def sentences(matrix: Matrix) -> list[str]:
    found = [*_cheapest(matrix), *_cheapest_safe(matrix), *_safe(matrix), *_deploy(matrix),
             *_limits(matrix), *_fastest(matrix), *_refused(matrix)]
    if not found:
        found = ["No load was tried in this campaign, so that nothing can be said of how much a "
                 "server holds: the tables stand for themselves."]
    if matrix.simulated:
        found.append("All of this was simulated, from data sheets and one measured GPU: use it to "
                     "choose what to measure, and measure before you buy.")
    return found


def _ladder(matrix: Matrix) -> list[Measured]:
    """Loads that were tried, whatever table shows them."""
    return [m for m in matrix.cells if len(m.work.concurrency) > 1
            and {"concurrency", "users", "cost"} & set(m.work.tables)]


def _at(own: list[Measured], load: float, column: str) -> float | None:
    return interval(m.row[column] for m in ran(own) if m.done.cell.load == load)[0]


def _deploy(matrix: Matrix) -> Iterator[str]:
    """The server that gives most while it is stable, and its load."""
    for work, cells in grouped(_ladder(matrix), lambda m: m.work.name):
        best = []
        for server, own in by_server(cells):
            load = best_load(own)
            tok_s = None if load is None else _at(own, load, "output_tok_s")
            if load is not None and tok_s is not None:
                best.append((tok_s, server, load, own))
        if not best:
            continue
        best.sort(key=lambda b: -b[0])
        tok_s, server, load, own = best[0]
        repeats = len([m for m in ran(own) if m.done.cell.load == load])
        models = {m.server.model for m in cells if m.run is not None}
        # which of several models is the right one, speed does not say; with prices, they do
        alone = len(models) == 1 and not matrix.of("cost")
        head = f"Deploy {server}" if alone else f"{server} gives the most output of one server"
        said = (f"{head}, with at most {_requests(load)} in flight: in “{work}” it is stable "
                f"there, with {tok_s:,.0f} output tok/s and a mean TTFT of "
                f"{duration(_at(own, load, 'ttft_mean_s'))} ({repeats} "
                f"repeat{'s' * (repeats != 1)}).")
        if len(best) > 1:
            said += " The others at their largest stable load: " + ", ".join(
                f"{s} {t:,.0f} tok/s at {c:g}" for t, s, c, _ in best[1:4]) + "."
        yield said


def _limits(matrix: Matrix) -> Iterator[str]:
    """Why not more, of each server."""
    for (work, server), own in grouped(_ladder(matrix), lambda m: (m.work.name, m.server.name)):
        best = best_load(own)
        loads = sorted({m.done.cell.load for m in ran(own) if m.done.cell.load is not None})
        above = [x for x in loads if best is None or x > best]
        if not above:
            if best is not None:
                yield (f"{server}, {work}: {best:g} is the largest load that was tried, and it "
                       "was stable; its limit lies higher.")
            continue
        found = stability(m for m in own if m.done.cell.load == above[0])
        held = "no load was stable" if best is None else f"keep to {best:g}"
        why = f" ({found.why})" if found.why else ""
        yield f"{server}, {work}: {held}; at {above[0]:g} it is {IN_WORDS[found.answer]}{why}."


def _safe(matrix: Matrix) -> Iterator[str]:
    for m in matrix.of("safe"):
        if m.run is None or m.run.is_run or not m.run.legs:
            continue
        c = m.run.conclusion
        if c.safe is not None and c.proof is not None:
            yield (f"{m.server.name}, {m.work.name}: {c.load} up to "
                   f"{'at least ' * c.at_least}{load_of(m.run, c.safe)}, by {c.proof.good:,} of "
                   f"{c.proof.n:,} requests with {100 * c.confidence:g} % confidence.")
        else:
            yield f"{m.server.name}, {m.work.name}: {c.load}, no safe level was found."


def _cheapest(matrix: Matrix) -> Iterator[str]:
    found = []
    for server, own in by_server(matrix.of("cost")):
        row, load = own[0].server, best_load(own)
        tok_s = None if load is None else _at(own, load, "output_tok_s")
        if tok_s and row.price_per_gpu_hour:
            per = 3600 * tok_s / row.tensor_parallel / row.price_per_gpu_hour / 1e6
            found.append((per, server, load, _at(own, 1, "e2e_mean_s")))
    found.sort(reverse=True)
    if len(found) < 2:
        return
    per, server, load, alone_s = found[0]
    quick = min((f for f in found if f[3] is not None), key=lambda f: f[3] or 0.0, default=None)
    yield (f"Deploy {server}, as many as you need, with at most {_requests(load)} in flight each: "
           f"it is stable there and gives most for the money, {per:.2f} million tokens per "
           f"{matrix.campaign.currency} ("
           + ", ".join(f"{s} {p:.2f}" for p, s, _, _ in found[1:4]) + ")."
           + (f" Where one answer must come soonest, deploy {quick[1]}: {duration(quick[3])} "
              f"alone, {server} {duration(alone_s)}." if quick and quick[1] != server else ""))


def _cheapest_safe(matrix: Matrix) -> Iterator[str]:
    """Of servers whose safe loads were searched for."""
    for work, cells in grouped(matrix.of("safe"), lambda m: m.work.name):
        found = [(per, m) for m in cells if (per := safe_per_money(m)) is not None]
        if len(found) < 2:
            continue
        found.sort(key=lambda x: -x[0])
        said = [f"{m.server.name} {_at_least(m)}{per:,.0f}" for per, m in found[1:4]]
        per, m = found[0]
        assert m.run is not None
        open_end = any(_at_least(m) for _, m in found[1:])
        yield (f"Deploy {m.server.name}, as many as you need, with at most "
               f"{load_of(m.run, m.run.conclusion.safe or 0.0)} each: at its safe load for "
               f"“{work}” it answers most for the money, {_at_least(m)}{per:,.0f} requests per "
               f"{matrix.campaign.currency} ({', '.join(said)})."
               + " What says “at least” was not driven to its limit." * open_end
               + f" {found[1][1].server.name} is so near that this alone is no reason to choose."
               * (found[1][0] > NEAR * per))


def _at_least(m: Measured) -> str:
    return "at least " if m.run is not None and m.run.conclusion.at_least else ""


def _requests(load: float | None) -> str:
    return f"{load:g} request{'s' * (load != 1)}"


def _fastest(matrix: Matrix) -> Iterator[str]:
    """Of one answer alone, over the tasks."""
    if not matrix.of("speed"):
        return
    f = campaign_tables.speed(matrix).frame
    if "mean, tok/s" not in f or f["mean, tok/s"].notna().sum() < 2:
        return
    f = f.dropna(subset=["mean, tok/s"]).sort_values("mean, tok/s", ascending=False)
    told = [f"{s} {x:.1f} tok/s" for s, x in zip(f["server"], f["mean, tok/s"], strict=True)]
    yield f"Fastest at writing one answer, over the tasks: {told[0]}; then {', '.join(told[1:4])}."


def _refused(matrix: Matrix) -> Iterator[str]:
    for server, own in by_server(matrix.cells):
        if any(m.done.outcome in ("does not fit", "not started") for m in own):
            yield f"{server}: {why_not(own).rstrip('.')}."
