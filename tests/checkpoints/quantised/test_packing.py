"""Codes and small floats, against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wdanalysis.checkpoints.dtypes import narrow, torch_type, widen
from wdanalysis.checkpoints.quantised.blocks import CodeBook
from wdanalysis.checkpoints.quantised.packing import SMALL_FLOATS, float_values, unpack_bits


@pytest.mark.parametrize("dtype", [*SMALL_FLOATS, "F8_E8M0"])
def test_small_floats_are_those_of_torch(dtype: str) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch_type(dtype)).float().numpy()
    np.testing.assert_array_equal(float_values(dtype), expected)


def test_floats_of_four_bits_are_those_of_transformers() -> None:
    from transformers.integrations.mxfp4 import FP4_VALUES

    np.testing.assert_array_equal(float_values("F4"), FP4_VALUES)


@given(bits=st.integers(1, 8), codes=st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_codes_come_out_of_a_stream_of_bits(bits: int, codes: list[int]) -> None:
    codes = [code % 2**bits for code in codes]
    stream = sum(code << (bits * place) for place, code in enumerate(codes))
    words = [stream >> (32 * at) & 0xFFFFFFFF for at in range(-(-len(codes) * bits // 32))]
    assert unpack_bits(np.array(words, np.uint32), bits, len(codes)).tolist() == codes


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bfloat16_is_rounded_as_torch_rounds(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    rounded = widen(narrow(values, "BF16"), np.float32)
    np.testing.assert_array_equal(rounded, torch.from_numpy(values).bfloat16().float().numpy())


def test_a_step_is_the_error_of_a_number_anywhere_in_the_cell() -> None:
    """By sampling: what lies evenly over the range of a table moves by step/√12 of the level that it goes to."""
    levels = np.array([-1, -0.25, 0.0, 0.125, 1], np.float32)
    x = np.random.default_rng(0).uniform(-1, 1, 400_000)
    code = np.abs(x[:, None] - levels).argmin(axis=1)
    rms = [np.sqrt(np.mean((x - levels[code])[code == at] ** 2)) for at in range(len(levels))]
    np.testing.assert_allclose(CodeBook.of(levels).steps, np.sqrt(12) * np.array(rms), rtol=0.01)
