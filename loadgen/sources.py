"""What a scenario may take from a file: the prompts of a class, or the arrivals and lengths of a
load. Types only; `datasets.py` and `traces.py` read the files.

A source's `path` is relative to its scenario file. Loading fills in `sha256`, so that a run says
which file it was of and every process that reads it again reads the same; one that stands in the
scenario is held against the file.
"""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from loadgen.config import Seconds

BLOCK_TOK = 512  # of a Mooncake trace: tokens that one hash id stands for


class _File(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """`skip_broken`: lines that cannot be read are left out, and counted, instead of refused.
    `entries` are those that can be used, `broken` those left out; loading fills both in."""

    path: str
    skip_broken: bool = False
    sha256: str | None = None
    entries: int | None = None
    broken: int = 0


class ShareGpt(_File, frozen=True, tag_field="format", tag="sharegpt"):
    """A JSON list of `{"conversations": [{"from": "human", "value": "…"}, …]}`. `turns`: of each
    conversation its first question, or each of them after all that was said before it."""

    turns: Literal["first", "all"] = "first"


class Messages(_File, frozen=True, tag_field="format", tag="openai"):
    """JSONL, `{"messages": [{"role": "user", "content": "…"}, …]}` a line, with `output_tokens`
    where the line says how long its answer is to be."""

    turns: Literal["first", "all"] = "first"


class Table(_File, frozen=True, tag_field="format", tag="csv"):
    """CSV with a line of names. The names of its columns: of the prompt, and, where there are
    such, of the answer's tokens and of a system prompt."""

    prompt: str = "prompt"
    output_tokens: str = "output_tokens"
    system: str = "system"


Dataset = ShareGpt | Messages | Table


class TraceFile(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True,
             tag_field="mode", tag="replay"):
    """Arrivals and lengths of a recorded trace, `scale` times as fast; only what was due in it
    `from` … `to` after its first request. `too_long`: what becomes of requests that the server's
    context does not hold; None: the run is refused, with their number."""

    format: Literal["azure", "mooncake", "burstgpt"]
    path: str
    scale: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    from_s: Seconds | None = field(default=None, name="from")
    to_s: Seconds | None = field(default=None, name="to")
    too_long: Literal["cut", "skip"] | None = None
    max_inflight: Annotated[int, Meta(ge=1)] = 4096
    skip_broken: bool = False
    sha256: str | None = None


class Asked(Struct, frozen=True, array_like=True):
    """One request of a trace. `runs`: its prompt's blocks of BLOCK_TOK tokens as (first id, how
    many in a row); equal ids before equal ids are equal text. Empty: it shares nothing."""

    prompt_tok: int
    output_tok: int
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def blocks(self) -> list[int]:
        return [ident for first, n in self.runs for ident in range(first, first + n)]


def shared_tok(asked: Sequence[Asked]) -> list[int]:
    """Of each request the tokens that stand at the head of requests before it: what a prefix
    cache without limit would hold of it."""
    seen: set[int] = set()
    found = []
    for a in asked:
        blocks = a.blocks
        known = next((i for i, ident in enumerate(blocks) if ident not in seen), len(blocks))
        found.append(min(known * BLOCK_TOK, a.prompt_tok))
        seen.update(blocks)
    return found


def placeless(plain: Any) -> Any:
    """Plain data of a scenario without the folders of its files, which are each host's own; files
    that are known by their hash are told apart by that."""
    if isinstance(plain, Mapping):
        known = plain.get("sha256") and isinstance(plain.get("path"), str)
        return {k: PurePath(v).name if k == "path" and known else placeless(v)
                for k, v in plain.items()}
    return [placeless(x) for x in plain] if isinstance(plain, list | tuple) else plain
