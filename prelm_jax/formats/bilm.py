"""ELMo in the format of its authors (allenai/bilm-tf): a directory with one `*options.json` and one `*weights.hdf5`.

Written: options.json and weights.hdf5 (fp32), with the datasets of bilm-tf's `dump_weights`, as bilm-tf and AllenNLP
read them, and vocab.txt, the words that the model was trained to predict. The format has no softmax: a run that
continues from such a directory begins with a fresh one, and `score` needs a work directory.
Read: any character-based model of the format, with or without vocab.txt.
"""

import json
import re
from pathlib import Path
from typing import cast

import h5py
import jax
import jax.numpy as jnp
import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.formats.base import (
    ELMO_OPTIONS,
    ELMO_WEIGHTS,
    HEAD_FILE,
    Format,
    LoadedModel,
    LoadedTask,
    abstract_params,
    checked,
    require,
)
from prelm_jax.formats.hdf5 import hdf5_file
from prelm_jax.formats.heads import read_head, split, write_head
from prelm_jax.formats.transfer import rows_of_tokens
from prelm_jax.models.elmo import ELMoConfig
from prelm_jax.storage import read_json
from prelm_jax.tokenizers.characters import MAX_CHARACTERS
from prelm_jax.tokenizers.words import SPECIAL_TOKENS, WordVocabulary
from prelm_jax.training.contract import Params
from prelm_jax.training.parameters import path_name
from prelm_jax.validation import read as read_value

# Parameter path (a regular expression) -> dataset. Layouts are equal, except that kernels of convolutions have an
# additional first axis of 1 there. As in ours, the bias of the forget gate lacks the 1 that is added to it.
LSTM_DATASETS = {"kernel": "W_0", "bias": "B", "projection/kernel": "W_P_0"}
DATASETS = {
    r"characters/embedding": r"char_embed",
    r"encoder/convolution_(\d+)/kernel": r"CNN/W_cnn_\1",
    r"encoder/convolution_(\d+)/bias": r"CNN/b_cnn_\1",
    r"encoder/highway_(\d+)/(carry|transform)/kernel": r"CNN_high_\1/W_\2",
    r"encoder/highway_(\d+)/(carry|transform)/bias": r"CNN_high_\1/b_\2",
    r"encoder/projection/kernel": r"CNN_proj/W_proj",
    r"encoder/projection/bias": r"CNN_proj/b_proj",
} | {
    rf"{direction}/layer_(\d+)/{ours}": rf"RNN_{number}/RNN/MultiRNNCell/Cell\1/LSTMCell/{theirs}"
    for number, direction in enumerate(("forward", "backward"))
    for ours, theirs in LSTM_DATASETS.items()
}

SOFTMAX = frozenset({"softmax/embedding", "softmax/bias"})


# Field of ELMoConfig -> keys in options.json.
FIELDS = {
    "character_embedding_size": ("char_cnn", "embedding", "dim"),
    "filters": ("char_cnn", "filters"),
    "activation": ("char_cnn", "activation"),
    "num_highways": ("char_cnn", "n_highway"),
    "hidden_size": ("lstm", "dim"),
    "projection_size": ("lstm", "projection_dim"),
    "num_layers": ("lstm", "n_layers"),
    "cell_clip": ("lstm", "cell_clip"),
    "projection_clip": ("lstm", "proj_clip"),
    "use_skip_connections": ("lstm", "use_skip_connections"),
}
# bilm-tf counts one more character id when it reads than when it trains, for padding between words; files have either.
NUM_CHARACTERS, NUM_CHARACTERS_IN_TRAINING = 262, 261


def dataset_name(path: str) -> str | None:
    """The name of the dataset that holds the parameter at a path; None for the softmax, which no dataset holds."""
    if path in SOFTMAX:
        return None
    return next(match.expand(name) for pattern, name in DATASETS.items() if (match := re.fullmatch(pattern, path)))


def read(directory: Path, lowercase: bool = False) -> LoadedModel[ELMoConfig, WordVocabulary | None]:
    """The model in a directory, without its softmax. `lowercase` is ignored: ELMo reads words as they are."""
    config = _read_config(_only(directory, ELMO_OPTIONS))
    params = _read_params(_only(directory, ELMO_WEIGHTS), config)
    vocabulary = directory / "vocab.txt"
    has_words = vocabulary.is_file() and WordVocabulary.at(vocabulary)
    return LoadedModel(config, params, WordVocabulary.from_directory(directory) if has_words else None, SOFTMAX)


def write(model: LoadedModel[ELMoConfig, WordVocabulary | None], directory: Path) -> None:
    """Writes a model into an existing directory, without its softmax."""
    with hdf5_file(directory / "weights.hdf5") as file:
        for path, value in jax.tree_util.tree_leaves_with_path(model.params):
            name = dataset_name(path_name(path))
            if name is None:
                continue
            tensor = np.asarray(value, np.float32)
            # Without times, so that the same model gives the same bytes.
            file.create_dataset(name, data=tensor[None] if name.startswith("CNN/W_") else tensor, track_times=False)
    text = json.dumps(_options(model.config), indent=2, sort_keys=True)
    (directory / "options.json").write_text(text + "\n", encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.save(directory)


def _only(directory: Path, pattern: str) -> Path:
    files = sorted(directory.glob(pattern))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        remedy = "; bilm-tf's bin/dump_weights.py writes it" if any(directory.glob("*.index")) else ""
        raise InputError(f"{directory}: an ELMo has exactly one file {pattern}, but here is {found}{remedy}")
    return files[0]


def _read_config(source: Path) -> ELMoConfig:
    options = read_json(source)
    if not isinstance(options.get("char_cnn"), dict):
        raise InputError(f"{source}: no char_cnn; only character-based models are supported")
    require(options, {"bidirectional": True}, source)
    require(options["char_cnn"], {"max_characters_per_token": MAX_CHARACTERS}, source)
    if options["char_cnn"].get("n_characters", NUM_CHARACTERS) != NUM_CHARACTERS_IN_TRAINING:
        require(options["char_cnn"], {"n_characters": NUM_CHARACTERS}, source)
    fields: dict[str, object] = {}
    for field, keys in FIELDS.items():
        value: object = options
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            raise InputError(f"{source}: {'.'.join(keys)} is missing")
        fields[field] = value
    # The format has no softmax; the config has one over the special tokens alone.
    fields["vocab_size"] = len(SPECIAL_TOKENS)
    return read_value(ELMoConfig, fields, source, keys={field: ".".join(keys) for field, keys in FIELDS.items()})


def _options(config: ELMoConfig) -> dict[str, object]:
    options: dict = {"char_cnn": {"max_characters_per_token": MAX_CHARACTERS, "n_characters": NUM_CHARACTERS}}
    for field, keys in FIELDS.items():
        group = options
        for key in keys[:-1]:
            group = group.setdefault(key, {})
        group[keys[-1]] = getattr(config, field)
    return options


def _read_params(source: Path, config: ELMoConfig) -> Params:
    """The parameters in a file of weights, fp32; the softmax is zeros."""

    def parameter(path: tuple[object, ...], abstract: jax.ShapeDtypeStruct) -> np.ndarray:
        name, shape = dataset_name(path_name(path)), abstract.shape
        if name is None:
            return np.zeros(shape, np.float32)
        if name.startswith("CNN/W_"):
            shape = (1, *shape)
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise InputError(f"{source}: no dataset {name} {list(shape)}; is this a complete ELMo?")
        if dataset.shape != shape or dataset.dtype.kind != "f":
            found = f"{list(dataset.shape or ())} of {dataset.dtype}"
            raise InputError(f"{source}: dataset {name} is {found}, but the options ask for {list(shape)} of float32")
        return checked(dataset[()], f"{source}: dataset {name}").reshape(abstract.shape)

    try:
        with h5py.File(source) as file:
            # Also of more layers than are read, and before many layers are traced.
            for group, layer, number in (
                ("RNN_0/RNN/MultiRNNCell", "Cell", config.num_layers),
                ("/", "CNN_high_", config.num_highways),
            ):
                cells = file.get(group)
                count = sum(name.startswith(layer) for name in cells) if isinstance(cells, h5py.Group) else 0
                if count != number:
                    raise InputError(f"{source}: {count} groups {layer}…, but the options ask for {number} layers")
            arrays = jax.tree_util.tree_map_with_path(parameter, abstract_params(config))
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:  # h5py raises any for a damaged file.
        raise InputError(f"{source}: cannot be read as HDF5 ({error})") from error
    return jax.tree.map(jnp.asarray, arrays)


def read_task(directory: Path, lowercase: bool = False) -> LoadedTask[WordVocabulary | None] | None:
    """The model in a directory with its head; None for a directory without one."""
    return read_head(read(directory), directory) if (directory / HEAD_FILE).is_file() else None


def write_task(task: LoadedTask[WordVocabulary | None], directory: Path) -> None:
    """Writes a model with the head of a task, which the format has no place for, into an existing directory."""
    encoder, _ = split(task)
    write(cast(LoadedModel[ELMoConfig, WordVocabulary | None], encoder), directory)
    write_head(task, directory)


FORMAT = Format(
    read=read,
    write=write,
    read_task=read_task,
    write_task=write_task,
    head_class=lambda head: None,
    library="allennlp",
    usage="""```python
from allennlp.modules.elmo import Elmo, batch_to_ids

elmo = Elmo("{name}/options.json", "{name}/weights.hdf5", num_output_representations=1)
elmo(batch_to_ids([["The", "cat", "sat", "."]]))
```""",
    settings_file="options.json",
    settings_key="char_cnn",
    vocabulary_tables=SOFTMAX,
    position_tables=frozenset(),
    may_differ=frozenset({"vocab_size", "dropout"}),
    rows_to_copy=rows_of_tokens,
)
