"""What `wd-analyze demo` compares: cut from the sample checkpoints, and copied without touching a user's files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import wdanalysis as wd
from wdanalysis.demo import BASE, METHODS, MODULES, carried_folder, copy_checkpoints
from wdanalysis.errors import OutputError

SAMPLES = Path(__file__).parents[1] / "sample_checkpoints"
CARRIED = sorted(path for path in carried_folder().rglob("*") if path.is_file())


def source_of(path: Path) -> Path:
    """The file of the sample that a carried one was cut from."""
    name, *rest = path.relative_to(carried_folder()).parts
    return SAMPLES.joinpath(name.lower(), *rest)


def test_it_takes_at_most_4_megabytes() -> None:
    assert sum(path.stat().st_size for path in CARRIED) <= 4e6


def test_every_method_has_the_samples_steps() -> None:
    for name in METHODS:
        steps = {path.name for path in (SAMPLES / name.lower()).glob("checkpoint-*")}
        assert {path.name for path in (carried_folder() / name).glob("checkpoint-*")} == steps
        assert len(steps) == 4


@pytest.mark.parametrize("path", CARRIED, ids=lambda path: str(path.relative_to(carried_folder())))
def test_every_file_is_that_of_the_sample_or_its_query_and_value_tensors(path: Path) -> None:
    source = source_of(path)
    if path.suffix != ".safetensors":
        assert path.read_bytes() == source.read_bytes()
        return
    cut, whole = load_file(path), load_file(source)
    assert set(cut) == {name for name in whole if ".q_proj." in name or ".v_proj." in name}
    for name, tensor in cut.items():
        assert tensor.dtype == whole[name].dtype
        assert torch.equal(tensor, whole[name])


@pytest.mark.slow
def test_its_numbers_are_those_of_the_sample() -> None:
    of_demo, of_sample = (
        wd.compare(
            folder / base, {name: folder / sub(name) for name in METHODS}, modules=list(MODULES)
        ).metrics
        for folder, base, sub in ((carried_folder(), BASE, str), (SAMPLES, "base", str.lower))
    )
    pd.testing.assert_frame_equal(of_demo, of_sample, check_exact=True)


def test_a_copy_has_every_file_and_may_be_made_twice(tmp_path: Path) -> None:
    for _ in range(2):
        copied = copy_checkpoints(tmp_path / "new" / "checkpoints")
    assert sorted(path for path in copied.rglob("*") if path.is_file()) == [
        copied / path.relative_to(carried_folder()) for path in CARRIED
    ]


def test_a_file_of_the_users_stays_as_it_is_and_nothing_is_copied(tmp_path: Path) -> None:
    mine = tmp_path / "base" / "model.safetensors"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"model\.safetensors is there and is none of the demo's"):
        copy_checkpoints(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert mine.read_bytes() == b"mine"
