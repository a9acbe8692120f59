"""From files to batches of tokens: plain text in packed blocks, records of instructions with the loss on the answer.

A text file is one document. JSON (a list, or an object a line) holds documents, ``{"text": …}``, or instructions,
``{"instruction": …, "input": …, "output": …}`` with `input` optional, as the paper's commonsense set does. An
instruction is set in the prompt that Alpaca and LLM-Adapters use, and only the tokens of its answer count in the loss.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wdanalysis.errors import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
"""Files of a folder that are read as text; a file that is named itself may have any suffix."""

JSON_SUFFIXES = (".json", ".jsonl")

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

IGNORED = -100
"""The label of a token that does not count in the loss (torch's `ignore_index`)."""

TOKENIZED_AT_ONCE = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A text to continue; the loss is on every token but the first."""

    text: str


@dataclass(frozen=True)
class Instruction:
    """A prompt and its answer; the loss is on the answer and on the end of the text."""

    prompt: str
    answer: str


Record = Document | Instruction


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
class TrainingData:
    """What is trained on, what is held out, and sentences on what was left out."""

    train: Examples
    held_out: Examples | None
    notes: tuple[str, ...] = ()


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
    if eval_paths:
        held_out = [record for path in eval_paths for record in read_records(path)]
        return split_data(records, held_out, tokenizer, max_length=max_length)
    return split_data(records, eval_fraction, tokenizer, max_length=max_length, seed=seed)


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
    if not isinstance(held_out, float | int):
        train, notes = encode(records, tokenizer, max_length)
        evaluated, eval_notes = encode(held_out, tokenizer, max_length)
        if not evaluated:
            raise TrainingError("the held-out data holds nothing that a model could predict.")
        notes = (*notes, *(f"held out: {note}" for note in eval_notes))
    elif held_out * len(records) >= 1:
        rest, chosen = _split(records, held_out, seed)
        train, notes = encode(rest, tokenizer, max_length)
        evaluated, eval_notes = encode(chosen, tokenizer, max_length)
        notes = (*notes, *(f"held out: {note}" for note in eval_notes))
    else:
        train, notes = encode(records, tokenizer, max_length)
        train, evaluated = _split(train, held_out, seed)
    if not train:
        raise TrainingError(
            f"the data leaves nothing to train on: {len(records)} records, "
            f"of which none has a token to predict within {max_length} tokens."
        )
    return TrainingData(Examples(train), Examples(evaluated) if evaluated else None, notes)


def read_records(path: Path) -> list[Record]:
    """Read a text file, a JSON file, or every such file of a folder and its sub-folders in the order of their names.

    Raises
    ------
    TrainingError
        The path is missing, empty or not UTF-8, or a record is neither a text nor an instruction.
    """
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and file.suffix.lower() in (*TEXT_SUFFIXES, *JSON_SUFFIXES)
        )
        if not files:
            suffixes = ", ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES))
            raise TrainingError(f"{path} holds no file of text ({suffixes}): name the files with --data.")
    else:
        files = [path]
    records = [record for file in files for record in _read_file(file)]
    if not records:
        raise TrainingError(f"{path} holds no text: give data with --data.")
    return records


def _read_file(path: Path) -> list[Record]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TrainingError(
            f"{path} does not exist: give a text file, a JSON file or a folder with --data."
        ) from None
    except OSError as error:
        raise TrainingError(f"{path} could not be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise TrainingError(
            f"{path} is not text in UTF-8 (byte {error.start}): convert it, or leave it out."
        ) from None
    if path.suffix.lower() not in JSON_SUFFIXES:
        return [Document(text)] if text.strip() else []
    found = (_record(path, place, value) for place, value in _json_values(path, text))
    return [record for record in found if record is not None]


def _json_values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Every record of a JSON list, or of JSON lines, with the place where it stands."""
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise TrainingError(f"{path} is not valid JSON: {error.msg} in line {error.lineno}.") from None
        yield from ((f"record {index}", value) for index, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise TrainingError(
                    f"line {number} of {path} is not valid JSON ({error.msg}): the file must hold one list, or an "
                    "object a line."
                ) from None


def _record(path: Path, place: str, value: Any) -> Record | None:
    """A record; None for an empty text, of which there is nothing to learn."""
    match value:
        case {"text": str(text)}:
            return Document(text) if text.strip() else None
        case {"instruction": str(instruction), "output": str(output)} if isinstance(
            given := value.get("input") or "", str
        ):
            prompt = PROMPT_WITH_INPUT if given else PROMPT
            return Instruction(prompt.format(instruction=instruction, input=given), output)
    keys = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
    raise TrainingError(
        f"{place} of {path} is neither {{text}} nor {{instruction, input, output}} with texts as values "
        f"(it has {keys})."
    )


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


def _split(items: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """Draw a share of the items, at least one where it is not 0, and never all; both parts keep their order."""
    count = min(max(round(share * len(items)), 1), len(items) - 1) if share else 0
    chosen = set(random.Random(seed).sample(range(len(items)), max(count, 0)))
    return (
        [item for index, item in enumerate(items) if index not in chosen],
        [item for index, item in enumerate(items) if index in chosen],
    )
