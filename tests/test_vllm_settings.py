"""Plugin logic that needs no vLLM: versions, settings against checkpoints, buckets of M, tensor-parallel shards."""

from __future__ import annotations

import logging
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slidesparse.checkpoint.families import FAMILIES
from slidesparse.checkpoint.lift import lift_weight
from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError, ConfigError
from slidesparse.kernels import operands
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant
from slidesparse.vllm_plugin import register, versions
from slidesparse.vllm_plugin.buckets import bucket
from slidesparse.vllm_plugin.settings import select
from slidesparse.vllm_plugin.shards import kv_heads_of_rank, require_whole_groups, shared_kv_heads

PATTERNS = [Sparsity(length) for length in range(4, 17, 2)]


def section(pattern: str = "2:8", layout: str = "plain") -> dict[str, Any]:
    totals = {"weights": 1, "natural_zeros": 0, "weights_removed": 0, "energy_removed": 0.0, "groups": 1}
    return {
        "version": 1, "pattern": pattern, "layout": layout, "method": "magnitude", "seed": 0, "model": "Tiny",
        "source": "synthetic seed 0", "base": "0" * 12, "totals": totals | {"groups_unpruned": 0},
    }  # fmt: skip


def chosen(value: object, sparse: dict[str, Any] | None = None) -> Variant | None:
    found = select({} if value is None else {"slidesparse": value}, sparse, "Tiny")
    return None if found is None else found.variant


# -- version and entry point -------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.24.0", "0.24.3", "0.24.0+cu130", "0.24.1rc1"])
def test_supported_versions(version: str) -> None:
    assert versions.unsupported(version) is None


@pytest.mark.parametrize("version", ["0.23.9", "0.25.0", "1.24.0", "0.2.4", "0.240.1"])
def test_another_version_is_one_line_and_nothing_is_touched(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.setitem(sys.modules, "vllm", None)  # an import of it would fail
    with caplog.at_level(logging.WARNING):
        register.register()
    (line,) = caplog.messages
    assert version in line
    assert "0.24.x" in line
    assert "\n" not in line


def test_the_entry_point_and_the_model_it_names_are_there() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["vllm.general_plugins"]
    assert points == {"slidesparse": f"{register.__name__}:{register.register.__name__}"}
    module, _, name = register.MODEL.partition(":")
    source = Path(__file__).parents[1] / f"{module.replace('.', '/')}.py"
    assert f"class {name}(" in source.read_text()
    assert FAMILIES["bitnet"].architecture == register.ARCHITECTURE


# -- settings ----------------------------------------------------------------------------------------


def test_a_model_that_has_nothing_to_do_with_us() -> None:
    assert chosen(None) is None
    assert select(object(), None, "Tiny") is None, "vLLM allows any hashable object there"


def test_what_auto_measures_is_part_of_the_selection() -> None:
    settings = {"backend": "auto", "sizes": [16, 512], "keep_dense": False}
    found = select({"slidesparse": settings}, section(), "Tiny")
    assert found is not None
    assert (found.sizes, found.keep_dense) == ((16, 512), False)
    default = select({"slidesparse": {"backend": "auto"}}, section(), "Tiny")
    assert default is not None
    assert (default.sizes, default.keep_dense) == (None, True)


def test_a_section_selects_its_pattern_by_itself() -> None:
    assert chosen(None, section("2:10")) == Variant("cusparselt", Sparsity(10))
    assert chosen({}, section("2:inf")) == Variant("cusparselt", Sparsity(None))


@pytest.mark.parametrize(
    ("value", "sparse", "expected"),
    [
        ({"backend": "cublaslt"}, None, Variant("cublaslt")),
        ({"backend": "cublaslt"}, section(), Variant("cublaslt")),
        ({"backend": "cutlass"}, None, Variant("cutlass")),
        ({"backend": "auto"}, None, Variant("auto")),
        ({"backend": "auto"}, section(), Variant("auto", Sparsity(8))),
        ({"backend": "auto", "sparsity": "2:inf", "sizes": [16, 512]}, None, Variant("auto", Sparsity(None))),
        ({"backend": "vllm"}, section(), Variant("vllm")),
        ({"backend": "cusparselt", "sparsity": "2:inf"}, None, Variant("cusparselt", Sparsity(None))),
        ({"backend": "cusparselt", "sparsity": "2:8"}, section(), Variant("cusparselt", Sparsity(8))),
        ({"sparsity": "2_8"}, section(), Variant("cusparselt", Sparsity(8))),
    ],
)
def test_what_is_selected(value: object, sparse: dict[str, Any] | None, expected: Variant) -> None:
    assert chosen(value, sparse) == expected
    found = select({"slidesparse": value, "other_plugin": 1}, sparse, "Tiny")
    assert found is not None
    assert found.ours == (expected.backend != "vllm")


@pytest.mark.parametrize(
    ("value", "sparse", "parts"),
    [
        (
            {"backend": "marlin"},
            None,
            ["slidesparse.backend", "'vllm', 'cublaslt', 'cutlass', 'cusparselt', 'fused' or 'auto'", "marlin"],
        ),
        ({"backend": "cpu_dense"}, None, ["slidesparse.backend"]),
        (
            {"bakend": "cublaslt"},
            None,
            ["slidesparse.bakend", "allowed here: backend, sparsity, tuning, sizes, keep_dense"],
        ),
        ({"backend": "cusparselt", "sparsity": "2:7"}, None, ["slidesparse.sparsity", "L must be even"]),
        ({"backend": "cusparselt", "sparsity": "4:8"}, None, ["slidesparse.sparsity", "Z must be 2"]),
        ("cublaslt", None, ["additional_config.slidesparse", "'cublaslt'"]),
        ({}, None, ["slidesparse.backend", "missing", "Tiny is dense"]),
        ({"backend": "cusparselt"}, None, ["slidesparse.sparsity", "missing", "2:inf"]),
        ({"backend": "cusparselt", "sparsity": "2:6"}, section(), ["2:6", "Tiny holds 2:8"]),
        ({"backend": "cublaslt", "sparsity": "2:8"}, section(), ["cublaslt is dense"]),
        ({"backend": "vllm", "sparsity": "2:8"}, None, ["vllm is dense"]),
        ({"backend": "cutlass", "sparsity": "2:8"}, section(), ["cutlass is dense"]),
        ({"backend": "auto", "sparsity": "2:6"}, section(), ["2:6", "Tiny holds 2:8"]),
        ({"backend": "auto", "sizes": []}, None, ["slidesparse.sizes", "at least 1"]),
        ({"backend": "auto", "sizes": [64, 0]}, None, ["slidesparse.sizes.1", "greater than 0"]),
        ({"backend": "cublaslt", "sizes": [64]}, None, ["slidesparse.sizes", "cublaslt measures nothing", "auto"]),
        ({"keep_dense": False}, section(), ["slidesparse.keep_dense", "cusparselt measures nothing"]),
        ({"backend": "cublaslt", "tuning": "/no/such/winners.json"}, None, ["slidesparse.tuning", "/no/such"]),
    ],
)
def test_wrong_settings_are_one_line_with_key_and_remedy(
    value: object, sparse: dict[str, Any] | None, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        chosen(value, sparse)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_two_faults_are_two_lines() -> None:
    with pytest.raises(ConfigError) as error:
        chosen({"backend": "x", "colour": 1})
    assert len(str(error.value).splitlines()) == 2


def test_wrong_sections() -> None:
    with pytest.raises(CheckpointError, match=r"Tiny: slidesparse\.pattern"):
        chosen(None, section("2:9"))
    with pytest.raises(CheckpointError, match="layout lifted"):
        chosen(None, section(layout="lifted"))


# -- buckets -----------------------------------------------------------------------------------------


@given(st.integers(1, 1 << 20))
def test_a_bucket_holds_m_with_little_waste(m: int) -> None:
    size = bucket(m)
    assert size >= m
    assert size % 16 == 0
    assert size - m < 16 or (size - m) / m <= 1 / 16
    assert bucket(size) == size, "a bucket is its own bucket"
    assert m == 1 or bucket(m - 1) <= size


def test_buckets_are_few_and_sizes_that_matter_are_exact() -> None:
    assert len({bucket(m) for m in range(1, 32769)}) == 128
    captured = [*range(16, 257, 16), *range(272, 513, 16)]  # vLLM's default capture sizes that are multiples of 16
    powers = [1 << bits for bits in range(4, 18)]
    assert all(bucket(m) == m for m in captured + powers)
    with pytest.raises(ValueError, match="0 tokens"):
        bucket(0)


# -- tensor parallelism ------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [None, Sparsity(None), *PATTERNS], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("k", [2560, 6912])
def test_a_cut_through_a_group_is_refused_with_layer_and_sizes(k: int, ranks: int, sparsity: Sparsity | None) -> None:
    whole = ranks == 1 or sparsity is None or sparsity.l is None or k // ranks % sparsity.l == 0
    if whole:
        require_whole_groups("model.layers.3.mlp.down_proj", k, k // ranks, sparsity)
        return
    with pytest.raises(CheckpointError) as error:
        require_whole_groups("model.layers.3.mlp.down_proj", k, k // ranks, sparsity)
    text = str(error.value)
    assert text.startswith(f"model.layers.3.mlp.down_proj: tensor parallelism gives each rank {k // ranks} of {k} ")
    assert str(sparsity) in text
    for other in text[text.rindex("(") + 1 : -1].split(", "):
        require_whole_groups("x", k, k // ranks, Sparsity.parse(other))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 12))
def test_every_rank_has_the_kv_head_that_each_of_its_query_heads_reads(kv_heads: int, group: int, ranks: int) -> None:
    """Query head h of H reads KV head h * kv // H: with the heads repeated and cut as vLLM cuts them, on every rank."""
    heads = kv_heads * group
    totals = [total for total in range(kv_heads, heads + 1, kv_heads) if heads % total == 0]
    if heads % ranks or all(total % ranks and ranks % total for total in totals):
        with pytest.raises(CheckpointError, match=f"{heads} query heads over {kv_heads} KV heads cannot be shared"):
            shared_kv_heads(heads, kv_heads, ranks)
        return
    shared = shared_kv_heads(heads, kv_heads, ranks)
    own, held = heads // ranks, kv_heads_of_rank(heads, kv_heads, ranks)
    repeated = np.repeat(np.arange(kv_heads), shared // kv_heads)
    copies = max(1, ranks // shared)  # vLLM's own: several ranks hold the same head
    for rank in range(ranks):
        here = repeated[rank // copies * held :][:held]
        read = [here[head * held // own] for head in range(own)]
        assert read == [(rank * own + head) * kv_heads // heads for head in range(own)]


@pytest.mark.parametrize(("ranks", "shared"), [(1, 5), (2, 10), (4, 20), (5, 5), (10, 5), (20, 5)])
def test_kv_heads_of_bitnet_2b(ranks: int, shared: int) -> None:
    assert shared_kv_heads(20, 5, ranks) == shared


@given(st.sampled_from(PATTERNS), st.sampled_from([2, 4]), st.integers(1, 4), st.integers(0, 999))
def test_ranks_that_lift_their_own_columns_add_up_to_the_layer(
    sparsity: Sparsity, ranks: int, groups: int, seed: int
) -> None:
    """The reason for the rule: with whole groups, the sum of the ranks' lifted products is the layer's product."""
    assert sparsity.l is not None
    own = sparsity.l * groups
    k, n, m = own * ranks, 5, 3
    codes = operands.random_weight(n, k, DType.INT8, sparsity, seed)
    x = torch.randint(-127, 128, (m, k), generator=torch.Generator().manual_seed(seed))
    total = np.zeros((m, n), dtype=np.int64)
    for rank in range(ranks):
        columns = slice(rank * own, rank * own + own)
        require_whole_groups("layer", k, own, sparsity)
        lifted = lift_weight(codes[:, columns].contiguous().numpy(), sparsity, "layer").astype(np.int64)
        source = sparsity.column_map(own)
        activation = np.where(source < 0, 0, x[:, columns].numpy()[:, np.maximum(source, 0)])
        total += activation @ lifted.T
    assert np.array_equal(total, x.numpy() @ codes.numpy().astype(np.int64).T)
