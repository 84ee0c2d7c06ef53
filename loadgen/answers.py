"""From kept answers to verdicts: draws again what each request asked for, has its class's check
look at what came, and notes it in verdicts.jsonl. Between legs, or when a report is made; what was
checked once is not checked again."""

from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec import Struct

from loadgen import expect, outputs, plan, scenario, tasks, validate
from loadgen.leg import Leg
from loadgen.prompts import Ratio
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import RequestClass, Scenario
from loadgen.store import RunFolder, Verdict
from loadgen.validate import Asked, Came


class Basis(Struct, frozen=True):
    """What the prompts of a run were made of."""

    scenario: Scenario
    ratios: Mapping[str, Ratio]
    seeds: Mapping[str, int]  # of its legs
    heard: frozenset[tuple[str, int, int]] = frozenset()  # turns that were answered


def has_checks(mix: Scenario) -> bool:
    return any(c.validator is not None for c in mix.classes)


def complete(folder: RunFolder) -> int:
    """Checks what has no verdict yet: of a run that was killed, or one whose load was Locust's.
    How many that were. Raises StoreError, ScenarioError."""
    manifest = folder.manifest()
    mix = scenario.parse(manifest.scenario, where=str(folder.path / "manifest.json"))
    if not has_checks(mix):
        return 0
    ratios = msgspec.convert(manifest.ratios, dict[str, Ratio])
    return check(folder, mix, ratios, [leg for leg, _ in folder.legs()], folder.records())


def check(folder: RunFolder, mix: Scenario, ratios: Mapping[str, Ratio], legs: Sequence[Leg],
          records: Iterable[RequestRecord]) -> int:
    """Checks the answers of these records that have no verdict yet, notes what was found, and
    marks the records (`wrong`). How many it checked. Raises StoreError."""
    if not has_checks(mix):
        return 0
    known = folder.verdicts()
    basis = Basis(mix, ratios, {leg.id: leg.seed for leg in legs})
    if any(isinstance(c.validator, expect.Recall) for c in mix.classes):
        records = list(records)
        basis = msgspec.structs.replace(basis, heard=frozenset(
            (r.leg, r.session, r.turn) for r in records if r.outcome is Outcome.OK))
    journal = None
    checked = 0
    for r in records:
        if r.output_ref is None:
            continue
        verdict = known.get(r.output_ref)
        if verdict is None and (verdict := verdict_on(folder, basis, r)) is not None:
            journal = journal or folder.verdicts_journal()
            journal.append(verdict)
            checked += 1
        if verdict is not None:
            r.wrong = verdict.wrong
    if journal is not None:
        journal.close()
    return checked


def verdict_on(folder: RunFolder, basis: Basis, r: RequestRecord) -> Verdict | None:
    """None: there is no answer to look at, or none that was asked for by the plan."""
    cls = basis.scenario.of(r.cls)
    seed = basis.seeds.get(r.leg)
    if cls.validator is None or r.output_ref is None or seed is None or r.want_prompt_tok is None:
        return None
    answer = outputs.read(folder.path, r.output_ref)
    if answer is None:
        return None
    wanted = asked(basis, cls, r, seed)
    if isinstance(cls.validator, expect.Recall) and (
            wanted.question is None or not _was_told(basis, r)):
        return None
    found = validate.check(cls.validator, wanted,
                           Came(answer, r.finish_reason, r.output_tok))
    return Verdict(leg=r.leg, shard=r.shard, seq=r.seq, session=r.session, turn=r.turn, cls=r.cls,
                   ok=found.ok, kind=found.kind, says=found.says, ref=r.output_ref,
                   counts=cls.validator.counts)


def asked(basis: Basis, cls: RequestClass, r: RequestRecord, seed: int) -> Asked:
    """What the request wanted: the plan's draws once more."""
    check = cls.validator
    if isinstance(check, expect.Recall):
        turns = len(_session(basis, cls, r, seed).turns)
        return Asked(question=plan.question(cls, r.session, turns, r.turn, seed))
    task = plan.task(cls, _prompt_tok(basis, cls, r, seed), seed, r.session, r.turn)
    if isinstance(check, expect.Json):
        return Asked(schema=tasks.schema_of(cls))
    if isinstance(check, expect.Tool):
        return Asked(tool=task.tool if task else None,
                     tools={name: parameters for name, (_, parameters) in tasks.TOOLS.items()})
    if isinstance(check, expect.Translation):
        assert cls.into is not None
        return Asked(source=_source(basis, cls, r, seed), languages=(cls.language, cls.into))
    return Asked(facts=task.facts if task else (), max_tokens=r.max_tokens)


def _session(basis: Basis, cls: RequestClass, r: RequestRecord, seed: int) -> plan.Session:
    """The session as it was planned; of a class that its user chose, with that class alone."""
    session = plan.session(basis.scenario, seed, r.session, None)
    if session.cls == cls.name:
        return session
    only = msgspec.structs.replace(basis.scenario, classes=(cls,))
    return plan.session(only, seed, r.session, None)


def _prompt_tok(basis: Basis, cls: RequestClass, r: RequestRecord, seed: int) -> int:
    """Of the prompt that its turn adds: the record tells it with all that was said before."""
    if r.turn == 0:
        return r.want_prompt_tok or 0
    return _session(basis, cls, r, seed).turns[r.turn].prompt_tok


def _was_told(basis: Basis, r: RequestRecord) -> bool:
    """Every turn before was answered, and so is in the history."""
    return all((r.leg, r.session, turn) in basis.heard for turn in range(r.turn))


def _source(basis: Basis, cls: RequestClass, r: RequestRecord, seed: int) -> str:
    """What was to be translated: the prompt without its nonce and its instruction."""
    turn = plan.Turn(_prompt_tok(basis, cls, r, seed), r.max_tokens or 0)
    prefix = (plan.session(basis.scenario, seed, r.session, None).prefix if cls.shared_prefix
              else ())
    session = plan.Session(r.session, cls.name, None, (turn,) * (r.turn + 1), prefix)
    prompt = plan.prompt(cls, session, r.turn, seed, basis.ratios[cls.name])
    nonce = f"[{plan.nonce(seed, r.session, r.turn)}] "
    return prompt.rpartition("\n\n")[0].replace(nonce, "", 1)
