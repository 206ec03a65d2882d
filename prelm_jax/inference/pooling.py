"""Vectors of texts from the hidden states of their tokens.

Pooling is NumPy on the states of one text, so a vector depends on the bits of these states alone. References:
sentence-transformers, Pooling.py, for the modes; hanxiao/bert-as-service for concatenated layers.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import get_args

import numpy as np
from tokenizers.normalizers import Lowercase

from prelm_jax.formats.base import Activation, Dense, Normalize, PoolingMode

MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)

_erf = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS: Mapping[Activation, Callable[[np.ndarray], np.ndarray]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "GELU": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
    "Sigmoid": lambda x: 0.5 * (1 + np.tanh(x / 2)),
}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How the states [L + 1, tokens, D] of a text, special tokens included, become its vector.

    Layers are concatenated, and so are the modes; then come the dense layers.
    """

    modes: tuple[PoolingMode, ...] = ("mean",)
    layers: tuple[int, ...] = (-1,)
    dense: tuple[Dense | Normalize, ...] = ()
    normalize: bool = False

    def __call__(self, states_LTD: np.ndarray, skipped: int = 0) -> np.ndarray:
        """The vector, f32 [width], of the states of at least one token; the first `skipped` tokens are left out.

        Pooling(("cls",), normalize=True)(states_LTD)
        """
        states_TD = np.concatenate([states_LTD[layer] for layer in self.layers], -1)
        x = np.concatenate([_pool(mode, states_TD, skipped) for mode in self.modes])
        for module in (*self.dense, *([Normalize()] if self.normalize else [])):
            x = _dense(module, x) if isinstance(module, Dense) else x / np.maximum(np.sqrt(np.square(x).sum()), 1e-12)
        return x.astype(np.float32)

    def width(self, hidden_size: int) -> int:
        """The length of a vector from hidden states of this width."""
        sizes = [module.kernel.shape[1] for module in self.dense if isinstance(module, Dense)]
        return sizes[-1] if sizes else hidden_size * len(self.layers) * len(self.modes)


def _pool(mode: PoolingMode, states_TD: np.ndarray, skipped: int) -> np.ndarray:
    """f64 [D]."""
    states_TD, count = states_TD[skipped:].astype(np.float64), len(states_TD) - skipped
    if mode == "cls":
        return states_TD[0]
    if mode == "last":
        return states_TD[-1]
    if mode == "max":
        return states_TD.max(0)
    weights_T = np.arange(1.0, count + 1) + skipped if mode == "weighted-mean" else np.ones(count)
    total = np.sqrt(count) if mode == "mean-sqrt" else weights_T.sum()
    return (states_TD * weights_T[:, None]).sum(0) / total


def _dense(module: Dense, x: np.ndarray) -> np.ndarray:
    y = x @ module.kernel if module.bias is None else x @ module.kernel + module.bias
    y = ACTIVATIONS[module.activation](y)
    if not module.residual:
        return y
    return y + (x if module.projection is None else x @ module.projection)


def cosines(vectors_ND: np.ndarray, others_MD: np.ndarray) -> np.ndarray:
    """[N, M]: the cosine of each pair of vectors."""
    a_ND, b_MD = _unit(vectors_ND), _unit(others_MD)
    # Without BLAS, whose bits depend on the number of vectors.
    return np.stack([np.einsum("ND,D->N", a_ND, b_D) for b_D in b_MD], 1) if len(b_MD) else np.zeros((len(a_ND), 0))


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.square(vectors, dtype=np.float64).sum(-1, keepdims=True))
    return vectors / np.maximum(norms, 1e-12)


def parse_modes(name: str) -> tuple[PoolingMode, ...] | None:
    """The modes of a name, several joined by "+" ("mean+max"); None for an unknown or repeated mode."""
    names = name.split("+")
    found = tuple(mode for each in names for mode in MODES if mode == each)
    return found if len(names) == len(found) == len(set(found)) else None


class PreparedTexts(Collection[str]):
    """Texts with a prompt before each, lower-cased if asked for; prepared again each time they are read.

    A blank text gets no prompt, so that it stays blank.
    """

    def __init__(self, texts: Collection[str], prompt: str, lowercase: bool):
        self._texts, self._prompt = texts, prompt
        self._normalizer = Lowercase() if lowercase else None

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            text = self._prompt + text if text.strip() else ""
            yield text if self._normalizer is None else self._normalizer.normalize_str(text)

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, text: object) -> bool:
        return text in list(self)
