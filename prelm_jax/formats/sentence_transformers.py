"""Directories of sentence-transformers: a model directory, and how a text becomes one vector.

modules.json                      the modules, in order: Transformer, Pooling, then any of Dense and Normalize
1_Pooling/config.json             the poolings: a switch for each (before version 5.4), or `pooling_mode`
2_Dense/config.json               with the weights in model.safetensors; only activations of torch
sentence_bert_config.json         `max_seq_length` and `do_lower_case`, which version 5.4 leaves to the tokenizer
config_sentence_transformers.json prompts by name

Both forms are read. The old one is written: it is read by all versions and by text-embeddings-inference.
"""

import dataclasses
import json
from pathlib import Path, PurePosixPath
from typing import ClassVar, get_args

import numpy as np

from prelm_jax.bounds import Length, Size
from prelm_jax.errors import InputError
from prelm_jax.formats.base import (
    Activation,
    Config,
    Dense,
    LoadedModel,
    Normalize,
    PoolingMode,
    TextVectors,
    Vocabulary,
    checked,
)
from prelm_jax.formats.huggingface import open_tensors
from prelm_jax.storage import read_json
from prelm_jax.tokenizers.saved import read_max_length
from prelm_jax.validation import read

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
# The file's name depends on the class of the encoder with which the model was saved first.
ENCODER_SETTINGS = tuple(f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "xlm-roberta"))
LIBRARY = "sentence_transformers."
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
SUPPORTED = "Transformer, Pooling, Dense, Normalize"

# The old form's switches, in the order in which their poolings are concatenated.
SWITCHES: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean-sqrt",
    "pooling_mode_weightedmean_tokens": "weighted-mean",
    "pooling_mode_lasttoken": "last",
}
MODES: dict[object, PoolingMode] = {  # The new form's names.
    **{"cls": "cls", "max": "max", "mean": "mean", "mean_sqrt_len_tokens": "mean-sqrt"},
    **{"weightedmean": "weighted-mean", "lasttoken": "last"},
}
OLDEST_SWITCHES = 4  # Known to the first versions, in another order.


@dataclasses.dataclass(frozen=True)
class _Module:
    other_keys: ClassVar[bool] = True
    type: str
    path: str = ""

    @property
    def name(self) -> str:
        """The name of a class of the library; else its full name."""
        return self.type.rpartition(".")[2] if self.type.startswith(LIBRARY) else self.type


@dataclasses.dataclass(frozen=True)
class _Encoder:
    other_keys: ClassVar[bool] = True
    max_seq_length: Length | None = None
    do_lower_case: bool = False
    transformer_task: str = "feature-extraction"


@dataclasses.dataclass(frozen=True)
class _Dense:
    other_keys: ClassVar[bool] = True
    in_features: Size
    out_features: Size
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    use_residual: bool = False


@dataclasses.dataclass(frozen=True)
class _Prompts:
    other_keys: ClassVar[bool] = True
    prompts: dict[str, str | None] = dataclasses.field(default_factory=dict)
    default_prompt_name: str | None = None


def encoder_directory(directory: Path) -> Path:
    """Where the model directory of the encoder is: the directory itself, or the folder that modules.json names."""
    if (directory / "config.json").is_file() or not (directory / MODULES).is_file():
        return directory
    return _folder(directory, _read_modules(directory)[0])


def read_vectors(directory: Path, width: int) -> TextVectors:
    """How a text becomes one vector, from a directory whose encoder has hidden states of `width`.

    Without modules.json it is the mean of the last layer, as in sentence-transformers. Raises InputError for a module
    or a setting that is not supported, naming the file.
    """
    encoder = encoder_directory(directory)
    if not (directory / MODULES).is_file():
        return TextVectors(max_length=read_max_length(encoder))
    modules = _read_modules(directory)
    if [module.name for module in modules[:2]] != ["Transformer", "Pooling"]:
        found = ", ".join(module.name for module in modules)
        raise InputError(f"{directory / MODULES}: the modules are {found}; a Transformer and a Pooling must come first")
    modes, include_prompt = _read_pooling(_folder(directory, modules[1]), width)
    size, dense = width * len(modes), []
    for module in modules[2:]:
        folder = _folder(directory, module)
        _require_sentence_embedding(folder)
        if module.name == "Normalize":
            dense.append(Normalize())
        elif module.name == "Dense":
            dense.append(_read_dense(folder, size))
            size = dense[-1].kernel.shape[1]
        else:
            raise InputError(f"{directory / MODULES}: {module.type} is not supported here; supported: {SUPPORTED}")
    normalize = bool(dense) and isinstance(dense[-1], Normalize)
    if normalize:
        dense.pop()
    source = next((file for name in ENCODER_SETTINGS if (file := encoder / name).is_file()), None)
    settings = read(_Encoder, {} if source is None else read_json(source), source)
    if settings.transformer_task != "feature-extraction":
        raise InputError(f"{source}: transformer_task is {settings.transformer_task}; only feature-extraction is read")
    prompts = directory / PROMPTS
    given = read(_Prompts, read_json(prompts) if prompts.is_file() else {}, prompts)
    texts = {name: text or "" for name, text in given.prompts.items()}
    if given.default_prompt_name is not None and given.default_prompt_name not in texts:
        raise InputError(f"{prompts}: default_prompt_name is {given.default_prompt_name!r}, which is not in prompts")
    return TextVectors(
        modes,
        tuple(dense),
        normalize,
        settings.max_seq_length or read_max_length(encoder),
        settings.do_lower_case,
        texts,
        given.default_prompt_name,
        include_prompt,
    )


def require_bert(model: LoadedModel[Config, Vocabulary]) -> None:
    """Raises InputError for a model of another family: text-embeddings-inference does not read it."""
    if model.config.model_type != "bert":
        raise InputError(f"--sentence-transformers: the model is {model.config.model_type}; only BERT is supported")


def write_vectors(model: LoadedModel[Config, Vocabulary], directory: Path) -> None:
    """Adds to a BERT's directory what makes it one of sentence-transformers: the mean of the last layer."""
    width, positions = getattr(model.config, "hidden_size", 0), getattr(model.config, "max_position_embeddings", 0)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{LIBRARY}models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{LIBRARY}models.Pooling"},
    ]
    switches = {key: mode == "mean" for key, mode in list(SWITCHES.items())[:OLDEST_SWITCHES]}
    for name, content in {
        ENCODER_SETTINGS[0]: {"max_seq_length": positions, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": width, **switches},
        MODULES: modules,
    }.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_modules(directory: Path) -> tuple[_Module, ...]:
    source = directory / MODULES
    modules = read(tuple[_Module, ...], read_json(source, list), source)
    if not modules:
        raise InputError(f"{source} names no modules")
    return modules


def _folder(directory: Path, module: _Module) -> Path:
    """The folder of a module. Raises InputError for one outside of the directory."""
    path = PurePosixPath(module.path)
    if path.is_absolute() or ".." in path.parts or "\0" in module.path:
        raise InputError(f"{directory / MODULES}: the path {module.path!r} leads out of the directory")
    return directory / path


def _read_pooling(folder: Path, width: int) -> tuple[tuple[PoolingMode, ...], bool]:
    """The modes in the order of their concatenation, and whether the prompt is pooled."""
    source = folder / "config.json"
    settings = read_json(source)
    found = settings.get("word_embedding_dimension", settings.get("embedding_dimension"))
    if found != width:
        raise InputError(f"{source}: the pooling is of {found} numbers, but the encoder's hidden states have {width}")
    include_prompt = read(bool, settings.get("include_prompt", True), f"{source}: include_prompt")
    names = settings.get("pooling_mode")
    if names is None:
        return tuple(mode for key, mode in SWITCHES.items() if settings.get(key)) or ("mean",), include_prompt
    names = names if isinstance(names, list) else [names]
    for name in names:
        if not isinstance(name, str) or name not in MODES:
            raise InputError(f"{source}: pooling_mode is {name!r}; supported: {', '.join(map(str, MODES))}")
    if not names:
        raise InputError(f"{source}: pooling_mode is empty; supported: {', '.join(map(str, MODES))}")
    return tuple(MODES[name] for name in names), include_prompt


def _read_dense(folder: Path, size: int) -> Dense:
    """A dense layer for vectors of `size`."""
    source = folder / "config.json"
    settings = read(_Dense, read_json(source), source)
    if settings.in_features != size:
        raise InputError(f"{source}: in_features is {settings.in_features}, but the vectors before it have {size}")
    library, _, name = settings.activation_function.rpartition(".")
    activation = next((known for known in ACTIVATIONS if known == name and library.startswith("torch.nn")), None)
    if activation is None:
        allowed = f"supported are torch's {', '.join(ACTIVATIONS)}"
        raise InputError(f"{source}: activation_function is {settings.activation_function!r}; {allowed}")
    tensors = open_tensors(folder, lambda name: name)
    shape = (settings.out_features, settings.in_features)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise InputError(f"{folder}: no tensor {name} {list(shape)}")
        value = checked(tensors[name](), f"{folder}: tensor {name}")
        if value.shape != shape:
            raise InputError(
                f"{folder}: tensor {name} is {list(value.shape)}, but {source.name} asks for {list(shape)}"
            )
        return np.ascontiguousarray(value.T)

    kernel, bias = tensor("linear.weight", shape), tensor("linear.bias", shape[:1]) if settings.bias else None
    projected = settings.use_residual and shape[0] != shape[1]
    projection = tensor("residual.weight", shape) if projected else None
    return Dense(kernel, bias, activation, settings.use_residual, projection)


def _require_sentence_embedding(folder: Path) -> None:
    """Raises InputError for a module that reads or writes something else than the vector of a text."""
    source = folder / "config.json"  # A Normalize need not have one.
    settings = read_json(source) if source.is_file() else {}
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key) not in (None, "sentence_embedding"):
            raise InputError(f"{source}: {key} is {settings[key]!r}; only 'sentence_embedding' is supported")
