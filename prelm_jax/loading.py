"""load(path): a model directory or a work directory, as a pretrained model."""

import dataclasses
import os
from pathlib import Path

from prelm_jax.errors import InputError
from prelm_jax.families import Family, find_family
from prelm_jax.formats.base import LoadedModel, LoadedTask, abstract_params, find_model_type
from prelm_jax.formats.heads import HEADS, split
from prelm_jax.formats.sentence_transformers import encoder_directory, read_vectors
from prelm_jax.hub import fetch, is_hub_name
from prelm_jax.inference.base import Pretrained
from prelm_jax.inference.heads import TaskPretrained
from prelm_jax.models.task import TaskModelConfig
from prelm_jax.run import RunRecord
from prelm_jax.storage import is_remote
from prelm_jax.training.checkpoint import Step
from prelm_jax.validation import read
from prelm_jax.workdir import WorkDir


def load(path: str | os.PathLike, step: Step = "newest", lowercase: bool = True) -> Pretrained:
    """A pretrained model, on the first device.

    path: a model directory (Hugging Face's for BERT and GPT-1, sentence-transformers' with such an encoder, Google's
    for BERT, OpenAI's for GPT-1, bilm-tf's for ELMo), a model of the Hugging Face hub (hub:OWNER/NAME or
    hub:OWNER/NAME@REVISION), or a work directory.
    step: the checkpoint of a work directory: a step number, "newest", or "best" (lowest held-out loss).
    lowercase: whether to lower-case text if there is a vocab.txt but no tokenizer_config.json, as transformers does.

    A fine-tuned model is a `prelm_jax.inference.heads.TaskPretrained`. Raises InputError that names what is missing if
    there is no model at `path`.

        model = load("runs/bert-mini")
        model.fill("Paris is the [MASK] of France.")
    """
    if is_hub_name(path):
        _, path = fetch(str(path))
    workdir = WorkDir(path)
    if workdir.exists():
        return load_checkpoint(workdir, step)[1]
    directory = workdir.path
    if step != "newest":
        raise InputError(f"--step {step}: {directory} is not a work directory (no run.json), so it has no steps")
    if is_remote(directory):
        raise InputError(f"{directory}: no work directory (no run.json); copy a model directory to this machine first")
    directory = encoder_directory(Path(path))
    family = find_family(*find_model_type(directory))
    task = family.format.read_task(directory, lowercase)
    encoder = family.format.read(directory, lowercase) if task is None else split(task)[0]
    vectors = read_vectors(Path(path), getattr(encoder.config, "hidden_size", 0))
    pretrained = family.pretrained(dataclasses.replace(encoder, vectors=vectors))
    return pretrained if task is None else TaskPretrained(task, pretrained, family.frame)


def load_encoder(path: str | os.PathLike) -> Pretrained:
    """What `load` gives, without the head of a task."""
    model = load(path)
    return model.pretrained if isinstance(model, TaskPretrained) else model


def load_checkpoint(workdir: WorkDir, step: Step = "newest") -> tuple[int, Pretrained]:
    """The step and the model of a checkpoint in a work directory."""
    record = workdir.read_record()
    family = find_family(record.model_type, record.source)
    if record.is_task:
        return _load_task(workdir, record, family, step)
    config = record.model(family.model)
    found, params = workdir.read_params(abstract_params(config), step)
    return found, family.pretrained(LoadedModel(config, params, workdir.read_tokenizer()))


def _load_task(workdir: WorkDir, record: RunRecord, family: Family, step: Step) -> tuple[int, TaskPretrained]:
    source = f"{record.source}: identity"
    settings = read(dict[str, object], record.identity.get("head"), f"{source}.head")
    kind = HEADS.get(str(settings.pop("name", None)))
    if kind is None:
        raise InputError(f"{source}.head: name must be one of {', '.join(HEADS)}")
    encoder = read(family.model, record.identity.get("encoder"), f"{source}.encoder")
    config = TaskModelConfig(encoder, read(kind, settings, f"{source}.head"))
    labels = read(tuple[str, ...], record.identity.get("labels"), f"{source}.labels")
    max_length = read(int, record.identity.get("max_length"), f"{source}.max_length")
    found, params = workdir.read_params(abstract_params(config), step)
    task = LoadedTask(config, params, workdir.read_tokenizer(), frozenset(), labels, max_length)
    return found, TaskPretrained(task, family.pretrained(split(task)[0]), family.frame)
