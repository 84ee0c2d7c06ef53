"""Constants whose replay looks like what was measured, and how well the run tells each of them.

Figures of each leg are compared as logarithms, so that all are shares; the constants are moved as
logarithms, too (Gauss-Newton, with slopes over ± 30 %, as a replay is a little rough). A constant
that a run tells with more than TOLD_SD of uncertainty is set back to the shipped value, and the
others are found anew: first the one that is told worst, as two that do the same share one doubt.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from servers.sim.engine import EngineConfig
from servers.sim.profiles import Constants
from servers.sim.replay import Answer, replay
from servers.sim.seen import CannotFit, SeenLeg

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

FREE = ("bandwidth_frac", "mfu", "host_step_s", "host_seq_s", "loop_step_s", "loop_seq_s",
        "front_token_s", "front_merged_s", "front_request_s", "front_latency_s")
TOLD_SD = 0.15  # of a constant's logarithm: ± 30 % with 95 % confidence
LEANS = 0.05  # and twice a constant's doubt: more, and it is said what it depends on
FLOOR_SD = 0.02  # a figure of a run is no more exact than this, nor is the model
ROUGH = 0.03  # a slope below it is a replay's roughness: 3 % of a figure for 2.7 times a constant
PRIOR_SD = 3.0  # the shipped constants, as where to stay when nothing is told
STEP = 0.3  # by which slopes are measured
WAITED = 3.0  # times the shortest TTFT
HAIR = 0.002  # of a constant: a change that should change nothing
MOST_STEPS = 12
GAIN = 0.02  # less of the cost, and it is time for new slopes, or the end
FAR = 3.0  # deviations from which on a figure counts for less
MIN_N = 5  # answers of a figure
MERGED = 1.05  # tokens in an event
PLAIN = 1.2  # of a gap's median: a leg whose TPOT is more has two kinds of steps


class Figure(NamedTuple):
    """Of one leg: seconds, or tokens."""

    leg: str
    name: str
    value: float
    sd: float = 0.0  # of its logarithm, by how its answers differ


@dataclass(frozen=True)
class Match:
    """`sd`: of each constant that is told, of its logarithm; `doubts`: why another is not.
    `leaning`: of those, what they lean on that is not told, which then is as shipped.
    `figures` are those of the run, `found` and `before` what the replay with the constants, and
    with the shipped ones, gives for them."""

    constants: Constants
    sd: dict[str, float]
    leaning: dict[str, list[str]]
    doubts: dict[str, str]
    figures: list[Figure]
    found: list[float]
    before: list[float]


def figures(leg: SeenLeg, answers: Sequence[Answer | None]) -> list[Figure]:
    """What is compared: medians, as a host may stall; of TTFT, that of prompts of like lengths
    (within a factor of two)."""
    pairs = [(ask, a) for ask, a in zip(leg.asked, answers, strict=True) if a is not None]
    found, tokens = [], sum(a.tokens for _, a in pairs)
    if len(pairs) >= MIN_N and tokens >= 2 * len(pairs):
        gaps = np.concatenate([a.gaps_s for _, a in pairs])
        tpots = [sum(a.gaps_s) / (a.tokens - 1) for _, a in pairs if a.tokens > 1]
        found += [_median(leg.name, "TPOT", tpots),
                  Figure(leg.name, "gap", float(np.median(gaps))),
                  Figure(leg.name, "tokens/event", tokens / (len(gaps) + len(pairs)))]
    by_size: dict[int, list[float]] = {}
    for ask, a in pairs:
        by_size.setdefault(round(np.log2(ask.prompt_tok)), []).append(a.ttft_s)
    return found + [_median(leg.name, f"TTFT ~{2**size}", ttfts)
                    for size, ttfts in sorted(by_size.items()) if len(ttfts) >= MIN_N]


def _median(leg: str, name: str, values: Sequence[float]) -> Figure:
    low, middle, high = np.quantile(np.log(np.maximum(values, 1e-5)), (0.16, 0.5, 0.84))
    return Figure(leg, name, float(np.exp(middle)),
                  float(1.25 * (high - low) / 2 / np.sqrt(len(values))))


def _chosen(leg: SeenLeg) -> list[Figure]:
    """Of a run's leg; without the gaps' median where half of the steps may hold a prompt."""
    found = {f.name: f for f in figures(leg, leg.answers)}
    if "gap" in found and (found["tokens/event"].value > MERGED
                           or found["TPOT"].value > PLAIN * found["gap"].value):
        del found["gap"]
    return [f for f in found.values() if f.value > 0]


def match(legs: Sequence[SeenLeg], config: EngineConfig,
          told: Callable[[str], None] = lambda _: None) -> Match:
    """From the constants of `config` on. `told` hears how it goes. Raises CannotFit."""
    shipped = config.machine.constants
    if shipped.mfu is None:
        shipped = replace(shipped, mfu=config.machine.gpu.mfu)
    wanted = [_chosen(leg) for leg in legs]
    flat = list(itertools.chain.from_iterable(wanted))
    if not flat:
        raise CannotFit(f"no level has {MIN_N} whole answers; load it for longer")
    full = _full(wanted)

    def simulate(x: Floats) -> Floats:
        c = replace(config, machine=replace(config.machine, constants=_with(shipped, x)))
        out = []
        for leg, fs in zip(legs, wanted, strict=True):
            slots = leg.slots if leg.name in full else None
            by_name = {f.name: f.value for f in figures(leg, replay(leg.asked, slots, c))}
            out += [by_name[f.name] for f in fs]
        return np.log(out)

    own = np.array([np.hypot(FLOOR_SD, f.sd if f.leg in full else 0.0) for f in flat])
    search = _Search(simulate, flat, own, _bounds(shipped))
    x: Floats = np.zeros(len(FREE))
    doubts, free = dict[str, str](), list(range(len(FREE)))
    before = search.at(x)
    while True:
        search.roughen(x)
        x = search.solve(x, free)
        slopes, scale = search.slopes(x, range(len(FREE))), search.scale(x)
        kept, why = _told(slopes, free, scale)
        doubts |= why
        told(f"{search.replays} replays, {100 * search.rms(x):.1f} % off, free: "
             + " ".join(FREE[k] for k in free))
        if len(kept) == len(free):
            break
        free = kept
        x = np.where(np.isin(np.arange(len(FREE)), free), x, 0.0)
    sds = _sds(slopes[:, free], scale)
    sd = {FREE[k]: float(v) for k, v in zip(free, sds, strict=True)}
    return Match(_with(shipped, x), sd, _leaning(slopes, free, sds), doubts, flat,
                 np.exp(search.at(x)).tolist(), np.exp(before).tolist())


def _full(wanted: Sequence[Sequence[Figure]]) -> set[str]:
    """Legs in which prompts waited. Where they did, a replay of requests at the instants of the run
    would pile up what the run's clients waited for: its slots are replayed. Elsewhere each prompt
    meets those that it met."""
    ttfts = {fs[0].leg: np.mean([f.value for f in fs if f.name.startswith("TTFT")])
             for fs in wanted if any(f.name.startswith("TTFT") for f in fs)}
    return {leg for leg, ttft in ttfts.items() if ttft > WAITED * min(ttfts.values())}


def _with(shipped: Constants, x: Floats) -> Constants:
    return replace(shipped, **{name: getattr(shipped, name) * float(np.exp(v))
                               for name, v in zip(FREE, x, strict=True)})


def _bounds(shipped: Constants) -> tuple[Floats, Floats]:
    """Of x. Shares end at 1."""
    most = [-np.log(getattr(shipped, name)) if name in ("bandwidth_frac", "mfu") else 3.5
            for name in FREE]
    return np.full(len(FREE), -3.5), np.array(most)


class _Search:
    def __init__(self, simulate: Callable[[Floats], Floats], wanted: Sequence[Figure],
                 sds: Floats, bounds: tuple[Floats, Floats]) -> None:
        self.replays = 0
        self._simulate, self._bounds = simulate, bounds
        self._goal = np.log([f.value for f in wanted])
        self._own_sd = self._sd = sds
        self._known: dict[bytes, Floats] = {}

    def at(self, x: Floats) -> Floats:
        key = x.tobytes()
        if key not in self._known:
            self.replays += 1
            self._known[key] = self._simulate(x)
        return self._known[key]

    def rms(self, x: Floats) -> float:
        """How far a figure is off, typically (a wild one counts for less)."""
        off = np.abs(self._goal - self.at(x))
        return float(np.sqrt(np.mean(np.minimum(off, FAR * np.median(off)) ** 2)))

    def scale(self, x: Floats) -> float:
        """How far off the figures are, of what they may be."""
        off = np.minimum(np.abs(self._goal - self.at(x)) / self._sd, FAR)
        return max(1.0, float(np.sqrt(np.mean(off**2))))

    def roughen(self, x: Floats) -> None:
        """Where a queue is full, a hair's breadth more or less of anything gives another course of
        events: such a figure counts for as little as it is worth."""
        near = np.array([self.at(x)] + [self.at(np.maximum(x - HAIR * k, self._bounds[0]))
                                        for k in (1, 2, 3)])
        self._sd = np.hypot(self._own_sd, near.std(axis=0))

    def slopes(self, x: Floats, free: Sequence[int]) -> Floats:
        """Of the figures in their deviations, by the free constants."""
        out = []
        for k in free:
            low, high = x.copy(), x.copy()
            low[k] -= STEP
            high[k] = min(x[k] + STEP, self._bounds[1][k])
            out.append((self.at(high) - self.at(low)) / (high[k] - low[k]))
        found = np.array(out).T
        return np.where(np.abs(found) < ROUGH, 0.0, found) / self._sd[:, None]

    def solve(self, x: Floats, free: Sequence[int]) -> Floats:
        """Slopes are measured anew only where those of before lead nowhere (Broyden)."""
        cost, slopes, fresh = self._cost(x), self.slopes(x, free), True
        for _ in range(MOST_STEPS):
            there = self._step(x, free, slopes)
            then = self._cost(there)
            if then < cost:
                moved = (there - x)[free]
                error = (self.at(there) - self.at(x)) / self._sd - slopes @ moved
                slopes = slopes + np.outer(error, moved) / max(float(moved @ moved), 1e-9)
                gained, x, cost, fresh = cost - then, there, then, False
                if gained > GAIN * cost:
                    continue
            if fresh:
                return x
            slopes, fresh = self.slopes(x, free), True
        return x

    def _step(self, x: Floats, free: Sequence[int], slopes: Floats) -> Floats:
        off = (self._goal - self.at(x)) / self._sd
        weight = (1 + (off / FAR) ** 2) ** -0.5
        rows = np.vstack([slopes * weight[:, None], np.eye(len(free)) / PRIOR_SD])
        right = np.concatenate([off * weight, -x[free] / PRIOR_SD])
        step = np.zeros_like(x)
        step[free] = np.clip(np.linalg.lstsq(rows, right, rcond=None)[0], -0.7, 0.7)
        return min((np.clip(x + share * step, *self._bounds) for share in (1.0, 0.4)),
                   key=self._cost)

    def _cost(self, x: Floats) -> float:
        off = (self._goal - self.at(x)) / self._sd
        return float((2 * FAR**2 * (np.sqrt(1 + (off / FAR) ** 2) - 1)).sum()
                     + (x**2).sum() / PRIOR_SD**2)


def _sds(slopes: Floats, scale: float) -> Floats:
    """Of each constant, the others being found with it. `scale`: the model is off by so many
    times what the figures' own uncertainty explains."""
    if not slopes.shape[1]:
        return np.zeros(0)
    information = slopes.T @ slopes / scale**2 + np.eye(slopes.shape[1]) * 1e-6
    return np.sqrt(np.diag(np.linalg.inv(information)))


def _told(slopes: Floats, free: Sequence[int],
          scale: float) -> tuple[list[int], dict[str, str]]:
    """Those of the free constants that are told, and why the others are not."""
    left, why = list(free), dict[str, str]()
    while left:
        sds = _sds(slopes[:, left], scale)
        worst = int(np.argmax(sds))
        if sds[worst] <= TOLD_SD:
            break
        k = left.pop(worst)
        if not left or _sds(slopes[:, [k]], scale)[0] > TOLD_SD:
            why[FREE[k]] = "hardly any figure of this run depends on it"
            continue
        like = slopes[:, left].T @ slopes[:, k] / np.maximum(
            np.linalg.norm(slopes[:, left], axis=0), 1e-9)
        why[FREE[k]] = f"it cannot be told from {FREE[left[int(np.argmax(np.abs(like)))]]}"
    return left, why


def _leaning(slopes: Floats, free: Sequence[int], sds: Floats) -> dict[str, list[str]]:
    """Which of the free constants would be found elsewhere than their doubts say, if one that is as
    shipped were, in truth, 1.6 times as much or as little."""
    found: dict[str, list[str]] = {}
    mine = slopes[:, free]
    pull = np.linalg.pinv(mine.T @ mine + np.eye(len(free)) * 1e-6) @ mine.T @ slopes * 0.5
    for i, k in enumerate(free):
        leans = [FREE[j] for j in sorted(set(range(len(FREE))) - set(free))
                 if abs(pull[i, j]) > max(LEANS, 2 * sds[i])]
        if leans:
            found[FREE[k]] = leans
    return found
