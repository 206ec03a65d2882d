"""What directories in Hugging Face's format have in common: config.json, model.safetensors, a tokenizer's files."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from prelm_jax.errors import InputError
from prelm_jax.storage import read_json
from prelm_jax.tokenizers import load as tokenizers
from prelm_jax.tokenizers.base import Tokenizer

Tensors = dict[str, Callable[[], np.ndarray]]  # By name, a function that reads the tensor.


def require(settings: dict[str, Any], fixed: dict[str, Any], source: Path) -> None:
    """Raises InputError where a config.json says something else than what a model of ours does."""
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise InputError(f"{source}: {key} is {settings[key]!r}; only {value!r} is supported")


def open_tensors(directory: Path, rename: Callable[[str], str]) -> Tensors:
    """The tensors by their renamed names, from the one file or those that the index lists. Pickles are not read."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = [directory / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    elif (directory / "pytorch_model.bin").is_file():
        raise InputError(
            f"{directory}: pytorch_model.bin is a pickle, which is not read; load it with transformers, as the class "
            "under architectures in config.json, and save_pretrained it as safetensors"
        )
    else:
        raise InputError(f"{directory}: no model.safetensors")
    tensors = {}
    for file in files:
        try:
            opened = safe_open(file, framework="np")
            names = opened.keys()
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: cannot be read as safetensors ({error})") from error
        tensors |= {rename(name): partial(opened.get_tensor, name) for name in names}
    return tensors


def load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a directory; InputError where it has more entries than the model."""
    tokenizer = tokenizers.load(directory)
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} entries, but vocab_size in config.json is "
            f"{vocab_size}"
        )
    return tokenizer


def write(directory: Path, tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> None:
    """Writes model.safetensors, fp32, and config.json."""
    tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    # Not save_file, which makes a file that only its owner may read.
    (directory / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    text = json.dumps(settings | {"dtype": "float32"}, indent=2, sort_keys=True)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
