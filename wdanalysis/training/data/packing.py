"""From records to examples: texts in packed blocks, instructions with the loss on the answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wdanalysis.errors import TrainingError
from wdanalysis.training.data.formats import Document, Instruction, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZED_AT_ONCE = 1000


@dataclass(frozen=True)
class Example:
    """What the model reads at once.

    Attributes
    ----------
    tokens
        Token ids, int32.
    unlabelled
        So many tokens at the start do not count in the loss.
    """

    tokens: NDArray[np.int32]
    unlabelled: int = 0

    @property
    def has_loss(self) -> bool:
        """Whether any token is predicted: the first never is."""
        return len(self.tokens) > max(self.unlabelled, 1)


def encode(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Example], tuple[str, ...]]:
    """Turn records into examples: first the blocks of all documents, then the instructions in their order.

    Returns
    -------
    tuple
        The examples, and sentences on what was left out or cut.

    Raises
    ------
    TrainingError
        The tokenizer has no token that ends a text.
    """
    before, after = _ends(tokenizer)
    documents = [record.text for record in records if isinstance(record, Document)]
    instructions = [record for record in records if isinstance(record, Instruction)]
    stream = itertools.chain.from_iterable(
        (*before, *tokens, *after) for tokens in _tokenized(tokenizer, documents)
    )
    examples = [Example(block) for block in _blocks(stream, max_length)]
    prompts = _tokenized(tokenizer, [record.prompt for record in instructions])
    answers = _tokenized(tokenizer, [record.answer for record in instructions])
    cut = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        asked = [*before, *prompt]
        tokens = np.array([*asked, *answer, *after], np.int32)
        cut += len(tokens) > max_length
        examples.append(Example(tokens[:max_length], len(asked)))
    kept = [example for example in examples if example.has_loss]
    notes = []
    if cut:
        notes.append(f"{cut} of {len(instructions)} instructions were cut at {max_length} tokens")
    if lost := sum(example.unlabelled > 0 and not example.has_loss for example in examples):
        notes.append(
            f"{lost} of {len(instructions)} instructions were left out: no answer within {max_length} tokens"
        )
    return kept, tuple(notes)


def _blocks(stream: Iterable[int], length: int) -> Iterator[NDArray[np.int32]]:
    """The tokens of all documents, one after another, in blocks; the last may be shorter."""
    tokens = np.fromiter(stream, np.int32)
    for start in range(0, len(tokens), length):
        yield tokens[start : start + length]


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), TOKENIZED_AT_ONCE):
        yield from tokenizer(
            list(texts[start : start + TOKENIZED_AT_ONCE]), add_special_tokens=False, verbose=False
        )["input_ids"]


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens before a text, where this tokenizer sets one there, and after it."""
    if tokenizer.eos_token_id is None:
        raise TrainingError("the model's tokenizer has no end-of-text token: set its eos_token.")
    bos = tokenizer.bos_token_id
    sets_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos] if sets_bos else [], [tokenizer.eos_token_id]
