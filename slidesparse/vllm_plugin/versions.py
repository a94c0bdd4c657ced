"""Which vLLM the plugin is written for: its kernel registry has no stable interface."""

from __future__ import annotations

SUPPORTED = ("0.24",)
"""Release series, `major.minor`."""


def unsupported(version: str) -> str | None:
    """None for a vLLM of a supported series (`0.24.0`, `0.24.1+cu130`), else one line that says what follows."""
    series = ".".join(version.split("+")[0].split(".")[:2])
    if series in SUPPORTED:
        return None
    return (
        f"slidesparse: vLLM {version} is not supported, only {', '.join(f'{s}.x' for s in SUPPORTED)}: neither its "
        f"linear kernels nor its BitNet are registered; other models are not affected"
    )
