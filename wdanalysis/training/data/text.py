"""Text that every Python has: its library's source, and the English documentation in it.

Both are split by file into a part to train on and a held-out part, by a rule that looks at the file's name alone: a
file that is held out in one version of Python is held out in all.
"""

from __future__ import annotations

import ast
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path

from wdanalysis.errors import TrainingError

HELD_OUT_SHARE = 20
"""One file in so many is held out."""

NOT_EVERYWHERE = frozenset({
    *("distutils", "ensurepip", "idlelib", "lib2to3", "test", "tests", "tkinter", "turtledemo"),
    *("dist-packages", "site-packages", "sitecustomize.py", "_distutils_system_mod.py", "__pycache__"),
})  # fmt: skip
"""Files and folders that some Pythons lack, or that are not of the library's own."""

NOT_PROSE_NOR_CODE = frozenset({"encodings", "pydoc_data"})
"""Folders of tables."""

MADE_WHEN_BUILT = ("_sysconfigdata", "config-")
"""How names begin that hold the machine Python was built on."""

TOPICS = Path("pydoc_data", "topics.py")
"""The chapters that `help("if")` and the like show, a dictionary of texts; some small Pythons lack it."""


def library_source_files() -> list[Path]:
    """Every source file of the library that all Pythons of a version share, sorted by name.

    Raises
    ------
    TrainingError
        If Python's library has no source files, as where it was installed compiled or in one archive.
    """
    folder = _library_folder()
    files = [path for path in folder.rglob("*.py") if _is_shared(path.relative_to(folder))]
    if not files:
        raise TrainingError(
            f"{folder} holds no source files of Python's library: name the text to train on.",
            parameter="data",
        )
    return sorted(files, key=_name)


def library_source(*, held_out: bool = False) -> list[str]:
    """The library's source, a text for each file, without its documentation.

    Docstrings are left out so that `library_documentation` is new to a model that has read this.

    Parameters
    ----------
    held_out
        Give the held-out files instead of those to train on.
    """
    return [_without_docstrings(source) for source in _sources(held_out)]


def library_documentation(*, held_out: bool = False) -> list[str]:
    """The library's documentation in English: a text of each file's docstrings, and one for each topic of `help`.

    Parameters
    ----------
    held_out
        Give the held-out files and topics instead of those to train on.
    """
    docstrings = ["\n\n".join(_docstrings(source)) for source in _sources(held_out)]
    topics = [text for name, text in _help_topics().items() if is_held_out(name) == held_out]
    return [text for text in (*docstrings, *topics) if text]


def is_held_out(name: str) -> bool:
    """Whether the file with this name is kept from training: one in `HELD_OUT_SHARE`, by the CRC-32 of its name.

    Parameters
    ----------
    name
        Relative to the library's folder, with `/` between folders; of a topic, `topics/` and its title.
    """
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def _library_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _name(path: Path) -> str:
    return path.relative_to(_library_folder()).as_posix()


def _is_shared(path: Path) -> bool:
    return not (
        (NOT_EVERYWHERE | NOT_PROSE_NOR_CODE).intersection(path.parts)
        or path.parts[0].startswith(MADE_WHEN_BUILT)
    )


def _sources(held_out: bool) -> list[str]:
    return [_read(path) for path in library_source_files() if is_held_out(_name(path)) == held_out]


def _read(path: Path) -> str:
    with tokenize.open(path) as file:  # in the encoding that the file names
        return file.read()


def _documented(source: str) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and ast.get_docstring(node, clean=False):
            yield node


def _docstrings(source: str) -> Iterator[str]:
    for node in _documented(source):
        yield ast.get_docstring(node) or ""


def _without_docstrings(source: str) -> str:
    lines = source.split("\n")  # as the parser counts them; str.splitlines would also split at form feeds
    documentation = {
        number
        for node in _documented(source)
        for number in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in documentation)


def _help_topics() -> dict[str, str]:
    path = _library_folder() / TOPICS
    if not path.is_file():
        return {}
    (assignment,) = (node for node in ast.parse(_read(path)).body if isinstance(node, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(assignment.value)
    return {f"topics/{title}": text for title, text in sorted(topics.items())}
