"""Hugging Face's format of model directories: config.json, model.safetensors and the files of a tokenizer."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar, Generic, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from prelm_jax.bounds import OutOfBounds
from prelm_jax.errors import InputError
from prelm_jax.formats.base import (
    HEAD_FILE,
    Format,
    LoadedModel,
    LoadedTask,
    abstract_params,
    checked,
    foreign_weights,
    require,
)
from prelm_jax.formats.heads import check_labels, has_names, join, read_head, split, write_head
from prelm_jax.formats.transfer import rows_of_prefix
from prelm_jax.models import heads
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.models.task import TaskModelConfig
from prelm_jax.storage import read_json
from prelm_jax.tokenizers import load as tokenizers
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.saved import read_max_length
from prelm_jax.training.parameters import path_name
from prelm_jax.validation import read

Tensors = dict[str, Callable[[], np.ndarray]]  # By name, a function that reads the tensor.

LEAVES = {"embedding": "weight", "kernel": "weight", "scale": "weight", "bias": "bias", "masked_lm_bias": "bias"}

PROBLEM_TYPES = {"single_label_classification": "label", "multi_label_classification": "labels", "regression": "number"}

Config = TypeVar("Config", bound=BertConfig | GPTConfig)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A class of transformers: an encoder with the head of a task."""

    head: heads.Config  # With the settings that the class implies; its number of classes is that of a directory.
    classifier: str  # The module of the classifier.
    dropout: str | None = None  # The key of the dropout before the classifier; None: the class has none.
    written: Mapping[str, object] = dataclasses.field(default_factory=dict)  # Further keys of config.json.
    older: tuple[str, ...] = ()  # Earlier names of that module.


@dataclasses.dataclass(frozen=True)
class Layout(Generic[Config]):
    """How config.json and the tensors correspond to the config and the parameters of one family."""

    config_class: type[Config]
    settings: Mapping[str, str]  # Field of the config -> key of config.json.
    fixed: Mapping[str, object]  # Keys of config.json of which only one value is supported.
    written: Mapping[str, object]  # Further keys that are written.
    modules: Mapping[str, str]  # Module of ours -> theirs, for modules outside of the layers.
    layers: tuple[str, str]  # The beginnings of the names of a layer, before its number, ours and theirs.
    layer_modules: Mapping[str, str]  # Module of a layer, ours -> theirs.
    vocabulary_tables: frozenset[str]  # Paths of the parameters whose first axis is the vocabulary.
    optional: tuple[str, ...] = ()  # Beginnings of paths that a directory may lack.
    transposed: bool = False  # Their kernels are [out, in]; ours are always [in, out].
    fused: tuple[str, ...] = ()  # Modules that are one tensor there, concatenated in this order along the last axis.
    prefix: str = ""  # Comes before every tensor's name in files that are written.
    architectures: Mapping[str, Architecture] = dataclasses.field(default_factory=dict)  # Classes with heads, by name.
    bare_architecture: str = ""  # The class of an encoder whose head is in a file of its own.

    def tensor_name(self, path: str) -> str:
        """The name of the tensor that holds the parameter at a path."""
        module, _, leaf = path.rpartition("/")
        ours, theirs = self.layers
        if module.startswith(ours):
            number, _, module = module.removeprefix(ours).partition("/")
            return f"{theirs}{number}.{self.layer_modules[module]}.{LEAVES[leaf]}"
        return f"{self.modules[module]}.{LEAVES[leaf]}"

    def read(
        self,
        directory: Path,
        settings: Mapping[str, object],
        tensors: Tensors,
        settings_file: str = "config.json",
        lowercase: bool = True,
    ) -> LoadedModel[Config, Tokenizer]:
        """The model of a directory with the contents of its file of settings and its tensors by name.

        `lowercase` is for a tokenizer without settings.
        """
        source = directory / settings_file
        require(settings, self.fixed, source)
        if settings.get("vocab_size") is None:
            raise InputError(f"{source}: no vocab_size")
        # Other writers leave out keys; our configs have the defaults of the format.
        fields = {field: settings[key] for field, key in self.settings.items() if key in settings}
        config = read(self.config_class, fields, source, keys=self.settings)
        self._check_layers(config.num_layers, tensors, source)
        tokenizer = tokenizers.load(directory, lowercase)
        if (size := tokenizer.vocab_size) > config.known_vocab_size:
            raise InputError(f"{source}: vocab_size is {config.vocab_size}, but the tokenizer has {size} tokens")
        missing = set()

        def parameter(path: tuple[object, ...], abstract: jax.ShapeDtypeStruct) -> Array:
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
                found = f"{directory}: tensor {name} is {list(tensor.shape)}"
                raise InputError(f"{found}, but {settings_file} asks for {list(shape)}")
            tensor = checked(tensor, f"{directory}: tensor {name}")
            if part is not None:
                tensor = np.split(tensor, len(self.fused), axis=-1)[part]
            if self._is_transposed(ours):
                tensor = tensor.T
            if ours in self.vocabulary_tables:
                tensor = np.pad(tensor, [(0, abstract.shape[0] - len(tensor))] + [(0, 0)] * (tensor.ndim - 1))
            return jnp.asarray(tensor)

        params = jax.tree_util.tree_map_with_path(parameter, abstract_params(config))
        return LoadedModel(config, params, tokenizer, frozenset(missing))

    def write(
        self,
        model: LoadedModel[Config, Tokenizer],
        directory: Path,
        head: Mapping[str, np.ndarray] = {},
        head_settings: Mapping[str, object] = {},
        max_length: int | None = None,
    ) -> None:
        """Writes model.safetensors (fp32), config.json and the tokenizer into an existing directory.

        head, head_settings: further tensors, and keys of config.json that come before others. max_length: at which
        readers truncate; None: all positions.

        InputError if a field of the config that the format lacks does not have its default.
        """
        for field, value in vars(model.config).items():
            if field not in self.settings and value != getattr(self.config_class, field):
                raise InputError(f"--model.{field} {value}: config.json has no such setting")
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
            name: np.ascontiguousarray(np.concatenate([by_part[i] for i in sorted(by_part, key=lambda i: i or 0)], -1))
            for name, by_part in parts.items()
        }
        tensors |= head
        # Not save_file, which makes a file that only its owner may read.
        (directory / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        settings = {key: getattr(model.config, field) for field, key in self.settings.items()}
        # Without a padding token transformers classifies no batch. GPT-1 has none: its unknown token rarely is last.
        pad_id = next((id for id in (model.tokenizer.pad_id, model.tokenizer.unknown_id) if id is not None), 0)
        settings |= {**self.written, "model_type": model.config.model_type, "dtype": "float32", "pad_token_id": pad_id}
        settings |= head_settings
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
        model.tokenizer.save(directory, max_length or model.config.max_position_embeddings)

    def read_task(
        self, read: Callable[[Path, bool], LoadedModel[Config, Tokenizer]], directory: Path, lowercase: bool = True
    ) -> LoadedTask[Tokenizer] | None:
        """The encoder and the head of a directory; None for one without a head. `read` reads the encoder.

        Raises InputError for a head without parameters: it was never trained.
        """
        if (directory / HEAD_FILE).is_file():
            return read_head(read(directory, lowercase), directory)
        source = directory / "config.json"
        settings = read_json(source) if source.is_file() else {}
        names = settings.get("architectures")
        name = names[0] if isinstance(names, list) and names else None
        if not isinstance(name, str) or name not in self.architectures:
            return None
        architecture, encoder = self.architectures[name], read(directory, lowercase)
        tensors = open_tensors(directory, lambda tensor: tensor)
        modules = (architecture.classifier, *architecture.older)
        module = next((module for module in modules if f"{module}.weight" in tensors), modules[0])

        def tensor(leaf: str) -> np.ndarray:
            tensor = f"{module}.{leaf}"
            if tensor not in tensors:
                raise InputError(f"{directory}: no tensor {tensor}, so the head of {name} was never trained")
            return checked(tensors[tensor](), f"{directory}: tensor {tensor}")

        kernel = tensor("weight").T
        head = _head(architecture, settings, kernel.shape[-1], encoder.config, source)
        labels = _labels(settings, kernel.shape[-1], source) if has_names(head) else ()
        check_labels(head, labels, source)
        parameters = {"classifier/kernel": kernel}
        if not isinstance(head, heads.Label) or head.bias:
            parameters["classifier/bias"] = tensor("bias")
        config = TaskModelConfig(encoder.config, head)
        positions = encoder.config.max_position_embeddings
        max_length = min(positions, read_max_length(directory) or positions)
        task = join(config, encoder, parameters, labels, max_length, directory)
        if task.missing:
            lacking = self.tensor_name(min(task.missing))
            raise InputError(f"{directory}: no tensor {lacking}, so what the head of {name} reads was never trained")
        return task

    def write_task(self, task: LoadedTask[Tokenizer], directory: Path) -> None:
        """Writes an encoder with the head of a task: as the class of transformers that has it, or head.safetensors."""
        model, parameters = split(task)
        encoder = cast(LoadedModel[Config, Tokenizer], model)
        head, max_length = task.config.head, task.max_length
        name = self.head_class(head)
        if name is None:
            self.write(encoder, directory, {}, {"architectures": [self.bare_architecture]}, max_length)
            write_head(task, directory)
            return
        architecture = self.architectures[name]
        settings: dict[str, object] = {"architectures": [name], **architecture.written}
        if architecture.dropout is not None:
            settings[architecture.dropout] = head.dropout
        if isinstance(head, heads.Label):
            settings["problem_type"] = next(each for each, kind in PROBLEM_TYPES.items() if kind == head.kind)
        if isinstance(head, heads.Label | heads.Tags):
            labels = task.labels or ("LABEL_0",)  # A number has no name; transformers wants one.
            settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
            settings["label2id"] = {label: i for i, label in enumerate(labels)}
        tensors = {
            f"{architecture.classifier}.{'weight' if path.endswith('kernel') else 'bias'}": np.ascontiguousarray(x.T)
            for path, x in parameters.items()
        }
        self.write(encoder, directory, tensors, settings, max_length)

    def head_class(self, head: heads.Config) -> str | None:
        """The class of transformers that has a head."""
        return next((name for name, each in self.architectures.items() if each.head == _plain(head)), None)

    def format(
        self, read: Callable[[Path, bool], LoadedModel[Config, Tokenizer]], task: str, example: str
    ) -> Format[Config, Tokenizer]:
        """The format; `task` and `example` are those of a pipeline of transformers."""
        code = f'from transformers import pipeline\n\npipeline("{task}", model="{{name}}")("{example}")'
        dropouts = {field.name for field in dataclasses.fields(self.config_class) if field.name.endswith("dropout")}
        return Format(
            read=read,
            write=self.write,
            read_task=partial(self.read_task, read),
            write_task=self.write_task,
            head_class=self.head_class,
            library="transformers",
            usage=f"```python\n{code}\n```",
            settings_file="config.json",
            settings_key="model_type",
            vocabulary_tables=self.vocabulary_tables,
            position_tables=frozenset({"position_embeddings/embedding"}),
            may_differ=frozenset({*dropouts, "vocab_size", "max_position_embeddings", "initializer_range"}),
            rows_to_copy=rows_of_prefix,
        )

    def _check_layers(self, number: int, tensors: Tensors, source: Path) -> None:
        """Raises InputError if the tensors are those of another number of layers."""
        layers = re.compile(rf"{re.escape(self.layers[1])}(\d+)\.")
        found = {int(match[1]) for name in tensors if (match := layers.match(name))}
        if number != (count := max(found, default=-1) + 1):
            raise InputError(f"{source}: {self.settings['num_layers']} is {number}, but {count} layers have tensors")

    def _is_transposed(self, path: str) -> bool:
        return self.transposed and path.endswith("/kernel")

    def _part(self, path: str) -> int | None:
        """The part of its fused tensor that a parameter is; None for a tensor of its own."""
        module = path.split("/")[-2] if "/" in path else ""
        return self.fused.index(module) if module in self.fused else None


def _head(
    architecture: Architecture,
    settings: Mapping[str, object],
    classes: int,
    config: BertConfig | GPTConfig,
    source: Path,
) -> heads.Config:
    """The head of a class of transformers, as config.json has it."""
    head, fields = architecture.head, dataclasses.asdict(architecture.head)
    if architecture.dropout is not None:
        dropout = settings.get(architecture.dropout)
        fields["dropout"] = config.hidden_dropout if dropout is None else dropout
    if isinstance(head, heads.Label):
        problem = settings.get("problem_type")
        if problem is None:  # As transformers decides where nothing says what the labels are.
            problem = "regression" if classes == 1 else "single_label_classification"
        if problem not in PROBLEM_TYPES:
            raise InputError(f"{source}: problem_type is {problem!r}: must be {' or '.join(PROBLEM_TYPES)}")
        if problem == "regression" and classes != 1:
            raise InputError(f"{source}: problem_type is {problem!r} of {classes} numbers; only one is supported")
        fields |= {"num_labels": classes, "kind": PROBLEM_TYPES[problem]}
    if isinstance(head, heads.Tags):
        fields["num_tags"] = classes
    return read(type(head), fields, source)


def _labels(settings: Mapping[str, object], classes: int, source: Path) -> tuple[str, ...]:
    """The names of the classes by number: of id2label, else of label2id, else those that transformers gives."""
    names, numbers = settings.get("id2label"), settings.get("label2id")
    if names is None and isinstance(numbers, dict):
        names = {str(number): name for name, number in numbers.items()}
    if names is None:
        names = {str(i): f"LABEL_{i}" for i in range(classes)}
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(classes)}:
        found = f"{len(names)} labels" if isinstance(names, dict) else "no object"
        raise InputError(f"{source}: id2label names {found}, but the classifier has {classes}, from 0 to {classes - 1}")
    return read(tuple[str, ...], [names[str(i)] for i in range(classes)], f"{source}: id2label")


def _plain(head: heads.Config) -> heads.Config:
    """The head without what transformers' classes leave open."""
    left_open = {"dropout", "num_labels", "kind", "num_tags"}
    fields = {name: value for name, value in dataclasses.asdict(head).items() if name not in left_open}
    return type(head)(**fields)


@dataclasses.dataclass(frozen=True)
class Index:
    """What is read of model.safetensors.index.json."""

    other_keys: ClassVar[bool] = True
    weight_map: dict[str, str]  # Name of a tensor -> name of its file.

    def check_together(self) -> None:
        """Raises OutOfBounds for what is not the name of a file in the same directory."""
        for tensor, name in self.weight_map.items():
            if not name.endswith(".safetensors") or set(name) & set("/\\\0"):
                raise OutOfBounds(("weight_map", tensor), name, "must be the name of a .safetensors file")


def open_tensors(directory: Path, rename: Callable[[str], str]) -> Tensors:
    """The tensors of model.safetensors, or of the files that the index lists, by their renamed names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = [directory / name for name in sorted(set(read(Index, read_json(index), index).weight_map.values()))]
    else:
        raise InputError(f"{directory}: no model.safetensors{foreign_weights(directory)}")
    tensors = {}
    for file in files:
        try:
            opened = safe_open(file, framework="np")
            names = opened.keys()
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: cannot be read as safetensors ({error})") from error
        tensors |= {rename(name): partial(_read_tensor, opened, name, file) for name in names}
    return tensors


def _read_tensor(opened: safe_open, name: str, file: Path) -> np.ndarray:
    try:
        return opened.get_tensor(name)
    except (AttributeError, TypeError, SafetensorError) as error:  # AttributeError for a type that NumPy lacks: fp8.
        raise InputError(f"{file}: {name} cannot be read ({error}); quantized models are not supported") from None


def require_tied(tensors: Tensors, head: str, table: str, directory: Path) -> None:
    """Raises InputError if a directory has a vocabulary projection that differs from its embedding table."""
    if head in tensors and table in tensors and not np.array_equal(tensors[head](), tensors[table]()):
        raise InputError(f"{directory}: {head} differs from {table}; only models that tie the two are supported")
