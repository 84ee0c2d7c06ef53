"""The memory-bound ceiling: how many requests of this mix the server's KV cache holds at once.

KV tokens of the server's facts / mean live tokens of a running request. A request is live from its
prefill to its last token, and holds its prompt and what it has said so far, in whole blocks; who
takes longer is met more often, so the mean is over time, not over requests. A prefix that the
scenario shares is held once for all, as far as the server's cache found it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from msgspec import Struct

from analysis.frame import Floats, Run
from loadgen.leg import Window
from loadgen.record import Outcome

BLOCK_TOK = 16  # a vLLM's on a GPU, where the server does not say
RUNNING = 4.0  # fewer at once say little of their mean
OFF = 0.25  # the server's own use differs by more: its cache does not hold what we think


class Ceiling(Struct, frozen=True):
    """`requests` that run at once when the cache is full, or None and the `reason`. `common_tok`
    is held once for all; `seen_tok` is a running request's by the server's own KV use, of levels
    with RUNNING or more."""

    requests: float | None
    reason: str
    kv_cache_tok: int | None = None
    live_tok: float | None = None
    common_tok: float = 0.0
    seen_tok: float | None = None


def of(run: Run) -> Ceiling:
    kv_tok = kv_tokens(run)
    if kv_tok is None:
        return Ceiling(None, "the server did not say its KV tokens")
    known = [i for i, j in enumerate(run.judgements)
             if j.measurement != "INVALID" and not j.died and j.n]
    whole = [i for i in known if run.legs[i][1].ending != "cut"] or known
    live_tok, common_tok = _live(run, whole)
    if live_tok is None or common_tok >= kv_tok:
        reason = ("no answer ended with its tokens known" if live_tok is None else
                  "the prefixes that are shared would fill the KV cache alone")
        return Ceiling(None, reason, kv_tok, live_tok, common_tok)
    return Ceiling((kv_tok - common_tok) / live_tok, "", kv_tok, live_tok, common_tok,
                   None if common_tok else _seen(run, whole, kv_tok))


def kv_tokens(run: Run) -> int | None:
    """By the server's facts, or else by what its /metrics said; of all its engines."""
    told = run.manifest.server.get("kv_cache_tok")
    if isinstance(told, int) and told > 0:
        return told
    rows = run.telemetry.get("server", {}).get("kv_cache_tok", ())
    return int(rows[-1][1]) if rows else None


def says(ceiling: Ceiling) -> str:
    """One sentence, or two."""
    if ceiling.requests is None or ceiling.kv_cache_tok is None or ceiling.live_tok is None:
        return f"Memory-bound ceiling not known: {ceiling.reason}."
    common = f", less {ceiling.common_tok:,.0f} that all share," if ceiling.common_tok else ""
    said = (f"The KV cache holds about {rounded(ceiling.requests)} of these requests at once: "
            f"{ceiling.kv_cache_tok:,} tokens{common} at {ceiling.live_tok:,.0f} live tokens each")
    if ceiling.seen_tok is None:
        return f"{said}."
    if abs(ceiling.seen_tok / ceiling.live_tok - 1) <= OFF:
        return f"{said} ({ceiling.seen_tok:,.0f} by the server's own KV use)."
    return (f"{said}. By the server's own KV use it is {ceiling.seen_tok:,.0f} tokens each, and so "
            f"about {rounded(ceiling.kv_cache_tok / ceiling.seen_tok)} requests.")


def rounded(requests: float) -> str:
    """To two figures: the mix decides the third."""
    step = 1 if requests < 100 else 10 ** (len(str(int(requests))) - 2)
    return f"{round(requests / step) * step:,}"


# ------------------------------------------------------------------------------------ live tokens


def _live(run: Run, legs: Sequence[int]) -> tuple[float | None, float]:
    """(mean tokens of a running request that are its own, tokens that all share)."""
    facts = run.manifest.server
    block = int(facts.get("block_size") or BLOCK_TOK)
    held, took_s, hit = 0.0, 0.0, False
    for i in legs:
        leg, signs = run.legs[i][0], run.signs[i]
        f = run.sample(leg.id)
        f = f[(f["outcome"] == Outcome.OK.value) & (f["output_tok"] > 0) & f["prompt_tok"].notna()]
        shared = _shared(run, f, signs.prefix_hit_frac, block)
        hit = hit or bool((shared > 0).any())
        prompt, output = f["prompt_tok"].to_numpy() - shared, f["output_tok"].to_numpy()
        decode_s = np.nan_to_num(f["tpot_s"].to_numpy()) * (output - 1)
        prefill_s = signs.prefill_s or 0.0
        mean = prompt + output / 2 + (block - 1) / 2  # the last block is half empty in the mean
        whole = np.ceil(prompt / block) * block
        held += float((mean * decode_s + whole * prefill_s).sum())
        took_s += float((decode_s + prefill_s).sum())
    if took_s <= 0:
        return None, 0.0
    common = sum(c.shared_prefix.tokens // block * block * c.shared_prefix.groups
                 for c in run.scenario.classes if c.shared_prefix)
    return held / took_s, float(common) if hit else 0.0


def _shared(run: Run, f: pd.DataFrame, hit_frac: float | None, block: int) -> Floats:
    """Tokens of each request's prompt that others hold as well: what its class declares, as far as
    the server found it. What else its cache found belonged to requests that are gone."""
    declared = {c.name: float(c.shared_prefix.tokens // block * block)
                for c in run.scenario.classes if c.shared_prefix}
    own: Floats = np.array([declared.get(x, 0.0) for x in f["cls"]], float)
    if not own.any() or run.manifest.server.get("prefix_caching") is False:
        return np.zeros(len(f))
    if f["cached_tok"].notna().any():
        return np.asarray(np.minimum(own, f["cached_tok"].fillna(0.0)), float)
    told = (hit_frac or 0.0) * float(f["prompt_tok"].sum())
    return own * min(1.0, told / float(own.sum()))


def _seen(run: Run, legs: Sequence[int], kv_tok: int) -> float | None:
    """KV tokens of a running request, by the server's gauges. Of several engines they cannot be
    told: the fullest one's share is kept, and the requests of all."""
    if run.manifest.server.get("data_parallel", 1) != 1:
        return None
    used = running = 0.0
    for i in legs:
        if (run.signs[i].running_mean or 0.0) >= RUNNING:
            at = _inside(run.telemetry.get("server", {}), run.legs[i][1])
            used += sum(share * kv_tok for share, _ in at)
            running += sum(n for _, n in at)
    return used / running if running and used else None


def _inside(told: Mapping[str, Any], window: Window) -> list[tuple[float, float]]:
    """(KV share, running) at each instant of the window that has both."""
    running = dict(told.get("running", ()))
    return [(share, running[t]) for t, share in told.get("kv_frac", ())
            if t in running and window.from_ns <= t <= window.to_ns]
