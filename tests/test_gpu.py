"""What only a GPU can show: library GEMMs and whole layers are right, graphs keep their buffers, large sizes work.

`-k small` are the shapes for compute-sanitizer.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from slidesparse.config import Stopping
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels import operands, reference, verify
from slidesparse.kernels.backend import Backend, backend
from slidesparse.kernels.linear import W8A8Linear
from slidesparse.kernels.lost_contexts import LostContexts
from slidesparse.machine import detect
from slidesparse.measure import telemetry
from slidesparse.measure.gemm_point import GemmPoint, LayerWeight, Product, rank
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant

pytestmark = pytest.mark.gpu
QUICK = Stopping(warmup_s=0.01, min_samples=6, max_samples=12, ci_rel=0.05, cap_s=0.2)
SMALL = [(16, 64, 128), (33, 96, 160), (100, 256, 96)]
"""(M, N, K): one tile, ragged M, K that no L but 2:4 divides."""


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def side_of(name: str, dtype: DType) -> Backend:
    side = backend(name)
    try:
        side.require(detect(), dtype)
    except UnsupportedHere as error:
        pytest.skip(str(error))
    return side


def point(name: str, dtype: DType, sparsity: Sparsity | None, m: int, n: int, k: int) -> GemmPoint:
    side = side_of(name, dtype)
    plain = operands.random_weight(n, k, dtype, sparsity, 1, "cuda")
    weight = LayerWeight.pack(plain, "random", dtype, sparsity, side, "layer")
    return GemmPoint(side, weight, Product(weight.plain, dtype, m, 2), sparsity)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [DType.INT8, DType.FP8, DType.BF16])
def test_small_gemms_of_both_libraries(dtype: DType, shape: tuple[int, int, int]) -> None:
    """The library's own favourite of each; kernel points check all algorithms."""
    for name, sparsity in (("cublaslt", None), ("cusparselt", Sparsity(4)), ("cusparselt", Sparsity(8))):
        one = point(name, dtype, sparsity, *shape)
        check = one.check(one.algorithms()[0])
        assert check.ok, (name, sparsity, check.text)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("bias", [False, True])
def test_small_layers_equal_the_reference(dtype: DType, bias: bool) -> None:
    m, n, k = 33, 96, 160
    generator = torch.Generator("cuda").manual_seed(3)
    for variant in (Variant("cublaslt"), *(Variant("cusparselt", Sparsity(length)) for length in (4, 8, None))):
        side_of(variant.backend, dtype)
        codes = operands.random_weight(n, k, dtype, variant.sparsity, 1, "cuda")
        scale = torch.rand(n, 1, generator=generator, device="cuda") / 50
        added = torch.randn(n, generator=generator, device="cuda").bfloat16() if bias else None
        layer = W8A8Linear("layer", codes, scale, added, k=k, variant=variant, dtype=dtype)
        x = operands.activation(m, k, 4, "cuda")
        x[3] = 0
        error, _ = layer.backend.accumulation_error(dtype, layer.weight.k)
        for choice in layer.choices(m):
            between = 0.0 if choice.scaled else verify.OUTPUT_UNIT.get(layer.backend.output(dtype), 0.0)
            y = layer.run(x, choice)
            check = verify.check_linear(x, y, codes, scale, added, dtype, error, between)
            assert check.ok, (str(variant), str(choice), check.text)


def test_fp8_scales_and_bias_are_fused_by_cublaslt() -> None:
    side_of("cublaslt", DType.FP8)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("cuBLASLt fuses scales by rows and columns on Hopper")
    layer = W8A8Linear(
        "layer", operands.random_weight(64, 128, DType.FP8, None, 1, "cuda"), torch.ones(64, 1, device="cuda"), None,
        k=128, variant=Variant("cublaslt"), dtype=DType.FP8,
    )  # fmt: skip
    layer(operands.activation(32, 128, 1, "cuda"))
    assert any("fused" in path for path in layer.paths)


def test_a_captured_layer_replays_on_new_values() -> None:
    layer = W8A8Linear(
        "layer", operands.random_weight(64, 128, DType.INT8, Sparsity(8), 1, "cuda"), torch.ones(64, 1, device="cuda"),
        None, k=128, variant=Variant("cusparselt", Sparsity(8)), dtype=DType.INT8,
    )  # fmt: skip
    x = operands.activation(32, 128, 1, "cuda")
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    fresh = operands.activation(32, 128, 9, "cuda")
    x.copy_(fresh)
    graph.replay()
    assert torch.equal(y, layer(fresh))


def test_a_prepared_graph_keeps_its_buffers_alive() -> None:
    """Its addresses would otherwise be handed to someone else, and overwritten at every replay."""
    from slidesparse.measure.cuda_clock import CudaClock

    clock = CudaClock()

    def prepared() -> object:
        target = torch.zeros(1 << 20, device="cuda")
        return clock.prepare([lambda: target.fill_(1.0)])

    call = prepared()
    others = [torch.zeros(1 << 20, device="cuda") for _ in range(8)]
    clock.times([call] * 3)  # type: ignore[list-item]
    assert all(float(other.abs().sum()) == 0 for other in others)


def test_many_graphs_share_their_memory() -> None:
    """What 60 candidates allocate while they are captured is not 60 times their memory."""
    from slidesparse.measure.cuda_clock import CudaClock

    clock = CudaClock()
    before = torch.cuda.memory_reserved()
    kept = [clock.prepare([lambda: torch.ones(1 << 24, device="cuda")] * 2, brief=True) for _ in range(60)]
    clock.times(kept)
    assert torch.cuda.memory_reserved() - before < 1 << 30


def test_graphs_can_be_captured_after_all_others_are_gone() -> None:
    """torch refuses a capture into the pool of graphs that are gone."""
    from slidesparse.measure.cuda_clock import CudaClock

    clock = CudaClock()
    for _ in range(3):
        call = clock.prepare([lambda: torch.ones(1 << 20, device="cuda")])
        clock.times([call])
        del call


def test_the_clock_agrees_with_a_known_amount_of_work() -> None:
    """Twice the work takes about twice as long; a copy is neither faster than memory nor idle."""
    from slidesparse.measure.cuda_clock import CudaClock

    clock = CudaClock()
    source, target = torch.ones(1 << 28, device="cuda"), torch.empty(1 << 28, device="cuda")
    whole = clock.prepare([lambda: torch.mul(source, 2, out=target)])
    half = clock.prepare([lambda: torch.mul(source[: 1 << 27], 2, out=target[: 1 << 27])])
    times = [clock.times([whole, half]) for _ in range(5)][-1]
    assert times[0] / times[1] == pytest.approx(2, rel=0.1)


def test_a_point_is_ranked_and_still_right_afterwards() -> None:
    one = point("cusparselt", DType.INT8, Sparsity(8), 64, 512, 512)
    from slidesparse.measure.cuda_clock import CudaClock

    ranking = rank(one, QUICK, CudaClock(), 0, LostContexts(None, [], {}), telemetry.probe(detect()))
    assert ranking.checked >= len(ranking.leaders) > 1
    medians = [entry.samples.interval.median for entry in ranking.leaders]
    assert medians == sorted(medians)
    assert one.check(ranking.leaders[0].algorithm).verified == "exact"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize(("name", "sparsity"), [("cublaslt", None), ("cusparselt", Sparsity(8))])
def test_the_size_that_crashed_published_runs(name: str, sparsity: Sparsity | None, dtype: DType) -> None:
    """M = 65536, N = 37888 (gate_up of Qwen2.5-7B): M * N exceeds 2**31. The GEMM, every element; then the epilogue."""
    m, n, k = 65536, 37888, 3584
    needed = m * n * 4 * (3 if dtype is DType.INT8 else 5)  # the output, and what it is compared with
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    one = point(name, dtype, sparsity, m, n, k)
    algorithm = one.algorithms()[0]
    check = one.check(algorithm)
    assert check.ok, check.text
    acc = one.calls(algorithm)[0]()
    assert isinstance(acc, torch.Tensor)
    del one
    token = torch.rand(m, 1, device="cuda")
    channel = torch.rand(n, 1, device="cuda")
    activations = backend(name).activations
    y = activations.dequantise_bias(
        acc, token, channel, None, torch.bfloat16, activations.algorithms("dequantise_bias", dtype)[0]
    )
    for rows in (slice(0, 64), slice(m // 2, m // 2 + 64), slice(m - 64, m)):
        assert torch.equal(y[rows], reference.dequantise_bias(acc[rows], token[rows], channel, None))
