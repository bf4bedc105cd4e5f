"""Reading conversations: what is taken, and what every mistake says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outdraft.api.prompts import read_prompts
from outdraft.data.conversations import read_conversations
from outdraft.errors import UserError

GOOD = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}'


def say(role: str, content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


BROKEN_CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": "\\ud83d"}'}}
"""Half a surrogate pair in the JSON that a JSON text holds."""


def write(folder: Path, *lines: str | bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def test_three_shapes_are_read_in_order(tmp_path: Path) -> None:
    sharegpt = {
        "id": 7,
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
        ],
    }
    found = list(read_conversations(write(tmp_path, GOOD, json.dumps(sharegpt), "", '{"text": "once"}')))
    assert [[m["role"] for m in c.messages] for c in found] == [
        ["user", "assistant"],
        ["system", "user", "assistant"],
        [],
    ]
    assert found[1].messages[2] == {"role": "assistant", "content": "b"}
    assert found[2].text == "once" and found[2].source.endswith("data.jsonl:4")


def test_a_folder_is_read_by_file_name_and_a_json_list_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, '{"text": "second"}', name="b.jsonl")
    write(tmp_path, '{"text": "first"}', name="a.jsonl")
    assert [c.text for c in read_conversations(tmp_path)] == ["first", "second"]
    listed = tmp_path / "list.json"
    listed.write_text("\ufeff " + json.dumps([{"text": "x"}, json.loads(GOOD)]))
    assert [c.text for c in read_conversations(listed)] == ["x", None]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": [', "broken JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        ('{"words": "x"}', "unknown shape with keys: words"),
        ('{"prompt": 7}', '"prompt" must be a non-empty string'),
        ('{"turns": ["x", ""]}', '"turns" must be a list of non-empty strings'),
        ('["x"]', "must be an object"),
        ('{"messages": []}', "empty"),
        ('{"messages": [{"role": "user"}]}', 'string "content"'),
        ('{"conversations": [{"from": "wizard", "value": "x"}]}', 'unknown role "wizard"'),
        ('{"messages": [{"role": "user", "content": null}]}', 'string "content"'),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}', '"image_url"'),
        ('{"messages": [{"content": "x"}]}', 'every turn needs "role"'),
        ('{"messages": [{"role": "system", "content": "x"}]}', "no turn of a user or an assistant"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": 7}', '"tools" must be a list'),
        ('{"text": "  "}', "non-empty string"),
        ('{"messages": {"role": "user"}}', "no list"),
        ('{"prompt": []}', "empty"),
        (json.dumps({"messages": [say("user"), say("assistant", None, tool_calls=[BROKEN_CALL])]}), "half a surrogate"),
        (json.dumps({"messages": [say("user")], "tools": '[{"name": "\\ud83d"}]'}), "half a surrogate"),
    ],
)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path: Path, line: str | bytes, says: str) -> None:
    path = write(tmp_path, GOOD, line, GOOD)
    with pytest.raises(UserError) as raised:
        read_conversations(path)
    message = str(raised.value)
    assert "data.jsonl:2:" in message and says in message and "--on-bad-line skip" in message
    assert "\n" not in message
    found = read_conversations(path, on_bad_line="skip")
    assert len(found) == 2 and len(found.skipped) == 1 and says in found.skipped[0]


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
AGENTS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a tool": ([say("user"), say("assistant"), say("tool", "42"), say("assistant", "a")], "uata"),
    "speaks twice": ([say("user"), say("user", "more"), say("assistant")], "uua"),
    "assistant first": ([say("assistant"), say("user"), say("assistant")], "aua"),
    "assistant twice": ([say("user"), say("assistant"), say("assistant")], "uaa"),
    "developer": ([say("developer"), say("user"), say("assistant")], "dua"),
    "system late": ([say("user"), say("assistant"), say("system"), say("user")], "uasu"),
    "calls": ([say("user"), say("assistant", None, tool_calls=[CALL]), say("tool", "42", tool_call_id="1")], "uat"),
    "old calls": ([say("user"), say("assistant", None, function_call=CALL["function"]), say("function", "42")], "uat"),
    "parts": ([say("user", [{"type": "text", "text": "q"}, "r"]), say("assistant", [])], "ua"),
    "nothing from a tool": ([say("user"), say("assistant", None, tool_calls=[CALL]), say("tool", None)], "uat"),
    "a tool of Llama's": ([say("user"), say("assistant", None, tool_calls=[CALL]), say("ipython", "42")], "uat"),
    "an object from a tool": ([say("user"), say("assistant"), say("tool", {"sum": 3})], "uat"),
    "a number from a tool": ([say("user"), say("assistant"), say("tool", 42)], "uat"),
    "a list from a tool": ([say("user"), say("assistant"), say("tool", [{"title": "a"}, {"title": "b"}])], "uat"),
    "parts from a tool": ([say("user"), say("assistant"), say("tool", [{"type": "text", "text": "42"}])], "uat"),
}


@pytest.mark.parametrize("kind", AGENTS)
def test_conversations_of_agents_are_read_in_any_order(tmp_path: Path, kind: str) -> None:
    turns, order = AGENTS[kind]
    path = write(tmp_path, json.dumps({"messages": turns, "tools": [CALL["function"]]}))
    (found,) = read_conversations(path)
    assert "".join(one["role"][0] for one in found.messages) == order
    assert all(isinstance(one["content"], str) for one in found.messages)
    assert found.tools == (CALL["function"],)
    again = write(tmp_path, json.dumps(found.record()), name="again.jsonl")
    (read_again,) = read_conversations(again)
    assert (read_again.messages, read_again.tools) == (found.messages, found.tools)
    if order.endswith("a"):  # a question that nobody answers yet is no prompt to measure with
        assert read_prompts(path) == [[*found.messages[: len(order.rstrip("a"))]]]


def test_turns_are_found_under_the_names_that_trainers_give_them(tmp_path: Path) -> None:
    turns = json.loads(GOOD)["messages"]
    old = [{"from": "human", "value": "hi"}, {"from": "AI", "value": "ho"}]
    shapes: list[dict[str, Any]] = [
        {"messages": turns},
        {"conversations": turns},
        {"messages": old},
        {"prompt": turns[:1], "completion": turns[1:]},
    ]
    path = write(tmp_path, *map(json.dumps, shapes))
    assert [[*one.messages] for one in read_conversations(path)] == [turns] * len(shapes)
    assert read_prompts(path) == [turns[:1]] * len(shapes)
    (asked,) = read_conversations(write(tmp_path, json.dumps({"prompt": turns[:1]})))
    assert [*asked.messages] == turns[:1]


@pytest.mark.parametrize("shape", ["messages", "conversations", "prompt"])
def test_a_record_s_own_system_text_is_its_first_turn(tmp_path: Path, shape: str) -> None:
    turns = json.loads(GOOD)["messages"]
    record = {shape: turns, "system": "be brief", "finish_reason": "length"}
    (found,) = read_conversations(write(tmp_path, json.dumps(record)))
    assert [*found.messages] == [say("system", "be brief"), *turns] and found.cut == {2}
    for given in ({shape: turns, "system": " "}, {shape: [say("system", "s"), *turns], "system": "be brief"}):
        (found,) = read_conversations(write(tmp_path, json.dumps(given)))
        assert [*found.messages] == given[shape]


def test_calls_of_tools_come_in_the_form_that_templates_write(tmp_path: Path) -> None:
    calls: list[Any] = [
        {
            "conversations": [
                {"from": "human", "value": "x"},
                {"from": name, "value": json.dumps(CALL["function"])},
            ]
        }
        for name in ("function_call", "tool_call")
    ]
    calls.insert(
        0, {"messages": [say("user"), say("assistant", None, tool_calls=[CALL]), say("tool", "3", tool_call_id="1")]}
    )
    found = [one.messages[1] for one in read_conversations(write(tmp_path, *map(json.dumps, calls)))]
    assert found[0]["content"] == found[1]["content"] == ""
    assert found[0]["tool_calls"] == [{**CALL, "function": {"name": "add", "arguments": {"a": 1}}}]
    for one in found[1:]:
        assert one["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


@pytest.mark.parametrize(
    ("reason", "cut"),
    [
        *[(reason, False) for reason in ("stop", "STOP", "COMPLETE", "tool_calls", "end_turn", None, 7)],
        *[(reason, True) for reason in ("length", "max_tokens", "content_filter", "stop_sequence", "context")],
    ],
)
def test_what_ended_an_answer_is_read_as_servers_write_it(tmp_path: Path, reason: object, cut: bool) -> None:
    turns = json.loads(GOOD)["messages"]
    lines = [
        {"messages": turns, "finish_reason": reason},
        {"messages": [turns[0], {**turns[1], "finish_reason": reason}, *turns]},
        {"text": "once", "finish_reason": reason},
        {"prompt": "a", "completion": "b", "finish_reason": reason},
    ]
    found = [one.cut for one in read_conversations(write(tmp_path, *map(json.dumps, lines)))]
    assert found == ([{1}, {1}, {0}, {1}] if cut else [set()] * 4)


def test_missing_and_empty_data_say_what_to_give(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(UserError, match="give --data"):
            read_conversations(path)
    with pytest.raises(UserError, match="empty"):
        read_conversations(write(tmp_path, ""))
    with pytest.raises(UserError, match="all 1 lines were skipped"):
        read_conversations(write(tmp_path, "nonsense"), on_bad_line="skip")


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"prompt": "a"}, ["a"]),
        ({"prompt": "a", "completion": "b"}, ["a", "b"]),
        ({"instruction": "a", "input": ""}, ["a"]),
        ({"instruction": "a", "input": "c", "output": "b", "text": "Below is an instruction"}, ["a\n\nc", "b"]),
        ({"question": "a", "answer": "b"}, ["a", "b"]),
    ],
)
def test_bare_questions_are_a_users_turn(tmp_path: Path, record: dict[str, str], turns: list[str]) -> None:
    (found,) = read_conversations(write(tmp_path, json.dumps(record)))
    assert found.bare and [message["content"] for message in found.messages] == turns
    assert [message["role"] for message in found.messages] == ["user", "assistant"][: len(turns)]


def test_the_turns_of_spec_bench_are_all_questions(tmp_path: Path) -> None:
    (found,) = read_conversations(write(tmp_path, '{"question_id": 81, "category": "qa", "turns": ["a", "b"]}'))
    assert [(message["role"], message["content"]) for message in found.messages] == [("user", "a"), ("user", "b")]


def test_a_text_file_has_a_prompt_a_line_and_other_names_may_hold_json(tmp_path: Path) -> None:
    found = list(read_conversations(write(tmp_path, "one", "", '{"text": "no record"}', name="prompts.txt")))
    assert [one.messages[0]["content"] for one in found] == ["one", '{"text": "no record"}']
    assert found[1].source.endswith("prompts.txt:3")
    assert [one.text for one in read_conversations(write(tmp_path, '{"text": "x"}', name="data"))] == ["x"]


def test_what_is_not_finished_stays_so_when_it_is_written_again(tmp_path: Path) -> None:
    turns = json.loads(GOOD)["messages"]
    marked = [turns[0], {**turns[1], "finished": False}, *turns]
    lines = [
        {"id": 3, "source": "gsm8k", "finished": False, "messages": marked},
        {"finished": True, "messages": turns},
        {"finished": False, "text": "once"},
    ]
    found = list(read_conversations(write(tmp_path, *map(json.dumps, lines))))
    assert [one.cut for one in found] == [{1, 3}, set(), {0}]
    assert (found[0].id, found[0].origin, found[1].id, found[1].origin) == (3, "gsm8k", None, None)
    again = list(read_conversations(write(tmp_path, *(json.dumps(one.record()) for one in found), name="again.jsonl")))
    assert [(one.messages, one.text, one.cut) for one in again] == [(one.messages, one.text, one.cut) for one in found]


def test_turns_of_weight_0_are_known_and_stay_so_when_they_are_written_again(tmp_path: Path) -> None:
    turns = json.loads(GOOD)["messages"]
    weighted = [{**turn, "weight": weight} for turn, weight in zip([*turns, *turns], (0, 0, None, 1), strict=True)]
    (found,) = read_conversations(write(tmp_path, json.dumps({"messages": weighted})))
    assert found.untrained == {1}, "the user's turns are never learned, whatever their weight"
    (again,) = read_conversations(write(tmp_path, json.dumps(found.record()), name="again.jsonl"))
    assert again.untrained == {1} and again.messages == found.messages
    weighted[3]["weight"] = 0.5
    with pytest.raises(UserError, match=r':1: the "weight" of a turn must be 0 or 1, not 0\.5'):
        read_conversations(write(tmp_path, json.dumps({"messages": weighted})))


def installed(monkeypatch: pytest.MonkeyPatch, **modules: object) -> None:
    """These stand for packages; None for one that is missing."""
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


def test_parquet_and_the_hub_name_the_package_that_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, pyarrow=None, pyarrow__parquet=None, datasets=None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pip install pyarrow"):
        read_conversations(tmp_path / "p.parquet")
    with pytest.raises(UserError, match="pip install datasets"):
        read_conversations("hf:some/set")


def test_a_data_set_of_the_hub_is_asked_for_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        if split == "none":
            raise ValueError("no such split\nat all")
        return [{"prompt": "a"}]

    installed(monkeypatch, datasets=SimpleNamespace(load_dataset=load_dataset))
    found = [*read_conversations("hf:some/set"), *read_conversations("hf:some/set:test")]
    assert asked == [("some/set", "train"), ("some/set", "test")]
    assert [one.source for one in found] == ["hf:some/set:#1", "hf:some/set:test:#1"]
    with pytest.raises(UserError, match=r"no such split; check the name"):
        read_conversations("hf:some/set:none")


def test_rows_of_a_table_are_records_by_the_names_in_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt,source\n"What, then?",me\nWho?,you\n')
    (tmp_path / "p.tsv").write_text("instruction\tinput\nAdd\t2 and 3\n")
    for name, asked in (("p.csv", ["What, then?", "Who?"]), ("p.tsv", ["Add\n\n2 and 3"])):
        assert [one.questions[0]["content"] for one in read_conversations(tmp_path / name)] == asked
    (tmp_path / "bad.csv").write_text("colour\nred\n")
    with pytest.raises(UserError, match=r"bad.csv:#1: unknown shape with keys: colour"):
        read_conversations(tmp_path / "bad.csv")


def test_fields_of_a_table_may_be_long_and_a_broken_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(f"prompt,response\n{'x' * 200_000},y\n")
    (found,) = read_conversations(tmp_path / "p.csv")
    assert len(found.messages[0]["content"]) == 200_000
    (tmp_path / "mac.csv").write_bytes(b"prompt,response\na,b\rc,d\r")
    with pytest.raises(UserError, match=r"mac.csv:2: no row of a table"):
        read_conversations(tmp_path / "mac.csv")


def test_zero_bytes_of_a_crash_are_a_bad_line_and_no_encoding(tmp_path: Path) -> None:
    path = write(tmp_path, b"\0" * 64 + GOOD.encode(), GOOD)
    found = read_conversations(path, on_bad_line="skip")
    assert len(found) == 1 and "data.jsonl:1: broken JSON" in found.skipped[0]


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = json.loads(GOOD)["messages"]
    parquet.write_table(arrow.table({"messages": [turns, turns]}), tmp_path / "p.parquet")
    for path in (tmp_path / "p.parquet", tmp_path):
        assert [list(one.messages) for one in read_conversations(path)] == [turns, turns]
    (tmp_path / "p.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="no Parquet file that can be read"):
        read_conversations(tmp_path / "p.parquet")
