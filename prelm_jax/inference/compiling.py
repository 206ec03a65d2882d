"""Functions compiled so that the bits of a row depend, as far as the backend allows, on its own length alone."""

import functools
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import jax

# XLA's fusions for YNNPACK choose the kernel of a product by the number of rows, and kernels differ in their last bits.
CPU_OPTIONS: dict[str, bool | str] = {"xla_cpu_experimental_ynn_fusion_type": ""}

Output = TypeVar("Output")


class Compiled(Generic[Output]):
    """`jax.jit` of a function, with the options of the backend of its first call."""

    def __init__(self, function: Callable[..., Output], static: Sequence[int], donated: Sequence[int]):
        self._function, self._static, self._donated = function, static, donated

    @functools.cached_property
    def jitted(self) -> Callable[..., Output]:
        return jax.jit(
            self._function,
            static_argnums=self._static,
            donate_argnums=self._donated,
            compiler_options=compiler_options() or None,
        )

    def __call__(self, *args: object) -> Output:
        return self.jitted(*args)


def compiled(
    static: Sequence[int] = (), donated: Sequence[int] = ()
) -> Callable[[Callable[..., Output]], Compiled[Output]]:
    """A decorator: `jax.jit` with the static and donated arguments of these numbers."""
    return lambda function: Compiled(function, static, donated)


@functools.cache
def compiler_options() -> dict[str, bool | str]:
    """The options for the default backend that its compiler knows."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=CPU_OPTIONS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # Another version of XLA.
        return {}
    return CPU_OPTIONS
