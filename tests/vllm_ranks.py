"""What `test_vllm_package.py` asks of the real vLLM on two ranks (and on one), each a process on vLLM's CPU platform.

    python vllm_ranks.py FOLDER RANK RANKS

For two ranks the CUDA platform opens NCCL; `vllm_checks.cpu_platform` is installed as a plugin instead.
FOLDER and the output are as in `vllm_scenarios.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import vllm.plugins
import vllm_on_cpu
from vllm.model_executor.kernels import linear as registry
from vllm.platforms import PlatformEnum
from vllm_checks import TOKENS, distance, fault, merged, outcome, tokens

from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.kernels import operands
from slidesparse.measure.engines.model import reference_model
from slidesparse.measure.engines.vllm_memory import Widths
from slidesparse.vllm_plugin import linear_op
from slidesparse.vllm_plugin.shards import shared_kv_heads


class Ranks:
    """Tensor parallelism: this process is one of the ranks."""

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self.folder, self.rank, self.ranks = folder, rank, ranks

    def sub_norm(self) -> float:
        """Largest difference of the sharded norm from the whole one, over this rank's columns."""
        from slidesparse.vllm_plugin.bitnet import sub_norm

        size, eps = 192, 1e-5
        generator = torch.Generator().manual_seed(7)
        x, weight = torch.randn(5, size, generator=generator), torch.rand(size, generator=generator)
        own = slice(self.rank * size // 2, (self.rank + 1) * size // 2)
        norm = sub_norm(size, eps)
        norm.weight.weight_loader(norm.weight, weight)
        whole = torch.nn.functional.rms_norm(x, (size,), weight, eps)
        return float((norm(x[:, own]) - whole[:, own]).abs().max())

    def models(self) -> dict[str, dict[str, Any]]:
        """Logits beside those of the dequantised model on one rank, and what this rank holds."""
        out = {}
        for place, additional in (
            ("checkpoints/Tiny-INT8", {"backend": "cublaslt"}),
            ("checkpoints_slidesparse/Tiny-INT8-SlideSparse-2_8", None),
            ("checkpoints_slidesparse/Tiny-FP8-SlideSparse-2_8", None),
        ):
            config = vllm_on_cpu.configure(self.folder / place, additional, tensor_parallel_size=2)
            model = vllm_on_cpu.load(config)
            found = vllm_on_cpu.logits(config, model, tokens())
            reference = reference_model(Checkpoint.open(self.folder / place), torch.bfloat16)
            expected = reference(input_ids=tokens()[None], use_cache=False).logits[0].float()
            down = model.get_submodule("model.layers.0.mlp.down_proj")
            out[place.rpartition("/")[2]] = {
                "distance": distance(found, expected), "lifted": self._lifted(place, down.weight),
            }  # fmt: skip
        return out

    def odd_heads(self) -> dict[str, Any]:
        """KV heads that the ranks do not divide: as the engine asks for them, and as `vllm serve` would."""
        place = self.folder / "checkpoints/Odd-INT8"
        backend = {"backend": "cublaslt"}
        checkpoint = Checkpoint.open(place)
        widths = Widths.of(checkpoint.config)
        shared = {"num_key_value_heads": shared_kv_heads(widths.heads, widths.kv_heads, 2)}
        config = vllm_on_cpu.configure(place, backend, tensor_parallel_size=2, hf_overrides=shared)
        model = vllm_on_cpu.load(config)
        found = vllm_on_cpu.logits(config, model, tokens())
        reference = reference_model(checkpoint, torch.bfloat16)
        expected = reference(input_ids=tokens()[None], use_cache=False).logits[0].float()
        plain = vllm_on_cpu.configure(place, backend, tensor_parallel_size=2)
        return {
            "distance": distance(found, expected),
            "qkv": list(model.get_submodule("model.layers.0.self_attn.qkv_proj").weight.shape),
            "refused": fault(lambda: vllm_on_cpu.load(plain)),
        }

    def _lifted(self, place: str, held: torch.Tensor) -> bool:
        """Whether down_proj holds its own columns, lifted."""
        checkpoint = Checkpoint.open(self.folder / place)
        codes, _, _ = merged(checkpoint, "model.layers.0.mlp.down_proj")
        own = codes.chunk(2, dim=1)[self.rank].contiguous().view(torch.int8)
        if checkpoint.section is not None:
            own = operands.lift(own, checkpoint.section.pattern, "down_proj")
        return torch.equal(held.view(torch.int8), own)

    def compiled(self) -> dict[str, Any]:
        """The whole decoder as one graph, M symbolic, at three M: vLLM compiles it so."""
        place = self.folder / "checkpoints_slidesparse/Tiny-INT8-SlideSparse-2_8"
        config = vllm_on_cpu.configure(place, None, tensor_parallel_size=self.ranks)
        model = vllm_on_cpu.load(config)
        found = vllm_on_cpu.compiled(config, model.model, [tokens()[:m].clone() for m in (TOKENS, 7, 19)])
        linear_op.reset()
        vllm_on_cpu.logits(config, model, tokens())
        return found | {"ran": linear_op.paths()}

    def cuts(self) -> list[list[str]]:
        place = self.folder / "checkpoints_slidesparse/Tiny-INT8-SlideSparse-2_8"
        config = vllm_on_cpu.configure(place, None)
        return vllm_on_cpu.cuts(config, vllm_on_cpu.load(config).model)

    def cut(self) -> str:
        """2:6 groups of 64 columns a rank."""
        place = self.folder / "checkpoints_slidesparse/Tiny-INT8-SlideSparse-2_6"
        config = vllm_on_cpu.configure(place, None, tensor_parallel_size=2)
        return fault(lambda: vllm_on_cpu.load(config))


def main(folder: Path, rank: int, ranks: int) -> dict[str, object]:
    vllm.plugins.load_general_plugins()
    for kernels in (registry._POSSIBLE_INT8_KERNELS, registry._POSSIBLE_FP8_KERNELS):
        kernels[PlatformEnum.CPU] = kernels[PlatformEnum.CUDA]  # ours are registered for CUDA
    vllm_on_cpu.start(folder, rank, ranks)
    s = Ranks(folder, rank, ranks)
    scenarios = (s.compiled, s.cuts) if ranks == 1 else (s.sub_norm, s.models, s.odd_heads, s.compiled, s.cut)
    return {scenario.__name__: outcome(scenario) for scenario in scenarios}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
