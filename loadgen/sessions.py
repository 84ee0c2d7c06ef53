"""How users go about a session: how many requests it has, how long they think before each, who
leaves an answer before its end. Types of a scenario's class, and what is drawn of them."""

import math
from typing import TYPE_CHECKING, Annotated, Final

from msgspec import Meta, Struct, field

from loadgen.config import Seconds

if TYPE_CHECKING:  # it takes a while to load, and who reads a scenario does without
    import numpy as np

MOST_TURNS: Final = 60  # of one session: each has randomness of its own, and 64 are kept for it


class Pause(Struct, frozen=True, forbid_unknown_fields=True, tag_field="dist", tag="fixed"):
    """Always `time`. A bare duration in the file means the same."""

    time_s: Seconds = field(name="time")


class Exponential(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True,
                  tag_field="dist", tag="exponential"):
    """Of that mean; one beyond `max` is `max`."""

    mean_s: Seconds = field(name="mean")
    max_s: Seconds | None = field(default=None, name="max")


class LognormalPause(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True,
                     tag_field="dist", tag="lognormal"):
    """exp(N(ln median, sigma²)); one beyond `max` is `max`."""

    median_s: Seconds = field(name="median")
    sigma: Annotated[float, Meta(gt=0, le=5)]
    max_s: Seconds | None = field(default=None, name="max")


Think = Pause | Exponential | LognormalPause


class Abandon(Struct, frozen=True, forbid_unknown_fields=True):
    """Of a `share` of the requests the client disconnects `after` that time, if the answer has not
    ended by then: ABANDONED, judged on what it saw."""

    share: Annotated[float, Meta(gt=0, le=1)]
    after_s: Seconds = field(name="after")


def think_s(think: Think, rng: "np.random.Generator") -> float:
    """One pause, in s."""
    match think:
        case Pause(time_s=time_s):
            return float(time_s)
        case Exponential(mean_s=mean_s, max_s=max_s):
            drawn = rng.exponential(mean_s)
        case LognormalPause(median_s=median_s, sigma=sigma, max_s=max_s):
            drawn = rng.lognormal(math.log(median_s), sigma)
    return float(drawn if max_s is None else min(drawn, max_s))


def leaves_after_s(abandon: Abandon, rng: "np.random.Generator") -> float | None:
    """When the client of one request leaves; None: it waits for the end."""
    return float(abandon.after_s) if rng.random() < abandon.share else None


def normalised(raw: object) -> object:
    """A class as it stands in a file, with a bare think time as a distribution of one value."""
    if not isinstance(raw, dict) or "think" not in raw or isinstance(raw["think"], dict):
        return raw
    return {**raw, "think": {"dist": "fixed", "time": raw["think"]}}
