"""What `test_vllm_package.py` asks of the real vLLM, in a process of its own that it takes for one with an H200.

    python vllm_scenarios.py FOLDER

FOLDER holds the checkpoints that the test made. The last line printed is JSON: scenario -> its value, or a traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import vllm.plugins
import vllm_on_cpu
from vllm_checks import distance, fault, merged, outcome, tokens

from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.checkpoint.lift import lift_weight
from slidesparse.kernels import bitnet_reference, verify
from slidesparse.measure.engines.model import reference_model
from slidesparse.tuning.store import TuningStore, Winner
from slidesparse.vllm_plugin import linear_op

Model = tuple[Any, Any]
"""Configuration and model."""


class One:
    """Scenarios of one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        parents = folder / "checkpoints", folder / "checkpoints_slidesparse"
        self.paths = {path.name: path for parent in parents for path in parent.iterdir()}

    def model(self, name: str, additional: dict[str, Any] | None = None, weights: bool = True, **changes: Any) -> Model:
        config = vllm_on_cpu.configure(self.paths[name], additional, **changes)
        return config, vllm_on_cpu.load(config, weights)

    # -- registration -----------------------------------------------------------------------------------

    def registration(self) -> dict[str, Any]:
        """Through the entry point, twice."""
        from vllm import ModelRegistry
        from vllm.model_executor.kernels import linear as registry
        from vllm.platforms import PlatformEnum

        from slidesparse.vllm_plugin.register import register_class

        def candidates() -> list[list[str]]:
            lists = registry._POSSIBLE_INT8_KERNELS, registry._POSSIBLE_FP8_KERNELS
            return [[kernel.__name__ for kernel in kernels[PlatformEnum.CUDA]] for kernels in lists]

        before = candidates()
        vllm.plugins.load_general_plugins()
        first = candidates()
        vllm.plugins.plugins_loaded = False
        vllm.plugins.load_general_plugins()
        known, second = "BitNetForCausalLM" in ModelRegistry.get_supported_archs(), candidates()
        register_class()
        of_class = ModelRegistry.models["BitNetForCausalLM"]
        vllm.plugins.plugins_loaded = False
        vllm.plugins.load_general_plugins()
        kept = ModelRegistry.models["BitNetForCausalLM"] is of_class
        return {"before": before, "first": first, "second": second, "known": known, "kept": kept}

    # -- choice of kernels ------------------------------------------------------------------------------

    def kernels(self) -> dict[str, list[str]]:
        """Kernel of the first four linears by model and settings, before weights are loaded."""
        from vllm.model_executor.model_loader.utils import initialize_model

        from slidesparse.vllm_plugin.model_paths import linear_kernels

        out = {}
        for name, additional in (
            ("Tiny-INT8", None),
            ("Tiny-FP8", None),
            ("Tiny-INT8", {"backend": "cublaslt"}),
            ("Tiny-FP8", {"backend": "cublaslt"}),
            ("Tiny-INT8-SlideSparse-2_8", None),
            ("Tiny-FP8-SlideSparse-2_8", None),
            ("Tiny-INT8-SlideSparse-2_8", {"backend": "vllm"}),
            ("Qwen-INT8", None),
        ):
            config = vllm_on_cpu.configure(self.paths[name], additional)
            with vllm_on_cpu.building(config):
                model = initialize_model(config)
            out[f"{name} {additional}"] = list(linear_kernels(model).values())[:4]
        return out

    def cache_keys(self) -> list[str]:
        """vLLM's key of compiled graphs, for each way to run two checkpoints."""
        return [
            vllm_on_cpu.configure(self.paths[name], additional).compute_hash()
            for name, additional in (
                ("Tiny-INT8", None),
                ("Tiny-INT8", {"backend": "cublaslt"}),
                ("Tiny-INT8", {"backend": "cusparselt", "sparsity": "2:inf"}),
                ("Tiny-INT8-SlideSparse-2_8", None),
                ("Tiny-INT8-SlideSparse-2_8", {"backend": "vllm"}),
            )
        ]

    # -- values -----------------------------------------------------------------------------------------

    def model_function(self) -> dict[str, Any]:
        """The unquantised model in float32, beside transformers' own."""
        from transformers import AutoModelForCausalLM

        config, model = self.model("Tiny-BF16", dtype="float32")
        found = vllm_on_cpu.logits(config, model, tokens())
        reference = AutoModelForCausalLM.from_pretrained(self.paths["Tiny-BF16"], dtype=torch.float32)
        expected = reference(input_ids=tokens()[None]).logits[0]
        layer = model.model.layers[0]
        norms = layer.self_attn.attn_sub_norm.weight, layer.mlp.ffn_sub_norm.weight
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        spread = min(float(norm.std()) for norm in norms)
        return {"distance": distance(found, expected), "tied": tied, "spread": spread}

    def logits(self) -> dict[str, dict[str, Any]]:
        """Quantised models: logits beside transformers' with dequantised weights; every linear checked on its own."""
        out = {}
        for name, additional in (
            ("Tiny-INT8", {"backend": "cublaslt"}),
            ("Tiny-INT8", {"backend": "cusparselt", "sparsity": "2:inf"}),
            ("Tiny-INT8-SlideSparse-2_4", None),
            ("Tiny-INT8-SlideSparse-2_8", None),
            ("Tiny-INT8-SlideSparse-2_8", {"backend": "cublaslt"}),
            ("Tiny-INT8", {"backend": "cutlass"}),
            ("Tiny-FP8", {"backend": "cublaslt"}),
            ("Tiny-FP8", {"backend": "cutlass"}),
            ("Tiny-FP8-SlideSparse-2_8", None),
            ("Qwen-INT8", {"backend": "cublaslt"}),
            ("Qwen-INT8", {"backend": "cutlass"}),
        ):
            out[f"{name} {additional}"] = self._logits(name, additional)
        return out

    def _logits(self, name: str, additional: dict[str, Any] | None) -> dict[str, Any]:
        from slidesparse.vllm_plugin.model_paths import linear_kernels, paths_that_ran

        config, model = self.model(name, additional)
        checkpoint = Checkpoint.open(self.paths[name])
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer, module in model.named_modules():
            if layer.rpartition(".")[2].endswith("_proj"):
                module.register_forward_hook(
                    lambda _, given, out, layer=layer: seen.__setitem__(layer, (given[0], out[0]))  # type: ignore
                )
        with self._fused(model, seen):
            found = vllm_on_cpu.logits(config, model, tokens())
        expected = reference_model(checkpoint, torch.bfloat16)(input_ids=tokens()[None], use_cache=False).logits[0]
        ran = paths_that_ran(model)
        exact = additional is None or additional["backend"] not in ("cutlass", "auto")
        kinds = {kernel.partition(" ")[2] for kernel in linear_kernels(model).values()}
        return {
            "distance": distance(found, expected.float()),
            "layers": {layer: self._check(checkpoint, layer, *values, exact) for layer, values in seen.items()},
            "ran": {kind: list(ran[kind]) for kind in sorted(kinds)},
        }

    @staticmethod
    @contextmanager
    def _fused(model: Any, seen: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
        """Keeps, of every linear that runs with the norm before it, what that norm gives in plain PyTorch, and y."""
        from slidesparse.vllm_plugin import bitnet

        names = {id(module): name for name, module in model.named_modules()}
        genuine = bitnet.norm_linear, bitnet.add_norm_linear, bitnet.gate_norm_linear

        def keep(norm: Any, x: torch.Tensor, linear: Any, y: torch.Tensor) -> None:
            weight = norm.weight, norm.variance_epsilon
            normed = bitnet_reference.normalise(x, bitnet_reference.inverse_rms(x, weight[1]), weight[0])
            seen[names[id(linear)]] = normed, y

        def norm_linear(norm: Any, x: torch.Tensor, linear: Any) -> torch.Tensor:
            y = genuine[0](norm, x, linear)
            keep(norm, x, linear, y)
            return y

        def add_norm_linear(
            norm: Any, x: torch.Tensor, residual: torch.Tensor, linear: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            y, total = genuine[1](norm, x, residual, linear)
            assert torch.equal(total, x + residual)
            keep(norm, total, linear, y)
            return y, total

        def gate_norm_linear(norm: Any, gate_up: torch.Tensor, linear: Any) -> torch.Tensor:
            y = genuine[2](norm, gate_up, linear)
            keep(norm, bitnet_reference.squared_relu_gate(gate_up), linear, y)
            return y

        ours = norm_linear, add_norm_linear, gate_norm_linear
        try:
            bitnet.norm_linear, bitnet.add_norm_linear, bitnet.gate_norm_linear = ours
            yield
        finally:
            bitnet.norm_linear, bitnet.add_norm_linear, bitnet.gate_norm_linear = genuine

    @staticmethod
    def _check(checkpoint: Checkpoint, layer: str, x: torch.Tensor, y: torch.Tensor, exact: bool) -> str:
        """Output of one linear against the integer (or float64) reference on the checkpoint's own codes."""
        codes, scale, bias = merged(checkpoint, layer)
        assert checkpoint.dtype is not None
        error = verify.gamma(2 * codes.shape[1])
        return verify.check_linear(x, y, codes, scale, bias, checkpoint.dtype, error, exact=exact).verified

    def auto(self) -> dict[str, Any]:
        """Backend auto on a dense and on a sparse checkpoint: values, what was measured, what ran."""
        out = {}
        for name, more in (
            ("Tiny-INT8", {}),
            ("Tiny-FP8-SlideSparse-2_8", {}),
            ("Tiny-INT8-SlideSparse-2_8", {"keep_dense": False}),
        ):
            found = self._logits(name, {"backend": "auto", "sizes": [16, 32], **more})
            found["measured"] = {
                kind: {m: sorted(of) for m, of in sizes.items()}
                for kind, sizes in linear_op.measured().items()
                if kind in found["ran"]
            }
            out[f"{name} {more}"] = found
        return out

    def packed_weights(self) -> bool:
        """A sparse layer holds the lift of the checkpoint's codes, q, k and v below each other."""
        name = "Tiny-FP8-SlideSparse-2_8"
        _, model = self.model(name)
        checkpoint = Checkpoint.open(self.paths[name])
        assert checkpoint.section is not None
        same = []
        for layer in ("model.layers.1.self_attn.qkv_proj", "model.layers.0.mlp.down_proj"):
            codes, scale, _ = merged(checkpoint, layer)
            lifted = lift_weight(codes.view(torch.int8).numpy(), checkpoint.section.pattern, layer)
            held = model.get_submodule(layer)
            same.append(torch.equal(held.weight.view(torch.int8), torch.from_numpy(lifted)))
            same.append(torch.equal(held.weight_scale, scale))
        return all(same)

    def tuned(self) -> dict[str, Any]:
        """What ran with a store that knows a winner for one shape, at one M."""
        store = TuningStore.open(self.folder / "winners.json")
        size = {"dtype": "INT8", "sparsity": "", "m": 64, "n": 128, "k": 192}
        known = {
            "alg_id": 2,
            "lat_us": 1.0,
            "versions": store.versions("cublaslt"),
            "run_id": "test",
            "time_utc": "now",
        }
        store.put(Winner(operation="dense_gemm", family="cublaslt", algorithm="float64", **size, **known))  # type: ignore
        store.save()
        additional = {"backend": "cublaslt", "tuning": str(self.folder / "winners.json")}
        return dict(self._logits("Tiny-INT8", additional)["ran"])

    # -- refusals ---------------------------------------------------------------------------------------

    def refusals(self) -> dict[str, str]:
        cases: dict[str, Callable[[], object]] = {
            "unknown key": lambda: self.model("Tiny-INT8", {"bakend": "cublaslt"}),
            "no pattern": lambda: self.model("Tiny-INT8", {"backend": "cusparselt"}),
            "other pattern": lambda: self.model("Tiny-INT8-SlideSparse-2_8", {"sparsity": "2:4"}),
            "not pruned": lambda: self.model("Tiny-INT8", {"backend": "cusparselt", "sparsity": "2:4"}),
            "half": lambda: self.model("Tiny-INT8", {"backend": "cublaslt"}, dtype="float16"),
            "unquantised": lambda: self.model("Tiny-BF16", {"backend": "cublaslt"}),
            "vLLM's own asked for": lambda: self.model("Tiny-INT8", {"backend": "cublaslt"}, linear_backend="cutlass"),
            "activation": lambda: self.model("Tiny-INT8", hf_overrides={"hidden_act": "silu"}),
            "LoRA": lambda: self.model("Tiny-INT8", {"backend": "cublaslt"}, enable_lora=True),
            "static INT8": lambda: self.model("Static-INT8", {"backend": "cublaslt"}, weights=False),
            "static FP8": lambda: self.model("Static-FP8", {"backend": "cublaslt"}, weights=False),
        }
        return {name: fault(call) for name, call in cases.items()}


def main(folder: Path) -> dict[str, object]:
    s = One(folder)
    first = {"registration": outcome(s.registration)}
    vllm_on_cpu.start(folder, 0, 1)
    rest = s.kernels, s.cache_keys, s.model_function, s.logits, s.auto, s.tuned, s.packed_weights, s.refusals
    return first | {scenario.__name__: outcome(scenario) for scenario in rest}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
