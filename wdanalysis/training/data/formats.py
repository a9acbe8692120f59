"""From files to records: texts to continue, and instructions to answer.

A text file is one document. JSON (a list, or an object a line) holds documents, ``{"text": …}``, or instructions,
``{"instruction": …, "input": …, "output": …}`` with `input` optional, as the paper's commonsense set does. An
instruction is set in the prompt that Alpaca and LLM-Adapters use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wdanalysis.errors import TrainingError

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


def read_records(path: Path, *, parameter: str = "data") -> list[Record]:
    """Read a text file, a JSON file, or every such file of a folder and its sub-folders in the order of their names.

    Parameters
    ----------
    path
        The file or folder.
    parameter
        Whose value it is, for the error.

    Raises
    ------
    TrainingError
        The path is missing, empty or not UTF-8, or a record is neither a text nor an instruction.
    """
    try:
        files = _text_files(path) if path.is_dir() else [path]
        records = [record for file in files for record in _read_file(file)]
        if not records:
            raise TrainingError(f"{path} holds no text: name other data.")
    except TrainingError as error:
        error.parameter = parameter
        raise
    return records


def _text_files(folder: Path) -> list[Path]:
    suffixes = (*TEXT_SUFFIXES, *JSON_SUFFIXES)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix.lower() in suffixes)
    if not files:
        raise TrainingError(
            f"{folder} holds no file of text ({', '.join(suffixes)}): name the files themselves."
        )
    return files


def _read_file(path: Path) -> list[Record]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TrainingError(f"{path} does not exist: name a text file, a JSON file or a folder.") from None
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
