"""GPT-1 in Hugging Face's format, and in that of its authors.

Written: the state dict of transformers' `OpenAIGPTLMHeadModel`, fp32, without the head, which is tied to the token
embeddings. (From a file with the head instead of the embeddings, two of the four classes would load random embeddings.)
Read: any GPT-1 of transformers, with or without heads and prefix; and the authors' `params_0.npy`, … and
`params_shapes.json` (openai/finetune-transformer-lm).
"""

import math
import zipfile
from functools import partial
from pathlib import Path

import numpy as np

from prelm_jax import validation
from prelm_jax.bounds import VocabularySize
from prelm_jax.errors import InputError
from prelm_jax.formats import huggingface
from prelm_jax.formats.base import ORIGINAL_GPT, LoadedModel
from prelm_jax.models import heads
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.storage import read_json
from prelm_jax.tokenizers.base import Tokenizer

LAYOUT = huggingface.Layout(
    config_class=GPTConfig,
    settings={
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "embedding_dropout": "embd_pdrop",
        "hidden_dropout": "resid_pdrop",
        "attention_dropout": "attn_pdrop",
        "layer_norm_eps": "layer_norm_epsilon",
        "initializer_range": "initializer_range",
    },
    fixed={"afn": "gelu", "tie_word_embeddings": True},  # Their "gelu" is the tanh form.
    written={"afn": "gelu", "tie_word_embeddings": True, "architectures": ["OpenAIGPTLMHeadModel"]},
    modules={"token_embeddings": "tokens_embed", "position_embeddings": "positions_embed"},
    layers=("decoder/layer_", "h."),
    layer_modules={
        **dict.fromkeys(("attention/query", "attention/key", "attention/value"), "attn.c_attn"),
        "attention/output": "attn.c_proj",
        "attention/layer_norm": "ln_1",
        "intermediate": "mlp.c_fc",
        "output": "mlp.c_proj",
        "layer_norm": "ln_2",
    },
    vocabulary_tables=frozenset({"token_embeddings/embedding"}),
    prefix="transformer.",  # Some files lack it.
    fused=("query", "key", "value"),
    architectures={
        "OpenAIGPTForSequenceClassification": huggingface.Architecture(heads.Label(bias=False), "score"),
        "OpenAIGPTDoubleHeadsModel": huggingface.Architecture(
            heads.Choice(),
            "multiple_choice_head.summary",
            "summary_first_dropout",
            # The summary is at the token that the caller names, and is projected to one score.
            written={"summary_type": "cls_index", "summary_use_proj": True, "summary_proj_to_labels": True},
            older=("multiple_choice_head.linear",),
        ),
    },
    bare_architecture="OpenAIGPTLMHeadModel",
)

# The arrays of a layer in the authors' format, in order. Positions and tokens come before the first layer.
ORIGINAL_LAYER = tuple(
    f"{module}.{leaf}"
    for module in ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
    for leaf in ("weight", "bias")
)
ORIGINAL_HEAD_SIZE = 64


def read(directory: Path, lowercase: bool = True) -> LoadedModel[GPTConfig, Tokenizer]:
    """The model in a directory of either format. `lowercase`: whether a vocab.txt without settings lower-cases."""
    source = directory / "config.json"
    settings = read_json(source) if source.is_file() else {}
    if (directory / ORIGINAL_GPT).is_file():
        settings = _original_settings(directory, "n_head" in settings) | settings
        return LAYOUT.read(directory, settings, _original_tensors(directory), lowercase=lowercase)
    tensors = huggingface.open_tensors(directory, lambda name: name.removeprefix(LAYOUT.prefix))
    tokens, head = "tokens_embed.weight", "lm_head.weight"
    if tokens not in tensors and head in tensors:
        tensors[tokens] = tensors[head]  # OpenAIGPTDoubleHeadsModel keeps only this copy.
    huggingface.require_tied(tensors, head, tokens, directory)
    return LAYOUT.read(directory, settings, tensors, lowercase=lowercase)


def _original_settings(directory: Path, has_num_heads: bool) -> dict[str, int]:
    """The settings that follow from the shapes of the arrays."""
    (positions, width), (vocab_size, _), *layers = _original_shapes(directory)
    if width % ORIGINAL_HEAD_SIZE and not has_num_heads:
        raise InputError(
            f"{directory}: the number of heads is not in this format, and {width} is not a multiple of "
            f'{ORIGINAL_HEAD_SIZE}, the size of GPT-1\'s heads; add a config.json with {{"n_head": …}}'
        )
    sizes = {"n_positions": positions, "n_embd": width, "vocab_size": vocab_size}
    return sizes | {"n_layer": len(layers) // len(ORIGINAL_LAYER), "n_head": width // ORIGINAL_HEAD_SIZE}


def _original_shapes(directory: Path) -> list[list[int]]:
    source = directory / ORIGINAL_GPT
    shapes = validation.read(list[list[VocabularySize]], read_json(source, list), source)
    if len(shapes) < 2 or len(shapes) % len(ORIGINAL_LAYER) != 2:
        raise InputError(f"{source}: {len(shapes)} arrays; a GPT has 2, and {len(ORIGINAL_LAYER)} per layer")
    if [len(shape) for shape in shapes[:2]] != [2, 2]:
        raise InputError(f"{source}: the first two arrays are {shapes[:2]}, but embeddings have two axes")
    # Kernels are those of convolutions of width 1: [1, in, out].
    return [shape[1:] if len(shape) == 3 else shape for shape in shapes]


def _original_tensors(directory: Path) -> huggingface.Tensors:
    """The arrays of the authors' format: concatenated into one vector, which is cut into files at any points."""
    shapes = _original_shapes(directory)
    layers = range(len(shapes) // len(ORIGINAL_LAYER))
    names = ["positions_embed.weight", "tokens_embed.weight"]
    names += [f"h.{layer}.{name}" for layer in layers for name in ORIGINAL_LAYER]
    files = sorted(directory.glob("params_[0-9]*.npy"), key=lambda file: (len(file.name), file.name))
    try:
        values = np.concatenate([*map(_load_array, files)] or [np.zeros(0)])
    except (EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{directory}: params_*.npy cannot be read as arrays ({error})") from error
    sizes = [math.prod(shape) for shape in shapes]
    if values.size != sum(sizes):
        raise InputError(
            f"{directory}: {values.size} numbers in {len(files)} files params_*.npy, but the shapes in "
            f"{ORIGINAL_GPT} ask for {sum(sizes)}"
        )
    flat = np.split(values, np.cumsum(sizes)[:-1])
    return {name: partial(np.reshape, array, shape) for name, array, shape in zip(names, flat, shapes, strict=True)}


def _load_array(path: Path) -> np.ndarray:
    with path.open("rb") as file:  # NumPy leaves a damaged one open.
        return np.load(file, allow_pickle=False)


FORMAT = LAYOUT.format(read, "text-generation", "The")
