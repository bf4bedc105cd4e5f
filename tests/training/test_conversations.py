"""Reading conversations: what is taken, and what every mistake says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outdraft.errors import UserError
from outdraft.training.conversations import read_conversations

GOOD = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}'


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
        ('{"prompt": "x"}', "unknown shape with keys: prompt"),
        ('["x"]', "must be an object"),
        ('{"messages": []}', "empty"),
        ('{"messages": [{"role": "user"}]}', 'string "content"'),
        ('{"conversations": [{"from": "wizard", "value": "x"}]}', 'unknown role "wizard"'),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "wrong role order"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}', "wrong role order"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "wrong role order"),
        ('{"text": "  "}', "non-empty string"),
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


def test_missing_and_empty_data_say_what_to_give(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(UserError, match="give --data"):
            read_conversations(path)
    with pytest.raises(UserError, match="empty"):
        read_conversations(write(tmp_path, ""))
    with pytest.raises(UserError, match="all 1 lines were skipped"):
        read_conversations(write(tmp_path, "nonsense"), on_bad_line="skip")
