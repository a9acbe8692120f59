"""Fixtures that several tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from real_run import RealRun

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no test reaches the network

SLOW_FIXTURES = {"real_run", "chromium"}
"""What takes long to make, so that every test with it is slow."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRun]:
    """all-MiniLM-L6-v2 tuned in full, by LoRA and by DoRA: six steps each, saved at 2, 4 and 6."""
    from real_run import METHODS, RealRun, base_folder, tune

    folder = tmp_path_factory.mktemp("real_run")
    methods = {method: folder / method for method in METHODS}
    for method, run in methods.items():
        tune(method, run)
    yield RealRun(base_folder(), methods)
    shutil.rmtree(folder)  # 270 MB
