"""Codes out of the words that they are packed in, and what the codes of small floats stand for."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray


def unpack_bits(words: NDArray[np.uint32], bits: int, count: int) -> NDArray[np.uint8]:
    """Return the first `count` codes of a little-endian stream of bits, along the last axis.

    Parameters
    ----------
    words
        … × words of 32 bits.
    bits
        Of a code, 1 to 8. Codes may lie across two words.
    count
        At most 32 · words / bits.

    Examples
    --------
    >>> unpack_bits(np.array([0x76543210], np.uint32), 4, 8)
    array([0, 1, 2, 3, 4, 5, 6, 7], dtype=uint8)
    """
    mask = np.uint32((1 << bits) - 1)
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        codes = (words[..., None] >> shifts & mask).astype(np.uint8)
        return codes.reshape(*words.shape[:-1], -1)[..., :count]
    word, shift = np.divmod(np.arange(count, dtype=np.uint64) * np.uint64(bits), np.uint64(32))
    following = words[..., np.minimum(word + 1, words.shape[-1] - 1).astype(np.intp)].astype(np.uint64)
    both = words[..., word.astype(np.intp)].astype(np.uint64) | following << np.uint64(32)
    return (both >> shift & np.uint64(mask)).astype(np.uint8)


def unpack_nibbles(packed: NDArray[np.uint8], *, high_first: bool = False) -> NDArray[np.uint8]:
    """Return two codes of four bits for each byte, along the last axis.

    >>> unpack_nibbles(np.array([0x21], np.uint8))
    array([1, 2], dtype=uint8)
    """
    low, high = packed & 0xF, packed >> 4
    pair = (high, low) if high_first else (low, high)
    return np.stack(pair, axis=-1).reshape(*packed.shape[:-1], -1)


def small_floats(
    exponent_bits: int, fraction_bits: int, bias: int, *, special: str = "none"
) -> NDArray[np.float32]:
    """Return the numbers that all codes of a float of up to eight bits, with a sign, stand for.

    Parameters
    ----------
    exponent_bits, fraction_bits, bias
        Of the type.
    special
        Which codes are no numbers: ``none``; ``last``: those of ones alone (E4M3); ``ieee``: those of the largest
        exponent (E5M2); ``minus zero``: that one (FNUZ).
    """
    codes = np.arange(1 << (1 + exponent_bits + fraction_bits))
    sign = np.where(codes >> (exponent_bits + fraction_bits), -1.0, 1.0)
    exponent = codes >> fraction_bits & ((1 << exponent_bits) - 1)
    fraction = (codes & ((1 << fraction_bits) - 1)) / (1 << fraction_bits)
    normal = np.ldexp(1 + fraction, exponent - bias)
    values = sign * np.where(exponent > 0, normal, np.ldexp(fraction, 1 - bias))
    largest = exponent == (1 << exponent_bits) - 1
    if special == "last":
        values[largest & (fraction == fraction.max())] = np.nan
    elif special == "ieee":
        values[largest] = np.where(fraction[largest] > 0, np.nan, np.inf * sign[largest])
    elif special == "minus zero":
        values[len(codes) // 2] = np.nan
    return np.asarray(values, np.float32)


@cache
def float_values(dtype: str) -> NDArray[np.float32]:
    """Return what each code of a type of four or eight bits, in safetensors' spelling, stands for."""
    match dtype:
        case "F4":
            return small_floats(2, 1, 1)
        case "F8_E4M3":
            return small_floats(4, 3, 7, special="last")
        case "F8_E5M2":
            return small_floats(5, 2, 15, special="ieee")
        case "F8_E4M3FNUZ":
            return small_floats(4, 3, 8, special="minus zero")
        case "F8_E5M2FNUZ":
            return small_floats(5, 2, 16, special="minus zero")
        case "F8_E8M0":
            powers = np.exp2(np.arange(256) - 127.0)
            powers[255] = np.nan
            return np.asarray(powers, np.float32)
    raise KeyError(dtype)


SMALL_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""The types of eight bits in which weights are stored."""
