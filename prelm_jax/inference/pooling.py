"""Vectors of texts from the hidden states of their tokens.

Pooling is NumPy on the states of one text, so a vector depends on the bits of these states alone. References:
sentence-transformers, Pooling.py, for the modes; hanxiao/bert-as-service for concatenated layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

Mode = Literal["mean", "cls", "max", "last", "mean-sqrt", "weighted-mean"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """A layer after the pooling: activation(x · kernel + bias)."""

    kernel: np.ndarray  # [in, out]
    bias: np.ndarray | None
    activation: Callable[[np.ndarray], np.ndarray]
    residual: bool = False


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How the states [L + 1, tokens, D] of a text, special tokens included, become its vector.

    Layers are concatenated, and so are the modes; then come the dense layers.
    """

    modes: tuple[Mode, ...] = ("mean",)
    layers: tuple[int, ...] = (-1,)
    dense: tuple[Dense, ...] = ()
    normalize: bool = False

    def __call__(self, states_LTD: np.ndarray) -> np.ndarray:
        """The vector, f32 [width]; of the states of at least one token.

        Pooling(("cls",), normalize=True)(states_LTD)
        """
        states_TD = np.concatenate([states_LTD[layer] for layer in self.layers], -1)
        x = np.concatenate([_pool(mode, states_TD) for mode in self.modes])
        for dense in self.dense:
            y = x @ dense.kernel if dense.bias is None else x @ dense.kernel + dense.bias
            x = dense.activation(y) + x if dense.residual else dense.activation(y)
        if self.normalize:
            x = x / np.maximum(np.sqrt(np.square(x, dtype=np.float64).sum()), 1e-12)
        return x.astype(np.float32)

    def width(self, hidden_size: int) -> int:
        """The length of a vector from hidden states of this width."""
        if self.dense:
            return self.dense[-1].kernel.shape[1]
        return hidden_size * len(self.layers) * len(self.modes)


def _pool(mode: Mode, states_TD: np.ndarray) -> np.ndarray:
    """[D]."""
    count = len(states_TD)
    if mode == "cls":
        return states_TD[0]
    if mode == "last":
        return states_TD[-1]
    if mode == "max":
        return states_TD.max(0)
    weights_T1 = np.arange(1.0, count + 1)[:, None] if mode == "weighted-mean" else np.ones((count, 1))
    total = np.sqrt(count) if mode == "mean-sqrt" else weights_T1.sum()
    return ((states_TD * weights_T1).sum(0) / total).astype(np.float32)


def cosines(vectors_ND: np.ndarray, others_MD: np.ndarray) -> np.ndarray:
    """[N, M]: the cosine of each pair of vectors."""
    a_ND, b_MD = _unit(vectors_ND), _unit(others_MD)
    # Without BLAS, whose bits depend on the number of vectors.
    return np.stack([np.einsum("ND,D->N", a_ND, b_D) for b_D in b_MD], 1) if len(b_MD) else np.zeros((len(a_ND), 0))


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.square(vectors, dtype=np.float64).sum(-1, keepdims=True))
    return vectors / np.maximum(norms, 1e-12)


def parse_modes(name: str) -> tuple[Mode, ...] | None:
    """The modes of a name, several joined by "+" ("mean+max"); None if there is no such mode."""
    names: Sequence[str] = name.split("+")
    found = tuple(mode for each in names for mode in MODES if mode == each)
    return found if len(found) == len(names) else None
