"""Lift a row of codes that is in registers, device functions in Triton: the row's bytes go to shared memory once, and
every window takes its two pairs of codes from there. (`triton_activations` lifts while it reads the row instead.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from slidesparse.kernels.triton_activations import _first_pair


@triton.jit
def store_lifted(
    codes_ptr, words, TILES: tl.constexpr, WORDS: tl.constexpr, PAIRS: tl.constexpr, OUT: tl.constexpr,
    WINDOWS: tl.constexpr,
    BORDER: tl.constexpr,  # some windows reach past the row, where the codes are 0
    SMALL: tl.constexpr,
):  # fmt: skip
    """Write the lifted row [OUT] of a program whose codes are in TILES blocks of WORDS words, 0 past the row."""
    LAST: tl.constexpr = PAIRS if BORDER else PAIRS - 2
    MORE: tl.constexpr = 1 if LAST + 2 > 2 * TILES * WORDS else 0
    for _ in tl.static_range(MORE):
        words += (tl.zeros((WORDS,), tl.int32),)
    block = _one_block(words, TILES + MORE, WORDS)
    COUNT: tl.constexpr = triton.next_power_of_2(OUT)
    window = tl.arange(0, COUNT)
    pair = tl.minimum(_first_pair(window, WINDOWS, SMALL), LAST)
    # One gather for left and right pairs: each would write the block to shared memory.
    places = tl.reshape(tl.join(pair, pair + 1) >> 1, (2 * COUNT,))
    left, right = tl.split(tl.reshape(tl.gather(block, places, 0), (COUNT, 2)))
    word = tl.where(pair & 1 == 0, left, (left >> 16) & 0xFFFF | right << 16)
    tl.store(codes_ptr + window, word, mask=window < OUT)


@triton.jit
def _one_block(tiles, TILES: tl.constexpr, WORDS: tl.constexpr):
    """Tiles one behind the other in one block, zeros up to the next power of two."""
    if TILES == 1:
        block = tiles[0]
    else:
        doubled = ()
        for tile in tl.static_range(0, TILES, 2):
            next_one = tl.zeros((WORDS,), tl.int32) if tile + 1 == TILES else tiles[tile + 1]
            doubled += (tl.reshape(tl.permute(tl.join(tiles[tile], next_one), (1, 0)), (2 * WORDS,)),)
        block = _one_block(doubled, (TILES + 1) // 2, 2 * WORDS)
    return block
