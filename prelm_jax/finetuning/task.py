"""A task: labeled files, read and framed, and the model that its seeds start from."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import numpy as np

from prelm_jax.cache import digest
from prelm_jax.data.examples import Example, Label
from prelm_jax.data.frames import WIDTHS, Frame
from prelm_jax.data.framing import frame_examples
from prelm_jax.data.rows import Row
from prelm_jax.data.tasks import TaskBatches, best_num_rows, weighted
from prelm_jax.errors import InputError
from prelm_jax.families import find_family
from prelm_jax.finetuning import metrics
from prelm_jax.finetuning.config import FineTuning
from prelm_jax.finetuning.files import LabelledData, check_labels, label_names, print_counts, read_examples
from prelm_jax.formats.base import LoadedModel, ModelConfig
from prelm_jax.formats.transfer import initial_params
from prelm_jax.hub import fetch, is_hub_name
from prelm_jax.inference.base import Pretrained
from prelm_jax.loading import load_encoder
from prelm_jax.models import heads
from prelm_jax.models.task import EncoderConfig, TaskModelConfig
from prelm_jax.run import RunRecord, with_name
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import Params
from prelm_jax.training.parameters import path_name

# The fields that say how examples and parameters are found. Both are compared by fingerprint.
SOURCES = ("name", "train", "dev", "init_from", "columns", "metric", "positive")


class Task(NamedTuple):
    """A fine-tuning whose files are read: all that its seeds share."""

    run: FineTuning  # With the number of steps.
    pretrained: Pretrained
    config: TaskModelConfig
    frame: Frame
    names: tuple[str, ...]  # Of labels, by number.
    train_examples: list[Example]
    dev_examples: list[Example]
    train_rows: list[Row]
    dev_rows: list[Row]
    facts: dict[str, object]  # What decides the bits besides the fields of the run.

    def seeded(self, seed: int) -> "Task":
        """The task with another seed."""
        return self._replace(run=dataclasses.replace(self.run, seed=seed))

    @property
    def record(self) -> RunRecord:
        """What the work directory of the seed says about its training."""
        return RunRecord.of(self.run, self.config.model_type, SOURCES, self.facts)

    def batches(self, devices: int, batch_size: int | None = None) -> TaskBatches:
        """The training batches, packed where that pays; `batch_size`: instead of the run's."""
        size, rows, seed = batch_size or self.run.batch_size, self.train_rows, self.run.seed
        if not (self.frame.packs and self.config.head.packs):
            return TaskBatches(self.frame, rows, size, seed)
        # The same for 1, 2, 4 and 8 devices, each of which gets the same number of packed rows.
        multiple = self.run.accumulate * math.lcm(8, devices)
        lengths = np.random.default_rng(0).permutation([row.length for row in rows])
        return TaskBatches(self.frame, rows, size, seed, best_num_rows(lengths, size, multiple))

    def initial_params(self, fresh: Params) -> Params:
        """The parameters to start from: the pretrained ones, but `fresh` for new ones and reinitialized layers."""
        loaded = cast(LoadedModel[ModelConfig, Tokenizer], self.pretrained.loaded)
        format = find_family(self.config.model_type, self.run.init_from).format
        encoder = cast(ModelConfig, self.config.encoder)
        params = initial_params(loaded, format, encoder, fresh, self.frame.tokenizer)
        if not self.run.reinitialize_layers:
            return params

        def choose(path: tuple[object, ...], new: jax.Array, loaded: jax.Array) -> jax.Array:
            return new if self.config.depth(path_name(path)) <= self.run.reinitialize_layers else loaded

        return jax.tree_util.tree_map_with_path(choose, fresh, params)

    def scores(self, labels: Sequence[Label]) -> dict[str, metrics.Score]:
        """The metrics of predicted labels of the dev examples."""
        return metrics.scores(self.run.kind, self.dev_examples, labels, self.names, self.run.positive)

    def baselines(self) -> dict[str, dict[str, float]]:
        """metric -> trivial baseline -> value on the dev examples."""
        kind, positive = self.run.kind, self.run.positive
        return metrics.baselines(kind, self.dev_examples, self.names, positive, training=self.train_examples)


def prepare_task(run: FineTuning) -> Task:
    """Reads the files of a task and the model that it starts from. Raises InputError for what the user can mend."""
    missing = [f"--{name.replace('_', '-')}" for name in ("init_from", "train", "dev") if getattr(run, name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} must be given")
    if is_hub_name(str(run.init_from)):
        run = dataclasses.replace(run, init_from=fetch(str(run.init_from))[0])
    train_data, dev_data, names = _read_files(run)
    pretrained = load_encoder(str(run.init_from))
    if not 0 <= run.reinitialize_layers <= pretrained.config.num_layers:
        raise InputError(f"--reinitialize-layers {run.reinitialize_layers}: there are {pretrained.config.num_layers}")
    frame = _make_frame(run, pretrained)
    train_rows = _frame_file(run, frame, str(run.train), train_data, names)
    dev_rows = _frame_file(run, frame, str(run.dev), dev_data, names)
    if (weight_N := run.weights_by_label(names, train_rows)) is not None:
        train_rows = weighted(train_rows, weight_N)
    config = _model_config(run, pretrained, frame, names, num_texts=len(train_rows[0].texts))
    return Task(
        run=run.scheduled(len(train_rows)),
        pretrained=pretrained,
        config=config,
        frame=frame,
        names=names,
        train_examples=train_data.examples,
        dev_examples=dev_data.examples,
        train_rows=train_rows,
        dev_rows=dev_rows,
        facts={
            "head": with_name(config.head),
            "encoder": config.encoder,
            "labels": names,
            "max_length": frame.max_length,
            "train_fingerprint": _examples_fingerprint(train_data.examples),
            "dev_fingerprint": _examples_fingerprint(dev_data.examples),
            "tokenizer_fingerprint": frame.tokenizer.fingerprint,
            "encoder_fingerprint": None if run.scratch else _params_fingerprint(pretrained.params),
        },
    )


def _read_files(run: FineTuning) -> tuple[LabelledData, LabelledData, tuple[str, ...]]:
    """The training and the dev data, and the names of the labels; checks what the run says about them."""
    train_data, dev_data = (read_examples(str(spec), run.kind, run.columns) for spec in (run.train, run.dev))
    names = label_names(train_data.examples, run.kind)
    check_labels(str(run.train), train_data, run.kind, names)
    check_labels(str(run.dev), dev_data, run.kind, names)
    texts = {example.sequences for example in train_data.examples}
    both = sum(example.sequences in texts for example in dev_data.examples)
    dev_data.counts.update({f"of its examples also in {run.train}": both} if both else {})
    metrics.check_positive(run.kind, run.positive, names)
    if run.metric is not None:
        gold = gold_labels(dev_data.examples)
        known = metrics.scores(run.kind, dev_data.examples, gold, names, run.positive)
        if run.metric not in known:
            raise InputError(f"--metric {run.metric}: the metrics of this task are {', '.join(known)}")
    return train_data, dev_data, names


def _make_frame(run: FineTuning, pretrained: Pretrained) -> Frame:
    """The frame of the model's family, for rows of the run's length."""
    family = find_family(pretrained.config.model_type, run.init_from)
    if run.kind == "spans" and not family.frame.answers:
        raise InputError(f"{run.init_from} reads from left to right (GPT), so it cannot tell where an answer begins")
    positions = getattr(pretrained.config, "max_position_embeddings", None)  # ELMo's have no end.
    max_length = min(run.max_length or WIDTHS[-1], positions or WIDTHS[-1])
    return family.frame(family.frame.task_tokenizer(pretrained.tokenizer), max_length, run.symmetric)


def _frame_file(run: FineTuning, frame: Frame, spec: str, data: LabelledData, names: Sequence[str]) -> list[Row]:
    """The rows of a file; process 0 prints what was left out, read otherwise, or cut."""
    rows, num_cut = frame_examples(frame, data.examples, run.kind, names, run.stride)
    if jax.process_index() == 0:
        print_counts(spec, data.counts, num_cut, len(data.examples), run.kind, frame.max_length)
    return rows


def _model_config(
    run: FineTuning, pretrained: Pretrained, frame: Frame, names: Sequence[str], num_texts: int
) -> TaskModelConfig:
    """The encoder, with the vocabulary of the frame, and the head for the labels of the training file."""
    head = run.head
    if isinstance(head, heads.Label):
        num_labels = 1 if head.kind == "number" else len(names)
        head = dataclasses.replace(head, num_labels=num_labels, pair=num_texts == 2)
    elif isinstance(head, heads.Tags):
        head = dataclasses.replace(head, num_tags=len(names))
    vocab_size = max(pretrained.config.vocab_size or 0, frame.tokenizer.vocab_size)
    encoder = cast(EncoderConfig, dataclasses.replace(pretrained.config, vocab_size=vocab_size))
    config = TaskModelConfig(encoder, head, run.tune, run.layer_decay, run.lm_coefficient)
    config.check_together()
    return config


def gold_labels(examples: Sequence[Example]) -> list[Label]:
    """The labels of examples that all have one."""
    return [cast(Label, example.label) for example in examples]


def _examples_fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) of examples."""
    return digest([dataclasses.astuple(example) for example in examples])


def _params_fingerprint(params: Params) -> str:
    """SHA-256 (hex) of parameters and their names."""
    found = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.asarray(value).tobytes())
    return found.hexdigest()
