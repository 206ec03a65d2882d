"""Functions compiled so that the bits of a row depend, as far as the backend allows, on its own length alone."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar, cast

import jax
import numpy as np

# XLA's fusions for YNNPACK choose the kernel of a product by the number of rows, and kernels differ in their last bits.
CPU_OPTIONS: dict[str, bool | str] = {"xla_cpu_experimental_ynn_fusion_type": ""}

Output = TypeVar("Output")


class Compiled(Generic[Output]):
    """`jax.jit` of a function, with the options of the backend of its first call."""

    def __init__(
        self,
        function: Callable[..., Output],
        static: Sequence[int],
        donated: Sequence[int],
        shapes: Sequence[str],
    ):
        self._function, self._static, self._donated, self._shapes = function, static, donated, shapes
        self._general: dict[tuple[Hashable, ...], Callable[..., Output]] = {}

    def __call__(self, *args: object) -> Output:
        if not self._shapes or jax.default_backend() == "tpu":
            return self._jitted(*args)
        static = args[: len(self._static)]
        if static not in self._general:
            self._general[static] = self._trace(*args)
        return self._general[static](*args[len(static) :])

    @functools.cached_property
    def _jitted(self) -> Callable[..., Output]:
        options = compiler_options() or None
        return jax.jit(
            self._function, static_argnums=self._static, donate_argnums=self._donated, compiler_options=options
        )

    def _trace(self, *args: object) -> Callable[..., Output]:
        """The function for these static arguments, traced once for all shapes; only the compiler runs for each."""
        scope = jax.export.SymbolicScope()
        arrays = args[len(self._static) :]
        fixed, general = arrays[: -len(self._shapes)], arrays[-len(self._shapes) :]
        inputs = [
            *jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), fixed),
            *(
                jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), np.asarray(x).dtype)
                for shape, x in zip(self._shapes, general, strict=True)
            ),
        ]
        exported = jax.export.export(cast("jax.stages.Wrapped", self._jitted))(*args[: len(self._static)], *inputs)
        return jax.jit(exported.call, compiler_options=compiler_options() or None)


def compiled(
    static: Sequence[int] = (), donated: Sequence[int] = (), shapes: Sequence[str] = ()
) -> Callable[[Callable[..., Output]], Compiled[Output]]:
    """A decorator: `jax.jit` with the static and donated arguments of these numbers.

    shapes: of the last arguments, with letters for axes of any size: ("b, t", "b"). If they are given, static arguments
    come first, and the function is traced once for all sizes where the backend allows it (a TPU's attention does not).
    """
    return lambda function: Compiled(function, static, donated, shapes)


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
