"""ELMo, GPT-1 and BERT in JAX and Flax: pretraining, and use of what was pretrained.

The public interface, imported when it is first used:

    model = prelm_jax.load("my-bert")               # a model directory or a work directory
    summary = prelm_jax.pretrain(run, "runs/mine")  # run: a prelm_jax.Run
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prelm_jax.run import Run

__version__ = "0.1.0"
__all__ = ["Run", "load", "pretrain"]


class _CallableModule(ModuleType):
    """A module that is called like its function of the same name."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """Python binds a submodule to its name here at its first import: `load` has to stay callable then."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and name in __all__:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{name.lower()}")
    return module if name == name.lower() else getattr(module, name)
