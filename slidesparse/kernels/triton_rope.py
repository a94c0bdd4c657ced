"""Rotary embedding of q and k and the KV-cache write in one pass, in Triton.

    qkv [M, (heads + 2 kv_heads) D] -> q [M, heads, D], and k, v in their pages

Formulas: `rope_reference`. Every value is read once and written once, 4 bytes each; vLLM 0.24 rotates q and k in one
kernel each, which read and write them, and copies k and v in a third: on an H200 at M = 16384 with BitNet-2B's 20 and 5
heads of 128, 183 us a layer, of it 96 for 84 MB of the copy, where one pass has 252 MB, 60 us at 4.2 TB/s.

    Layout. A program has one token and up to 32 heads, whatever they are: where a head's result goes, and whether it is
    rotated, is a mask. So cos and sin are read once a token, and all accesses are whole rows of half a head, as 32-bit
    pairs of bfloat16.

Offsets into pages are 64-bit. Programmatic dependent launch as in `triton_launch`; positions, slots and angles are read
before the wait, since the kernel right before is the GEMM that writes qkv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel

from slidesparse.kernels import triton_bf16 as bf16
from slidesparse.kernels.triton_launch import early_launch, turn

FEW = 512
"""Tokens below which programs are made small, so that there are enough of them for a GPU."""
FEW_HEADS, MANY_HEADS = 4, 32
HEAD_WIDTHS = (32, 64, 128, 256)
WHAT = "rotary and KV-cache write"
"""Begins an error."""


class RopeAndCache:
    """The kernel for one attention layer, whose cache and angles stay where they are.

    A step calls it once a layer from Python, outside CUDA graphs, where microseconds of the host count: what does not
    change from call to call is checked and looked up once. Operands are checked once a size.
    """

    def __init__(self, heads: int, cos_sin: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """As in `rope_and_cache`. Raises ValueError as it does."""
        self.width, self.kv_heads = cos_sin.shape[1], keys.shape[2]
        if self.width not in HEAD_WIDTHS:
            raise ValueError(f"{WHAT}: heads of {self.width} values; known are {HEAD_WIDTHS}")
        _require("cos_sin", cos_sin, (cos_sin.shape[0], self.width), torch.bfloat16)
        for name, pages in (("keys", keys), ("values", values)):
            fits = pages.shape == (*keys.shape[:2], self.kv_heads, self.width) and pages.dtype == torch.bfloat16
            fits = fits and pages.stride() == keys.stride() and pages.stride(3) == 1
            if not fits or any(stride % 2 for stride in pages.stride()[:3]):
                raise ValueError(
                    f"{WHAT}: {name} must be bfloat16 [pages, P, {self.kv_heads}, {self.width}], both of the same "
                    f"strides, not {pages.dtype} {list(pages.shape)} with strides {pages.stride()}"
                )
        self.heads, self.pages = heads, keys.data_ptr()
        """`pages`: address of the cache."""
        self._cos_sin, self._keys, self._values = (tensor.view(torch.int32) for tensor in (cos_sin, keys, values))
        self._early = early_launch(cos_sin.device)
        self._strides = self._keys.stride()[:3]
        self._constants = (heads, self.kv_heads, self.width // 4, keys.shape[1])
        self._sizes: set[tuple[int, int]] = set()
        self._compiled: dict[int, CompiledKernel] = {}
        """By heads of a program."""

    def __call__(self, qkv: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """As `rope_and_cache`."""
        m, kept = qkv.shape[0], slots.numel()
        if (m, kept) not in self._sizes:
            _require("qkv", qkv, (m, (self.heads + 2 * self.kv_heads) * self.width), torch.bfloat16)
            _require("positions", positions, (m,), torch.int64)
            _require("slots", slots, (min(kept, m),), torch.int64)
            self._sizes.add((m, kept))
        q = torch.empty(m, self.heads, self.width, dtype=torch.bfloat16, device=qkv.device)
        if m:
            block, warps = (FEW_HEADS, 1) if m < FEW else (MANY_HEADS, 4)
            grid = (m, triton.cdiv(self.heads + 2 * self.kv_heads, block), 1)
            aligned = not (qkv.data_ptr() | positions.data_ptr() | slots.data_ptr()) % 16
            compiled = self._compiled.get(block) if aligned else None
            if compiled is not None:  # pointers are all that it takes of tensors
                compiled[grid](
                    positions, slots, qkv, self._cos_sin, q, self._keys, self._values, kept, *self._strides,
                    *self._constants, block, True, self._early["EARLY"],
                )  # fmt: skip
                return q
            heads, kv_heads, half, page = self._constants
            launched = _rope_and_cache[grid](
                positions, slots, qkv.view(torch.int32), self._cos_sin, q.view(torch.int32), self._keys, self._values,
                kept, *self._strides, HEADS=heads, KV_HEADS=kv_heads, HALF=half, PAGE=page, BLOCK=block,
                PTX=not triton.knobs.runtime.interpret, num_warps=warps, **self._early,
            )  # fmt: skip
            if aligned and isinstance(launched, CompiledKernel) and qkv.device.type == "cuda":
                self._compiled[block] = launched
        return q


def rope_and_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    heads: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Rotated q, bfloat16 [M, heads, D]; rotated k and v go into their pages.

    Args:
        qkv: bfloat16 [M, (heads + 2 kv_heads) D], contiguous; D one of HEAD_WIDTHS.
        positions: int64 [M].
        cos_sin: bfloat16 [positions, D], contiguous: cosines, then sines.
        keys, values: bfloat16 [pages, P, kv_heads, D] of the same strides: the last is 1, the others are even.
        slots: int64 [up to M]: page * P + place, or below 0 for a token that is not kept; none for further tokens.

    Raises:
        ValueError: an operand has another type, shape or layout.
    """
    return RopeAndCache(heads, cos_sin, keys, values)(qkv, positions, slots)


def _require(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{WHAT}: {name} must be contiguous {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)} with "
            f"strides {tensor.stride()}"
        )


@triton.jit(do_not_specialize=["kept"])
def _rope_and_cache(
    positions_ptr, slots_ptr, qkv_ptr, cos_sin_ptr, q_ptr, keys_ptr, values_ptr, kept,
    page_stride, place_stride, head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # pairs of half a head
    PAGE: tl.constexpr,  # places of a page
    BLOCK: tl.constexpr,  # heads of a program
    PTX: tl.constexpr,  # False in the interpreter
    EARLY: tl.constexpr,
):  # fmt: skip
    TOTAL: tl.constexpr = HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, HALF)
    angles_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF)
    cos_low, cos_high = bf16.floats(tl.load(angles_ptr + column)[None, :])
    sin_low, sin_high = bf16.floats(tl.load(angles_ptr + HALF + column)[None, :])
    slot = tl.load(slots_ptr + token, mask=token < kept, other=-1)
    turn(EARLY)

    own = (head * (2 * HALF))[:, None] + column[None, :]
    here = (head < TOTAL)[:, None]
    first_ptr = qkv_ptr + token * (TOTAL * 2 * HALF) + own
    first = tl.load(first_ptr, mask=here, other=0, eviction_policy="evict_first")
    second = tl.load(first_ptr + HALF, mask=here, other=0, eviction_policy="evict_first")
    a_low, a_high = bf16.floats(first)
    b_low, b_high = bf16.floats(second)
    turns = (head < HEADS + KV_HEADS)[:, None]
    first = tl.where(
        turns, bf16.rounded(a_low * cos_low - b_low * sin_low, a_high * cos_high - b_high * sin_high, PTX), first
    )
    second = tl.where(
        turns, bf16.rounded(b_low * cos_low + a_low * sin_low, b_high * cos_high + a_high * sin_high, PTX), second
    )

    query = (head < HEADS)[:, None]
    out_ptr = q_ptr + token * (HEADS * 2 * HALF) + own
    tl.store(out_ptr, first, mask=query)
    tl.store(out_ptr + HALF, second, mask=query)
    if slot >= 0:
        place = (slot // PAGE) * page_stride + (slot % PAGE) * place_stride
        key, value = head - HEADS, head - (HEADS + KV_HEADS)
        is_key = ((key >= 0) & (key < KV_HEADS))[:, None]
        is_value = ((value >= 0) & (value < KV_HEADS))[:, None]
        key_ptr = keys_ptr + place + (key * head_stride)[:, None] + column[None, :]
        value_ptr = values_ptr + place + (value * head_stride)[:, None] + column[None, :]
        tl.store(key_ptr, first, mask=is_key)
        tl.store(key_ptr + HALF, second, mask=is_key)
        tl.store(value_ptr, first, mask=is_value)
        tl.store(value_ptr + HALF, second, mask=is_value)
