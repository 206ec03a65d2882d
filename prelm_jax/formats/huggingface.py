"""Hugging Face's format of model directories: config.json, model.safetensors and the files of a tokenizer."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from prelm_jax.errors import InputError
from prelm_jax.formats.base import Config, LoadedModel, ModelConfig, abstract_params, require
from prelm_jax.storage import read_json
from prelm_jax.tokenizers import load as tokenizers
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import Params
from prelm_jax.training.parameters import path_name

Tensors = dict[str, Callable[[], np.ndarray]]  # By name, a function that reads the tensor.

LEAVES = {"embedding": "weight", "kernel": "weight", "scale": "weight", "bias": "bias", "masked_lm_bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How config.json and the tensors correspond to the config and the parameters of one family."""

    settings: Mapping[str, str]  # Field of the config -> key of config.json.
    fixed: Mapping[str, object]  # Keys of config.json of which only one value is supported.
    modules: Mapping[str, str]  # Module of ours -> theirs, for modules outside of the layers.
    layers: tuple[str, str]  # The beginnings of the names of a layer, before its number, ours and theirs.
    layer_modules: Mapping[str, str]  # Module of a layer, ours -> theirs.
    vocabulary_tables: frozenset[str]  # Paths of the parameters whose first axis is the vocabulary.
    optional: tuple[str, ...] = ()  # Beginnings of paths that a directory may lack.
    transposed: bool = False  # Their kernels are [out, in]; ours are always [in, out].
    prefix: str = ""  # Comes before every tensor's name in files that are written.
    fused: tuple[str, ...] = ()  # Modules that are one tensor there, concatenated in this order along the last axis.

    def tensor_name(self, path: str) -> str:
        """The name of the tensor that holds the parameter at a path."""
        module, _, leaf = path.rpartition("/")
        ours, theirs = self.layers
        if module.startswith(ours):
            number, _, module = module.removeprefix(ours).partition("/")
            return f"{theirs}{number}.{self.layer_modules[module]}.{LEAVES[leaf]}"
        return f"{self.modules[module]}.{LEAVES[leaf]}"

    def read_config(self, config_class: Callable[..., Config], settings: Mapping[str, object], source: Path) -> Config:
        """The config of the settings in a config.json at `source`."""
        require(settings, self.fixed, source)
        if "vocab_size" not in settings:
            raise InputError(f"{source}: no vocab_size")
        # Other writers leave out keys; the defaults of our configs are those of the format.
        return config_class(**{field: settings[key] for field, key in self.settings.items() if key in settings})

    def read_params(self, tensors: Tensors, config: ModelConfig, directory: Path) -> tuple[Params, frozenset[str]]:
        """The parameters, fp32, and the paths of missing ones, which are zeros."""
        missing = set()

        def read(path: tuple[object, ...], abstract: jax.ShapeDtypeStruct) -> Array:
            ours, shape = path_name(path), abstract.shape
            name, part = self.tensor_name(ours), self._part(ours)
            if name not in tensors and ours.startswith(self.optional):
                missing.add(ours)
                return jnp.zeros(shape)
            if ours in self.vocabulary_tables:
                shape = (config.vocab_size, *shape[1:])
            if self._is_transposed(ours):
                shape = shape[::-1]
            if part is not None:
                shape = (*shape[:-1], len(self.fused) * shape[-1])
            if name not in tensors:
                raise InputError(f"{directory}: no tensor {name} {list(shape)}; is this a complete model?")
            tensor = tensors[name]()
            if tensor.shape != shape:
                raise InputError(
                    f"{directory}: tensor {name} is {list(tensor.shape)}, but config.json asks for {list(shape)}"
                )
            tensor = tensor.astype(np.float32)
            if part is not None:
                tensor = np.split(tensor, len(self.fused), axis=-1)[part]
            if self._is_transposed(ours):
                tensor = tensor.T
            if ours in self.vocabulary_tables:
                tensor = np.pad(tensor, [(0, abstract.shape[0] - len(tensor))] + [(0, 0)] * (tensor.ndim - 1))
            return jnp.asarray(tensor)

        return jax.tree_util.tree_map_with_path(read, abstract_params(config)), frozenset(missing)

    def write(
        self,
        model: LoadedModel[Config, Tokenizer],
        directory: Path,
        extra: Mapping[str, object],
        max_length: int,
    ) -> None:
        """Writes model.safetensors (fp32), config.json with `extra` settings, and the tokenizer for `max_length`."""
        parts: dict[str, dict[int | None, np.ndarray]] = {}
        for path, value in jax.tree_util.tree_leaves_with_path(model.params):
            ours, tensor = path_name(path), np.asarray(value, np.float32)
            if ours in model.missing:
                continue
            if ours in self.vocabulary_tables:
                tensor = tensor[: model.config.vocab_size]
            if self._is_transposed(ours):
                tensor = tensor.T
            parts.setdefault(self.prefix + self.tensor_name(ours), {})[self._part(ours)] = tensor
        tensors = {
            name: np.concatenate([by_part[i] for i in sorted(by_part, key=lambda i: i or 0)], axis=-1)
            for name, by_part in parts.items()
        }
        # Not save_file, which makes a file that only its owner may read.
        (directory / "model.safetensors").write_bytes(
            save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata={"format": "pt"})
        )
        settings = {key: getattr(model.config, field) for field, key in self.settings.items()}
        settings |= {"model_type": model.config.model_type, "dtype": "float32", **extra}
        text = json.dumps(settings, indent=2, sort_keys=True)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")
        model.tokenizer.save(directory, model_max_length=max_length)

    def _is_transposed(self, path: str) -> bool:
        return self.transposed and path.endswith("/kernel")

    def _part(self, path: str) -> int | None:
        """The part of its fused tensor that a parameter is; None for a tensor of its own."""
        module = path.split("/")[-2] if "/" in path else ""
        return self.fused.index(module) if module in self.fused else None


def open_tensors(directory: Path, rename: Callable[[str], str]) -> Tensors:
    """The tensors of model.safetensors, or of the files that the index lists, by their renamed names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = [directory / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    elif (directory / "pytorch_model.bin").is_file():
        raise InputError(
            f"{directory}: pytorch_model.bin is a pickle, which is never read; load it with transformers, as the class "
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


def require_tied(tensors: Tensors, head: str, table: str, directory: Path) -> None:
    """Raises InputError if a directory has a vocabulary projection that differs from its embedding table."""
    if head in tensors and table in tensors and not np.array_equal(tensors[head](), tensors[table]()):
        raise InputError(f"{directory}: {head} differs from {table}; only models that tie the two are supported")


def load_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a directory; InputError if it has more tokens than the model."""
    tokenizer = tokenizers.load(directory)
    if config.vocab_size is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, but vocab_size in config.json is "
            f"{config.vocab_size}"
        )
    return tokenizer
