"""The entry point `vllm.general_plugins`: vLLM calls it in every process, before it looks at the model."""

from __future__ import annotations

import importlib.metadata
import logging

from slidesparse.vllm_plugin.versions import unsupported

ARCHITECTURE = "BitNetForCausalLM"
"""As in `architectures` of the checkpoints that prepare writes (`checkpoint.families`)."""
MODEL = "slidesparse.vllm_plugin.bitnet:BitNetForCausalLM"
"""A name, so that nothing is imported until a BitNet is loaded."""


def register() -> None:
    """Add BitNet and our linear kernels to vLLM. Doing it again changes nothing.

    With a vLLM of another series: one warning, and nothing is touched.
    """
    problem = unsupported(importlib.metadata.version("vllm"))
    if problem is not None:
        logging.getLogger("vllm.slidesparse").warning(problem)  # vLLM's own handler prints it
        return
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    from slidesparse.bake import assembler
    from slidesparse.bake.counts import follow
    from slidesparse.vllm_plugin import linear_kernels

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL)
    linear_kernels.install()
    capability = current_platform.get_device_capability()
    if capability is not None:
        assembler.settle(10 * capability.major + capability.minor)
    follow()


def register_class() -> None:
    """Add BitNet's class itself, for a process that loads nothing else. After this `register` leaves it alone.

    A model that vLLM has a name of it looks at in one more process, which imports everything again: 10 s of an engine's
    first start (two cores of an x86_64 machine; the answer is cached on disk after that).
    """
    from vllm import ModelRegistry

    from slidesparse.vllm_plugin.bitnet import BitNetForCausalLM

    ModelRegistry.register_model(ARCHITECTURE, BitNetForCausalLM)
