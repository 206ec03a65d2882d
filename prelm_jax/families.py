"""The families of models: for each model_type its configs, its published format and its inference. Closed and lazy."""

import dataclasses
from typing import TYPE_CHECKING

from prelm_jax.errors import InputError
from prelm_jax.formats.base import Format
from prelm_jax.inference.base import Pretrained

if TYPE_CHECKING:
    from prelm_jax.data.frames import Frame


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table.

    `model`, `data`: the classes of the configs in run.json. `frame`: how the examples of a task become tokens.
    `example`: what to try first with a trained model, the command with {} for its path.
    """

    model: type
    data: type
    format: Format
    pretrained: type[Pretrained]
    frame: type["Frame"]
    example: str


def _bert() -> Family:
    from prelm_jax.data.frames import BertFrame
    from prelm_jax.data.pairs import PairsConfig
    from prelm_jax.formats.huggingface_bert import FORMAT
    from prelm_jax.inference.bert import BertPretrained
    from prelm_jax.models.bert import BertConfig

    return Family(BertConfig, PairsConfig, FORMAT, BertPretrained, BertFrame, 'prelm fill {} "The [MASK] is returned."')


def _gpt() -> Family:
    from prelm_jax.data.frames import GPTFrame
    from prelm_jax.data.windows import WindowsConfig
    from prelm_jax.formats.huggingface_gpt import FORMAT
    from prelm_jax.inference.gpt import GPTPretrained
    from prelm_jax.models.gpt import GPTConfig

    return Family(GPTConfig, WindowsConfig, FORMAT, GPTPretrained, GPTFrame, 'prelm generate {} --prompt "The"')


def _elmo() -> Family:
    from prelm_jax.data.frames import ELMoFrame
    from prelm_jax.data.streams import StreamsConfig
    from prelm_jax.formats.bilm import FORMAT
    from prelm_jax.inference.elmo import ELMoPretrained
    from prelm_jax.models.elmo import ELMoConfig

    return Family(ELMoConfig, StreamsConfig, FORMAT, ELMoPretrained, ELMoFrame, "prelm embed {} LINES.txt VECTORS.hdf5")


FAMILIES = {"bert": _bert, "openai-gpt": _gpt, "elmo": _elmo}


def find_family(model_type: object, source: object) -> Family:
    """The row of a model_type; InputError, naming the source, for an unknown one."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"{source}: model_type is {model_type!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]()
