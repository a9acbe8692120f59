"""The text that every Python has."""

from __future__ import annotations

import inspect
import json.decoder
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from wdanalysis.errors import TrainingError
from wdanalysis.training.data.text import (
    is_held_out,
    library_documentation,
    library_source,
    library_source_files,
)

LIBRARY = Path(sysconfig.get_path("stdlib"))


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is taken for Python's library."""
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    return tmp_path


def test_every_file_is_of_the_standard_library() -> None:
    names = [path.relative_to(LIBRARY).parts[0].removesuffix(".py") for path in library_source_files()]
    assert set(names) <= sys.stdlib_module_names | {"__hello__", "__phello__"}


def test_files_are_sorted_and_there_are_many() -> None:
    names = [path.relative_to(LIBRARY).as_posix() for path in library_source_files()]
    assert names == sorted(names)
    assert len(names) > 300


def test_what_some_pythons_lack_and_what_names_the_machine_is_left_out(small_library: Path) -> None:
    for name in (
        "tkinter/ttk.py",
        "test/a.py",
        "json/tests/a.py",
        "site-packages/a.py",
        "_sysconfigdata_x.py",
    ):
        (small_library / name).parent.mkdir(parents=True, exist_ok=True)
        (small_library / name).write_text("x = 1\n")
    (small_library / "argparse.py").write_text("x = 1\n")
    assert library_source_files() == [small_library / "argparse.py"]


@pytest.mark.slow
def test_documentation_is_what_help_shows() -> None:
    documents = library_documentation()
    assert any(inspect.getdoc(json.decoder.JSONDecoder.raw_decode) in text for text in documents)
    assert topics["if"] in documents


def test_source_is_without_its_documentation_and_otherwise_unchanged(small_library: Path) -> None:
    (small_library / "argparse.py").write_text(
        '"""Parser."""\n\nx = """kept"""\n\x0c\n'
        "class A:  # kept\n"
        "    '''One line.\n\n    And more.'''\n"
        "    async def f(self):\n"
        '        """Do it."""\n'
        "        return 1\n"
    )
    assert library_source() == [
        '\nx = """kept"""\n\x0c\nclass A:  # kept\n    async def f(self):\n        return 1\n'
    ]
    assert library_documentation() == ["Parser.\n\nOne line.\n\nAnd more.\n\nDo it."]


def test_a_file_is_read_in_the_encoding_that_it_names(small_library: Path) -> None:
    text = "# -*- coding: latin-1 -*-\nname = 'é'\n"
    (small_library / "argparse.py").write_bytes(text.encode("latin-1"))
    assert library_source() == [text]


@pytest.mark.slow
def test_the_held_out_part_and_the_rest_are_all_of_it() -> None:
    files = [path.relative_to(LIBRARY).as_posix() for path in library_source_files()]
    held_out = [name for name in files if is_held_out(name)]
    assert len(library_source(held_out=True)) == len(held_out)
    assert len(library_source()) == len(files) - len(held_out)
    assert 0.03 < len(held_out) / len(files) < 0.1


def test_what_is_held_out_depends_on_the_name_alone() -> None:
    names = ("argparse.py", "ssl.py", "shutil.py", "json/decoder.py", "topics/if", "topics/await")
    assert [name for name in names if is_held_out(name)] == ["ssl.py", "shutil.py", "topics/await"]


def test_a_library_without_source_is_an_error_that_says_what_to_do(small_library: Path) -> None:
    with pytest.raises(TrainingError, match=r"holds no source files.*: name the text to train on") as error:
        library_source_files()
    assert error.value.parameter == "data"
