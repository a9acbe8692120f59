"""What the examples in docstrings may use without making it: `wd`, `np`, `pd`, `torch`, `run` and `tmp`.

`run` is a small comparison of the samples (methods ``ft`` and ``dora``, modules q and v), measured once and only where
an example names it; `tmp` is an empty folder. Examples run in the root of the repository.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent


@pytest.fixture(scope="session")
def sample_run() -> Any:
    """ΔM and ΔD of q and v in `sample_checkpoints`; the methods are called ``ft`` and ``dora``."""
    import wdanalysis as wd

    tuned = ["sample_checkpoints/ft", "sample_checkpoints/dora"]
    with contextlib.chdir(ROOT):
        return wd.compare("sample_checkpoints/base", tuned, modules=["q", "v"])


@pytest.fixture(autouse=True)
def _names_of_examples(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> None:
    """Put what an example uses into its namespace; nothing for any other test."""
    if not isinstance(request.node, pytest.DoctestItem) or request.node.dtest is None:
        return
    import numpy as np
    import pandas as pd
    import torch

    import wdanalysis as wd

    request.getfixturevalue("monkeypatch").chdir(ROOT)
    doctest_namespace.update(wd=wd, np=np, pd=pd, torch=torch)
    source = "".join(example.source for example in request.node.dtest.examples)
    for name, fixture in (("run", "sample_run"), ("tmp", "tmp_path")):
        if re.search(rf"\b{name}\b", source):
            doctest_namespace[name] = request.getfixturevalue(fixture)
