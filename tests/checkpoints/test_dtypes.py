"""The table of stored types is torch's and safetensors' own, and its numbers are theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wdanalysis.checkpoints.dtypes import (
    FLOATS,
    STORED_TYPES,
    from_torch,
    narrow,
    of_torch,
    to_torch,
    torch_type,
    widen,
)

KNOWN_TO_TORCH = [stored for stored in STORED_TYPES.values() if stored.torch and hasattr(torch, stored.torch)]


@pytest.mark.parametrize("stored", KNOWN_TO_TORCH, ids=lambda stored: stored.name)
def test_names_and_sizes_are_those_of_torch(stored: object) -> None:
    dtype = torch_type(stored.name)
    assert of_torch(dtype) == stored.name
    assert dtype.itemsize * 8 == stored.bits


@pytest.mark.parametrize("name", FLOATS)
def test_fraction_bits_are_those_of_the_spacing_at_one(name: str) -> None:
    assert 2.0 ** -STORED_TYPES[name].fraction_bits == torch.finfo(torch_type(name)).eps


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_survive_the_way_from_torch_and_back(name: str) -> None:
    numbers = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch_type(name))
    stored = from_torch(numbers)
    assert stored.dtype == FLOATS[name]
    assert torch.equal(to_torch(stored), numbers)
    np.testing.assert_array_equal(widen(stored), numbers.double().numpy())


def test_every_number_of_bfloat16_is_widened_as_torch_does() -> None:
    bits = np.arange(2**16).astype(np.uint16)
    bits = bits[torch.isfinite(to_torch(bits)).numpy()]
    expected = to_torch(bits).float().numpy()
    np.testing.assert_array_equal(widen(bits, np.float32), expected)
    np.testing.assert_array_equal(widen(bits), expected.astype(np.float64))


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_narrowed_as_torch_narrows_them(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(10_000, generator=generator) * 10.0 ** torch.randint(
        -40, 38, (10_000,), generator=generator
    )
    halfway = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, -0.0, 3.4e38, float("inf")])
    numbers = torch.cat([numbers, halfway])
    expected = from_torch(numbers.to(torch_type(name)))
    np.testing.assert_array_equal(narrow(numbers.numpy(), name), expected)
