"""Heads of tasks in model directories: those of transformers' classes, and a file of our own for all others.

A directory has a `head.safetensors` where the published format of the encoder has no place for the head: a head with a
conditional random field, LSTMs or a mix of layers, GPT-1's head for tags, and every head of ELMo. Its tensors have
torch's layouts (kernels are [out, in], the gates of an LSTM i, f, g, o), so that torch.nn.LSTM and torch.nn.Linear load
them; its metadata has the config of the head, the labels and the longest text as JSON.

    scalar_mix.gamma [1], scalar_mix.scalar_parameters.0 [1], …         as in AllenNLP's ScalarMix
    lstm.weight_ih_l0, lstm.weight_hh_l0_reverse, lstm.bias_ih_l0, …    as in torch.nn.LSTM, both directions
    classifier.weight, classifier.bias
    crf.transitions [from, to], crf.start_transitions, crf.end_transitions
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from prelm_jax.bounds import Length
from prelm_jax.errors import InputError
from prelm_jax.formats.base import (
    HEAD_FILE,
    Config,
    LoadedModel,
    LoadedTask,
    ModelConfig,
    Vocabulary,
    abstract_params,
    checked,
)
from prelm_jax.models import heads
from prelm_jax.models.task import HEAD, EncoderConfig, TaskModelConfig
from prelm_jax.training.parameters import path_name
from prelm_jax.validation import read

HEADS = {head.__name__: head for head in (heads.Label, heads.Choice, heads.Tags, heads.Span)}
CLASSIFIER = "classifier"
GATES = (0, 2, 1, 3)  # Of ours (input, candidate, forget, output) in the order of torch's, and back.


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What the metadata of head.safetensors says besides the config of the head."""

    labels: tuple[str, ...]
    max_length: Length | None


def join(
    config: TaskModelConfig,
    encoder: LoadedModel[Config, Vocabulary],
    head: Mapping[str, np.ndarray],
    labels: tuple[str, ...],
    max_length: int | None,
    source: object = "the head",
) -> LoadedTask[Vocabulary]:
    """An encoder with a head, whose parameters come by their paths without "head/".

    Raises InputError, naming the source, for parameters that do not fit the config.
    """
    abstract = abstract_params(config)
    wanted = {path_name(path): list(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(abstract)}
    found = {f"{HEAD}{path}": list(value.shape) for path, value in head.items()}
    for path in sorted(found | {path: shape for path, shape in wanted.items() if path.startswith(HEAD)}):
        if found.get(path) != wanted.get(path):
            shapes = f"is {found.get(path, 'nothing')}, but its settings ask for {wanted.get(path, 'nothing')}"
            raise InputError(f"{source}: {path} {shapes}")
    values = {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(encoder.params)}
    values |= {f"{HEAD}{path}": jnp.asarray(value) for path, value in head.items()}
    params = jax.tree_util.tree_map_with_path(lambda path, _: values[path_name(path)], abstract)
    paths = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    return LoadedTask(config, params, encoder.tokenizer, encoder.missing & paths, labels, max_length)


def split(task: LoadedTask[Vocabulary]) -> tuple[LoadedModel[ModelConfig, Vocabulary], dict[str, np.ndarray]]:
    """The model without its head, and the parameters of the head by their paths without "head/".

    What only pretraining needs is missing in the model, as where a directory lacks it.
    """
    values = {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(task.params)}
    missing = set(task.missing)

    def parameter(path: tuple[object, ...], abstract: jax.ShapeDtypeStruct) -> jax.Array:
        name = path_name(path)
        if name not in values:
            missing.add(name)
            return jnp.zeros(abstract.shape, abstract.dtype)
        return values[name]

    encoder = cast(ModelConfig, task.config.encoder)
    params = jax.tree_util.tree_map_with_path(parameter, abstract_params(encoder))
    head = {path.removeprefix(HEAD): np.asarray(x, np.float32) for path, x in values.items() if path.startswith(HEAD)}
    return LoadedModel(encoder, params, task.tokenizer, frozenset(missing)), head


def write_head(task: LoadedTask[Vocabulary], directory: Path) -> None:
    """Writes head.safetensors into an existing directory."""
    _, head = split(task)
    config = {"class": type(task.config.head).__name__, **dataclasses.asdict(task.config.head)}
    settings = {"head": config, "labels": task.labels, "max_length": task.max_length}
    metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in settings.items()}
    (directory / HEAD_FILE).write_bytes(save(_to_torch(head), metadata={"format": "pt", **metadata}))


def read_head(encoder: LoadedModel[Config, Vocabulary], directory: Path) -> LoadedTask[Vocabulary]:
    """The encoder of a directory with the head that its head.safetensors holds."""
    source = directory / HEAD_FILE
    try:
        with safe_open(source, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (AttributeError, OSError, SafetensorError, TypeError) as error:  # The first for a type that NumPy lacks.
        raise InputError(f"{source}: cannot be read as safetensors ({error})") from error
    try:
        settings = {name: json.loads(metadata[name]) for name in ("head", "labels", "max_length")}
        head_class = HEADS[settings["head"].pop("class")]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source}: its metadata describes no head ({error!r})") from None
    head = cast(heads.Config, read(head_class, settings.pop("head"), source))
    found = read(Metadata, settings, source)
    config = TaskModelConfig(cast(EncoderConfig, encoder.config), head)
    check_labels(head, found.labels, source)
    params = _from_torch({name: checked(x, f"{source}: tensor {name}") for name, x in tensors.items()})
    return join(config, encoder, params, found.labels, found.max_length, source)


def has_names(head: heads.Config) -> bool:
    """Whether the classes of a head are labels with names."""
    return isinstance(head, heads.Tags) or (isinstance(head, heads.Label) and head.kind != "number")


def check_labels(head: heads.Config, labels: tuple[str, ...], source: object) -> None:
    """Raises InputError unless a head has a distinct name for each of its classes."""
    classes = 0
    if has_names(head):
        classes = head.num_labels if isinstance(head, heads.Label) else getattr(head, "num_tags", 0)
    if len(labels) != classes:
        raise InputError(f"{source}: {len(labels)} labels have names, but the head has {classes} classes")
    if len(set(labels)) != len(labels):
        repeated = next(name for name in labels if labels.count(name) > 1)
        raise InputError(f"{source}: two labels have the name {repeated!r}")


def _to_torch(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters of a head by the names and in the layouts of head.safetensors."""
    tensors: dict[str, np.ndarray] = {}
    for path, value in params.items():
        if lstm := re.fullmatch(r"lstm_(\d+)/(forward|backward)/(kernel|bias)", path):
            suffix = f"l{lstm[1]}{'_reverse' if lstm[2] == 'backward' else ''}"
            if lstm[3] == "kernel":
                size = value.shape[1] // 4
                tensors[f"lstm.weight_ih_{suffix}"] = _reorder(value[:-size]).T
                tensors[f"lstm.weight_hh_{suffix}"] = _reorder(value[-size:]).T
            else:  # Ours lacks the 1 that is added to the forget gate: it is the second of torch's two biases.
                tensors[f"lstm.bias_ih_{suffix}"] = _reorder(value)
                tensors[f"lstm.bias_hh_{suffix}"] = np.repeat(np.array([0, 1, 0, 0], np.float32), len(value) // 4)
        elif path == "scalar_mix/weights":
            tensors |= {f"scalar_mix.scalar_parameters.{i}": x.reshape(1) for i, x in enumerate(value)}
        elif path == "scalar_mix/gamma":
            tensors["scalar_mix.gamma"] = value.reshape(1)
        elif path.endswith("transitions"):
            tensors[f"crf.{path}"] = value
        else:
            tensors[f"{CLASSIFIER}.{'weight' if path.endswith('kernel') else 'bias'}"] = value.T
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def _from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of a head by their paths; of tensors that are none nothing, of shapes that cannot be anything."""
    params: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if lstm := re.fullmatch(r"lstm\.(weight|bias)_ih_l(\d+)(_reverse)?", name):
            other = tensors.get(name.replace("_ih_", "_hh_"))
            if other is None or other.shape[:1] != value.shape[:1]:
                continue
            path = f"lstm_{lstm[2]}/{'backward' if lstm[3] else 'forward'}"
            if lstm[1] == "weight":
                params[f"{path}/kernel"] = _reorder(np.concatenate([value, other], 1).T)
            else:
                ones = np.repeat(np.array([0, 1, 0, 0], np.float32), len(value) // 4)
                params[f"{path}/bias"] = _reorder(value + (other - ones))
        elif name.startswith("crf."):
            params[name.removeprefix("crf.")] = value
        elif name == "scalar_mix.gamma":
            params["scalar_mix/gamma"] = value.reshape(())
        elif name.startswith(f"{CLASSIFIER}."):
            params[f"{CLASSIFIER}/{'kernel' if name.endswith('weight') else 'bias'}"] = value.T
    weights = [tensors.get(f"scalar_mix.scalar_parameters.{i}") for i in range(len(tensors))]
    if found := [x.reshape(-1) for x in weights if x is not None]:
        params["scalar_mix/weights"] = np.concatenate(found)
    return params


def _reorder(x: np.ndarray) -> np.ndarray:
    """The gates along the last axis in the other order."""
    parts = np.split(x, 4, axis=-1)
    return np.concatenate([parts[i] for i in GATES], -1)
