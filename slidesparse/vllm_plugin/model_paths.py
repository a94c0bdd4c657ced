"""Which kernel runs each linear of a loaded vLLM model. `LLM.apply_model(linear_kernels)` asks every worker."""

from __future__ import annotations

from torch import nn

from slidesparse.errors import SlideSparseError
from slidesparse.vllm_plugin import linear_op


def linear_kernels(model: nn.Module) -> dict[str, str]:
    """Layer -> class of vLLM's kernel, with our kind (`cusparselt 2:8 INT8 2560x6912`) once weights are loaded.

    A linear without quantised weights is named by vLLM's method for it (`UnquantizedLinearMethod`).
    """
    from vllm.model_executor.layers.linear import LinearBase

    return {name: _kernel_of(module) for name, module in model.named_modules() if isinstance(module, LinearBase)}


def before_attention(model: nn.Module) -> str:
    """What rotates q and k and writes the KV cache."""
    one_pass = any(getattr(module, "one_pass", False) for module in model.modules())
    return "rotary and KV-cache write in one kernel" if one_pass else "vLLM's rotary and KV-cache write"


def paths_that_ran(model: nn.Module) -> dict[str, dict[str, int]]:
    """`linear_op.paths` of the process that holds the model: kind -> `M=bucket: algorithms` -> calls."""
    return linear_op.paths()


def measured_at_load(model: nn.Module) -> dict[str, dict[str, dict[str, float | str]]]:
    """`linear_op.measured` of the process that holds the model: what backend auto chose from, and why."""
    return linear_op.measured()


def require_ours(model: nn.Module) -> None:
    """Raises SlideSparseError naming the first linear that a kernel of vLLM's would run."""
    from slidesparse.vllm_plugin.linear_kernels import SlideSparseFp8Kernel, SlideSparseInt8Kernel

    ours = (SlideSparseInt8Kernel.__name__, SlideSparseFp8Kernel.__name__)
    for name, kernel in linear_kernels(model).items():
        if not kernel.startswith(ours):
            raise SlideSparseError(
                f"{name}: vLLM would run it by {kernel}, not by slidesparse; give a checkpoint that prepare made and "
                f"leave --linear-backend and VLLM_DISABLED_KERNELS alone, or choose backend vllm"
            )


def _kernel_of(layer: nn.Module) -> str:
    scheme = getattr(layer, "scheme", None)
    kernel = getattr(scheme, "kernel", None) or getattr(scheme, "fp8_linear", None)
    if kernel is None:
        return type(scheme or layer.quant_method).__name__
    kind = getattr(kernel, "kind", "")
    return f"{type(kernel).__name__} {kind}".strip()
