"""Prompts from files: what is read, in which order it is sent, and what is said of broken ones."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadgen import datasets, plan, scenario, validity
from loadgen.config import convert
from loadgen.errors import ScenarioError
from loadgen.leg import Leg
from loadgen.prompts import Ratio
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Load, Open, PerSecond, Scenario
from loadgen.sources import Dataset, Messages, ShareGpt, Table
from loadgen.talk import Talk

SAMPLES = scenario.SHIPPED / "datasets"
RATIO = Ratio(4.0, 10.0, "guess")


def leg(load: Load, n: int | None = None, seed: int = 3) -> Leg:
    return Leg(id="l", axis="concurrency", value=1, phase="run", replicate=0, seed=seed, load=load,
               warmup_s=0.0, measure_s=None, num_sessions=n)


def written(folder: Path, what: dict[str, Any], data: str | bytes,
            name: str = "prompts", **more: Any) -> Path:
    """A scenario with one class of a file that holds `data`; both in a folder of their own."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    keys = {"path": name, **what}
    lines = [f"{k} = {json.dumps(v)}" for k, v in keys.items()]
    extra = "".join(f"{k} = {json.dumps(v)}\n" for k, v in more.items())
    path = folder / "s.toml"
    path.write_text(f'[[classes]]\nname = "c"\nkind = "chat"\n{extra}[classes.dataset]\n'
                    + "\n".join(lines) + "\n")
    return path


def loaded(folder: Path, what: dict[str, Any], data: str | bytes, **more: Any) -> Scenario:
    return scenario.load(str(written(folder, what, data, **more)))


def lines(*messages: object) -> str:
    return "".join(json.dumps(m) + "\n" for m in messages)


def asks(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


# ------------------------------------------------------------------------------------- formats


def test_a_conversation_of_sharegpt_asks_its_first_question_and_wants_as_long_an_answer() -> None:
    first = datasets.read(ShareGpt(path=str(SAMPLES / "sharegpt-sample.json"))).entries
    raw = json.loads((SAMPLES / "sharegpt-sample.json").read_text())
    assert [g.text for (g,) in first] == [t["conversations"][0]["value"] for t in raw]
    answers = [t["conversations"][1]["value"] for t in raw]
    assert [g.output_tok for (g,) in first] == [datasets.guess_tok(a) for a in answers]
    assert all(g.before == () for (g,) in first)


def test_all_turns_of_a_conversation_are_asked_after_what_was_said_before() -> None:
    talk = next(e for e in datasets.read(ShareGpt(
        path=str(SAMPLES / "sharegpt-sample.json"), turns="all")).entries if len(e) > 1)
    first, second = talk
    assert first.before == ()
    assert [role for role, _ in second.before] == ["user", "assistant"]
    assert second.before[0][1] == first.text


def test_a_system_prompt_is_kept_and_other_turns_are_not() -> None:
    found = datasets.read(Messages(path=str(SAMPLES / "messages-sample.jsonl"))).entries
    assert [tuple(role for role, _ in g.before) for (g,) in found] == [("system",), ()] * 4
    assert {g.output_tok for (g,) in found} == {160, 96, 128}


def test_a_text_in_parts_is_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    mix = loaded(tmp_path, {"format": "openai"}, lines(
        {"messages": [{"role": "user", "content": parts}], "output_tokens": 3}))
    assert plan.session(mix, 1, 0, None).turns[0].text == "a b"


def test_columns_of_a_csv_have_the_names_that_are_given(tmp_path: Path) -> None:
    mix = loaded(tmp_path, {"format": "csv", "prompt": "question", "output_tokens": "n"},
                 "id,question,n\r\n1,\"two\r\nlines\",7\r\n2,one,8\r\n")
    assert sorted((t.text, t.output_tok) for k in range(2)
                  for t in plan.session(mix, 1, k, None).turns) == [("one", 8), ("two\r\nlines", 7)]


def test_the_class_s_own_length_goes_over_the_file_s(tmp_path: Path) -> None:
    mix = loaded(tmp_path, {"format": "openai"}, lines(asks("hello", output_tokens=9)),
                 output_tokens=4)
    assert plan.session(mix, 1, 0, None).turns[0].output_tok == 4


def test_the_body_holds_the_system_prompt_and_the_text_as_they_are(tmp_path: Path) -> None:
    said = [{"role": "system", "content": "Be brief. 短一点"},
            {"role": "user", "content": "Why \"so\"?\n\n"}]
    mix = loaded(tmp_path, {"format": "openai"}, lines({"messages": said, "output_tokens": 5}))
    body = Talk(mix, "m", plan.session(mix, 1, 0, None), 1, RATIO).body()
    assert json.loads(body)["messages"] == said


# ------------------------------------------------------------------------------------- sampling


def many(folder: Path, n: int = 50, **more: Any) -> Scenario:
    return loaded(folder, {"format": "openai"}, lines(*(
        asks(f"question {i}", output_tokens=5) for i in range(n))), **more)


def texts(mix: Scenario, shard: int = 0, of: int = 1, n: int = 50, seed: int = 3) -> list[str]:
    return [s.turns[0].text or "" for s in plan.sessions(
        mix, leg(Closed(concurrency=8), n, seed), shard, of)]


def test_no_prompt_comes_twice_before_all_have_come(tmp_path: Path) -> None:
    mix = many(tmp_path)
    sent = texts(mix, n=100)
    assert len(set(sent[:50])) == 50
    assert sent[50:] == sent[:50]
    assert sent[:50] != [f"question {i}" for i in range(50)]
    assert texts(mix, n=100) == sent
    assert texts(mix, seed=4) != sent[:50]


def test_legs_of_a_search_share_no_prompt_while_the_file_has_others(tmp_path: Path) -> None:
    mix = many(tmp_path, 1000)
    seen = [set(texts(mix, n=50, seed=70_000 + leg_no)) for leg_no in range(12)]
    assert len(set.union(*seen)) == 600


@pytest.mark.parametrize("load", [Closed(concurrency=8), Open(rate_rps=PerSecond(5.0))])
def test_shards_together_send_the_one_plan_of_two_data_sets(tmp_path: Path, load: Load) -> None:
    one, two = many(tmp_path / "a", 40).classes[0], many(tmp_path / "b", 30).classes[0]
    mix = Scenario(name="two", classes=(
        msgspec.structs.replace(one, name="one", weight=3.0),
        msgspec.structs.replace(two, name="two", weight=1.0)))
    whole = list(plan.sessions(mix, leg(load, 48)))
    parts = [s for i in range(3) for s in plan.sessions(mix, leg(load, 48), i, 3)]
    assert sorted(parts, key=lambda s: s.k) == whole
    for name in ("one", "two"):
        sent = [s.turns[0].text for s in whole if s.cls == name]
        assert len(set(sent)) == len(sent) > 5  # of each class without replacement


def test_a_run_that_gets_through_its_file_says_so(tmp_path: Path) -> None:
    mix = many(tmp_path, 50)

    def sent(n: int) -> list[RequestRecord]:
        return [RequestRecord(leg="l", shard=0, seq=k, session=k, turn=0, cls="c", due_ns=0,
                              end_ns=1, outcome=Outcome.OK) for k in range(n)]
    assert validity.repeats(mix, sent(50)) == []
    (found,) = validity.repeats(mix, sent(80))
    assert (found.rule, found.verdict) == ("dataset-repeated", "SUSPECT")
    assert "30 of 80 prompts" in found.says
    assert "50 entries" in found.says


# ----------------------------------------------------------------------------------- the scenario


def test_a_path_is_relative_to_its_scenario_and_the_hash_and_number_are_kept(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "x", {"format": "openai"}, lines(asks("a", output_tokens=1)))
    monkeypatch.chdir(tmp_path)
    source = scenario.load(str(path)).classes[0].dataset
    assert source is not None
    assert source.path == str((tmp_path / "x" / "prompts").resolve())
    assert (source.entries, source.broken, len(source.sha256 or "")) == (1, 0, 64)
    plain = scenario.to_plain(scenario.load(str(path)))
    assert scenario.parse(plain, "manifest") == scenario.load(str(path))


def test_a_copy_of_a_shipped_scenario_finds_the_shipped_file(tmp_path: Path) -> None:
    for name in ("sharegpt", "trace-azure-conv"):
        copy = tmp_path / f"{name}.toml"
        copy.write_bytes((scenario.SHIPPED / copy.name).read_bytes())
        assert scenario.load(str(copy)) == scenario.load(name)


def test_a_file_that_is_another_one_than_the_run_s_is_refused(tmp_path: Path) -> None:
    mix = many(tmp_path, 5)
    source = mix.classes[0].dataset
    assert source is not None
    other = tmp_path / "other"
    other.write_text(lines(asks("else", output_tokens=1)))
    with pytest.raises(ScenarioError, match="another file than the one that is asked for"):
        datasets.read(msgspec.structs.replace(source, path=str(other)))


def test_on_another_host_a_file_is_found_by_its_name(tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    here = many(tmp_path / "a", 5).classes[0].dataset
    assert here is not None
    there = msgspec.structs.replace(here, path="/no/such/folder/prompts")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScenarioError, match="cannot be read"):
        datasets.read(there)
    monkeypatch.chdir(tmp_path / "a")
    assert datasets.read(there) == datasets.read(here)


def test_one_scenario_on_two_hosts_is_one_scenario(tmp_path: Path) -> None:
    a, b = (scenario.placeless(scenario.to_plain(many(tmp_path / x, 5))) for x in "ab")
    assert a == b
    assert a != scenario.placeless(scenario.to_plain(many(tmp_path / "c", 6)))


@pytest.mark.parametrize(("more", "says"), [
    ({"prompt_tokens": 5}, "prompt_tokens: the prompts are those of the dataset"),
    ({"shared_prefix": {"tokens": 5}}, "shared_prefix: the prompts are those of the dataset")])
def test_lengths_are_given_once(more: Any, says: str) -> None:
    raw = {"name": "s", "classes": [{"name": "c", "kind": "chat", "dataset": {
        "format": "openai", "path": "x"}, **more}]}
    with pytest.raises(ScenarioError, match=says):
        scenario.parse(raw, "s.toml")


def test_a_class_without_data_says_how_long_its_prompts_are() -> None:
    with pytest.raises(ScenarioError, match=r"s\.toml: class c: prompt_tokens is missing"):
        scenario.parse({"name": "s", "classes": [
            {"name": "c", "kind": "chat", "output_tokens": 5}]}, "s.toml")


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(ScenarioError, match="sharegpt, openai, csv"):
        convert({"name": "s", "classes": [{"name": "c", "kind": "chat", "dataset": {
            "format": "parquet", "path": "x"}}]}, Scenario, "s.toml")


# --------------------------------------------------------------------------------- broken files

TALK = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
BROKEN: dict[str, tuple[Any, Any, int, str]] = {
    "no JSON": (Messages, lines(asks("a", output_tokens=1)) + "{oops\n", 2, "not JSON"),
    "no messages": (Messages, "\n" + lines({"prompt": "a"}), 2, "missing required field"),
    "nobody asks": (Messages, lines({"messages": [{"role": "system", "content": "x"}]}), 1,
                    "nobody asks"),
    "an image": (Messages, lines(asks("a", output_tokens=1), {"messages": [
        {"role": "user", "content": [{"type": "image_url"}]}]}), 2, "only text"),
    "no tokens": (Messages, lines(asks("a", output_tokens=0)), 1, "at least 1"),
    "not UTF-8": (Messages, b'{"messages": [{"role": "user", "content": "\xff"}]}\n', 1,
                  "not JSON|UTF-8|utf-8"),
    "an empty question": (Messages, lines(asks("  ", output_tokens=1)), 1, "is empty"),
    "a stranger": (ShareGpt, json.dumps([TALK, {"conversations": [
        {"from": "narrator", "value": "x"}]}], indent=1), 14, "'narrator' is nobody known"),
    "an answer only": (ShareGpt, json.dumps([{"conversations": [
        {"from": "gpt", "value": "x"}]}, TALK]), 1, "nobody asks"),
    "no talk": (ShareGpt, json.dumps([TALK]).replace("}]}]", "}]},\n\n\n{}]"), 4,
                "missing required field"),
    "too few fields": (Table, "prompt,output_tokens\na,5\n\"b\nb\"\n", 3, "1 fields where"),
    "no number": (Table, "prompt,output_tokens\na,5\nb,many\n", 3, "'many' is no whole number"),
    "an open quote": (Table, "prompt,output_tokens\na,5\n\"b,7\n", 3, "no CSV"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_entry_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    kind, data, line, says = BROKEN[name]
    path = tmp_path / "f"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ScenarioError, match=f"f:{line}: .*({says})") as error:
        datasets.read(kind(path=str(path)))
    assert "skip_broken" in str(error.value) or "holds no prompts" in str(error.value)


@pytest.mark.parametrize("name", [k for k, v in BROKEN.items() if b"a" in (
    v[1] if isinstance(v[1], bytes) else v[1].encode()) and k not in (
        "no messages", "nobody asks", "no tokens", "not UTF-8", "an empty question")])
def test_what_is_good_beside_a_broken_entry_is_used_if_asked_for(tmp_path: Path,
                                                                 name: str) -> None:
    kind, data, _, says = BROKEN[name]
    path = tmp_path / "f"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    source: Dataset = kind(path=str(path), skip_broken=True)
    found = datasets.read(source)
    assert (len(found.entries), len(found.broken)) == (1, 1)
    filled = datasets.filled(source, str(path))
    assert (filled.entries, filled.broken) == (1, 1)
    (words,) = datasets.says([filled])
    assert "1 entries" in words
    assert "1 broken ones are left out" in words
    assert says.split("|", maxsplit=1)[0] in found.broken[0]


@pytest.mark.parametrize(("kind", "data", "says"), [
    (ShareGpt, '[\n {"conversations": []},\n oops]', "f:3: not a JSON list"),
    (ShareGpt, lines(asks("a")), 'f:1: not a JSON list.*format = "openai"'),
    (Table, "question,n\na,5\n", "f:1: no column 'prompt'; the file has: question, n"),
    (Table, b"prompt\n\xe4\n", "f:2: not UTF-8"), (Table, "", "is empty"),
    (Messages, "", "holds no prompts")])
def test_a_file_that_is_something_else_is_refused_whole(tmp_path: Path, kind: Any, data: Any,
                                                        says: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ScenarioError, match=says):
        datasets.read(kind(path=str(path), skip_broken=True))


def test_of_many_broken_entries_a_few_are_named_and_all_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text(lines(*(asks("a", output_tokens=i % 2) for i in range(20))))
    with pytest.raises(ScenarioError, match="10 of 20 prompts cannot be used") as error:
        datasets.read(Messages(path=str(path)))
    assert str(error.value).count("output_tokens is 0") == datasets.SHOWN
    assert "… and 7 more" in str(error.value)


def test_an_answer_of_unknown_length_is_asked_for_before_anything_starts(tmp_path: Path) -> None:
    data = lines(asks("a", output_tokens=5), asks("b"))
    with pytest.raises(ScenarioError, match="does not say of 1 of 2 prompts"):
        loaded(tmp_path, {"format": "openai"}, data)
    mix = loaded(tmp_path, {"format": "openai"}, data, output_tokens=7)
    assert Counter(plan.session(mix, 1, k, None).turns[0].output_tok for k in range(4)) == {7: 4}
