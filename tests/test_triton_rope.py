"""Rotary embedding and KV-cache write in one kernel against the PyTorch reference, and that against transformers' own
rotary embedding: in Triton's interpreter, or on a GPU if there is one.

On a GPU a product may stay unrounded on its way into the sum: results may be the neighbouring bfloat16, or, where the
two products cancel, off by a float32 unit of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slidesparse.kernels import rope_reference

pytest.importorskip("triton")
from slidesparse.kernels import triton_rope

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
POISON = 77.0
POSITIONS = 300
FEW = settings(max_examples=200 if ON_GPU else 25, derandomize=True)


@dataclass
class Case:
    qkv: torch.Tensor
    positions: torch.Tensor
    cos_sin: torch.Tensor
    heads: int
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def random(
        cls, m: int, heads: int, kv_heads: int, width: int,
        page: int = 16, kept: int | None = None, by_head: bool = False,
    ) -> Case:  # fmt: skip
        """Pages are more than tokens, in vLLM's layout (keys and values of a page side by side), `by_head` or by place;
        every third token is padding."""
        generator = torch.Generator().manual_seed(m + 31 * heads + width)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        pages = m // page + 3
        shape = (pages, 2, kv_heads, page, width) if by_head else (pages, 2, page, kv_heads, width)
        cache = torch.full(shape, POISON, dtype=torch.bfloat16, device=DEVICE)
        keys, values = (cache.transpose(2, 3) if by_head else cache).unbind(1)
        slots = torch.randperm(pages * page, generator=generator)[: m if kept is None else kept]
        slots[::3] = -1
        angle = draw(POSITIONS, width // 2) * 3
        return cls(
            draw(m, (heads + 2 * kv_heads) * width).bfloat16().to(DEVICE),
            torch.randint(0, POSITIONS, (m,), generator=generator).to(DEVICE),
            torch.cat([angle.cos(), angle.sin()], dim=1).bfloat16().to(DEVICE),
            heads, keys, values, slots.to(DEVICE),
        )  # fmt: skip

    def run(self) -> torch.Tensor:
        return triton_rope.rope_and_cache(
            self.qkv, self.positions, self.cos_sin, self.heads, self.keys, self.values, self.slots
        )

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q and both halves of the cache, from the reference, on copies."""
        keys, values = self.keys.clone(), self.values.clone()
        q = rope_reference.rope_and_cache(self.qkv, self.positions, self.cos_sin, self.heads, keys, values, self.slots)
        return q, keys, values

    def check(self) -> None:
        q, keys, values = self.expected()
        found = self.run()
        assert found.shape == q.shape
        assert found.is_contiguous()
        largest = float(self.qkv.abs().max())
        for name, got, wanted in (("q", found, q), ("keys", self.keys, keys), ("values", self.values, values)):
            if ON_GPU and name != "values":
                allowed = wanted.double().abs() * 2.0**-7 + 2 * largest * 2.0**-23
                assert bool(((got.double() - wanted.double()).abs() <= allowed).all()), name
            else:
                assert torch.equal(got, wanted), name
        untouched = wanted_untouched(self.keys, self.slots)
        assert bool((self.keys[untouched] == POISON).all())
        assert bool((self.values[untouched] == POISON).all())


def wanted_untouched(keys: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Places of the cache, bool [pages, P], that no token has."""
    free = torch.ones(keys.shape[0] * keys.shape[1], dtype=torch.bool, device=keys.device)
    free[slots[slots >= 0]] = False
    return free.view(keys.shape[:2])


@pytest.mark.parametrize("by_head", [False, True], ids=["by place", "by head"])
@pytest.mark.parametrize("few", [0, 4096], ids=["large programs", "small programs"])
@pytest.mark.parametrize("m", [1, 7, *((64, 530, 4099) if ON_GPU else ())])
def test_bitnet_layers(m: int, few: int, by_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rope, "FEW", few)
    Case.random(m, 20, 5, 128, by_head=by_head).check()


@FEW
@given(
    m=st.integers(1, 600 if ON_GPU else 6),
    few=st.sampled_from([0, 4096]),
    heads=st.integers(1, 40),
    kv_heads=st.integers(1, 9),
    width=st.sampled_from(triton_rope.HEAD_WIDTHS),
    page=st.sampled_from([1, 8, 16, 48]),
    by_head=st.booleans(),
    data=st.data(),
)
def test_any_heads_pages_and_padding(
    m: int, few: int, heads: int, kv_heads: int, width: int, page: int, by_head: bool, data: st.DataObject
) -> None:
    """Also fewer slots than tokens: further tokens are padding, whose q is rotated all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_rope, "FEW", few)
        Case.random(m, heads, kv_heads, width, page, data.draw(st.integers(0, m)), by_head).check()


def test_a_layer_is_called_again_and_again() -> None:
    """From the second call on the compiled kernel is launched as it is: of other sizes, operands and alignments too."""
    layer: triton_rope.RopeAndCache | None = None
    first = Case.random(2100 if ON_GPU else 9, 20, 5, 128)
    for seed, m in enumerate((5, 7, 5, 2000, 1999, 2000) if ON_GPU else (5, 7, 5)):
        again = replace(Case.random(m, 20, 5, 128), cos_sin=first.cos_sin, keys=first.keys, values=first.values)
        again.qkv += seed
        if layer is None:
            layer = triton_rope.RopeAndCache(20, again.cos_sin, again.keys, again.values)
        for shift in (0, 1):  # a qkv that is not aligned as the others are
            whole = torch.zeros(again.qkv.numel() + 2, dtype=torch.bfloat16, device=DEVICE)
            moved = whole[2 * shift :][: again.qkv.numel()].view_as(again.qkv).copy_(again.qkv)
            case = replace(again, qkv=moved)
            q, keys, values = case.expected()
            found = layer(case.qkv, case.positions, case.slots)
            for got, wanted in ((found, q), (case.keys, keys), (case.values, values)):
                assert bool(((got.float() - wanted.float()).abs() <= wanted.float().abs() / 128 + 1e-5).all())


@pytest.mark.gpu
def test_pages_beyond_32_bits_are_reached_by_their_stride() -> None:
    """Strides are 32-bit, their products with a page's number are not."""
    case = Case.random(1, 2, 1, 32)
    pages, stride = 40, 1 << 26
    whole = torch.zeros(2, pages * stride, dtype=torch.bfloat16, device=DEVICE)
    keys, values = (half.as_strided((pages, 16, 1, 32), (stride, 32, 32, 1), half.storage_offset()) for half in whole)
    replace(case, keys=keys, values=values, slots=torch.tensor([39 * 16 + 3], device=DEVICE)).run()
    first = 39 * stride + 3 * 32
    assert torch.equal(whole[1, first : first + 32], case.qkv[0, 96:])
    assert int(whole.count_nonzero()) == int(whole[:, first : first + 32].count_nonzero()) > 32


def test_the_reference_rotates_as_transformers_does() -> None:
    from transformers.models.bitnet.modeling_bitnet import apply_rotary_pos_emb

    case = Case.random(24, 6, 2, 64)
    q, k, v = rope_reference.rotate(case.qkv, case.positions, case.cos_sin, 6, 2)
    cos, sin = (half.repeat(1, 2) for half in case.cos_sin[case.positions].float().chunk(2, dim=1))
    whole = case.qkv.view(24, 10, 64).transpose(0, 1)[None].float()
    wanted_q, wanted_k = apply_rotary_pos_emb(whole[:, :6], whole[:, 6:8], cos[None], sin[None])
    assert torch.equal(q, wanted_q[0].transpose(0, 1).bfloat16())
    assert torch.equal(k, wanted_k[0].transpose(0, 1).bfloat16())
    assert torch.equal(v, case.qkv.view(24, 10, 64)[:, 8:])


def test_no_tokens() -> None:
    case = Case.random(1, 2, 1, 32)
    case = replace(case, qkv=case.qkv[:0], positions=case.positions[:0], slots=case.slots[:0])
    assert case.run().shape == (0, 2, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": lambda x: x.float()}, r"qkv must be contiguous torch.bfloat16 \[3, 320\], not torch.float32"),
        ({"qkv": lambda x: x[:, :-32]}, r"qkv must be contiguous torch.bfloat16 \[3, 320\], not torch.bfloat16"),
        ({"positions": lambda x: x.int()}, "positions must be contiguous torch.int64"),
        ({"slots": lambda x: x.int()}, "slots must be contiguous torch.int64"),
        ({"slots": lambda x: torch.cat([x, x])}, r"slots must be contiguous torch.int64 \[3\], not torch.int64 \[6\]"),
        ({"cos_sin": lambda x: x[:, :24]}, "heads of 24 values; known are"),
        ({"keys": lambda x: x.float()}, r"keys must be bfloat16 \[pages, P, 2, 32\]"),
        ({"values": lambda x: x.contiguous()}, "values must be bfloat16 .* both of the same strides"),
    ],
)
def test_operands_that_do_not_fit(change: dict, message: str) -> None:
    case = Case.random(3, 6, 2, 32)
    case = replace(case, **{name: by(getattr(case, name)) for name, by in change.items()})
    with pytest.raises(ValueError, match=message):
        case.run()
