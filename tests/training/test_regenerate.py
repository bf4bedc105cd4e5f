"""Answers by the target: every assistant turn is its own, rows come and go, and a killed run goes on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from models import perturbed
from outdraft.api.generation import SpeculativeModel
from outdraft.data.conversations import read_conversations
from outdraft.data.tokenization import tokenize
from outdraft.drafting.base import Drafter
from outdraft.errors import UserError
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.methods.prompt_lookup.drafter import PromptLookup
from outdraft.target.target import Target
from outdraft.training import regenerate as regenerating
from outdraft.training.answers import AnswerFile
from outdraft.training.progress import AnswerProgress
from outdraft.training.regenerate import RegenerateResult, RowPool, regenerate

from .tiny import CHATML, tiny_target

ENDS = [2, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49]
"""Tokens that end an answer: a random target says one of them now and then."""

Run = Callable[..., RegenerateResult]


@pytest.fixture(scope="module")
def target() -> Target:
    found = tiny_target(torch.float64)
    found.model.generation_config.eos_token_id = ENDS
    return found


def user(*contents: str, **more: Any) -> str:
    turns = [{"role": "system", "content": more.pop("system")}] if "system" in more else []
    for content in contents:
        turns += [{"role": "user", "content": content}, {"role": "assistant", "content": "OLD"}]
    return json.dumps({**more, "messages": turns[:-1] if contents[-1].endswith("?") else turns})


LINES = [
    user("a", "b", system="S"),
    user("c?", id=7, source="riddles"),
    user("d", "e", "f"),
    '{"text": "once upon a time"}',
    user("g", id="last"),
    user("c?", id=7),
    user("hello there you"),
]


@pytest.fixture
def run(tmp_path: Path, target: Target) -> Run:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(LINES) + "\n")

    def start(name: str = "out.jsonl", drafter: Drafter | None = None, **settings: Any) -> RegenerateResult:
        values = {"max_new_tokens": 9, "rows": 3, "prefix_tokens": 4, **settings}
        data = values.pop("data", prompts)
        model = SpeculativeModel(values.pop("target", target), drafter)
        return regenerate(model, data, tmp_path / name, console=Console(quiet=True), **values)

    return start


def test_the_template_s_switches_are_in_the_prompts(target: Target, tmp_path: Path, run: Run) -> None:
    tokenizer = copy.deepcopy(target.tokenizer)
    template: Any = tokenizer.chat_template  # type: ignore[union-attr]
    tokenizer.chat_template = template + "{% if mood is defined %}{{ mood }}{% endif %}"  # type: ignore[union-attr]
    switched = Target(target.model, tokenizer)
    plain = read(run("plain.jsonl"))
    assert read(run("same.jsonl", target=switched)) == plain
    told = read(run("told.jsonl", target=switched, chat_template_kwargs={"mood": "!?"}))
    assert told[0]["messages"] != plain[0]["messages"] and told[3] == plain[3], "texts have no template"
    asked = [one for one in told[0]["messages"] if one["role"] != "assistant"][:2]
    settings: dict[str, Any] = {"max_new_tokens": 9, "chat_template_kwargs": {"mood": "!?"}}
    expected = SpeculativeModel(switched).generate(asked, **settings)
    tokens = expected.tokens[0][:-1] if expected.finish_reasons == ["eos"] else expected.tokens[0]
    assert told[0]["messages"][2]["content"] == tokenizer.decode(tokens).strip("\n")  # type: ignore[union-attr]
    with pytest.raises(UserError, match="cannot set 'tokenize'"):
        run("never.jsonl", chat_template_kwargs={"tokenize": True})


def read(result: RegenerateResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.output.read_text().splitlines()]


def stops_after(monkeypatch: pytest.MonkeyPatch, answers: int) -> None:
    """Ctrl-C, as soon as so many answers are written."""
    real, left = AnswerFile.add, [answers]

    def add(self: AnswerFile, record: dict[str, Any]) -> None:
        real(self, record)
        left[0] -= 1
        if not left[0]:
            monkeypatch.setattr(AnswerFile, "add", real)
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerFile, "add", add)


def test_every_assistant_turn_is_the_targets_own(run: Run, target: Target) -> None:
    lines = read(run())
    assert len(lines) == len(LINES) and not any("OLD" in json.dumps(line) for line in lines)
    roles = ["".join(message["role"][0] for message in line.get("messages", [])) for line in lines]
    assert roles == ["suaua", "ua", "uauaua", "", "ua", "ua", "ua"]
    alone = SpeculativeModel(target)
    for line in lines:  # each turn is what the target says after what it said before, whoever was decoded beside it
        messages = [{"role": one["role"], "content": one["content"]} for one in line.get("messages", [])]
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                output = alone.generate([messages[:place]], max_new_tokens=9)
                ended, (tokens,) = output.finish_reasons == ["eos"], output.tokens
                said = target.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
                assert message["content"] == (said if ended else said.rstrip("\ufffd")).strip("\n")
    assert lines[3]["text"].startswith("once") and not lines[3]["text"].startswith("once ")


def test_lines_carry_what_the_prompts_say_of_themselves(run: Run) -> None:
    lines = read(run())
    assert [line["id"] for line in lines[1:2] + lines[4:6]] == [7, "last", "7-2"]
    assert len({line["id"] for line in lines}) == len(lines)
    assert lines[1]["source"] == "riddles" and all("source" not in line for line in lines[2:])
    assert {line["temperature"] for line in lines} == {0}


def test_an_answer_is_finished_if_it_ended_by_itself(run: Run, target: Target) -> None:
    result = run(max_new_tokens=12)
    lines = read(result)
    assert 0 < result.finished < len(lines)
    assert result.finished == sum(line["finished"] for line in lines)
    alone = SpeculativeModel(target)
    seen = set()
    for line in lines:
        turns = [dict(one) for one in line.get("messages", [])]
        places = [place for place, one in enumerate(turns) if one["role"] == "assistant"]
        for place in places:
            said = line["finished"] if place == places[-1] else turns[place].get("finished", True)
            history = [{"role": one["role"], "content": one["content"]} for one in turns[:place]]
            assert said == (alone.generate([history], max_new_tokens=12).finish_reasons == ["eos"])
            seen.add((place == places[-1], said))
    assert len(seen) == 4, "last and earlier turns, finished and not"


def test_lines_say_what_ended_each_answer_as_servers_do(run: Run) -> None:
    for line in read(run(max_new_tokens=12)):
        assert line["finish_reason"] == ("stop" if line["finished"] else "length")
        for one in line.get("messages", []):
            assert one.get("finish_reason", "none") == ("none" if one.get("finished", True) else "length")


AGENT = [
    {"role": "assistant", "content": "KEPT"},
    {"role": "user", "content": "q"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
    {"role": "tool", "content": "42", "tool_call_id": "1"},
    {"role": "assistant", "content": "OLD"},
    {"role": "user", "content": "bye"},
]


def test_of_an_agents_conversation_the_answers_are_the_targets_and_its_calls_stay(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "agent.jsonl"
    data.write_text(json.dumps({"messages": AGENT, "tools": [{"name": "add"}]}) + "\n")
    (line,) = read(run(data=data))
    told = line["messages"]
    assert [one["role"] for one in told] == [
        "assistant",
        "user",
        "user",
        "assistant",
        "tool",
        *["assistant", "user"],
        "assistant",
    ]
    assert told[:5] == AGENT[:5] and told[6] == AGENT[6] and told[5]["content"] != "OLD"
    assert line["tools"] == [{"name": "add"}]
    assert run(data=data).written == 0, "it is known again"


def test_prompts_that_the_template_refuses_are_named_and_the_others_answered(run: Run, tmp_path: Path) -> None:
    template = CHATML.replace(
        "{{ m['role'] }}", "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    )
    data = tmp_path / "agent.jsonl"
    data.write_text(json.dumps({"messages": AGENT}) + "\n" + user("c?") + "\n")
    result = run(data=data, target=tiny_target(torch.float64, chat_template=template))
    assert result.written == 1 and len(result.skipped) == 1
    assert "agent.jsonl:1: the chat template refuses" in result.skipped[0] and "no tools" in result.line()


def test_training_learns_no_end_after_an_answer_that_was_cut(run: Run, target: Target) -> None:
    result = run(max_new_tokens=12)
    chats = [one for one in read_conversations(result.output) if one.text is None]
    examples = tokenize(chats, target.tokenizer, 999)
    ends = [int((example.input_ids[example.loss_mask] == 2).sum()) for example in examples.examples]
    answers = [sum(one["role"] == "assistant" for one in chat.messages) for chat in chats]
    assert ends == [count - len(chat.cut) for count, chat in zip(answers, chats, strict=True)]
    assert 0 < sum(ends) < sum(answers)


@pytest.mark.parametrize("kind", [None, "draft-model", "prompt-lookup"])
@pytest.mark.parametrize("temperatures", [[0.0], [0.0, 1.0]], ids=["greedy", "mix"])
def test_company_changes_no_answer(run: Run, target: Target, kind: str | None, temperatures: list[float]) -> None:
    near = perturbed(target.model, lambda: tiny_target(torch.float64).model, 0.05)
    drafters = {"draft-model": DraftModel(Target(near), target), "prompt-lookup": PromptLookup(), None: None}
    drafter = drafters[kind]
    many = run("many.jsonl", drafter, rows=4, temperatures=temperatures)
    alone = run("alone.jsonl", drafter, rows=1, temperatures=temperatures)
    assert many.output.read_bytes() == alone.output.read_bytes()
    assert (many.tau is None) == (kind is None) and (kind != "draft-model" or (many.tau or 0) > 1)
    if temperatures == [0.0]:
        assert many.output.read_bytes() == run("plain.jsonl").output.read_bytes()


def test_places_are_filled_again_while_others_run_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[list[Any]] = []
    real = RowPool.step
    monkeypatch.setattr(RowPool, "step", lambda self: running.append(self.rows) or real(self))
    assert run(rows=3).written == len(LINES)
    assert max(map(len, running)) == 3
    kept = [{*map(id, before)} & {*map(id, after)} for before, after in pairwise(running)]
    came = [{*map(id, after)} - {*map(id, before)} for before, after in pairwise(running)]
    assert any(stayed and new for stayed, new in zip(kept, came, strict=True))
    firsts = running[: sum(len(rows) == 3 for rows in running)]
    assert all(len(rows) == 3 for rows in firsts), "fewer run only when nothing waits any more"


def test_a_cache_that_holds_few_rows_is_not_asked_for_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    real = RowPool.step
    monkeypatch.setattr(RowPool, "step", lambda self: running.append(len(self.rows)) or real(self))
    monkeypatch.setattr("outdraft.training.regenerate.slot_bytes", lambda target: 1)
    monkeypatch.setattr("outdraft.training.regenerate.free_bytes", lambda device: 300)  # of which 120 may be used
    assert run(rows=8).written == len(LINES)
    assert 1 < max(running) < 4, "the shortest prompts take some 40 slots"


def test_a_prompt_is_answered_once_at_every_temperature(run: Run) -> None:
    lines = read(run(temperatures=[0.0, 1.0, 1.0]))
    assert [(line["temperature"], line.get("sample", 0)) for line in lines] == [(0, 0), (1, 0), (1, 1)] * len(LINES)
    texts = [json.dumps(line.get("messages", line.get("text"))) for line in lines]
    differing = [len({texts[3 * i + j] for j in range(3)}) for i in range(len(LINES))]
    assert sum(count == 3 for count in differing) >= len(LINES) - 1
    greedy = read(run("greedy.jsonl"))
    assert [line for line in lines if not line["temperature"]] == greedy


def test_what_is_drawn_follows_from_the_seed_and_the_prompt_alone(run: Run, tmp_path: Path) -> None:
    first = run("1.jsonl", temperatures=[1.0], seed=1)
    assert run("2.jsonl", temperatures=[1.0], seed=2).output.read_bytes() != first.output.read_bytes()
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("\n".join([*LINES[:5], LINES[6]][::-1]) + "\n")
    there = {line["id"]: line for line in read(first)}
    again = read(run("3.jsonl", temperatures=[1.0], seed=1, data=backwards))
    assert all(there[line["id"]] == line for line in again) and len(again) == 6


@pytest.mark.parametrize("drafted", [False, True])
def test_a_killed_run_that_goes_on_ends_in_the_same_file(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, drafted: bool
) -> None:
    settings: dict[str, Any] = {"temperatures": [0.0, 1.0], "drafter": PromptLookup() if drafted else None}
    undisturbed = run("whole.jsonl", **settings).output.read_bytes()
    stops_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted: 5 of 14 answers are in .*out.jsonl; run it again to"):
        run(**settings)
    killed = tmp_path / "out.jsonl"
    assert killed.read_bytes().count(b"\n") == 5
    killed.write_bytes(killed.read_bytes()[:-20])  # the last line is half-written
    result = run(**settings)
    assert (result.present, result.written) == (4, 10)
    assert killed.read_bytes() == undisturbed
    monkeypatch.setattr(regenerating, "_answer", lambda *given: pytest.fail("nothing is left to do"))
    again = run(**settings)
    assert (again.present, again.written) == (14, 0)
    assert "14 were there" in again.line()


def test_prompts_may_be_added_to_a_run(run: Run, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(LINES[:3]) + "\n")
    assert run(data=few).written == 3
    assert run().written == len(LINES) - 3


def test_settings_and_prompts_are_not_mixed_in_one_file(run: Run, tmp_path: Path) -> None:
    first = run()
    with pytest.raises(UserError, match=r"was written with temperatures 0, not 0,1; keep it"):
        run(temperatures=[0.0, 1.0])
    with pytest.raises(UserError, match=r"was written with max_new_tokens 9, not 8"):
        run(max_new_tokens=8)
    with pytest.raises(UserError, match="exists; resume it, or choose another output"):
        run(resume=False)
    other = tmp_path / "other.jsonl"
    other.write_text(user("something else", id=7))
    with pytest.raises(UserError, match="has the answer to another prompt under id 7"):
        run(data=other)
    with first.output.open("a") as lines:
        lines.write('{"words": 1}\n')
    with pytest.raises(UserError, match=r"out.jsonl:8: no answer of a run"):
        run()
    (tmp_path / "out.jsonl.settings.json").write_text('{"max_new_tokens": 9}')
    with pytest.raises(UserError, match="another version of outdraft"):
        run()


def test_a_conversation_ends_before_the_turn_that_does_not_fit(run: Run, target: Target) -> None:
    asked = target.tokenizer.apply_chat_template([{"role": "user", "content": "d"}], add_generation_prompt=True)
    narrow = tiny_target(torch.float64)
    narrow.model.config.max_position_embeddings = len(asked["input_ids"]) + 9
    result = run(target=narrow)
    lines = read(result)
    assert result.too_long == 4, "a system turn, two with a mark of their own, a long one"
    assert [len(line.get("messages", [])) for line in lines] == [2, 0, 2]
    assert run(target=narrow).written == 0


def test_questions_come_in_every_shape(run: Run, tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.jsonl"
    records: list[dict[str, Any]] = [
        {"prompt": "one"},
        {"instruction": "two", "input": "three"},
        {"question": "four", "answer": "OLD"},
        {"question_id": 1, "turns": ["five", "six"]},
        {"conversations": [{"from": "human", "value": "seven"}]},
    ]
    shapes.write_text("".join(json.dumps(record) + "\n" for record in records))
    listed, text = tmp_path / "list.json", tmp_path / "prompts.txt"
    listed.write_text(json.dumps(records))
    text.write_text("one\ntwo\n")

    def asked(result: RegenerateResult) -> list[list[str]]:
        return [[one["content"] for one in line["messages"] if one["role"] == "user"] for line in read(result)]

    expected = [["one"], ["two\n\nthree"], ["four"], ["five", "six"], ["seven"]]
    assert asked(run("1.jsonl", data=shapes)) == asked(run("2.jsonl", data=listed)) == expected
    assert asked(run("3.jsonl", data=text)) == [["one"], ["two"]]


def test_a_model_without_a_chat_template_goes_on_from_the_prompt(run: Run, tmp_path: Path) -> None:
    base = tiny_target(torch.float64, chat_template=None)
    text = tmp_path / "prompts.txt"
    text.write_text("once upon a time\n")
    (line,) = read(run(target=base, data=text))
    assert line["text"].startswith("once upon a time") and len(line["text"]) > len("once upon a time")
    with pytest.raises(UserError, match="has no chat template"):
        run("chats.jsonl", target=base)


def test_progress_is_told_from_the_start_and_every_half_minute(
    run: Run, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ticking(seconds=1.0)
    monkeypatch.setattr("outdraft.training.progress.time.perf_counter", lambda: next(clock))
    with (tmp_path / "said").open("w") as file:
        data = tmp_path / "prompts.jsonl"
        model = SpeculativeModel(target, PromptLookup())
        regenerate(model, data, tmp_path / "o.jsonl", max_new_tokens=9, rows=2, console=Console(file=file, width=200))
    said = (tmp_path / "said").read_text().splitlines()
    assert said[0] == "0/7 answers" and len(said) >= 2
    assert all("tokens/s | tau " in line and line.endswith(" left") for line in said[1:])


def test_the_time_left_is_not_told_from_the_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    report = AnswerProgress(Console(quiet=True), total=60, longest=64, drafting=False)
    monkeypatch.setattr("outdraft.training.progress.time.perf_counter", lambda: report._began + 60.0)
    spent = SimpleNamespace(rounds=1, emitted=1)
    rows: list[Any] = [SimpleNamespace(tokens=[5], statistics=spent) for _ in range(2)]
    report.show(rows)
    assert report.line() == "0/60 answers | reading prompts"
    for row in rows:
        row.tokens *= 30
    assert report.line() == "0/60 answers | 1 tokens/s | about 1 h 3 min left"


def ticking(seconds: float) -> Iterator[float]:
    now = 0.0
    while True:
        now += seconds
        yield now


def test_impossible_settings_are_refused(run: Run, target: Target) -> None:
    for settings, says in (
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 10**7}, "leaves no room for a prompt in the context of"),
        ({"rows": 0}, "at least 1"),
        ({"temperatures": []}, "at least one temperature"),
        ({"temperatures": [-1.0]}, "temperature must be 0"),
        ({"top_q": 1}, "unknown setting 'top_q'"),
    ):
        with pytest.raises(UserError, match=says):
            run(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no tokenizer"):
        run(target=Target(target.model))
