"""From a scenario's validator to the verdict: what is kept, what is found in it, what it counts."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from analysis import checked, frame, summary
from loadgen import (
    answers,
    bulk,
    metrics,
    openai,
    outputs,
    plan,
    prompts,
    scenario,
    tasks,
    validity,
)
from loadgen.errors import ScenarioError
from loadgen.openai import Answer, Call
from loadgen.record import Outcome, Recorder, RequestRecord, Shot
from loadgen.scenario import Slo
from loadgen.store import RunFolder, Verdict

FACTS = {"check": "facts", "planted": 4, "share": 1.0}


def mix(**more: Any) -> scenario.Scenario:
    return scenario.parse({"name": "t", "classes": [
        {"name": "c", "kind": "summary", "prompt_tokens": 512, "output_tokens": 64, **more}]}, "t")


def text_of(of: scenario.Scenario, k: int, seed: int = 7) -> str:
    cls = of.classes[0]
    return plan.prompt(cls, plan.session(of, seed, k, None), 0, seed, prompts.guess(cls))


def task_of(of: scenario.Scenario, k: int, seed: int = 7) -> Any:
    return plan.task(of.classes[0], 512, seed, k, 0)


# ----------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize("language", ["en", "zh", "mixed"])
@pytest.mark.parametrize("tokens", [128, 512, 2048, 8192])
def test_planted_figures_stand_in_the_prompt_apart_from_each_other(language: str,
                                                                   tokens: int) -> None:
    of = mix(language=language, validator=FACTS, prompt_tokens=tokens)
    text = text_of(of, 3)
    task = plan.task(of.classes[0], tokens, 7, 3, 0)
    assert task is not None
    assert len(task.facts) == min(4, tokens // 64) == len(set(task.facts))
    at = [text.index(sentence) for sentence in task.planted]
    assert all(value in sentence for value, sentence in zip(task.facts, task.planted, strict=True))
    assert at == sorted(at)
    if tokens >= 2048:  # one in each part of the document
        assert min(b - a for a, b in itertools.pairwise(at)) > len(text) / 10
    wanted = (tokens - 10) * prompts.guess(of.classes[0]).chars_per_tok
    assert abs(len(text) - wanted) <= 2 or tokens == 128


def test_prompts_are_the_same_again_and_differ_between_requests() -> None:
    of = mix(validator=FACTS)
    assert text_of(of, 3) == text_of(of, 3)
    assert len({task_of(of, k).facts for k in range(200)}) == 200


def test_a_class_without_a_check_has_the_prompt_that_it_always_had() -> None:
    plain, told = mix(), mix(validator={"check": "repetition"})
    assert text_of(plain, 5) == text_of(told, 5)
    assert task_of(plain, 5) is None


@pytest.mark.parametrize(("more", "words"), [
    ({"kind": "survey", "validator": {"check": "length", "min_chars": 1500}}, "1500"),
    ({"kind": "survey", "language": "zh"}, "1000"),
    ({"kind": "code", "validator": {"check": "python"}}, "Python module"),
    ({"kind": "code", "language": "zh", "validator": {"check": "python"}}, "Python"),
    ({"kind": "json", "validator": {"check": "json"}}, '"services" (array of string)'),
    ({"kind": "json", "language": "zh", "response_format": "json_object"}, '"errors" (integer)'),
    ({"kind": "profile"}, '"interests" (array of string)'),
    ({"kind": "translation", "language": "zh", "into": "en"}, "英文"),
    ({"kind": "translation", "language": "zh", "into": "fr"}, "法文"),
    ({"kind": "translation", "into": "zh"}, "into Chinese"),
    ({"kind": "tools"}, ""),
    ({"kind": "longest", "language": "zh"}, "手册")])
def test_each_kind_asks_for_what_is_checked(more: Any, words: str) -> None:
    of = mix(**more)
    text = text_of(of, 1)
    ending = text.rsplit("\n\n", 1)[1]
    assert words in ending
    assert "$" not in ending
    assert abs(len(text) - (512 - 10) * prompts.guess(of.classes[0]).chars_per_tok) <= 2


def test_a_tool_that_is_named_is_the_one_that_the_prompt_asks_for() -> None:
    for choice in ("auto", "required", "named"):
        of = mix(kind="tools", tool_choice=choice)
        session = plan.session(of, 7, 2, None)
        said = plan.wire(of.classes[0], session, 0, 7)
        assert [t["function"]["name"] for t in said["tools"]] == [*tasks.TOOLS]
        if choice == "named":
            assert said["tool_choice"]["function"]["name"] == task_of(of, 2).tool
        else:
            assert said["tool_choice"] == choice
    body = json.loads(openai.body("chat", "m", "p", 5, of.classes[0], said))
    assert body["tools"] == said["tools"]
    assert plan.wire(mix().classes[0], session, 0, 7) == {}


def test_tools_are_offered_but_not_to_be_called_where_prompts_are_only_counted() -> None:
    of = mix(kind="tools", tool_choice="required").classes[0]
    assert tasks.offered(of)["tools"] == plan.wire(of, plan.session(mix(kind="tools"), 7, 2, None),
                                                   0, 7)["tools"]
    assert "tool_choice" not in tasks.offered(of)
    assert tasks.offered(mix().classes[0]) == {}


def test_tools_and_prompts_that_come_again_by_plan_are_no_reuse() -> None:
    sent = [record(first_ns=5, prompt_tok=900) for _ in range(20)]
    assert [f.rule for f in validity.reuse(mix(), sent, 0.7, 0)] == ["prompts-reused"]
    assert validity.reuse(mix(kind="tools"), sent, 0.7, 0) == []


@pytest.mark.parametrize(("more", "says"), [
    ({"kind": "chat", "validator": FACTS}, "kind summary or survey"),
    ({"kind": "chat", "validator": {"check": "json"}}, "give the validator one"),
    ({"validator": {"check": "fakts"}}, "facts"),
    ({"validator": {"check": "facts", "shares": 1}}, "share"),
    ({"kind": "translation"}, "needs into"),
    ({"into": "en"}, "no other kind has it"),
    ({"kind": "translation", "language": "zh", "into": "zh"}, "in already"),
    ({"kind": "translation", "language": "mixed", "into": "fr"}, "from one language"),
    ({"tool_choice": "auto"}, "is of kind tools"),
    ({"kind": "chat", "response_format": "json_schema"}, "json_object")])
def test_a_class_that_cannot_be_checked_is_refused_in_words(more: Any, says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        mix(**more)


def test_a_scenario_with_checks_reads_back_from_its_manifest() -> None:
    of = mix(kind="tools", tool_choice="named", validator={"check": "tool", "counts": False})
    assert scenario.parse(scenario.to_plain(of), "again") == of


# ------------------------------------------------------------------------------- keeping answers


def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return b"data: " + msgspec.json.encode({"id": "x", "choices": [
        {"index": 0, "delta": delta, "finish_reason": finish}]}) + b"\n\n"


SHOT = Shot(leg="run", shard=0, seq=0, session=0, turn=0, cls="c", due_ns=0, body=b"")
SAID = ["Hello", " wor", "ld", " \"quoted\"\n", "汉", "字", " \\ back", "\u2028", "😀", " end"]


def stream(words: list[str]) -> list[bytes]:
    return [event({"role": "assistant", "content": ""}), *(event({"content": w}) for w in words),
            event({}, "stop"), b"data: [DONE]\n\n"]


def fed(parts: list[bytes], keeps: bool = True) -> Recorder:
    recorder = Recorder(SHOT, keeps=keeps)
    recorder.sent(0)
    recorder.response(1, 200, "text/event-stream", False)
    recorder.feed_reads(list(range(2, 2 + len(parts))), parts)
    return recorder


def test_the_text_is_kept_on_the_quick_way_and_the_slow_one() -> None:
    parts = stream(SAID * 20)
    whole = b"".join(parts)
    assert fed(parts).answer().text == "".join(SAID * 20)
    for size in (1, 7, 64, 1000, len(whole)):
        cut = [whole[i:i + size] for i in range(0, len(whole), size)]
        assert fed(cut).answer().text == "".join(SAID * 20), size
    escaped = [x.replace("汉".encode(), b"\\u6c49") for x in parts]
    assert fed(escaped).answer().text == "".join(SAID * 20)
    assert fed(parts, keeps=False).answer() == Answer()


def test_keeping_the_text_does_not_change_the_record() -> None:
    parts = stream(SAID * 20)
    assert fed(parts).end(999) == fed(parts, keeps=False).end(999)


def test_reasoning_is_no_part_of_the_answer() -> None:
    parts = [event({"role": "assistant", "content": ""}),
             *(event({"reasoning_content": f"think {i}"}) for i in range(5)),
             *(event({"content": f"say {i} "}) for i in range(3)), event({}, "stop"),
             b"data: [DONE]\n\n"]
    assert fed(parts).answer().text == "say 0 say 1 say 2 "
    assert not bulk.Template(b"", b"", True).said([b"data: x\n\n"])


def test_tool_calls_are_put_together_by_index() -> None:
    def call(i: int, **function: Any) -> bytes:
        return event({"tool_calls": [{"index": i, "function": function}]})
    parts = [event({"role": "assistant"}), call(0, name="a", arguments=""),
             call(0, arguments='{"x"'), call(0, arguments=": 1}"), call(1, name="b"),
             call(1, arguments="{}"), event({}, "tool_calls"), b"data: [DONE]\n\n"]
    assert fed(parts).answer().calls == [Call("a", '{"x": 1}'), Call("b", "{}")]
    older = [event({"role": "assistant"}), event({"function_call": {"name": "a"}}),
             event({"function_call": {"arguments": "{}"}}), event({}, "function_call"),
             b"data: [DONE]\n\n"]
    assert fed(older).answer().calls == [Call("a", "{}")]
    assert openai.calls_of([msgspec.Raw(b'{"function":{"name":"a","arguments":"{}"}}'),
                            msgspec.Raw(b'{"function":{"name":"b","arguments":{"k":1}}}'),
                            msgspec.Raw(b"7")]) == [Call("a", "{}"), Call("b", '{"k":1}')]


def record(**more: Any) -> RequestRecord:
    return RequestRecord(**{"leg": "run", "shard": 0, "seq": 0, "session": 3, "turn": 0, "cls": "c",
                            "due_ns": 0, "end_ns": 10, "outcome": Outcome.OK,
                            "want_prompt_tok": 512, "finish_reason": "stop", **more})


def test_an_output_is_found_by_its_ref_and_a_torn_one_is_not(tmp_path: Path) -> None:
    kept = outputs.Outputs(tmp_path / "outputs-0.jsonl", mix(validator=FACTS))
    assert kept.wants("c")
    assert not outputs.Outputs(tmp_path / "x", mix()).wants("c")
    assert kept.keep(record(outcome=Outcome.TRUNCATED), Answer("half")) is None
    assert not (tmp_path / "outputs-0.jsonl").exists()
    refs = [kept.keep(record(seq=i), Answer(f"answer {i}\n汉字")) for i in range(3)]
    for i, ref in enumerate(refs):
        assert outputs.read(tmp_path, str(ref)) == Answer(f"answer {i}\n汉字")
    path = tmp_path / "outputs-0.jsonl"
    path.write_bytes(path.read_bytes()[:-5])  # a crash; a new process goes on behind it
    again = outputs.Outputs(path, mix(validator=FACTS)).keep(record(seq=3), Answer("next"))
    assert outputs.read(tmp_path, str(again)) == Answer("next")
    assert outputs.read(tmp_path, str(refs[2])) is None
    assert outputs.read(tmp_path, "outputs-9.jsonl:0") is None


# --------------------------------------------------------------------------------- what it counts


def test_a_wrong_answer_is_a_miss_and_is_not_written_into_the_record() -> None:
    good, wrong = record(), record(wrong="forgot a fact")
    assert metrics.misses(good, Slo()) == []
    assert metrics.misses(wrong, Slo()) == ["answer"]
    assert b"wrong" not in msgspec.json.encode(good)
    told = Verdict("run", 0, 0, 3, 0, "c", False, "forgot a fact", counts=False)
    assert told.wrong is None
    assert msgspec.structs.replace(told, counts=True).wrong == "forgot a fact"


def run_folder(path: Path, of: scenario.Scenario, *levels: list[str]) -> RunFolder:
    """A run with a leg for each of the levels 1, 2 …, whose answers say this."""
    from loadgen.leg import Leg, Window
    from loadgen.store import SCHEMA, Header, Journal, LegLine, Manifest

    ratio = msgspec.to_builtins(prompts.guess(of.classes[0]))
    folder = RunFolder.create(path, Manifest(
        SCHEMA, "r", "2026-01-01T00:00:00+00:00", [], scenario.to_plain(of), 7, 0.95, 0.95, "http",
        "m", {"kind": "remote"}, {"c": ratio}, {}, {}))
    legs, records = folder.legs_journal(), Journal(folder.records_path(0))
    records.append(Header(SCHEMA, "r", 0, 0, 0))
    kept = outputs.Outputs(path / "outputs-0.jsonl", of)
    for level, said in enumerate(levels, 1):
        name, n = f"run{level}", len(said) * 10**9
        legs.append(LegLine(leg=Leg(name, "concurrency", level, "run", 0, 7, scenario.Closed(level),
                                    0.0, None, len(said))))
        for k, text in enumerate(said):
            at = k * 10**9
            r = record(leg=name, seq=k, session=k, due_ns=at, sent_ns=at, first_ns=at + 5,
                       end_ns=at + 9, output_tok=8)
            r.output_ref = kept.keep(r, Answer(text))
            records.append(r)
        legs.append(LegLine(window=Window(name, 0, 0, n, n, "done", records=len(said),
                                          alone=True)))
    return folder


def test_a_folder_is_checked_once_and_every_verdict_counts_everywhere(tmp_path: Path) -> None:
    of = mix(validator=FACTS)
    told = [" ".join(task_of(of, k).facts) if k % 4 else "nothing" for k in range(40)]
    folder = run_folder(tmp_path / "r", of, told)
    run = summary.finish(tmp_path / "r")
    assert answers.complete(folder) == 0  # all have a verdict
    [judgement] = run.judgements
    assert (judgement.good, judgement.n, judgement.misses) == (30, 40, {"answer": 10})
    assert run.frame["good"].sum() == 30
    [row] = checked.of(run)
    assert (row["checked"], row["valid"], row["kinds"]) == (40, 30, {"forgot a fact": 10})
    said = json.loads((tmp_path / "r/summary.json").read_text())
    assert said["answers"]["levels"] == [row]
    assert said["answers"]["unchecked"] == 0
    page = (tmp_path / "r/report.html").read_text()
    assert "<h2>Answers</h2>" in page
    assert "forgot a fact" in page
    assert checked.says(run) == "Answers: c (facts) 30 of 40 valid, forgot a fact 10."
    assert Counter(r.wrong for r in folder.records()) == {None: 30, "forgot a fact": 10}


def test_a_check_that_does_not_count_is_told_and_no_miss(tmp_path: Path) -> None:
    of = mix(validator={**FACTS, "counts": False})
    run_folder(tmp_path / "r", of, ["nothing"] * 20)
    run = summary.finish(tmp_path / "r", report=False)
    assert run.judgements[0].good == 20
    assert checked.of(run)[0]["valid"] == 0


def test_answers_whose_texts_are_elsewhere_are_said_to_be_unchecked(tmp_path: Path) -> None:
    run_folder(tmp_path / "r", mix(validator=FACTS), ["nothing"] * 5)
    (tmp_path / "r/outputs-0.jsonl").unlink()
    run = summary.finish(tmp_path / "r", report=False)
    assert checked.unchecked(run) == 5
    assert "5 not checked" in checked.says(run)


def test_the_same_prompts_at_several_levels_show_where_quality_falls(tmp_path: Path) -> None:
    of = mix(validator=FACTS)
    alone = [" ".join(task_of(of, k).facts) for k in range(20)]
    other = [x if k % 5 else f"{x}." for k, x in enumerate(alone)]  # valid, but not the same
    lost = [x if k % 2 else "nothing" for k, x in enumerate(alone)]
    run_folder(tmp_path / "r", of, alone, other, lost)
    run = summary.finish(tmp_path / "r")
    assert [(q["value"], q["valid"], q["same"], q["compared"]) for q in checked.quality(run)] == [
        (1, 20, 20, 20), (2, 20, 16, 20), (3, 10, 10, 20)]
    page = (tmp_path / "r/report.html").read_text()
    assert "<h2>Quality under load</h2>" in page
    assert "16 of 20" in page
    assert "<h2>Answers against the load</h2>" in page


def test_verdicts_of_a_leg_that_was_cut_and_repeated_stand_apart(tmp_path: Path) -> None:
    from loadgen.store import LegLine, Resumed

    of = mix(validator=FACTS)
    folder = run_folder(tmp_path / "r", of, ["nothing"] * 4)
    assert answers.complete(folder) == 4
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "r").glob("*-0.jsonl")}
    folder.legs_journal().append(LegLine(resumed=Resumed("now", 1.0, [], 0, sizes)))
    assert {v.leg for v in folder.verdicts().values()} == {"run1~cut1"}
    kept = outputs.Outputs(tmp_path / "r/outputs-0.jsonl", of)
    again = record(leg="run1", seq=0)
    again.output_ref = kept.keep(again, Answer("once more"))
    found = answers.Basis(of, {}, {"run1": 7})
    verdict = answers.verdict_on(folder, found, again)
    assert verdict is not None
    folder.verdicts_journal().append(verdict)
    assert Counter(v.leg for v in folder.verdicts().values()) == {"run1~cut1": 4, "run1": 1}


def test_the_source_of_a_translation_is_drawn_again() -> None:
    of = mix(kind="translation", language="zh", into="en", validator={"check": "translation"})
    basis = answers.Basis(of, {"c": prompts.guess(of.classes[0])}, {"run": 7})
    asked = answers.asked(basis, of.classes[0], record(session=5), 7)
    assert asked.languages == ("zh", "en")
    assert asked.source in text_of(of, 5)
    assert len(asked.source) > 0.8 * len(text_of(of, 5))
    assert "译文" not in asked.source


def test_a_run_without_checks_says_nothing_of_answers(tmp_path: Path) -> None:
    run_folder(tmp_path / "r", mix(), ["x"] * 5)
    run = summary.finish(tmp_path / "r")
    assert checked.says(run) == ""
    assert checked.figures(run) is None
    assert "<h2>Answers</h2>" not in (tmp_path / "r/report.html").read_text()
    assert not (tmp_path / "r/verdicts.jsonl").exists()
    assert frame.load(tmp_path / "r").verdicts == []
