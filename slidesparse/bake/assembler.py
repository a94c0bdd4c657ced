"""The assembler that Triton names machine code by: the same one in every process of a run.

A key of Triton's cache holds the version of ptxas. torch.compile puts PyTorch's ptxas in the place of Triton's, in the
process in which it compiles, by a variable of the environment; from then on nothing is found that was baked, or that
tuning compiled. Triton asks an assembler for its version once a process: asked before that, keys stay what they are
elsewhere. What torch.compile compiles is assembled as before, since the assembler itself is looked up each time.
"""

from __future__ import annotations


def settle(architecture: int) -> None:
    """Keys of this process hold the assembler of this moment. architecture: 90 for compute capability 9.0."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    get_ptxas_version(architecture)
