"""A pretrained model and its directory: load it, save it, go on training from it, write its embeddings."""

import abc
import dataclasses
import inspect
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import h5py
import jax
import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.progress import Progress
from prelm_jax.storage import fetched, is_remote, reachable, read_json
from prelm_jax.tokenizers import load as tokenizers
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.parameters import path_name

Params = dict[str, Any]

RECORD_FORMAT = 1  # of run.json
ORIGINAL_GPT = "params_shapes.json"  # in the directory of a GPT as its authors published it
ELMO_OPTIONS, ELMO_WEIGHTS = "*options.json", "*weights.hdf5"  # in the directory of an ELMo, one file each


@dataclasses.dataclass(frozen=True, eq=False)
class Model(abc.ABC):
    """What `load` returns: a configuration, its parameters and a tokenizer, and what one does with them.

    A subclass is the codec of one family: it reads and writes the family's published format.

    `params`: the tree of `prelm_jax.models`, fp32, vocabulary tables padded.
    `tokenizer`: None for an ELMo whose directory says nothing of a vocabulary.
    `missing`: paths ("pooler/kernel") of the parameters that the directory lacks; they are zeros in `params`.
    """

    config: Any
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None
    missing: frozenset[str] = frozenset()

    config_class: ClassVar[type]
    # What reads the published format, by its name on a model card.
    library: ClassVar[str] = "transformers"
    # The file without which nothing loads a directory, and a key by which it is known for what it is.
    settings: ClassVar[tuple[str, str]] = ("config.json", "model_type")
    # The paths whose first axis is the vocabulary.
    vocabulary_tables: ClassVar[frozenset[str]]
    # The fields of the configuration in which a run may differ from the model that it continues.
    free_fields: ClassVar[frozenset[str]]

    @classmethod
    @abc.abstractmethod
    def read(cls, directory: Path) -> Self:
        """The model in a directory of the published format; InputError for what is missing or misshapen there."""

    @abc.abstractmethod
    def write(self, directory: Path) -> None:
        """Writes weights, configuration and tokenizer into an existing directory, in the published format."""

    @abc.abstractmethod
    def embed(self, texts: Sequence[str], truncate: bool = False) -> Iterator[tuple[list[str], np.ndarray]]:
        """For each text its tokens and its hidden states, f32 [layers + 1, tokens, width]; none for a blank text.

        `truncate`: cuts what is too long. A family may have more options, as keywords; `prelm embed` has them all.
        """

    @abc.abstractmethod
    def score(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """For each text the sum of the natural-log probabilities of its tokens, and their number."""

    def continued_rows(self, tokenizer: Tokenizer) -> np.ndarray:
        """For each entry of a vocabulary the row of this model's tables with which it begins, -1 for a fresh one.

        InputError where the vocabulary does not begin with the model's.
        """
        known, entries = self.tokenizer.tokens, tokenizer.tokens
        for i, entry in enumerate(known):
            if i >= len(entries) or entries[i] != entry:
                found = repr(entries[i]) if i < len(entries) else "nothing"
                raise InputError(
                    f"--init-from: entry {i} of the vocabulary is {entry!r} in the model, but {found} in the run; "
                    "the run's vocabulary must begin with the model's"
                )
        rows = np.arange(len(entries))
        return np.where(rows < len(known), rows, -1)


def family(model_type: object, source: str | os.PathLike) -> type[Model]:
    """The codec of a `model_type`; InputError, which names the source, for one that there is none for."""
    from prelm_jax.formats.bilm import ELMoModel  # Here, because they import this module.
    from prelm_jax.formats.huggingface_bert import BertModel
    from prelm_jax.formats.huggingface_gpt import GPTModel

    families = {"bert": BertModel, "openai-gpt": GPTModel, "elmo": ELMoModel}
    if model_type not in families:
        raise InputError(f"{source}: model_type is {model_type!r}; supported: {', '.join(families)}")
    return families[model_type]


def abstract_params(config: Any) -> Params:
    """The parameters of a configuration as jax.ShapeDtypeStruct; nothing is allocated."""
    return jax.eval_shape(config.build().init_params, jax.random.key(0))


def load(path: str | os.PathLike) -> Model:
    """The model in a model directory, or of the newest checkpoint in a work directory."""
    directory = reachable(path)
    if (directory / "run.json").is_file():
        return _load_run(directory)
    if is_remote(directory):
        raise InputError(f"{directory}: no work directory (no run.json); copy a model directory to this machine first")
    if (directory / ORIGINAL_GPT).is_file():
        return family("openai-gpt", directory / ORIGINAL_GPT).read(directory)
    if (directory / "config.json").is_file():
        source = directory / "config.json"
        return family(read_json(source).get("model_type"), source).read(directory)
    if any(directory.glob(ELMO_OPTIONS)) or any(directory.glob(ELMO_WEIGHTS)):
        return family("elmo", directory).read(directory)
    raise InputError(
        f"{directory}: neither a model directory (no config.json, no {ELMO_OPTIONS}) nor a work directory (no run.json)"
    )


def read_record(workdir: Path) -> dict[str, Any]:
    """The run.json of a work directory, which `prelm_jax.pretrain` writes."""
    path = workdir / "run.json"
    if not path.is_file():
        raise InputError(f"{workdir} is not a work directory of a run (it has no run.json)")
    record = json.loads(path.read_text()) if is_remote(path) else read_json(path)
    if record.get("format", 1) > RECORD_FORMAT:
        raise InputError(f"{path} was written by a newer version of prelm_jax: upgrade this one")
    return record


def _load_run(directory: Path) -> Model:
    from prelm_jax.training.checkpoint import restore_params  # Here, because only this needs Orbax.

    source = directory / "run.json"
    fields = dict(read_record(directory).get("model", {}))
    codec = family(fields.pop("model_type", None), source)
    try:
        config = codec.config_class(**fields)
    except TypeError as error:
        raise InputError(f"{source}: not the fields of a {codec.config_class.__name__} ({error})") from error
    _, params = restore_params(directory / "checkpoints", abstract_params(config))
    return codec(config, params, read_tokenizer(directory))


def read_tokenizer(workdir: Path) -> Tokenizer:
    """The tokenizer of a work directory."""
    with fetched(workdir / "tokenizer") as directory:
        return tokenizers.load(directory)


def save(model: Model, directory: str | os.PathLike, card: str) -> None:
    """Writes a model directory that others read; `card` is the text of its README.md.

    An older model directory of that name is overwritten, other files in it are left alone; anything else that is not
    empty is refused. A save that fails leaves the directory as it was; one that is killed, without a config.json
    or options.json.
    """
    directory = Path(directory).resolve()
    name, key = model.settings
    settings = directory / name
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: not a directory")
    overwritable = settings.is_file() and key in read_json(settings)
    if directory.exists() and any(directory.iterdir()) and not overwritable:
        raise InputError(f"{directory}: not empty, and not a model directory; give another one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
        written = Path(temporary)
        model.write(written)
        (written / "README.md").write_text(card, encoding="utf-8")
        directory.mkdir(exist_ok=True)
        # Nothing loads a directory without its settings: they go first and come last.
        settings.unlink(missing_ok=True)
        for file in sorted(written.iterdir(), key=lambda file: (file.name == name, file.name)):
            os.replace(file, directory / file.name)


def initial_params(model: Model, config: Any, fresh: Params, tokenizer: Tokenizer) -> Params:
    """The parameters from which a run with `config` and `tokenizer` goes on training a loaded model.

    The values of the model, except for what its directory lacks and for new entries of the vocabulary: those keep
    their initialisation in `fresh`. Sizes must be the same; for the vocabulary see `Model.continued_rows`. Arrays
    taken from the model lie where they lie there.
    """
    if config.model_type != model.config.model_type:
        raise InputError(f"--init-from: the model is {model.config.model_type}, the run trains {config.model_type}")
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(model.config, field.name)
        if field.name not in model.free_fields and ours != theirs:
            raise InputError(f"--init-from: {field.name} is {theirs} in the model, but {ours} in the run")
    rows_V = model.continued_rows(tokenizer)
    continued = np.flatnonzero(rows_V >= 0)

    def choose(path: tuple, new: jax.Array, loaded: jax.Array) -> jax.Array:
        name = path_name(path)
        if name in model.missing:
            return new
        if name in model.vocabulary_tables:
            return new.at[continued].set(loaded[rows_V[continued]])
        return loaded

    return jax.tree_util.tree_map_with_path(choose, fresh, model.params)


def write_embeddings(model: Model, lines: Sequence[str], path: str | os.PathLike, **options: Any) -> None:
    """Embeds lines into an HDF5 file, which appears when it is complete. `options`: those of the model's `embed`.

    Dataset "i" (from "0") is line i: f32 [layers + 1, tokens, width]. Its attribute `tokens` is their JSON list.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no directory {path.parent}")
    for name in options:
        if name not in inspect.signature(model.embed).parameters:
            raise InputError(f"--{name.replace('_', '-')}: {model.config.model_type} has no such option; leave it out")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with h5py.File(temporary, "w") as file:
            results = model.embed(lines, **options)
            with Progress("embed", len(lines), "lines") as progress:
                for i, (tokens, hidden) in enumerate(results):
                    dataset = file.create_dataset(str(i), data=hidden)
                    dataset.attrs["tokens"] = json.dumps(tokens, ensure_ascii=False)
                    progress.advance(1)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
