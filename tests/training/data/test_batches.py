"""What becomes of files: blocks of text, instructions with the loss on the answer, a held-out share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_llama import WORDS, model_folder, text, tokenizer
from transformers import AutoModelForCausalLM

from wdanalysis.errors import TrainingError
from wdanalysis.training.data.batches import (
    IGNORED,
    PROMPT,
    PROMPT_WITH_INPUT,
    Collator,
    Document,
    Example,
    Examples,
    Instruction,
    encode,
    load_data,
    read_records,
    split_data,
)

END = 0


def decoded(example: Example) -> str:
    return tokenizer().decode(example.tokens)


def test_documents_are_packed_into_blocks_with_an_end_after_each_and_nothing_lost() -> None:
    examples, notes = encode([Document("abcdef"), Document("ghi")], tokenizer(), 4)
    assert [decoded(example) for example in examples] == ["abcd", "ef<end>g", "hi<end>"]
    assert notes == ()


def test_a_last_block_of_one_token_predicts_nothing_and_is_left_out() -> None:
    examples, _ = encode([Document("abcd")], tokenizer(), 4)
    assert [decoded(example) for example in examples] == ["abcd"]


def test_the_loss_of_an_instruction_is_on_the_answer_and_the_end_only() -> None:
    (example,), _ = encode([Instruction("Q: ", "yes")], tokenizer(), 64)
    item = Examples([example])[0]
    counted = item["labels"] != IGNORED
    assert tokenizer().decode(item["input_ids"][counted]) == "yes<end>"
    assert tokenizer().decode(item["input_ids"][~counted]) == "Q: "


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


def test_an_answer_that_does_not_fit_is_left_out_and_told_and_a_cut_one_too() -> None:
    instructions = [Instruction("p" * 8, "a"), Instruction("pp", "a" * 20), Instruction("pp", "aa")]
    examples, notes = encode(instructions, tokenizer(), 8)
    assert [decoded(example) for example in examples] == ["pp" + "a" * 6, "ppaa<end>"]
    assert notes == (
        "2 of 3 instructions were cut at 8 tokens",
        "1 of 3 instructions were left out: no answer within 8 tokens",
    )


def test_data_without_anything_to_predict_is_an_error() -> None:
    with pytest.raises(TrainingError, match="nothing to train on"):
        split_data([Instruction("p" * 9, "a")], 0.0, tokenizer(), max_length=8)


def test_the_held_out_share_is_whole_documents_drawn_by_the_seed() -> None:
    documents = [Document(f"{number:04}") for number in range(20)]
    data, again, other = (
        split_data(documents, 0.1, tokenizer(), max_length=5, seed=seed) for seed in (3, 3, 4)
    )
    assert data.held_out is not None
    assert again.held_out is not None
    assert other.held_out is not None
    held_out = {decoded(example) for example in data.held_out.examples}
    assert len(held_out) == 2
    assert not held_out & {decoded(example) for example in data.train.examples}
    assert data.held_out.fingerprint() == again.held_out.fingerprint() != other.held_out.fingerprint()


def test_of_a_single_document_blocks_are_held_out() -> None:
    data = split_data([Document(text(100))], 0.25, tokenizer(), max_length=16)
    assert data.held_out is not None
    assert len(data.held_out) == round(0.25 * (len(data.held_out) + len(data.train)))
    assert data.held_out.tokens + data.train.tokens == len(text(100)) + 1


def test_held_out_files_take_the_place_of_a_share(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("training")
    (tmp_path / "eval.txt").write_text("held out")
    data = load_data(
        [tmp_path / "train.txt"],
        tokenizer(),
        max_length=32,
        eval_fraction=0.5,
        eval_paths=[tmp_path / "eval.txt"],
    )
    assert data.held_out is not None
    assert [decoded(example) for example in data.held_out.examples] == ["held out<end>"]
    assert [decoded(example) for example in data.train.examples] == ["training<end>"]


def test_padding_changes_no_loss(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder(tmp_path)).double().eval()
    examples, _ = encode([Instruction("Say it: ", word) for word in WORDS[:3]], tokenizer(), 64)
    items = [Examples(examples)[index] for index in range(3)]
    assert len({len(item["input_ids"]) for item in items}) > 1
    with torch.no_grad():
        together = model(**Collator(END)(items)).loss
        alone = [
            (
                model(**{name: tensor[None] for name, tensor in item.items()}).loss,
                item["labels"].ne(IGNORED).sum(),
            )
            for item in items
        ]
    expected = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    torch.testing.assert_close(together, expected)


def test_a_tokenizer_that_starts_texts_starts_every_text() -> None:
    from tokenizers.processors import TemplateProcessing

    starting = tokenizer()
    starting.add_special_tokens({"bos_token": "<start>"})
    start = starting.bos_token_id
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", start)]
    )
    (block, instruction), _ = encode([Document("ab"), Instruction("q", "a")], starting, 16)
    assert starting.decode(block.tokens) == "<start>ab<end>"
    assert starting.decode(instruction.tokens) == "<start>qa<end>"
    assert instruction.unlabelled == 2
