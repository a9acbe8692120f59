"""From records to what a run reads: examples to train on, examples held out, and batches of them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from wdanalysis.errors import TrainingError
from wdanalysis.training.data.formats import Record, read_records
from wdanalysis.training.data.packing import Example, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that does not count in the loss (torch's `ignore_index`)."""

T = TypeVar("T")


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Examples as `transformers.Trainer` wants them: `input_ids` and `labels`, int64, of one length each."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one example."""
        example = self.examples[index]
        input_ids = torch.from_numpy(example.tokens.astype(np.int64))
        labels = input_ids.clone()
        labels[: example.unlabelled] = IGNORED
        return {"input_ids": input_ids, "labels": labels}

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(len(example.tokens) for example in self.examples)

    def fingerprint(self) -> str:
        """Return a hash of every token, by which a resumed run knows its data."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(np.array([len(example.tokens), example.unlabelled], np.int64).tobytes())
            digest.update(example.tokens.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right to the longest of a batch: batch × length tensors, with their attention mask."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return `input_ids`, `labels` and `attention_mask`."""

        def padded(name: str, value: int) -> Tensor:
            rows = [example[name] for example in examples]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        input_ids = padded("input_ids", self.pad_token_id)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return {"input_ids": input_ids, "labels": padded("labels", IGNORED), "attention_mask": mask.long()}


@dataclass(frozen=True)
class TrainingData:
    """What is trained on, what is held out, and sentences on what was left out."""

    train: Examples
    held_out: Examples | None
    notes: tuple[str, ...] = ()


def load_data(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    eval_fraction: float = 0.0,
    eval_paths: Sequence[Path] = (),
    seed: int = 0,
) -> TrainingData:
    """Read files and folders into examples to train on and examples that are held out.

    Parameters
    ----------
    paths
        Text files, JSON files, and folders of them.
    tokenizer
        The model's.
    max_length
        Tokens of an example: a document is packed with others into blocks of so many, an instruction is cut there.
    eval_fraction
        Share that is held out, of the documents and instructions; of the blocks, where there are too few documents.
    eval_paths
        Held-out files, instead of a share.
    seed
        Decides what is held out.

    Raises
    ------
    TrainingError
        A file cannot be read, a record is neither a text nor an instruction, or there is nothing to train on.
    """
    records = [record for path in paths for record in read_records(path)]
    held_out: Sequence[Record] | float = eval_fraction
    if eval_paths:
        held_out = [record for path in eval_paths for record in read_records(path, parameter="eval_data")]
    return split_data(records, held_out, tokenizer, max_length=max_length, seed=seed)


def split_data(
    records: Sequence[Record],
    held_out: Sequence[Record] | float,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int = 0,
) -> TrainingData:
    """Tokenize records that are in memory; parameters as in `load_data`, `held_out` records or a share.

    Raises
    ------
    TrainingError
        There is nothing to train on.
    """
    if isinstance(held_out, float | int) and held_out * len(records) < 1:
        blocks, notes = encode(records, tokenizer, max_length)
        train, evaluated = _split(blocks, held_out, seed)
    else:
        rest, chosen = (
            _split(records, held_out, seed) if isinstance(held_out, float | int) else (records, held_out)
        )
        train, notes = encode(rest, tokenizer, max_length)
        evaluated, eval_notes = encode(chosen, tokenizer, max_length)
        notes = (*notes, *(f"held out: {note}" for note in eval_notes))
    if not (evaluated or isinstance(held_out, float | int)):
        raise TrainingError(
            "the held-out data holds nothing that a model could predict.", parameter="eval_data"
        )
    if not train:
        raise TrainingError(
            f"the data leaves nothing to train on: {len(records)} records, "
            f"of which none has a token to predict within {max_length} tokens.",
            parameter="data",
        )
    return TrainingData(Examples(train), Examples(evaluated) if evaluated else None, notes)


def _split(items: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """Draw a share of the items, at least one where it is not 0, and never all; both parts keep their order."""
    count = min(max(round(share * len(items)), 1), len(items) - 1) if share else 0
    chosen = set(random.Random(seed).sample(range(len(items)), max(count, 0)))
    return (
        [item for index, item in enumerate(items) if index not in chosen],
        [item for index, item in enumerate(items) if index in chosen],
    )
