"""What a scenario's shape means: so many users for so long, one after the other."""

from msgspec import Struct

from loadgen.scenario import Soak, Spike, Steps

SPAWN_S = 4.0  # the users of a stage come, or go, over so long


class Stage(Struct, frozen=True):
    """`rate`: users that come or go per second at its beginning."""

    users: int
    hold_s: float
    rate: float


def stages(shape: Steps | Spike | Soak) -> list[Stage]:
    """What a shape means, in order."""
    match shape:
        case Steps(users=users, hold_s=hold_s):
            held = [(n, hold_s) for n in users]
        case Spike(base=base, peak=peak, spike_s=spike_s, hold_s=hold_s):
            held = [(base, hold_s), (peak, spike_s), (base, hold_s)]
        case Soak(users=n, hold_s=hold_s):
            held = [(n, hold_s)]
    before = [0, *(n for n, _ in held)]
    return [Stage(n, hold_s, max(1.0, abs(n - was) / SPAWN_S))
            for (n, hold_s), was in zip(held, before, strict=False)]


def at(plan: list[Stage], t_s: float) -> Stage | None:
    """The stage at t_s after the start; None: it is over."""
    for stage in plan:
        if t_s < stage.hold_s:
            return stage
        t_s -= stage.hold_s
    return None
