"""The house keeps its plan: arrows point down, and every published name shows how it is used."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
from importlinter.cli import lint_imports

import wdanalysis as wd

ROOT = Path(__file__).parents[1]


def test_the_rooms_import_each_other_as_pyproject_says(capsys: pytest.CaptureFixture[str]) -> None:
    broken = lint_imports(str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert not broken, capsys.readouterr().out


def published() -> dict[Any, str]:
    """What `wdanalysis` exports and docs/api.md lists, each under its full name."""
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    exported = [f"wdanalysis.{name}" for name in wd.__all__ if name != "__version__"]
    listed = re.findall(r"^::: ([\w.]+)", api, re.MULTILINE)
    return {pkgutil.resolve_name(name): name for name in [*exported, *listed]}


def has_runnable_example(documented: Any) -> bool:
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(documented) or "")
    return any(not example.options.get(doctest.SKIP) for example in examples)


def test_every_published_name_has_a_runnable_example() -> None:
    names = published()
    assert {wd.compare, wd.decompose, wd.errors} <= set(names)
    without = [name for documented, name in names.items() if not has_runnable_example(documented)]
    assert not without, "no runnable example (>>>) in: " + ", ".join(without)


def test_the_page_on_the_architecture_names_what_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w./]+(?:/|\.(?:py|md|toml)))(?::(\w+))?`", page)
    assert len(named) > 50
    missing = [f"{path}:{name}" if name else path for path, name in named if not is_there(path, name)]
    assert not missing, "docs/architecture.md names what is not there: " + ", ".join(missing)


def is_there(path: str, name: str) -> bool:
    """Whether a file or folder, below the package or the root, is there and defines a name."""
    found = next((place for root in (ROOT / "wdanalysis", ROOT) if (place := root / path).exists()), None)
    if found is None or not name:
        return found is not None
    return bool(
        re.search(rf"^(def|class) {name}\b|^{name}\b.* = ", found.read_text(encoding="utf-8"), re.MULTILINE)
    )
