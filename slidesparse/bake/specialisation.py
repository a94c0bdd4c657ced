"""One compiled kernel among those that Triton's cache holds, told from a launch that did not happen.

A launch of a Triton kernel is specialised by the types of its arguments, by which pointers and integers are multiples
of 16, by integers that are 1, by its constants and its options. `trace` lets launches go through Triton's own JIT as
far as the point where it would look into its cache, and takes down what it would look for.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import BaseBackend
from triton.compiler import ASTSource, make_backend
from triton.compiler.compiler import get_cache_invalidating_env_vars
from triton.runtime import JITFunction, driver
from triton.runtime.cache import get_cache_key

from slidesparse.bake.stub import standing_for
from slidesparse.errors import UnsupportedHere


@dataclass(frozen=True)
class Specialisation:
    """A kernel as it is launched on one architecture."""

    architecture: int
    module: str
    name: str
    digest: str
    """SHA-256 of Triton's cache key, hexadecimal."""
    text: str
    """Arguments and options, for people."""
    data: str
    """All that Triton's `JITFunction.preload` needs to compile it, JSON."""
    signature: tuple[str, ...]
    """Types of the arguments in order: what the C launcher depends on."""

    def __str__(self) -> str:
        return f"sm_{self.architecture} {self.module.rpartition('.')[2]}.{self.name}({self.text})"

    def compile(self) -> None:
        """Into Triton's cache; nothing happens if it is there."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        with standing_for(self.architecture):
            kernel.preload(self.data)


def trace(architecture: int, launch: Callable[[], None]) -> tuple[Specialisation, ...]:
    """What the launches of `launch` (on tensors of device `meta`) need in the cache, each once, in order.

    Raises UnsupportedHere where kernels go to Triton's interpreter instead.
    """
    if triton.knobs.runtime.interpret:
        raise UnsupportedHere("TRITON_INTERPRET is set, so no kernel is compiled; unset it")
    found: dict[str, Specialisation] = {}

    def take_down(**call: Any) -> bool:
        data = call["compile"]["specialization_data"]
        if data not in found:
            found[data] = _specialisation(architecture, call["fn"].jit_function, call["compile"], backend)
        return True  # stands for: compiled elsewhere

    with standing_for(architecture):
        backend = make_backend(driver.active.get_current_target())
        before, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, take_down
        try:
            launch()
        finally:
            triton.knobs.runtime.jit_cache_hook = before
    return tuple(found.values())


def _specialisation(
    architecture: int, kernel: JITFunction[Any], compiled: dict[str, Any], backend: BaseBackend
) -> Specialisation:
    signature, constants, attributes = compiled["signature"], compiled["constants"], compiled["configs"][0]
    source = ASTSource(kernel, signature, constants, attributes)
    plain = json.loads(compiled["specialization_data"])["options"]
    options = backend.parse_options({key: tuple(v) if isinstance(v, list) else v for key, v in plain.items()})
    key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    arguments = [
        f"{name}={constants[place,]}"
        if kind == "constexpr"
        else f"{name}:{kind}{'%16' * bool(attributes.get((place,)))}"
        for place, (name, kind) in enumerate(signature.items())
    ]
    return Specialisation(
        architecture,
        kernel.module,
        kernel.__name__,
        hashlib.sha256(key.encode()).hexdigest(),
        ", ".join([*arguments, f"{options.num_warps} warps"]),
        compiled["specialization_data"],
        tuple(signature.values()),
    )
