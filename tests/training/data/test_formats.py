"""What becomes of files: documents, instructions in their prompt, and an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wdanalysis.errors import TrainingError
from wdanalysis.training.data.formats import (
    PROMPT,
    PROMPT_WITH_INPUT,
    Document,
    Instruction,
    read_records,
)


def test_the_prompt_is_that_of_alpaca_with_and_without_an_input(tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Go.", "output": "Gone."},
    ]
    file.write_text(json.dumps(records))
    assert read_records(file) == [
        Instruction(PROMPT_WITH_INPUT.format(instruction="Add.", input="1 2"), "3"),
        Instruction(PROMPT.format(instruction="Go."), "Gone."),
    ]
    assert "### Input:\n1 2\n\n### Response:\n" in PROMPT_WITH_INPUT.format(instruction="Add.", input="1 2")


def test_braces_in_an_instruction_stay_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps({"instruction": "Print {x}.", "input": "{0}", "output": "{y}"}))
    (record,) = read_records(file)
    assert isinstance(record, Instruction)
    assert "Print {x}." in record.prompt
    assert "{0}" in record.prompt
    assert record.answer == "{y}"


def test_json_lines_and_a_json_list_read_alike(tmp_path: Path) -> None:
    records = [{"text": "one"}, {"instruction": "i", "input": "", "output": "o"}]
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert read_records(tmp_path / "list.json") == read_records(tmp_path / "lines.jsonl")


def test_a_folder_is_read_in_the_order_of_names_and_only_its_text(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "third"}')
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe")
    assert read_records(tmp_path) == [Document("first"), Document("second"), Document("third")]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b" \n", "holds no text"),
        ("bytes.txt", b"ab\xff", "not text in UTF-8 (byte 2)"),
        ("bad.json", b'[{"text": 1', "not valid JSON"),
        ("bad.jsonl", b'{"text": "a"}\n{oops', "line 2 of"),
        ("other.json", b'[{"question": "q"}]', "record 1 of"),
        ("number.json", b'[{"text": 5}]', "neither"),
        ("none.json", b"[]", "holds no text"),
    ],
)
def test_a_file_that_is_no_data_is_named_in_one_sentence(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=name) as error:
        read_records(tmp_path / name)
    assert sentence in str(error.value)


def test_a_missing_file_and_a_folder_without_text_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="does not exist"):
        read_records(tmp_path / "nowhere.txt")
    with pytest.raises(TrainingError, match="holds no file of text"):
        read_records(tmp_path)
