"""Sizes of M that kernels are chosen and planned for. An engine's steps hold any number of tokens.

A library plan belongs to one M and costs milliseconds, so M is rounded up to one of few sizes: multiples of 16
(cuSPARSELt takes no others) up to 256, then 16 sizes an octave, among them every power of two and every size that vLLM
captures up to 512. At most 1/16 of the rows is padding; 128 sizes reach to 32768.
"""

from __future__ import annotations

from slidesparse.pattern import align

SMALLEST = 16
PER_OCTAVE = 16


def bucket(m: int) -> int:
    """The smallest size that holds m >= 1 tokens. Raises ValueError."""
    if m < 1:
        raise ValueError(f"a linear of {m} tokens")
    octave = 1 << (m - 1).bit_length() >> 1  # largest power of two below m; 2 * octave holds m
    return align(m, max(SMALLEST, octave // PER_OCTAVE))
