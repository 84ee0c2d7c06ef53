"""What answers of a class must be: a scenario's `validator = { check = "json", … }`, as data.
What each check finds is in `validate`."""

from typing import Annotated, Any

from msgspec import Meta, Struct, field

Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class _Check(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True,
             tag_field="check", kw_only=True):
    """`counts`: an answer that fails is a miss in goodput; false: it is told, and no more."""

    counts: bool = True


class Facts(_Check, frozen=True, tag="facts"):
    """`planted` figures stand in the prompt (fewer in a short one); a share of them must be in the
    answer."""

    planted: Annotated[int, Meta(ge=1, le=50)] = 5
    share: Share = 0.8


class LengthOf(_Check, frozen=True, tag="length"):
    """An answer of so many characters, spaces not counted."""

    min_chars: Count
    max_chars: Count | None = None


class Python(_Check, frozen=True, tag="python"):
    """Code that parses, without bodies left out, and not the same lines again and again."""

    min_statements: Count = 3
    max_repeated: Share = 0.5


class Json(_Check, frozen=True, tag="json"):
    """One JSON value and nothing else, of the class's schema or of the one given. `fence`: one in
    a Markdown fence will do."""

    schema: dict[str, Any] | None = field(default=None)
    fence: bool = False


class Tool(_Check, frozen=True, tag="tool"):
    """A call of the tool that the prompt asks for, its arguments of the tool's schema."""


class Translation(_Check, frozen=True, tag="translation"):
    """Text in the class's `into` language: by its script and small words; not the source once
    more, and neither much shorter nor longer."""

    max_copied: Share = 0.3
    min_ratio: Annotated[float, Meta(gt=0, le=10)] = 0.4  # of the length that is to be expected
    max_ratio: Annotated[float, Meta(gt=0, le=10)] = 2.5


class Repetition(_Check, frozen=True, tag="repetition"):
    """No more than a share of the answer may be what it had said before; `min_tokens`: so many
    must come."""

    max_repeated: Share = 0.3
    min_tokens: Count | None = None


class Recall(_Check, frozen=True, tag="recall"):
    """Of a dialogue: an answer that is asked for a fact has what was told in an earlier turn."""


Validator = Facts | LengthOf | Python | Json | Tool | Translation | Repetition | Recall
