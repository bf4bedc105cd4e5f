"""Files of lines are read as people have them: compressed, by Windows, with a mark at the beginning, of any characters;
what is no text is named with its line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from outdraft.api.prompts import read_prompts
from outdraft.data.conversations import read_conversations
from outdraft.data.records import data_files, read_records, split_lines, text_lines, whole_text
from outdraft.errors import UserError
from outdraft.evaluation.bench import spec_bench
from outdraft.evaluation.bench.questions import read_questions
from outdraft.training.answers import AnswerFile

TEXTS = ["plain", "one\u2028two\u2029three\u0085four", "Grüße, \U0001f600", "a\x1c\x0b\x0cb"]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)

ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "UTF-8": str.encode,
    "with a mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
    "big-endian": lambda text: text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "Windows": lambda text: text.replace("\n", "\r\n").encode(),
    "Windows, UTF-16": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "no end of the last line": lambda text: text.rstrip("\n").encode(),
    "gz": lambda text: gzip.compress(text.encode()),
    "bz2": lambda text: bz2.compress(text.encode()),
    "xz": lambda text: lzma.compress(text.encode()),
    "gz of UTF-16": lambda text: gzip.compress(text.encode("utf-16")),
}


@pytest.mark.parametrize("kind", ENCODINGS)
@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data"])
def test_every_file_of_lines_gives_the_texts_that_were_written(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(ENCODINGS[kind](LINES))
    assert [one.text for one in read_conversations(tmp_path / name)] == TEXTS
    assert read_prompts(tmp_path / name) == TEXTS
    assert [one.prompt for one in read_questions(tmp_path / name, "prompts").questions] == TEXTS


@pytest.mark.parametrize("kind", ENCODINGS)
def test_a_json_list_and_prompts_a_line_are_read_alike(tmp_path: Path, kind: str) -> None:
    for name, indent in (("list.json", None), ("list", None), ("indented", 1)):
        written = json.dumps([{"text": text} for text in TEXTS], indent=indent)
        (tmp_path / name).write_bytes(ENCODINGS[kind](written + "\n"))
        assert [one.text for one in read_conversations(tmp_path / name)] == TEXTS
    (tmp_path / "prompts.txt").write_bytes(ENCODINGS[kind]("".join(f"a{text}b\n" for text in TEXTS)))
    assert read_prompts(tmp_path / "prompts.txt") == [f"a{text}b" for text in TEXTS]


def test_compressed_files_of_a_folder_are_read_with_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "second"}\n'))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"no record\n"))
    assert [Path(file).name for file in data_files(tmp_path)] == ["a.jsonl", "b.jsonl.gz"]
    assert [one.text for one in read_conversations(tmp_path)] == ["first", "second"]


def test_a_number_that_python_does_not_read_is_a_bad_line(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b", "n": ' + "9" * 5000 + "}\n")
    with pytest.raises(UserError, match=r"data.jsonl:2: broken JSON, Exceeds the limit"):
        read_conversations(file)
    assert len(read_conversations(file, on_bad_line="skip").skipped) == 1


ZSTD = b"\x28\xb5\x2f\xfd a stand-in"


def test_zstd_is_read_by_whichever_package_is_there_and_named_if_none_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.jsonl.zst").write_bytes(ZSTD)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="pip install zstandard"):
        read_conversations(tmp_path / "data.jsonl.zst")
    (tmp_path / "plain").write_text(LINES)
    for name in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(open=lambda file, mode: (tmp_path / "plain").open(mode)))
        assert [one.text for one in read_conversations(tmp_path / "data.jsonl.zst")] == TEXTS


def test_real_zstd_is_read(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    (tmp_path / "data.jsonl.zst").write_bytes(zstandard.compress(LINES.encode()))
    assert [one.text for one in read_conversations(tmp_path / "data.jsonl.zst")] == TEXTS


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b'{"text": "a \\ud83d b"}', r"half a surrogate pair, \\ud83d"),
        (b'{"prompt": "a", "completion": "\\uDE00"}', r"half a surrogate pair, \\ude00"),
        (b'{"messages": [{"role": "user", "content": "x"}], "id": "\\ud800"}', "half a surrogate"),
        (b'{"\\ud800": "x", "text": "y"}', "half a surrogate"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 99999, "JSON"),
    ],
)
def test_a_line_that_is_no_text_is_named_or_skipped_and_counted(tmp_path: Path, bad: bytes, says: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + bad + b'\n{"text": "b \\ud83d\\ude00"}\n')
    for read in (read_conversations, read_prompts, read_questions):
        with pytest.raises(UserError, match=rf"data\.jsonl:2: .*{says}"):
            read(path)
    found = read_conversations(path, "skip")
    assert [one.text for one in found] == ["a", "b \U0001f600"] and len(found.skipped) == 1
    assert len(read_questions(path, on_bad_line="skip").left_out) == 1


def test_a_record_of_a_json_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text('[{"text": "a"}, {"text": "\\ud83d"}]')
    with pytest.raises(UserError, match=r"list\.json:#2: half a surrogate"):
        read_conversations(path)
    assert len(read_conversations(path, "skip")) == 1


def test_half_a_pair_in_utf_16_costs_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"text": "a"}\n{"text": "\ud83d"}\n{"text": "b"}\n'.encode("utf-16", "surrogatepass"))
    found = read_conversations(path, "skip")
    assert [one.text for one in found] == ["a", "b"] and "data.jsonl:2: not UTF-16" in found.skipped[0]


@pytest.mark.parametrize("pack", [gzip.compress, partial(bz2.compress, compresslevel=1), lzma.compress])
def test_a_damaged_archive_is_named_with_the_line_where_it_breaks(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "data.jsonl.gz"
    packed = pack(b"".join(b'{"text": "%d"}\n' % (7919 * number**3) for number in range(12000)))
    path.write_bytes(packed[: len(packed) * 3 // 4])
    with pytest.raises(UserError, match=r"data\.jsonl\.gz:\d+: the archive is damaged"):
        read_conversations(path)
    found = read_conversations(path, "skip")
    assert len(found.skipped) == 1 and "damaged" in found.skipped[0]
    with pytest.raises(UserError, match="damaged"):
        whole_text(path)


def test_a_missing_file_is_no_damaged_archive(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(text_lines(tmp_path / "nothing"))


def test_numbers_of_lines_count_empty_ones(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("\n\r\n \na\n\nb")
    assert list(text_lines(tmp_path / "data")) == [(4, "a"), (6, "b")]
    assert [source.rpartition(":")[2] for source, _, _ in read_records(tmp_path / "data")] == ["4", "6"]
    assert split_lines("\na\u2028b\r\n\nc") == ["a\u2028b", "c"]


def test_answers_with_line_separators_survive_files_of_our_own(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": TEXTS[1]}
    record = {"id": TEXTS[1], "temperature": 0.0, "messages": [{"role": "user", "content": TEXTS[1]}, answer]}
    file = AnswerFile(tmp_path / "answers.jsonl", {})
    with file:
        file.add(record)
        file.add({**record, "id": 1})
    again = AnswerFile(tmp_path / "answers.jsonl", {})
    assert [name.id for name in again.present] == [TEXTS[1], 1]
    again.arrange(list(reversed(again.present)))
    assert [one.messages[1]["content"] for one in read_conversations(again.path)] == [TEXTS[1]] * 2
    choice = {"index": 0, "turns": TEXTS, "new_tokens": [1], "wall_time": [1.0], "accept_lengths": [1]}
    spec_bench.write(tmp_path / "bench.jsonl", [{"category": "writing", "choices": [choice]}])
    assert spec_bench.read(tmp_path / "bench.jsonl")[0]["choices"][0]["turns"] == TEXTS
