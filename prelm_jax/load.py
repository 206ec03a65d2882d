"""load(path): a model directory or a work directory, as a pretrained model."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from prelm_jax.errors import InputError
from prelm_jax.formats import bilm, huggingface_bert, huggingface_gpt
from prelm_jax.formats.base import Format, LoadedModel, abstract_params, find_model_type
from prelm_jax.inference.base import Pretrained
from prelm_jax.inference.bert import BertPretrained
from prelm_jax.inference.elmo import ELMoPretrained
from prelm_jax.inference.gpt import GPTPretrained
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.elmo import ELMoConfig
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.storage import fetched, is_remote, reachable, read_json
from prelm_jax.tokenizers import load as tokenizers
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.checkpoint import restore_params

RECORD_FORMAT = 1  # of run.json


class Family(NamedTuple):
    """One row of the table of families."""

    model: type
    format: Format
    pretrained: type[Pretrained]


FAMILIES = {
    "bert": Family(BertConfig, huggingface_bert.FORMAT, BertPretrained),
    "openai-gpt": Family(GPTConfig, huggingface_gpt.FORMAT, GPTPretrained),
    "elmo": Family(ELMoConfig, bilm.FORMAT, ELMoPretrained),
}


def family(model_type: object, source: object) -> Family:
    """The row of a model_type; InputError, naming the source, for an unknown one."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"{source}: model_type is {model_type!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def load(path: str | os.PathLike) -> Pretrained:
    """The model in a model directory, or of the newest checkpoint in a work directory."""
    directory = reachable(path)
    if (directory / "run.json").is_file():
        return _load_run(directory)
    if is_remote(directory):
        raise InputError(f"{directory}: no work directory (no run.json); copy a model directory to this machine first")
    row = family(*find_model_type(directory))
    return row.pretrained(row.format.read(directory))


def read_record(workdir: Path) -> dict[str, Any]:
    """The run.json of a work directory, which `prelm_jax.pretrain` writes."""
    path = workdir / "run.json"
    if not path.is_file():
        raise InputError(f"{workdir} is not a work directory of a run (it has no run.json)")
    record = json.loads(path.read_text()) if is_remote(path) else read_json(path)
    if record.get("format", 1) > RECORD_FORMAT:
        raise InputError(f"{path} was written by a newer version of prelm_jax: upgrade this one")
    return record


def read_tokenizer(workdir: Path) -> Tokenizer:
    """The tokenizer of a work directory."""
    with fetched(workdir / "tokenizer") as directory:
        return tokenizers.load(directory)


def _load_run(directory: Path) -> Pretrained:
    source = directory / "run.json"
    fields = dict(read_record(directory).get("model", {}))
    row = family(fields.pop("model_type", None), source)
    try:
        config = row.model(**fields)
    except TypeError as error:
        raise InputError(f"{source}: not the fields of a {row.model.__name__} ({error})") from error
    _, params = restore_params(directory / "checkpoints", abstract_params(config))
    return row.pretrained(LoadedModel(config, params, read_tokenizer(directory)))
