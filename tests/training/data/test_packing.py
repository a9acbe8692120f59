"""What becomes of records: blocks of text, instructions with the loss on the answer."""

from __future__ import annotations

from tiny_llama import decoded, tokenizer

from wdanalysis.training.data.batches import IGNORED, Examples
from wdanalysis.training.data.formats import Document, Instruction
from wdanalysis.training.data.packing import encode


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


def test_an_answer_that_does_not_fit_is_left_out_and_told_and_a_cut_one_too() -> None:
    instructions = [Instruction("p" * 8, "a"), Instruction("pp", "a" * 20), Instruction("pp", "aa")]
    examples, notes = encode(instructions, tokenizer(), 8)
    assert [decoded(example) for example in examples] == ["pp" + "a" * 6, "ppaa<end>"]
    assert notes == (
        "2 of 3 instructions were cut at 8 tokens",
        "1 of 3 instructions were left out: no answer within 8 tokens",
    )


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
