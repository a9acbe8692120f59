"""What a run reads: a held-out share, files held out, padded batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llama import WORDS, decoded, model_folder, text, tokenizer
from transformers import AutoModelForCausalLM

from wdanalysis.errors import TrainingError
from wdanalysis.training.data.batches import IGNORED, Collator, Examples, load_data, split_data
from wdanalysis.training.data.formats import Document, Instruction
from wdanalysis.training.data.packing import encode

END = 0


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
