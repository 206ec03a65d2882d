"""Model directories: their content once loaded, the definition of a published format, and how a directory is saved."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

import jax
import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.models import heads
from prelm_jax.models.task import TaskModelConfig
from prelm_jax.storage import read_json
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import Model, Params

# Directories without a config.json are recognized by these files.
ORIGINAL_GPT = "params_shapes.json"  # GPT-1, as its authors published it
ORIGINAL_BERT = "bert_config.json"  # BERT, as its authors published it: a TensorFlow checkpoint
ELMO_OPTIONS, ELMO_WEIGHTS = "*options.json", "*weights.hdf5"  # ELMo; exactly one of each
HEAD_FILE = "head.safetensors"  # A head that the format of its encoder has no place for, see `prelm_jax.formats.heads`.
# What only some models have, and what would be read with another one that is saved over it.
OPTIONAL_FILES = (
    *(HEAD_FILE, "vocab.txt", "vocab.json", "merges.txt", "spiece.model"),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
)


class ModelConfig(Protocol):
    """The config of a model, a frozen dataclass."""

    model_type: ClassVar[str]

    @property
    def vocab_size(self) -> int | None: ...

    @property
    def num_layers(self) -> int: ...

    def build(self) -> Model: ...


Config = TypeVar("Config", bound=ModelConfig | TaskModelConfig)
Vocabulary = TypeVar("Vocabulary", bound=Tokenizer | None)


# How the hidden states of tokens become one vector; "weighted-mean": weights are positions, "mean-sqrt": sum / sqrt(n).
PoolingMode = Literal["cls", "max", "mean", "mean-sqrt", "weighted-mean", "last"]
Activation = Literal["Identity", "Tanh", "ReLU", "GELU", "Sigmoid"]  # Classes of torch.nn.


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """A layer on the vector x of a text: activation(x kernel + bias), and if `residual` plus x, or x projection."""

    kernel: np.ndarray  # [in, out]
    bias: np.ndarray | None
    activation: Activation = "Tanh"
    residual: bool = False
    projection: np.ndarray | None = None  # [in, out], if sizes differ.


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Division of the vector of a text by its Euclidean norm."""


@dataclasses.dataclass(frozen=True, eq=False)
class TextVectors:
    """How a text becomes one vector; by default the mean of the last layer, as sentence-transformers does."""

    modes: tuple[PoolingMode, ...] = ("mean",)  # Concatenated.
    dense: tuple[Dense | Normalize, ...] = ()  # Applied to the vector, one after the other.
    normalize: bool = False  # Whether the vector is normalized last.
    max_length: int | None = None  # Longest text, in tokens with the special ones; None: all positions.
    lowercase: bool = False  # Whether a text is lower-cased, whatever the tokenizer does.
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # Name -> what comes before a text.
    default_prompt: str | None = None  # The name of the prompt that is used where none is named.
    include_prompt: bool = True  # Whether the tokens of the prompt are pooled.


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel(Generic[Config, Vocabulary]):
    """A config, its parameters and a tokenizer, from a model directory or a work directory."""

    config: Config
    params: Params = dataclasses.field(repr=False)  # The tree of the pretraining model, fp32, vocabulary tables padded.
    tokenizer: Vocabulary  # None for an ELMo directory without a vocabulary.
    missing: frozenset[str] = frozenset()  # Paths ("pooler/kernel") that the directory lacks; zeros in `params`.
    vectors: TextVectors = dataclasses.field(default=TextVectors(), kw_only=True)


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedTask(LoadedModel[TaskModelConfig, Vocabulary]):
    """An encoder and the head of a task, with what turns examples into inputs and scores into predictions."""

    labels: tuple[str, ...] = ()  # Names of classes or tags by number; none for numbers, choices and spans.
    max_length: int | None = None  # Longest text, in tokens with the special ones; None: any.


@dataclasses.dataclass(frozen=True)
class Format(Generic[Config, Vocabulary]):
    """A published format of model directories, for one family of models."""

    # (directory, whether a vocab.txt without settings lower-cases); InputError for missing or misshapen contents.
    read: Callable[[Path, bool], LoadedModel[Config, Vocabulary]]
    write: Callable[[LoadedModel[Config, Vocabulary], Path], None]  # Into an existing directory.
    # The same with the head of a task; None for a directory without one.
    read_task: Callable[[Path, bool], LoadedTask[Vocabulary] | None]
    write_task: Callable[[LoadedTask[Vocabulary], Path], None]
    head_class: Callable[[heads.Config], str | None]  # The class of the library that has a head; None: it has none.
    library: str  # The library that reads the format, by its name on a model card.
    usage: str  # How the library loads a directory, in Markdown, for a model card; {name} is the path of the directory.
    settings_file: str  # Nothing loads a directory without this file.
    settings_key: str  # A key of the settings by which a directory of this format is recognized.
    vocabulary_tables: frozenset[str]  # Paths of the parameters whose first axis is the vocabulary.
    position_tables: frozenset[str]  # Paths of the parameters whose first axis is the positions.
    may_differ: frozenset[str]  # Fields of the config in which a run may differ from the model that it continues.
    rows_to_copy: Callable[[Vocabulary, Tokenizer], np.ndarray]  # See `prelm_jax.formats.transfer`.


# Files of weights that are not read, and what to do about them.
_CONVERT = (
    "is read only by transformers 4 (pip install 'transformers<5' {library}): "
    "AutoModelForPreTraining.from_pretrained(DIRECTORY, {option}=True).save_pretrained(DIRECTORY)"
)
FOREIGN_WEIGHTS = {
    "pytorch_model*.bin*": (
        "is a pickle, which is never read; load it with transformers, as the class under architectures in config.json, "
        "and save_pretrained it as safetensors"
    ),
    "tf_model*.h5": _CONVERT.format(library="tensorflow", option="from_tf"),
    "flax_model*.msgpack": _CONVERT.format(library="flax", option="from_flax"),
    "*.ckpt*.index": f"is a TensorFlow checkpoint, which is read as BERT with {ORIGINAL_BERT} and vocab.txt beside it",
}


def foreign_weights(directory: Path) -> str:
    """What to do about weights in a format that is not read, to append to a message; empty where there are none."""
    found = ((file, remedy) for pattern, remedy in FOREIGN_WEIGHTS.items() for file in sorted(directory.glob(pattern)))
    return next((f"; {file.name} {remedy}" for file, remedy in found), "")


def find_model_type(directory: Path) -> tuple[object, Path]:
    """The model_type of a model directory, supported or not, and the path that it was found at."""
    if (directory / ORIGINAL_GPT).is_file():
        return "openai-gpt", directory / ORIGINAL_GPT
    settings = directory / "config.json"
    if settings.is_file():
        return read_json(settings).get("model_type"), settings
    if (directory / ORIGINAL_BERT).is_file():
        return "bert", directory / ORIGINAL_BERT
    if any(directory.glob(ELMO_OPTIONS)) or any(directory.glob(ELMO_WEIGHTS)):
        return "elmo", directory
    if directory.is_file() or Path(f"{directory}.index").is_file():
        raise InputError(f"{directory}: a model is a directory; give {directory.parent}")
    if seeds := sorted(str(path.parent) for path in directory.glob("seed-*/run.json")):
        raise InputError(
            f"{directory} holds the seeds of a fine-tuning: give one of them ({seeds[0]}), or what prelm export "
            f"{directory} DIRECTORY writes"
        )
    model = f"model directory (no config.json, {ORIGINAL_BERT} or {ELMO_OPTIONS})"
    raise InputError(f"{directory}: neither a {model} nor a work directory (no run.json){foreign_weights(directory)}")


def abstract_params(config: ModelConfig | TaskModelConfig) -> Params:
    """The parameters of a config as jax.ShapeDtypeStruct; nothing is allocated."""
    return jax.eval_shape(config.build().init_params, jax.random.key(0))


def checked(tensor: np.ndarray, name: str) -> np.ndarray:
    """A tensor as float32. Raises InputError, naming it, for integers, NaN and infinity."""
    if tensor.dtype.kind in "biu":
        raise InputError(f"{name} is of {tensor.dtype}; quantized models are not supported")
    with np.errstate(over="ignore"):
        values = tensor.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{name} has {np.count_nonzero(~np.isfinite(values))} values that are NaN or infinite")
    return values


def require(settings: Mapping[str, object], fixed: Mapping[str, object], source: Path) -> None:
    """Raises InputError if a setting is present and differs from the only supported value."""
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise InputError(f"{source}: {key} is {settings[key]!r}; only {value!r} is supported")


def save(
    model: LoadedModel[Config, Vocabulary] | LoadedTask[Vocabulary],
    format: Format[Config, Vocabulary],
    directory: str | os.PathLike,
    card: str,
) -> None:
    """Saves a model directory, with the head of a task if it has one, and with the text `card` as its README.md.

    An existing model directory of the format is overwritten, except for files that no reader of it reads.
    Raises InputError for any other directory that is not empty. If saving fails, the directory is unchanged; if the
    process is killed while files are moved, the directory has no settings file and is not loadable.
    """
    directory = Path(directory).resolve()
    settings = directory / format.settings_file
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: not a directory")
    overwritable = settings.is_file() and format.settings_key in read_json(settings)
    if directory.exists() and any(directory.iterdir()) and not overwritable:
        raise InputError(f"{directory}: not empty, and not a model directory; choose another one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
        written = Path(temporary)
        if isinstance(model, LoadedTask):
            format.write_task(model, written)
        else:
            format.write(model, written)
        (written / "README.md").write_text(card, encoding="utf-8")
        directory.mkdir(exist_ok=True)
        # The settings file is removed first and comes last, so that a mixture of two models is never loadable.
        settings.unlink(missing_ok=True)
        for file in [found for name in OPTIONAL_FILES for found in directory.glob(name)]:
            file.unlink()
        for file in sorted(written.iterdir(), key=lambda file: (file.name == format.settings_file, file.name)):
            os.replace(file, directory / file.name)
